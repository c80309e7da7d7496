//! What the scheduler needs of a block pool.

use std::fmt;

use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};

/// A pool of KV blocks with a prefix cache. Dropping a block of either kind returns it.
pub trait KvBlocks: fmt::Debug {
    /// A readable block, registered under its hash; several sequences may hold it.
    type Shared: fmt::Debug;
    /// A block that one sequence writes.
    type Owned: fmt::Debug;
    /// Blocks that tiers below the pool hold for a sequence, until they are loaded or it is dropped.
    type Lower: fmt::Debug;

    /// Blocks of the pool.
    fn total(&self) -> usize;

    /// Blocks that [`KvBlocks::allocate`] could hand out now.
    fn available(&self) -> usize;

    /// The longest readable prefix of `blocks`, held.
    fn match_prefix(&self, blocks: &[TokenBlock]) -> Vec<Self::Shared>;

    /// Continues `prefix`, the readable beginning of `blocks`, over all tiers: the longest run of
    /// blocks from the first that are readable or lie in a lower tier, each held where it is.
    fn extend_prefix(&self, prefix: Vec<Self::Shared>, blocks: &[TokenBlock]) -> Found<Self>;

    /// Tells lower tiers of consecutive blocks of one sequence that were computed here, or by
    /// another worker for it, and are readable now. They may copy them. False when the request's
    /// `priority` is too low for it: they are not told of its later blocks either.
    fn offload(&self, blocks: &[TokenBlock], priority: Option<u32>) -> bool;

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

/// What [`KvBlocks::extend_prefix`] found.
#[derive(Debug)]
pub struct Found<B: KvBlocks + ?Sized> {
    /// One for each block of the run: readable, or `None` where it lies in a lower tier.
    pub blocks: Vec<Option<B::Shared>>,
    /// Holds the blocks of the lower tiers; present if there are any.
    pub lower: Option<B::Lower>,
}

impl<B: KvBlocks + ?Sized> Found<B> {
    /// Only readable blocks.
    #[must_use]
    pub fn readable(blocks: Vec<B::Shared>) -> Self {
        Self {
            blocks: blocks.into_iter().map(Some).collect(),
            lower: None,
        }
    }
}
