//! Random operations on a pool, checked after each one against a naive model that keeps plain lists
//! and knows nothing of slots, links or locks.

use std::collections::{BTreeMap, BTreeSet};

use blockplane_kvbm::{
    BlockPool, CompleteBlock, EventSubscription, ImmutableBlock, KvBatch, MutableBlock, PoolConfig,
    PoolStats, Quarantine,
};
use blockplane_protocol::{
    BlockHash, BlockId, KvEventData, SaltHash, SequenceHash, SnapshotBlock, StoredBlock, TokenBlock,
};
use proptest::{collection::vec, prelude::*};

const BLOCKS: u8 = 9;

#[derive(Clone, Debug)]
enum Op {
    Allocate(usize),
    Complete {
        block: usize,
        parent: Option<usize>,
        token: u32,
    },
    Register(usize),
    RegisterAll,
    DropMutable(usize),
    DropComplete(usize),
    DropImmutable(usize),
    DropAllImmutable,
    Clone(usize),
    Match(Vec<u32>),
    Quarantine(usize),
    Release(usize),
    TakeBack(usize),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let pick = || 0..64usize;
    prop_oneof![
        6 => (0..5usize).prop_map(Op::Allocate),
        9 => (pick(), proptest::option::weighted(0.8, pick()), 0..2u32)
            .prop_map(|(block, parent, token)| Op::Complete { block, parent, token }),
        5 => pick().prop_map(Op::Register),
        2 => Just(Op::RegisterAll),
        1 => pick().prop_map(Op::DropMutable),
        1 => pick().prop_map(Op::DropComplete),
        5 => pick().prop_map(Op::DropImmutable),
        1 => Just(Op::DropAllImmutable),
        2 => pick().prop_map(Op::Clone),
        4 => vec(0..2u32, 1..5).prop_map(Op::Match),
        1 => (1..3usize).prop_map(Op::Quarantine),
        1 => pick().prop_map(Op::Release),
        1 => pick().prop_map(Op::TakeBack),
        1 => Just(Op::Clear),
    ]
}

fn hashes(parent: Option<SequenceHash>, token: u32) -> TokenBlock {
    let block = BlockHash::of(&[token], SaltHash::default());
    TokenBlock {
        block,
        sequence: SequenceHash::extend(parent, block),
    }
}

fn path(tokens: &[u32]) -> Vec<TokenBlock> {
    let mut parent = None;
    let chain = tokens.iter().map(|&token| {
        let next = hashes(parent, token);
        parent = Some(next.sequence);
        next
    });
    chain.collect()
}

/// A registered block as the model sees it.
#[derive(Clone, Debug)]
struct Entry {
    hash: SequenceHash,
    stored: StoredBlock,
    parent: Option<SequenceHash>,
    holders: usize,
    published: bool,
}

#[derive(Default)]
struct Model {
    caching: bool,
    leased: usize,
    quarantined: usize,
    /// Registered blocks by a key that is never used again.
    entries: BTreeMap<usize, Entry>,
    next_key: usize,
    /// Keys of inactive blocks, the next to evict first.
    order: Vec<usize>,
    events: Vec<KvEventData>,
}

impl Model {
    fn key_of(&self, hash: SequenceHash) -> Option<usize> {
        let mut named = self
            .entries
            .iter()
            .filter(|(_, e)| e.published && e.hash == hash);
        named.next().map(|(&key, _)| key)
    }

    fn free(&self) -> usize {
        usize::from(BLOCKS) - self.leased - self.quarantined - self.entries.len()
    }

    fn stats(&self) -> PoolStats {
        PoolStats {
            total: usize::from(BLOCKS),
            free: self.free(),
            cached: self.order.len(),
            active: self.leased + self.entries.len() - self.order.len(),
            quarantined: self.quarantined,
            retired: 0,
        }
    }

    fn allocate(&mut self, n: usize) -> bool {
        if n > self.free() + self.order.len() {
            return false;
        }
        let evicted: Vec<usize> = self.order.drain(..n.saturating_sub(self.free())).collect();
        if !evicted.is_empty() {
            let hashes = evicted.iter().map(|key| self.entries[key].hash).collect();
            let tier = Default::default();
            self.events.push(KvEventData::Removed { hashes, tier });
        }
        self.entries.retain(|key, _| !evicted.contains(key));
        self.leased += n;
        true
    }

    /// Key of the entry the block ends up as, and whether it is new.
    fn register(&mut self, block: TokenBlock, parent: Option<SequenceHash>) -> (usize, bool) {
        self.leased -= 1;
        if let Some(key) = self.key_of(block.sequence) {
            self.hold(key);
            return (key, false);
        }
        let key = self.next_key;
        self.next_key += 1;
        let stored = StoredBlock {
            block: block.block,
            sequence: block.sequence,
        };
        let entry = Entry {
            hash: block.sequence,
            stored,
            parent,
            holders: 1,
            published: self.caching,
        };
        self.entries.insert(key, entry);
        (key, self.caching)
    }

    fn entry(&mut self, key: usize) -> &mut Entry {
        self.entries.get_mut(&key).expect("a held key is an entry")
    }

    fn hold(&mut self, key: usize) {
        self.order.retain(|&other| other != key);
        self.entry(key).holders += 1;
    }

    fn release(&mut self, key: usize) {
        let entry = self.entry(key);
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        if !entry.published {
            self.entries.remove(&key);
            return;
        }
        let parent = entry.parent;
        let is_parent = |&other: &usize| Some(self.entries[&other].hash) == parent;
        let place = self.order.iter().position(is_parent);
        self.order.insert(place.unwrap_or(self.order.len()), key);
    }

    fn clear(&mut self) {
        self.order.clear();
        self.entries.retain(|_, entry| {
            entry.published = false;
            entry.holders > 0
        });
        self.events.push(KvEventData::Cleared);
    }
}

/// The pool under test with everything that holds a block of it.
struct Bench {
    pool: BlockPool,
    events: EventSubscription,
    last_event_id: u64,
    model: Model,
    mutable: Vec<MutableBlock>,
    complete: Vec<(CompleteBlock, TokenBlock, Option<SequenceHash>)>,
    immutable: Vec<(ImmutableBlock, usize)>,
    quarantines: Vec<Quarantine>,
    /// What was written into each block last.
    memory: BTreeMap<BlockId, Option<SequenceHash>>,
}

fn nth<T>(items: &mut Vec<T>, pick: usize) -> Option<T> {
    (!items.is_empty()).then(|| items.swap_remove(pick % items.len()))
}

impl Bench {
    fn new(prefix_caching: bool) -> Self {
        let config = PoolConfig {
            prefix_caching,
            ..PoolConfig::default()
        };
        let pool = BlockPool::accounting(u32::from(BLOCKS), config);
        Self {
            events: pool.events().subscribe(Some(0)),
            last_event_id: 0,
            model: Model {
                caching: prefix_caching,
                ..Model::default()
            },
            pool,
            mutable: Vec::new(),
            complete: Vec::new(),
            immutable: Vec::new(),
            quarantines: Vec::new(),
            memory: BTreeMap::new(),
        }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Allocate(n) => {
                let got = self.pool.allocate(n);
                assert_eq!(got.is_ok(), self.model.allocate(n));
                for block in got.into_iter().flatten() {
                    self.memory.insert(block.id(), None);
                    self.mutable.push(block);
                }
            }
            Op::Complete {
                block,
                parent,
                token,
            } => {
                let Some(block) = nth(&mut self.mutable, block) else {
                    return;
                };
                let held = self.immutable.len() + self.complete.len();
                let parent = parent.filter(|_| held > 0).map(|pick| {
                    let pick = pick % held;
                    self.immutable.get(pick).map_or_else(
                        || self.complete[pick - self.immutable.len()].1.sequence,
                        |(block, _)| block.hash(),
                    )
                });
                let hashes = hashes(parent, token);
                self.memory.insert(block.id(), Some(hashes.sequence));
                let complete = block.complete(hashes, parent);
                self.complete.push((complete, hashes, parent));
            }
            Op::Register(pick) => {
                if let Some(block) = nth(&mut self.complete, pick) {
                    self.register(vec![block], true);
                }
            }
            Op::RegisterAll => {
                let all = std::mem::take(&mut self.complete);
                self.register(all, false);
            }
            Op::DropMutable(pick) => {
                self.model.leased -= usize::from(nth(&mut self.mutable, pick).is_some());
            }
            Op::DropComplete(pick) => {
                self.model.leased -= usize::from(nth(&mut self.complete, pick).is_some());
            }
            Op::DropImmutable(pick) => {
                if let Some((_, key)) = nth(&mut self.immutable, pick) {
                    self.model.release(key);
                }
            }
            Op::DropAllImmutable => {
                for (block, key) in self.immutable.drain(..) {
                    drop(block);
                    self.model.release(key);
                }
            }
            Op::Clone(pick) => {
                if let Some((block, key)) = nth(&mut self.immutable, pick) {
                    self.model.hold(key);
                    self.immutable.push((block.clone(), key));
                    self.immutable.push((block, key));
                }
            }
            Op::Match(tokens) => {
                let wanted = path(&tokens);
                let peeked = self.pool.peek_prefix(&wanted);
                let found = self.pool.match_prefix(&wanted);
                let keys: Vec<usize> = wanted
                    .iter()
                    .map_while(|block| self.model.key_of(block.sequence))
                    .collect();
                assert_eq!((found.len(), peeked), (keys.len(), keys.len()));
                for ((block, key), wanted) in found.into_iter().zip(keys).zip(wanted) {
                    assert_eq!(block.hash(), wanted.sequence);
                    self.model.hold(key);
                    self.immutable.push((block, key));
                }
            }
            Op::Quarantine(n) => {
                let blocks = self.mutable.split_off(self.mutable.len().saturating_sub(n));
                self.model.leased -= blocks.len();
                self.model.quarantined += blocks.len();
                self.quarantines.push(self.pool.quarantine(blocks));
            }
            Op::Release(pick) => {
                if let Some(quarantine) = nth(&mut self.quarantines, pick) {
                    self.model.quarantined -= quarantine.len();
                    quarantine.release();
                }
            }
            Op::TakeBack(pick) => {
                if let Some(quarantine) = nth(&mut self.quarantines, pick) {
                    self.model.quarantined -= quarantine.len();
                    self.model.leased += quarantine.len();
                    self.mutable.extend(quarantine.take_back());
                }
            }
            Op::Clear => {
                self.pool.clear();
                self.model.clear();
            }
        }
    }

    fn register(
        &mut self,
        blocks: Vec<(CompleteBlock, TokenBlock, Option<SequenceHash>)>,
        singly: bool,
    ) {
        let mut runs: Vec<(Option<SequenceHash>, Vec<StoredBlock>)> = Vec::new();
        let mut complete = Vec::new();
        let mut keys = Vec::new();
        for (block, hashes, parent) in blocks {
            let own = block.id();
            complete.push(block);
            let (key, new) = self.model.register(hashes, parent);
            keys.push((key, own));
            if new {
                let stored = self.model.entries[&key].stored;
                match runs.last_mut() {
                    Some((_, run)) if parent == run.last().map(|last| last.sequence) => {
                        run.push(stored);
                    }
                    _ => runs.push((parent, vec![stored])),
                }
            }
        }
        for (parent, blocks) in runs {
            let tier = Default::default();
            let stored = KvEventData::Stored {
                parent,
                blocks,
                tier,
            };
            self.model.events.push(stored);
        }
        let registered = if singly {
            complete.into_iter().map(CompleteBlock::register).collect()
        } else {
            BlockPool::register(complete)
        };
        for (block, (key, _)) in registered.into_iter().zip(keys) {
            self.immutable.push((block, key));
        }
    }

    fn check(&mut self) {
        assert_eq!(self.pool.stats(), self.model.stats());

        // Invariant 2: a held block has the bytes of its name, and two names never share a block.
        let mut owners = BTreeMap::new();
        for (block, key) in &self.immutable {
            assert_eq!(self.memory[&block.id()], Some(block.hash()));
            assert_eq!(*owners.entry(block.id()).or_insert(*key), *key);
        }
        let exclusive = (self.mutable.iter().map(MutableBlock::id))
            .chain(self.complete.iter().map(|(block, ..)| block.id()))
            .chain(
                self.quarantines
                    .iter()
                    .flat_map(|q| q.ids().collect::<Vec<_>>()),
            );
        for id in exclusive {
            assert!(
                owners.insert(id, usize::MAX).is_none(),
                "{id:?} has two owners"
            );
        }

        let mut got = Vec::new();
        while let Ok(Some(KvBatch::Events(events))) = self.events.try_recv() {
            for event in events {
                self.last_event_id += 1;
                assert_eq!(event.event_id, self.last_event_id, "numbers have no gap");
                got.push(event.data);
            }
        }
        assert_eq!(got, std::mem::take(&mut self.model.events));

        let mut fresh = self.pool.events().subscribe(None);
        let Ok(Some(KvBatch::Snapshot(snapshot))) = fresh.try_recv() else {
            panic!("a new subscriber gets a snapshot first");
        };
        assert_eq!(snapshot.last_event_id, self.last_event_id);
        let names: BTreeSet<_> = snapshot.blocks.iter().map(|b| b.block.sequence).collect();
        let mut before = BTreeSet::new();
        for SnapshotBlock { parent, block, .. } in &snapshot.blocks {
            let early = parent.is_none_or(|p| before.contains(&p) || !names.contains(&p));
            assert!(early, "a parent that is here comes first");
            before.insert(block.sequence);
        }
        let published = self.model.entries.values().filter(|entry| entry.published);
        let expected: BTreeSet<_> = published.map(|entry| entry.hash).collect();
        assert_eq!((snapshot.blocks.len(), &names), (expected.len(), &expected));
    }
}

proptest! {
    #[test]
    fn the_pool_does_what_the_model_does(
        prefix_caching in proptest::bool::weighted(0.9),
        ops in vec(op(), 1..120),
    ) {
        let mut bench = Bench::new(prefix_caching);
        for op in ops {
            bench.run(op);
            bench.check();
        }
        bench.mutable.clear();
        bench.complete.clear();
        bench.immutable.clear();
        bench.quarantines.clear();
        let stats = bench.pool.stats();
        prop_assert_eq!((stats.active, stats.quarantined), (0, 0), "nothing leaks");
    }
}
