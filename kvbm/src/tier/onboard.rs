//! Towards G1: requests that wait for their blocks, and the reads that serve them.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use blockplane_protocol::{BlockId, DpRank, SequenceHash, Tier, TokenBlock};

use super::{
    flight::{Flight, Job, Source},
    found::{PerTier, Place, TierMatch},
    moves::{BlockOutcome, MoveKind, MoveSpec, MovedBlock},
    tiers::Tiers,
};
use crate::block::{HeldBlocks, ImmutableBlock, LeasedBlocks, MutableBlock};

/// Names an onboard; not used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OnboardId(pub u64);

/// How an onboard ended. No byte lands in any of its targets any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Onboarded {
    /// Leading blocks of the match that are in G1 now.
    pub loaded: usize,
    /// Targets that were not filled, in order: what belongs there must be computed.
    pub not_loaded: Vec<BlockId>,
    /// The leading blocks, by the tier in which they were found.
    pub from: PerTier<u32>,
    /// Bytes copied into the targets that are loaded.
    pub bytes: u64,
    /// Time since the onboard began.
    pub waited: Duration,
    /// Why not all was loaded.
    pub reason: Option<NotLoaded>,
}

/// Why a block was not loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NotLoaded {
    /// The time was up.
    Deadline,
    /// Nobody wanted it any more.
    Cancelled,
    /// What was stored under its name was not what it should be.
    Invalid,
    /// A move failed.
    Failed,
    /// Too many onboards were under way.
    QueueFull,
    /// Its tier is slow or off.
    TierDown,
}

/// A request that waits for blocks.
pub(super) struct Onboard {
    rank: usize,
    /// Name of the block before the first one.
    parent: Option<SequenceHash>,
    started: Duration,
    deadline: Duration,
    blocks: Vec<Awaited>,
    /// Blocks whose source is in host memory, to be copied.
    ready: VecDeque<u32>,
    /// Whether it is in the list of those with ready blocks.
    listed: bool,
    copying: usize,
    /// Blocks from here on are given up.
    end: usize,
    reason: Option<NotLoaded>,
}

struct Awaited {
    name: TokenBlock,
    target: BlockId,
    from: Tier,
    state: State,
}

enum State {
    /// In G1 from the start; held unless its owner has taken it.
    Here(#[expect(dead_code, reason = "held")] Option<ImmutableBlock>),
    /// To be read into host memory.
    Waiting,
    Ready(Source),
    Copying,
    Loaded,
    GivenUp,
}

/// A block to read from G3 or G4, once for all who want it.
pub(super) struct Read {
    name: TokenBlock,
    parent: Option<SequenceHash>,
    /// Holds it in G3.
    source: Option<ImmutableBlock>,
    first: Waiter,
    more: Vec<Waiter>,
}

#[derive(Clone, Copy)]
struct Waiter {
    onboard: u64,
    at: u32,
}

impl NotLoaded {
    /// All reasons.
    pub const ALL: [Self; 6] = [
        Self::Deadline,
        Self::Cancelled,
        Self::Invalid,
        Self::Failed,
        Self::QueueFull,
        Self::TierDown,
    ];

    /// A name for metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Cancelled => "cancelled",
            Self::Invalid => "invalid",
            Self::Failed => "failed",
            Self::QueueFull => "queue_full",
            Self::TierDown => "tier_down",
        }
    }
}

impl Tiers {
    /// Starts to bring a match into G1: into `targets`, one for each block that is not there, in
    /// order, which nobody else may use before it has ended. It ends in [`Tiers::finished`], at
    /// `deadline` or as soon after it as no copy into a target is under way.
    ///
    /// # Panics
    /// When there is not one target for each block below G1, or the match is of another rank, or of
    /// one that was never attached.
    pub fn onboard(
        &mut self,
        now: Duration,
        rank: DpRank,
        found: TierMatch,
        targets: Vec<BlockId>,
        deadline: Duration,
    ) -> OnboardId {
        assert!(found.rank() == rank, "a match is onboarded by its rank");
        assert!(
            targets.len() == found.missing_targets(),
            "{} targets for {} blocks",
            targets.len(),
            found.missing_targets()
        );
        let at = self.rank_index(rank).expect("the rank is attached");
        let full = self.onboards.len() >= self.config.queues.onboard_requests_max as usize;
        self.offer_hits(now, &found);
        let end = found.len();
        let mut blocks = Vec::with_capacity(end);
        let mut ready = VecDeque::new();
        let mut targets = targets.into_iter();
        let mut parent = found.parent();
        let first_parent = parent;
        let mut lower = Vec::with_capacity(found.lower());
        for (at, found) in (0..).zip(found.into_blocks()) {
            let from = found.place.tier();
            let (state, source) = match found.place {
                Place::Device(block) => (State::Here(block), None),
                Place::Host(block) => (State::Ready(Source::Shared(block)), None),
                Place::Disk(block) => (State::Waiting, Some(block)),
                Place::Remote => (State::Waiting, None),
            };
            let target = match state {
                State::Here(_) => BlockId(u32::MAX),
                _ => targets.next().expect("counted above"),
            };
            match state {
                State::Waiting => lower.push((at, parent, source)),
                State::Ready(_) => ready.push_back(at),
                _ => {}
            }
            blocks.push(Awaited {
                name: found.name,
                target,
                from,
                state,
            });
            parent = Some(found.name.sequence);
        }
        let listed = !ready.is_empty();
        let key = self.onboards.insert(Onboard {
            rank: at,
            parent: first_parent,
            started: now,
            deadline,
            blocks,
            ready,
            listed,
            copying: 0,
            end,
            reason: None,
        });
        if listed {
            self.loading.push_back(key);
        }
        self.next_deadline = self.next_deadline.min(deadline);
        if full || deadline <= now {
            let reason = if full {
                NotLoaded::QueueFull
            } else {
                NotLoaded::Deadline
            };
            self.give_up(key, reason);
        } else {
            for (at, parent, source) in lower {
                self.await_read(now, key, at, parent, source);
            }
        }
        self.settle(now, key);
        OnboardId(key)
    }

    /// Ends an onboard that nobody wants any more, as soon as no copy into its targets is under way.
    pub fn cancel(&mut self, now: Duration, id: OnboardId) {
        if self.onboards.get(id.0).is_some() {
            self.give_up(id.0, NotLoaded::Cancelled);
            self.settle(now, id.0);
        }
    }

    /// A batch of blocks from host memory into G1.
    pub(super) fn start_load(&mut self, now: Duration) -> Option<MoveSpec> {
        if !self.lane_open(now, MoveKind::HostToDevice) {
            return None;
        }
        while let Some(&key) = self.loading.front() {
            let batch_max = self.batch_max();
            let Some(onboard) = self.onboards.get_mut(key) else {
                self.loading.pop_front();
                continue;
            };
            let count = onboard.ready.len().min(batch_max);
            let mut blocks = Vec::with_capacity(count);
            let mut sources = Vec::with_capacity(count);
            let mut places = Vec::with_capacity(count);
            for at in onboard.ready.drain(..count) {
                let parent = at
                    .checked_sub(1)
                    .map(|before| onboard.blocks[before as usize].name.sequence)
                    .or(onboard.parent);
                let block = &mut onboard.blocks[at as usize];
                let State::Ready(source) = std::mem::replace(&mut block.state, State::Copying)
                else {
                    unreachable!("block {at} is listed as ready");
                };
                blocks.push(MovedBlock {
                    from: source.id().0,
                    to: block.target.0,
                    name: block.name,
                    parent,
                });
                sources.push(source);
                places.push(at);
            }
            if onboard.ready.is_empty() {
                onboard.listed = false;
                self.loading.pop_front();
            }
            if blocks.is_empty() {
                continue;
            }
            let onboard = self.onboard_mut(key);
            onboard.copying += blocks.len();
            let left = onboard.deadline.saturating_sub(now);
            let rank = onboard.rank;
            let flight = Flight {
                kind: MoveKind::HostToDevice,
                rank: self.ranks[rank].rank,
                started: now,
                time: left.min(self.config.queues.onboard_time),
                count: blocks.len(),
                job: Job::Load {
                    onboard: key,
                    at: places,
                    sources,
                },
            };
            return Some(self.start(flight, blocks));
        }
        None
    }

    /// A batch of blocks from G3 or G4 into G2.
    pub(super) fn start_read(&mut self, now: Duration, tier: Tier) -> Option<MoveSpec> {
        let kind = match tier {
            Tier::Remote => MoveKind::RemoteToHost,
            Tier::Device | Tier::Host | Tier::Disk => MoveKind::DiskToHost,
        };
        if self.read_queue(tier).is_empty() || !self.lane_open(now, kind) {
            return None;
        }
        let mut keys = Vec::new();
        let mut until = now;
        while keys.len() < self.batch_max()
            && let Some(key) = self.read_queue(tier).pop_front()
        {
            let Some(deadline) = self.read_wanted_until(key) else {
                self.forget_read(key);
                continue;
            };
            let name = self.reads.get(key).map(|read| read.name);
            let here = name.map(|name| self.host.match_prefix(&[name]));
            if let Some(block) = here.and_then(|mut here| here.pop()) {
                // It came into G2 by another way.
                self.read_succeeded(key, Source::Shared(block));
                continue;
            }
            until = until.max(deadline);
            keys.push(key);
        }
        if keys.is_empty() {
            // What was found in G2 can be copied.
            return self.start_load(now);
        }
        let targets = self.host_room(keys.len());
        for key in keys.drain(targets.len()..).rev() {
            self.read_queue(tier).push_front(key);
            self.blocked = true;
        }
        if keys.is_empty() {
            return None;
        }
        let mut blocks = Vec::with_capacity(keys.len());
        let mut sources = Vec::with_capacity(keys.len());
        let mut names = Vec::with_capacity(keys.len());
        for (key, target) in keys.iter().zip(targets.ids()) {
            let read = self.reads.get_mut(*key).expect("it has a waiter");
            let source = read.source.take();
            blocks.push(MovedBlock {
                from: source.as_ref().map_or(u32::MAX, |block| block.id().0),
                to: target.0,
                name: read.name,
                parent: read.parent,
            });
            names.push((read.name, read.parent));
            sources.extend(source);
        }
        let sources = (!sources.is_empty()).then(|| HeldBlocks::gather(sources));
        let flight = Flight {
            kind,
            rank: DpRank::default(),
            started: now,
            time: (until - now).min(self.config.queues.onboard_time),
            count: blocks.len(),
            job: Job::Read {
                reads: keys,
                names,
                sources,
                targets,
            },
        };
        Some(self.start(flight, blocks))
    }

    /// Takes the end of a batch of reads. Returns the targets that were not filled.
    pub(super) fn read_ended(
        &mut self,
        now: Duration,
        names: &[(TokenBlock, Option<SequenceHash>)],
        reads: &[u64],
        targets: LeasedBlocks,
        outcomes: &[BlockOutcome],
    ) -> LeasedBlocks {
        let moved = |at: usize| outcomes[at] == BlockOutcome::Moved;
        let (filled, rest) = targets.split(moved);
        let names = names.iter().enumerate().filter(|(at, _)| moved(*at));
        let names = names.map(|(_, name)| *name);
        let arrived: Vec<Source> = if self.config.promote {
            let shared = filled.register(names).into_each();
            shared.into_iter().map(Source::Shared).collect()
        } else {
            let filled = filled.into_each().into_iter().zip(names);
            let bounce = |(block, (name, parent)): (MutableBlock, _)| block.complete(name, parent);
            filled
                .map(|filled| Source::Bounce(Arc::new(bounce(filled))))
                .collect()
        };
        let mut arrived = arrived.into_iter();
        let mut touched = Vec::new();
        for (key, outcome) in reads.iter().zip(outcomes) {
            let reason = match outcome {
                BlockOutcome::Moved => {
                    let source = arrived.next().expect("one for each that moved");
                    self.read_succeeded(*key, source);
                    continue;
                }
                BlockOutcome::Invalid(_) => NotLoaded::Invalid,
                BlockOutcome::Failed(_) | BlockOutcome::Bad(_) => NotLoaded::Failed,
            };
            self.read_failed(*key, reason, &mut touched);
        }
        self.settle_all(now, touched);
        rest
    }

    /// Nothing is read from this tier for now.
    pub(super) fn fail_queued_reads(&mut self, now: Duration, tier: Tier) {
        let mut touched = Vec::new();
        while let Some(key) = self.read_queue(tier).pop_front() {
            self.read_failed(key, NotLoaded::TierDown, &mut touched);
        }
        self.settle_all(now, touched);
    }

    pub(super) fn block_loaded(&mut self, key: u64, at: u32) {
        if let Some(onboard) = self.onboards.get_mut(key) {
            onboard.blocks[at as usize].state = State::Loaded;
        }
    }

    pub(super) fn block_failed(&mut self, key: u64, at: u32, reason: NotLoaded) {
        if let Some(onboard) = self.onboards.get_mut(key) {
            onboard.blocks[at as usize].state = State::GivenUp;
            onboard.give_up_from(at as usize, reason);
        }
    }

    /// `count` copies into targets are over.
    pub(super) fn copies_ended(&mut self, now: Duration, key: u64, count: usize) {
        if let Some(onboard) = self.onboards.get_mut(key) {
            onboard.copying -= count;
            self.settle(now, key);
        }
    }

    pub(super) fn end_late_onboards(&mut self, now: Duration) {
        let late = |(key, onboard): (u64, &Onboard)| (onboard.deadline <= now).then_some(key);
        let late: Vec<u64> = self.onboards.iter().filter_map(late).collect();
        for key in late {
            self.give_up(key, NotLoaded::Deadline);
            self.settle(now, key);
        }
        let later = self.onboards.iter().map(|(_, onboard)| onboard.deadline);
        self.next_deadline = later.filter(|at| *at > now).min().unwrap_or(Duration::MAX);
    }

    /// Gives up all that is not in G1 or on the last step to it.
    fn give_up(&mut self, key: u64, reason: NotLoaded) {
        let onboard = self.onboard_mut(key);
        let open = |block: &Awaited| matches!(block.state, State::Waiting | State::Ready(_));
        if let Some(first) = onboard.blocks.iter().position(open) {
            onboard.give_up_from(first, reason);
        }
    }

    /// Ends the onboard if nothing of it is open.
    fn settle(&mut self, now: Duration, key: u64) {
        let over = self.onboards.get(key).is_some_and(Onboard::over);
        if !over {
            return;
        }
        let onboard = self.onboards.remove(key).expect("looked up above");
        let mut ended = Onboarded {
            loaded: onboard.end,
            not_loaded: Vec::new(),
            from: PerTier::default(),
            bytes: 0,
            waited: now.saturating_sub(onboard.started),
            reason: onboard.reason,
        };
        for (at, block) in onboard.blocks.iter().enumerate() {
            if at < onboard.end {
                *ended.from.get_mut(block.from) += 1;
            } else if block.from != Tier::Device {
                ended.not_loaded.push(block.target);
            }
        }
        let copied = ended.from.host + ended.from.disk + ended.from.remote;
        ended.bytes = u64::from(copied) * self.block_bytes;
        let stats = &mut self.stats.onboarded;
        stats.requests += 1;
        stats.complete += u64::from(ended.reason.is_none());
        if let Some(reason) = ended.reason {
            stats.not_loaded[reason as usize] += 1;
        }
        for tier in [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote] {
            *stats.blocks.get_mut(tier) += u64::from(*ended.from.get(tier));
        }
        stats.waited.record(ended.waited);
        self.finished.push((OnboardId(key), ended));
    }

    fn settle_all(&mut self, now: Duration, mut keys: Vec<u64>) {
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            self.settle(now, key);
        }
    }

    /// Has a block read from below G2, or joins those who wait for it already.
    fn await_read(
        &mut self,
        now: Duration,
        onboard: u64,
        at: u32,
        parent: Option<SequenceHash>,
        source: Option<ImmutableBlock>,
    ) {
        let block = &self.onboard_mut(onboard).blocks[at as usize];
        let (name, tier) = (block.name, block.from);
        let waiter = Waiter { onboard, at };
        if let Some(key) = self.reads_by_name.get(&name.sequence)
            && let Some(read) = self.reads.get_mut(*key)
        {
            read.more.push(waiter);
            return;
        }
        let alone = self
            .health_mut(tier)
            .is_none_or(|health| health.left_alone(now));
        if alone {
            self.block_failed(onboard, at, NotLoaded::TierDown);
            return;
        }
        let key = self.reads.insert(Read {
            name,
            parent,
            source,
            first: waiter,
            more: Vec::new(),
        });
        self.reads_by_name.insert(name.sequence, key);
        self.read_queue(tier).push_back(key);
    }

    /// The latest deadline of those who still want a read.
    fn read_wanted_until(&self, key: u64) -> Option<Duration> {
        let read = self.reads.get(key)?;
        let deadlines = read.waiters().filter_map(|waiter| {
            let onboard = self.onboards.get(waiter.onboard)?;
            let block = &onboard.blocks[waiter.at as usize];
            matches!(block.state, State::Waiting).then_some(onboard.deadline)
        });
        deadlines.max()
    }

    fn read_succeeded(&mut self, key: u64, source: Source) {
        let Some(read) = self.forget_read(key) else {
            return;
        };
        let others = read.waiters().take(read.more.len());
        others.for_each(|waiter| self.source_ready(waiter, source.clone()));
        self.source_ready(*read.more.last().unwrap_or(&read.first), source);
    }

    fn source_ready(&mut self, waiter: Waiter, source: Source) {
        if let Some(onboard) = self.onboards.get_mut(waiter.onboard) {
            let state = &mut onboard.blocks[waiter.at as usize].state;
            if matches!(state, State::Waiting) {
                *state = State::Ready(source);
                self.ready_now(waiter.onboard, waiter.at);
            }
        }
    }

    fn read_failed(&mut self, key: u64, reason: NotLoaded, touched: &mut Vec<u64>) {
        let Some(read) = self.forget_read(key) else {
            return;
        };
        for waiter in read.waiters() {
            let waits = self.onboards.get(waiter.onboard).is_some_and(|onboard| {
                matches!(onboard.blocks[waiter.at as usize].state, State::Waiting)
            });
            if waits {
                self.block_failed(waiter.onboard, waiter.at, reason);
                touched.push(waiter.onboard);
            }
        }
    }

    fn forget_read(&mut self, key: u64) -> Option<Read> {
        let read = self.reads.remove(key)?;
        self.reads_by_name.remove(&read.name.sequence);
        Some(read)
    }

    fn read_queue(&mut self, tier: Tier) -> &mut VecDeque<u64> {
        match tier {
            Tier::Remote => &mut self.remote_reads,
            Tier::Device | Tier::Host | Tier::Disk => &mut self.disk_reads,
        }
    }

    fn ready_now(&mut self, key: u64, at: u32) {
        let onboard = self.onboards.get_mut(key).expect("it waits");
        onboard.ready.push_back(at);
        if !onboard.listed {
            onboard.listed = true;
            self.loading.push_back(key);
        }
    }

    fn onboard_mut(&mut self, key: u64) -> &mut Onboard {
        self.onboards.get_mut(key).expect("it has not ended")
    }
}

impl Onboard {
    fn give_up_from(&mut self, first: usize, reason: NotLoaded) {
        if first >= self.end {
            return;
        }
        self.end = first;
        self.reason = Some(reason);
        for block in &mut self.blocks[first..] {
            if matches!(
                block.state,
                State::Waiting | State::Ready(_) | State::Here(_)
            ) {
                block.state = State::GivenUp;
            }
        }
        self.ready.retain(|at| (*at as usize) < first);
    }

    fn over(&self) -> bool {
        let there = |block: &Awaited| matches!(block.state, State::Here(_) | State::Loaded);
        self.copying == 0 && self.ready.is_empty() && self.blocks[..self.end].iter().all(there)
    }
}

impl Read {
    fn waiters(&self) -> impl Iterator<Item = Waiter> + '_ {
        std::iter::once(self.first).chain(self.more.iter().copied())
    }
}
