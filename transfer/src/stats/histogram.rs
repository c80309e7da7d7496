//! Latency histograms: fixed buckets, counted without locks.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets per doubling, as a power of two: a bucket is at most an eighth of its value wide.
const FINE_BITS: u32 = 3;
const FINE: usize = 1 << FINE_BITS;
/// Shorter times share the first bucket: 2^7 ns.
const SHORT_BITS: u32 = 7;
/// Longer times share the last bucket: 2^38 ns are 275 s.
const LONG_BITS: u32 = 38;
const BUCKETS: usize = ((LONG_BITS - SHORT_BITS) as usize) * FINE + 2;

/// Counts times; 2 KiB.
pub(crate) struct Recorder {
    buckets: [AtomicU64; BUCKETS],
    sum_nanos: AtomicU64,
    max_nanos: AtomicU64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            sum_nanos: AtomicU64::new(0),
            max_nanos: AtomicU64::new(0),
        }
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

impl Recorder {
    pub(crate) fn record(&self, nanos: u64) {
        self.buckets[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
        if nanos > self.max_nanos.load(Ordering::Relaxed) {
            self.max_nanos.fetch_max(nanos, Ordering::Relaxed);
        }
    }

    pub(crate) fn snapshot(&self) -> LatencyHistogram {
        let counts: Vec<u64> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Ordering::Relaxed))
            .collect();
        LatencyHistogram {
            counts,
            sum_nanos: self.sum_nanos.load(Ordering::Relaxed),
            max_nanos: self.max_nanos.load(Ordering::Relaxed),
        }
    }
}

fn bucket(nanos: u64) -> usize {
    if nanos < 1 << SHORT_BITS {
        return 0;
    }
    let exponent = nanos.ilog2();
    if exponent >= LONG_BITS {
        return BUCKETS - 1;
    }
    let fine = usize::try_from(nanos >> (exponent - FINE_BITS)).unwrap_or(0) & (FINE - 1);
    1 + (exponent - SHORT_BITS) as usize * FINE + fine
}

/// The first time that is too long for a bucket; the last bucket has no end.
fn end_of(bucket: usize) -> Option<u64> {
    if bucket == 0 {
        return Some(1 << SHORT_BITS);
    }
    let (octave, fine) = ((bucket - 1) / FINE, (bucket - 1) % FINE);
    let exponent = SHORT_BITS + u32::try_from(octave).unwrap_or(u32::MAX);
    (exponent < LONG_BITS).then(|| ((FINE + fine + 1) as u64) << (exponent - FINE_BITS))
}

/// Times of finished operations, in buckets that are at most an eighth of their value wide (all
/// times below 128 ns share one, and all beyond 275 s).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyHistogram {
    counts: Vec<u64>,
    sum_nanos: u64,
    max_nanos: u64,
}

impl LatencyHistogram {
    /// Number of times counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The time that a share of the operations (`0.0..=1.0`) did not exceed, rounded up to the end
    /// of its bucket; `None` when nothing was counted.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 1 and the count"
        )]
        let rank = ((count as f64 * share.clamp(0.0, 1.0)).ceil() as u64).clamp(1, count);
        let mut seen = 0;
        for (index, counted) in self.counts.iter().enumerate() {
            seen += counted;
            if seen >= rank {
                let end = end_of(index).unwrap_or(self.max_nanos);
                return Some(Duration::from_nanos(end.min(self.max_nanos)));
            }
        }
        Some(self.max())
    }

    /// The arithmetic mean; `None` when nothing was counted.
    #[must_use]
    pub fn mean(&self) -> Option<Duration> {
        let count = self.count();
        (count > 0).then(|| Duration::from_nanos(self.sum_nanos / count))
    }

    /// The longest time, zero when nothing was counted.
    #[must_use]
    pub const fn max(&self) -> Duration {
        Duration::from_nanos(self.max_nanos)
    }

    /// The buckets that are not empty: an upper bound, `None` for the one without, and how many
    /// times lie in it.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> + '_ {
        self.counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
            .map(|(index, count)| (end_of(index).map(Duration::from_nanos), *count))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_time_lies_in_its_bucket(nanos: u64, shift in 0u32..64) {
            let nanos = nanos >> shift;
            let index = bucket(nanos);
            prop_assert!(end_of(index).is_none_or(|end| nanos < end));
            if index > 0 {
                let start = end_of(index - 1).unwrap();
                prop_assert!(nanos >= start);
                if let Some(end) = end_of(index) {
                    prop_assert!((end - start) * 8 <= end);
                }
            }
        }

        #[test]
        fn quantiles_are_close(mut times in proptest::collection::vec(200u64..1 << 30, 1..200)) {
            let recorder = Recorder::default();
            times.iter().for_each(|time| recorder.record(*time));
            times.sort_unstable();
            let histogram = recorder.snapshot();
            for (share, index) in [(0.0, 0), (0.5, (times.len() - 1) / 2), (1.0, times.len() - 1)] {
                let got = u64::try_from(histogram.quantile(share).unwrap().as_nanos()).unwrap();
                prop_assert!(got >= times[index] && got <= times[index] + times[index] / 8 + 1);
            }
            prop_assert_eq!(histogram.count(), times.len() as u64);
            prop_assert_eq!(histogram.max(), Duration::from_nanos(times[times.len() - 1]));
        }
    }
}
