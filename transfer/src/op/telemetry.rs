//! What one transfer has to tell after its end. Always on: a few clock readings per transfer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::request::Op;
use crate::config::Lane;
use crate::error::TransferError;

/// How one transfer went.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TransferTelemetry {
    /// Number of the operation, unique within the agent.
    pub id: u64,
    /// From [`PostOptions::request_id`](crate::PostOptions::request_id).
    pub request_id: Option<Arc<str>>,
    /// Name of the peer.
    pub peer: Arc<str>,
    /// When it was posted.
    pub posted_at: SystemTime,
    /// From post to the first part being taken up by a thread or stream; `None` if none was.
    pub until_first_part: Option<Duration>,
    /// From post to the moment after which no byte of it moved.
    pub bytes_phase: Duration,
    /// From there to the peer's answer to the notification; zero without one.
    pub notification_phase: Duration,
    /// From post to end.
    pub total: Duration,
    /// Direction; `None` for a standalone notification.
    pub op: Option<Op>,
    /// Bytes of the operation.
    pub bytes: u64,
    /// Runs named by the caller.
    pub runs: u64,
    /// Pieces that are contiguous on both sides.
    pub pieces: u64,
    /// Parts of a copy, or stripes over streams.
    pub parts: u32,
    /// The lane.
    pub lane: Lane,
    /// Why this lane and this way.
    pub reason: String,
    /// Multiprocessors that a device used for it, which may be fewer than its budget when others were in
    /// flight; none for other lanes and for copy engines.
    pub sms: Option<u32>,
    /// How it ended.
    pub outcome: Result<(), TransferError>,
}

/// Clock readings of one transfer, as nanoseconds since the post plus one; 0 is "not yet".
#[derive(Debug)]
pub(super) struct Stopwatch {
    posted: Instant,
    first: AtomicU64,
    quiet: AtomicU64,
    ended: AtomicU64,
}

impl Stopwatch {
    pub(super) const fn new(posted: Instant) -> Self {
        Self {
            posted,
            first: AtomicU64::new(0),
            quiet: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.posted.elapsed().as_nanos()).unwrap_or(u64::MAX - 1) + 1
    }

    /// A part is taken up.
    pub(super) fn part(&self) {
        if self.first.load(Ordering::Relaxed) == 0 {
            let now = self.now();
            // The first of several threads is kept; a tie does not matter.
            let _ = self
                .first
                .compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// No byte moves any more, and something else follows.
    pub(super) fn quiet(&self) {
        self.quiet.store(self.now(), Ordering::Relaxed);
    }

    /// The end; says how long it all took.
    pub(super) fn end(&self) -> Duration {
        let now = self.now();
        if self.quiet.load(Ordering::Relaxed) == 0 {
            self.quiet.store(now, Ordering::Relaxed);
        }
        self.ended.store(now, Ordering::Relaxed);
        Duration::from_nanos(now - 1)
    }

    pub(super) fn posted_at(&self) -> SystemTime {
        let now = SystemTime::now();
        now.checked_sub(self.posted.elapsed()).unwrap_or(now)
    }

    pub(super) fn until_first_part(&self) -> Option<Duration> {
        read(&self.first)
    }

    pub(super) fn bytes_phase(&self) -> Duration {
        read(&self.quiet).unwrap_or_default()
    }

    pub(super) fn total(&self) -> Duration {
        read(&self.ended).unwrap_or_default()
    }
}

fn read(time: &AtomicU64) -> Option<Duration> {
    let nanos = time.load(Ordering::Relaxed).checked_sub(1)?;
    Some(Duration::from_nanos(nanos))
}
