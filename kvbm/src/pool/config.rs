//! How a pool behaves, and what it says about itself.

use blockplane_protocol::{DpRank, Tier};
use thiserror::Error;

/// How a pool behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// The rank that events name. Default 0.
    pub rank: DpRank,
    /// Keep released blocks and find them by their hash. Without it a released block is free at
    /// once, nothing is matched and no event is emitted. Default `true`.
    pub prefix_caching: bool,
    /// Events kept for subscribers that are behind; an event that names several blocks counts once
    /// per block. A subscriber that is further behind gets a snapshot. Worst case about 80 bytes
    /// each. Meaningless for a pool whose events go to hubs that it joins. Default 65,536.
    pub events_max: usize,
    /// Where the blocks are; events name it. Default [`Tier::Device`].
    pub tier: Tier,
}

/// Where the blocks of a pool are. The five parts add up to `total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// All blocks.
    pub total: usize,
    /// Blocks without contents.
    pub free: usize,
    /// Registered blocks held by nobody: found by their hash, evicted when room is needed.
    pub cached: usize,
    /// Blocks held by a handle.
    pub active: usize,
    /// Blocks a peer may still write to.
    pub quarantined: usize,
    /// Blocks that are never used again.
    pub retired: usize,
}

/// What a pool has done since it was made. The names are those of kvbm-logical's metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolActivity {
    /// Blocks handed out to be filled.
    pub allocations: u64,
    /// Those of them that were free.
    pub allocations_from_reset: u64,
    /// Blocks that lost their contents for others.
    pub evictions: u64,
    /// Blocks registered under a name.
    pub registrations: u64,
    /// Those of them whose name was there already: the block is free again, and the first one is used.
    pub registration_dedup: u64,
    /// Names for which a prefix was looked up.
    pub match_requested: u64,
    /// Blocks of such prefixes that were there.
    pub match_returned: u64,
    /// Names that were looked up one by one.
    pub scan_requested: u64,
    /// Those that were there.
    pub scan_returned: u64,
    /// Blocks that are held to be filled now, and have no name yet.
    pub filling: usize,
}

impl PoolActivity {
    /// Adds what another pool has done.
    pub(crate) fn add(&mut self, other: &Self) {
        self.allocations += other.allocations;
        self.allocations_from_reset += other.allocations_from_reset;
        self.evictions += other.evictions;
        self.registrations += other.registrations;
        self.registration_dedup += other.registration_dedup;
        self.match_requested += other.match_requested;
        self.match_returned += other.match_returned;
        self.scan_requested += other.scan_requested;
        self.scan_returned += other.scan_returned;
        self.filling += other.filling;
    }
}

impl PoolStats {
    /// Adds the blocks of another pool.
    pub(crate) fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.free += other.free;
        self.cached += other.cached;
        self.active += other.active;
        self.quarantined += other.quarantined;
        self.retired += other.retired;
    }
}

/// Not enough blocks are free or evictable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{wanted} blocks wanted, {available} of {total} are free or evictable")]
pub struct PoolExhausted {
    /// Blocks asked for.
    pub wanted: usize,
    /// Blocks that could have been had.
    pub available: usize,
    /// Blocks of the pool that are not retired.
    pub total: usize,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            rank: DpRank::default(),
            prefix_caching: true,
            events_max: 65_536,
            tier: Tier::Device,
        }
    }
}

impl PoolExhausted {
    /// Whether the same call may succeed later: not if the pool is too small altogether.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        self.wanted <= self.total
    }
}
