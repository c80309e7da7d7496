//! The walk over the bytes of block sets: no division and no list of pieces, ids in, stretches out.

use std::ops::Range;

use super::ids::{BlockIds, joins};
use super::set::{BlockSet, Order};
use super::tensor::Strided;

/// Where the runs of a set lie, with layers that touch taken as one run.
#[derive(Clone, Copy, Debug)]
struct Grid {
    base: u64,
    block_stride: u64,
    layer_stride: u64,
}

/// Number of layers and length of a run; common to both sides of a pair.
#[derive(Clone, Copy, Debug)]
struct Shape {
    layers: u64,
    run: u64,
}

impl Grid {
    fn of(set: &BlockSet) -> Self {
        let layout = &set.layout;
        Self {
            base: layout.offset + u64::from(set.layers.start) * layout.layer_stride,
            block_stride: layout.block_stride,
            layer_stride: layout.layer_stride,
        }
    }

    #[inline]
    fn at(&self, id: u32, layer: u64) -> u64 {
        self.base + u64::from(id) * self.block_stride + layer * self.layer_stride
    }
}

impl Shape {
    /// Layers of one block follow each other without a gap where `fold` says so for all sides.
    fn of(set: &BlockSet, order: Order, fold: bool) -> Self {
        let (layers, run) = (set.layer_count(), set.layout.run_bytes);
        if fold && order == Order::BlockMajor {
            Self {
                layers: 1,
                run: layers * run,
            }
        } else {
            Self { layers, run }
        }
    }
}

fn layers_touch(set: &BlockSet) -> bool {
    set.layout.layer_stride == set.layout.run_bytes
}

/// A position between runs.
#[derive(Clone, Copy, Debug)]
struct Position {
    block: usize,
    layer: u64,
    within: u64,
}

impl Position {
    fn at(logical: u64, order: Order, shape: Shape, blocks: usize) -> Self {
        let (run, within) = (logical / shape.run, logical % shape.run);
        let (block, layer) = match order {
            Order::BlockMajor if shape.layers == 1 => (run, 0),
            Order::BlockMajor => (run / shape.layers, run % shape.layers),
            Order::LayerMajor => (run % blocks as u64, run / blocks as u64),
        };
        Self {
            // Below the number of ids, which is a usize.
            block: usize::try_from(block).unwrap_or(usize::MAX),
            layer,
            within,
        }
    }

    /// The beginning of the next run.
    #[inline]
    fn step(&mut self, order: Order, shape: Shape, blocks: usize) {
        self.within = 0;
        match order {
            Order::BlockMajor => {
                self.layer += 1;
                if self.layer == shape.layers {
                    self.layer = 0;
                    self.block += 1;
                }
            }
            Order::LayerMajor => {
                self.block += 1;
                if self.block == blocks {
                    self.block = 0;
                    self.layer += 1;
                }
            }
        }
    }
}

/// Contiguous stretches of a logical range of one set: (offset in the region, bytes).
#[derive(Debug)]
pub(crate) struct Segments<'a> {
    ids: &'a BlockIds,
    grid: Grid,
    shape: Shape,
    order: Order,
    position: Position,
    left: u64,
    /// Instead of all that, for a set with inner loops.
    strided: Option<Strided<'a>>,
}

impl<'a> Segments<'a> {
    /// The set is validated and the range lies within its bytes.
    pub(crate) fn new(set: &'a BlockSet, order: Order, range: Range<u64>) -> Self {
        debug_assert!(range.end <= set.bytes());
        let shape = Shape::of(set, order, layers_touch(set));
        Self {
            ids: &set.ids,
            grid: Grid::of(set),
            shape,
            order,
            position: Position::at(range.start, order, shape, set.ids.len()),
            left: range.end.saturating_sub(range.start),
            strided: (!set.inner.is_empty()).then(|| Strided::new(set, order, range)),
        }
    }

    #[inline]
    fn offset(&self) -> u64 {
        let Position {
            block,
            layer,
            within,
        } = self.position;
        self.grid.at(self.ids.at(block), layer) + within
    }

    /// Whether the whole set is one stretch.
    fn is_one_stretch(&self) -> bool {
        let touching = self.shape.layers == 1 && self.grid.block_stride == self.shape.run;
        touching && self.ids.as_span().is_some()
    }
}

impl Iterator for Segments<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if let Some(strided) = &mut self.strided {
            return strided.next();
        }
        if self.left == 0 {
            return None;
        }
        let offset = self.offset();
        if self.is_one_stretch() {
            return Some((offset, std::mem::take(&mut self.left)));
        }
        let mut bytes = (self.shape.run - self.position.within).min(self.left);
        self.left -= bytes;
        while self.left > 0 {
            self.position.step(self.order, self.shape, self.ids.len());
            if self.offset() != offset + bytes {
                break;
            }
            let more = self.shape.run.min(self.left);
            bytes += more;
            self.left -= more;
        }
        Some((offset, bytes))
    }
}

/// Calls `f(offset in a, offset in b, bytes)` for the stretches of a logical range that are
/// contiguous on both sides. Both sets are validated, have the same shape, and no inner loops.
pub(crate) fn for_each_segment(
    a: &BlockSet,
    b: &BlockSet,
    order: Order,
    range: Range<u64>,
    mut f: impl FnMut(u64, u64, u64),
) {
    if range.start >= range.end {
        return;
    }
    let shape = Shape::of(a, order, layers_touch(a) && layers_touch(b));
    let (here, there) = (Grid::of(a), Grid::of(b));
    let blocks = a.ids.len();
    let mut position = Position::at(range.start, order, shape, blocks);
    let mut left = range.end - range.start;
    let offsets = |position: &Position| {
        let Position {
            block,
            layer,
            within,
        } = *position;
        (
            here.at(a.ids.at(block), layer) + within,
            there.at(b.ids.at(block), layer) + within,
        )
    };
    let (mut from_a, mut from_b) = offsets(&position);
    let touching = shape.layers == 1
        && here.block_stride == shape.run
        && there.block_stride == shape.run
        && a.ids.as_span().is_some()
        && b.ids.as_span().is_some();
    if touching {
        f(from_a, from_b, left);
        return;
    }
    let mut bytes = (shape.run - position.within).min(left);
    loop {
        left -= bytes.min(left);
        if left == 0 {
            f(from_a, from_b, bytes);
            return;
        }
        // Extends the stretch as far as both sides go on.
        position.step(order, shape, blocks);
        let (mut next_a, mut next_b) = offsets(&position);
        while next_a == from_a + bytes && next_b == from_b + bytes {
            let more = shape.run.min(left);
            bytes += more;
            left -= more;
            if left == 0 {
                f(from_a, from_b, bytes);
                return;
            }
            position.step(order, shape, blocks);
            (next_a, next_b) = offsets(&position);
        }
        f(from_a, from_b, bytes);
        (from_a, from_b) = (next_a, next_b);
        bytes = shape.run.min(left);
    }
}

/// Number of stretches that [`for_each_segment`] yields for the whole of both sets.
pub(crate) fn segment_count(a: &BlockSet, b: &BlockSet, order: Order) -> u64 {
    let shape = Shape::of(a, order, layers_touch(a) && layers_touch(b));
    let runs = a.ids.len() as u64 * shape.layers;
    // What has to touch: the last layer of a block and the first of the next one (layers within a
    // block that touch on both sides are one run already), or the same layer of both.
    let reach = match order {
        Order::BlockMajor => shape,
        Order::LayerMajor => Shape { layers: 1, ..shape },
    };
    let (Some(step_a), Some(step_b)) = (step_of(a, reach), step_of(b, reach)) else {
        return runs - layer_joins(a, b, order, shape);
    };
    if [(a, step_a), (b, step_b)]
        .into_iter()
        .any(|(set, step)| set.layout.blocks.checked_add(step).is_none())
    {
        // Adding a step to an id could leave 32 bits.
        let mut count = 0;
        for_each_segment(a, b, order, 0..a.bytes(), |_, _, _| count += 1);
        return count;
    }
    let joined = joins(&a.ids, step_a, &b.ids, step_b);
    match order {
        Order::BlockMajor => runs - joined,
        Order::LayerMajor => runs - shape.layers * joined - layer_joins(a, b, order, shape),
    }
}

/// How often the last block of a layer touches the first block of the next one on both sides.
fn layer_joins(a: &BlockSet, b: &BlockSet, order: Order, shape: Shape) -> u64 {
    let touch = |set: &BlockSet| {
        let (first, last) = (set.ids.at(0), set.ids.at(set.ids.len() - 1));
        let layout = &set.layout;
        u64::from(last) * layout.block_stride + shape.run
            == u64::from(first) * layout.block_stride + layout.layer_stride
    };
    if order == Order::LayerMajor && touch(a) && touch(b) {
        shape.layers - 1
    } else {
        0
    }
}

/// By how many ids a block that touches the end of another is further, if a whole number.
fn step_of(set: &BlockSet, shape: Shape) -> Option<u32> {
    let extent = (shape.layers - 1) * set.layout.layer_stride + shape.run;
    let stride = set.layout.block_stride;
    if stride == extent {
        return Some(1);
    }
    (stride > 0 && extent.is_multiple_of(stride))
        .then(|| u32::try_from(extent / stride).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::{BlockLayout, part_range, parts_of, stripes};

    fn layout() -> impl Strategy<Value = BlockLayout> {
        (
            1u32..6,
            1u32..5,
            1u64..40,
            0u64..9,
            0u64..9,
            any::<bool>(),
            0u64..50,
        )
            .prop_map(
                |(blocks, layers, run_bytes, gap_a, gap_b, layer_first, offset)| {
                    // No gap in a good part of the cases: those are the ones that merge.
                    let (gap_a, gap_b) = (gap_a.saturating_sub(4), gap_b.saturating_sub(4));
                    let (block_stride, layer_stride) = if layer_first {
                        let block_stride = run_bytes + gap_a;
                        (block_stride, block_stride * u64::from(blocks) + gap_b)
                    } else {
                        let layer_stride = run_bytes + gap_a;
                        (layer_stride * u64::from(layers) + gap_b, layer_stride)
                    };
                    BlockLayout {
                        offset,
                        blocks,
                        block_stride,
                        layers,
                        layer_stride,
                        run_bytes,
                    }
                },
            )
    }

    fn ids(blocks: u32, count: u32) -> impl Strategy<Value = BlockIds> {
        let shuffled = Just((0..blocks).collect::<Vec<_>>())
            .prop_shuffle()
            .prop_map(move |mut ids| {
                ids.truncate(count as usize);
                BlockIds::from(ids)
            });
        let span = (0..=blocks - count).prop_map(move |first| BlockIds::from(first..first + count));
        prop_oneof![shuffled, span]
    }

    fn pair() -> impl Strategy<Value = (BlockSet, BlockSet)> {
        (layout(), layout(), 0u64..4).prop_flat_map(|(a, mut b, gap)| {
            b.run_bytes = a.run_bytes;
            b.layers = a.layers;
            b.layer_stride = b.layer_stride.max(b.run_bytes);
            if gap > 1 {
                b.layer_stride = b.run_bytes;
            }
            b.block_stride = b.layer_stride * u64::from(b.layers) + gap / 2;
            let count = a.blocks.min(b.blocks);
            let layers = (0..a.layers, 0..a.layers).prop_map(|(x, y)| x.min(y)..x.max(y) + 1);
            (
                Just(a),
                Just(b),
                ids(a.blocks, count),
                ids(b.blocks, count),
                layers,
            )
                .prop_map(|(a, b, ids_a, ids_b, layers)| {
                    (
                        BlockSet::new(a, ids_a, layers.clone()),
                        BlockSet::new(b, ids_b, layers),
                    )
                })
        })
    }

    const REGION: u64 = 1 << 16;

    /// What the walk must produce, byte by byte, written as naively as possible.
    fn oracle(a: &BlockSet, b: &BlockSet) -> Vec<(u64, u64)> {
        let mut pairs = Vec::new();
        for (id_a, id_b) in a.ids.iter().zip(b.ids.iter()) {
            for layer in 0..a.layers.end - a.layers.start {
                let at_a = a.layout.run_offset(id_a, a.layers.start + layer).unwrap();
                let at_b = b.layout.run_offset(id_b, b.layers.start + layer).unwrap();
                pairs.extend((0..a.layout.run_bytes).map(|i| (at_a + i, at_b + i)));
            }
        }
        pairs.sort_unstable();
        pairs
    }

    proptest! {
        #[test]
        fn each_byte_exactly_once((a, b) in pair(), part in 1u64..200, layer_major: bool) {
            prop_assert_eq!(a.validate(REGION), Ok(()));
            prop_assert_eq!(b.validate(REGION), Ok(()));
            let order = if layer_major { Order::LayerMajor } else { Order::BlockMajor };
            let mut pairs = Vec::new();
            for index in 0..parts_of(a.bytes(), part) {
                let range = part_range(a.bytes(), part, index);
                for_each_segment(&a, &b, order, range, |x, y, len| {
                    pairs.extend((0..len).map(|i| (x + i, y + i)));
                });
            }
            pairs.sort_unstable();
            prop_assert_eq!(pairs, oracle(&a, &b));
        }

        #[test]
        fn counting_is_walking((a, b) in pair(), layer_major: bool) {
            let order = if layer_major { Order::LayerMajor } else { Order::BlockMajor };
            let mut walked = 0;
            let mut end = None;
            for_each_segment(&a, &b, order, 0..a.bytes(), |x, y, len| {
                walked += 1;
                // Stretches are as long as they can be.
                assert_ne!(end, Some((x, y)));
                end = Some((x + len, y + len));
            });
            prop_assert_eq!(segment_count(&a, &b, order), walked);
        }

        /// The two sides of a stream walk the same stripe independently and must meet byte by byte.
        #[test]
        fn both_sides_of_a_stripe_agree((a, b) in pair(), streams in 1usize..5) {
            let order = a.best_order(&b);
            let mut pairs = Vec::new();
            for stripe in stripes(a.bytes(), streams, 16) {
                let expand = |set: &BlockSet| -> Vec<u64> {
                    Segments::new(set, order, stripe.clone())
                        .flat_map(|(offset, len)| offset..offset + len)
                        .collect()
                };
                let (x, y) = (expand(&a), expand(&b));
                prop_assert_eq!(x.len() as u64, stripe.end - stripe.start);
                prop_assert_eq!(x.len(), y.len());
                pairs.extend(x.into_iter().zip(y));
            }
            pairs.sort_unstable();
            prop_assert_eq!(pairs, oracle(&a, &b));
        }
    }

    #[test]
    fn touching_runs_become_one_piece() {
        let set = |ids: &[u32]| BlockSet::new(BlockLayout::contiguous(8, 10), ids.into(), 0..1);
        let pieces: Vec<_> = Segments::new(&set(&[1, 2, 3, 6]), Order::BlockMajor, 0..40).collect();
        assert_eq!(pieces, [(10, 30), (60, 10)]);
        assert_eq!(
            segment_count(&set(&[1, 2, 3]), &set(&[4, 5, 6]), Order::BlockMajor),
            1
        );
        assert_eq!(
            segment_count(&set(&[1, 2, 3]), &set(&[4, 6, 7]), Order::BlockMajor),
            2
        );
    }

    #[test]
    fn layer_first_arenas_are_walked_layer_by_layer() {
        let layout = BlockLayout {
            offset: 0,
            blocks: 8,
            block_stride: 16,
            layers: 4,
            layer_stride: 128,
            run_bytes: 16,
        };
        let set = BlockSet::new(layout, [2, 3, 4].into(), 0..4);
        let order = set.best_order(&set);
        assert_eq!(order, Order::LayerMajor);
        assert_eq!(segment_count(&set, &set, order), 4);
    }
}
