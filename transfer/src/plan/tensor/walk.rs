//! The walk over the runs of a transforming copy.

use std::ops::Range;

use super::nest::Loop;
use super::pair::{TensorPair, TensorSide};
use crate::plan::{BlockIds, BlockSet, Order};

/// Runs of equal length at equal distances on each side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// Offset of the first run in the source region.
    pub(crate) from: u64,
    /// Offset of the first run in the destination region.
    pub(crate) to: u64,
    /// How many, at least 1.
    pub(crate) count: u64,
    /// From one run to the next in the source.
    pub(crate) from_step: u64,
    /// From one run to the next in the destination.
    pub(crate) to_step: u64,
    /// Bytes of each run.
    pub(crate) bytes: u64,
}

impl TensorPair {
    /// Calls `f` for the rows of a logical range. The logical sequence is that of the runs in the
    /// order of the loops: the first `outer` axes, the blocks, the other axes.
    pub(crate) fn for_each_row(&self, range: Range<u64>, mut f: impl FnMut(Row)) {
        let Some(mut left) = range.end.checked_sub(range.start).filter(|left| *left > 0) else {
            return;
        };
        let sides = [NestSide::from(&self.from), NestSide::from(&self.to)];
        let mut nest = Nest::new(sides, self.outer, &self.axes);
        nest.seek(range.start / self.run_bytes);
        let inner = nest.inner();
        let mut within = range.start % self.run_bytes;
        loop {
            let [from, to] = nest.offsets();
            if within > 0 || left < self.run_bytes {
                // The part of a run with which the range begins or ends.
                let bytes = (self.run_bytes - within).min(left);
                f(Row {
                    from: from + within,
                    to: to + within,
                    count: 1,
                    from_step: 0,
                    to_step: 0,
                    bytes,
                });
                within = 0;
                left -= bytes;
                nest.step(1);
            } else {
                let whole = left / self.run_bytes;
                let count = inner.map_or(1, |_| nest.inner_left()).min(whole);
                let [from_step, to_step] = inner.unwrap_or([0; 2]);
                f(Row {
                    from,
                    to,
                    count,
                    from_step,
                    to_step,
                    bytes: self.run_bytes,
                });
                left -= count * self.run_bytes;
                nest.step(count);
            }
            if left == 0 {
                return;
            }
        }
    }
}

/// Contiguous stretches of a logical range of one side: (offset in the region, bytes).
#[derive(Debug)]
pub(crate) struct Strided<'a> {
    nest: Nest<'a, 1>,
    run_bytes: u64,
    within: u64,
    left: u64,
}

impl<'a> Strided<'a> {
    /// The set is validated and the range lies within its bytes.
    pub(crate) fn new(set: &'a BlockSet, order: Order, range: Range<u64>) -> Self {
        let layout = &set.layout;
        let layers = Loop {
            count: set.layer_count(),
            strides: [layout.layer_stride],
        };
        let mut loops = vec![layers];
        loops.extend(set.inner.iter().map(|axis| Loop::from(*axis)));
        let blocks_at = usize::from(order == Order::LayerMajor);
        // Inside of the loop over the blocks, what is contiguous is one run.
        let mut run_bytes = layout.run_bytes;
        while loops.len() > blocks_at
            && let Some(inner) = loops.pop_if(|inner| inner.strides == [run_bytes])
        {
            run_bytes *= inner.count;
        }
        let side = NestSide {
            base: layout.offset + u64::from(set.layers.start) * layout.layer_stride,
            block_stride: layout.block_stride,
            ids: &set.ids,
        };
        let mut nest = Nest::new([side], blocks_at, &loops);
        nest.seek(range.start / run_bytes);
        Self {
            nest,
            run_bytes,
            within: range.start % run_bytes,
            left: range.end.saturating_sub(range.start),
        }
    }
}

impl Iterator for Strided<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.left == 0 {
            return None;
        }
        let [offset] = self.nest.offsets();
        let bytes = (self.run_bytes - self.within).min(self.left);
        let stretch = (offset + self.within, bytes);
        self.within = 0;
        self.left -= bytes;
        self.nest.step(1);
        Some(stretch)
    }
}

/// The blocks and four loops.
const DEPTH_MAX: usize = 5;

/// The blocks of one side.
#[derive(Clone, Copy, Debug)]
struct NestSide<'a> {
    base: u64,
    block_stride: u64,
    ids: &'a BlockIds,
}

impl<'a> From<&'a TensorSide> for NestSide<'a> {
    fn from(side: &'a TensorSide) -> Self {
        Self {
            base: side.base,
            block_stride: side.block_stride,
            ids: &side.ids,
        }
    }
}

/// A position in loops, one of which is over the blocks.
#[derive(Debug)]
struct Nest<'a, const N: usize> {
    sides: [NestSide<'a>; N],
    blocks_at: usize,
    depth: usize,
    counts: [u64; DEPTH_MAX],
    index: [u64; DEPTH_MAX],
    /// Of every level but that of the blocks.
    strides: [[u64; N]; DEPTH_MAX],
}

impl<'a, const N: usize> Nest<'a, N> {
    /// Up to four loops, the first `blocks_at` of which are outside of the one over the blocks.
    fn new(sides: [NestSide<'a>; N], blocks_at: usize, loops: &[Loop<N>]) -> Self {
        let mut nest = Self {
            sides,
            blocks_at,
            depth: loops.len() + 1,
            counts: [1; DEPTH_MAX],
            index: [0; DEPTH_MAX],
            strides: [[0; N]; DEPTH_MAX],
        };
        nest.counts[blocks_at] = sides.first().map_or(0, |side| side.ids.len() as u64);
        for (at, one) in loops.iter().enumerate() {
            let level = at + usize::from(at >= blocks_at);
            nest.counts[level] = one.count;
            nest.strides[level] = one.strides;
        }
        nest
    }

    /// The steps of the innermost loop, unless that is the one over the blocks, whose steps are not
    /// equal.
    fn inner(&self) -> Option<[u64; N]> {
        let last = self.depth - 1;
        (self.blocks_at != last).then(|| self.strides[last])
    }

    fn inner_left(&self) -> u64 {
        self.counts[self.depth - 1] - self.index[self.depth - 1]
    }

    fn seek(&mut self, mut run: u64) {
        for level in (0..self.depth).rev() {
            self.index[level] = run % self.counts[level];
            run /= self.counts[level];
        }
    }

    fn offsets(&self) -> [u64; N] {
        // Below the number of ids, which is a usize.
        let block = usize::try_from(self.index[self.blocks_at]).unwrap_or(usize::MAX);
        let mut at = self
            .sides
            .map(|side| side.base + u64::from(side.ids.at(block)) * side.block_stride);
        for (index, strides) in self.index.iter().zip(&self.strides) {
            for (at, stride) in at.iter_mut().zip(strides) {
                *at += index * stride;
            }
        }
        at
    }

    /// Goes on by `count` turns of the innermost loop, at most to its end.
    fn step(&mut self, count: u64) {
        let mut level = self.depth - 1;
        self.index[level] += count;
        while self.index[level] == self.counts[level] && level > 0 {
            self.index[level] = 0;
            level -= 1;
            self.index[level] += 1;
        }
    }
}
