//! A rank's blocks as the scheduler sees them: kvbm's pool, and the tiers below it.

use std::sync::Arc;

use blockplane_kvbm::{BlockPool, ImmutableBlock, MutableBlock};
use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};

use super::below::{Below, Lower};
use crate::scheduler::{Found, KvBlocks};

/// The pool of a rank, and the tiers below it if there are any.
#[derive(Clone, Debug)]
pub(crate) struct KvPool {
    pool: BlockPool,
    below: Option<Arc<dyn Below>>,
}

impl KvPool {
    pub(crate) fn new(pool: BlockPool, below: Option<Arc<dyn Below>>) -> Self {
        Self { pool, below }
    }

    /// Notes that a request asks for these blocks, once for each request.
    pub(crate) fn referenced(&self, blocks: &[TokenBlock]) {
        if let Some(below) = &self.below {
            below.referenced(blocks);
        }
    }

    /// Whether there are tiers below the pool.
    pub(crate) fn has_lower_tiers(&self) -> bool {
        self.below.is_some()
    }
}

impl KvBlocks for KvPool {
    type Shared = ImmutableBlock;
    type Owned = MutableBlock;
    type Lower = Box<dyn Lower>;

    fn total(&self) -> usize {
        self.pool.stats().total
    }

    fn available(&self) -> usize {
        let stats = self.pool.stats();
        stats.free + stats.cached
    }

    fn match_prefix(&self, blocks: &[TokenBlock]) -> Vec<ImmutableBlock> {
        self.pool.match_prefix(blocks)
    }

    fn extend_prefix(&self, prefix: Vec<ImmutableBlock>, blocks: &[TokenBlock]) -> Found<Self> {
        match &self.below {
            Some(below) => below.extend_prefix(prefix, blocks),
            None => Found::readable(prefix),
        }
    }

    fn offload(&self, blocks: &[TokenBlock], priority: Option<u32>) -> bool {
        let below = self.below.as_ref();
        below.is_none_or(|below| below.offload(blocks, priority))
    }

    fn contains(&self, name: TokenBlock) -> bool {
        self.pool.peek_prefix(&[name]) == 1
    }

    fn allocate(&self, count: usize) -> Option<Vec<MutableBlock>> {
        self.pool.allocate(count).ok()
    }

    fn register(
        &self,
        blocks: Vec<(MutableBlock, TokenBlock, Option<SequenceHash>)>,
    ) -> Vec<ImmutableBlock> {
        let complete = blocks
            .into_iter()
            .map(|(block, name, parent)| block.complete(name, parent));
        BlockPool::register(complete.collect())
    }

    fn shared_id(block: &ImmutableBlock) -> BlockId {
        block.id()
    }

    fn owned_id(block: &MutableBlock) -> BlockId {
        block.id()
    }
}
