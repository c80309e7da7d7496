//! What an operation is going to take, from what the connection has taken so far.

use std::time::Duration;

use parking_lot::Mutex;

use crate::config::Lane;
use crate::op::Op;

/// Operations of 2^k to 2^(k+1) bytes are one class.
const CLASSES: usize = 48;
/// A new measurement counts this much once there are many.
const WEIGHT: f64 = 0.125;

/// How long an operation is expected to take, from post to end.
///
/// Measurements include whatever the measured operations had to wait for; what is in flight at the
/// moment is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CostEstimate {
    /// The expected time.
    pub expected: Duration,
    /// It is seldom shorter.
    pub low: Duration,
    /// It is seldom longer.
    pub high: Duration,
    /// Where the numbers come from.
    pub basis: CostBasis,
}

/// Where an estimate comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CostBasis {
    /// Operations of this direction and size (within a factor of two) on this connection.
    Measured {
        /// How many.
        operations: u64,
    },
    /// Operations of this direction and other sizes on this connection.
    Extrapolated {
        /// How many of the nearest sizes.
        operations: u64,
    },
    /// Nothing was measured yet: what the lane usually does.
    LaneDefault,
}

/// Measurements of one connection.
#[derive(Debug)]
pub(crate) struct Meter {
    writes: Mutex<[Class; CLASSES]>,
    reads: Mutex<[Class; CLASSES]>,
}

/// Moving averages over one class.
#[derive(Clone, Copy, Debug, Default)]
struct Class {
    operations: u64,
    bytes: f64,
    nanos: f64,
    /// Mean distance from the average.
    deviation: f64,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            writes: Mutex::new([Class::default(); CLASSES]),
            reads: Mutex::new([Class::default(); CLASSES]),
        }
    }
}

fn class_of(bytes: u64) -> usize {
    (bytes.max(1).ilog2() as usize).min(CLASSES - 1)
}

impl Class {
    fn record(&mut self, bytes: f64, nanos: f64) {
        self.operations += 1;
        let weight = (1.0 / self.operations as f64).max(WEIGHT);
        if self.operations > 1 {
            let off = (nanos - self.nanos).abs();
            self.deviation += (off - self.deviation) * weight;
        }
        self.bytes += (bytes - self.bytes) * weight;
        self.nanos += (nanos - self.nanos) * weight;
    }

    /// How far off the average is, as a share of it; few measurements say little.
    fn spread(&self) -> f64 {
        let share = if self.nanos > 0.0 {
            self.deviation / self.nanos
        } else {
            0.0
        };
        2.0 * share + 0.05 + 1.0 / self.operations as f64
    }
}

impl Meter {
    fn classes(&self, op: Op) -> &Mutex<[Class; CLASSES]> {
        match op {
            Op::Write => &self.writes,
            Op::Read => &self.reads,
        }
    }

    /// An operation has ended well.
    pub(crate) fn record(&self, op: Op, bytes: u64, elapsed: Duration) {
        let nanos = elapsed.as_secs_f64() * 1e9;
        self.classes(op).lock()[class_of(bytes)].record(bytes as f64, nanos);
    }

    pub(crate) fn estimate(&self, op: Op, bytes: u64, lane: Lane) -> CostEstimate {
        let (latency, bytes_per_nano) = usual(lane);
        let wanted = bytes as f64;
        let classes = *self.classes(op).lock();
        let own = class_of(bytes);
        let measured = |class: &&Class| class.operations > 0;
        // Behind the latency time grows with bytes.
        let scaled = |class: &Class| {
            let fixed = latency.min(class.nanos);
            fixed + (class.nanos - fixed) * wanted / class.bytes.max(1.0)
        };
        if classes[own].operations > 0 {
            let class = &classes[own];
            let operations = class.operations;
            let basis = CostBasis::Measured { operations };
            return estimate(scaled(class), class.spread(), basis);
        }
        let below = classes[..own].iter().rev().find(measured);
        let above = classes[own..].iter().find(measured);
        let (nanos, spread, operations) = match (below, above) {
            (Some(below), Some(above)) => {
                let share = (wanted - below.bytes) / (above.bytes - below.bytes).max(1.0);
                let nanos = below.nanos + (above.nanos - below.nanos) * share.clamp(0.0, 1.0);
                let spread = below.spread().max(above.spread());
                (nanos, spread, below.operations + above.operations)
            }
            (Some(near), None) => (scaled(near), near.spread(), near.operations),
            (None, Some(near)) => {
                // How much of a larger operation is latency is not known.
                let spread = near.spread() + near.nanos / scaled(near).max(1.0) - 1.0;
                (scaled(near), spread, near.operations)
            }
            (None, None) => {
                let nanos = latency + wanted / bytes_per_nano;
                return CostEstimate {
                    expected: duration(nanos),
                    low: duration(nanos / 4.0),
                    high: duration(nanos * 4.0),
                    basis: CostBasis::LaneDefault,
                };
            }
        };
        let basis = CostBasis::Extrapolated { operations };
        estimate(nanos, spread * 2.0 + 0.25, basis)
    }
}

/// Latency in nanoseconds and bytes per nanosecond of a lane on an ordinary machine.
const fn usual(lane: Lane) -> (f64, f64) {
    match lane {
        Lane::Loopback | Lane::Shm => (3_000.0, 10.0),
        Lane::Tcp => (60_000.0, 2.5),
        Lane::Verbs => (20_000.0, 10.0),
        Lane::File => (100_000.0, 1.5),
        Lane::Cuda => (100_000_000_000.0, 0.000_015),
        Lane::Object => (20_000_000.0, 0.2),
    }
}

fn estimate(nanos: f64, spread: f64, basis: CostBasis) -> CostEstimate {
    CostEstimate {
        expected: duration(nanos),
        low: duration(nanos / (1.0 + spread)),
        high: duration(nanos * (1.0 + spread)),
        basis,
    }
}

fn duration(nanos: f64) -> Duration {
    Duration::try_from_secs_f64(nanos / 1e9).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_follows_what_was_measured() {
        let meter = Meter::default();
        let first = meter.estimate(Op::Write, 1 << 20, Lane::Tcp);
        assert_eq!(first.basis, CostBasis::LaneDefault);
        assert!(first.low < first.expected && first.expected < first.high);
        // A line of 100 us and 1 byte per ns, not what the lane usually does.
        let time = |bytes: u64| Duration::from_nanos(100_000 + bytes);
        for _ in 0..10 {
            for bytes in [1 << 12, 1 << 20, 1 << 24] {
                meter.record(Op::Write, bytes, time(bytes));
            }
        }
        for (bytes, measured) in [
            (1 << 20, true),
            (1 << 22, false),
            (1 << 26, false),
            (100, false),
        ] {
            let got = meter.estimate(Op::Write, bytes, Lane::Tcp);
            let operations = if bytes == 1 << 22 { 20 } else { 10 };
            let basis = if measured {
                CostBasis::Measured { operations }
            } else {
                CostBasis::Extrapolated { operations }
            };
            assert_eq!(got.basis, basis);
            let true_time = time(bytes);
            assert!(
                got.low <= true_time && true_time <= got.high,
                "{bytes}: {got:?}"
            );
        }
        assert_eq!(
            meter.estimate(Op::Read, 1 << 20, Lane::Tcp).basis,
            CostBasis::LaneDefault
        );
    }

    #[test]
    fn an_estimate_forgets_and_widens() {
        let meter = Meter::default();
        for _ in 0..20 {
            meter.record(Op::Read, 4096, Duration::from_micros(10));
        }
        let calm = meter.estimate(Op::Read, 4096, Lane::Shm);
        for round in 0..60 {
            let micros = if round % 2 == 0 { 50 } else { 150 };
            meter.record(Op::Read, 4096, Duration::from_micros(micros));
        }
        let rough = meter.estimate(Op::Read, 4096, Lane::Shm);
        assert!(calm.expected < Duration::from_micros(11));
        assert!(rough.expected > Duration::from_micros(80));
        let width = |e: CostEstimate| e.high.as_secs_f64() / e.low.as_secs_f64();
        assert!(width(rough) > 2.0 * width(calm));
        assert!(rough.low < Duration::from_micros(55) && rough.high > Duration::from_micros(145));
    }
}
