//! What a replay found out.

use std::time::Duration;

use blockplane_kvbm::{
    PoolStats,
    tier::{Dropped, Evicted, MoveKind, PerTier, TierStats},
};
use serde_json::{Map, Value, json};

/// Books and counters at the end of a replay.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Requests played.
    pub requests: usize,
    /// Blocks that they asked for.
    pub block_refs: usize,
    /// Blocks that were not computed, by the tier where they were found.
    pub hits: PerTier<u64>,
    /// Blocks that were found and did not come.
    pub failed_loads: u64,
    /// G1 at the end.
    pub device: PoolStats,
    /// The tiers below at the end.
    pub tiers: TierStats,
    /// Longest queues.
    pub queues: Queues,
    /// Virtual time at the end.
    pub ended: Duration,
    /// Time that it took one core.
    pub took: Duration,
}

/// Longest queues of a replay with links that take time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queues {
    /// Blocks between G1 and G2.
    pub offload_blocks_max: usize,
    /// Blocks that waited to be written to G3.
    pub disk_write_blocks_max: usize,
    /// Blocks that waited to be read from G3.
    pub disk_read_blocks_max: usize,
    /// Requests that were being loaded.
    pub onboards_max: usize,
    /// Requests that waited for room in G1.
    pub waiting_max: usize,
}

impl Queues {
    pub(super) fn sample(&mut self, stats: &TierStats) {
        for (max, now) in [
            (&mut self.offload_blocks_max, stats.offload_queue_blocks),
            (&mut self.disk_write_blocks_max, stats.disk_queue_blocks),
            (&mut self.disk_read_blocks_max, stats.read_queue_blocks),
            (&mut self.onboards_max, stats.onboards),
        ] {
            *max = now.max(*max);
        }
    }
}

impl Outcome {
    /// Blocks found in any tier.
    #[must_use]
    pub fn hit_blocks(&self) -> u64 {
        self.hits.device + self.hits.host + self.hits.disk
    }

    /// `blocks` as a share of all that were asked for.
    #[must_use]
    pub fn percent(&self, blocks: u64) -> f64 {
        real(blocks) / real(self.block_refs as u64).max(1.0) * 100.0
    }

    /// Blocks found in any tier, of all that were asked for.
    #[must_use]
    pub fn hit_percent(&self) -> f64 {
        self.percent(self.hit_blocks())
    }

    /// Blocks written to G2.
    #[must_use]
    pub const fn host_writes(&self) -> u64 {
        self.tiers.of(MoveKind::DeviceToHost).blocks
    }

    /// Blocks written to G3.
    #[must_use]
    pub const fn disk_writes(&self) -> u64 {
        self.tiers.of(MoveKind::HostToDisk).blocks
    }

    /// Blocks of G2 that were overwritten or made room.
    #[must_use]
    pub fn host_evictions(&self) -> u64 {
        let evicted = |reason: &Evicted| self.tiers.host_evicted(*reason);
        Evicted::ALL.iter().map(evicted).sum()
    }

    /// Blocks of G3 that were overwritten.
    #[must_use]
    pub fn disk_evictions(&self) -> u64 {
        let here = self.tiers.disk.cached + self.tiers.disk.active;
        self.disk_writes().saturating_sub(here as u64)
    }

    /// Requests played in a second of one core.
    #[must_use]
    pub fn requests_per_s(&self) -> f64 {
        real(self.requests as u64) / self.took.as_secs_f64().max(1e-9)
    }

    /// Bytes written to G3 in a day of such traffic, as whole writes of a drive of this size. 0
    /// for a trace without duration.
    #[must_use]
    pub fn drive_writes_per_day(&self, block_bytes: u64, drive_bytes: u64) -> f64 {
        let seconds = self.ended.as_secs_f64();
        if seconds == 0.0 || drive_bytes == 0 {
            return 0.0;
        }
        let bytes = real(self.disk_writes()) * real(block_bytes);
        bytes / real(drive_bytes) * (86_400.0 / seconds)
    }

    /// Blocks that did not reach a lower tier, by the reasons for which there were some.
    #[must_use]
    pub fn dropped(&self) -> Vec<(&'static str, u64)> {
        let counted = Dropped::ALL.iter().map(|reason| {
            let blocks = self.tiers.dropped(*reason);
            (reason.name(), blocks)
        });
        counted.filter(|(_, blocks)| *blocks > 0).collect()
    }

    /// All figures by name.
    #[must_use]
    pub fn figures(&self) -> Map<String, Value> {
        let Queues {
            offload_blocks_max,
            disk_write_blocks_max,
            disk_read_blocks_max,
            onboards_max,
            waiting_max,
        } = self.queues;
        let value = json!({
            "requests": self.requests,
            "block_refs": self.block_refs,
            "hit_percent": rounded(self.hit_percent()),
            "g1_hits": self.hits.device,
            "g2_hits": self.hits.host,
            "g3_hits": self.hits.disk,
            "g1_hit_percent": rounded(self.percent(self.hits.device)),
            "g2_hit_percent": rounded(self.percent(self.hits.host)),
            "g3_hit_percent": rounded(self.percent(self.hits.disk)),
            "g2_writes": self.host_writes(),
            "g3_writes": self.disk_writes(),
            "g2_evictions": self.host_evictions(),
            "g3_evictions": self.disk_evictions(),
            "failed_loads": self.failed_loads,
            "dropped": self.dropped().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "offload_queue_blocks_max": offload_blocks_max,
            "g3_write_queue_blocks_max": disk_write_blocks_max,
            "g3_read_queue_blocks_max": disk_read_blocks_max,
            "onboards_max": onboards_max,
            "waiting_requests_max": waiting_max,
            "trace_seconds": rounded(self.ended.as_secs_f64()),
            "requests_per_s": self.requests_per_s().round(),
        });
        match value {
            Value::Object(figures) => figures,
            _ => Map::new(),
        }
    }
}

/// Three digits after the point.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[expect(clippy::cast_precision_loss, reason = "counts and bytes below 2^53")]
pub(super) const fn real(count: u64) -> f64 {
    count as f64
}
