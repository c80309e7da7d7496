//! What the tiers below G1 look like, and the bounds of their queues.

use std::time::Duration;

use thiserror::Error;

use crate::{
    admit::{AdmissionConfig, WriteBudgetConfig, WriteBudgetError},
    evict::EvictionKind,
};

/// The hierarchy of one worker. The sizes are of the whole worker: all its ranks share them.
#[derive(Clone, Debug, PartialEq)]
pub struct TierConfig {
    /// Blocks of G2. 0: there is no G2, and blocks pass through [`TierConfig::bounce_blocks`].
    pub host_blocks: u32,
    /// Blocks of host memory that stand in for G2 where there is none: nothing stays in them.
    /// At least 2 then; unused otherwise. Default 64.
    pub bounce_blocks: u32,
    /// Which block of G2 is overwritten first. Default LRU.
    pub host_eviction: EvictionKind,
    /// G3. Default none.
    pub disk: Option<DiskConfig>,
    /// G4. Default none.
    pub remote: Option<RemoteConfig>,
    /// Bounds and times of the queues.
    pub queues: QueueConfig,
    /// When a tier is left alone.
    pub health: HealthConfig,
    /// Whether blocks read from G3 or G4 stay in G2. Default `true`.
    pub promote: bool,
    /// Whether blocks of G2 that are written to G3 when their room is needed
    /// ([`AdmissionKind::OnEvict`](crate::AdmissionKind::OnEvict)) go some batches before it is, so that nothing waits
    /// for the disk. Without it they go when something waits for their room. Default `true`.
    pub demote_ahead: bool,
    /// Blocks with a lower priority (0 to 100) are not offloaded, nor are the later ones of the same
    /// request. Blocks without a priority are. Default 0: all are.
    pub host_min_priority: u32,
}

/// G3.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskConfig {
    /// Slots, at least 1.
    pub blocks: u32,
    /// Which slot is overwritten first. Default LRU.
    pub eviction: EvictionKind,
    /// Which blocks are worth a write.
    pub admission: AdmissionConfig,
    /// How much may be written.
    pub budget: WriteBudgetConfig,
}

/// G4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// Whether blocks that reach G2 are written to G4. Default `true`.
    pub write_through: bool,
}

/// Bounds of queues and moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Blocks that wait in each of the queues for offload (G1 to G2), for writes to G3 and for writes
    /// to G4. What is more is dropped, lowest priority and youngest first. 24 bytes each. Default
    /// 16,384.
    pub offload_blocks_max: u32,
    /// Onboards under way; what is more is computed. Default 256.
    pub onboard_requests_max: u32,
    /// Blocks in one move. Default 16.
    pub batch_blocks: u32,
    /// Moves at once, over all tiers. Default 4. With 2 or more, one is kept for G1 and G2, so that a
    /// tier that hangs stops nothing else.
    pub concurrent: u32,
    /// Time for one move away from G1, and for which a block waits for it. Default 10 s.
    pub offload_time: Duration,
    /// Time for one move towards G1, if its request does not allow less. Default 5 s.
    pub onboard_time: Duration,
}

/// When a tier is slow or broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthConfig {
    /// Moves in a row that missed their deadline until the tier is slow and left alone. Default 3.
    pub late_max: u32,
    /// Moves in a row of which no block succeeded until the tier is turned off. Default 16.
    pub failed_max: u32,
    /// Time after which one move is tried on a slow tier. Default 5 s.
    pub probe_every: Duration,
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum TierConfigError {
    /// A number out of its range.
    #[error("{name} is {got}; accepted: {accepted}")]
    Range {
        /// The field.
        name: &'static str,
        /// Its value.
        got: u64,
        /// What would do.
        accepted: &'static str,
    },
    /// The write budget is no budget.
    #[error(transparent)]
    Budget(#[from] WriteBudgetError),
    /// There is no tier to manage.
    #[error("neither G2 nor G3 nor G4 is configured")]
    NoTier,
}

impl Default for TierConfig {
    fn default() -> Self {
        Self {
            host_blocks: 0,
            bounce_blocks: 64,
            host_eviction: EvictionKind::Lru,
            disk: None,
            remote: None,
            queues: QueueConfig::default(),
            health: HealthConfig::default(),
            promote: true,
            demote_ahead: true,
            host_min_priority: 0,
        }
    }
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            offload_blocks_max: 16_384,
            onboard_requests_max: 256,
            batch_blocks: 16,
            concurrent: 4,
            offload_time: Duration::from_secs(10),
            onboard_time: Duration::from_secs(5),
        }
    }
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            late_max: 3,
            failed_max: 16,
            probe_every: Duration::from_secs(5),
        }
    }
}

impl DiskConfig {
    /// A disk of `blocks` slots with the default policies.
    #[must_use]
    pub fn new(blocks: u32) -> Self {
        Self {
            blocks,
            eviction: EvictionKind::Lru,
            admission: AdmissionConfig::default(),
            budget: WriteBudgetConfig::default(),
        }
    }
}

impl Default for RemoteConfig {
    fn default() -> Self {
        Self {
            write_through: true,
        }
    }
}

impl TierConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one that is out of range.
    pub fn validate(&self) -> Result<(), TierConfigError> {
        let range = |name, got: u64, ok: bool, accepted| {
            if ok {
                Ok(())
            } else {
                Err(TierConfigError::Range {
                    name,
                    got,
                    accepted,
                })
            }
        };
        let count = |name, got: u32, max: u32, accepted| {
            range(name, got.into(), (1..=max).contains(&got), accepted)
        };
        let queues = &self.queues;
        count(
            "queues.offload_blocks_max",
            queues.offload_blocks_max,
            1 << 24,
            "1 to 2^24 blocks",
        )?;
        count(
            "queues.onboard_requests_max",
            queues.onboard_requests_max,
            1 << 16,
            "1 to 65,536 requests",
        )?;
        count(
            "queues.batch_blocks",
            queues.batch_blocks,
            4096,
            "1 to 4,096 blocks",
        )?;
        count("queues.concurrent", queues.concurrent, 64, "1 to 64 moves")?;
        for (name, time) in [
            ("queues.offload_time", queues.offload_time),
            ("queues.onboard_time", queues.onboard_time),
            ("health.probe_every", self.health.probe_every),
        ] {
            let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            range(
                name,
                millis,
                (1..=3_600_000).contains(&millis),
                "1 ms to 1 hour",
            )?;
        }
        count(
            "health.late_max",
            self.health.late_max,
            1000,
            "1 to 1,000 moves",
        )?;
        count(
            "health.failed_max",
            self.health.failed_max,
            1000,
            "1 to 1,000 moves",
        )?;
        if self.host_blocks == 0 {
            if self.disk.is_none() && self.remote.is_none() {
                return Err(TierConfigError::NoTier);
            }
            range(
                "bounce_blocks",
                self.bounce_blocks.into(),
                self.bounce_blocks >= 2,
                "at least 2 without a G2",
            )?;
        }
        if let Some(disk) = &self.disk {
            range(
                "disk.blocks",
                disk.blocks.into(),
                disk.blocks >= 1,
                "at least 1 slot",
            )?;
            disk.budget.rate()?;
        }
        range(
            "host_min_priority",
            self.host_min_priority.into(),
            self.host_min_priority <= 100,
            "0 to 100",
        )
    }

    /// Blocks of host memory that are needed: G2, or what stands in for it.
    #[must_use]
    pub const fn host_memory_blocks(&self) -> u32 {
        if self.host_blocks == 0 {
            self.bounce_blocks
        } else {
            self.host_blocks
        }
    }
}
