//! Which blocks a group needs, and in which order it gives them up.

use std::ops::Range;

use blockplane_protocol::{AttentionKind, BlockId, SequenceHash};

use crate::evict::{EvictionKind, EvictionPolicy, Released};

/// The blocks that layers of this kind look at when they compute the token after `blocks` whole
/// blocks of `block_tokens` tokens each. Later tokens need no earlier ones.
///
/// # Panics
/// When `block_tokens` is 0.
#[must_use]
pub fn blocks_needed(kind: AttentionKind, block_tokens: u32, blocks: usize) -> Range<usize> {
    match kind {
        AttentionKind::Full | AttentionKind::Latent => 0..blocks,
        AttentionKind::SlidingWindow { window } => {
            // The window has the token itself in it.
            let earlier = window.saturating_sub(1) as usize;
            let tokens = blocks.saturating_mul(block_tokens as usize);
            tokens.saturating_sub(earlier) / block_tokens as usize..blocks
        }
    }
}

/// The policy for the pool of a group.
///
/// With a window a block is of use without the one before it, and it is the older ones that are
/// behind the window of most requests. So nothing is put before its parent there, and blocks go in
/// the order in which they were released.
pub(super) fn policy(kind: AttentionKind, eviction: EvictionKind) -> Box<dyn EvictionPolicy> {
    match kind {
        AttentionKind::Full | AttentionKind::Latent => eviction.build(),
        AttentionKind::SlidingWindow { .. } => Box::new(WithoutParents(eviction.build())),
    }
}

/// A policy that is not told which block follows which.
#[derive(Debug)]
struct WithoutParents(Box<dyn EvictionPolicy>);

impl EvictionPolicy for WithoutParents {
    fn resize(&mut self, blocks: u32) {
        self.0.resize(blocks);
    }

    fn used(&mut self, block: BlockId, name: SequenceHash) {
        self.0.used(block, name);
    }

    fn insert(&mut self, released: Released) {
        self.0.insert(Released {
            parent: None,
            ..released
        });
    }

    fn remove(&mut self, block: BlockId) {
        self.0.remove(block);
    }

    fn evict(&mut self) -> Option<BlockId> {
        self.0.evict()
    }

    fn forget(&mut self, block: BlockId, name: SequenceHash) {
        self.0.forget(block, name);
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token by token, by the definition of the window.
    #[test]
    fn a_window_needs_the_blocks_that_its_tokens_are_in() {
        for block_tokens in 1..5u32 {
            for window in 1..14u32 {
                for blocks in 0..8usize {
                    let kind = AttentionKind::SlidingWindow { window };
                    let next = blocks as i64 * i64::from(block_tokens);
                    let seen = (next - i64::from(window) + 1..next).filter(|token| *token >= 0);
                    let mut touched: Vec<usize> = seen
                        .map(|token| usize::try_from(token).unwrap() / block_tokens as usize)
                        .collect();
                    touched.dedup();
                    let needed: Vec<usize> = blocks_needed(kind, block_tokens, blocks).collect();
                    assert_eq!(needed, touched, "{block_tokens} {window} {blocks}");
                }
            }
        }
        assert_eq!(blocks_needed(AttentionKind::Full, 16, 3), 0..3);
        assert_eq!(blocks_needed(AttentionKind::Latent, 16, 0), 0..0);
    }
}
