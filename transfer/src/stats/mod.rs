//! Counters of an agent and of each of its connections. Counting takes no lock.

mod estimate;
mod histogram;

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::config::Lane;
use crate::error::TransferError;
use crate::op::Op;

pub use estimate::{CostBasis, CostEstimate};
pub use histogram::LatencyHistogram;

pub(crate) use estimate::Meter;

use histogram::Recorder;

/// Counters since the start of the agent, and a few gauges of this moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AgentStats {
    /// Operations that ended well, standalone notifications included.
    pub transfers_done: u64,
    /// Operations that failed because the peer was lost.
    pub transfers_lost: u64,
    /// Operations that missed their deadline.
    pub transfers_late: u64,
    /// Operations that were cancelled.
    pub transfers_cancelled: u64,
    /// Operations whose window was closed by the peer.
    pub transfers_window_closed: u64,
    /// Operations that the peer refused.
    pub transfers_rejected: u64,
    /// Operations that failed otherwise.
    pub transfers_failed: u64,
    /// Bytes of the operations that ended well.
    pub bytes_done: u64,
    /// The same by lane and direction, with times; those that were used.
    pub flows: Vec<FlowStats>,
    /// Notifications that reached their peer, alone or behind a transfer.
    pub notifications_sent: u64,
    /// Notifications received.
    pub notifications_received: u64,
    /// Notifications refused because the queue was full.
    pub notifications_refused: u64,
    /// Connected peers.
    pub peers: usize,
    /// Operations in flight.
    pub in_flight: usize,
    /// Most operations that were in flight at one time.
    pub in_flight_max: usize,
    /// Registered regions.
    pub regions: usize,
    /// Open windows.
    pub windows: usize,
}

/// Counters of one connection since it was made, and its gauges of this moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerStats {
    /// Operations that ended well, standalone notifications included.
    pub transfers_done: u64,
    /// Operations that failed because the peer was lost.
    pub transfers_lost: u64,
    /// Operations that missed their deadline.
    pub transfers_late: u64,
    /// Operations that were cancelled.
    pub transfers_cancelled: u64,
    /// Operations whose window was closed by the peer.
    pub transfers_window_closed: u64,
    /// Operations that the peer refused.
    pub transfers_rejected: u64,
    /// Operations that failed otherwise.
    pub transfers_failed: u64,
    /// Bytes of the operations that ended well.
    pub bytes_done: u64,
    /// The same by lane and direction, with times; those that were used.
    pub flows: Vec<FlowStats>,
    /// Notifications that reached the peer, alone or behind a transfer.
    pub notifications_sent: u64,
    /// Operations in flight.
    pub in_flight: usize,
    /// Most operations that were in flight at one time.
    pub in_flight_max: usize,
}

/// What went over one lane in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowStats {
    /// The lane.
    pub lane: Lane,
    /// The direction; `None` for standalone notifications.
    pub op: Option<Op>,
    /// Operations that ended well.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Operations that failed, whatever the reason.
    pub failed: u64,
    /// From post to end, for operations that ended well.
    pub latency: LatencyHistogram,
}

/// Room for lanes; a lane is its own index.
const LANES: usize = 16;
/// WRITE, READ, notification.
const DIRECTIONS: usize = 3;

/// What is counted of operations.
#[derive(Default)]
pub(crate) struct Counters {
    outcomes: [AtomicU64; OUTCOMES],
    bytes: AtomicU64,
    in_flight: AtomicUsize,
    in_flight_max: AtomicUsize,
    notified: AtomicU64,
    received: AtomicU64,
    refused: AtomicU64,
    /// Made when a lane and direction is first used.
    flows: [[OnceLock<Box<Flow>>; DIRECTIONS]; LANES],
}

/// How operations end; see [`index_of`].
const OUTCOMES: usize = 7;

#[derive(Debug)]
struct Flow {
    lane: Lane,
    op: Option<Op>,
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    latency: Recorder,
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counters").finish_non_exhaustive()
    }
}

impl Counters {
    pub(crate) fn started(&self) {
        let now = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        if now > self.in_flight_max.load(Ordering::Relaxed) {
            self.in_flight_max.fetch_max(now, Ordering::Relaxed);
        }
    }

    pub(crate) fn finished(
        &self,
        lane: Lane,
        op: Option<Op>,
        outcome: &Result<(), TransferError>,
        bytes: u64,
        elapsed: Duration,
    ) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.outcomes[index_of(outcome)].fetch_add(1, Ordering::Relaxed);
        let flow = self.flow(lane, op);
        if outcome.is_ok() {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
            flow.operations.fetch_add(1, Ordering::Relaxed);
            flow.bytes.fetch_add(bytes, Ordering::Relaxed);
            let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
            flow.latency.record(nanos);
        } else {
            flow.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flow(&self, lane: Lane, op: Option<Op>) -> &Flow {
        let direction = match op {
            Some(Op::Write) => 0,
            Some(Op::Read) => 1,
            None => 2,
        };
        self.flows[lane as usize % LANES][direction].get_or_init(|| {
            Box::new(Flow {
                lane,
                op,
                operations: AtomicU64::new(0),
                bytes: AtomicU64::new(0),
                failed: AtomicU64::new(0),
                latency: Recorder::default(),
            })
        })
    }

    /// A notification has reached the peer.
    pub(crate) fn notified(&self) {
        self.notified.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, taken: bool) {
        let counter = if taken { &self.received } else { &self.refused };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The part that connections have.
    pub(crate) fn of_peer(&self) -> PeerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [done, lost, late, cancelled, window_closed, rejected, failed] =
            self.outcomes.each_ref().map(read);
        let flows = self.flows.iter().flatten().filter_map(OnceLock::get);
        PeerStats {
            transfers_done: done,
            transfers_lost: lost,
            transfers_late: late,
            transfers_cancelled: cancelled,
            transfers_window_closed: window_closed,
            transfers_rejected: rejected,
            transfers_failed: failed,
            bytes_done: read(&self.bytes),
            flows: flows.map(|flow| flow.snapshot()).collect(),
            notifications_sent: read(&self.notified),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            in_flight_max: self.in_flight_max.load(Ordering::Relaxed),
        }
    }

    /// All but the gauges that the agent adds.
    pub(crate) fn of_agent(&self) -> AgentStats {
        let own = self.of_peer();
        AgentStats {
            transfers_done: own.transfers_done,
            transfers_lost: own.transfers_lost,
            transfers_late: own.transfers_late,
            transfers_cancelled: own.transfers_cancelled,
            transfers_window_closed: own.transfers_window_closed,
            transfers_rejected: own.transfers_rejected,
            transfers_failed: own.transfers_failed,
            bytes_done: own.bytes_done,
            flows: own.flows,
            notifications_sent: own.notifications_sent,
            in_flight: own.in_flight,
            in_flight_max: own.in_flight_max,
            notifications_received: self.received.load(Ordering::Relaxed),
            notifications_refused: self.refused.load(Ordering::Relaxed),
            ..AgentStats::default()
        }
    }
}

impl Flow {
    fn snapshot(&self) -> FlowStats {
        FlowStats {
            lane: self.lane,
            op: self.op,
            operations: self.operations.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            latency: self.latency.snapshot(),
        }
    }
}

const fn index_of(outcome: &Result<(), TransferError>) -> usize {
    match outcome {
        Ok(()) => 0,
        Err(TransferError::PeerLost(_)) => 1,
        Err(TransferError::DeadlineExceeded { .. }) => 2,
        Err(TransferError::Cancelled) => 3,
        Err(TransferError::WindowClosed { .. }) => 4,
        Err(TransferError::Rejected(_)) => 5,
        Err(
            TransferError::Storage(_)
            | TransferError::Inaccessible { .. }
            | TransferError::Device(_)
            | TransferError::Staging { .. }
            | TransferError::Injected
            | TransferError::StillInFlight { .. },
        ) => 6,
    }
}
