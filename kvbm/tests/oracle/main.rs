//! Random operations on a pool, checked after each one against a naive model that keeps plain lists
//! and knows nothing of slots, links or locks. Proptest prints what fails, made small, and the seed.

mod naive;

use std::collections::{BTreeMap, BTreeSet};

use blockplane_kvbm::{
    BlockPool, CompleteBlock, EventSubscription, EvictionKind, ImmutableBlock, KvBatch,
    MutableBlock, PoolConfig, PoolStats, Quarantine,
};
use blockplane_protocol::{
    BlockHash, BlockId, KvEventData, SaltHash, SequenceHash, SnapshotBlock, StoredBlock, Tier,
    TokenBlock,
};
use naive::{Naive, naive};
use proptest::{collection::vec, prelude::*, sample::select};

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
    Scan(Vec<u32>),
    /// Computed behind one handle, while others are held behind another one.
    Together {
        computed: Vec<u32>,
        held: Vec<u32>,
    },
    Victims(usize),
    Touch(Vec<u32>),
    Forget(Vec<u32>),
    ForgetUnshared(usize),
    RetireMutable(usize),
    RetireImmutable(usize),
    Restore(Vec<u32>),
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
        2 => vec(0..2u32, 1..5).prop_map(Op::Scan),
        4 => (vec(0..2u32, 0..5), vec(0..2u32, 1..5))
            .prop_map(|(computed, held)| Op::Together { computed, held }),
        2 => (1..4usize).prop_map(Op::Victims),
        2 => vec(0..2u32, 1..5).prop_map(Op::Touch),
        2 => vec(0..2u32, 1..5).prop_map(Op::Forget),
        2 => pick().prop_map(Op::ForgetUnshared),
        1 => (0..400usize).prop_map(Op::RetireMutable),
        1 => (0..400usize).prop_map(Op::RetireImmutable),
        1 => vec(0..2u32, 1..5).prop_map(Op::Restore),
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
    condemned: bool,
}

struct Model {
    caching: bool,
    leased: usize,
    quarantined: usize,
    retired: usize,
    /// Registered blocks by a key that is never used again.
    entries: BTreeMap<usize, Entry>,
    next_key: usize,
    policy: Box<dyn Naive>,
    events: Vec<KvEventData>,
    /// More changed than events tell.
    snapshot_due: bool,
}

impl Model {
    fn key_of(&self, hash: SequenceHash) -> Option<usize> {
        let mut named = self
            .entries
            .iter()
            .filter(|(_, e)| e.published && e.hash == hash);
        named.next().map(|(&key, _)| key)
    }

    fn inactive(&self) -> usize {
        self.entries.values().filter(|e| e.holders == 0).count()
    }

    fn free(&self) -> usize {
        let used = self.leased + self.quarantined + self.retired + self.entries.len();
        usize::from(BLOCKS) - used
    }

    fn stats(&self) -> PoolStats {
        PoolStats {
            total: usize::from(BLOCKS),
            free: self.free(),
            cached: self.inactive(),
            active: self.leased + self.entries.len() - self.inactive(),
            quarantined: self.quarantined,
            retired: self.retired,
        }
    }

    fn allocate(&mut self, n: usize) -> bool {
        if n > self.free() + self.inactive() {
            return false;
        }
        let evicted: Vec<SequenceHash> = (self.free()..n)
            .map(|_| {
                let name = self.policy.evict().expect("one is inactive");
                self.policy.forget(name);
                name
            })
            .collect();
        self.entries
            .retain(|_, e| e.holders > 0 || !evicted.contains(&e.hash));
        self.removed(evicted);
        self.leased += n;
        true
    }

    fn removed(&mut self, hashes: Vec<SequenceHash>) {
        if !hashes.is_empty() {
            let tier = Tier::Device;
            self.events.push(KvEventData::Removed { hashes, tier });
        }
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
            condemned: false,
        };
        self.entries.insert(key, entry);
        if self.caching {
            self.policy.used(block.sequence);
        }
        (key, self.caching)
    }

    /// As many as are given, with one event for each run of new ones.
    fn register_all(&mut self, blocks: &[(TokenBlock, Option<SequenceHash>)]) -> Vec<usize> {
        let mut runs: Vec<(Option<SequenceHash>, Vec<StoredBlock>)> = Vec::new();
        let mut keys = Vec::new();
        for &(hashes, parent) in blocks {
            let (key, new) = self.register(hashes, parent);
            keys.push(key);
            if new {
                let stored = self.entries[&key].stored;
                match runs.last_mut() {
                    Some((_, run)) if parent == run.last().map(|last| last.sequence) => {
                        run.push(stored);
                    }
                    _ => runs.push((parent, vec![stored])),
                }
            }
        }
        let tier = Tier::default();
        let stored = runs
            .into_iter()
            .map(|(parent, blocks)| KvEventData::Stored {
                parent,
                blocks,
                tier,
            });
        self.events.extend(stored);
        keys
    }

    fn entry(&mut self, key: usize) -> &mut Entry {
        self.entries.get_mut(&key).expect("a held key is an entry")
    }

    fn hold(&mut self, key: usize) {
        let entry = self.entry(key);
        entry.holders += 1;
        let (hash, first) = (entry.hash, entry.holders == 1);
        if first {
            self.policy.remove(hash);
        }
        self.policy.used(hash);
    }

    fn release(&mut self, key: usize) {
        let entry = self.entry(key);
        entry.holders -= 1;
        if entry.holders > 0 {
            return;
        }
        if entry.published {
            self.make_inactive(key);
        } else {
            self.retired += usize::from(entry.condemned);
            self.entries.remove(&key);
        }
    }

    fn make_inactive(&mut self, key: usize) {
        let Entry { hash, parent, .. } = self.entries[&key];
        let parent = parent.filter(|parent| self.key_of(*parent).is_some());
        self.policy.insert(hash, parent);
    }

    fn touch(&mut self, name: SequenceHash) {
        let Some(key) = self.key_of(name) else {
            return;
        };
        self.policy.used(name);
        if self.entries[&key].holders == 0 {
            self.policy.remove(name);
            self.make_inactive(key);
        }
    }

    fn victims(&mut self, n: usize) -> Vec<usize> {
        let evicted = (0..n).map_while(|_| {
            let name = self.policy.evict()?;
            let key = self.key_of(name).expect("it has a name");
            self.entry(key).holders = 1;
            Some(key)
        });
        evicted.collect()
    }

    fn forget(&mut self, name: SequenceHash) -> bool {
        let Some(key) = self.key_of(name) else {
            return false;
        };
        self.policy.forget(name);
        self.entry(key).published = false;
        if self.entries[&key].holders == 0 {
            self.policy.remove(name);
            self.entries.remove(&key);
        }
        self.removed(vec![name]);
        true
    }

    /// Into as many places as there are free ones.
    fn restore(&mut self, blocks: &[TokenBlock]) -> usize {
        let parents = std::iter::once(None).chain(blocks.iter().map(|b| Some(b.sequence)));
        let places = self.free();
        let mut new = 0;
        for (block, parent) in blocks.iter().zip(parents).take(places) {
            if self.caching && self.key_of(block.sequence).is_none() {
                self.leased += 1;
                let (key, _) = self.register(*block, parent);
                self.release(key);
                new += 1;
            }
        }
        self.snapshot_due = new > 0;
        new
    }

    fn clear(&mut self) {
        self.policy.clear();
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
    fn new(prefix_caching: bool, eviction: EvictionKind) -> Self {
        let config = PoolConfig {
            prefix_caching,
            ..PoolConfig::default()
        };
        let pool = BlockPool::builder(config)
            .eviction(eviction)
            .accounting(u32::from(BLOCKS));
        Self {
            events: pool.events().subscribe(Some(0)),
            last_event_id: 0,
            model: Model {
                caching: prefix_caching,
                leased: 0,
                quarantined: 0,
                retired: 0,
                entries: BTreeMap::new(),
                next_key: 0,
                policy: naive(eviction, usize::from(BLOCKS)),
                events: Vec::new(),
                snapshot_due: false,
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
                    self.model.entry(key).holders += 1;
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
            Op::Scan(tokens) => {
                let wanted = path(&tokens);
                let found = self.pool.scan(&wanted);
                assert_eq!(found.len(), wanted.len());
                for (block, wanted) in found.into_iter().zip(wanted) {
                    let key = self.model.key_of(wanted.sequence);
                    assert_eq!(block.is_some(), key.is_some());
                    for (block, key) in block.into_iter().zip(key) {
                        assert_eq!(block.name(), wanted);
                        assert_eq!(block.parent(), self.model.entries[&key].parent);
                        self.model.hold(key);
                        self.immutable.push((block, key));
                    }
                }
            }
            Op::Together { computed, held } => self.together(&path(&computed), &path(&held)),
            Op::Victims(n) => {
                let victims = self.pool.victims(n);
                let keys = self.model.victims(n);
                let names = keys.iter().map(|key| self.model.entries[key].hash);
                assert!(victims.iter().map(ImmutableBlock::hash).eq(names));
                self.immutable.extend(victims.into_iter().zip(keys));
            }
            Op::Touch(tokens) => {
                let names = path(&tokens);
                self.pool.touch(names.iter().map(|name| name.sequence));
                names
                    .iter()
                    .for_each(|name| self.model.touch(name.sequence));
            }
            Op::Forget(tokens) => {
                let name = path(&tokens).last().expect("it has a block").sequence;
                assert_eq!(self.pool.forget(name), self.model.forget(name));
            }
            Op::ForgetUnshared(pick) => {
                if let Some((block, key)) = nth(&mut self.immutable, pick) {
                    let Entry {
                        hash,
                        holders,
                        published,
                        ..
                    } = self.model.entries[&key];
                    let alone = published && holders == 1;
                    assert_eq!(block.forget_unshared(), alone);
                    if alone {
                        self.model.forget(hash);
                    }
                    self.model.release(key);
                }
            }
            Op::RetireMutable(pick) => {
                if pick < 40
                    && let Some(block) = nth(&mut self.mutable, pick)
                {
                    block.retire();
                    self.model.leased -= 1;
                    self.model.retired += 1;
                }
            }
            Op::RetireImmutable(pick) => {
                if pick < 40
                    && let Some((block, key)) = nth(&mut self.immutable, pick)
                {
                    block.retire();
                    let Entry {
                        hash, published, ..
                    } = self.model.entries[&key];
                    if published {
                        self.model.forget(hash);
                    }
                    self.model.entry(key).condemned = true;
                    self.model.release(key);
                }
            }
            Op::Restore(tokens) => {
                let names = path(&tokens);
                let free = self
                    .pool
                    .allocate(self.model.free())
                    .expect("they are free");
                let ids: Vec<BlockId> = free.iter().map(MutableBlock::id).collect();
                drop(free);
                let parents = std::iter::once(None).chain(names.iter().map(|n| Some(n.sequence)));
                let blocks = ids.iter().zip(names.iter().zip(parents));
                let blocks = blocks.map(|(id, (name, parent))| (*id, *name, parent));
                let new = self.pool.restore(blocks);
                assert_eq!(new, self.model.restore(&names));
                for (id, name) in ids.into_iter().zip(names) {
                    self.memory.insert(id, Some(name.sequence));
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
        let names = blocks.iter().map(|(_, hashes, parent)| (*hashes, *parent));
        let keys = self.model.register_all(&names.collect::<Vec<_>>());
        let complete: Vec<_> = blocks.into_iter().map(|(block, ..)| block).collect();
        let registered = if singly {
            complete.into_iter().map(CompleteBlock::register).collect()
        } else {
            BlockPool::register(complete)
        };
        self.immutable.extend(registered.into_iter().zip(keys));
    }

    fn together(&mut self, computed: &[TokenBlock], wanted: &[TokenBlock]) {
        let leased = self.pool.lease(computed.len());
        assert_eq!(leased.is_ok(), self.model.allocate(computed.len()));
        let Ok(leased) = leased else {
            return;
        };
        for (id, name) in leased.ids().iter().zip(computed) {
            self.memory.insert(*id, Some(name.sequence));
        }
        let parents = std::iter::once(None).chain(computed.iter().map(|n| Some(n.sequence)));
        let names: Vec<_> = computed.iter().copied().zip(parents).collect();
        let mut keys = self.model.register_all(&names);
        let registered = leased.register(names);
        assert!(registered.names().eq(computed.iter().copied()));
        let held = self.pool.hold(wanted);
        let here = |name: &&TokenBlock| self.model.key_of(name.sequence).is_some();
        let here: Vec<TokenBlock> = wanted.iter().filter(here).copied().collect();
        assert!(held.names().eq(here.iter().copied()));
        for name in here {
            let key = self.model.key_of(name.sequence).expect("it is here");
            self.model.hold(key);
            keys.push(key);
        }
        for id in registered.ids().chain(held.ids()) {
            let exclusive = self.mutable.iter().any(|block| block.id() == id);
            assert!(!exclusive, "{id:?} has two owners");
        }
        drop(registered);
        drop(held);
        keys.into_iter().for_each(|key| self.model.release(key));
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

        if std::mem::take(&mut self.model.snapshot_due) {
            let batch = self.events.try_recv();
            let Ok(Some(KvBatch::Snapshot(snapshot))) = batch else {
                panic!("a snapshot is due: {batch:?}");
            };
            self.last_event_id += 1;
            assert_eq!(snapshot.last_event_id, self.last_event_id);
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
        let here = self.pool.contains_each(names.iter().copied());
        assert!(here.into_iter().all(|here| here));
        let published = self.model.entries.values().filter(|entry| entry.published);
        let expected: BTreeSet<_> = published.map(|entry| entry.hash).collect();
        assert_eq!((snapshot.blocks.len(), &names), (expected.len(), &expected));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_024))]

    #[test]
    fn the_pool_does_what_the_model_does(
        prefix_caching in proptest::bool::weighted(0.95),
        eviction in select(EvictionKind::ALL.to_vec()),
        ops in vec(op(), 1..120),
    ) {
        let mut bench = Bench::new(prefix_caching, eviction);
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

/// A child outlives its parent. The one that is restored under that name is another block, which the child
/// does not keep from being evicted. The model once thought so: found by chance, one run in very many.
#[test]
fn a_parent_that_comes_back_is_another_one() {
    let mut bench = Bench::new(true, EvictionKind::Lineage);
    let ops = [
        Op::Allocate(4),
        Op::DropMutable(0),
        Op::Restore(vec![1, 1]),
        Op::Forget(vec![1]),
        Op::Restore(vec![1, 1, 0, 0]),
        Op::Together {
            computed: vec![0, 0, 0],
            held: vec![0],
        },
    ];
    for op in ops {
        bench.run(op);
        bench.check();
    }
}
