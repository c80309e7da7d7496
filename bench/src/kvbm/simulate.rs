//! One configuration against one trace, without bytes.

use std::sync::{Arc, atomic::AtomicU32};

use blockplane_kvbm::{
    AdmissionConfig, AdmissionKind, BlockPool, EvictionKind, Lru, PoolBuilder, PoolConfig,
    WriteBudgetConfig,
    tier::{DiskConfig, QueueConfig, TierConfig, TierPools, Tiers},
};

use super::{driver::Driver, links::LinkSpeeds, outcome::Outcome, trace::Trace, world::Null};

/// What to play a trace against.
#[derive(Clone, Debug, PartialEq)]
pub struct Simulation {
    /// Blocks of G1.
    pub g1_blocks: u32,
    /// Blocks of G2; 0 for none.
    pub g2_blocks: u32,
    /// Blocks of G3; 0 for none.
    pub g3_blocks: u32,
    /// Which block of G1, G2 and G3 is overwritten first.
    pub evictions: [EvictionKind; 3],
    /// What is written to G3.
    pub admission: AdmissionKind,
    /// How much is written to G3.
    pub budget: WriteBudgetConfig,
    /// Whether what is read from G3 stays in G2.
    pub promote: bool,
    /// Whether the order in which blocks are overwritten, where that is LRU, and the time at which
    /// they are written are those of a simulator that knows neither sequences nor time.
    pub plain: bool,
    /// Bounds of the queues.
    pub queues: QueueConfig,
    /// Bytes of a block, for budgets and links.
    pub block_bytes: u64,
    /// How fast blocks move.
    pub speeds: LinkSpeeds,
}

impl Simulation {
    /// The defaults of a worker, over tiers of so many blocks.
    #[must_use]
    pub fn new(g1_blocks: u32, g2_blocks: u32, g3_blocks: u32) -> Self {
        Self {
            g1_blocks,
            g2_blocks,
            g3_blocks,
            evictions: [EvictionKind::Lru; 3],
            admission: AdmissionKind::default(),
            budget: WriteBudgetConfig::default(),
            promote: true,
            plain: false,
            queues: QueueConfig::default(),
            block_bytes: 1,
            speeds: LinkSpeeds::default(),
        }
    }

    pub(super) fn device(&self) -> BlockPool {
        pool(self.evictions[0], true).accounting(self.g1_blocks)
    }

    /// The tiers below G1, if there are any.
    pub(super) fn tier_config(&self, block_tokens: u32) -> Option<TierConfig> {
        if self.g2_blocks == 0 && self.g3_blocks == 0 {
            return None;
        }
        let disk = DiskConfig {
            eviction: self.evictions[2],
            admission: AdmissionConfig {
                block_tokens,
                ..AdmissionConfig::from(self.admission)
            },
            budget: self.budget,
            ..DiskConfig::new(self.g3_blocks)
        };
        Some(TierConfig {
            host_blocks: self.g2_blocks,
            host_eviction: self.evictions[1],
            disk: (self.g3_blocks > 0).then_some(disk),
            promote: self.promote,
            demote_ahead: !self.plain,
            queues: self.queues,
            ..TierConfig::default()
        })
    }
}

/// As [`pool`], and with `step` in the order of a simulator without sequences, if that is LRU.
fn stepped_pool(
    eviction: EvictionKind,
    prefix_caching: bool,
    step: Option<&Arc<AtomicU32>>,
) -> PoolBuilder {
    let pool = pool(eviction, prefix_caching);
    match step.filter(|_| eviction == EvictionKind::Lru) {
        Some(step) => pool.policy(Box::new(Lru::stepped(Arc::clone(step)))),
        None => pool,
    }
}

/// A pool whose events nobody hears.
pub(super) fn pool(eviction: EvictionKind, prefix_caching: bool) -> PoolBuilder {
    let config = PoolConfig {
        prefix_caching,
        ..PoolConfig::default()
    };
    BlockPool::builder(config)
        .eviction(eviction)
        .without_own_events()
}

/// Plays a trace.
///
/// # Errors
/// When the configuration cannot work, or a prompt does not fit into G1.
pub fn simulate(trace: &Trace, simulation: &Simulation) -> anyhow::Result<Outcome> {
    let config = simulation.tier_config(trace.block_tokens());
    let steps = simulation.plain.then(Arc::<AtomicU32>::default);
    let step = steps.as_ref();
    let tiers = match &config {
        None => None,
        Some(config) => {
            let host = stepped_pool(config.host_eviction, config.host_blocks > 0, step);
            let disk = config.disk.as_ref();
            let pools = TierPools {
                host: host.accounting(config.host_memory_blocks()),
                disk: disk
                    .map(|disk| stepped_pool(disk.eviction, true, step).accounting(disk.blocks)),
                remote: None,
            };
            Some(Tiers::new(config, pools, simulation.block_bytes)?)
        }
    };
    let onboard_time = simulation.queues.onboard_time;
    let world = Null::new(simulation.speeds, simulation.block_bytes, steps.clone());
    Driver::new(trace, simulation.device(), tiers, world, onboard_time).run()
}
