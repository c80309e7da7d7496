//! Picks one token of a row of logits. Nothing here sorts the vocabulary: filters are thresholds,
//! and only what may pass `top_p` is sorted.

use blockplane_protocol::{SamplingParams, TokenId};

use super::weights::{CHUNK, Weights};

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
    // By chunks, in which every logit is compared: that is done in vector registers.
    let reaches = |some, &logit: &f32| some | (logit >= max);
    let mut chunks = logits.chunks(CHUNK);
    let chunk = chunks.position(|chunk| chunk.iter().fold(false, reaches))?;
    let mut rest = logits.iter().skip(chunk * CHUNK);
    Some(token_id(
        chunk * CHUNK + rest.position(|&logit| logit >= max)?,
    ))
}

/// The token that `random`, uniform in `[0, 1)`, falls on; `None` when none is possible.
pub(super) fn at_random(logits: &[f32], filters: Filters, random: f64) -> Option<TokenId> {
    let max = largest(logits)?;
    let mut floor = f32::NEG_INFINITY;
    if filters.min_p > 0.0 {
        floor = max + filters.min_p.ln() * filters.temperature;
    }
    if filters.top_k > 0 && filters.top_k < logits.len() {
        floor = floor.max(kth_largest(logits, filters.top_k));
    }
    let weights = Weights {
        max,
        per_temperature: 1.0 / filters.temperature,
        floor,
    };
    let total = weights.of_row(logits);
    if filters.top_p < 1.0 {
        let head = head(logits, weights, total * f64::from(filters.top_p));
        let total: f64 = head.iter().map(|&(_, weight)| weight).sum();
        return fall_on(head.into_iter(), random * total);
    }
    // The chunk first, then the token in it.
    let mut target = random * total;
    let mut last = 0;
    for (index, chunk) in logits.chunks(CHUNK).enumerate() {
        let weight = weights.of_chunk(chunk);
        if weight > 0.0 {
            last = index * CHUNK;
            if weight > target {
                break;
            }
            target -= weight;
        }
    }
    let chunk = logits[last..].iter().take(CHUNK);
    let tokens = chunk.enumerate();
    fall_on(
        tokens.map(|(index, &logit)| (token_id(last + index), weights.of(logit))),
        target,
    )
}

/// The likeliest tokens that together weigh `needed`, likeliest first.
fn head(logits: &[f32], weights: Weights, needed: f64) -> Vec<(TokenId, f64)> {
    // Few tokens usually do: looks at those within a distance of the largest logit first.
    let mut distance = 4.0 / weights.per_temperature;
    let mut threshold = weights.floor.max(weights.max - distance);
    while threshold > weights.floor {
        let within = Weights {
            floor: threshold,
            ..weights
        };
        if within.of_row(logits) >= needed {
            break;
        }
        distance *= 2.0;
        threshold = weights.floor.max(weights.max - distance);
    }
    let mut candidates: Vec<(TokenId, f32)> = logits
        .iter()
        .enumerate()
        .filter(|&(_, &logit)| logit >= threshold)
        .map(|(index, &logit)| (token_id(index), logit))
        .collect();
    candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut before = 0.0;
    candidates
        .into_iter()
        .map(|(id, logit)| (id, weights.of(logit)))
        .take_while(|&(_, weight)| {
            let keep = before < needed;
            before += weight;
            keep
        })
        .collect()
}

/// The first token at which the sum of the weights exceeds `target`; the last possible one if
/// rounding keeps the sum below.
fn fall_on(weights: impl Iterator<Item = (TokenId, f64)>, target: f64) -> Option<TokenId> {
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
pub(super) fn largest(logits: &[f32]) -> Option<f32> {
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
