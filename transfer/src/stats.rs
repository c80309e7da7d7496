//! Counters of one agent.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::TransferError;

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
    /// Operations that failed otherwise.
    pub transfers_failed: u64,
    /// Bytes of the operations that ended well.
    pub bytes_done: u64,
    /// Notifications received.
    pub notifications_received: u64,
    /// Notifications refused because the queue was full.
    pub notifications_refused: u64,
    /// Connected peers.
    pub peers: usize,
    /// Operations in flight.
    pub in_flight: usize,
    /// Registered regions.
    pub regions: usize,
    /// Open windows.
    pub windows: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    done: AtomicU64,
    lost: AtomicU64,
    late: AtomicU64,
    cancelled: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    received: AtomicU64,
    refused: AtomicU64,
}

impl Counters {
    pub(crate) fn finished(&self, outcome: &Result<(), TransferError>, bytes: u64) {
        let counter = match outcome {
            Ok(()) => {
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
                &self.done
            }
            Err(TransferError::PeerLost(_)) => &self.lost,
            Err(TransferError::DeadlineExceeded { .. }) => &self.late,
            Err(TransferError::Cancelled) => &self.cancelled,
            Err(
                TransferError::WindowClosed { .. }
                | TransferError::Rejected(_)
                | TransferError::StillInFlight { .. },
            ) => &self.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, taken: bool) {
        let counter = if taken { &self.received } else { &self.refused };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> AgentStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        AgentStats {
            transfers_done: read(&self.done),
            transfers_lost: read(&self.lost),
            transfers_late: read(&self.late),
            transfers_cancelled: read(&self.cancelled),
            transfers_failed: read(&self.failed),
            bytes_done: read(&self.bytes),
            notifications_received: read(&self.received),
            notifications_refused: read(&self.refused),
            ..AgentStats::default()
        }
    }
}
