//! The books of a pool: which state each slot is in, and which slot a hash names. No lock, no
//! memory, no events; the pool adds those.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasherDefault, Hasher},
};

use blockplane_protocol::{
    BlockHash, BlockId, SequenceHash, SnapshotBlock, StoredBlock, Tier, TokenBlock,
};

use super::{PoolExhausted, PoolStats};
use crate::evict::EvictionPolicy;

/// State of every slot of a pool.
///
/// Each slot is in exactly one place: the free list, a handle (leased, quarantined or shared), or
/// the eviction policy. The registry names exactly the published slots.
#[derive(Debug)]
pub(crate) struct Store {
    slots: Box<[Slot]>,
    /// Last in, first out: the block used last is the warmest.
    free: Vec<BlockId>,
    registry: HashMap<SequenceHash, BlockId, BuildHasherDefault<HashIsUniform>>,
    policy: Box<dyn EvictionPolicy>,
    prefix_caching: bool,
    /// What the last allocation evicted; kept for its capacity.
    evicted: Vec<SequenceHash>,
    active: usize,
    quarantined: usize,
}

#[derive(Clone, Debug)]
struct Slot {
    state: State,
    /// Below here: meaningful in the states `Shared` and `Inactive`.
    hashes: TokenBlock,
    parent: Option<SequenceHash>,
    /// Where the parent was when this block was registered; checked against `parent` on use.
    parent_slot: Option<BlockId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Owned by one handle that may write.
    Leased,
    /// Owned by one handle; a peer may write.
    Quarantined,
    /// Registered and held; the registry names it if `published`.
    Shared {
        holders: u32,
        published: bool,
    },
    /// Registered and held by nobody; the registry names it and the policy orders it.
    Inactive,
}

/// What became of a block that was registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registered {
    /// It is the first of its name.
    New,
    /// It is the first of its name in a pool that does not share blocks.
    Private,
    /// The name was taken: this block holds the same KV, the registered one is free again.
    Duplicate(BlockId),
}

impl Store {
    pub(crate) fn new(
        blocks: u32,
        prefix_caching: bool,
        mut policy: Box<dyn EvictionPolicy>,
    ) -> Self {
        policy.resize(blocks);
        let slot = Slot {
            state: State::Free,
            hashes: TokenBlock {
                block: BlockHash(0),
                sequence: SequenceHash(0),
            },
            parent: None,
            parent_slot: None,
        };
        Self {
            slots: vec![slot; blocks as usize].into(),
            free: (0..blocks).rev().map(BlockId).collect(),
            // Twice the names it will ever hold: a full table pays for every removal.
            registry: HashMap::with_capacity_and_hasher(
                2 * blocks as usize * usize::from(prefix_caching),
                BuildHasherDefault::default(),
            ),
            policy,
            prefix_caching,
            evicted: Vec::new(),
            active: 0,
            quarantined: 0,
        }
    }

    pub(crate) fn stats(&self) -> PoolStats {
        let stats = PoolStats {
            total: self.slots.len(),
            free: self.free.len(),
            cached: self.policy.len(),
            active: self.active,
            quarantined: self.quarantined,
        };
        assert!(
            stats.free + stats.cached + stats.active + stats.quarantined == stats.total,
            "every block is in one place: {stats:?}"
        );
        stats
    }

    /// Leases `wanted` blocks, all or none, and hands them to `lease` one by one. Returns the names
    /// of those that were evicted for that.
    pub(crate) fn allocate(
        &mut self,
        wanted: usize,
        mut lease: impl FnMut(BlockId),
    ) -> Result<&[SequenceHash], PoolExhausted> {
        let available = self.free.len() + self.policy.len();
        if wanted > available {
            return Err(PoolExhausted {
                wanted,
                available,
                total: self.slots.len(),
            });
        }
        self.evicted.clear();
        for _ in 0..wanted {
            let id = self.free.pop().unwrap_or_else(|| self.evict());
            self.slots[id.index()].state = State::Leased;
            lease(id);
        }
        self.active += wanted;
        Ok(&self.evicted)
    }

    /// A leased or quarantined block is free again.
    pub(crate) fn release_lease(&mut self, id: BlockId) {
        match self.slots[id.index()].state {
            State::Leased => self.active -= 1,
            State::Quarantined => self.quarantined -= 1,
            state => unreachable!("block {} has a lease and is {state:?}", id.0),
        }
        self.free_slot(id);
    }

    pub(crate) fn quarantine(&mut self, id: BlockId) {
        self.replace_state(id, State::Leased, State::Quarantined);
        self.active -= 1;
        self.quarantined += 1;
    }

    pub(crate) fn lift_quarantine(&mut self, id: BlockId) {
        self.replace_state(id, State::Quarantined, State::Leased);
        self.quarantined -= 1;
        self.active += 1;
    }

    /// Gives the leased block `id` its name, with one holder.
    pub(crate) fn register(
        &mut self,
        id: BlockId,
        hashes: TokenBlock,
        parent: Option<SequenceHash>,
    ) -> Registered {
        assert!(
            self.slots[id.index()].state == State::Leased,
            "only a leased block is registered"
        );
        let outcome = if self.prefix_caching {
            match self.registry.entry(hashes.sequence) {
                Entry::Occupied(first) => Registered::Duplicate(*first.get()),
                Entry::Vacant(name) => {
                    name.insert(id);
                    Registered::New
                }
            }
        } else {
            Registered::Private
        };
        if let Registered::Duplicate(first) = outcome {
            self.hold(first);
            self.active -= 1;
            self.free_slot(id);
        } else {
            let parent_slot = parent.and_then(|parent| self.registry.get(&parent).copied());
            self.slots[id.index()] = Slot {
                state: State::Shared {
                    holders: 1,
                    published: outcome == Registered::New,
                },
                hashes,
                parent,
                parent_slot,
            };
        }
        // Invariant 8: one name per block at most.
        assert!(self.registry.len() <= self.slots.len());
        outcome
    }

    /// Holds the block named `hash`, if it is there.
    pub(crate) fn acquire(&mut self, hash: SequenceHash) -> Option<BlockId> {
        let id = *self.registry.get(&hash)?;
        // Invariants 1 and 2: only a complete block has a name, and it is its own.
        assert!(
            self.slots[id.index()].hashes.sequence == hash,
            "block {} is found under another name than its own",
            id.0
        );
        self.hold(id);
        Some(id)
    }

    pub(crate) fn contains(&self, hash: SequenceHash) -> bool {
        self.registry.contains_key(&hash)
    }

    /// One more holder of a block that is held already.
    pub(crate) fn retain(&mut self, id: BlockId) {
        let State::Shared { holders, .. } = &mut self.slots[id.index()].state else {
            unreachable!("block {} is held and not shared", id.0);
        };
        *holders += 1;
    }

    /// One holder less; the last one leaves the block inactive, or free if nobody can find it.
    pub(crate) fn release(&mut self, id: BlockId, hash: SequenceHash) {
        let slot = &mut self.slots[id.index()];
        assert!(
            slot.hashes.sequence == hash,
            "invariant 2: block {} changed its name while it was held",
            id.0
        );
        let State::Shared { holders, published } = &mut slot.state else {
            unreachable!("block {} is held and not shared", id.0);
        };
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        self.active -= 1;
        if *published {
            slot.state = State::Inactive;
            let parent = self.inactive_parent(id);
            self.policy.insert(id, parent);
        } else {
            self.free_slot(id);
        }
    }

    /// Forgets every name. Inactive blocks are free; held ones will be when they are released.
    pub(crate) fn clear(&mut self) {
        while let Some(id) = self.policy.evict() {
            self.free_slot(id);
        }
        for id in self.registry.drain().map(|(_, id)| id) {
            if let State::Shared { published, .. } = &mut self.slots[id.index()].state {
                *published = false;
            }
        }
    }

    /// Everything that can be found, with parents, in no particular order.
    pub(crate) fn published(&self) -> Vec<SnapshotBlock> {
        let mut found = Vec::with_capacity(self.registry.len());
        found.extend(
            self.slots
                .iter()
                .filter(|slot| slot.published())
                .map(|slot| SnapshotBlock {
                    parent: slot.parent,
                    block: StoredBlock {
                        block: slot.hashes.block,
                        sequence: slot.hashes.sequence,
                    },
                    tier: Tier::Device,
                }),
        );
        assert!(
            found.len() == self.registry.len(),
            "each published block has its name"
        );
        found
    }

    fn hold(&mut self, id: BlockId) {
        match &mut self.slots[id.index()].state {
            State::Shared { holders, .. } => *holders += 1,
            state @ State::Inactive => {
                *state = State::Shared {
                    holders: 1,
                    published: true,
                };
                self.policy.remove(id);
                self.active += 1;
            }
            state @ (State::Free | State::Leased | State::Quarantined) => {
                unreachable!("block {} has a name and is {state:?}", id.0)
            }
        }
    }

    /// The slot of the block before `id`, if that block is inactive.
    fn inactive_parent(&self, id: BlockId) -> Option<BlockId> {
        let child = &self.slots[id.index()];
        let parent = child.parent?;
        let is_parent = |slot: &BlockId| {
            let candidate = &self.slots[slot.index()];
            candidate.state == State::Inactive && candidate.hashes.sequence == parent
        };
        child.parent_slot.filter(is_parent).or_else(|| {
            // Where it was is overwritten; it may have been computed again elsewhere.
            let elsewhere = *self.registry.get(&parent)?;
            Some(elsewhere).filter(is_parent)
        })
    }

    /// Takes the next victim and its name away.
    fn evict(&mut self) -> BlockId {
        let id = self
            .policy
            .evict()
            .expect("the policy said how many it has");
        let slot = &self.slots[id.index()];
        assert!(
            slot.state == State::Inactive,
            "only an inactive block is evicted"
        );
        let named = self.registry.remove(&slot.hashes.sequence);
        assert!(named == Some(id), "an inactive block has its name");
        self.evicted.push(slot.hashes.sequence);
        id
    }

    fn replace_state(&mut self, id: BlockId, from: State, to: State) {
        let state = &mut self.slots[id.index()].state;
        assert!(*state == from, "block {} is {state:?}", id.0);
        *state = to;
    }

    fn free_slot(&mut self, id: BlockId) {
        self.slots[id.index()].state = State::Free;
        self.free.push(id);
    }
}

impl Slot {
    fn published(&self) -> bool {
        match self.state {
            State::Inactive => true,
            State::Shared { published, .. } => published,
            State::Free | State::Leased | State::Quarantined => false,
        }
    }
}

/// Takes a hash for what it is: sequence hashes are uniform already.
#[derive(Debug, Default)]
pub(crate) struct HashIsUniform(u64);

impl Hasher for HashIsUniform {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("only 64-bit hashes are keys here");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
