//! Which inactive block is overwritten first.

mod kind;
mod lineage;
mod lists;
mod lru;
mod multi_lru;
mod s3_fifo;
mod sketch;

use std::fmt::Debug;

use blockplane_protocol::{BlockId, SequenceHash};
pub use kind::{EvictionKind, UnknownEviction};
pub use lineage::Lineage;
pub use lru::Lru;
pub use multi_lru::MultiLru;
pub use s3_fifo::S3Fifo;

/// Orders the inactive blocks of one pool by how soon they may be overwritten.
///
/// The pool calls it under its lock: every method must be short and must not call back into the
/// pool. A block is inserted at most once before it is removed or evicted.
pub trait EvictionPolicy: Debug + Send {
    /// Tells the policy how many blocks the pool has. Called once, before anything else; ids given
    /// later are below `blocks`.
    fn resize(&mut self, blocks: u32);

    /// `block` was stored under `name`, or a request asked for it, whether it is held or not.
    fn used(&mut self, block: BlockId, name: SequenceHash) {
        let _ = (block, name);
    }

    /// A block became inactive.
    fn insert(&mut self, released: Released);

    /// `block` is in use again, or was forgotten for another reason.
    fn remove(&mut self, block: BlockId);

    /// Takes out the block to overwrite next.
    fn evict(&mut self) -> Option<BlockId>;

    /// The contents of `block` have lost their `name`: what is there next is another block. Called
    /// before [`EvictionPolicy::remove`] if it is inactive, after [`EvictionPolicy::evict`].
    fn forget(&mut self, block: BlockId, name: SequenceHash) {
        let _ = (block, name);
    }

    /// All contents have lost their names.
    fn clear(&mut self);

    /// Inactive blocks.
    fn len(&self) -> usize;

    /// Whether there is no inactive block.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A block that nobody holds any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// Where it is.
    pub block: BlockId,
    /// The name it is found under.
    pub name: SequenceHash,
    /// The block before it in its sequence, if that is in the pool (held or inactive): once it is
    /// gone `block` cannot be reached, so it should go after `block`.
    pub parent: Option<BlockId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn sized<P: EvictionPolicy + Default>(blocks: u32) -> P {
        let mut policy = P::default();
        policy.resize(blocks);
        policy
    }

    /// Of the block that tests put into slot `block`.
    pub(super) fn name(block: u32) -> SequenceHash {
        SequenceHash(u64::from(block + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    pub(super) fn insert(policy: &mut dyn EvictionPolicy, block: u32, parent: Option<u32>) {
        policy.insert(Released {
            block: BlockId(block),
            name: name(block),
            parent: parent.map(BlockId),
        });
    }

    pub(super) fn drain(policy: &mut dyn EvictionPolicy) -> Vec<u32> {
        std::iter::from_fn(|| policy.evict().map(|block| block.0)).collect()
    }
}
