//! Medians and percentiles.

use std::time::Duration;

/// A handful of observations, kept as they are.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds an observation.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Number of observations.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The smallest observation that at least `percent` percent are not above (nearest rank);
    /// not a number when there is none.
    #[must_use]
    pub fn percentile(&self, percent: u32) -> f64 {
        self.per_mille(percent * 10)
    }

    /// The same in thousandths: 999 is the 99.9th percentile.
    #[must_use]
    pub fn per_mille(&self, per_mille: u32) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * per_mille as usize).div_ceil(1000).max(1);
        sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    /// The middle observation, or the mean of the two in the middle.
    #[must_use]
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            n if n.is_multiple_of(2) => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        }
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

/// Any number of durations in bounded memory, from 1 µs to an hour, exact to 0.1 %.
#[derive(Clone, Debug)]
pub struct Histogram(hdrhistogram::Histogram<u64>);

impl Histogram {
    /// An empty histogram.
    #[must_use]
    pub fn new() -> Self {
        let inner = hdrhistogram::Histogram::new_with_bounds(1, 3_600_000_000, 3)
            .expect("bounds and precision are valid");
        Self(inner)
    }

    /// Adds a duration; one outside the range counts at its end.
    pub fn record(&mut self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.0.saturating_record(micros);
    }

    /// Adds all durations of another histogram.
    pub fn add(&mut self, other: &Self) {
        self.0
            .add(&other.0)
            .expect("all histograms have the same bounds");
    }

    /// Number of durations.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A percentile in milliseconds.
    #[must_use]
    pub fn percentile_ms(&self, percent: f64) -> f64 {
        millis(self.0.value_at_percentile(percent))
    }

    /// The mean in milliseconds.
    #[must_use]
    pub fn mean_ms(&self) -> f64 {
        self.0.mean() / 1e3
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "at most an hour in microseconds, far below 2^53"
)]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_observations() {
        let mut samples = Samples::default();
        assert!(samples.median().is_nan() && samples.percentile(99).is_nan());
        for value in (1..=200).rev() {
            samples.push(f64::from(value));
        }
        let near = |left: f64, right: f64| (left - right).abs() < 1e-9;
        assert!(near(samples.median(), 100.5));
        assert!(near(samples.percentile(50), 100.0));
        assert!(near(samples.percentile(99), 198.0));
        assert!(near(samples.per_mille(995), 199.0));
        assert!(near(samples.percentile(100), 200.0));
        assert!(near(samples.percentile(0), 1.0));
    }

    #[test]
    fn the_histogram_keeps_a_thousandth() {
        let mut histogram = Histogram::new();
        for ms in 1..=1000u64 {
            histogram.record(Duration::from_millis(ms));
        }
        let mut other = Histogram::new();
        other.record(Duration::from_secs(100_000));
        histogram.add(&other);
        assert_eq!(histogram.len(), 1001);
        assert!((histogram.percentile_ms(50.0) - 501.0).abs() < 1.5);
        assert!((histogram.percentile_ms(99.0) - 991.0).abs() < 2.0);
        assert!((histogram.percentile_ms(100.0) - 3_600_000.0).abs() < 4_000.0);
    }
}
