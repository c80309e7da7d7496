//! The cost of running a request on a rank, in blocks. Same terms and names as Dynamo's default
//! selector.
//!
//! ```text
//! credit               = overlap_score_credit
//!                        / (1 + decay * max(0, active_prefill - least active_prefill) / block / request_blocks)
//! overlap_credit       = credit*device + host_weight*host + disk_weight*disk + shared_multiplier*remote
//! adjusted_prefill     = max(0, (active_prefill + prompt tokens) / block - overlap_credit)
//! cost, full           = prefill_load_scale*adjusted_prefill + potential_decode_blocks
//!                        + decode_active_request_weight*active_requests
//! cost, decode only    = max(0, potential_decode_blocks - overlap_credit)
//!                        + decode_active_request_weight*active_requests
//! cost, prefill only   = prefill_load_scale*adjusted_prefill
//!                        + decode_active_request_weight*active_requests
//! ```

use crate::{config::RouterConfig, index::Overlap};

/// Which part of the work the rank will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CostKind {
    /// Prefill and decode.
    Full,
    /// Decode; the prompt is computed elsewhere if it is long.
    DecodeOnly,
    /// Prefill; blocks are released when the prompt is computed.
    PrefillOnly,
}

/// What the cost of one rank depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CostInput {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Leading blocks of it that the rank has.
    pub overlap: Overlap,
    /// Prompt tokens that the rank has yet to compute for others.
    pub active_prefill_tokens: u64,
    /// The same on the eligible rank that has the fewest.
    pub active_prefill_tokens_min: u64,
    /// Blocks active on the rank once this request is added.
    pub potential_decode_blocks: u64,
    /// Requests on the rank.
    pub active_requests: u32,
}

/// A cost with its terms, all in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Blocks of work that the overlap saves.
    pub overlap_credit: f64,
    /// Prefill ahead of the first token, after the credit.
    pub adjusted_prefill: f64,
    /// Blocks active on the rank once this request is added.
    pub decode_blocks: f64,
    /// Weighted active requests.
    pub active_requests: f64,
    /// The sum; lower is better.
    pub total: f64,
}

/// The cost of one rank.
#[must_use]
pub fn cost(config: &RouterConfig, kind: CostKind, input: &CostInput) -> Cost {
    let block = f64::from(config.block_tokens.max(1));
    let request_blocks = input
        .prompt_tokens
        .div_ceil(config.block_tokens.max(1))
        .max(1);
    let excess = input
        .active_prefill_tokens
        .saturating_sub(input.active_prefill_tokens_min);
    let credit = config.overlap_score_credit
        / (1.0
            + config.overlap_score_credit_decay * float(excess)
                / block
                / f64::from(request_blocks));
    let overlap_credit = credit * f64::from(input.overlap.device)
        + config.host_cache_hit_weight * f64::from(input.overlap.host)
        + config.disk_cache_hit_weight * f64::from(input.overlap.disk)
        + config.shared_cache_multiplier * f64::from(input.overlap.remote);
    let raw_prefill = if config.track_prefill_tokens {
        float(input.active_prefill_tokens + u64::from(input.prompt_tokens)) / block
    } else {
        0.0
    };
    let adjusted_prefill = (raw_prefill - overlap_credit).max(0.0);
    let decode_blocks = float(input.potential_decode_blocks);
    let active_requests = config.decode_active_request_weight * f64::from(input.active_requests);
    let total = active_requests
        + match kind {
            CostKind::Full => config.prefill_load_scale * adjusted_prefill + decode_blocks,
            CostKind::DecodeOnly => (decode_blocks - overlap_credit).max(0.0),
            CostKind::PrefillOnly => config.prefill_load_scale * adjusted_prefill,
        };
    Cost {
        overlap_credit,
        adjusted_prefill,
        decode_blocks,
        active_requests,
        total,
    }
}

/// Draws an index with probability proportional to `exp(-(cost - min) / ((max - min) * T))`.
/// Equal costs are equally likely. `draw` is 64 uniform random bits.
///
/// # Panics
/// When `costs` is empty.
#[must_use]
pub fn softmax_index(costs: &[f64], temperature: f64, draw: u64) -> usize {
    assert!(!costs.is_empty(), "there is something to draw from");
    let min = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let max = costs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scale = (max - min) * temperature;
    let weight = |cost: f64| {
        if scale > 0.0 {
            (-(cost - min) / scale).exp()
        } else {
            1.0
        }
    };
    let sum: f64 = costs.iter().map(|&cost| weight(cost)).sum();
    let mut left = unit(draw) * sum;
    for (index, &cost) in costs.iter().enumerate() {
        left -= weight(cost);
        if left < 0.0 {
            return index;
        }
    }
    costs.len() - 1
}

/// A uniform index below `n` from 64 random bits.
pub(crate) fn uniform_index(n: usize, draw: u64) -> usize {
    let scaled = (u128::from(draw) * n as u128) >> 64;
    usize::try_from(scaled).expect("smaller than n")
}

/// Uniform in [0, 1).
fn unit(draw: u64) -> f64 {
    float(draw >> 11) / float(1 << 53)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts far below 2^53, where every integer is exact"
)]
const fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-9
    }

    fn input() -> CostInput {
        CostInput {
            prompt_tokens: 160,
            overlap: Overlap {
                device: 4,
                host: 2,
                disk: 1,
                remote: 1,
            },
            active_prefill_tokens: 320,
            active_prefill_tokens_min: 160,
            potential_decode_blocks: 25,
            active_requests: 3,
        }
    }

    #[test]
    fn every_term_enters_as_documented() {
        let config = RouterConfig {
            overlap_score_credit_decay: 1.0,
            prefill_load_scale: 2.0,
            decode_active_request_weight: 0.5,
            shared_cache_multiplier: 0.5,
            ..RouterConfig::default()
        };
        // credit 1/(1 + 160/16/10) = 0.5: 0.5*4 + 0.75*2 + 0.25*1 + 0.5*1 = 4.25
        // adjusted prefill (320+160)/16 - 4.25 = 25.75
        let full = cost(&config, CostKind::Full, &input());
        assert!(close(full.overlap_credit, 4.25), "{full:?}");
        assert!(close(full.adjusted_prefill, 25.75), "{full:?}");
        assert!(close(full.total, 2.0 * 25.75 + 25.0 + 1.5), "{full:?}");
        let decode = cost(&config, CostKind::DecodeOnly, &input());
        assert!(close(decode.total, 25.0 - 4.25 + 1.5), "{decode:?}");
        let prefill = cost(&config, CostKind::PrefillOnly, &input());
        assert!(close(prefill.total, 2.0 * 25.75 + 1.5), "{prefill:?}");
    }

    #[test]
    fn defaults_credit_a_device_block_in_full_and_never_go_below_zero() {
        let config = RouterConfig::default();
        let mut input = input();
        input.overlap = Overlap {
            device: 10,
            ..Overlap::default()
        };
        let costs = cost(&config, CostKind::Full, &input);
        assert!(close(costs.total, 20.0 + 25.0), "{costs:?}");
        input.overlap.device = 1000;
        let costs = cost(&config, CostKind::Full, &input);
        assert!(close(costs.total, 25.0), "{costs:?}");
    }

    #[test]
    fn without_prefill_tracking_only_decode_load_counts() {
        let config = RouterConfig {
            track_prefill_tokens: false,
            ..RouterConfig::default()
        };
        assert!(close(cost(&config, CostKind::Full, &input()).total, 25.0));
    }

    #[test]
    fn softmax_follows_its_distribution() {
        let costs = [1.0, 2.0, 3.0];
        let mut counts = [0u32; 3];
        let draws = 30_000u64;
        for i in 0..draws {
            // Evenly spaced draws integrate the distribution.
            let draw = i.wrapping_mul(u64::MAX / draws);
            counts[softmax_index(&costs, 0.5, draw)] += 1;
        }
        // exp(0), exp(-1), exp(-2), normalised.
        for (count, expected) in counts.iter().zip([0.66524, 0.24473, 0.09003]) {
            assert!(
                (f64::from(*count) / 30_000.0 - expected).abs() < 1e-3,
                "{counts:?}"
            );
        }
        assert_eq!(softmax_index(&[5.0, 5.0], 1.0, 0), 0);
        assert_eq!(softmax_index(&[5.0, 5.0], 1.0, u64::MAX), 1);
    }

    #[test]
    fn uniform_indices_cover_the_range() {
        assert_eq!(uniform_index(3, 0), 0);
        assert_eq!(uniform_index(3, u64::MAX / 2), 1);
        assert_eq!(uniform_index(3, u64::MAX), 2);
    }
}
