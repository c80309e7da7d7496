//! Both sides of a transforming copy.

use std::ops::Range;

use super::nest::{Loop, simplify, turns};
use super::order::Axis;
use super::set::TensorSet;
use crate::plan::{BlockIds, BlockLayout, BlockSet, Order};

/// Blocks of one side of a [`TensorPair`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorSide {
    /// Offset in the region of what is moved of block 0.
    pub(crate) base: u64,
    /// Blocks of the layout; ids are below.
    pub(crate) blocks: u32,
    /// Bytes from one block to the next.
    pub(crate) block_stride: u64,
    /// The i-th pairs with the i-th of the other side.
    pub(crate) ids: BlockIds,
}

/// A copy that rearranges, as a nest of loops around a run that is contiguous on both sides:
///
/// ```text
/// for i in 0..blocks, for each index (k0, k1, ..) of `axes`:
///     to.base   + to.ids[i]   * to.block_stride   + sum(k * axes[k].strides[TO])
///   = from.base + from.ids[i] * from.block_stride + sum(k * axes[k].strides[FROM])     run_bytes
/// ```
///
/// Offsets count from the start of each region. `from` is the source, whichever side posts. No two
/// runs share a byte of the destination, and all of them lie in their regions. What is contiguous
/// on both sides is part of the run already, and loops that go on alike on both sides are one, so
/// that at most four are left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorPair {
    pub(crate) from: TensorSide,
    pub(crate) to: TensorSide,
    /// The loops inside of a block by falling stride at the destination: the last one makes the
    /// smallest steps there. Each has at least two turns; strides are `[FROM, TO]`.
    pub(crate) axes: Vec<Loop<2>>,
    /// So many of them have larger steps at the destination than the blocks: a copy has them
    /// outside of the loop over the blocks.
    pub(crate) outer: usize,
    /// Contiguous bytes.
    pub(crate) run_bytes: u64,
}

/// Index of the source in the strides of an axis.
pub(crate) const FROM: usize = 0;
/// Index of the destination.
pub(crate) const TO: usize = 1;

impl TensorPair {
    /// Plans a copy between two parts of the same shape with equally many ids.
    pub(crate) fn new(from: &TensorSet, to: &TensorSet) -> Self {
        let mut axes: Vec<Loop<2>> = from
            .axes
            .iter()
            .zip(&to.axes)
            .map(|(from, to)| Loop {
                count: from.count.into(),
                strides: [from.stride, to.stride],
            })
            .collect();
        let run_bytes = simplify(&mut axes, from.run_bytes);
        let outer = axes.partition_point(|axis| axis.strides[TO] > to.block_stride);
        let side = |set: &TensorSet| TensorSide {
            base: set.base,
            blocks: set.blocks,
            block_stride: set.block_stride,
            ids: set.ids.clone(),
        };
        Self {
            from: side(from),
            to: side(to),
            axes,
            outer,
            run_bytes,
        }
    }

    /// The bytes of the source's region ([`FROM`]) or the destination's ([`TO`]) from the first to
    /// the last that the copy touches.
    pub(crate) fn touched(&self, end: usize) -> Range<u64> {
        let side = if end == FROM { &self.from } else { &self.to };
        let at = |id: Option<u32>| side.base + u64::from(id.unwrap_or(0)) * side.block_stride;
        let steps = self
            .axes
            .iter()
            .map(|axis| (axis.count - 1) * axis.strides[end]);
        let last = at(side.ids.max()) + steps.sum::<u64>() + self.run_bytes;
        at(side.ids.iter().min())..last
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.from.ids.len() as u64
    }

    /// Runs in all blocks.
    pub(crate) fn runs(&self) -> u64 {
        self.blocks().saturating_mul(turns(&self.axes))
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.runs().saturating_mul(self.run_bytes)
    }

    /// Whether block sets without inner loops say the same.
    pub(crate) fn is_plain(&self) -> bool {
        self.axes.len() <= 1
    }

    /// The block sets (source, destination) that say the same, and the order in which to walk them:
    /// the first loop is their layers, the others are inside of them.
    pub(crate) fn sets(&self) -> (BlockSet, BlockSet, Order) {
        let order = match self.outer {
            0 => Order::BlockMajor,
            _ => Order::LayerMajor,
        };
        (self.set(&self.from, FROM), self.set(&self.to, TO), order)
    }

    fn set(&self, side: &TensorSide, at: usize) -> BlockSet {
        // Loops are joined up to 32 bits.
        let axis = |one: &Loop<2>| Axis {
            count: u32::try_from(one.count).unwrap_or(u32::MAX),
            stride: one.strides[at],
        };
        let mut axes = self.axes.iter().map(axis);
        let layers = axes.next().unwrap_or(Axis {
            count: 1,
            stride: self.run_bytes,
        });
        let layout = BlockLayout {
            offset: side.base,
            blocks: side.blocks,
            block_stride: side.block_stride,
            layers: layers.count,
            layer_stride: layers.stride,
            run_bytes: self.run_bytes,
        };
        BlockSet {
            inner: axes.collect(),
            ..BlockSet::new(layout, side.ids.clone(), 0..layers.count)
        }
    }
}
