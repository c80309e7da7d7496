//! Probabilities that are not normalised: the exponentials of a row of logits.
//!
//! A row has 150,000 logits and each token that is drawn needs all of their exponentials, so they
//! are computed in the compiler's vector registers rather than one by one by the C library.

/// Logits that are taken together; their sum is added up in one order, whoever asks.
pub(super) const CHUNK: usize = 64;

/// Weighs a logit: 1 for `max`, 0 below `floor`.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    pub(super) max: f32,
    pub(super) per_temperature: f32,
    pub(super) floor: f32,
}

impl Weights {
    pub(super) fn of(self, logit: f32) -> f64 {
        f64::from(self.single(logit))
    }

    /// Sum of the weights of at most [`CHUNK`] logits.
    pub(super) fn of_chunk(self, logits: &[f32]) -> f64 {
        match logits.as_array::<CHUNK>() {
            Some(chunk) => self.of_full_chunk(chunk),
            None => logits.iter().map(|&logit| self.of(logit)).sum(),
        }
    }

    /// Sum of the weights of a row.
    pub(super) fn of_row(self, logits: &[f32]) -> f64 {
        logits.chunks(CHUNK).map(|chunk| self.of_chunk(chunk)).sum()
    }

    fn of_full_chunk(self, logits: &[f32; CHUNK]) -> f64 {
        // Usual with `top_k`, and much faster than to compute 64 times 0.
        let passes = |some, &logit: &f32| some | (logit >= self.floor);
        if !logits.iter().fold(false, passes) {
            return 0.0;
        }
        let weights = logits.map(|logit| self.single(logit));
        let mut lanes = [0f64; 8];
        for part in weights.as_chunks::<8>().0 {
            for (lane, &weight) in lanes.iter_mut().zip(part) {
                *lane += f64::from(weight);
            }
        }
        lanes.iter().sum()
    }

    #[inline]
    fn single(self, logit: f32) -> f32 {
        let weight = exp((logit.min(f32::MAX) - self.max) * self.per_temperature);
        // False for what is not a number, too.
        if logit >= self.floor { weight } else { 0.0 }
    }
}

/// `e^x` for `x` of at most 0, to a relative error of 2e-7; 0 where that is below 1e-37.
///
/// The reduction and the polynomial are those of the Cephes library: `x = n ln 2 + r`, a polynomial
/// of degree 6 for `e^r`, and `n` added to the exponent.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer, and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const LEAST: f32 = -85.0;
    let kept = x.max(LEAST);
    let shifted = kept * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = kept - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        5e-1,
    ] {
        p = p * r + coefficient;
    }
    let e_r = p * r * r + r + 1.0;
    let two_n = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x >= LEAST { e_r * two_n } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_exact_to_single_precision() {
        for step in 0..850_000u32 {
            #[expect(clippy::cast_precision_loss, reason = "below 2^24")]
            let x = step as f32 * -1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) / exact - 1.0).abs();
            assert!(error < 2e-7, "e^{x}: relative error {error}");
        }
        assert!((exp(0.0) - 1.0).abs() < f32::EPSILON);
        assert!(exp(-86.0) <= 0.0 && exp(f32::NEG_INFINITY) <= 0.0);
    }

    #[test]
    fn a_row_weighs_what_its_tokens_weigh() {
        let weights = Weights {
            max: 4.0,
            per_temperature: 0.7,
            floor: -1.0,
        };
        let row: Vec<f32> = (0..1_000u16)
            .map(|n| f32::from(n % 83) / 10.0 - 4.2)
            .collect();
        for len in [0, 1, 63, 64, 65, 1_000] {
            let one_by_one: f64 = row[..len].iter().map(|&logit| weights.of(logit)).sum();
            assert!((weights.of_row(&row[..len]) - one_by_one).abs() < 1e-9);
        }
        assert!(weights.of(f32::NAN) <= 0.0 && weights.of(-1.1) <= 0.0);
    }
}
