//! A registered block: shared, readable, never written again.

use std::{fmt, sync::Arc};

use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};

use crate::pool::{Found, Shared};

/// A share in a registered block. While one exists the block stays where it is with its contents;
/// after the last is dropped the block is inactive: still found by its hash until it is evicted.
#[must_use = "dropping the handle makes the block evictable"]
pub struct ImmutableBlock {
    /// `None` once the share has gone elsewhere.
    pool: Option<Arc<Shared>>,
    found: Found,
}

impl ImmutableBlock {
    /// A share that the pool has counted already.
    pub(crate) fn counted(pool: Arc<Shared>, found: Found) -> Self {
        Self {
            pool: Some(pool),
            found,
        }
    }

    /// Its place in the pool's arena.
    #[must_use]
    pub fn id(&self) -> BlockId {
        self.found.id
    }

    /// The name it is found under.
    #[must_use]
    pub fn hash(&self) -> SequenceHash {
        self.found.hashes.sequence
    }

    /// The hashes of its tokens and of the sequence that ends with it.
    #[must_use]
    pub fn name(&self) -> TokenBlock {
        self.found.hashes
    }

    /// The block before it; `None` for the first block of a sequence.
    #[must_use]
    pub fn parent(&self) -> Option<SequenceHash> {
        self.found.parent
    }

    /// Gives the block up, unless somebody else holds it: nobody finds it any more, and it is free
    /// at once. Emits `Removed`. False, and nothing but this share is gone, when there are other
    /// holders.
    ///
    /// For a [victim](crate::BlockPool::victims) that has been moved elsewhere.
    pub fn forget_unshared(self) -> bool {
        self.pool().withdraw(self.id(), self.hash(), 1)
    }

    /// Takes the name away, for all, and the slot out of use for good: it is
    /// [retired](crate::PoolStats::retired) when its last holder is gone. For a block that cannot be
    /// read back. Emits `Removed`.
    pub fn retire(self) {
        self.pool().condemn(self.id(), self.hash());
    }

    pub(crate) fn pool(&self) -> &Arc<Shared> {
        self.pool.as_ref().expect("a live share names its pool")
    }

    /// Gives up the handle without giving up the share: the caller has it now.
    pub(crate) fn dissolve(mut self) -> (Option<Arc<Shared>>, Found) {
        (self.pool.take(), self.found)
    }
}

impl Clone for ImmutableBlock {
    fn clone(&self) -> Self {
        self.pool().retain(self.id());
        Self::counted(Arc::clone(self.pool()), self.found)
    }
}

impl Drop for ImmutableBlock {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.release(self.id(), self.hash());
        }
    }
}

impl fmt::Debug for ImmutableBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImmutableBlock")
            .field("id", &self.id().0)
            .field("hash", &self.hash())
            .finish_non_exhaustive()
    }
}
