//! A registered block: shared, readable, never written again.

use std::{fmt, sync::Arc};

use blockplane_protocol::{BlockId, SequenceHash};

use crate::pool::Shared;

/// A share in a registered block. While one exists the block stays where it is with its contents;
/// after the last is dropped the block is inactive: still found by its hash until it is evicted.
#[must_use = "dropping the handle makes the block evictable"]
pub struct ImmutableBlock {
    pool: Arc<Shared>,
    id: BlockId,
    hash: SequenceHash,
}

impl ImmutableBlock {
    /// A share that the pool has counted already.
    pub(crate) fn counted(pool: Arc<Shared>, id: BlockId, hash: SequenceHash) -> Self {
        Self { pool, id, hash }
    }

    /// Its place in the pool's arena.
    #[must_use]
    pub fn id(&self) -> BlockId {
        self.id
    }

    /// The name it is found under.
    #[must_use]
    pub fn hash(&self) -> SequenceHash {
        self.hash
    }
}

impl Clone for ImmutableBlock {
    fn clone(&self) -> Self {
        self.pool.retain(self.id);
        Self {
            pool: Arc::clone(&self.pool),
            id: self.id,
            hash: self.hash,
        }
    }
}

impl Drop for ImmutableBlock {
    fn drop(&mut self) {
        self.pool.release(self.id, self.hash);
    }
}

impl fmt::Debug for ImmutableBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImmutableBlock")
            .field("id", &self.id.0)
            .field("hash", &self.hash)
            .finish_non_exhaustive()
    }
}
