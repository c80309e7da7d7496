//! Caches of models whose layers attend differently: some to every token, some to a window.
//!
//! Layers of one attention kind form a *group* with a pool of its own, whose blocks hold the KV of
//! those layers only. A prefix is of use when each group has the blocks that its layers look at from
//! the next token on: all of them with full or latent attention, the last few with a sliding window.
//! So the groups need different numbers of blocks, keep different ones, and give up different ones.

mod cache;
mod rule;
mod size;

pub use cache::{GroupedBlocks, GroupedCache};
pub use rule::blocks_needed;
pub use size::{GroupError, GroupSize, split};
