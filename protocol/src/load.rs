//! What a worker reports about its load.

use serde::{Deserialize, Serialize};

use crate::id::DpRank;

/// A snapshot of one rank, sent with the KV events and on change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadReport {
    /// The rank.
    pub rank: DpRank,
    /// Blocks in the pool.
    pub blocks_total: u32,
    /// Blocks held by running requests.
    pub blocks_active: u32,
    /// Blocks that hold reusable KV and are held by nobody.
    pub blocks_cached: u32,
    /// Blocks that cannot be reused yet because a peer may still write to them.
    pub blocks_quarantined: u32,
    /// Requests being computed.
    pub requests_running: u32,
    /// Requests waiting for blocks or for a slot.
    pub requests_waiting: u32,
    /// Prompt tokens accepted and not yet computed.
    pub prefill_tokens_queued: u64,
    /// Prompt tokens computed since start.
    pub prefill_tokens_total: u64,
    /// Prompt tokens found in the cache since start, in any tier.
    pub cached_tokens_total: u64,
    /// Those of them that were loaded from host memory (G2).
    pub cached_host_tokens_total: u64,
    /// Those that were loaded from disk (G3).
    pub cached_disk_tokens_total: u64,
    /// Those that were loaded from an object store or another worker (G4).
    pub cached_remote_tokens_total: u64,
    /// Requests for which lower tiers did not give all that they had found since start.
    pub onboard_failures_total: u64,
    /// Tokens generated since start.
    pub decode_tokens_total: u64,
    /// KV bytes received from or sent to other workers since start.
    pub transfer_bytes_total: u64,
    /// KV blocks received from or sent to other workers since start.
    pub transfer_blocks_total: u64,
    /// Requests preempted for want of blocks since start.
    pub preemptions_total: u64,
    /// The tiers below the pool. All ranks of a worker share them; its first rank reports them.
    pub lower: LowerTiers,
    /// How well the KV events of an engine in another process are followed; nothing is wrong with those
    /// of an engine in the worker's own.
    pub events: EventsReport,
}

/// What is wrong with the KV events that a worker has from an engine in another process. All are zero
/// when nothing is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventsReport {
    /// The engine's events do not come.
    pub disconnected: bool,
    /// The engine may hold blocks that are not known.
    pub partial: bool,
    /// The engine's blocks have another size than the worker registered, so none can be told.
    pub wrong_block_size: bool,
    /// Times that events were missing since start.
    pub gaps_total: u64,
    /// Times that all was forgotten and learned anew since start.
    pub resyncs_total: u64,
    /// Events about blocks whose beginning is not known since start.
    pub orphans_total: u64,
}

/// What the tiers below a worker's pools hold. A tier that is not there has no blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LowerTiers {
    /// Blocks of host memory (G2).
    pub host_blocks_total: u32,
    /// Those that hold KV.
    pub host_blocks_used: u32,
    /// Blocks of the disk (G3).
    pub disk_blocks_total: u32,
    /// Those that hold KV.
    pub disk_blocks_used: u32,
    /// Blocks known to be in an object store or with another worker (G4).
    pub remote_blocks: u32,
}
