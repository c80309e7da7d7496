//! Which inactive block is overwritten first.

mod lru;

use std::fmt::Debug;

use blockplane_protocol::BlockId;
pub use lru::Lru;

/// Orders the inactive blocks of one pool by how soon they may be overwritten.
///
/// The pool calls it under its lock: every method must be short and must not call back into the
/// pool. A block is inserted at most once before it is removed or evicted.
pub trait EvictionPolicy: Debug + Send {
    /// Tells the policy how many blocks the pool has. Called once, before anything else; ids given
    /// later are below `blocks`.
    fn resize(&mut self, blocks: u32);

    /// `block` became inactive. `parent` is the block before it in its sequence if that one is
    /// inactive too: once it is gone `block` cannot be reached, so it should go after `block`.
    fn insert(&mut self, block: BlockId, parent: Option<BlockId>);

    /// `block` is in use again, or was forgotten for another reason.
    fn remove(&mut self, block: BlockId);

    /// Takes out the block to overwrite next.
    fn evict(&mut self) -> Option<BlockId>;

    /// Inactive blocks.
    fn len(&self) -> usize;

    /// Whether there is no inactive block.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
