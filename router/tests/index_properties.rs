//! The prefix index against a naive oracle under random event sequences, with and without a cap.

use std::collections::{BTreeMap, BTreeSet};

use blockplane_protocol::{
    BlockHash, DpRank, KvEvent, KvEventData, SequenceHash, StoredBlock, Tier, WorkerId, WorkerRank,
};
use blockplane_router::{Applied, Confidence, KvIndex, Overlap};
use proptest::prelude::*;

const BRANCHES: u64 = 3;
const DEPTH_MAX: usize = 6;
const WORKERS: u64 = 3;
const RANKS: u32 = 2;

#[derive(Clone, Debug)]
enum Action {
    /// Blocks `from..` of the path become readable.
    Store {
        path: Vec<u64>,
        from: usize,
        tier: Tier,
    },
    Remove {
        path: Vec<u64>,
        tier: Tier,
    },
    Clear,
    Find {
        path: Vec<u64>,
    },
    Snapshot {
        paths: Vec<Vec<u64>>,
    },
    RemoveWorker,
    /// Events that never arrive.
    Lose {
        events: u64,
    },
    Replay,
}

#[derive(Debug, Default)]
struct Oracle {
    nodes: BTreeMap<SequenceHash, Node>,
    clock: u64,
    feeds: BTreeMap<WorkerRank, (u64, bool)>,
}

#[derive(Debug, Default)]
struct Node {
    parent: Option<SequenceHash>,
    holders: BTreeSet<(WorkerRank, Tier)>,
    used: u64,
}

impl Oracle {
    fn store(
        &mut self,
        rank: WorkerRank,
        mut parent: Option<SequenceHash>,
        blocks: &[StoredBlock],
        tier: Tier,
        cap: usize,
    ) {
        for block in blocks {
            if let Some(parent) = parent {
                self.nodes.entry(parent).or_default();
            }
            self.clock += 1;
            let node = self.nodes.entry(block.sequence).or_default();
            node.used = node.used.max(self.clock);
            node.parent = node.parent.or(parent);
            node.holders.insert((rank, tier));
            parent = Some(block.sequence);
        }
        while self.nodes.len() > cap {
            let leaf = self
                .nodes
                .iter()
                .filter(|(hash, _)| !self.has_children(**hash))
                .min_by_key(|(_, node)| node.used)
                .map(|(&hash, _)| hash)
                .expect("an acyclic forest has a leaf");
            self.nodes
                .get_mut(&leaf)
                .expect("just found")
                .holders
                .clear();
            self.prune();
        }
    }

    fn drop_holders(&mut self, gone: impl Fn(SequenceHash, &(WorkerRank, Tier)) -> bool) {
        for (&hash, node) in &mut self.nodes {
            node.holders.retain(|holder| !gone(hash, holder));
        }
        self.prune();
    }

    fn prune(&mut self) {
        while let Some(hash) = self
            .nodes
            .iter()
            .find(|(hash, node)| node.holders.is_empty() && !self.has_children(**hash))
            .map(|(&hash, _)| hash)
        {
            let node = self.nodes.remove(&hash).expect("just found");
            if let Some(parent) = node.parent.and_then(|parent| self.nodes.get_mut(&parent)) {
                parent.used = parent.used.max(node.used);
            }
        }
    }

    fn has_children(&self, hash: SequenceHash) -> bool {
        self.nodes.values().any(|node| node.parent == Some(hash))
    }

    fn find(&mut self, prompt: &[SequenceHash]) -> BTreeMap<WorkerRank, Overlap> {
        let mut found = BTreeMap::new();
        let mut deepest = None;
        for rank in all_ranks() {
            let mut overlap = Overlap::default();
            for hash in prompt {
                let fastest = self.nodes.get(hash).and_then(|node| {
                    node.holders
                        .iter()
                        .filter(|(held, _)| *held == rank)
                        .map(|&(_, tier)| tier)
                        .min()
                });
                match fastest {
                    Some(Tier::Device) => overlap.device += 1,
                    Some(Tier::Host) => overlap.host += 1,
                    Some(Tier::Disk) => overlap.disk += 1,
                    Some(Tier::Remote) => overlap.remote += 1,
                    None => break,
                }
            }
            if overlap.blocks() > 0 {
                deepest = deepest.max(Some(overlap.blocks() as usize - 1));
                found.insert(rank, overlap);
            }
        }
        if let Some(position) = deepest {
            self.clock += 1;
            self.nodes
                .get_mut(&prompt[position])
                .expect("just found")
                .used = self.clock;
        }
        found
    }
}

fn all_ranks() -> impl Iterator<Item = WorkerRank> {
    (0..WORKERS).flat_map(|w| (0..RANKS).map(move |r| WorkerRank::new(WorkerId(w), r)))
}

fn chain(path: &[u64]) -> Vec<StoredBlock> {
    let mut parent = None;
    path.iter()
        .map(|&branch| {
            let block = BlockHash(branch.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
            let sequence = SequenceHash::extend(parent, block);
            parent = Some(sequence);
            StoredBlock { block, sequence }
        })
        .collect()
}

fn hashes(path: &[u64]) -> Vec<SequenceHash> {
    chain(path).iter().map(|block| block.sequence).collect()
}

fn path() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(0..BRANCHES, 1..=DEPTH_MAX)
}

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![
        4 => Just(Tier::Device),
        1 => Just(Tier::Host),
        1 => Just(Tier::Disk),
        1 => Just(Tier::Remote)
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        8 => (path(), 0..DEPTH_MAX, tier()).prop_map(|(path, from, tier)| Action::Store {
            from: from.min(path.len() - 1),
            path,
            tier,
        }),
        6 => (path(), tier()).prop_map(|(path, tier)| Action::Remove { path, tier }),
        8 => path().prop_map(|path| Action::Find { path }),
        1 => Just(Action::Clear),
        1 => prop::collection::vec(path(), 0..3).prop_map(|paths| Action::Snapshot { paths }),
        1 => Just(Action::RemoveWorker),
        1 => (1..5u64).prop_map(|events| Action::Lose { events }),
        1 => Just(Action::Replay),
    ]
}

fn run(cap: usize, script: Vec<(u64, u32, Action)>) {
    let mut index = KvIndex::new(cap);
    let mut oracle = Oracle::default();
    for (worker, dp, action) in script {
        let rank = WorkerRank::new(WorkerId(worker), dp);
        let worker = rank.worker;
        let (last, gap) = oracle.feeds.get(&rank).copied().unwrap_or((0, false));
        let event = |event_id, data| KvEvent {
            event_id,
            rank: DpRank(dp),
            data,
        };
        let data = match action {
            Action::Store { path, from, tier } => {
                let blocks = chain(&path);
                let parent = from.checked_sub(1).map(|i| blocks[i].sequence);
                let blocks = blocks[from..].to_vec();
                oracle.store(rank, parent, &blocks, tier, cap);
                Some(KvEventData::Stored {
                    parent,
                    blocks,
                    tier,
                })
            }
            Action::Remove { path, tier } => {
                let last = *hashes(&path).last().expect("a path is not empty");
                oracle.drop_holders(|hash, holder| hash == last && *holder == (rank, tier));
                Some(KvEventData::Removed {
                    hashes: vec![last],
                    tier,
                })
            }
            Action::Clear => {
                oracle.drop_holders(|_, (held, _)| *held == rank);
                Some(KvEventData::Cleared)
            }
            Action::Find { path } => {
                let prompt = hashes(&path);
                let found: BTreeMap<_, _> = index.find(&prompt).iter().collect();
                assert_eq!(found, oracle.find(&prompt), "{path:?}");
                None
            }
            Action::Snapshot { paths } => {
                oracle.drop_holders(|_, (held, _)| *held == rank);
                let mut blocks = Vec::new();
                for path in paths {
                    let mut parent = None;
                    for block in chain(&path) {
                        blocks.push((parent, block));
                        oracle.store(rank, parent, &[block], Tier::Device, cap);
                        parent = Some(block.sequence);
                    }
                }
                index.load_snapshot(rank, last + 7, Tier::Device, blocks);
                oracle.feeds.insert(rank, (last + 7, false));
                None
            }
            Action::RemoveWorker => {
                index.remove_worker(worker);
                oracle.drop_holders(|_, (held, _)| held.worker == worker);
                oracle.feeds.retain(|held, _| held.worker != worker);
                None
            }
            Action::Lose { events } => {
                let applied = index.apply(worker, &event(last + 1 + events, KvEventData::Cleared));
                assert_eq!(
                    applied,
                    Applied::Gap {
                        expected: last + 1,
                        got: last + 1 + events
                    }
                );
                oracle.drop_holders(|_, (held, _)| *held == rank);
                oracle.feeds.insert(rank, (last + 1 + events, true));
                None
            }
            Action::Replay => {
                if last > 0 {
                    let applied = index.apply(worker, &event(last, KvEventData::Cleared));
                    assert_eq!(applied, Applied::Stale);
                }
                None
            }
        };
        if let Some(data) = data {
            assert_eq!(
                index.apply(worker, &event(last + 1, data)),
                Applied::InOrder
            );
            oracle.feeds.insert(rank, (last + 1, gap));
        }
        assert_eq!(index.stats().blocks, oracle.nodes.len());
        for rank in all_ranks() {
            let feed = oracle.feeds.get(&rank);
            let expected = match feed {
                None => Confidence::NoEvents,
                Some((_, true)) => Confidence::Gap,
                Some((_, false)) => Confidence::Complete,
            };
            assert_eq!(index.confidence(rank), expected);
            assert_eq!(index.last_event_id(rank), feed.map(|(last, _)| *last));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_index_equals_the_oracle(
        script in prop::collection::vec((0..WORKERS, 0..RANKS, action()), 1..80),
    ) {
        run(usize::MAX >> 33, script);
    }

    #[test]
    fn the_capped_index_evicts_what_the_oracle_evicts(
        cap in 1..24usize,
        script in prop::collection::vec((0..WORKERS, 0..RANKS, action()), 1..120),
    ) {
        run(cap, script);
    }
}

#[test]
fn memory_is_flat_under_churn() {
    let mut index = KvIndex::new(2_000);
    let rank = WorkerRank::new(WorkerId(1), 0);
    let mut event_id = 0;
    let mut churn = |index: &mut KvIndex, from: u64, to: u64| {
        for sequence in from..to {
            let blocks = chain(&[sequence, sequence, sequence, sequence]);
            event_id += 1;
            index.apply(
                rank.worker,
                &KvEvent {
                    event_id,
                    rank: rank.rank,
                    data: KvEventData::Stored {
                        parent: None,
                        blocks: blocks.clone(),
                        tier: Tier::Device,
                    },
                },
            );
            // Half of the sequences leave by an event, the others by the cap.
            if sequence % 2 == 0 {
                event_id += 1;
                index.apply(
                    rank.worker,
                    &KvEvent {
                        event_id,
                        rank: rank.rank,
                        data: KvEventData::Removed {
                            hashes: blocks.iter().map(|b| b.sequence).collect(),
                            tier: Tier::Device,
                        },
                    },
                );
            }
        }
    };
    churn(&mut index, 0, 20_000);
    let before = index.stats();
    churn(&mut index, 20_000, 80_000);
    let after = index.stats();
    assert_eq!(after.blocks, 2_000);
    assert_eq!(after.bytes, before.bytes);
    assert!(after.bytes < 2_000 * 100, "{after:?}");
    assert!(after.evicted_total > before.evicted_total);
}

#[test]
fn a_malformed_feed_neither_loops_nor_leaks() {
    let mut index = KvIndex::new(100);
    let (a, b) = (SequenceHash(1), SequenceHash(2));
    let links = [(a, b), (b, a), (a, a), (b, b), (SequenceHash(3), b)];
    for (event_id, (sequence, parent)) in (1..).zip(links) {
        let data = KvEventData::Stored {
            parent: Some(parent),
            blocks: vec![StoredBlock {
                block: BlockHash(0),
                sequence,
            }],
            tier: Tier::Device,
        };
        index.apply(
            WorkerId(1),
            &KvEvent {
                event_id,
                rank: DpRank(0),
                data,
            },
        );
    }
    assert_eq!(index.stats().blocks, 3);
    index.remove_worker(WorkerId(1));
    assert_eq!(index.stats().blocks, 0);
}
