//! What the scheduler needs of a block pool.

use std::fmt;

use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};

/// A pool of KV blocks with a prefix cache. Dropping a block of either kind returns it.
pub trait KvBlocks: fmt::Debug {
    /// A readable block, registered under its hash; several sequences may hold it.
    type Shared: fmt::Debug;
    /// A block that one sequence writes.
    type Owned: fmt::Debug;

    /// Blocks of the pool.
    fn total(&self) -> usize;

    /// Blocks that [`KvBlocks::allocate`] could hand out now.
    fn available(&self) -> usize;

    /// The longest readable prefix of `blocks`, held.
    fn match_prefix(&self, blocks: &[TokenBlock]) -> Vec<Self::Shared>;

    /// Whether a block is readable under this name.
    fn contains(&self, name: TokenBlock) -> bool;

    /// `count` blocks, or `None` and nothing changed when there are not so many.
    fn allocate(&self, count: usize) -> Option<Vec<Self::Owned>>;

    /// Makes blocks readable whose every byte is in place (invariant 1), given with their name and
    /// the one before it. Where another block is already readable under a name, that one is
    /// returned and the block given goes back to the pool.
    fn register(
        &self,
        blocks: Vec<(Self::Owned, TokenBlock, Option<SequenceHash>)>,
    ) -> Vec<Self::Shared>;

    /// Index of a shared block.
    fn shared_id(block: &Self::Shared) -> BlockId;

    /// Index of an owned block.
    fn owned_id(block: &Self::Owned) -> BlockId;
}
