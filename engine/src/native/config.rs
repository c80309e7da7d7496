//! Configuration of a native engine.

use std::{sync::Arc, time::Duration};

use blockplane_kvbm::{EventHub, EvictionKind, metrics::Observation, tier::TierManager};
use blockplane_protocol::{KvLayout, WorkerRole};
use blockplane_transfer::Agent;

use crate::{disagg::HandoffConfig, error::StartError, scheduler::SchedulerConfig};

/// Configuration of a [`NativeEngine`](crate::NativeEngine). Start from [`NativeConfig::new`].
#[derive(Clone, Debug)]
pub struct NativeConfig {
    /// Name under which the model is served.
    pub model_name: String,
    /// What part of a request the engine does.
    pub role: WorkerRole,
    /// The transfer agent that registers the pools. The engine of a prefill or decode worker is the
    /// only receiver of its notifications.
    pub agent: Agent,
    /// Tokens per KV block. Default 16. Workers that exchange blocks need the same value.
    pub block_tokens: u32,
    /// Size of the pool of each rank. Default 1 GiB.
    pub pool: PoolSize,
    /// Data-parallel ranks: each has its own thread, pool and KV events. Default 1.
    pub dp_size: u32,
    /// Limits of each rank's scheduler.
    pub scheduler: SchedulerConfig,
    /// Whether KV is found again by prompts that begin alike. Default `true`.
    pub prefix_caching: bool,
    /// Which of the blocks that are kept, and held by nobody, is overwritten first. Default
    /// [`EvictionKind::Lru`].
    pub eviction: EvictionKind,
    /// KV events kept per rank for subscribers that are behind. Default 65,536, about 150 bytes
    /// each at worst.
    pub kv_events_max: usize,
    /// A step that takes longer than this makes the engine unhealthy. Default 60 s.
    pub step_timeout: Duration,
    /// How KV is handed from prefill to decode workers; needed by these two roles. Default none.
    pub handoff: Option<HandoffConfig>,
    /// The tiers below the pools, which all ranks share. Used if `prefix_caching` is on. Default
    /// none.
    pub tiers: Option<TierHandle>,
    /// Is told of every request and what was found of it. Default nobody.
    pub watch: Option<Arc<Observation>>,
}

/// The tiers below the pools of an engine.
#[derive(Clone, Debug)]
pub struct TierHandle {
    /// Their manager. Whoever started it stops it, after the engine.
    pub manager: Arc<TierManager>,
    /// Event hubs of the ranks, in their order: the engine's pools join them, and the manager's may
    /// have. A rank without one gets its own, with the events of its pool only.
    pub hubs: Vec<Arc<EventHub>>,
}

/// Size of the KV pool of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolSize {
    /// This many blocks.
    Blocks(u32),
    /// As many blocks as fit into so many bytes.
    Bytes(u64),
}

impl NativeConfig {
    /// The defaults for this model name, role and agent.
    #[must_use]
    pub fn new(model_name: impl Into<String>, role: WorkerRole, agent: Agent) -> Self {
        Self {
            model_name: model_name.into(),
            role,
            agent,
            block_tokens: 16,
            pool: PoolSize::Bytes(1 << 30),
            dp_size: 1,
            scheduler: SchedulerConfig::default(),
            prefix_caching: true,
            eviction: EvictionKind::default(),
            kv_events_max: 65_536,
            tiers: None,
            watch: None,
            step_timeout: Duration::from_secs(60),
            handoff: None,
        }
    }

    /// Checks what does not depend on the machine.
    pub(crate) fn validate(&self) -> Result<(), StartError> {
        let fault = |name, value: &dyn ToString, accepted: &str| {
            Err(StartError::Config {
                name,
                value: value.to_string(),
                accepted: accepted.to_owned(),
            })
        };
        if self.block_tokens == 0 {
            return fault("block_tokens", &self.block_tokens, "1 or more");
        }
        if !(1..=64).contains(&self.dp_size) {
            return fault("dp_size", &self.dp_size, "1 to 64");
        }
        if self.model_name.is_empty() {
            return fault("model_name", &"empty", "a name");
        }
        if self.role != WorkerRole::Aggregated && self.handoff.is_none() {
            return fault(
                "handoff",
                &"absent",
                "present for prefill and decode workers",
            );
        }
        if let Err(error) = self.scheduler.validate(self.block_tokens as usize) {
            return fault(
                error.name,
                &error.value,
                &format!("{} or more", error.at_least),
            );
        }
        Ok(())
    }

    /// Blocks of each rank's pool.
    pub(crate) fn blocks(&self, layout: &KvLayout) -> Result<u32, StartError> {
        let blocks = match self.pool {
            PoolSize::Blocks(blocks) => u64::from(blocks),
            PoolSize::Bytes(bytes) => bytes / layout.block_bytes() as u64,
        };
        match u32::try_from(blocks) {
            Ok(blocks) if blocks >= 2 => Ok(blocks),
            Ok(_) | Err(_) => Err(StartError::Config {
                name: "pool",
                value: format!("{:?} ({blocks} blocks)", self.pool),
                accepted: format!("2 to {} blocks of {} bytes", u32::MAX, layout.block_bytes()),
            }),
        }
    }
}
