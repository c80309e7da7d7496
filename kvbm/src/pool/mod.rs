//! The books of one tier: allocation, sharing, eviction, and the events that tell others.

mod config;
#[cfg(all(test, loom))]
mod loom_tests;
mod shared;
mod slot;
mod store;

use std::{fmt, sync::Arc};

use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};
pub use config::{PoolActivity, PoolConfig, PoolExhausted, PoolStats};

#[cfg(not(loom))]
use crate::arena::KvArena;
use crate::{
    block::{
        CompleteBlock, HeldBlocks, ImmutableBlock, Lease, LeasedBlocks, MutableBlock, Quarantine,
    },
    events::{EventFeed, EventHub, JoinError},
    evict::{EvictionKind, EvictionPolicy},
};
#[cfg(not(loom))]
pub(crate) use shared::HashIsUniform;
pub(crate) use shared::{Shared, lock_all};
pub(crate) use store::Found;

/// The blocks of one tier. Cheap to clone; all clones are the same pool. Handles keep the pool, and
/// with it the arena, alive.
///
/// One mutex guards the books; no operation does I/O, waits or runs foreign code under it.
#[derive(Clone)]
pub struct BlockPool {
    shared: Arc<Shared>,
}

/// A pool that is being described.
#[derive(Debug)]
#[must_use = "a description is not a pool"]
pub struct PoolBuilder {
    config: PoolConfig,
    policy: Box<dyn EvictionPolicy>,
    own_hub: bool,
}

impl BlockPool {
    /// A pool over all blocks of `arena` that evicts the least recently used first.
    #[cfg(not(loom))]
    #[must_use]
    pub fn new(arena: Arc<KvArena>, config: PoolConfig) -> Self {
        Self::builder(config).over(arena)
    }

    /// A pool of `blocks` blocks without memory behind them that evicts the least recently used
    /// first: for simulations, and for tiers whose ids name something else than memory.
    ///
    /// # Panics
    /// When `blocks` is 2^32 - 2 or more.
    #[must_use]
    pub fn accounting(blocks: u32, config: PoolConfig) -> Self {
        Self::builder(config).accounting(blocks)
    }

    /// As [`BlockPool::accounting`], with an eviction policy of the caller's.
    ///
    /// # Panics
    /// When `blocks` is 2^32 - 2 or more.
    #[must_use]
    pub fn accounting_with(
        blocks: u32,
        config: PoolConfig,
        policy: Box<dyn EvictionPolicy>,
    ) -> Self {
        Self::builder(config).policy(policy).accounting(blocks)
    }

    /// Describes a pool: least recently used first, with an event hub of its own.
    pub fn builder(config: PoolConfig) -> PoolBuilder {
        PoolBuilder {
            config,
            policy: EvictionKind::default().build(),
            own_hub: true,
        }
    }

    /// Lets the pool tell its changes to `hub` too. Subscribers of the hub learn what the pool holds
    /// already by a snapshot. Nothing changes when it is a member.
    ///
    /// # Errors
    /// [`JoinError`] when the hub has ended or has [`HUB_POOLS_MAX`](crate::events::HUB_POOLS_MAX)
    /// pools.
    pub fn join(&self, hub: &Arc<EventHub>) -> Result<(), JoinError> {
        hub.join(&self.shared).map(drop)
    }

    /// The memory of the blocks; `None` for a pool made by [`BlockPool::accounting`].
    #[cfg(not(loom))]
    #[must_use]
    pub fn arena(&self) -> Option<&Arc<KvArena>> {
        self.shared.arena()
    }

    /// Takes `n` blocks to fill: free ones first, then the inactive ones that the eviction policy
    /// gives up. All or none.
    ///
    /// # Errors
    /// [`PoolExhausted`] when fewer are free or inactive. Nothing is evicted then.
    pub fn allocate(&self, n: usize) -> Result<Vec<MutableBlock>, PoolExhausted> {
        self.shared.allocate(n)
    }

    /// [`BlockPool::allocate`] behind one handle: for those who fill blocks together.
    ///
    /// # Errors
    /// [`PoolExhausted`] when fewer are free or inactive. Nothing is evicted then.
    pub fn lease(&self, n: usize) -> Result<LeasedBlocks, PoolExhausted> {
        let ids = self.shared.lease(n)?;
        Ok(LeasedBlocks::counted(Arc::clone(&self.shared), ids))
    }

    /// Takes as many blocks as there are, `n` at most. Says how many were evicted for that.
    pub(crate) fn lease_up_to(&self, n: usize) -> (LeasedBlocks, usize) {
        let (ids, evicted) = self.shared.lease_up_to(n);
        (
            LeasedBlocks::counted(Arc::clone(&self.shared), ids),
            evicted,
        )
    }

    /// Holds those of `names` that are here, in order, behind one handle.
    pub fn hold(&self, names: &[TokenBlock]) -> HeldBlocks {
        let found = self.shared.hold(|store, found| {
            found.reserve(names.len());
            found.extend(names.iter().filter_map(|name| store.acquire(name.sequence)));
            store.scanned(names.len(), found.len());
        });
        HeldBlocks::counted(Arc::clone(&self.shared), found)
    }

    /// Holds the longest prefix of `blocks` that is here, in order.
    #[must_use = "dropping the blocks makes them evictable"]
    pub fn match_prefix(&self, blocks: &[TokenBlock]) -> Vec<ImmutableBlock> {
        self.shared.acquire(|store, found| {
            found.extend(
                blocks
                    .iter()
                    .map_while(|block| store.acquire(block.sequence)),
            );
            store.matched(blocks.len(), found.len());
        })
    }

    /// Holds each of `names` that is here; `None` in the place of one that is not.
    #[must_use = "dropping the blocks makes them evictable"]
    pub fn scan(&self, names: &[TokenBlock]) -> Vec<Option<ImmutableBlock>> {
        let mut missing = Vec::with_capacity(names.len());
        let found = self.shared.acquire(|store, found| {
            for name in names {
                let block = store.acquire(name.sequence);
                missing.push(block.is_none());
                found.extend(block);
            }
            store.scanned(names.len(), found.len());
        });
        let mut found = found.into_iter();
        let block = |missing| if missing { None } else { found.next() };
        missing.into_iter().map(block).collect()
    }

    /// Holds up to `n` blocks that would be evicted next, the first one first: to move them to
    /// another tier before they are overwritten. They are still found by their names; give them up
    /// with [`ImmutableBlock::forget_unshared`].
    #[must_use = "dropping the blocks makes them the ones used last"]
    pub fn victims(&self, n: usize) -> Vec<ImmutableBlock> {
        self.shared
            .acquire(|store, found| store.victims(n, |block| found.push(block)))
    }

    /// Whether a block of that name is here. It may have changed on return.
    #[must_use]
    pub fn contains(&self, name: SequenceHash) -> bool {
        self.shared.books().store.contains(name)
    }

    /// [`BlockPool::contains`] for each of `names`, at one moment.
    #[must_use]
    pub fn contains_each(&self, names: impl IntoIterator<Item = SequenceHash>) -> Vec<bool> {
        let books = self.shared.books();
        let names = names.into_iter();
        names.map(|name| books.store.contains(name)).collect()
    }

    /// The place of the first of `names` that is here.
    pub(crate) fn first_present(&self, names: &[TokenBlock]) -> Option<usize> {
        let books = self.shared.books();
        let here = |name: &TokenBlock| books.store.contains(name.sequence);
        names.iter().position(here)
    }

    /// Leaves those of `names` that are not here, and returns the others.
    pub(crate) fn split_present(&self, names: &mut Vec<TokenBlock>) -> Vec<TokenBlock> {
        let books = self.shared.books();
        let mut present = Vec::new();
        names.retain(|name| {
            let here = books.store.contains(name.sequence);
            if here {
                present.push(*name);
            }
            !here
        });
        present
    }

    /// Counts as a use of those of `names` that are here, without holding them.
    pub fn touch(&self, names: impl IntoIterator<Item = SequenceHash>) {
        let mut books = self.shared.books();
        names.into_iter().for_each(|name| books.store.touch(name));
    }

    /// Takes a name away: it is not matched any more, and the block is free when its last holder is
    /// gone. Emits `Removed`. False when no block of that name is here.
    pub fn forget(&self, name: SequenceHash) -> bool {
        self.shared
            .forget(|store| store.forget(name).then_some(name))
    }

    /// Registers blocks that exist already (in a store that outlived its process), held by nobody,
    /// each in the slot that it names. Give them in the order of their use, the oldest first, and
    /// parents before children. Returns how many there are now: a slot that is out of range or in
    /// use, a name that is taken, or one that does not belong to the tokens and the parent is left
    /// out. Subscribers learn of them by a snapshot.
    ///
    /// A pool without prefix caching restores nothing.
    pub fn restore(
        &self,
        blocks: impl IntoIterator<Item = (BlockId, TokenBlock, Option<SequenceHash>)>,
    ) -> usize {
        self.shared.restore(blocks.into_iter())
    }

    /// How many leading `blocks` are here. Holds nothing: it may have changed on return.
    #[must_use]
    pub fn peek_prefix(&self, blocks: &[TokenBlock]) -> usize {
        let books = self.shared.books();
        blocks
            .iter()
            .take_while(|block| books.store.contains(block.sequence))
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
            let mut books = self.shared.books();
            for lease in &leases {
                books.store.quarantine(lease.id());
            }
        }
        Quarantine::counted(leases.into_iter().map(MutableBlock::new).collect())
    }

    /// Forgets all cached contents: nothing registered so far will be matched again, and held
    /// blocks are free once they are released. Emits one `Cleared` event, or sends the subscribers
    /// of a hub with other pools a snapshot of what is left.
    pub fn clear(&self) {
        self.shared.clear();
    }

    /// Where the blocks are now.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.shared.books().store.stats()
    }

    /// What it has done, and does.
    #[must_use]
    pub fn activity(&self) -> PoolActivity {
        self.shared.books().store.activity
    }

    /// The events of the hub of this pool, the first one that it joined if there are several. They
    /// end at once where there is none. A feed does not keep the pool alive.
    #[must_use]
    pub fn events(&self) -> EventFeed {
        self.shared.hub().feed()
    }
}

impl PoolBuilder {
    /// Which block is overwritten first.
    pub fn eviction(self, kind: EvictionKind) -> Self {
        self.policy(kind.build())
    }

    /// An eviction policy of the caller's.
    pub fn policy(mut self, policy: Box<dyn EvictionPolicy>) -> Self {
        self.policy = policy;
        self
    }

    /// The pool has no event hub of its own; its events go to those that it
    /// [joins](BlockPool::join).
    pub fn without_own_events(mut self) -> Self {
        self.own_hub = false;
        self
    }

    /// A pool over all blocks of `arena`.
    #[cfg(not(loom))]
    #[must_use]
    pub fn over(self, arena: Arc<KvArena>) -> BlockPool {
        self.build(arena.blocks(), Some(arena))
    }

    /// A pool of `blocks` blocks without memory behind them.
    ///
    /// # Panics
    /// When `blocks` is 2^32 - 2 or more.
    #[must_use]
    pub fn accounting(self, blocks: u32) -> BlockPool {
        self.build(
            blocks,
            #[cfg(not(loom))]
            None,
        )
    }

    fn build(self, blocks: u32, #[cfg(not(loom))] arena: Option<Arc<KvArena>>) -> BlockPool {
        let shared = Shared::new(
            blocks,
            #[cfg(not(loom))]
            arena,
            self.config,
            self.policy,
        );
        if self.own_hub {
            let PoolConfig {
                rank, events_max, ..
            } = self.config;
            EventHub::new(rank, events_max, crate::events::Consolidation::Passthrough)
                .join(&shared)
                .expect("a new hub has room");
        }
        BlockPool { shared }
    }
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockPool")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
