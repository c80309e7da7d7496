//! Cutting block sets: any stretch of the bytes of a set is a few block sets again.

use std::ops::Range;

use super::layout::BlockLayout;
use super::set::{BlockSet, Order};

/// A part of a set that is a set itself: some of its blocks, some of their layers, some bytes of
/// each run. Sets of one shape are cut alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Places in the list of ids.
    blocks: Range<usize>,
    /// Counted from the first layer of the set.
    layers: Range<u32>,
    /// Bytes of each run.
    within: Range<u64>,
}

/// Cuts a logical range out of a set without inner loops: up to five parts, which follow each other
/// in `order`. The set is validated and the range lies within its bytes.
pub(crate) fn cuts(
    set: &BlockSet,
    order: Order,
    range: Range<u64>,
) -> impl Iterator<Item = Cut> + use<> {
    debug_assert!(range.end <= set.bytes() && set.inner.is_empty());
    let run = set.layout.run_bytes;
    // Runs follow each other along the inner axis first.
    let inner = match order {
        Order::BlockMajor => set.layer_count(),
        Order::LayerMajor => set.ids.len() as u64,
    };
    let mut at = range.start;
    std::iter::from_fn(move || {
        let left = range.end.checked_sub(at).filter(|&left| left > 0)?;
        let (place, skip) = (at / run, at % run);
        let (o, i) = (place / inner, place % inner);
        let (outer, inner, within) = if skip > 0 || left < run {
            (o..o + 1, i..i + 1, skip..run.min(skip + left))
        } else if i > 0 || left < inner * run {
            (o..o + 1, i..inner.min(i + left / run), 0..run)
        } else {
            (o..o + left / (inner * run), 0..inner, 0..run)
        };
        let count = |range: &Range<u64>| range.end - range.start;
        at += count(&outer) * count(&inner) * count(&within);
        let (blocks, layers) = match order {
            Order::BlockMajor => (outer, inner),
            Order::LayerMajor => (inner, outer),
        };
        // Below the numbers of ids and layers.
        let narrow = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let narrower = |at: u64| u32::try_from(at).unwrap_or(u32::MAX);
        Some(Cut {
            blocks: narrow(blocks.start)..narrow(blocks.end),
            layers: narrower(layers.start)..narrower(layers.end),
            within,
        })
    })
}

impl Cut {
    fn run_bytes(&self) -> u64 {
        self.within.end - self.within.start
    }

    pub(crate) fn bytes(&self) -> u64 {
        let layers = u64::from(self.layers.end - self.layers.start);
        self.blocks.len() as u64 * layers * self.run_bytes()
    }

    /// This part of a set that has the shape of the one that was cut.
    pub(crate) fn of(&self, set: &BlockSet) -> BlockSet {
        let first = set.layers.start;
        let layout = BlockLayout {
            offset: set.layout.offset + self.within.start,
            run_bytes: self.run_bytes(),
            ..set.layout
        };
        let ids = set.ids.part(self.blocks.clone());
        BlockSet::new(
            layout,
            ids,
            first + self.layers.start..first + self.layers.end,
        )
    }

    /// A set of this part's shape whose bytes lie one after the other, in `order`, from `offset` on.
    pub(crate) fn packed(&self, order: Order, offset: u64) -> BlockSet {
        let run_bytes = self.run_bytes();
        // Ids are at most 2^32 - 1.
        let blocks = u32::try_from(self.blocks.len()).unwrap_or(u32::MAX);
        let layers = self.layers.end - self.layers.start;
        let (block_stride, layer_stride) = match order {
            Order::BlockMajor => (u64::from(layers) * run_bytes, run_bytes),
            Order::LayerMajor => (run_bytes, u64::from(blocks) * run_bytes),
        };
        let layout = BlockLayout {
            offset,
            blocks,
            block_stride,
            layers,
            layer_stride,
            run_bytes,
        };
        BlockSet::new(layout, (0..blocks).into(), 0..layers)
    }
}

/// How many sets without inner loops say the same as a set.
pub(crate) fn turns(set: &BlockSet) -> u64 {
    let counts = set.inner.iter().map(|axis| u64::from(axis.count));
    counts.fold(1, u64::saturating_mul)
}

/// One of them; the i-th of two sets of one shape pair.
pub(crate) fn turn(set: &BlockSet, mut index: u64) -> BlockSet {
    let mut layout = set.layout;
    for axis in set.inner.iter().rev() {
        layout.offset += index % u64::from(axis.count) * axis.stride;
        index /= u64::from(axis.count);
    }
    BlockSet::new(layout, set.ids.clone(), set.layers.clone())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::{Segments, for_each_segment};

    fn set(blocks: u32, layers: u32, run: u64, gap: u64, first: u32, ids: &[u32]) -> BlockSet {
        let layout = BlockLayout {
            offset: 3,
            blocks,
            block_stride: u64::from(layers + first) * (run + gap),
            layers: layers + first,
            layer_stride: run + gap,
            run_bytes: run,
        };
        BlockSet::new(layout, ids.into(), first..first + layers)
    }

    fn bytes_of(set: &BlockSet, order: Order) -> Vec<u64> {
        let segments = Segments::new(set, order, 0..set.bytes());
        segments
            .flat_map(|(offset, bytes)| offset..offset + bytes)
            .collect()
    }

    #[test]
    fn the_turns_of_inner_loops_are_the_set() {
        let mut looped = set(9, 2, 4, 200, 0, &[7, 2, 3]);
        let axis = |count, stride| crate::plan::Axis { count, stride };
        looped.inner = vec![axis(3, 16), axis(2, 8)];
        assert_eq!(turns(&looped), 6);
        let mut all: Vec<u64> = (0..6)
            .flat_map(|index| bytes_of(&turn(&looped, index), Order::BlockMajor))
            .collect();
        let mut expected = bytes_of(&looped, Order::BlockMajor);
        all.sort_unstable();
        expected.sort_unstable();
        assert_eq!(all, expected);
        assert_eq!(turns(&turn(&looped, 5)), 1);
    }

    proptest! {
        /// The parts of a range are its bytes, in its order, on both sides, and pack without gaps.
        #[test]
        fn cutting_keeps_every_byte_in_its_place(
            layers in 1u32..4,
            run in 1u64..6,
            gap in 0u64..3,
            first in 0u32..3,
            ids in proptest::collection::vec(0u32..9, 1..8),
            ends in (0u64..10_000, 0u64..10_000),
            layer_major: bool,
        ) {
            let order = if layer_major { Order::LayerMajor } else { Order::BlockMajor };
            let here = set(9, layers, run, gap, first, &ids);
            let reversed: Vec<u32> = ids.iter().map(|id| 8 - id).collect();
            let there = set(9, layers, run, 0, 0, &reversed);
            let all = here.bytes();
            let (a, b) = (ends.0 % (all + 1), ends.1 % (all + 1));
            let range = a.min(b)..a.max(b);
            let at = |n: u64| usize::try_from(n).unwrap();
            let parts: Vec<Cut> = cuts(&here, order, range.clone()).collect();
            prop_assert!(parts.len() <= 5, "{parts:?}");
            for side in [&here, &there] {
                let expected = &bytes_of(side, order)[at(range.start)..at(range.end)];
                let got: Vec<u64> = parts
                    .iter()
                    .flat_map(|cut| bytes_of(&cut.of(side), order))
                    .collect();
                prop_assert_eq!(expected, got);
            }
            // What goes through a packed place comes out where it belongs.
            let mut end = 100;
            let mut through = Vec::new();
            for cut in &parts {
                let packed = cut.packed(order, end);
                let (here, there) = (cut.of(&here), cut.of(&there));
                prop_assert_eq!(cut.bytes(), here.bytes());
                prop_assert_eq!(bytes_of(&packed, order), (end..end + cut.bytes()).collect::<Vec<_>>());
                let mut staged = std::collections::HashMap::new();
                for_each_segment(&here, &packed, order, 0..here.bytes(), |l, p, n| {
                    staged.extend((0..n).map(|i| (p + i, l + i)));
                });
                for_each_segment(&packed, &there, order, 0..there.bytes(), |p, r, n| {
                    through.extend((0..n).map(|i| (staged[&(p + i)], r + i)));
                });
                end += cut.bytes();
            }
            prop_assert_eq!(end - 100, range.end - range.start);
            let mut expected = Vec::new();
            for_each_segment(&here, &there, order, range, |l, r, n| {
                expected.extend((0..n).map(|i| (l + i, r + i)));
            });
            prop_assert_eq!(through, expected);
        }
    }
}
