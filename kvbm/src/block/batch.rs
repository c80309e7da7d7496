//! Several blocks of one pool behind one handle: what is taken and given back together costs one
//! step, not one for each block.

use std::{fmt, sync::Arc};

use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};

use super::{ImmutableBlock, Lease, MutableBlock};
use crate::pool::{Found, Shared};

/// The exclusive right to fill some blocks of one pool: many [`MutableBlock`]s.
/// Dropping it returns them to the pool.
#[must_use = "dropping the handle returns the blocks to the pool"]
pub struct LeasedBlocks {
    pool: Arc<Shared>,
    ids: Vec<BlockId>,
}

/// Shares in some registered blocks of one pool: many [`ImmutableBlock`]s,
/// given up together.
#[must_use = "dropping the handle makes the blocks evictable"]
pub struct HeldBlocks {
    pool: Arc<Shared>,
    found: Vec<Found>,
}

impl LeasedBlocks {
    /// Blocks that the pool has leased.
    pub(crate) fn counted(pool: Arc<Shared>, ids: Vec<BlockId>) -> Self {
        Self { pool, ids }
    }

    /// Their places in the pool's arena.
    #[must_use]
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// How many they are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Declares that every byte of every block is in place, and makes them readable: as
    /// [`MutableBlock::complete`] and
    /// [`BlockPool::register`](crate::BlockPool::register), in order. A block whose name the pool
    /// has already is free again; its place in the result has the one that was there.
    ///
    /// # Panics
    /// When there is not one name for each block, or a name is not that of its block after its
    /// parent.
    pub fn register(
        mut self,
        names: impl IntoIterator<Item = (TokenBlock, Option<SequenceHash>)>,
    ) -> HeldBlocks {
        let mut names = names.into_iter();
        let found = self.ids.iter().map(|&id| {
            let (hashes, parent) = names.next().expect("one name for each block");
            super::assert_named(hashes, parent);
            Found { id, hashes, parent }
        });
        let mut found: Vec<Found> = found.collect();
        assert!(names.next().is_none(), "one block for each name");
        // From here on the pool counts shares in them.
        self.ids.clear();
        self.pool.register_leased(&mut found);
        HeldBlocks::counted(Arc::clone(&self.pool), found)
    }

    /// Makes those readable into which the bytes of held blocks were copied, under their names, and
    /// holds none of them; the others are left. `copied` says it for each source.
    pub(crate) fn register_copies(&mut self, sources: &HeldBlocks, copied: impl Fn(usize) -> bool) {
        self.pool
            .register_copies(&mut self.ids, &sources.found, copied);
    }

    /// Those for which `first` holds, by their place, and the others.
    pub(crate) fn split(mut self, first: impl Fn(usize) -> bool) -> (Self, Self) {
        let ids = std::mem::take(&mut self.ids);
        let mut parts = [Vec::with_capacity(ids.len()), Vec::new()];
        for (at, id) in ids.into_iter().enumerate() {
            parts[usize::from(!first(at))].push(id);
        }
        let [left, right] = parts.map(|ids| Self::counted(Arc::clone(&self.pool), ids));
        (left, right)
    }

    /// One handle for each.
    pub(crate) fn into_each(mut self) -> Vec<MutableBlock> {
        let ids = std::mem::take(&mut self.ids);
        let lease = |id| MutableBlock::new(Lease::new(Arc::clone(&self.pool), id));
        ids.into_iter().map(lease).collect()
    }
}

impl HeldBlocks {
    /// Shares that the pool has counted.
    pub(crate) fn counted(pool: Arc<Shared>, found: Vec<Found>) -> Self {
        Self { pool, found }
    }

    /// How many they are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Their places in the pool's arena.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = BlockId> + '_ {
        self.found.iter().map(|found| found.id)
    }

    /// Their names.
    pub fn names(&self) -> impl ExactSizeIterator<Item = TokenBlock> + '_ {
        self.found.iter().map(|found| found.hashes)
    }

    pub(crate) fn found(&self) -> &[Found] {
        &self.found
    }

    /// The same shares behind one handle.
    ///
    /// # Panics
    /// When there is none, or they are of different pools.
    pub(crate) fn gather(blocks: Vec<ImmutableBlock>) -> Self {
        let first = blocks.first().expect("at least one share");
        let pool = Arc::clone(first.pool());
        for block in &blocks {
            assert!(
                Arc::ptr_eq(block.pool(), &pool),
                "block {} is of another pool",
                block.id().0
            );
        }
        let found = blocks.into_iter().map(|block| block.dissolve().1);
        Self {
            found: found.collect(),
            pool,
        }
    }

    /// The same shares behind one handle each.
    pub(crate) fn into_each(mut self) -> Vec<ImmutableBlock> {
        let found = std::mem::take(&mut self.found);
        let share = |found| ImmutableBlock::counted(Arc::clone(&self.pool), found);
        found.into_iter().map(share).collect()
    }

    /// Gives up those from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len < self.found.len() {
            self.pool.release_all(&self.found[len..]);
            self.found.truncate(len);
        }
    }

    /// Gives up those that are not kept; each is asked for once, in order.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&Found) -> bool) {
        let mut gone = Vec::new();
        self.found.retain(|found| {
            let kept = keep(found);
            if !kept {
                gone.push(*found);
            }
            kept
        });
        if !gone.is_empty() {
            self.pool.release_all(&gone);
        }
    }
}

impl Drop for LeasedBlocks {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            self.pool.release_leases(&self.ids);
        }
    }
}

impl Drop for HeldBlocks {
    fn drop(&mut self) {
        if !self.found.is_empty() {
            self.pool.release_all(&self.found);
        }
    }
}

impl fmt::Debug for LeasedBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LeasedBlocks").field(&self.ids).finish()
    }
}

impl fmt::Debug for HeldBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ids()).finish()
    }
}
