//! The walk over the runs of a transforming copy.

use std::ops::Range;

use super::nest::Loop;
use super::pair::{FROM, TO, TensorPair};

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

/// The blocks and four loops.
const DEPTH_MAX: usize = 5;

impl TensorPair {
    /// Calls `f` for the rows of a logical range. The logical sequence is that of the runs in the
    /// order of the loops: the first `outer` axes, the blocks, the other axes.
    pub(crate) fn for_each_row(&self, range: Range<u64>, mut f: impl FnMut(Row)) {
        let Some(mut left) = range.end.checked_sub(range.start).filter(|left| *left > 0) else {
            return;
        };
        let mut nest = Nest::new(self);
        nest.seek(range.start / self.run_bytes);
        let inner = nest.inner();
        let mut within = range.start % self.run_bytes;
        loop {
            let (from, to) = nest.offsets();
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
                let [from_step, to_step] = inner.map_or([0; 2], |inner| inner.strides);
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

/// A position in the loops.
struct Nest<'a> {
    pair: &'a TensorPair,
    depth: usize,
    counts: [u64; DEPTH_MAX],
    index: [u64; DEPTH_MAX],
    /// Of every level but that of the blocks.
    strides: [[u64; 2]; DEPTH_MAX],
}

impl<'a> Nest<'a> {
    fn new(pair: &'a TensorPair) -> Self {
        let mut nest = Self {
            pair,
            depth: pair.axes.len() + 1,
            counts: [1; DEPTH_MAX],
            index: [0; DEPTH_MAX],
            strides: [[0; 2]; DEPTH_MAX],
        };
        nest.counts[pair.outer] = pair.blocks();
        for (at, axis) in pair.axes.iter().enumerate() {
            let level = at + usize::from(at >= pair.outer);
            nest.counts[level] = axis.count;
            nest.strides[level] = axis.strides;
        }
        nest
    }

    /// The innermost loop, unless that is the one over the blocks, whose steps are not equal.
    fn inner(&self) -> Option<Loop<2>> {
        (self.pair.outer < self.pair.axes.len())
            .then(|| self.pair.axes.last().copied())
            .flatten()
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

    fn offsets(&self) -> (u64, u64) {
        let TensorPair { from, to, .. } = self.pair;
        // Below the number of ids, which is a usize.
        let block = usize::try_from(self.index[self.pair.outer]).unwrap_or(usize::MAX);
        let mut at = [
            from.base + u64::from(from.ids.at(block)) * from.block_stride,
            to.base + u64::from(to.ids.at(block)) * to.block_stride,
        ];
        for (index, strides) in self.index.iter().zip(&self.strides) {
            at[FROM] += index * strides[FROM];
            at[TO] += index * strides[TO];
        }
        (at[FROM], at[TO])
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
