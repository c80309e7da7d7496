//! kvbm's pool as the scheduler sees it.

use blockplane_kvbm::{BlockPool, ImmutableBlock, MutableBlock};
use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};

use crate::scheduler::KvBlocks;

impl KvBlocks for BlockPool {
    type Shared = ImmutableBlock;
    type Owned = MutableBlock;

    fn total(&self) -> usize {
        self.stats().total
    }

    fn available(&self) -> usize {
        let stats = self.stats();
        stats.free + stats.cached
    }

    fn match_prefix(&self, blocks: &[TokenBlock]) -> Vec<ImmutableBlock> {
        Self::match_prefix(self, blocks)
    }

    fn contains(&self, name: TokenBlock) -> bool {
        self.peek_prefix(&[name]) == 1
    }

    fn allocate(&self, count: usize) -> Option<Vec<MutableBlock>> {
        Self::allocate(self, count).ok()
    }

    fn register(
        &self,
        blocks: Vec<(MutableBlock, TokenBlock, Option<SequenceHash>)>,
    ) -> Vec<ImmutableBlock> {
        let complete = blocks
            .into_iter()
            .map(|(block, name, parent)| block.complete(name, parent));
        Self::register(complete.collect())
    }

    fn shared_id(block: &ImmutableBlock) -> BlockId {
        block.id()
    }

    fn owned_id(block: &MutableBlock) -> BlockId {
        block.id()
    }
}
