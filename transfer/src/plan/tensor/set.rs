//! One side of a transforming copy.

use super::nest::{Loop, every_turn, simplify, turns};
use super::order::{Axis, KvAxis};
use crate::plan::{BlockIds, BlockSet};

/// A part of some blocks of a region, checked against the layout and the region: nothing is empty
/// but perhaps the ids, no two runs share a byte unless an id is named twice, and all of them lie
/// in the region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorSet {
    /// First byte of the part in block 0.
    pub(crate) base: u64,
    /// Blocks of the layout; ids are below.
    pub(crate) blocks: u32,
    pub(crate) block_stride: u64,
    pub(crate) ids: BlockIds,
    /// Layers, planes, tokens, heads.
    pub(crate) axes: [Axis; 4],
    /// Bytes of one head of one token.
    pub(crate) run_bytes: u64,
}

/// Where the tokens are among the axes of a set.
const TOKENS: usize = 2;

impl TensorSet {
    /// The axes with their names.
    pub(crate) fn named(&self) -> impl Iterator<Item = (KvAxis, Axis)> + '_ {
        KvAxis::ALL[1..].iter().copied().zip(self.axes)
    }

    pub(crate) const fn tokens(&self) -> u32 {
        self.axes[TOKENS].count
    }

    /// Every `of`-th block from number `first` on.
    pub(crate) fn every(mut self, of: usize, first: usize) -> Self {
        self.ids = self.ids.iter().skip(first).step_by(of).collect();
        self
    }

    /// The first `count` blocks.
    pub(crate) fn first(mut self, count: usize) -> Self {
        if count < self.ids.len() {
            self.ids = self.ids.iter().take(count).collect();
        }
        self
    }

    /// A range of `count` tokens out of those that the set names.
    pub(crate) fn with_tokens(mut self, first: u32, count: u32) -> Self {
        let axis = &mut self.axes[TOKENS];
        axis.count = count;
        self.base += u64::from(first) * axis.stride;
        self
    }

    /// Contiguous stretches of a block, as offsets to where the block begins, and their length.
    pub(crate) fn stretches(&self) -> Stretches {
        let mut loops = self.axes.map(Loop::from).to_vec();
        let bytes = simplify(&mut loops, self.run_bytes);
        Stretches { loops, bytes }
    }

    /// Where a block begins.
    pub(crate) fn block_at(&self, id: u32) -> u64 {
        // Ids are below the number of blocks, all of which lie in the region.
        self.base + u64::from(id) * self.block_stride
    }

    /// First byte and end of everything that the set can reach.
    pub(crate) fn reach(&self) -> (u64, u64) {
        let inside: u64 = self
            .axes
            .iter()
            .map(|axis| u64::from(axis.count - 1).saturating_mul(axis.stride))
            .fold(self.run_bytes, u64::saturating_add);
        let (first, last) = match self.ids.list() {
            None => (self.ids.at(0), self.ids.max().unwrap_or(0)),
            Some(ids) => (
                ids.iter().copied().min().unwrap_or(0),
                self.ids.max().unwrap_or(0),
            ),
        };
        (
            self.block_at(first),
            self.block_at(last).saturating_add(inside),
        )
    }
}

impl From<&BlockSet> for TensorSet {
    fn from(set: &BlockSet) -> Self {
        let one = Axis {
            count: 1,
            stride: 0,
        };
        let inner = |at: usize| set.inner.get(at).copied().unwrap_or(one);
        let layers = Axis {
            count: set.layers.end.saturating_sub(set.layers.start),
            stride: set.layout.layer_stride,
        };
        Self {
            base: set.layout.offset + u64::from(set.layers.start) * set.layout.layer_stride,
            blocks: set.layout.blocks,
            block_stride: set.layout.block_stride,
            ids: set.ids.clone(),
            axes: [layers, inner(0), inner(1), inner(2)],
            run_bytes: set.layout.run_bytes,
        }
    }
}

/// The inside of a block of one side.
#[derive(Clone, Debug)]
pub(crate) struct Stretches {
    loops: Vec<Loop<1>>,
    pub(crate) bytes: u64,
}

impl Stretches {
    /// How many there are in a block.
    pub(crate) fn count(&self) -> u64 {
        turns(&self.loops)
    }

    /// Whether `accept` says yes to the offset of every stretch in a block.
    pub(crate) fn all(&self, mut accept: impl FnMut(u64) -> bool) -> bool {
        every_turn(&self.loops, [0], &mut |[offset]| accept(offset))
    }
}
