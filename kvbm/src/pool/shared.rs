//! A pool as its handles see it: the books behind their lock, and who is told of changes.

use std::{
    hash::Hasher,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use blockplane_protocol::{BlockId, DpRank, SequenceHash, StoredBlock, Tier, TokenBlock};

use super::{
    PoolConfig, PoolExhausted,
    store::{Found, Registered, Store, stored_block},
};
#[cfg(not(loom))]
use crate::arena::KvArena;
use crate::{
    block::{CompleteBlock, ImmutableBlock, Lease, MutableBlock},
    events::{Change, EventHub, Membership, Wakeups},
    evict::EvictionPolicy,
    sync::{BooksGuard, BooksLock},
};

/// What all handles of a pool share. Lock order: the books of several pools in the order of their
/// numbers, then one hub's own lock.
#[derive(Debug)]
pub(crate) struct Shared {
    books: BooksLock<Books>,
    /// Unlike that of any other pool of the process.
    number: u64,
    rank: DpRank,
    tier: Tier,
    blocks: usize,
    /// Kept alive by the handles.
    #[cfg(not(loom))]
    arena: Option<Arc<KvArena>>,
}

/// What the lock of a pool guards.
#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) store: Store,
    /// The hubs that are told of changes.
    pub(crate) memberships: Vec<Membership>,
}

impl Shared {
    pub(super) fn new(
        blocks: u32,
        #[cfg(not(loom))] arena: Option<Arc<KvArena>>,
        config: PoolConfig,
        policy: Box<dyn EvictionPolicy>,
    ) -> Arc<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            books: BooksLock::new(Books {
                store: Store::new(blocks, config.prefix_caching, policy),
                memberships: Vec::new(),
            }),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            rank: config.rank,
            tier: config.tier,
            blocks: blocks as usize,
            #[cfg(not(loom))]
            arena,
        })
    }

    #[cfg(not(loom))]
    pub(super) fn arena(&self) -> Option<&Arc<KvArena>> {
        self.arena.as_ref()
    }

    pub(crate) fn tier(&self) -> Tier {
        self.tier
    }

    pub(super) fn books(&self) -> BooksGuard<'_, Books> {
        self.books.lock()
    }

    pub(super) fn hub(&self) -> Arc<EventHub> {
        let first = self.books().memberships.first().cloned();
        first.map_or_else(|| EventHub::ended(self.rank), |membership| membership.hub)
    }

    pub(super) fn allocate(self: &Arc<Self>, n: usize) -> Result<Vec<MutableBlock>, PoolExhausted> {
        let lease = |id| MutableBlock::new(Lease::new(Arc::clone(self), id));
        Ok(self.lease(n)?.into_iter().map(lease).collect())
    }

    pub(super) fn lease(&self, n: usize) -> Result<Vec<BlockId>, PoolExhausted> {
        self.take(|_| n).map(|(ids, _)| ids)
    }

    /// As many blocks as there are, `n` at most, and how many were evicted for them.
    pub(super) fn lease_up_to(&self, n: usize) -> (Vec<BlockId>, usize) {
        let taken = self.take(|store| store.available().min(n));
        taken.expect("it takes what is available")
    }

    fn take(
        &self,
        wanted: impl FnOnce(&Store) -> usize,
    ) -> Result<(Vec<BlockId>, usize), PoolExhausted> {
        let mut wakeups = Wakeups::default();
        let taken = {
            let Books { store, memberships } = &mut *self.books();
            let wanted = wanted(store);
            let mut ids = Vec::with_capacity(wanted.min(self.blocks));
            let evicted = store.allocate(wanted, |id| ids.push(id))?;
            if !evicted.is_empty() {
                tell(memberships, Change::Removed(evicted), &mut wakeups);
            }
            (ids, evicted.len())
        };
        wakeups.fire();
        Ok(taken)
    }

    /// Handles of the blocks that `hold` held.
    pub(super) fn acquire(
        self: &Arc<Self>,
        hold: impl FnOnce(&mut Store, &mut Vec<Found>),
    ) -> Vec<ImmutableBlock> {
        let found = self.hold(hold).into_iter();
        found
            .map(|found| ImmutableBlock::counted(Arc::clone(self), found))
            .collect()
    }

    /// The blocks that `hold` held.
    pub(super) fn hold(&self, hold: impl FnOnce(&mut Store, &mut Vec<Found>)) -> Vec<Found> {
        let mut found = Vec::new();
        hold(&mut self.books().store, &mut found);
        found
    }

    pub(crate) fn register(block: CompleteBlock) -> ImmutableBlock {
        let (own, hashes, parent) = block.parts();
        let pool = block.pool();
        let mut wakeups = Wakeups::default();
        let found = {
            let Books { store, memberships } = &mut *pool.books();
            match store.register(own, hashes, parent, None) {
                Registered::New => {
                    let stored = [(parent, stored_block(hashes))];
                    tell(memberships, Change::Stored(&stored), &mut wakeups);
                    store.found(own)
                }
                Registered::Private => store.found(own),
                Registered::Duplicate(first) => store.found(first),
            }
        };
        wakeups.fire();
        ImmutableBlock::counted(block.into_lease().dissolve(), found)
    }

    /// Registers leased blocks under the names that come with them, and says which block each name
    /// has.
    pub(crate) fn register_leased(&self, blocks: &mut [Found]) {
        let mut wakeups = Wakeups::default();
        {
            let Books { store, memberships } = &mut *self.books();
            let mut stored = Vec::new();
            let mut before = None;
            for block in blocks {
                block.id = register(
                    store,
                    block,
                    &mut before,
                    !memberships.is_empty(),
                    &mut stored,
                );
            }
            if !stored.is_empty() {
                tell(memberships, Change::Stored(&stored), &mut wakeups);
            }
        }
        wakeups.fire();
    }

    /// Registers those of `leased` that are copies under the names of their sources, and lets them
    /// go; the others stay. `copied` says it for each source.
    pub(crate) fn register_copies(
        &self,
        leased: &mut Vec<BlockId>,
        sources: &[Found],
        copied: impl Fn(usize) -> bool,
    ) {
        let mut wakeups = Wakeups::default();
        {
            let Books { store, memberships } = &mut *self.books();
            let mut stored = Vec::new();
            let mut registered = Vec::with_capacity(leased.len());
            let mut before = None;
            let mut at = 0..;
            leased.retain(|&id| {
                let at = at.next().expect("it does not end");
                let copy = copied(at);
                if copy {
                    let block = Found { id, ..sources[at] };
                    let told = !memberships.is_empty();
                    let id = register(store, &block, &mut before, told, &mut stored);
                    registered.push((id, block.hashes.sequence));
                }
                !copy
            });
            if !stored.is_empty() {
                tell(memberships, Change::Stored(&stored), &mut wakeups);
            }
            for (id, name) in registered {
                store.release(id, name);
            }
        }
        wakeups.fire();
    }

    pub(super) fn register_all(blocks: Vec<CompleteBlock>) -> Vec<ImmutableBlock> {
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
        let mut found = Vec::with_capacity(blocks.len());
        let mut stored = Vec::with_capacity(blocks.len());
        let mut wakeups = Wakeups::default();
        {
            let Books { store, memberships } = &mut *pool.books();
            for (own, hashes, parent) in blocks.iter().map(CompleteBlock::parts) {
                let id = match store.register(own, hashes, parent, None) {
                    Registered::New => {
                        stored.push((parent, stored_block(hashes)));
                        own
                    }
                    Registered::Private => own,
                    Registered::Duplicate(first) => first,
                };
                found.push(store.found(id));
            }
            if !stored.is_empty() {
                tell(memberships, Change::Stored(&stored), &mut wakeups);
            }
        }
        wakeups.fire();
        blocks
            .into_iter()
            .zip(found)
            .map(|(block, found)| ImmutableBlock::counted(block.into_lease().dissolve(), found))
            .collect()
    }

    /// Tells of the name that `take` took away; false when there was none.
    pub(super) fn forget(&self, take: impl FnOnce(&mut Store) -> Option<SequenceHash>) -> bool {
        let mut wakeups = Wakeups::default();
        let taken = {
            let Books { store, memberships } = &mut *self.books();
            let taken = take(store);
            if let Some(name) = taken {
                tell(memberships, Change::Removed(&[name]), &mut wakeups);
            }
            taken
        };
        wakeups.fire();
        taken.is_some()
    }

    /// Takes the name of a held block away if `holders_max` at most hold it.
    pub(crate) fn withdraw(&self, id: BlockId, hash: SequenceHash, holders_max: u32) -> bool {
        self.forget(|store| {
            (store.holders(id) <= holders_max && store.withdraw(id)).then_some(hash)
        })
    }

    /// Takes the name of a held block away and its slot out of use.
    pub(crate) fn condemn(&self, id: BlockId, hash: SequenceHash) {
        self.forget(|store| {
            let named = store.withdraw(id);
            store.condemn(id);
            named.then_some(hash)
        });
    }

    pub(super) fn restore(
        &self,
        blocks: impl Iterator<Item = (BlockId, TokenBlock, Option<SequenceHash>)>,
    ) -> usize {
        let mut wakeups = Wakeups::default();
        let mut names = Vec::with_capacity(blocks.size_hint().0.min(self.blocks));
        {
            let Books { store, memberships } = &mut *self.books();
            for (id, hashes, parent) in blocks {
                // Invariant 2: a name that is not the block's own is not taken on trust.
                if SequenceHash::extend(parent, hashes.block) == hashes.sequence
                    && store.restore(id, hashes, parent)
                {
                    names.push(hashes.sequence);
                }
            }
            store.restored();
            if !names.is_empty() {
                let told = |hub: &Membership, wakeups: &mut _| {
                    hub.tell_restored(names.iter().copied(), wakeups)
                };
                memberships.retain(|hub| told(hub, &mut wakeups));
            }
        }
        wakeups.fire();
        names.len()
    }

    pub(super) fn clear(&self) {
        let mut wakeups = Wakeups::default();
        {
            let Books { store, memberships } = &mut *self.books();
            memberships.retain(|hub| hub.tell_cleared(store.names(), &mut wakeups));
            store.clear();
        }
        wakeups.fire();
    }

    pub(crate) fn release_lease(&self, id: BlockId) {
        self.books().store.release_lease(id);
    }

    pub(crate) fn retire_lease(&self, id: BlockId) {
        self.books().store.retire_lease(id);
    }

    pub(crate) fn lift_quarantine(&self, ids: impl Iterator<Item = BlockId>) {
        let mut books = self.books();
        ids.for_each(|id| books.store.lift_quarantine(id));
    }

    pub(crate) fn retain(&self, id: BlockId) {
        self.books().store.retain(id);
    }

    pub(crate) fn release_all(&self, blocks: &[Found]) {
        let mut books = self.books();
        for block in blocks {
            books.store.release(block.id, block.hashes.sequence);
        }
    }

    pub(crate) fn release_leases(&self, ids: &[BlockId]) {
        let mut books = self.books();
        ids.iter().for_each(|id| books.store.release_lease(*id));
    }

    pub(crate) fn release(&self, id: BlockId, hash: SequenceHash) {
        self.books().store.release(id, hash);
    }
}

/// Registers a leased block and says which one its name has; `before` is the last one that came by
/// here, and is often its parent. What is new is noted if it is `told` to somebody.
fn register(
    store: &mut Store,
    block: &Found,
    before: &mut Option<BlockId>,
    told: bool,
    stored: &mut Vec<(Option<SequenceHash>, StoredBlock)>,
) -> BlockId {
    let id = match store.register(block.id, block.hashes, block.parent, *before) {
        Registered::New => {
            if told {
                stored.push((block.parent, stored_block(block.hashes)));
            }
            block.id
        }
        Registered::Private => block.id,
        Registered::Duplicate(first) => first,
    };
    *before = Some(id);
    id
}

/// The books of all `pools`, at one moment and in their order.
pub(crate) fn lock_all(pools: &[Arc<Shared>]) -> Vec<BooksGuard<'_, Books>> {
    let mut order: Vec<usize> = (0..pools.len()).collect();
    order.sort_by_key(|&index| pools[index].number);
    let mut locked: Vec<(usize, BooksGuard<'_, Books>)> = order
        .into_iter()
        .map(|index| (index, pools[index].books()))
        .collect();
    locked.sort_by_key(|(index, _)| *index);
    locked.into_iter().map(|(_, books)| books).collect()
}

/// Tells all hubs; those that have ended are told nothing any more.
fn tell(memberships: &mut Vec<Membership>, change: Change<'_>, wakeups: &mut Wakeups) {
    memberships.retain(|hub| hub.tell(change, wakeups));
}

impl Drop for Shared {
    fn drop(&mut self) {
        for membership in std::mem::take(&mut self.books.get_mut().memberships) {
            membership.hub.close();
        }
    }
}

/// Takes a hash for what it is: sequence hashes are uniform already.
#[derive(Debug, Default)]
pub(crate) struct HashIsUniform(u64);

impl Hasher for HashIsUniform {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("only 64-bit hashes are keys here");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
