//! Counters of everything the tiers do.

use std::time::Duration;

use super::{found::PerTier, health::TierState, moves::MoveKind, onboard::NotLoaded};
use crate::pool::{PoolActivity, PoolStats};

/// What the tiers hold and have done since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// G1 of all ranks.
    pub device: PoolStats,
    /// What they did.
    pub device_activity: PoolActivity,
    /// G2; all zero without one.
    pub host: PoolStats,
    /// What it did.
    pub host_activity: PoolActivity,
    /// G3; all zero without one.
    pub disk: PoolStats,
    /// What it did.
    pub disk_activity: PoolActivity,
    /// Blocks known to be in G4.
    pub remote_blocks: usize,
    /// Moves, by [`MoveKind`] in the order of [`MoveKind::ALL`].
    pub moves: [MoveStats; 6],
    /// Blocks that wait to be moved from G1 to G2.
    pub offload_queue_blocks: usize,
    /// Blocks that wait to be written to G3.
    pub disk_queue_blocks: usize,
    /// Blocks that wait to be written to G4.
    pub remote_queue_blocks: usize,
    /// Blocks that wait to be read from G3 or G4.
    pub read_queue_blocks: usize,
    /// Requests that are being onboarded.
    pub onboards: usize,
    /// Blocks that were to go to a lower tier and did not, by [`Dropped`] in the order of
    /// [`Dropped::ALL`].
    pub dropped: [u64; Dropped::ALL.len()],
    /// Blocks of G2 that were overwritten, or made room, by [`Evicted`] in the order of
    /// [`Evicted::ALL`].
    pub host_evicted: [u64; Evicted::ALL.len()],
    /// Onboards that ended, and their blocks.
    pub onboarded: OnboardStats,
    /// Blocks of lower tiers whose contents were not what was stored.
    pub invalid: PerTier<u64>,
    /// Slots of G3 that are set aside because their contents were wrong.
    pub disk_quarantined_blocks: usize,
    /// Slots of G3 taken out of use for good.
    pub disk_bad_blocks: u64,
    /// Bytes written to G3.
    pub disk_bytes_written: u64,
    /// How each tier is.
    pub states: PerTier<TierState>,
    /// Changes of a tier's state.
    pub state_changes: PerTier<u64>,
    /// Moves whose bytes may still land although their time is over.
    pub unquiet_moves: usize,
}

/// Counters of one kind of move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MoveStats {
    /// Moves that ended.
    pub moves: u64,
    /// Moves under way.
    pub running: u32,
    /// Blocks in place.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks that were not moved.
    pub failed_blocks: u64,
    /// Moves that were not done in their time.
    pub late: u64,
    /// How long moves took.
    pub latency: Histogram,
}

/// Counters of onboards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OnboardStats {
    /// Onboards that ended.
    pub requests: u64,
    /// Those that loaded everything.
    pub complete: u64,
    /// Those that did not, by [`NotLoaded`] in the order of [`NotLoaded::ALL`].
    pub not_loaded: [u64; NotLoaded::ALL.len()],
    /// Blocks that were used, by the tier in which they were found.
    pub blocks: PerTier<u64>,
    /// How long requests waited.
    pub waited: Histogram,
}

/// Why a block did not go to a lower tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dropped {
    /// The queue was full.
    QueueFull,
    /// Its priority is too low.
    Priority,
    /// It was overwritten before its turn came.
    Overwritten,
    /// It waited too long.
    Late,
    /// The tier below had no block that could be overwritten.
    NoRoom,
    /// The write budget is spent.
    Budget,
    /// The tier is slow or off.
    TierDown,
    /// The move failed.
    Failed,
}

/// Why a block of G2 went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Evicted {
    /// Room was needed.
    Room,
    /// It was written to G3 first.
    Demoted,
    /// Room was made ahead of need, and it was not worth a write or in G3 already.
    NotAdmitted,
}

/// Times in buckets: up to 64 us, each following one twice as long, the last one without a bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; Self::BUCKETS],
    sum: Duration,
}

impl Dropped {
    /// All reasons.
    pub const ALL: [Self; 8] = [
        Self::QueueFull,
        Self::Priority,
        Self::Overwritten,
        Self::Late,
        Self::NoRoom,
        Self::Budget,
        Self::TierDown,
        Self::Failed,
    ];

    /// A name for metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::Priority => "priority",
            Self::Overwritten => "overwritten",
            Self::Late => "late",
            Self::NoRoom => "no_room",
            Self::Budget => "budget",
            Self::TierDown => "tier_down",
            Self::Failed => "failed",
        }
    }
}

impl Evicted {
    /// All reasons.
    pub const ALL: [Self; 3] = [Self::Room, Self::Demoted, Self::NotAdmitted];

    /// A name for metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Demoted => "demoted",
            Self::NotAdmitted => "not_admitted",
        }
    }
}

impl TierStats {
    /// The counters of a kind of move.
    #[must_use]
    pub const fn of(&self, kind: MoveKind) -> &MoveStats {
        &self.moves[kind.index()]
    }

    /// How many blocks were dropped for a reason.
    #[must_use]
    pub const fn dropped(&self, reason: Dropped) -> u64 {
        self.dropped[reason as usize]
    }

    /// How many blocks left G2 for a reason.
    #[must_use]
    pub const fn host_evicted(&self, reason: Evicted) -> u64 {
        self.host_evicted[reason as usize]
    }
}

impl Histogram {
    /// Number of buckets.
    pub const BUCKETS: usize = 22;

    /// Counts a time.
    pub fn record(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let steps = nanos.div_ceil(64_000).max(1) - 1;
        let bucket = (u64::BITS - steps.leading_zeros()) as usize;
        self.counts[bucket.min(Self::BUCKETS - 1)] += 1;
        self.sum = self.sum.saturating_add(time);
    }

    /// The buckets: their longest time, `None` for the last, and how many times lie in each.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> + '_ {
        self.counts.iter().enumerate().map(|(i, count)| {
            let bound = (i + 1 < Self::BUCKETS).then(|| Duration::from_micros(64 << i));
            (bound, *count)
        })
    }

    /// Times counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum.
    #[must_use]
    pub const fn sum(&self) -> Duration {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_in_the_first_bucket_that_is_long_enough() {
        let times = [0, 1, 64_000, 64_001, 128_000, 128_001, 256_000, 1 << 50];
        for nanos in times {
            let time = Duration::from_nanos(nanos);
            let mut histogram = Histogram::default();
            histogram.record(time);
            let expected = histogram
                .buckets()
                .position(|(bound, _)| bound.is_none_or(|bound| time <= bound));
            let counted = histogram.buckets().position(|(_, count)| count == 1);
            assert_eq!(counted, expected, "{time:?}");
            assert_eq!((histogram.count(), histogram.sum()), (1, time));
        }
    }
}
