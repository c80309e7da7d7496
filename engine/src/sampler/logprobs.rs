//! Log-probabilities of the model: of the logits as they came.

use blockplane_protocol::{TokenId, TokenLogprob, TokenOutput};

use super::{choose::largest, weights::Weights};

/// The chosen token with its log-probability and those of the `alternatives` likeliest tokens.
pub(super) fn output(logits: &[f32], id: TokenId, alternatives: usize) -> TokenOutput {
    let log_total = log_sum_exp(logits);
    let logprob = |logit: f32| {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the result is single precision"
        )]
        let logprob = (f64::from(logit) - log_total) as f32;
        logprob
    };
    TokenOutput {
        id,
        logprob: logits.get(id as usize).map(|&logit| logprob(logit)),
        top: likeliest(logits, alternatives)
            .into_iter()
            .map(|(id, logit)| TokenLogprob {
                id,
                logprob: logprob(logit),
            })
            .collect(),
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let Some(max) = largest(logits) else {
        return f64::NEG_INFINITY;
    };
    let weights = Weights {
        max,
        per_temperature: 1.0,
        floor: f32::NEG_INFINITY,
    };
    f64::from(max) + weights.of_row(logits).ln()
}

/// The `count` largest logits, the largest first and the first of equal ones before the others.
fn likeliest(logits: &[f32], count: usize) -> Vec<(TokenId, f32)> {
    let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return best;
    }
    for (id, &logit) in (0..).zip(logits) {
        let full = best.len() == count;
        if logit.is_nan() || full && best.last().is_some_and(|&(_, least)| logit <= least) {
            continue;
        }
        let place = best.partition_point(|&(_, other)| other >= logit);
        best.truncate(count - 1);
        best.insert(place, (id, logit));
    }
    best
}
