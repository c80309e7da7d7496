//! Both sides of a transforming copy.

use std::ops::Range;

use super::nest::{Loop, every_turn, simplify, turns};
use super::set::TensorSet;
use crate::plan::{BlockIds, BlockLayout, BlockSet};

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

    /// Whether a single pair of block sets says the same.
    pub(crate) fn is_plain(&self) -> bool {
        self.axes.len() <= 1
            && self
                .axes
                .iter()
                .all(|axis| u32::try_from(axis.count).is_ok())
    }

    /// Pairs of block sets (source, destination) that say the same, for lanes whose unit they are:
    /// the blocks, one of the loops as layers, and a set for each turn of the others.
    ///
    /// # Errors
    /// The number of sets, when it is above `sets_max`.
    pub(crate) fn lower(&self, sets_max: usize) -> Result<Vec<(BlockSet, BlockSet)>, u64> {
        let (layers, rest) = self.layers_and_rest();
        let sets = turns(&rest);
        if sets > sets_max as u64 {
            return Err(sets);
        }
        let mut out = Vec::new();
        every_turn(&rest, [0; 2], &mut |offsets| {
            out.push((
                self.set(&self.from, FROM, offsets, layers),
                self.set(&self.to, TO, offsets, layers),
            ));
            true
        });
        Ok(out)
    }

    /// The loop that becomes the layers of the sets: the innermost one, so that a set touches a
    /// block in one place; but the longest one where that leaves too many sets.
    fn layers_and_rest(&self) -> (Loop<2>, Vec<Loop<2>>) {
        /// More sets than this cost more than blocks that are touched in several places.
        const SETS_GOOD: u64 = 1 << 14;
        let mut rest = self.axes.clone();
        let fits = |axis: &&Loop<2>| u32::try_from(axis.count).is_ok();
        let inner = rest.last().filter(fits).copied();
        let longest = || rest.iter().filter(fits).max_by_key(|axis| axis.count);
        let layers = match inner {
            Some(inner) if turns(&rest) / inner.count <= SETS_GOOD => Some(inner),
            _ => longest().copied(),
        };
        let layers = layers.unwrap_or(Loop {
            count: 1,
            strides: [self.run_bytes; 2],
        });
        if let Some(at) = rest.iter().position(|axis| *axis == layers) {
            rest.remove(at);
        }
        (layers, rest)
    }

    fn set(&self, side: &TensorSide, at: usize, offsets: [u64; 2], layers: Loop<2>) -> BlockSet {
        let count = u32::try_from(layers.count).unwrap_or(u32::MAX);
        BlockSet {
            layout: BlockLayout {
                offset: side.base + offsets[at],
                blocks: side.blocks,
                block_stride: side.block_stride,
                layers: count,
                layer_stride: layers.strides[at],
                run_bytes: self.run_bytes,
            },
            ids: side.ids.clone(),
            layers: 0..count,
        }
    }
}
