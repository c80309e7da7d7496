//! How long launches take, learned from those that ended: when to begin to look for the end of one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What links and buses have been seen to move, in bytes per second: where learning begins.
const LINK_BYTES_PER_S: u64 = 350_000_000_000;
const BUS_BYTES_PER_S: u64 = 50_000_000_000;
/// From a launch to its first byte, and from its last one to the word that tells.
const OVERHEAD: Duration = Duration::from_micros(8);
/// Shorter launches are all overhead and teach nothing.
const BYTES_MIN: u64 = 256 << 10;
/// Budgets of multiprocessors are told apart by their power of two; 0 is the copy engines.
const BUDGETS: usize = 9;

/// What the speed of a launch depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// Host memory takes part.
    pub(super) over_the_bus: bool,
    /// Multiprocessors; 0 for the copy engines.
    pub(super) sms: u32,
}

/// Bytes per second of each way, on one device.
#[derive(Debug)]
pub(super) struct Paces([[AtomicU64; BUDGETS]; 2]);

impl Default for Paces {
    fn default() -> Self {
        let all = |rate| std::array::from_fn(|_| AtomicU64::new(rate));
        Self([all(LINK_BYTES_PER_S), all(BUS_BYTES_PER_S)])
    }
}

impl Paces {
    fn of(&self, way: Way) -> &AtomicU64 {
        let budget = (u32::BITS - way.sms.leading_zeros()) as usize;
        &self.0[usize::from(way.over_the_bus)][budget.min(BUDGETS - 1)]
    }

    /// How long a launch of so many bytes takes.
    pub(super) fn expected(&self, way: Way, bytes: u64) -> Duration {
        let rate = self.of(way).load(Ordering::Relaxed).max(1);
        OVERHEAD + Duration::from_secs_f64(bytes as f64 / rate as f64)
    }

    /// A launch has taken so long. Other launches beside it, and a late look at its end, make it seem
    /// slower than it was, so each one counts for a quarter.
    pub(super) fn learn(&self, way: Way, bytes: u64, took: Duration) {
        let moving = took.saturating_sub(OVERHEAD);
        if bytes < BYTES_MIN || moving.is_zero() {
            return;
        }
        let seen = u128::from(bytes) * 1_000_000_000 / moving.as_nanos().max(1);
        let seen = u64::try_from(seen).unwrap_or(u64::MAX);
        let rate = self.of(way);
        let known = rate.load(Ordering::Relaxed);
        // A race between two launches loses the lesson of one.
        rate.store(known - known / 4 + seen / 4, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_what_is_seen_and_small_launches_teach_nothing() {
        let paces = Paces::default();
        let way = Way {
            over_the_bus: false,
            sms: 8,
        };
        let other = Way { sms: 16, ..way };
        let bytes = 100 << 20;
        let before = paces.expected(other, bytes);
        for _ in 0..40 {
            paces.learn(way, bytes, OVERHEAD + Duration::from_millis(1));
        }
        let expected = paces.expected(way, bytes);
        assert!(
            (expected - OVERHEAD).abs_diff(Duration::from_millis(1)) < Duration::from_micros(2)
        );
        assert_eq!(paces.expected(other, bytes), before);
        paces.learn(way, 4096, Duration::from_secs(1));
        assert_eq!(paces.expected(way, bytes), expected);
    }
}
