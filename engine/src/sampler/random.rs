//! Random numbers that are a function of a seed and a counter.

use blockplane_protocol::SamplerState;

/// Number `state.draws` of the stream of `state.seed`: uniform in `[0, 1)`, 53 bits.
///
/// `SplitMix64` (Steele, Lea, Flood 2014) started at the hash of the seed, so that neighbouring
/// seeds have unrelated streams. Nothing is carried from one number to the next.
pub(super) fn uniform(state: SamplerState) -> f64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let start = mix(state.seed ^ STEP);
    let bits = mix(start.wrapping_add(STEP.wrapping_mul(state.draws.wrapping_add(1))));
    #[expect(clippy::cast_precision_loss, reason = "53 bits are left")]
    let mantissa = (bits >> 11) as f64;
    mantissa * (1.0 / (1u64 << 53) as f64)
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chi-square over 64 cells, along one stream and across neighbouring seeds. The seeds are
    /// fixed: the test gives the same result each time. 63 degrees of freedom: 103.4 is exceeded
    /// once in a thousand.
    #[test]
    fn numbers_are_uniform_along_draws_and_across_seeds() {
        const NUMBERS: u32 = 64_000;
        let along = |n| SamplerState { seed: 42, draws: n };
        let across = |n| SamplerState { seed: n, draws: 3 };
        for (name, state) in [("along", &along as &dyn Fn(u64) -> _), ("across", &across)] {
            let mut cells = [0u32; 64];
            for n in 0..u64::from(NUMBERS) {
                let number = uniform(state(n));
                assert!((0.0..1.0).contains(&number));
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "0 to 63"
                )]
                let cell = (number * 64.0) as usize;
                cells[cell] += 1;
            }
            let expected = f64::from(NUMBERS) / 64.0;
            let chi2: f64 = cells
                .iter()
                .map(|&n| (f64::from(n) - expected).powi(2) / expected)
                .sum();
            assert!(chi2 < 103.4, "{name}: chi-square {chi2}");
        }
    }
}
