//! The engine that computes on this machine.
//!
//! One thread per data-parallel rank runs steps: it asks the scheduler what to compute, lets the
//! model compute it on the rank's KV blocks, chooses tokens, and sends them. It sleeps when there
//! is nothing to compute. All ranks share the model's weights; each has its own pool, prefix cache
//! and KV events.

mod below;
mod config;
mod forward;
mod mailbox;
mod pool;
mod rank;
mod shared;
#[cfg(test)]
mod tests;
mod tiers;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    BlockPool, Consolidation, EventFeed, EventHub, KvArena, PoolConfig, tier::TierManager,
};
use blockplane_protocol::{
    DpRank, GenerateError, GenerateRequest, KvLayout, LoadReport, PrefillJob, PrefillTarget,
    WorkerRole,
};
use futures::future::{BoxFuture, FutureExt, join_all};
use tokio::sync::oneshot;

pub use config::{NativeConfig, PoolSize, TierHandle};
pub(crate) use forward::Forward;
pub(crate) use pool::KvPool;
pub(crate) use rank::Command;
use rank::{GenerateTask, PrefillTask, Rank};
pub(crate) use shared::{HeldBlocks, Live, RankShared};

use self::{below::Below, forward::executor, tiers::ManagedTiers};
use crate::{
    disagg::{Handoff, PrefillRun, validate_target},
    engine::{Engine, EngineInfo, Health},
    error::{RequestError, StartError, validate},
    model::Model,
    scheduler::{Scheduler, SchedulerConfig},
    stream::{OnCancel, PrefillTicket, TokenStream, prefill_channel, token_channel},
};

/// An engine on this machine's processors.
///
/// Dropping it ends every request with an error and its threads after their current step.
pub struct NativeEngine {
    info: EngineInfo,
    ranks: Vec<Arc<RankShared>>,
    handoff: Option<Arc<Handoff>>,
    tiers: Option<Arc<TierManager>>,
    step_timeout: Duration,
    draining: AtomicBool,
}

impl NativeEngine {
    /// Allocates the pools and starts a thread for each rank. All ranks share `model`.
    ///
    /// # Errors
    /// When the configuration contradicts itself, or memory or threads cannot be had.
    pub fn start(model: &Arc<Model>, config: &NativeConfig) -> Result<Arc<Self>, StartError> {
        let parameters = model.config();
        let tokens = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let facts = ModelFacts {
            layout: model.kv_layout(config.block_tokens),
            fingerprint: model.kv_fingerprint(&config.model_name),
            context_tokens_max: tokens(parameters.context_tokens_max),
            vocab_size: tokens(parameters.vocab_size),
            eos_token_ids: parameters.eos_token_ids.clone(),
        };
        let mut make_forward = || executor(model, &config.scheduler);
        Self::start_with(config, facts, &mut make_forward, &|rank| {
            attach(config, rank)
        })
    }

    /// The same with a stand-in for the model, and for the tiers below each rank's pool.
    pub(crate) fn start_with(
        config: &NativeConfig,
        facts: ModelFacts,
        make_forward: &mut dyn FnMut() -> Result<Box<dyn Forward>, StartError>,
        attach: &AttachBelow<'_>,
    ) -> Result<Arc<Self>, StartError> {
        config.validate()?;
        let layout = facts.layout;
        let blocks = config.blocks(&layout)?;
        layout.validate(blocks)?;
        let handoff = config
            .handoff
            .clone()
            .map(|handoff| Handoff::start(handoff, config.agent.clone(), facts.fingerprint));
        let pool_tokens = blocks.saturating_mul(config.block_tokens);
        let context_tokens_max = facts.context_tokens_max.min(pool_tokens);
        let mut ranks = Vec::new();
        for rank in (0..config.dp_size).map(DpRank) {
            let shared = rank_memory(config, layout.clone(), blocks, rank)?;
            let limits = SchedulerConfig {
                // Requests are counted on entry, where both limits hold together.
                max_waiting: live_max(&config.scheduler),
                ..config.scheduler.clone()
            };
            let scheduler = Scheduler::new(
                limits,
                KvPool::new(shared.pool.clone(), attach(&shared)?),
                config.block_tokens as usize,
                context_tokens_max as usize,
                facts.eos_token_ids.clone(),
            )
            .map_err(|error| StartError::Config {
                name: error.name,
                value: error.value.to_string(),
                accepted: format!("{} or more", error.at_least),
            })?;
            let forward = make_forward()?;
            let thread = Rank::new(Arc::clone(&shared), scheduler, forward, handoff.clone());
            let name = format!("engine-{}", rank.0);
            ranks.push(shared);
            thread::Builder::new()
                .name(name.clone())
                .spawn(move || thread.run())
                .map_err(|source| StartError::Thread { name, source })?;
        }
        Ok(Arc::new(Self {
            info: EngineInfo {
                model: config.model_name.clone(),
                model_fingerprint: facts.fingerprint,
                role: config.role,
                layout,
                blocks,
                dp_size: config.dp_size,
                context_tokens_max,
                vocab_size: facts.vocab_size,
                eos_token_ids: facts.eos_token_ids,
            },
            ranks,
            handoff,
            tiers: config
                .tiers
                .as_ref()
                .filter(|_| config.prefix_caching)
                .map(|tiers| Arc::clone(&tiers.manager)),
            step_timeout: config.step_timeout,
            draining: AtomicBool::new(false),
        }))
    }

    /// The rank a request names, when the engine takes requests.
    fn rank(&self, rank: DpRank) -> Result<&Arc<RankShared>, RequestError> {
        if self.draining.load(Ordering::Acquire) {
            return Err(RequestError::Draining);
        }
        let shared = self.ranks.get(rank.0 as usize).ok_or(RequestError::Rank {
            rank: rank.0,
            dp_size: self.info.dp_size,
        })?;
        if shared.has_ended() {
            return Err(RequestError::Unhealthy {
                reason: format!("the engine thread of rank {rank} has ended"),
            });
        }
        Ok(shared)
    }

    fn refuse_role(&self, refused: WorkerRole, what: &'static str) -> Result<(), RequestError> {
        let role = self.info.role;
        if role == refused {
            return Err(RequestError::Role { role, what });
        }
        Ok(())
    }
}

impl Engine for NativeEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn generate(&self, mut request: GenerateRequest) -> Result<TokenStream, GenerateError> {
        self.refuse_role(WorkerRole::Prefill, "generate")?;
        validate(&request, &self.info)?;
        let shared = self.rank(request.route.rank)?;
        let live = shared.enter()?;
        // Chosen here, so that a prefill on another worker draws the same numbers.
        request.sampling.seed.get_or_insert_with(rand::random);
        let deadline = shared.now() + Duration::from_millis(request.deadline_ms);
        let (sender, stream) = token_channel(wake_on_cancel(shared));
        shared
            .mailbox
            .post(Command::Generate(Box::new(GenerateTask {
                request,
                sender,
                deadline,
                live,
            })));
        Ok(stream)
    }

    fn prefill(&self, job: PrefillJob) -> Result<PrefillTicket, GenerateError> {
        let PrefillJob { request, target } = job;
        for refused in [WorkerRole::Decode, WorkerRole::Aggregated] {
            self.refuse_role(refused, "prefill for other workers")?;
        }
        validate(&request, &self.info)?;
        let PrefillTarget::Blocks(target) = target else {
            let reason = "this worker writes KV into blocks; the job is for a connector".to_owned();
            return Err(RequestError::Incompatible { reason }.into());
        };
        validate_target(&target, request.token_ids.len(), &self.info)?;
        let shared = Arc::clone(self.rank(request.route.rank)?);
        let handoff = self
            .handoff
            .clone()
            .ok_or_else(|| RequestError::Unhealthy {
                reason: "it was started without a hand-off configuration".to_owned(),
            })?;
        let live = shared.enter()?;
        let time_left = Duration::from_millis(request.deadline_ms);
        let deadline = shared.now() + time_left;
        let (sender, ticket) = prefill_channel(wake_on_cancel(&shared));
        let runtime = handoff.config().runtime.clone();
        runtime.spawn_blocking(move || {
            match PrefillRun::connect(handoff, Arc::clone(&shared), target, time_left) {
                Ok(run) => shared.mailbox.post(Command::Prefill(Box::new(PrefillTask {
                    run: Box::new(run),
                    request,
                    sender,
                    deadline,
                    live,
                }))),
                Err(error) => sender.finish(Err(error)),
            }
        });
        Ok(ticket)
    }

    fn load(&self) -> Vec<LoadReport> {
        let mut loads: Vec<LoadReport> = self.ranks.iter().map(|rank| rank.load()).collect();
        if let (Some(tiers), Some(first)) = (&self.tiers, loads.first_mut()) {
            first.lower = tiers.occupancy();
        }
        loads
    }

    fn events(&self, rank: DpRank) -> Option<EventFeed> {
        let shared = self.ranks.get(rank.0 as usize)?;
        Some(shared.hub.feed())
    }

    fn drain(&self, grace: Duration) -> BoxFuture<'static, ()> {
        self.draining.store(true, Ordering::Release);
        let now = Instant::now();
        let until = now.checked_add(grace).unwrap_or(now);
        let answers = self.ranks.iter().map(|rank| {
            let (done, answer) = oneshot::channel();
            rank.mailbox.post(Command::Drain { until, done });
            answer
        });
        // A rank that has ended has nothing left to drain.
        join_all(answers.collect::<Vec<_>>()).map(drop).boxed()
    }

    fn health(&self) -> Health {
        for rank in &self.ranks {
            if rank.has_ended() {
                let rank = rank.rank;
                let reason = format!("the engine thread of rank {rank} has ended");
                return Health::Unhealthy { reason };
            }
            if let Some(time) = rank.step_time().filter(|time| *time > self.step_timeout) {
                let (rank, limit) = (rank.rank, self.step_timeout);
                let reason =
                    format!("rank {rank} has been in one step for {time:?}, over {limit:?}");
                return Health::Unhealthy { reason };
            }
        }
        if !self.draining.load(Ordering::Acquire) {
            Health::Ready
        } else if self.ranks.iter().any(|rank| rank.live() > 0) {
            Health::Draining
        } else {
            Health::Stopped
        }
    }
}

impl Drop for NativeEngine {
    fn drop(&mut self) {
        for rank in &self.ranks {
            rank.mailbox.post(Command::Stop);
        }
    }
}

impl fmt::Debug for NativeEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NativeEngine")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// Puts a rank above the lower tiers, if there are any.
pub(crate) type AttachBelow<'a> =
    dyn Fn(&RankShared) -> Result<Option<Arc<dyn Below>>, StartError> + 'a;

/// What the engine must know of a model.
pub(crate) struct ModelFacts {
    pub(crate) layout: KvLayout,
    pub(crate) fingerprint: u64,
    pub(crate) context_tokens_max: u32,
    pub(crate) vocab_size: u32,
    pub(crate) eos_token_ids: Vec<u32>,
}

fn rank_memory(
    config: &NativeConfig,
    layout: KvLayout,
    blocks: u32,
    rank: DpRank,
) -> Result<Arc<RankShared>, StartError> {
    let label = format!("kv-{rank}");
    let arena = KvArena::allocate(&config.agent, layout, blocks, &label).map_err(|error| {
        StartError::Arena {
            rank: rank.0,
            reason: error.to_string(),
        }
    })?;
    let pool = BlockPool::builder(PoolConfig {
        rank,
        prefix_caching: config.prefix_caching,
        ..PoolConfig::default()
    })
    .eviction(config.eviction)
    .without_own_events()
    .over(Arc::clone(&arena));
    let mut given = config.tiers.iter().flat_map(|tiers| &tiers.hubs);
    let hub = given
        .nth(rank.0 as usize)
        .cloned()
        .unwrap_or_else(|| EventHub::new(rank, config.kv_events_max, Consolidation::Passthrough));
    pool.join(&hub).map_err(|error| StartError::Tiers {
        rank: rank.0,
        reason: error.to_string(),
    })?;
    let live_max = live_max(&config.scheduler);
    let mut shared = RankShared::new(rank, pool, hub, arena, live_max);
    shared.watch.clone_from(&config.watch);
    Ok(Arc::new(shared))
}

/// Puts a rank above the tiers of the configuration.
pub(crate) fn attach(
    config: &NativeConfig,
    rank: &RankShared,
) -> Result<Option<Arc<dyn Below>>, StartError> {
    let Some(tiers) = config.tiers.as_ref().filter(|_| config.prefix_caching) else {
        return Ok(None);
    };
    let attached = tiers.manager.attach(rank.rank, &config.agent, &rank.pool);
    let tiers = attached.map_err(|error| StartError::Tiers {
        rank: rank.rank.0,
        reason: error.to_string(),
    })?;
    Ok(Some(Arc::new(ManagedTiers::new(
        tiers,
        config.agent.clone(),
    ))))
}

/// Most requests inside one rank.
fn live_max(limits: &SchedulerConfig) -> usize {
    limits.max_running.saturating_add(limits.max_waiting)
}

fn wake_on_cancel(shared: &Arc<RankShared>) -> OnCancel {
    // A stream may outlive the engine.
    let shared = Arc::downgrade(shared);
    Box::new(move || {
        if let Some(shared) = shared.upgrade() {
            shared.mailbox.wake();
        }
    })
}
