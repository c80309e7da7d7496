//! Picks one token of a row of logits. Nothing here sorts the vocabulary: filters are thresholds,
//! and only what may pass `top_p` is sorted.

use blockplane_protocol::{SamplingParams, TokenId};

/// What may be chosen, and how evenly.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filters {
    pub(super) temperature: f32,
    pub(super) min_p: f32,
    /// 0 keeps all.
    pub(super) top_k: usize,
    pub(super) top_p: f32,
}

impl Filters {
    pub(super) fn of(params: &SamplingParams) -> Self {
        Self {
            temperature: params.temperature,
            min_p: params.min_p,
            top_k: params.top_k as usize,
            top_p: params.top_p,
        }
    }
}

/// The token with the largest logit, the first of several; `None` when none is possible.
pub(super) fn likeliest(logits: &[f32]) -> Option<TokenId> {
    let max = largest(logits)?;
    let index = logits.iter().position(|&logit| logit >= max)?;
    Some(token_id(index))
}

/// The token that `random`, uniform in `[0, 1)`, falls on; `None` when none is possible.
pub(super) fn at_random(logits: &[f32], filters: Filters, random: f64) -> Option<TokenId> {
    let scale = Scale {
        max: largest(logits)?,
        per_temperature: 1.0 / filters.temperature,
    };
    let mut floor = f32::NEG_INFINITY;
    if filters.min_p > 0.0 {
        floor = scale.max + filters.min_p.ln() * filters.temperature;
    }
    if filters.top_k > 0 && filters.top_k < logits.len() {
        floor = floor.max(kth_largest(logits, filters.top_k));
    }
    let total = scale.mass(logits, floor);
    if filters.top_p < 1.0 {
        let needed = total * f64::from(filters.top_p);
        let head = head(logits, scale, floor, needed);
        let total = head.iter().map(|&(_, weight)| weight).sum();
        return fall_on(head.into_iter(), total, random);
    }
    let weights = logits
        .iter()
        .enumerate()
        .filter(|&(_, &logit)| logit >= floor)
        .map(|(index, &logit)| (token_id(index), scale.weight(logit)));
    fall_on(weights, total, random)
}

/// Turns logits into probabilities that are not normalised: that of the largest is 1.
#[derive(Clone, Copy)]
struct Scale {
    max: f32,
    per_temperature: f32,
}

impl Scale {
    fn weight(self, logit: f32) -> f64 {
        f64::from(((logit.min(f32::MAX) - self.max) * self.per_temperature).exp())
    }

    fn mass(self, logits: &[f32], floor: f32) -> f64 {
        logits
            .iter()
            .filter(|&&logit| logit >= floor)
            .map(|&logit| self.weight(logit))
            .sum()
    }
}

/// The likeliest tokens at `floor` or above that together weigh `needed`, likeliest first.
fn head(logits: &[f32], scale: Scale, floor: f32, needed: f64) -> Vec<(TokenId, f64)> {
    // Few tokens usually do: looks at those within a distance of the largest logit first.
    let mut distance = 4.0 / scale.per_temperature;
    loop {
        let threshold = floor.max(scale.max - distance);
        let mut candidates: Vec<(TokenId, f32)> = logits
            .iter()
            .enumerate()
            .filter(|&(_, &logit)| logit >= threshold)
            .map(|(index, &logit)| (token_id(index), logit))
            .collect();
        let mass: f64 = candidates.iter().map(|c| scale.weight(c.1)).sum();
        if mass < needed && threshold > floor {
            distance *= 2.0;
            continue;
        }
        candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut before = 0.0;
        return candidates
            .into_iter()
            .map(|(id, logit)| (id, scale.weight(logit)))
            .take_while(|&(_, weight)| {
                let keep = before < needed;
                before += weight;
                keep
            })
            .collect();
    }
}

/// The first token at which the weights so far exceed the share `random` of `total`.
fn fall_on(
    weights: impl Iterator<Item = (TokenId, f64)>,
    total: f64,
    random: f64,
) -> Option<TokenId> {
    let target = random * total;
    let mut sum = 0.0;
    let mut last = None;
    for (id, weight) in weights {
        if weight > 0.0 {
            sum += weight;
            last = Some(id);
            if sum > target {
                break;
            }
        }
    }
    last
}

/// The largest logit that is a number and not minus infinity.
fn largest(logits: &[f32]) -> Option<f32> {
    // Independent lanes, so that the compiler can use vector instructions.
    const LANES: usize = 16;
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            if logit > *lane {
                *lane = logit;
            }
        }
    }
    let max = lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    (max > f32::NEG_INFINITY).then_some(max.min(f32::MAX))
}

/// The `k`-th largest logit, or minus infinity if fewer are possible. `k` is at least 1.
fn kth_largest(logits: &[f32], k: usize) -> f32 {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let room = 4 * k.max(64);
    let mut best: Vec<f32> = Vec::with_capacity(room.min(logits.len()));
    let mut threshold = f32::NEG_INFINITY;
    for &logit in logits {
        if logit > threshold {
            best.push(logit);
            if best.len() == room {
                threshold = *best.select_nth_unstable_by(k - 1, descending).1;
                best.truncate(k);
            }
        }
    }
    if best.len() < k {
        return f32::NEG_INFINITY;
    }
    *best.select_nth_unstable_by(k - 1, descending).1
}

fn token_id(index: usize) -> TokenId {
    TokenId::try_from(index).expect("a vocabulary has fewer than 2^32 tokens")
}
