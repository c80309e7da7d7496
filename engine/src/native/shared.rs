//! What the engine thread of a rank shares with the threads that send it requests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use blockplane_kvbm::{BlockPool, EventHub, KvArena, metrics::Observation};
use blockplane_protocol::{DpRank, LoadReport};
use parking_lot::Mutex;

use super::{mailbox::Mailbox, pool::KvPool, rank::Command};
use crate::{disagg::Transferred, error::RequestError, scheduler::SequenceBlocks};

/// One rank, seen from outside of its thread.
#[derive(Debug)]
pub(crate) struct RankShared {
    pub(crate) rank: DpRank,
    pub(crate) mailbox: Mailbox<Command>,
    pub(crate) pool: BlockPool,
    /// The KV events of all tiers.
    pub(crate) hub: Arc<EventHub>,
    pub(crate) arena: Arc<KvArena>,
    /// KV sent to and received from other workers.
    pub(crate) transferred: Transferred,
    /// Is told of every request.
    pub(crate) watch: Option<Arc<Observation>>,
    /// Zero of the clock that the scheduler is given.
    started: Instant,
    live: AtomicUsize,
    live_max: usize,
    /// When the running step began, in milliseconds since `started`, plus 1; 0 between steps.
    step_began: AtomicU64,
    ended: AtomicBool,
    /// What the scheduler holds, after its last step.
    load: Mutex<LoadReport>,
}

/// One request inside the engine, for as long as anything of it is.
#[derive(Debug)]
pub(crate) struct Live(Arc<RankShared>);

/// Blocks of a request that ended while a peer may still read or write them. Dropping them tells
/// the engine that there is room.
#[derive(Debug)]
pub(crate) struct HeldBlocks {
    blocks: SequenceBlocks<KvPool>,
    rank: Arc<RankShared>,
}

impl RankShared {
    pub(crate) fn new(
        rank: DpRank,
        pool: BlockPool,
        hub: Arc<EventHub>,
        arena: Arc<KvArena>,
        live_max: usize,
    ) -> Self {
        Self {
            rank,
            mailbox: Mailbox::new(),
            pool,
            hub,
            arena,
            transferred: Transferred::default(),
            watch: None,
            started: Instant::now(),
            live: AtomicUsize::new(0),
            live_max,
            step_began: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            load: Mutex::new(LoadReport::default()),
        }
    }

    /// Time since the engine started: the scheduler's clock.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Counts a request in, unless the rank is full.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Live, RequestError> {
        let limit = self.live_max;
        self.live
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |live| {
                (live < limit).then_some(live + 1)
            })
            .map_err(|_| RequestError::QueueFull { limit })?;
        Ok(Live(Arc::clone(self)))
    }

    /// Requests inside the engine, those included whose last bytes are on their way.
    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::Acquire)
    }

    pub(crate) fn step_begins(&self) {
        let now = u64::try_from(self.now().as_millis()).unwrap_or(u64::MAX - 1);
        self.step_began.store(now + 1, Ordering::Relaxed);
    }

    pub(crate) fn step_ends(&self) {
        self.step_began.store(0, Ordering::Relaxed);
    }

    /// How long the running step has taken; `None` between steps.
    pub(crate) fn step_time(&self) -> Option<Duration> {
        let began = self.step_began.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.now().saturating_sub(Duration::from_millis(began)))
    }

    pub(crate) fn set_ended(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(crate) fn publish(&self, load: LoadReport) {
        *self.load.lock() = load;
    }

    /// The rank's load now: what the scheduler said last, and the pool as it is.
    pub(crate) fn load(&self) -> LoadReport {
        let stats = self.pool.stats();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let transferred = self.transferred.get();
        LoadReport {
            rank: self.rank,
            blocks_total: count(stats.total),
            blocks_active: count(stats.active),
            blocks_cached: count(stats.cached),
            blocks_quarantined: count(stats.quarantined),
            transfer_blocks_total: transferred.blocks,
            transfer_bytes_total: transferred.bytes,
            ..*self.load.lock()
        }
    }
}

impl HeldBlocks {
    pub(crate) fn new(blocks: SequenceBlocks<KvPool>, rank: Arc<RankShared>) -> Self {
        Self { blocks, rank }
    }

    /// Counts the blocks that may still be written as quarantined, until this is dropped.
    pub(crate) fn quarantine(mut self) -> impl Send {
        let owned = std::mem::take(&mut self.blocks.owned);
        // Fields drop in this order: the quarantine first, then `self`, which wakes the engine.
        (self.rank.pool.quarantine(owned), self)
    }
}

impl Drop for HeldBlocks {
    fn drop(&mut self) {
        self.blocks.shared.clear();
        self.blocks.owned.clear();
        self.rank.mailbox.wake();
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if self.0.live.fetch_sub(1, Ordering::AcqRel) == 1 {
            // A draining engine waits for this.
            self.0.mailbox.wake();
        }
    }
}
