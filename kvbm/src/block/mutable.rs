//! A block that one owner fills, and the same block once it is full.

use std::{fmt, sync::Arc};

use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};

use super::ImmutableBlock;
use crate::pool::Shared;

/// The exclusive right to fill a block. Dropping it returns the block to its pool.
///
/// As long as a peer may still write into the block it must not be dropped: hand it to
/// [`BlockPool::quarantine`](crate::BlockPool::quarantine) when the end of the write is unknown.
#[must_use = "dropping the handle returns the block to the pool"]
pub struct MutableBlock {
    lease: Lease,
}

/// A block whose every byte is in place and that nobody writes to, not yet found by others.
/// Dropping it returns the block to its pool.
#[must_use = "dropping the handle returns the block to the pool"]
pub struct CompleteBlock {
    lease: Lease,
    hashes: TokenBlock,
    parent: Option<SequenceHash>,
}

/// Exclusive ownership of a slot; returns it to the free list on drop.
pub(crate) struct Lease {
    /// `None` once the slot has gone elsewhere.
    pool: Option<Arc<Shared>>,
    id: BlockId,
}

impl MutableBlock {
    pub(crate) fn new(lease: Lease) -> Self {
        Self { lease }
    }

    /// Its place in the pool's arena.
    #[must_use]
    pub fn id(&self) -> BlockId {
        self.lease.id
    }

    /// Declares that the keys and values of all the block's tokens, in all layers, are in place
    /// (invariant 1). `parent` is the sequence hash of the block before it, `None` for the first
    /// block of a sequence.
    ///
    /// # Panics
    /// When `hashes.sequence` is not the hash of `hashes.block` after `parent`: the block would be
    /// found under a name that is not its own (invariant 2).
    pub fn complete(self, hashes: TokenBlock, parent: Option<SequenceHash>) -> CompleteBlock {
        super::assert_named(hashes, parent);
        CompleteBlock {
            lease: self.lease,
            hashes,
            parent,
        }
    }

    /// Takes the slot out of use for good, as one that cannot be written: it counts as
    /// [retired](crate::PoolStats::retired).
    pub fn retire(self) {
        let id = self.lease.id;
        self.lease.dissolve().retire_lease(id);
    }

    pub(crate) fn into_lease(self) -> Lease {
        self.lease
    }
}

impl CompleteBlock {
    /// Its place in the pool's arena.
    #[must_use]
    pub fn id(&self) -> BlockId {
        self.lease.id
    }

    /// The name it will be found under.
    #[must_use]
    pub fn hash(&self) -> SequenceHash {
        self.hashes.sequence
    }

    /// Makes the block readable for everyone who asks for its sequence hash.
    ///
    /// If the pool already has a block of that name, the result is that block and this one returns
    /// to the pool: read the id from the result.
    #[must_use = "dropping the handle makes the block evictable"]
    pub fn register(self) -> ImmutableBlock {
        Shared::register(self)
    }

    pub(crate) fn parts(&self) -> (BlockId, TokenBlock, Option<SequenceHash>) {
        (self.lease.id, self.hashes, self.parent)
    }

    pub(crate) fn pool(&self) -> &Arc<Shared> {
        self.lease.pool()
    }

    pub(crate) fn into_lease(self) -> Lease {
        self.lease
    }
}

impl Lease {
    pub(crate) fn new(pool: Arc<Shared>, id: BlockId) -> Self {
        Self {
            pool: Some(pool),
            id,
        }
    }

    pub(crate) fn id(&self) -> BlockId {
        self.id
    }

    pub(crate) fn pool(&self) -> &Arc<Shared> {
        self.pool.as_ref().expect("a live lease names its pool")
    }

    /// Gives up the lease without returning the slot: the caller has accounted for it.
    pub(crate) fn dissolve(mut self) -> Arc<Shared> {
        self.pool.take().expect("a live lease names its pool")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.release_lease(self.id);
        }
    }
}

impl fmt::Debug for MutableBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MutableBlock").field(&self.id().0).finish()
    }
}

impl fmt::Debug for CompleteBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompleteBlock")
            .field("id", &self.id().0)
            .field("hash", &self.hash())
            .finish_non_exhaustive()
    }
}
