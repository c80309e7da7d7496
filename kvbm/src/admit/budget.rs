//! How much may be written to a drive: a rate, and a number of drive writes per day.

use std::time::Duration;

use thiserror::Error;

const DAY: Duration = Duration::from_secs(86_400);
const NANOS: u128 = 1_000_000_000;

/// Limits on what is written to a drive. Both may be given, and then both hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WriteBudgetConfig {
    /// Bytes per second, averaged over one second. Default none.
    pub bytes_per_s: Option<u64>,
    /// Whole writes of the drive per day, averaged over one hour: a drive's endurance rating, or
    /// the share of it that the cache may use. Default none.
    pub drive_writes_per_day: Option<f64>,
    /// Bytes of the drive that `drive_writes_per_day` speaks of.
    pub drive_bytes: u64,
}

/// A budget that cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum WriteBudgetError {
    /// No bytes could ever be written.
    #[error("a write budget of 0 bytes per second allows nothing: leave it out, or leave G3 out")]
    ZeroRate,
    /// Not a rate.
    #[error("{0} drive writes per day: accepted are numbers above 0 that allow 1 byte per second")]
    DriveWrites(f64),
}

/// A token bucket for each limit. A write is allowed when every bucket has enough.
#[derive(Clone, Debug)]
pub struct WriteBudget {
    buckets: [Option<Bucket>; 2],
    refused_bytes: u64,
}

/// Fills with `rate` bytes a second up to `burst`. A write larger than `burst` is allowed when the
/// bucket is full, and leaves it in debt.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: u64,
    burst: i128,
    /// In units of 1e-9 bytes, so that no fraction is lost.
    level: i128,
    filled: Duration,
}

impl WriteBudgetConfig {
    /// The rate that follows from both limits, in bytes per second.
    ///
    /// # Errors
    /// [`WriteBudgetError`] when a limit is no rate.
    pub fn rate(&self) -> Result<Option<u64>, WriteBudgetError> {
        if self.bytes_per_s == Some(0) {
            return Err(WriteBudgetError::ZeroRate);
        }
        Ok([self.bytes_per_s, self.daily_rate()?]
            .into_iter()
            .flatten()
            .min())
    }

    fn daily_rate(&self) -> Result<Option<u64>, WriteBudgetError> {
        let Some(writes) = self.drive_writes_per_day else {
            return Ok(None);
        };
        #[expect(clippy::cast_precision_loss, reason = "drives are below 2^53 bytes")]
        let rate = writes * self.drive_bytes as f64 / DAY.as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked to be at least 1; larger than u64 saturates"
        )]
        if rate >= 1.0 && rate.is_finite() {
            Ok(Some(rate as u64))
        } else {
            Err(WriteBudgetError::DriveWrites(writes))
        }
    }
}

impl WriteBudget {
    /// Full buckets at time 0.
    ///
    /// # Errors
    /// [`WriteBudgetError`] when a limit is no rate.
    pub fn new(config: &WriteBudgetConfig) -> Result<Self, WriteBudgetError> {
        config.rate()?;
        let second = config.bytes_per_s.map(|rate| Bucket::new(rate, 1));
        let hour = config.daily_rate()?.map(|rate| Bucket::new(rate, 3_600));
        Ok(Self {
            buckets: [second, hour],
            refused_bytes: 0,
        })
    }

    /// Takes `bytes` if every limit allows them; otherwise none are taken.
    pub fn take(&mut self, now: Duration, bytes: u64) -> bool {
        let mut buckets = self.buckets.iter_mut().flatten();
        if buckets.all(|bucket| bucket.has(now, bytes)) {
            for bucket in self.buckets.iter_mut().flatten() {
                bucket.level -= units(bytes);
            }
            return true;
        }
        self.refused_bytes = self.refused_bytes.saturating_add(bytes);
        false
    }

    /// When `bytes` can be taken, if nobody takes any before.
    #[must_use]
    pub fn next_at(&self, now: Duration, bytes: u64) -> Duration {
        let buckets = self.buckets.iter().flatten();
        buckets
            .map(|bucket| bucket.has_at(now, bytes))
            .max()
            .unwrap_or(now)
    }

    /// Bytes that [`Self::take`] refused.
    #[must_use]
    pub const fn refused_bytes(&self) -> u64 {
        self.refused_bytes
    }
}

impl Bucket {
    fn new(rate: u64, seconds: u64) -> Self {
        let burst = units(rate.saturating_mul(seconds));
        Self {
            rate,
            burst,
            level: burst,
            filled: Duration::ZERO,
        }
    }

    fn has(&mut self, now: Duration, bytes: u64) -> bool {
        if let Some(passed) = now.checked_sub(self.filled) {
            let filled = passed.as_nanos().saturating_mul(u128::from(self.rate));
            let filled = i128::try_from(filled).unwrap_or(i128::MAX);
            self.level = self.level.saturating_add(filled).min(self.burst);
            self.filled = now;
        }
        self.level >= units(bytes).min(self.burst)
    }

    fn has_at(&self, now: Duration, bytes: u64) -> Duration {
        let missing = units(bytes).min(self.burst) - self.level;
        let nanos = missing
            .max(0)
            .unsigned_abs()
            .div_ceil(u128::from(self.rate));
        let wait = Duration::new(
            u64::try_from(nanos / NANOS).unwrap_or(u64::MAX),
            u32::try_from(nanos % NANOS).unwrap_or(0),
        );
        self.filled.saturating_add(wait).max(now)
    }
}

fn units(bytes: u64) -> i128 {
    i128::from(bytes) * 1_000_000_000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn budget(bytes_per_s: Option<u64>, drive_writes_per_day: Option<f64>) -> WriteBudget {
        WriteBudget::new(&WriteBudgetConfig {
            bytes_per_s,
            drive_writes_per_day,
            drive_bytes: 86_400_000,
        })
        .unwrap()
    }

    proptest! {
        /// No interval sees more than its time and one burst allow, and what is refused comes
        /// exactly when it was announced.
        #[test]
        fn rates_hold(steps in prop::collection::vec((0u64..3_000, 1u64..1_500), 1..300)) {
            let mut budget = budget(Some(1_000), None);
            let mut now = Duration::ZERO;
            let mut taken: Vec<(Duration, u64)> = Vec::new();
            for (millis, bytes) in steps {
                now += Duration::from_millis(millis);
                if !budget.take(now, bytes) {
                    let at = budget.next_at(now, bytes);
                    prop_assert!(at > now);
                    prop_assert!(!budget.take(at - Duration::from_nanos(1), bytes));
                    prop_assert!(budget.take(at, bytes));
                    now = at;
                }
                taken.push((now, bytes));
                let mut sum = 0;
                for &(at, bytes) in taken.iter().rev() {
                    sum += bytes;
                    // One burst, and the largest write beyond it.
                    let allowed = (now - at).as_secs_f64() * 1_000.0 + 1_000.0 + 500.0;
                    prop_assert!(sum as f64 <= allowed + 1e-3, "{sum} in {:?}", now - at);
                }
            }
        }
    }

    #[test]
    fn both_limits_hold() {
        // One drive write a day is 1,000 bytes a second here, up to an hour of it at once.
        let mut budget = budget(Some(2_000_000), Some(1.0));
        assert!(budget.take(Duration::ZERO, 2_000_000));
        assert!(!budget.take(Duration::ZERO, 1));
        assert!(budget.take(Duration::from_secs(1), 1_600_000));
        assert!(!budget.take(Duration::from_secs(2), 2_001));
        assert_eq!(budget.refused_bytes(), 2_002);
        assert_eq!(
            budget.next_at(Duration::from_secs(2), 5_000),
            Duration::from_secs(5)
        );
    }

    #[test]
    fn without_limits_all_is_allowed_and_bad_limits_are_named() {
        let mut free = budget(None, None);
        assert!(free.take(Duration::ZERO, u64::MAX));
        assert_eq!(free.next_at(Duration::ZERO, 1), Duration::ZERO);
        for writes in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let config = WriteBudgetConfig {
                drive_writes_per_day: Some(writes),
                drive_bytes: 1 << 40,
                ..Default::default()
            };
            assert!(WriteBudget::new(&config).is_err(), "{writes}");
        }
        let zero = WriteBudgetConfig {
            bytes_per_s: Some(0),
            ..Default::default()
        };
        assert_eq!(zero.rate(), Err(WriteBudgetError::ZeroRate));
    }
}
