//! The books of a pool: which state each slot is in, and which slot a hash names. No lock, no
//! memory, no events; the pool adds those.

use blockplane_protocol::{BlockId, SequenceHash, SnapshotBlock, StoredBlock, Tier, TokenBlock};
use hashbrown::{HashTable, hash_table::Entry};

use super::{
    PoolActivity, PoolExhausted, PoolStats,
    slot::{BLOCKS_END, Slot, State},
};
use crate::evict::{EvictionPolicy, Released};

/// State of every slot of a pool.
///
/// Each slot is in exactly one place: the free list, a handle (leased, quarantined or held), the
/// eviction policy, or out of use. The registry names exactly the published slots.
///
/// Memory per block: 32 bytes for the slot, 4 in the free list, 12 to 23 in the registry (5 bytes a
/// bucket, which are a power of two and at least 16/7 of the blocks), and what the policy needs.
#[derive(Debug)]
pub(crate) struct Store {
    slots: Box<[Slot]>,
    /// Last in, first out: the block used last is the warmest.
    free: Vec<BlockId>,
    /// Slots by the names in them, which are uniform already.
    registry: HashTable<u32>,
    policy: Box<dyn EvictionPolicy>,
    prefix_caching: bool,
    /// Names that the last operation took away; kept for its capacity.
    removed: Vec<SequenceHash>,
    active: usize,
    quarantined: usize,
    retired: usize,
    pub(super) activity: PoolActivity,
}

/// A registered block as it is in the books.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) id: BlockId,
    pub(crate) hashes: TokenBlock,
    pub(crate) parent: Option<SequenceHash>,
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
        assert!(blocks < BLOCKS_END, "a pool has fewer than 2^32 - 2 blocks");
        policy.resize(blocks);
        Self {
            slots: vec![Slot::FREE; blocks as usize].into(),
            free: (0..blocks).rev().map(BlockId).collect(),
            // Twice the names it will ever hold: a full table pays for every removal.
            registry: HashTable::with_capacity(2 * blocks as usize * usize::from(prefix_caching)),
            policy,
            prefix_caching,
            removed: Vec::new(),
            active: 0,
            quarantined: 0,
            retired: 0,
            activity: PoolActivity::default(),
        }
    }

    pub(crate) fn stats(&self) -> PoolStats {
        let stats = PoolStats {
            total: self.slots.len(),
            free: self.free.len(),
            cached: self.policy.len(),
            active: self.active,
            quarantined: self.quarantined,
            retired: self.retired,
        };
        let parts = [
            stats.free,
            stats.cached,
            stats.active,
            stats.quarantined,
            stats.retired,
        ];
        assert!(
            parts.iter().sum::<usize>() == stats.total,
            "every block is in one place: {stats:?}"
        );
        stats
    }

    /// Blocks that can be leased.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.policy.len()
    }

    /// Leases `wanted` blocks, all or none, and hands them to `lease` one by one. Returns the names
    /// of those that were evicted for that.
    pub(crate) fn allocate(
        &mut self,
        wanted: usize,
        mut lease: impl FnMut(BlockId),
    ) -> Result<&[SequenceHash], PoolExhausted> {
        let available = self.available();
        if wanted > available {
            return Err(PoolExhausted {
                wanted,
                available,
                total: self.slots.len() - self.retired,
            });
        }
        self.removed.clear();
        for _ in 0..wanted {
            let id = self.free.pop().unwrap_or_else(|| self.evict());
            self.slots[id.index()].set_state(State::Leased);
            lease(id);
        }
        self.active += wanted;
        self.activity.filling += wanted;
        let evicted = self.removed.len();
        self.activity.allocations += wanted as u64;
        self.activity.allocations_from_reset += (wanted - evicted) as u64;
        self.activity.evictions += evicted as u64;
        Ok(&self.removed)
    }

    /// A leased or quarantined block is free again.
    pub(crate) fn release_lease(&mut self, id: BlockId) {
        match self.slots[id.index()].state() {
            State::Leased => {
                self.active -= 1;
                self.activity.filling -= 1;
            }
            State::Quarantined => self.quarantined -= 1,
            state => unreachable!("block {} has a lease and is {state:?}", id.0),
        }
        self.free_slot(id);
    }

    /// A leased block is never used again.
    pub(crate) fn retire_lease(&mut self, id: BlockId) {
        self.replace_state(id, State::Leased, State::Retired);
        self.active -= 1;
        self.activity.filling -= 1;
        self.retired += 1;
    }

    pub(crate) fn quarantine(&mut self, id: BlockId) {
        self.replace_state(id, State::Leased, State::Quarantined);
        self.active -= 1;
        self.activity.filling -= 1;
        self.quarantined += 1;
    }

    pub(crate) fn lift_quarantine(&mut self, id: BlockId) {
        self.replace_state(id, State::Quarantined, State::Leased);
        self.quarantined -= 1;
        self.active += 1;
        self.activity.filling += 1;
    }

    /// Gives the leased block `id` its name, with one holder. `parent_at` is where the parent may be.
    pub(crate) fn register(
        &mut self,
        id: BlockId,
        hashes: TokenBlock,
        parent: Option<SequenceHash>,
        parent_at: Option<BlockId>,
    ) -> Registered {
        assert!(
            self.slots[id.index()].state() == State::Leased,
            "only a leased block is registered"
        );
        let outcome = if self.prefix_caching {
            self.publish(id, hashes, parent, parent_at)
        } else {
            self.slots[id.index()].fill(State::Unnamed, hashes, parent, None);
            Registered::Private
        };
        self.activity.filling -= 1;
        self.activity.registrations += 1;
        if let Registered::Duplicate(first) = outcome {
            self.activity.registration_dedup += 1;
            self.hold(first);
            self.active -= 1;
            self.free_slot(id);
        } else {
            self.slots[id.index()].hold();
        }
        // Invariant 8: one name per block at most.
        assert!(self.registry.len() <= self.slots.len());
        outcome
    }

    /// Puts a block that exists already into the free slot `id`, inactive. False when the slot is
    /// not free or the name is taken. [`Store::restored`] must follow the last one.
    pub(crate) fn restore(
        &mut self,
        id: BlockId,
        hashes: TokenBlock,
        parent: Option<SequenceHash>,
    ) -> bool {
        let free = self
            .slots
            .get(id.index())
            .is_some_and(|slot| slot.state() == State::Free);
        if !free || !self.prefix_caching || self.contains(hashes.sequence) {
            return false;
        }
        self.publish(id, hashes, parent, None);
        self.make_inactive(id);
        true
    }

    /// Takes the slots that [`Store::restore`] filled out of the free list.
    pub(crate) fn restored(&mut self) {
        let slots = &self.slots;
        self.free
            .retain(|id| slots[id.index()].state() == State::Free);
    }

    /// Holds the block named `hash`, if it is there.
    pub(crate) fn acquire(&mut self, hash: SequenceHash) -> Option<Found> {
        let id = self.named(hash)?;
        self.hold(id);
        Some(self.found(id))
    }

    /// Counts a prefix of `names` that was looked up, of which `found` blocks were there.
    pub(crate) fn matched(&mut self, names: usize, found: usize) {
        self.activity.match_requested += names as u64;
        self.activity.match_returned += found as u64;
    }

    /// Counts names that were looked up one by one.
    pub(crate) fn scanned(&mut self, names: usize, found: usize) {
        self.activity.scan_requested += names as u64;
        self.activity.scan_returned += found as u64;
    }

    pub(crate) fn contains(&self, hash: SequenceHash) -> bool {
        self.named(hash).is_some()
    }

    /// A registered block that is held.
    pub(crate) fn found(&self, id: BlockId) -> Found {
        let slot = &self.slots[id.index()];
        Found {
            id,
            hashes: slot.hashes(),
            parent: slot.parent(),
        }
    }

    /// Counts as a use of the block named `hash`, without holding it.
    pub(crate) fn touch(&mut self, hash: SequenceHash) {
        let Some(id) = self.named(hash) else {
            return;
        };
        self.policy.used(id, hash);
        if self.slots[id.index()].state() == State::Inactive {
            self.policy.remove(id);
            let released = self.released(id);
            self.policy.insert(released);
        }
    }

    /// Holds up to `n` blocks that would be evicted next; they keep their names.
    pub(crate) fn victims(&mut self, n: usize, mut hold: impl FnMut(Found)) {
        for _ in 0..n {
            let Some(id) = self.policy.evict() else {
                return;
            };
            self.replace_state(id, State::Inactive, State::Named);
            self.slots[id.index()].hold();
            self.active += 1;
            hold(self.found(id));
        }
    }

    /// One more holder of a block that is held already.
    pub(crate) fn retain(&mut self, id: BlockId) {
        let slot = &mut self.slots[id.index()];
        assert!(slot.holders() > 0, "block {} is held", id.0);
        slot.hold();
    }

    /// One holder less; the last one leaves the block inactive, or free if nobody can find it.
    pub(crate) fn release(&mut self, id: BlockId, hash: SequenceHash) {
        let slot = &mut self.slots[id.index()];
        assert!(
            slot.name() == hash,
            "invariant 2: block {} changed its name while it was held",
            id.0
        );
        if slot.release() > 0 {
            return;
        }
        self.active -= 1;
        match slot.state() {
            State::Named => self.make_inactive(id),
            State::Unnamed => self.free_slot(id),
            State::Condemned => {
                slot.set_state(State::Retired);
                self.retired += 1;
            }
            state => unreachable!("block {} is held and {state:?}", id.0),
        }
    }

    /// Takes the name away: the block is free when its last holder is gone. False when there is
    /// none of that name.
    pub(crate) fn forget(&mut self, hash: SequenceHash) -> bool {
        let Some(id) = self.named(hash) else {
            return false;
        };
        self.unname(id);
        self.policy.forget(id, hash);
        match self.slots[id.index()].state() {
            State::Inactive => {
                self.policy.remove(id);
                self.free_slot(id);
            }
            _held => self.replace_state(id, State::Named, State::Unnamed),
        }
        true
    }

    /// Takes the name of a held block away, if it still has it.
    pub(crate) fn withdraw(&mut self, id: BlockId) -> bool {
        let slot = &self.slots[id.index()];
        slot.state() == State::Named && self.forget(slot.name())
    }

    /// The slot of a held block that has no name is not used again.
    pub(crate) fn condemn(&mut self, id: BlockId) {
        if self.slots[id.index()].state() == State::Unnamed {
            self.slots[id.index()].set_state(State::Condemned);
        }
    }

    pub(crate) fn holders(&self, id: BlockId) -> u32 {
        self.slots[id.index()].holders()
    }

    /// Forgets every name. Inactive blocks are free; held ones will be when they are released.
    pub(crate) fn clear(&mut self) {
        self.policy.clear();
        for index in self.registry.drain() {
            let slot = &mut self.slots[index as usize];
            match slot.state() {
                State::Named => slot.set_state(State::Unnamed),
                State::Inactive => {
                    slot.set_state(State::Free);
                    self.free.push(BlockId(index));
                }
                state => unreachable!("block {index} has a name and is {state:?}"),
            }
        }
    }

    /// Everything that can be found, in no particular order.
    pub(crate) fn names(&self) -> impl ExactSizeIterator<Item = SequenceHash> + '_ {
        let slots = &self.slots;
        self.registry
            .iter()
            .map(|&index| slots[index as usize].name())
    }

    /// Everything that can be found, with parents, in no particular order.
    pub(crate) fn published(&self, tier: Tier) -> impl Iterator<Item = SnapshotBlock> + '_ {
        let slots = self.slots.iter().filter(|slot| slot.published());
        slots.map(move |slot| SnapshotBlock {
            parent: slot.parent(),
            block: stored_block(slot.hashes()),
            tier,
        })
    }

    fn named(&self, hash: SequenceHash) -> Option<BlockId> {
        let slots = &self.slots;
        // Invariants 1 and 2: only a complete block has a name, and it is its own.
        self.registry
            .find(hash.0, |&index| slots[index as usize].name() == hash)
            .map(|&index| BlockId(index))
    }

    fn publish(
        &mut self,
        id: BlockId,
        hashes: TokenBlock,
        parent: Option<SequenceHash>,
        parent_at: Option<BlockId>,
    ) -> Registered {
        let parent_slot = parent.and_then(|parent| {
            let there = parent_at.filter(|id| self.slots[id.index()].is(parent));
            there.or_else(|| self.named(parent))
        });
        let slots = &self.slots;
        let entry = self.registry.entry(
            hashes.sequence.0,
            |&index| slots[index as usize].name() == hashes.sequence,
            |&index| slots[index as usize].name().0,
        );
        match entry {
            Entry::Occupied(first) => return Registered::Duplicate(BlockId(*first.get())),
            Entry::Vacant(name) => name.insert(id.0),
        };
        self.slots[id.index()].fill(State::Named, hashes, parent, parent_slot);
        self.policy.used(id, hashes.sequence);
        Registered::New
    }

    fn hold(&mut self, id: BlockId) {
        let slot = &mut self.slots[id.index()];
        slot.hold();
        let name = slot.name();
        match slot.state() {
            State::Named => {}
            State::Inactive => {
                slot.set_state(State::Named);
                self.policy.remove(id);
                self.active += 1;
            }
            state => unreachable!("block {} has a name and is {state:?}", id.0),
        }
        self.policy.used(id, name);
    }

    fn make_inactive(&mut self, id: BlockId) {
        self.slots[id.index()].set_state(State::Inactive);
        let released = self.released(id);
        self.policy.insert(released);
    }

    /// What the policy is told of a block that nobody holds any more.
    fn released(&self, block: BlockId) -> Released {
        let slot = &self.slots[block.index()];
        Released {
            block,
            name: slot.name(),
            parent: self.parent_slot(slot),
        }
    }

    /// The slot of the block before the one in `slot`, if that is here under its name.
    fn parent_slot(&self, slot: &Slot) -> Option<BlockId> {
        let parent = slot.parent()?;
        // Where it was may be overwritten; it may have been computed again elsewhere.
        slot.parent_slot()
            .filter(|id| self.slots[id.index()].is(parent))
            .or_else(|| self.named(parent))
    }

    /// Takes the next victim and its name away.
    fn evict(&mut self) -> BlockId {
        let id = self
            .policy
            .evict()
            .expect("the policy said how many it has");
        assert!(
            self.slots[id.index()].state() == State::Inactive,
            "only an inactive block is evicted"
        );
        self.unname(id);
        let name = self.slots[id.index()].name();
        self.policy.forget(id, name);
        self.removed.push(name);
        id
    }

    fn unname(&mut self, id: BlockId) {
        let name = self.slots[id.index()].name();
        let entry = self.registry.find_entry(name.0, |&index| index == id.0);
        entry.expect("a published block has its name").remove();
    }

    fn replace_state(&mut self, id: BlockId, from: State, to: State) {
        let slot = &mut self.slots[id.index()];
        let state = slot.state();
        assert!(state == from, "block {} is {state:?}", id.0);
        slot.set_state(to);
    }

    fn free_slot(&mut self, id: BlockId) {
        self.slots[id.index()].set_state(State::Free);
        self.free.push(id);
    }
}

pub(crate) fn stored_block(hashes: TokenBlock) -> StoredBlock {
    StoredBlock {
        block: hashes.block,
        sequence: hashes.sequence,
    }
}
