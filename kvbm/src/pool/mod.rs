//! The G1 pool: allocation, sharing, eviction, and the events that tell others.

mod store;

use std::{fmt, sync::Arc};

use blockplane_protocol::{BlockId, DpRank, SequenceHash, StoredBlock, Tier, TokenBlock};
use parking_lot::Mutex;
use thiserror::Error;

use crate::{
    arena::KvArena,
    block::{CompleteBlock, ImmutableBlock, Lease, MutableBlock, Quarantine},
    events::{EventFeed, EventLog, KvSnapshot, Ring, Wakeups},
    evict::{EvictionPolicy, Lru},
};
pub(crate) use store::HashIsUniform;
use store::{Registered, Store};

/// The blocks of one rank. Cheap to clone; all clones are the same pool. Handles keep the pool, and
/// with it the arena, alive.
///
/// One mutex guards the books; no operation does I/O, waits or runs foreign code under it.
#[derive(Clone)]
pub struct BlockPool {
    shared: Arc<Shared>,
}

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
    /// each. Default 65,536.
    pub events_max: usize,
}

/// Where the blocks of a pool are. The four parts add up to `total`.
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
}

/// Not enough blocks are free or evictable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{wanted} blocks wanted, {available} of {total} are free or evictable")]
pub struct PoolExhausted {
    /// Blocks asked for.
    pub wanted: usize,
    /// Blocks that could have been had.
    pub available: usize,
    /// Blocks of the pool.
    pub total: usize,
}

impl BlockPool {
    /// A pool over all blocks of `arena` that evicts the least recently used first.
    #[must_use]
    pub fn new(arena: Arc<KvArena>, config: PoolConfig) -> Self {
        Self::with_policy(arena, config, Box::<Lru>::default())
    }

    /// A pool over all blocks of `arena` with an eviction policy of the caller's.
    #[must_use]
    pub fn with_policy(
        arena: Arc<KvArena>,
        config: PoolConfig,
        policy: Box<dyn EvictionPolicy>,
    ) -> Self {
        Self::build(arena.blocks(), Some(arena), config, policy)
    }

    /// A pool of `blocks` blocks without memory behind them, for simulations.
    #[must_use]
    pub fn accounting(blocks: u32, config: PoolConfig) -> Self {
        Self::build(blocks, None, config, Box::<Lru>::default())
    }

    fn build(
        blocks: u32,
        arena: Option<Arc<KvArena>>,
        config: PoolConfig,
        policy: Box<dyn EvictionPolicy>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                store: Mutex::new(Store::new(blocks, config.prefix_caching, policy)),
                log: Arc::new(EventLog::new(config.rank, config.events_max)),
                arena,
                blocks: blocks as usize,
            }),
        }
    }

    /// The memory of the blocks; `None` for a pool made by [`BlockPool::accounting`].
    #[must_use]
    pub fn arena(&self) -> Option<&Arc<KvArena>> {
        self.shared.arena.as_ref()
    }

    /// Takes `n` blocks to fill: free ones first, then the inactive ones that the eviction policy
    /// gives up. All or none.
    ///
    /// # Errors
    /// [`PoolExhausted`] when fewer are free or inactive. Nothing is evicted then.
    pub fn allocate(&self, n: usize) -> Result<Vec<MutableBlock>, PoolExhausted> {
        let shared = &self.shared;
        let mut blocks = Vec::with_capacity(n.min(shared.blocks));
        let wakeups = {
            let mut store = shared.store.lock();
            let evicted = store.allocate(n, |id| {
                blocks.push(MutableBlock::new(Lease::new(Arc::clone(shared), id)));
            })?;
            (!evicted.is_empty()).then(|| {
                let tier = Tier::Device;
                shared.log.append(|ring| ring.push_removed(evicted, tier))
            })
        };
        wakeups.into_iter().for_each(Wakeups::fire);
        Ok(blocks)
    }

    /// Holds the longest prefix of `blocks` that is here, in order.
    #[must_use = "dropping the blocks makes them evictable"]
    pub fn match_prefix(&self, blocks: &[TokenBlock]) -> Vec<ImmutableBlock> {
        let mut ids = Vec::new();
        {
            let mut store = self.shared.store.lock();
            ids.extend(
                blocks
                    .iter()
                    .map_while(|block| Some((store.acquire(block.sequence)?, block.sequence))),
            );
        }
        ids.into_iter()
            .map(|(id, hash)| ImmutableBlock::counted(Arc::clone(&self.shared), id, hash))
            .collect()
    }

    /// How many leading `blocks` are here. Holds nothing: it may have changed on return.
    #[must_use]
    pub fn peek_prefix(&self, blocks: &[TokenBlock]) -> usize {
        let store = self.shared.store.lock();
        blocks
            .iter()
            .take_while(|block| store.contains(block.sequence))
            .count()
    }

    /// Registers complete blocks of one pool, in order, as [`CompleteBlock::register`] does, with
    /// one event for each run of consecutive new blocks.
    ///
    /// # Panics
    /// When the blocks are of different pools.
    #[must_use = "dropping the blocks makes them evictable"]
    pub fn register(blocks: Vec<CompleteBlock>) -> Vec<ImmutableBlock> {
        Shared::register_all(blocks)
    }

    /// Sets blocks aside that a peer may still write to.
    ///
    /// # Panics
    /// When a block is of another pool.
    pub fn quarantine(&self, blocks: Vec<MutableBlock>) -> Quarantine {
        let leases: Vec<Lease> = blocks.into_iter().map(MutableBlock::into_lease).collect();
        for lease in &leases {
            assert!(
                Arc::ptr_eq(lease.pool(), &self.shared),
                "block {} is of another pool",
                lease.id().0
            );
        }
        {
            let mut store = self.shared.store.lock();
            for lease in &leases {
                store.quarantine(lease.id());
            }
        }
        Quarantine::counted(leases.into_iter().map(MutableBlock::new).collect())
    }

    /// Forgets all cached contents: nothing registered so far will be matched again, and held
    /// blocks are free once they are released. Emits one `Cleared` event.
    pub fn clear(&self) {
        let wakeups = {
            let mut store = self.shared.store.lock();
            store.clear();
            self.shared.log.append(Ring::push_cleared)
        };
        wakeups.fire();
    }

    /// Where the blocks are now.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.shared.store.lock().stats()
    }

    /// The events of this pool. A feed does not keep the pool alive.
    #[must_use]
    pub fn events(&self) -> EventFeed {
        EventFeed::new(Arc::clone(&self.shared.log), Arc::downgrade(&self.shared))
    }
}

/// What all handles of a pool share. Lock order: `store`, then the log's own lock.
pub(crate) struct Shared {
    store: Mutex<Store>,
    log: Arc<EventLog>,
    arena: Option<Arc<KvArena>>,
    blocks: usize,
}

impl Shared {
    pub(crate) fn register(block: CompleteBlock) -> ImmutableBlock {
        let (id, hashes, parent) = block.parts();
        let pool = block.pool();
        let mut wakeups = None;
        let id = {
            let mut store = pool.store.lock();
            match store.register(id, hashes, parent) {
                Registered::New => {
                    let stored = [stored_block(hashes)];
                    let push = |ring: &mut Ring| ring.push_stored(parent, &stored, Tier::Device);
                    wakeups = Some(pool.log.append(push));
                    id
                }
                Registered::Private => id,
                Registered::Duplicate(first) => first,
            }
        };
        wakeups.into_iter().for_each(Wakeups::fire);
        ImmutableBlock::counted(block.into_lease().dissolve(), id, hashes.sequence)
    }

    pub(crate) fn register_all(blocks: Vec<CompleteBlock>) -> Vec<ImmutableBlock> {
        let Some(first) = blocks.first() else {
            return Vec::new();
        };
        let pool = Arc::clone(first.pool());
        for block in &blocks {
            assert!(
                Arc::ptr_eq(block.pool(), &pool),
                "block {} is of another pool",
                block.id().0
            );
        }
        let mut ids = Vec::with_capacity(blocks.len());
        let mut stored = Vec::with_capacity(blocks.len());
        let mut wakeups = None;
        {
            let mut store = pool.store.lock();
            for (own, hashes, parent) in blocks.iter().map(CompleteBlock::parts) {
                ids.push(match store.register(own, hashes, parent) {
                    Registered::New => {
                        stored.push((parent, stored_block(hashes)));
                        own
                    }
                    Registered::Private => own,
                    Registered::Duplicate(first) => first,
                });
            }
            if !stored.is_empty() {
                wakeups = Some(pool.log.append(|ring| push_runs(ring, &stored)));
            }
        }
        wakeups.into_iter().for_each(Wakeups::fire);
        blocks
            .into_iter()
            .zip(ids)
            .map(|(block, id)| {
                let hash = block.hash();
                ImmutableBlock::counted(block.into_lease().dissolve(), id, hash)
            })
            .collect()
    }

    pub(crate) fn release_lease(&self, id: BlockId) {
        self.store.lock().release_lease(id);
    }

    pub(crate) fn lift_quarantine(&self, ids: impl Iterator<Item = BlockId>) {
        let mut store = self.store.lock();
        ids.for_each(|id| store.lift_quarantine(id));
    }

    pub(crate) fn retain(&self, id: BlockId) {
        self.store.lock().retain(id);
    }

    pub(crate) fn release(&self, id: BlockId, hash: SequenceHash) {
        self.store.lock().release(id, hash);
    }

    /// What can be found now, and the event it is the state after.
    pub(crate) fn snapshot(&self) -> KvSnapshot {
        let (last_event_id, blocks) = {
            let store = self.store.lock();
            (self.log.last_id(), store.published())
        };
        KvSnapshot::sorted(last_event_id, blocks)
    }
}

/// One `Stored` event for each run of blocks that follow one another.
fn push_runs(ring: &mut Ring, stored: &[(Option<SequenceHash>, StoredBlock)]) {
    for run in stored.chunk_by(|(_, before), (parent, _)| *parent == Some(before.sequence)) {
        let blocks: Vec<StoredBlock> = run.iter().map(|(_, block)| *block).collect();
        ring.push_stored(run[0].0, &blocks, Tier::Device);
    }
}

fn stored_block(hashes: TokenBlock) -> StoredBlock {
    StoredBlock {
        block: hashes.block,
        sequence: hashes.sequence,
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.log.close();
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            rank: DpRank::default(),
            prefix_caching: true,
            events_max: 65_536,
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

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockPool")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
