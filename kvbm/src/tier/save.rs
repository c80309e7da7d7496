//! Away from a G1 whose books another engine keeps: its blocks come by their ids, and their holder is
//! told when they are not read any more.

use std::{collections::VecDeque, time::Duration};

use blockplane_protocol::{BlockId, DpRank, SequenceHash, TokenBlock};

use super::{
    flight::{Flight, Job},
    moves::{BlockOutcome, MoveKind, MoveSpec, MovedBlock},
    queue::PRIORITY_DEFAULT,
    slots::Slots,
    stats::Dropped,
    tiers::Tiers,
};
use crate::block::LeasedBlocks;

/// Names a save; not used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SaveId(pub u64);

/// How a save ended. None of its blocks is read any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Blocks that were copied.
    pub copied: usize,
    /// Blocks that did not have to be: they were below G1 already, on their way there, or not worth
    /// the write where there is no G2.
    pub present: usize,
    /// Blocks that were not copied: no room, no time, or a copy failed.
    pub dropped: usize,
}

/// Saves that have not ended.
pub(super) struct Saves {
    open: Slots<Save>,
    /// Those with blocks that wait, oldest first.
    queue: VecDeque<u64>,
    waiting: usize,
    waiting_max: usize,
    ended: Vec<(SaveId, Saved)>,
}

struct Save {
    rank: usize,
    priority: u32,
    since: Duration,
    waiting: VecDeque<SaveBlock>,
    copying: usize,
    so_far: Saved,
}

#[derive(Clone, Copy)]
struct SaveBlock {
    name: TokenBlock,
    parent: Option<SequenceHash>,
    id: BlockId,
}

impl Saves {
    pub(super) const fn new(waiting_max: usize) -> Self {
        Self {
            open: Slots::new(),
            queue: VecDeque::new(),
            waiting: 0,
            waiting_max,
            ended: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.len() == 0
    }

    /// Blocks that wait.
    pub(super) const fn waiting(&self) -> usize {
        self.waiting
    }

    /// Blocks of a copy that are below G1 now, and those that failed.
    pub(super) fn landed(&mut self, key: u64, moved: usize, failed: usize) {
        if let Some(save) = self.open.get_mut(key) {
            save.so_far.copied += moved;
            save.so_far.dropped += failed;
        }
    }

    /// Blocks of a copy that are not read any more.
    pub(super) fn quiet(&mut self, key: u64, blocks: usize) {
        if let Some(save) = self.open.get_mut(key) {
            save.copying -= blocks;
            self.settle(key);
        }
    }

    /// Ends a save if nothing of it is open.
    fn settle(&mut self, key: u64) {
        let over = |save: &Save| save.copying == 0 && save.waiting.is_empty();
        if self.open.get(key).is_some_and(over)
            && let Some(save) = self.open.remove(key)
        {
            self.ended.push((SaveId(key), save.so_far));
        }
    }

    /// Takes up to `max` of the blocks that wait in the save at the front, which has some.
    fn take(&mut self, key: u64, max: usize) -> Option<(usize, u32, Vec<SaveBlock>)> {
        let save = self.open.get_mut(key)?;
        let count = max.min(save.waiting.len());
        let blocks: Vec<SaveBlock> = save.waiting.drain(..count).collect();
        self.waiting -= count;
        if save.waiting.is_empty() {
            self.queue.pop_front();
        }
        Some((save.rank, save.priority, blocks))
    }

    /// Gives up what waits in the save at the front. Returns how many blocks that are.
    fn give_up_first(&mut self) -> usize {
        let Some(key) = self.queue.pop_front() else {
            return 0;
        };
        let Some(save) = self.open.get_mut(key) else {
            return 0;
        };
        let left = std::mem::take(&mut save.waiting).len();
        save.so_far.dropped += left;
        self.waiting -= left;
        self.settle(key);
        left
    }

    /// When the oldest that waits was asked for.
    fn first_since(&self) -> Option<Duration> {
        let first = self.queue.front()?;
        self.open.get(*first).map(|save| save.since)
    }
}

impl Tiers {
    /// Has consecutive blocks of one sequence copied from a G1 whose books another engine keeps: each
    /// with its id there. `parent` names the block before the first. Their owner leaves the blocks as
    /// they are until the save is in [`Tiers::saved`], which is the case after
    /// [`QueueConfig::offload_time`](super::QueueConfig::offload_time) at the latest, if no copy hangs.
    pub fn save(
        &mut self,
        now: Duration,
        rank: DpRank,
        parent: Option<SequenceHash>,
        blocks: &[(TokenBlock, BlockId)],
        priority: Option<u32>,
    ) -> SaveId {
        let mut parent = parent;
        let chain = blocks.iter().map(|&(name, id)| {
            let before = parent.replace(name.sequence);
            SaveBlock {
                name,
                parent: before,
                id,
            }
        });
        let mut save = Save {
            rank: 0,
            priority: priority.unwrap_or(PRIORITY_DEFAULT),
            since: now,
            waiting: VecDeque::new(),
            copying: 0,
            so_far: Saved::default(),
        };
        let low = priority.is_some_and(|priority| priority < self.config.host_min_priority);
        match self.rank_index(rank) {
            Some(rank) if !low => {
                save.rank = rank;
                save.waiting = self
                    .missing(now, rank, save.priority, chain.collect())
                    .into();
                save.so_far.present = blocks.len() - save.waiting.len();
                let room = self.saves.waiting_max - self.saves.waiting;
                let over = save.waiting.len().saturating_sub(room);
                save.waiting.truncate(room);
                save.so_far.dropped = over;
                self.dropped(Dropped::QueueFull, over);
            }
            _ => {
                save.so_far.dropped = blocks.len();
                self.dropped(Dropped::Priority, blocks.len());
            }
        }
        let waits = save.waiting.len();
        let saves = &mut self.saves;
        saves.waiting += waits;
        let key = saves.open.insert(save);
        if waits > 0 {
            saves.queue.push_back(key);
        }
        saves.settle(key);
        SaveId(key)
    }

    /// Saves that ended since the last call.
    #[must_use]
    pub fn saved(&mut self) -> Vec<(SaveId, Saved)> {
        std::mem::take(&mut self.saves.ended)
    }

    /// Gives up all saves, as soon as none of their blocks is being copied.
    pub fn end_saves(&mut self) {
        let mut left = 0;
        while !self.saves.queue.is_empty() {
            left += self.saves.give_up_first();
        }
        self.dropped(Dropped::Late, left);
    }

    /// A batch of blocks of another engine's G1 to G2.
    pub(super) fn start_save(&mut self, now: Duration) -> Option<MoveSpec> {
        while let Some(&key) = self.saves.queue.front()
            && self.lane_open(now, MoveKind::DeviceToHost)
        {
            let room = self.offload_room();
            if room == 0 {
                self.blocked = true;
                return None;
            }
            let (rank, priority, mut taken) = self.saves.take(key, room.min(self.batch_max()))?;
            let count = taken.len();
            taken.retain(|block| !self.arriving(MoveKind::into_host, block.name.sequence));
            let mut missing = self.missing(now, rank, priority, taken);
            let present = count - missing.len();
            let targets = self.host_room(missing.len());
            let no_room = missing.len() - targets.len();
            self.dropped(Dropped::NoRoom, no_room);
            missing.truncate(targets.len());
            if let Some(save) = self.saves.open.get_mut(key) {
                save.so_far.present += present;
                save.so_far.dropped += no_room;
                save.copying += missing.len();
            }
            if missing.is_empty() {
                self.saves.settle(key);
                continue;
            }
            let mut blocks = Vec::with_capacity(missing.len());
            for (block, target) in missing.iter().zip(targets.ids()) {
                blocks.push(MovedBlock {
                    from: block.id.0,
                    to: target.0,
                    name: block.name,
                    parent: block.parent,
                });
            }
            let flight = Flight {
                kind: MoveKind::DeviceToHost,
                rank: self.ranks[rank].rank,
                started: now,
                time: self.config.queues.offload_time,
                count: blocks.len(),
                job: Job::Save {
                    save: key,
                    rank,
                    priority,
                    names: missing.iter().map(|b| (b.name, b.parent)).collect(),
                    targets,
                },
            };
            return Some(self.start(flight, blocks));
        }
        None
    }

    /// Blocks came into G2, or what stands in for it. Returns the targets that were not filled.
    pub(super) fn save_landed(
        &mut self,
        now: Duration,
        rank: usize,
        priority: u32,
        names: &[(TokenBlock, Option<SequenceHash>)],
        targets: LeasedBlocks,
        outcomes: &[BlockOutcome],
    ) -> LeasedBlocks {
        let moved = |at: usize| outcomes[at] == BlockOutcome::Moved;
        let (filled, rest) = targets.split(moved);
        let names = names.iter().enumerate().filter(|(at, _)| moved(*at));
        let names: Vec<_> = names.map(|(_, name)| *name).collect();
        let blocks = filled.register(names.iter().copied());
        if self.listed {
            drop(blocks);
            let names: Vec<TokenBlock> = names.into_iter().map(|(name, _)| name).collect();
            self.offer_stored(now, rank, priority, &names);
        } else {
            self.bounced(now, rank, priority, blocks.into_each());
        }
        rest
    }

    /// Gives up what has waited too long. Returns when that is the case next.
    pub(super) fn end_late_saves(&mut self, now: Duration) -> Option<Duration> {
        let time = self.config.queues.offload_time;
        while let Some(since) = self.saves.first_since() {
            let until = since.saturating_add(time);
            if now < until {
                return Some(until);
            }
            let left = self.saves.give_up_first();
            self.dropped(Dropped::Late, left);
        }
        None
    }

    /// Those that are not below G1 yet, in order; the others are as if written again.
    fn missing(
        &mut self,
        now: Duration,
        rank: usize,
        priority: u32,
        mut blocks: Vec<SaveBlock>,
    ) -> Vec<SaveBlock> {
        let names = blocks.iter().map(|block| block.name).collect();
        let left = self.without_present(now, rank, priority, names);
        let mut left = left.iter().map(|name| name.sequence).peekable();
        blocks.retain(|block| left.next_if_eq(&block.name.sequence).is_some());
        blocks
    }
}
