//! Which rank holds which blocks: a prefix index fed by KV events, and predictions where events are
//! missing.
//!
//! A sequence hash names a block together with everything before it, so the index is one flat
//! table from hash to holders: storing, removing and looking up a block each cost one probe,
//! without splits or merges. Links to parents serve eviction only (see the `forest` module).
//!
//! | operation | cost |
//! |---|---|
//! | [`KvIndex::apply`] Stored, Removed | O(blocks of the event) |
//! | [`KvIndex::apply`] Cleared, [`KvIndex::load_snapshot`], [`KvIndex::remove_worker`] | one pass over the index |
//! | [`KvIndex::find`] | O(leading blocks found x ranks that hold them) |

mod forest;
mod holders;
mod predict;

use std::collections::HashMap;

use blockplane_protocol::{
    DpRank, KvEvent, KvEventData, SequenceHash, StoredBlock, Tier, WorkerId, WorkerRank,
};

pub use self::predict::{Asked, Predictions};
use self::{
    forest::Forest,
    holders::{SLOTS_MAX, Slot},
};

/// Prefix index over the caches of all ranks.
#[derive(Debug)]
pub struct KvIndex {
    forest: Forest,
    blocks_max: usize,
    slots: HashMap<WorkerRank, Slot>,
    ranks: Vec<Option<RankFeed>>,
    evicted_total: u64,
    gaps_total: u64,
}

/// State of the event feed of one rank.
#[derive(Clone, Copy, Debug)]
struct RankFeed {
    rank: WorkerRank,
    /// Id that the next event must have.
    expected: u64,
    gap: bool,
}

/// A rank that has held every block of a prompt so far.
#[derive(Clone, Copy, Debug)]
struct Walk {
    slot: Slot,
    /// Up to the last change of holders.
    overlap: Overlap,
    /// Where the blocks since then are.
    tier: Tier,
}

/// What became of one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It was next in line and is in the index.
    InOrder,
    /// It was seen before (a replay) and changed nothing.
    Stale,
    /// Events before it were lost. It is in the index, but the rank's view is incomplete until a
    /// snapshot replaces it.
    Gap {
        /// Id that was due.
        expected: u64,
        /// Id that came.
        got: u64,
    },
}

/// How far the index can be trusted about a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Confidence {
    /// It has never sent an event or a snapshot: its cache is predicted from what was routed to it.
    NoEvents,
    /// Events were lost and no snapshot has come since.
    Gap,
    /// The feed is complete.
    Complete,
}

/// Leading blocks of a prompt that a rank holds, each counted at its fastest tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    /// Blocks on the device, predicted ones included.
    pub device: u32,
    /// Blocks in host memory.
    pub host: u32,
    /// Blocks on disk.
    pub disk: u32,
    /// Blocks in remote storage.
    pub remote: u32,
}

/// Overlap of every rank that has at least the first block, ascending by rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlaps(Vec<(WorkerRank, Overlap)>);

/// Size of an index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexStats {
    /// Blocks it knows, also those kept only for their descendants.
    pub blocks: usize,
    /// Its cap.
    pub blocks_max: usize,
    /// Memory taken.
    pub bytes: usize,
    /// Blocks dropped because of the cap since start.
    pub evicted_total: u64,
    /// Gaps seen since start.
    pub gaps_total: u64,
    /// Ranks with a feed.
    pub ranks: usize,
}

impl KvIndex {
    /// An empty index that keeps at most `blocks_max` blocks (at least 1). A block takes 60 to 130
    /// bytes, and 4 more per rank when more than four ranks hold it.
    #[must_use]
    pub fn new(blocks_max: usize) -> Self {
        Self {
            forest: Forest::default(),
            blocks_max: blocks_max.clamp(1, u32::MAX as usize - 2),
            slots: HashMap::new(),
            ranks: Vec::new(),
            evicted_total: 0,
            gaps_total: 0,
        }
    }

    /// Takes in one event of a worker's feed.
    pub fn apply(&mut self, worker: WorkerId, event: &KvEvent) -> Applied {
        let slot = self.slot(WorkerRank {
            worker,
            rank: event.rank,
        });
        let feed = self.feed_mut(slot);
        let expected = feed.expected;
        if event.event_id < expected {
            return Applied::Stale;
        }
        let applied = if event.event_id == expected {
            Applied::InOrder
        } else {
            feed.gap = true;
            self.gaps_total += 1;
            Applied::Gap {
                expected,
                got: event.event_id,
            }
        };
        self.feed_mut(slot).expected = event.event_id + 1;
        match &event.data {
            KvEventData::Stored {
                parent,
                blocks,
                tier,
            } => self.store(slot, *parent, blocks, *tier),
            KvEventData::Removed { hashes, tier } => {
                for &hash in hashes {
                    if let Some(id) = self.forest.get(hash) {
                        self.forest
                            .change(id, |holders| holders.remove(slot, *tier));
                    }
                }
            }
            KvEventData::Cleared => self.clear(slot),
        }
        applied
    }

    /// Replaces everything known of a rank by `blocks` (parents before children), all in `tier`,
    /// and closes an open gap. The next event is expected to have the id `last_event_id + 1`.
    pub fn load_snapshot(
        &mut self,
        rank: WorkerRank,
        last_event_id: u64,
        tier: Tier,
        blocks: impl IntoIterator<Item = (Option<SequenceHash>, StoredBlock)>,
    ) {
        let slot = self.slot(rank);
        self.clear(slot);
        for (parent, block) in blocks {
            self.store(slot, parent, &[block], tier);
        }
        let feed = self.feed_mut(slot);
        feed.expected = last_event_id + 1;
        feed.gap = false;
    }

    /// Declares that events of a rank were lost, as when its feed broke and was not resumed.
    pub fn open_gap(&mut self, rank: WorkerRank) {
        if let Some(&slot) = self.slots.get(&rank) {
            let feed = self.feed_mut(slot);
            let opened = !std::mem::replace(&mut feed.gap, true);
            self.gaps_total += u64::from(opened);
        }
    }

    /// Forgets all ranks of a worker.
    pub fn remove_worker(&mut self, worker: WorkerId) {
        let gone: Vec<(WorkerRank, Slot)> = self
            .slots
            .iter()
            .filter(|(rank, _)| rank.worker == worker)
            .map(|(&rank, &slot)| (rank, slot))
            .collect();
        for (rank, slot) in gone {
            self.clear(slot);
            self.slots.remove(&rank);
            self.ranks[slot as usize] = None;
        }
    }

    /// For each rank, how many leading blocks of the prompt it holds without a hole.
    #[must_use]
    pub fn find(&self, prompt: &[SequenceHash]) -> Overlaps {
        let mut found = Vec::new();
        let mut going: Vec<Walk> = Vec::new();
        let mut deepest = None;
        // Blocks since the last change of holders: neighbours mostly have the same ones, and
        // comparing two lists is much cheaper than looking up each rank in the next.
        let mut run = 0;
        for &hash in prompt {
            let Some(id) = (match deepest {
                None => self.forest.get(hash),
                Some(previous) => self.forest.get_after(previous, hash),
            }) else {
                break;
            };
            let holders = self.forest.holders(id);
            match deepest {
                None => going.extend(holders.iter().map(|holder| Walk {
                    slot: holder.slot,
                    overlap: Overlap::default(),
                    tier: holder.tier(),
                })),
                Some(previous) if self.forest.holders(previous) == holders => {}
                Some(_) => {
                    going.retain_mut(|walk| {
                        walk.overlap.count(walk.tier, run);
                        if let Some(holder) = holders.get(walk.slot) {
                            walk.tier = holder.tier();
                            return true;
                        }
                        self.report(&mut found, walk);
                        false
                    });
                    run = 0;
                }
            }
            if going.is_empty() {
                break;
            }
            run += 1;
            deepest = Some(id);
        }
        for walk in &mut going {
            walk.overlap.count(walk.tier, run);
            self.report(&mut found, walk);
        }
        if let Some(id) = deepest {
            self.forest.touch(id);
        }
        Overlaps::from_unsorted(found)
    }

    /// How far the index can be trusted about a rank.
    #[must_use]
    pub fn confidence(&self, rank: WorkerRank) -> Confidence {
        match self
            .slots
            .get(&rank)
            .and_then(|&slot| self.ranks[slot as usize])
        {
            None => Confidence::NoEvents,
            Some(RankFeed { gap: true, .. }) => Confidence::Gap,
            Some(RankFeed { gap: false, .. }) => Confidence::Complete,
        }
    }

    /// Id of the last event or snapshot taken in from a rank; `None` before the first.
    #[must_use]
    pub fn last_event_id(&self, rank: WorkerRank) -> Option<u64> {
        let slot = *self.slots.get(&rank)?;
        Some(self.ranks[slot as usize]?.expected - 1)
    }

    /// Sizes and counters.
    #[must_use]
    pub fn stats(&self) -> IndexStats {
        IndexStats {
            blocks: self.forest.len(),
            blocks_max: self.blocks_max,
            bytes: self.forest.bytes()
                + self.ranks.capacity() * size_of::<Option<RankFeed>>()
                + self.slots.capacity() * size_of::<(WorkerRank, Slot)>(),
            evicted_total: self.evicted_total,
            gaps_total: self.gaps_total,
            ranks: self.slots.len(),
        }
    }

    fn store(
        &mut self,
        slot: Slot,
        mut parent: Option<SequenceHash>,
        blocks: &[StoredBlock],
        tier: Tier,
    ) {
        let mut last = None;
        for block in blocks {
            let id = self.forest.insert(block.sequence, parent);
            self.forest.change(id, |holders| holders.insert(slot, tier));
            parent = Some(block.sequence);
            last = Some(id);
        }
        if let Some(id) = last {
            self.forest.offer(id);
        }
        while self.forest.len() > self.blocks_max && self.forest.evict_leaf() {
            self.evicted_total += 1;
        }
    }

    fn clear(&mut self, slot: Slot) {
        for id in self.forest.ids() {
            if self.forest.is_live(id) {
                self.forest.change(id, |holders| holders.remove_slot(slot));
            }
        }
    }

    fn slot(&mut self, rank: WorkerRank) -> Slot {
        if let Some(&slot) = self.slots.get(&rank) {
            return slot;
        }
        let feed = RankFeed {
            rank,
            expected: 1,
            gap: false,
        };
        let at = self
            .ranks
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                assert!(self.ranks.len() < SLOTS_MAX, "fewer than 2^28 ranks");
                self.ranks.push(None);
                self.ranks.len() - 1
            });
        self.ranks[at] = Some(feed);
        let slot = Slot::try_from(at).expect("checked against SLOTS_MAX");
        self.slots.insert(rank, slot);
        slot
    }

    fn feed_mut(&mut self, slot: Slot) -> &mut RankFeed {
        self.ranks[slot as usize]
            .as_mut()
            .expect("a slot in use has a feed")
    }

    fn report(&self, found: &mut Vec<(WorkerRank, Overlap)>, walk: &Walk) {
        if let Some(feed) = self.ranks[walk.slot as usize] {
            found.push((feed.rank, walk.overlap));
        }
    }
}

impl Overlap {
    /// Leading blocks held, in whatever tier.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.device + self.host + self.disk + self.remote
    }

    /// The same with at least `blocks` blocks: what is missing counts as being on the device.
    #[must_use]
    pub const fn at_least(mut self, blocks: u32) -> Self {
        self.device += blocks.saturating_sub(self.blocks());
        self
    }

    const fn count(&mut self, tier: Tier, blocks: u32) {
        match tier {
            Tier::Device => self.device += blocks,
            Tier::Host => self.host += blocks,
            Tier::Disk => self.disk += blocks,
            Tier::Remote => self.remote += blocks,
        }
    }
}

impl Overlaps {
    /// Overlap of one rank; zero when it holds nothing of the prompt.
    #[must_use]
    pub fn get(&self, rank: WorkerRank) -> Overlap {
        self.0
            .binary_search_by_key(&rank, |&(rank, _)| rank)
            .map(|at| self.0[at].1)
            .unwrap_or_default()
    }

    /// Ranks with at least one block, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (WorkerRank, Overlap)> + '_ {
        self.0.iter().copied()
    }

    /// Longest overlap of all ranks.
    #[must_use]
    pub fn blocks_max(&self) -> u32 {
        self.0
            .iter()
            .map(|(_, overlap)| overlap.blocks())
            .max()
            .unwrap_or(0)
    }

    fn from_unsorted(mut found: Vec<(WorkerRank, Overlap)>) -> Self {
        found.sort_unstable_by_key(|&(rank, _)| rank);
        Self(found)
    }
}

/// Every rank of a worker with `dp_size` data-parallel ranks.
pub(crate) fn ranks_of(worker: WorkerId, dp_size: u32) -> impl Iterator<Item = WorkerRank> {
    (0..dp_size.max(1)).map(move |rank| WorkerRank {
        worker,
        rank: DpRank(rank),
    })
}
