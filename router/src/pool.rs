//! The ranks of one role: their index, predictions and loads, and the choice among them.
//!
//! Locks, each held for one short step and never two at a time: members (read), index (read),
//! predictions (read), loads (choose and reserve), predictions (write). Events take the index for
//! writing; they never wait for a choice.

use std::{sync::Arc, time::Duration};

use blockplane_protocol::{
    KvEvent, LoadReport, SequenceHash, StoredBlock, Tier, TokenSequence, WorkerId, WorkerRank,
};
use parking_lot::{Mutex, RwLock};

use crate::{
    config::RouterConfig,
    disagg::{DisaggInput, LocalReason, PrefillChoice},
    error::RouteError,
    index::{Applied, Asked, Confidence, IndexStats, KvIndex, Overlap, Predictions, ranks_of},
    load::{Charge, LoadTable, RankLoad, ReservationId},
    score::{self, Cost, CostInput, CostKind},
    select::{self, Candidate, SkipReason, Skipped},
};

/// A request as the router sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteRequest {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Sequence hashes of its full blocks, in order.
    pub hashes: Arc<[SequenceHash]>,
    /// Only this rank will do.
    pub pin: Option<WorkerRank>,
    /// Only these workers will do; `None` allows all.
    pub allowed: Option<Vec<WorkerId>>,
    /// These workers will not do, for example because the request failed there.
    pub excluded: Vec<WorkerId>,
}

/// What a pool has to know of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankInfo {
    /// Data-parallel ranks behind it (at least 1).
    pub dp_size: u32,
    /// Blocks of the pool of each rank.
    pub blocks: u32,
}

/// A choice with its reasons.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The rank.
    pub target: WorkerRank,
    /// Leading prompt blocks that its cost got credit for.
    pub overlap: Overlap,
    /// Leading prompt blocks that can be counted on there (see [`Candidate::cached_blocks`]).
    pub cached_blocks: u32,
    /// Prompt tokens left to compute there, at least 1.
    pub uncached_tokens: u32,
    /// All ranks that were compared.
    pub candidates: Vec<Candidate>,
    /// All ranks that were not.
    pub skipped: Vec<Skipped>,
}

/// Prefill ranks for one request.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefillCandidates {
    /// The best one, and all others with their costs.
    pub decision: Decision,
    /// The ranks to propose, best first.
    pub order: Vec<Candidate>,
}

/// One rank of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankStatus {
    /// The rank.
    pub rank: WorkerRank,
    /// How far its part of the index can be trusted.
    pub confidence: Confidence,
    /// Id of the last event taken in.
    pub last_event_id: Option<u64>,
    /// Its load.
    pub load: RankLoad,
}

/// Sizes and counters of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Its prefix index.
    pub index: IndexStats,
    /// Predicted pairs of block and rank.
    pub predictions: usize,
    /// Reservations held.
    pub reservations: usize,
    /// Reservations dropped for want of a sign of life since start.
    pub expired_total: u64,
}

/// The ranks of one role.
#[derive(Debug)]
pub struct Pool {
    config: Arc<RouterConfig>,
    members: RwLock<Arc<[WorkerRank]>>,
    index: RwLock<KvIndex>,
    predictions: RwLock<Predictions>,
    loads: Mutex<LoadTable>,
}

/// What is known of a prompt on one rank, before its load is looked at.
#[derive(Clone, Copy, Debug)]
struct View {
    rank: WorkerRank,
    overlap: Overlap,
    cached_blocks: u32,
    predicted_blocks: u32,
    confidence: Confidence,
}

impl Pool {
    pub(crate) fn new(config: Arc<RouterConfig>) -> Self {
        Self {
            members: RwLock::new(Arc::from([])),
            index: RwLock::new(KvIndex::new(config.index_blocks_max)),
            predictions: RwLock::new(Predictions::new(
                config.prediction_ttl(),
                config.predictions_max,
            )),
            loads: Mutex::new(LoadTable::new(
                config.active_request_expiry,
                config.load_report_expiry,
            )),
            config,
        }
    }

    pub(crate) fn add_worker(&self, worker: WorkerId, info: RankInfo) {
        let members = {
            let mut loads = self.loads.lock();
            for rank in ranks_of(worker, info.dp_size) {
                loads.add(rank, info.blocks);
            }
            loads.ranks().collect()
        };
        *self.members.write() = members;
    }

    pub(crate) fn remove_worker(&self, worker: WorkerId) {
        let members = {
            let mut loads = self.loads.lock();
            loads.remove_worker(worker);
            loads.ranks().collect()
        };
        *self.members.write() = members;
        self.predictions.write().remove_worker(worker);
        self.index.write().remove_worker(worker);
    }

    pub(crate) fn apply_event(&self, worker: WorkerId, event: &KvEvent) -> Applied {
        self.index.write().apply(worker, event)
    }

    pub(crate) fn load_snapshot(
        &self,
        rank: WorkerRank,
        last_event_id: u64,
        tier: Tier,
        blocks: &[(Option<SequenceHash>, StoredBlock)],
    ) {
        self.index
            .write()
            .load_snapshot(rank, last_event_id, tier, blocks.iter().copied());
    }

    pub(crate) fn open_gap(&self, rank: WorkerRank) {
        self.index.write().open_gap(rank);
    }

    pub(crate) fn report_load(&self, worker: WorkerId, report: LoadReport, now: Duration) {
        self.loads.lock().report(worker, report, now);
    }

    /// Ranks in the pool, ascending.
    #[must_use]
    pub fn ranks(&self) -> Arc<[WorkerRank]> {
        Arc::clone(&self.members.read())
    }

    /// State of every rank, ascending.
    #[must_use]
    pub fn status(&self, now: Duration) -> Vec<RankStatus> {
        let members = self.ranks();
        let feeds: Vec<_> = {
            let index = self.index.read();
            members
                .iter()
                .map(|&rank| (index.confidence(rank), index.last_event_id(rank)))
                .collect()
        };
        let loads = self.loads.lock();
        members
            .iter()
            .zip(feeds)
            .map(|(&rank, (confidence, last_event_id))| RankStatus {
                rank,
                confidence,
                last_event_id,
                load: loads.load(rank, now).unwrap_or_default(),
            })
            .collect()
    }

    /// Sizes and counters.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let index = self.index.read().stats();
        let predictions = self.predictions.read().len();
        let loads = self.loads.lock();
        PoolStats {
            index,
            predictions,
            reservations: loads.reservations(),
            expired_total: loads.expired_total(),
        }
    }

    /// Chooses a rank to decode on and reserves it. The prompt's prefill is charged to it only
    /// with [`CostKind::Full`].
    pub(crate) fn select(
        &self,
        request: &RouteRequest,
        kind: CostKind,
        retry_after: impl FnOnce() -> Duration,
        now: Duration,
        draw: u64,
    ) -> Result<(Decision, ReservationId), RouteError> {
        let views = self.views(request, 0, now);
        let mut loads = self.loads.lock();
        loads.expire(now);
        let (candidates, skipped) = self.candidates(&loads, request, kind, views, now);
        if candidates.is_empty() {
            let count = |reason| skipped.iter().filter(|s| s.reason == reason).count();
            let busy = skipped.iter().filter(|s| s.reason.is_busy()).count();
            return Err(match (loads.rank_count(), busy) {
                (0, _) => RouteError::NoWorkers,
                (ranks, 0) => RouteError::NoneEligible {
                    ranks,
                    excluded: count(SkipReason::Excluded),
                    not_allowed: count(SkipReason::NotAllowed),
                },
                (_, busy) => RouteError::AllBusy {
                    busy,
                    retry_after: retry_after(),
                },
            });
        }
        let chosen = candidates[select::choose(&self.config, &candidates, draw)];
        let decision = self.decision(request, &chosen, 0, candidates, skipped);
        let charge = self.charge(request, kind, decision.uncached_tokens);
        let id = loads.reserve(chosen.rank, charge, now);
        drop(loads);
        self.predict(&request.hashes, &chosen, now);
        Ok((decision, id))
    }

    /// Chooses the prefill ranks to propose for a request and reserves the first. `decode_blocks`
    /// is what the decode rank has, which a prefill rank reads instead of computing it.
    pub(crate) fn select_prefill(
        &self,
        request: &RouteRequest,
        decode_blocks: u32,
        uncached_tokens: u32,
        now: Duration,
        draw: u64,
    ) -> Result<(PrefillCandidates, ReservationId), LocalReason> {
        let policy = &self.config.disagg;
        // A pin or an allow-list names decode workers; exclusions hold for every worker.
        let request = RouteRequest {
            pin: None,
            allowed: None,
            ..request.clone()
        };
        let views = self.views(&request, decode_blocks, now);
        let kind = CostKind::PrefillOnly;
        let mut loads = self.loads.lock();
        loads.expire(now);
        let (candidates, skipped) = self.candidates(&loads, &request, kind, views, now);
        let input = DisaggInput {
            uncached_tokens,
            prefill_ranks: candidates.len(),
            prefill_requests_min: candidates
                .iter()
                .map(|c| c.load.active_requests)
                .min()
                .unwrap_or(0),
        };
        if let PrefillChoice::Local(reason) = policy.decide(&input) {
            return Err(reason);
        }
        let mut order: Vec<Candidate> = candidates
            .iter()
            .copied()
            .filter(|c| c.load.active_requests < policy.prefill_requests_max)
            .collect();
        let chosen = order.remove(select::choose(&self.config, &order, draw));
        select::by_preference(&self.config, &mut order);
        order.insert(0, chosen);
        order.truncate(policy.hints_max);
        let decision = self.decision(&request, &chosen, decode_blocks, candidates, skipped);
        let charge = self.charge(&request, kind, decision.uncached_tokens);
        let id = loads.reserve(chosen.rank, charge, now);
        drop(loads);
        self.predict(&request.hashes, &chosen, now);
        Ok((PrefillCandidates { decision, order }, id))
    }

    pub(crate) fn charge_prefill(&self, id: ReservationId, tokens: u32) {
        if self.config.track_prefill_tokens {
            self.loads.lock().charge_prefill(id, u64::from(tokens));
        }
    }

    pub(crate) fn prefill_done(&self, id: ReservationId, now: Duration) {
        self.loads.lock().prefill_done(id, now);
    }

    pub(crate) fn output_blocks(&self, id: ReservationId, blocks: u64, now: Duration) {
        let counted = if self.config.track_active_blocks && self.config.track_output_blocks {
            blocks
        } else {
            0
        };
        self.loads.lock().output_blocks(id, counted, now);
    }

    pub(crate) fn finish(&self, id: ReservationId) {
        self.loads.lock().finish(id);
    }

    /// Notes the blocks that the rank will have and is not yet known to have.
    fn predict(&self, prompt: &[SequenceHash], chosen: &Candidate, now: Duration) {
        let known = match chosen.confidence {
            Confidence::Complete => chosen.cached_blocks as usize,
            Confidence::NoEvents | Confidence::Gap => 0,
        };
        if let Some(unknown) = prompt.get(known..)
            && !unknown.is_empty()
        {
            self.predictions.write().record(chosen.rank, unknown, now);
        }
    }

    fn views(&self, request: &RouteRequest, overlap_min: u32, now: Duration) -> Vec<View> {
        let members = self.ranks();
        let config = &self.config;
        let view = |rank, overlap, confidence| View {
            rank,
            overlap,
            cached_blocks: 0,
            predicted_blocks: 0,
            confidence,
        };
        let mut views: Vec<View> = if config.kv_events {
            let index = self.index.read();
            let overlaps = index.find(&request.hashes);
            members
                .iter()
                .map(|&rank| view(rank, overlaps.get(rank), index.confidence(rank)))
                .collect()
        } else {
            members
                .iter()
                .map(|&rank| view(rank, Overlap::default(), Confidence::NoEvents))
                .collect()
        };
        let asked: Vec<Asked> = views
            .iter()
            .map(|view| Asked {
                rank: view.rank,
                known: view.overlap.blocks(),
                ttl: match view.confidence {
                    Confidence::Complete => config.predicted_ttl,
                    Confidence::NoEvents | Confidence::Gap => config.ttl,
                },
            })
            .collect();
        let predicted = self.predictions.read().find(&request.hashes, &asked, now);
        for (view, predicted) in views.iter_mut().zip(predicted) {
            view.predicted_blocks = predicted - view.overlap.blocks();
            view.cached_blocks = match view.confidence {
                // What was routed a moment ago may still be computed: no work is saved by it yet.
                Confidence::Complete => view.overlap.blocks(),
                Confidence::NoEvents | Confidence::Gap => predicted,
            };
            view.overlap = view.overlap.at_least(predicted.max(overlap_min));
        }
        views
    }

    fn candidates(
        &self,
        loads: &LoadTable,
        request: &RouteRequest,
        kind: CostKind,
        views: Vec<View>,
        now: Duration,
    ) -> (Vec<Candidate>, Vec<Skipped>) {
        let mut skipped = Vec::new();
        let mut candidates = Vec::with_capacity(views.len());
        let prompt_blocks = u64::from(request.prompt_tokens.div_ceil(self.config.block_tokens));
        for view in views {
            let Some(state) = loads.state(view.rank, &request.hashes, now) else {
                // It left since its overlap was looked up.
                continue;
            };
            let load = state.load;
            let reason = request
                .refuses(view.rank)
                .or_else(|| select::busy(&self.config, &load));
            if let Some(reason) = reason {
                skipped.push(Skipped {
                    rank: view.rank,
                    reason,
                });
                continue;
            }
            let held = if self.config.assume_kv_reuse {
                state.held_blocks
            } else {
                0
            };
            candidates.push(Candidate {
                rank: view.rank,
                overlap: view.overlap,
                cached_blocks: view.cached_blocks,
                predicted_blocks: view.predicted_blocks,
                confidence: view.confidence,
                load,
                potential_decode_blocks: if self.config.track_active_blocks {
                    load.active_blocks + prompt_blocks.saturating_sub(held)
                } else {
                    0
                },
                cost: Cost::default(),
                selected: state.selected,
            });
        }
        let active_prefill_tokens_min = candidates
            .iter()
            .map(|c| c.load.prefill_tokens)
            .min()
            .unwrap_or(0);
        for candidate in &mut candidates {
            candidate.cost = score::cost(
                &self.config,
                kind,
                &CostInput {
                    prompt_tokens: request.prompt_tokens,
                    overlap: candidate.overlap,
                    active_prefill_tokens: candidate.load.prefill_tokens,
                    active_prefill_tokens_min,
                    potential_decode_blocks: candidate.potential_decode_blocks,
                    active_requests: candidate.load.active_requests,
                },
            );
        }
        (candidates, skipped)
    }

    fn decision(
        &self,
        request: &RouteRequest,
        chosen: &Candidate,
        readable_blocks: u32,
        candidates: Vec<Candidate>,
        skipped: Vec<Skipped>,
    ) -> Decision {
        let cached = chosen
            .cached_blocks
            .max(readable_blocks)
            .saturating_mul(self.config.block_tokens);
        Decision {
            target: chosen.rank,
            overlap: chosen.overlap,
            cached_blocks: chosen.cached_blocks,
            uncached_tokens: request.prompt_tokens.saturating_sub(cached).max(1),
            candidates,
            skipped,
        }
    }

    fn charge(&self, request: &RouteRequest, kind: CostKind, uncached_tokens: u32) -> Charge {
        let config = &self.config;
        let prefills = kind != CostKind::DecodeOnly && config.track_prefill_tokens;
        let decodes = kind != CostKind::PrefillOnly && config.track_active_blocks;
        let blocks = u64::from(request.prompt_tokens.div_ceil(config.block_tokens));
        let shared: Arc<[SequenceHash]> = if decodes && config.assume_kv_reuse {
            Arc::clone(&request.hashes)
        } else {
            Arc::from([])
        };
        Charge {
            prefill_tokens: if prefills {
                u64::from(uncached_tokens)
            } else {
                0
            },
            private_blocks: if decodes {
                blocks.saturating_sub(shared.len() as u64)
            } else {
                0
            },
            shared,
        }
    }
}

impl RouteRequest {
    /// A request for this prompt without constraints. The router's `block_tokens` must equal the
    /// sequence's.
    #[must_use]
    pub fn from_sequence(prompt: &TokenSequence) -> Self {
        Self {
            prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
            hashes: prompt.blocks().iter().map(|b| b.sequence).collect(),
            ..Self::default()
        }
    }

    fn refuses(&self, rank: WorkerRank) -> Option<SkipReason> {
        if self.excluded.contains(&rank.worker) {
            return Some(SkipReason::Excluded);
        }
        let allowed = self.pin.is_none_or(|pin| pin == rank)
            && self
                .allowed
                .as_ref()
                .is_none_or(|allowed| allowed.contains(&rank.worker));
        (!allowed).then_some(SkipReason::NotAllowed)
    }
}
