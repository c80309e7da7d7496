//! Choosing one of several candidates.
//!
//! Ties are broken in favour of the rank that was chosen longest ago, then the lower id. An idle
//! cluster is thus filled evenly, and the same history always gives the same choice.

use std::cmp::Ordering;

use blockplane_protocol::WorkerRank;

use crate::{
    config::{RouterConfig, RouterMode},
    index::{Confidence, Overlap},
    load::RankLoad,
    score::{Cost, softmax_index, uniform_index},
};

/// Costs closer than this are equal.
const COST_EPSILON: f64 = 1e-9;

/// A rank that may be chosen, with everything that its cost was computed from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The rank.
    pub rank: WorkerRank,
    /// Leading prompt blocks that its cost gives credit for: those it has, those it is predicted to
    /// have, and for prefill those that it can read from the decode rank.
    pub overlap: Overlap,
    /// Leading prompt blocks that can be counted on: by its events or, where they are missing or
    /// incomplete, by prediction too.
    pub cached_blocks: u32,
    /// Further leading blocks that it is predicted to have, by what was routed to it.
    pub predicted_blocks: u32,
    /// How far its part of the index can be trusted.
    pub confidence: Confidence,
    /// Its load before this request.
    pub load: RankLoad,
    /// Blocks active on it once this request is added, shared ones counted once.
    pub potential_decode_blocks: u64,
    /// Its cost and the terms of it.
    pub cost: Cost,
    pub(crate) selected: u64,
}

/// A rank that was not considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The rank.
    pub rank: WorkerRank,
    /// Why not.
    pub reason: SkipReason,
}

/// Why a rank was not considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SkipReason {
    /// The request is pinned to, or allows, others only.
    NotAllowed,
    /// The request excludes it, for example because it failed there.
    Excluded,
    /// More of its blocks are active than the threshold allows.
    BusyBlocks,
    /// More prompt tokens are pending than the threshold allows.
    BusyPrefill,
    /// More requests wait there than the threshold allows.
    BusyWaiting,
}

impl SkipReason {
    /// Whether load, and not the request, is the reason.
    #[must_use]
    pub const fn is_busy(self) -> bool {
        match self {
            Self::BusyBlocks | Self::BusyPrefill | Self::BusyWaiting => true,
            Self::NotAllowed | Self::Excluded => false,
        }
    }
}

/// Index of the candidate to take.
///
/// # Panics
/// When there is no candidate.
pub(crate) fn choose(config: &RouterConfig, candidates: &[Candidate], draw: u64) -> usize {
    match config.mode {
        RouterMode::RoundRobin => best(candidates, by_turn),
        RouterMode::Random => uniform_index(candidates.len(), draw),
        RouterMode::Kv if config.temperature > 0.0 => {
            let costs: Vec<f64> = candidates.iter().map(|c| c.cost.total).collect();
            softmax_index(&costs, config.temperature, draw)
        }
        RouterMode::Kv => {
            let least = candidates
                .iter()
                .map(|c| c.cost.total)
                .fold(f64::INFINITY, f64::min);
            best(candidates, |a, b| {
                let near = |c: &Candidate| c.cost.total <= least + COST_EPSILON;
                near(b).cmp(&near(a)).then_with(|| by_turn(a, b))
            })
        }
    }
}

/// The others in the order in which they would stand in.
pub(crate) fn by_preference(config: &RouterConfig, candidates: &mut [Candidate]) {
    match config.mode {
        RouterMode::Kv => candidates.sort_by(|a, b| {
            a.cost
                .total
                .total_cmp(&b.cost.total)
                .then_with(|| by_turn(a, b))
        }),
        RouterMode::RoundRobin | RouterMode::Random => candidates.sort_by(by_turn),
    }
}

pub(crate) fn busy(config: &RouterConfig, load: &RankLoad) -> Option<SkipReason> {
    if let Some(share) = config.active_decode_blocks_threshold
        && load.blocks_total > 0
        && load.active_blocks >= share_of(load.blocks_total, share)
    {
        return Some(SkipReason::BusyBlocks);
    }
    if let Some(tokens) = config.active_prefill_tokens_threshold
        && load.prefill_tokens >= tokens
    {
        return Some(SkipReason::BusyPrefill);
    }
    if let Some(waiting) = config.waiting_requests_max
        && load.waiting_requests >= waiting
    {
        return Some(SkipReason::BusyWaiting);
    }
    None
}

fn best(candidates: &[Candidate], order: impl Fn(&Candidate, &Candidate) -> Ordering) -> usize {
    (0..candidates.len())
        .min_by(|&a, &b| order(&candidates[a], &candidates[b]))
        .expect("there is a candidate")
}

fn by_turn(a: &Candidate, b: &Candidate) -> Ordering {
    (a.selected, a.rank).cmp(&(b.selected, b.rank))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of 0 to 1 of a 32-bit count"
)]
fn share_of(blocks: u32, share: f64) -> u64 {
    (f64::from(blocks) * share).ceil() as u64
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::WorkerId;

    use super::*;

    fn candidate(worker: u64, total: f64, selected: u64) -> Candidate {
        Candidate {
            rank: WorkerRank::new(WorkerId(worker), 0),
            overlap: Overlap::default(),
            cached_blocks: 0,
            predicted_blocks: 0,
            confidence: Confidence::Complete,
            load: RankLoad::default(),
            potential_decode_blocks: 0,
            cost: Cost {
                total,
                ..Cost::default()
            },
            selected,
        }
    }

    fn config(mode: RouterMode) -> RouterConfig {
        RouterConfig {
            mode,
            ..RouterConfig::default()
        }
    }

    #[test]
    fn the_lowest_cost_wins_and_ties_go_to_the_one_chosen_longest_ago() {
        let candidates = [
            candidate(1, 3.0, 1),
            candidate(2, 2.0, 9),
            candidate(3, 2.0, 5),
            candidate(4, 2.5, 0),
        ];
        assert_eq!(choose(&config(RouterMode::Kv), &candidates, 0), 2);
        assert_eq!(choose(&config(RouterMode::RoundRobin), &candidates, 0), 3);
        assert_eq!(
            choose(&config(RouterMode::Random), &candidates, u64::MAX),
            3
        );
    }

    #[test]
    fn stand_ins_follow_by_cost() {
        let mut candidates = [
            candidate(1, 3.0, 1),
            candidate(2, 2.0, 9),
            candidate(3, 2.0, 5),
        ];
        by_preference(&config(RouterMode::Kv), &mut candidates);
        assert_eq!(candidates.map(|c| c.rank.worker.0), [3, 2, 1]);
    }

    #[test]
    fn thresholds_make_a_rank_busy() {
        let load = RankLoad {
            prefill_tokens: 100,
            active_blocks: 80,
            waiting_requests: 2,
            blocks_total: 100,
            ..RankLoad::default()
        };
        let mut config = config(RouterMode::Kv);
        assert_eq!(busy(&config, &load), None);
        config.waiting_requests_max = Some(2);
        assert_eq!(busy(&config, &load), Some(SkipReason::BusyWaiting));
        config.active_prefill_tokens_threshold = Some(100);
        assert_eq!(busy(&config, &load), Some(SkipReason::BusyPrefill));
        config.active_decode_blocks_threshold = Some(0.8);
        assert_eq!(busy(&config, &load), Some(SkipReason::BusyBlocks));
        config.active_decode_blocks_threshold = Some(0.81);
        assert_eq!(busy(&config, &load), Some(SkipReason::BusyPrefill));
    }
}
