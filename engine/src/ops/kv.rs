//! How an engine sees the blocks that hold keys and values.

use std::ptr::NonNull;

use blockplane_kvbm::KvArena;
use blockplane_protocol::{BlockId, KvLayout, LayerIndex};

/// Memory of a block pool.
///
/// # Safety
/// For every block below `blocks()` and every layer of `layout()`, `run_ptr` must point to
/// `layout().layer_bytes()` bytes that stay mapped, readable and writable as long as the view
/// lives, aligned to the element type, and no two runs may overlap.
///
/// A view does not know who uses which block. Whoever names a block to
/// [`Executor::forward`](crate::model::Executor::forward) owns it in the sense of the block pool:
/// until the call returns nobody else writes the tokens that it reads, and nobody else reads or
/// writes the tokens that it writes.
pub unsafe trait KvView: Sync {
    /// Shape of the pool.
    fn layout(&self) -> &KvLayout;

    /// Blocks in the pool.
    fn blocks(&self) -> u32;

    /// Start of one layer of one block: `[plane][head][token][dim]`.
    fn run_ptr(&self, block: BlockId, layer: LayerIndex) -> NonNull<u8>;
}

// SAFETY: the arena maps all its blocks for as long as it lives, with the strides of its layout,
// which keep runs apart and whole.
unsafe impl KvView for KvArena {
    fn layout(&self) -> &KvLayout {
        Self::layout(self)
    }

    fn blocks(&self) -> u32 {
        Self::blocks(self)
    }

    fn run_ptr(&self, block: BlockId, layer: LayerIndex) -> NonNull<u8> {
        Self::run_ptr(self, block, layer)
    }
}
