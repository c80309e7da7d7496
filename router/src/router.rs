//! The router: both pools, admission and the disaggregation policy behind one call.

use std::{collections::HashMap, sync::Arc, time::Duration};

use blockplane_protocol::{
    KvEvent, LoadReport, PrefillHint, RouteHints, SequenceHash, StoredBlock, Tier, WorkerId,
    WorkerRank, WorkerRole,
};
use parking_lot::RwLock;

use crate::{
    admission::{Admission, AdmissionStats},
    config::{ConfigError, RouterConfig},
    disagg::LocalReason,
    error::RouteError,
    index::Applied,
    load::ReservationId,
    pool::{Decision, Pool, PrefillCandidates, RankInfo, RouteRequest},
    score::CostKind,
};

/// Routes requests to ranks. Clones share one state.
#[derive(Clone, Debug)]
pub struct Router(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: Arc<RouterConfig>,
    roles: RwLock<HashMap<WorkerId, WorkerRole>>,
    decode: Pool,
    prefill: Pool,
    admission: Admission,
}

/// Where a request goes, with the reasons.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The rank that decodes.
    pub decode: Decision,
    /// Who computes the prompt.
    pub prefill: PrefillPlan,
}

/// Who computes the prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum PrefillPlan {
    /// The rank that decodes.
    Local(LocalReason),
    /// One of these, best first.
    Remote(PrefillCandidates),
}

/// A plan and the load it reserved.
#[derive(Debug)]
#[must_use = "dropping it releases the reservation"]
pub struct Routed {
    /// Where the request goes.
    pub plan: Plan,
    /// Held until the request ends.
    pub reservation: Reservation,
}

/// The load of one request, counted on its ranks until this is dropped.
#[derive(Debug)]
#[must_use = "dropping it releases the load of a request that may still run"]
pub struct Reservation {
    router: Arc<Shared>,
    decode: ReservationId,
    prefill: Option<ReservationId>,
}

impl Router {
    /// A router without workers.
    ///
    /// # Errors
    /// When a setting is out of range.
    pub fn new(config: RouterConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let config = Arc::new(config);
        Ok(Self(Arc::new(Shared {
            roles: RwLock::default(),
            decode: Pool::new(Arc::clone(&config)),
            prefill: Pool::new(Arc::clone(&config)),
            admission: Admission::new(config.requests_max),
            config,
        })))
    }

    /// Its settings.
    #[must_use]
    pub fn config(&self) -> &RouterConfig {
        &self.0.config
    }

    /// Adds a worker, or updates it. A worker that changed its role starts anew.
    pub fn add_worker(&self, worker: WorkerId, role: WorkerRole, info: RankInfo) {
        let before = self.0.roles.write().insert(worker, role);
        if let Some(before) = before
            && before != role
        {
            self.0.pool(before).remove_worker(worker);
        }
        self.0.pool(role).add_worker(worker, info);
    }

    /// Forgets a worker with its blocks, load and reservations. Returns whether it was known.
    pub fn remove_worker(&self, worker: WorkerId) -> bool {
        let role = self.0.roles.write().remove(&worker);
        if let Some(role) = role {
            self.0.pool(role).remove_worker(worker);
        }
        role.is_some()
    }

    /// Takes in one KV event; `None` when the worker is not registered. After [`Applied::Gap`] the
    /// caller fetches a snapshot; until then the rank is routed to by prediction as well.
    pub fn apply_event(&self, worker: WorkerId, event: &KvEvent) -> Option<Applied> {
        self.0
            .with_pool(worker, |pool| pool.apply_event(worker, event))
    }

    /// Replaces what is known of a rank by a snapshot of its cache (parents before children) and
    /// closes its gap. Returns whether the worker is registered.
    pub fn load_snapshot(
        &self,
        rank: WorkerRank,
        last_event_id: u64,
        tier: Tier,
        blocks: &[(Option<SequenceHash>, StoredBlock)],
    ) -> bool {
        self.0
            .with_pool(rank.worker, |pool| {
                pool.load_snapshot(rank, last_event_id, tier, blocks);
            })
            .is_some()
    }

    /// Declares a rank's feed broken; its gap stays open until the next snapshot. Returns whether
    /// the worker is registered.
    pub fn open_gap(&self, rank: WorkerRank) -> bool {
        self.0
            .with_pool(rank.worker, |pool| pool.open_gap(rank))
            .is_some()
    }

    /// Takes in a worker's report of its load. Returns whether the worker is registered.
    pub fn report_load(&self, worker: WorkerId, report: LoadReport, now: Duration) -> bool {
        self.0
            .with_pool(worker, |pool| pool.report_load(worker, report, now))
            .is_some()
    }

    /// Chooses the ranks for a request and reserves them. `now` counts from any fixed origin;
    /// `draw` is 64 random bits, used by random mode and by a temperature above 0.
    ///
    /// # Errors
    /// A [`RouteError`] when no rank is there, eligible, or has room.
    pub fn plan(
        &self,
        request: &RouteRequest,
        now: Duration,
        draw: u64,
    ) -> Result<Routed, RouteError> {
        self.0.admission.enter(now)?;
        let planned = self.plan_admitted(request, now, draw);
        if planned.is_err() {
            self.0.admission.leave();
        }
        planned
    }

    fn plan_admitted(
        &self,
        request: &RouteRequest,
        now: Duration,
        draw: u64,
    ) -> Result<Routed, RouteError> {
        let shared = &self.0;
        let disagg = shared.config.disagg.enabled && !shared.prefill.ranks().is_empty();
        let kind = if disagg {
            CostKind::DecodeOnly
        } else {
            CostKind::Full
        };
        let (decode, decode_id) =
            shared
                .decode
                .select(request, kind, || shared.admission.retry_after(), now, draw)?;
        let mut reservation = Reservation {
            router: Arc::clone(shared),
            decode: decode_id,
            prefill: None,
        };
        let role = shared.roles.read().get(&decode.target.worker).copied();
        let prefill = if role == Some(WorkerRole::Aggregated) {
            PrefillPlan::Local(LocalReason::Aggregated)
        } else {
            // The second choice must not follow from the first one's bits.
            let chosen = shared.prefill.select_prefill(
                request,
                decode.cached_blocks,
                decode.uncached_tokens,
                now,
                draw.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32),
            );
            match chosen {
                Ok((candidates, id)) => {
                    reservation.prefill = Some(id);
                    PrefillPlan::Remote(candidates)
                }
                Err(reason) => PrefillPlan::Local(reason),
            }
        };
        if disagg && matches!(prefill, PrefillPlan::Local(_)) {
            shared
                .decode
                .charge_prefill(decode_id, decode.uncached_tokens);
        }
        Ok(Routed {
            plan: Plan { decode, prefill },
            reservation,
        })
    }

    /// Decode and aggregated ranks.
    #[must_use]
    pub fn decode_pool(&self) -> &Pool {
        &self.0.decode
    }

    /// Prefill ranks.
    #[must_use]
    pub fn prefill_pool(&self) -> &Pool {
        &self.0.prefill
    }

    /// Requests in flight and refused.
    #[must_use]
    pub fn admission(&self) -> AdmissionStats {
        self.0.admission.stats()
    }
}

impl Shared {
    fn pool(&self, role: WorkerRole) -> &Pool {
        match role {
            WorkerRole::Aggregated | WorkerRole::Decode => &self.decode,
            WorkerRole::Prefill => &self.prefill,
        }
    }

    /// Runs `f` on a worker's pool. The worker cannot be removed meanwhile, so that nothing of it
    /// is left behind.
    fn with_pool<T>(&self, worker: WorkerId, f: impl FnOnce(&Pool) -> T) -> Option<T> {
        let roles = self.roles.read();
        let role = *roles.get(&worker)?;
        Some(f(self.pool(role)))
    }
}

impl Plan {
    /// What the worker is told.
    #[must_use]
    pub fn route_hints(&self) -> RouteHints {
        let prefill = match &self.prefill {
            PrefillPlan::Local(_) => Vec::new(),
            PrefillPlan::Remote(candidates) => candidates
                .order
                .iter()
                .map(|candidate| PrefillHint {
                    worker: candidate.rank.worker,
                    rank: candidate.rank.rank,
                    overlap_blocks: candidate.cached_blocks,
                })
                .collect(),
        };
        RouteHints {
            rank: self.decode.target.rank,
            prefill,
        }
    }
}

impl Reservation {
    /// The first token came: the prompt is computed, wherever that was.
    pub fn prefill_done(&self, now: Duration) {
        self.router.decode.prefill_done(self.decode, now);
        if let Some(id) = self.prefill {
            self.router.prefill.finish(id);
        }
    }

    /// The request is alive and its output filled `blocks` more blocks (0 is a mere sign of life).
    pub fn output_blocks(&self, blocks: u64, now: Duration) {
        self.router.decode.output_blocks(self.decode, blocks, now);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.router.decode.finish(self.decode);
        if let Some(id) = self.prefill {
            self.router.prefill.finish(id);
        }
        self.router.admission.leave();
    }
}
