//! Plans against loops over every byte.

use std::ops::Range;

use proptest::prelude::*;

use super::nest::Loop;
use super::pair::TensorPair;
use super::*;
use crate::plan::{
    BlockIds, BlockLayout, BlockSet, LayoutError, Order, Segments, part_range, parts_of,
};

/// More than any layout here reaches.
const REGION: u64 = 1 << 20;

/// The counts that both sides of a pair have in common, and bytes per head.
#[derive(Clone, Copy, Debug)]
struct Common {
    counts: [u32; 4],
    head_bytes: u64,
    ids: usize,
}

/// One side: a layout around the common part, and which part of it is meant.
#[derive(Clone, Debug)]
struct Side {
    layout: KvBlockLayout,
    slice: KvSlice,
    ids: BlockIds,
}

impl Side {
    fn select(&self) -> TensorSet {
        self.layout.validate(REGION).unwrap();
        self.layout.select(&self.slice, self.ids.clone()).unwrap()
    }

    fn ranges(&self) -> [Range<u32>; 4] {
        let layout = &self.layout;
        [
            self.slice.range(KvAxis::Layers, layout.layers.count),
            self.slice.range(KvAxis::Planes, layout.planes.count),
            self.slice.range(KvAxis::Tokens, layout.tokens.count),
            self.slice.range(KvAxis::Heads, layout.heads.count),
        ]
    }

    /// Offsets of all bytes in the order of ids, layers, planes, tokens, heads.
    fn bytes(&self) -> Vec<u64> {
        let [layers, planes, tokens, heads] = self.ranges();
        let mut out = Vec::new();
        for block in self.ids.iter() {
            for layer in layers.clone() {
                for plane in planes.clone() {
                    for token in tokens.clone() {
                        for head in heads.clone() {
                            let at = self.layout.head_offset(block, layer, plane, token, head);
                            let at = at.unwrap();
                            out.extend(at..at + self.layout.head_bytes);
                        }
                    }
                }
            }
        }
        out
    }
}

fn order() -> impl Strategy<Value = KvOrder> {
    prop_oneof![
        prop_oneof![
            Just(KvOrder::LAYER_FIRST_NHD),
            Just(KvOrder::LAYER_FIRST_HND),
            Just(KvOrder::LAYER_FIRST_PAIRED_NHD),
            Just(KvOrder::LAYER_FIRST_PAIRED_HND),
            Just(KvOrder::BLOCK_FIRST_NHD),
            Just(KvOrder::BLOCK_FIRST_HND),
        ],
        Just(KvAxis::ALL)
            .prop_shuffle()
            .prop_map(|axes| KvOrder::new(axes).unwrap()),
    ]
}

fn common() -> impl Strategy<Value = Common> {
    ([1u32..4, 1u32..3, 1u32..5, 1u32..4], 1u64..6, 1usize..6).prop_map(
        |(counts, head_bytes, ids)| Common {
            counts,
            head_bytes,
            ids,
        },
    )
}

/// A layout that has the common part somewhere, in any order, with gaps in some places.
fn side(common: Common) -> impl Strategy<Value = Side> {
    let Common {
        counts,
        head_bytes,
        ids,
    } = common;
    (
        order(),
        // Before and behind the part along each axis; mostly nothing.
        proptest::array::uniform4((0u32..4, 0u32..4)),
        proptest::array::uniform5(0u64..6),
        0u64..20,
        Just((0..8u32).collect::<Vec<_>>()).prop_shuffle(),
        any::<bool>(),
    )
        .prop_map(
            move |(order, around, gaps, offset, shuffled, consecutive)| {
                let around = around.map(|(a, b)| (a.saturating_sub(2), b.saturating_sub(2)));
                let total = |at: usize| around[at].0 + counts[at] + around[at].1;
                let shape = KvShape {
                    blocks: 8,
                    layers: total(0),
                    planes: total(1),
                    tokens: total(2),
                    heads: total(3),
                    head_bytes,
                };
                let mut layout = KvBlockLayout::dense(shape, order).unwrap().at(offset);
                let mut stride = head_bytes;
                for (axis, gap) in order.axes().iter().rev().zip(gaps) {
                    stride += gap.saturating_sub(4);
                    let place = match axis {
                        KvAxis::Blocks => &mut layout.blocks,
                        KvAxis::Layers => &mut layout.layers,
                        KvAxis::Planes => &mut layout.planes,
                        KvAxis::Tokens => &mut layout.tokens,
                        KvAxis::Heads => &mut layout.heads,
                    };
                    place.stride = stride;
                    stride *= u64::from(place.count);
                }
                let part = |at: usize| Some(around[at].0..around[at].0 + counts[at]);
                let slice = KvSlice {
                    layers: part(0),
                    planes: part(1),
                    tokens: part(2),
                    heads: part(3),
                };
                let ids = match consecutive {
                    true => (1..1 + u32::try_from(ids).unwrap()).into(),
                    false => BlockIds::from(&shuffled[..ids]),
                };
                Side { layout, slice, ids }
            },
        )
}

fn sides() -> impl Strategy<Value = (Side, Side)> {
    common().prop_flat_map(|common| (side(common), side(common)))
}

fn expected(from: &Side, to: &Side) -> Vec<(u64, u64)> {
    let mut pairs: Vec<_> = from.bytes().into_iter().zip(to.bytes()).collect();
    pairs.sort_unstable();
    pairs
}

proptest! {
    #[test]
    fn every_byte_once_in_any_cut((from, to) in sides(), part in 1u64..300) {
        let pair = TensorPair::new(&from.select(), &to.select());
        let mut got = Vec::new();
        let mut runs = 0;
        for index in 0..parts_of(pair.bytes(), part) {
            pair.for_each_row(part_range(pair.bytes(), part, index), |row| {
                for run in 0..row.count {
                    let (from, to) = (row.from + run * row.from_step, row.to + run * row.to_step);
                    got.extend((0..row.bytes).map(|byte| (from + byte, to + byte)));
                }
                runs += row.count;
            });
        }
        got.sort_unstable();
        prop_assert_eq!(&got, &expected(&from, &to));
        prop_assert_eq!(got.len() as u64, pair.bytes());
        if part >= pair.bytes() {
            prop_assert_eq!(runs, pair.runs());
        }
    }

    /// Both ends of a stream walk a stripe by themselves and meet byte by byte.
    #[test]
    fn block_sets_say_the_same((from, to) in sides(), part in 1u64..300) {
        let pair = TensorPair::new(&from.select(), &to.select());
        let (a, b, order) = pair.sets();
        prop_assert_eq!(a.validate(REGION), Ok(()));
        prop_assert_eq!(b.validate(REGION), Ok(()));
        prop_assert_eq!(a.bytes(), pair.bytes());
        prop_assert_eq!(b.bytes(), pair.bytes());
        let mut got = Vec::new();
        for index in 0..parts_of(pair.bytes(), part) {
            let range = part_range(pair.bytes(), part, index);
            let expand = |set: &BlockSet| -> Vec<u64> {
                Segments::new(set, order, range.clone())
                    .flat_map(|(offset, bytes)| offset..offset + bytes)
                    .collect()
            };
            let (x, y) = (expand(&a), expand(&b));
            prop_assert_eq!(x.len() as u64, range.end - range.start);
            prop_assert_eq!(x.len(), y.len());
            got.extend(x.into_iter().zip(y));
        }
        got.sort_unstable();
        prop_assert_eq!(got, expected(&from, &to));
        prop_assert_eq!(a.inner.is_empty(), pair.is_plain());
        // The sets of a window's check say the same again.
        let stretches = |set: &TensorSet| {
            let stretches = set.stretches();
            let mut all = Vec::new();
            for id in set.ids.iter() {
                stretches.all(|at| {
                    let at = set.block_at(id) + at;
                    all.extend(at..at + stretches.bytes);
                    true
                });
            }
            all.sort_unstable();
            all
        };
        prop_assert_eq!(stretches(&TensorSet::from(&b)), stretches(&to.select()));
    }

    /// Sets that do not fit are refused, whatever a peer says.
    #[test]
    fn wild_sets_are_refused(
        inner in proptest::collection::vec((any::<u32>(), any::<u64>()), 0..5),
        layers: u32,
        layer_stride: u64,
        run_bytes: u64,
    ) {
        let layout = BlockLayout {
            layers,
            layer_stride,
            run_bytes,
            ..BlockLayout::contiguous(4, 100)
        };
        let set = BlockSet {
            inner: inner.into_iter().map(|(count, stride)| Axis { count, stride }).collect(),
            ..BlockSet::new(layout, [3].into(), 0..layers)
        };
        if set.validate(REGION).is_ok() {
            let mut looked_at = 0;
            for (offset, bytes) in Segments::new(&set, Order::BlockMajor, 0..set.bytes()).take(100) {
                prop_assert!(offset + bytes <= REGION);
                looked_at += bytes;
            }
            prop_assert!(looked_at > 0);
            prop_assert!(TensorSet::from(&set).stretches().count() > 0);
        }
    }

    /// The innermost loop makes the smallest steps at the destination, and nothing that could be
    /// joined is left apart.
    #[test]
    fn loops_are_few_and_in_order((from, to) in sides()) {
        let pair = TensorPair::new(&from.select(), &to.select());
        let steps: Vec<u64> = pair.axes.iter().map(|axis| axis.strides[1]).collect();
        prop_assert!(steps.is_sorted_by(|a, b| a > b));
        prop_assert!(steps[..pair.outer].iter().all(|step| *step > to.layout.blocks.stride));
        prop_assert!(steps[pair.outer..].iter().all(|step| *step <= to.layout.blocks.stride));
        for axis in &pair.axes {
            prop_assert!(axis.count > 1);
            prop_assert_ne!(axis.strides, [pair.run_bytes; 2]);
        }
        for neighbours in pair.axes.windows(2) {
            let inner = neighbours[1].strides.map(|stride| stride * neighbours[1].count);
            prop_assert_ne!(neighbours[0].strides, inner);
        }
    }

    #[test]
    fn stretches_are_the_bytes_of_a_side((side, _) in sides()) {
        let set = side.select();
        let stretches = set.stretches();
        let mut got = Vec::new();
        for id in set.ids.iter() {
            let block = set.block_at(id);
            stretches.all(|at| {
                got.extend(block + at..block + at + stretches.bytes);
                true
            });
        }
        got.sort_unstable();
        let mut expected = side.bytes();
        expected.sort_unstable();
        let (first, last) = (expected[0], expected[expected.len() - 1]);
        prop_assert_eq!(got, expected);
        prop_assert_eq!(set.reach(), (first, last + 1));
    }

    /// Dense layouts of all orders are whole blocks to whoever does not look inside, and the
    /// blocks are where the heads are.
    #[test]
    fn block_layouts_hold_the_same_bytes(order in order(), counts in [1u32..4, 1u32..3, 1u32..5, 1u32..4]) {
        let [layers, planes, tokens, heads] = counts;
        let shape = KvShape { blocks: 3, layers, planes, tokens, heads, head_bytes: 5 };
        let layout = KvBlockLayout::dense(shape, order).unwrap().at(7);
        prop_assert_eq!(layout.end(), Some(7 + 3 * 5 * counts.map(u64::from).iter().product::<u64>()));
        if let Some(blocks) = layout.block_layout() {
            blocks.validate(REGION).unwrap();
            let side = Side { layout, slice: KvSlice::ALL, ids: [2].into() };
            let mut heads = side.bytes();
            heads.sort_unstable();
            let mut runs: Vec<u64> = (0..blocks.layers)
                .flat_map(|layer| {
                    let at = blocks.run_offset(2, layer).unwrap();
                    at..at + blocks.run_bytes
                })
                .collect();
            runs.sort_unstable();
            prop_assert_eq!(runs, heads);
        } else {
            // Something else lies between the blocks' insides in two places.
            let outer: Vec<_> = order.axes().iter().take_while(|axis| **axis != KvAxis::Blocks).collect();
            prop_assert!(outer.len() >= 2);
        }
    }
}

const SHAPE: KvShape = KvShape {
    blocks: 64,
    layers: 36,
    planes: 2,
    tokens: 16,
    heads: 8,
    head_bytes: 256,
};

fn whole(shape: KvShape, order: KvOrder) -> TensorSet {
    let layout = KvBlockLayout::dense(shape, order).unwrap();
    layout.select(&KvSlice::ALL, [3, 1, 7].into()).unwrap()
}

#[test]
fn equal_layouts_are_moved_as_they_are() {
    for (order, loops, run_bytes) in [
        // K and V are runs, all layers of them at one distance.
        (KvOrder::LAYER_FIRST_NHD, 1, 16 * 8 * 256),
        (KvOrder::LAYER_FIRST_PAIRED_HND, 1, 2 * 16 * 8 * 256),
        (KvOrder::BLOCK_FIRST_HND, 0, 36 * 2 * 16 * 8 * 256),
    ] {
        let set = whole(SHAPE, order);
        let pair = TensorPair::new(&set, &set);
        assert_eq!((pair.axes.len(), pair.run_bytes), (loops, run_bytes));
        assert!(pair.is_plain());
    }
}

#[test]
fn usual_rearrangements_come_to_few_loops() {
    let axes = |pair: &TensorPair| -> Vec<(u64, [u64; 2])> {
        pair.axes
            .iter()
            .map(|&Loop { count, strides }| (count, strides))
            .collect()
    };
    let plane = 16 * 8 * 256;
    // NHD to HND: a head of a token at a time, tokens innermost, which touch at the destination.
    let pair = TensorPair::new(
        &whole(SHAPE, KvOrder::LAYER_FIRST_NHD),
        &whole(SHAPE, KvOrder::LAYER_FIRST_HND),
    );
    assert_eq!(pair.run_bytes, 256);
    assert_eq!(
        axes(&pair),
        [
            (72, [64 * plane, 64 * plane]),
            (8, [256, 4096]),
            (16, [2048, 256])
        ]
    );
    assert_eq!(pair.outer, 1);
    // Layers first to blocks first: planes stay whole.
    let pair = TensorPair::new(
        &whole(SHAPE, KvOrder::LAYER_FIRST_NHD),
        &whole(SHAPE, KvOrder::BLOCK_FIRST_NHD),
    );
    assert_eq!(axes(&pair), [(72, [64 * plane, plane])]);
    assert_eq!((pair.run_bytes, pair.outer), (plane, 0));
    // Half of the heads into all of them: four heads of a token at a time.
    let half = KvShape { heads: 4, ..SHAPE };
    let layout = KvBlockLayout::dense(SHAPE, KvOrder::LAYER_FIRST_NHD).unwrap();
    let upper = layout.select(&KvSlice::ALL.heads(4..8), [3, 1, 7].into());
    let pair = TensorPair::new(&whole(half, KvOrder::LAYER_FIRST_NHD), &upper.unwrap());
    assert_eq!(pair.run_bytes, 4 * 256);
    assert_eq!(
        axes(&pair),
        [(72, [64 * plane / 2, 64 * plane]), (16, [1024, 2048])]
    );
    assert_eq!(pair.to.base, 4 * 256);
}

#[test]
fn faults_of_layouts_name_the_axis() {
    let dense = KvBlockLayout::dense(SHAPE, KvOrder::LAYER_FIRST_NHD).unwrap();
    let end = dense.end().unwrap();
    assert_eq!(dense.validate(end), Ok(()));
    assert_eq!(
        dense.validate(end - 1),
        Err(LayoutError::OutOfRegion {
            end,
            region_bytes: end - 1
        })
    );
    let mut tight = dense;
    tight.tokens.stride -= 1;
    assert_eq!(
        tight.validate(end),
        Err(LayoutError::AxisOverlap {
            axis: KvAxis::Tokens,
            stride: 2047,
            needed: 2048
        })
    );
    let mut same = dense;
    same.heads.stride = 0;
    assert_eq!(
        same.validate(end),
        Err(LayoutError::AxisOverlap {
            axis: KvAxis::Heads,
            stride: 0,
            needed: 256
        })
    );
    let mut empty = dense;
    empty.planes.count = 0;
    assert_eq!(
        empty.validate(end),
        Err(LayoutError::Zero { field: "planes" })
    );
    let mut far = dense;
    far.layers.stride = u64::MAX / 2;
    assert_eq!(
        far.validate(end),
        Err(LayoutError::OutOfRegion {
            end: u64::MAX,
            region_bytes: end
        })
    );
    let huge = KvShape {
        head_bytes: u64::MAX / 4,
        ..SHAPE
    };
    assert!(matches!(
        KvBlockLayout::dense(huge, KvOrder::BLOCK_FIRST_HND),
        Err(LayoutError::OutOfRegion { .. })
    ));
    assert_eq!(
        dense.select(&KvSlice::ALL.heads(4..9), [0].into()),
        Err(LayoutError::Slice {
            axis: KvAxis::Heads,
            start: 4,
            end: 9,
            count: 8
        })
    );
    assert!(matches!(
        dense.select(&KvSlice::ALL.tokens(3..3), [0].into()),
        Err(LayoutError::Slice {
            axis: KvAxis::Tokens,
            ..
        })
    ));
    assert_eq!(
        dense.select(&KvSlice::ALL, [64].into()),
        Err(LayoutError::BlockId { id: 64, blocks: 64 })
    );
    let twice = [
        KvAxis::Blocks,
        KvAxis::Layers,
        KvAxis::Blocks,
        KvAxis::Tokens,
        KvAxis::Heads,
    ];
    assert_eq!(
        KvOrder::new(twice),
        Err(LayoutError::AxisTwice {
            axis: KvAxis::Blocks
        })
    );
}

#[test]
fn a_set_of_whole_blocks_is_a_window_over_them() {
    let layout = KvBlockLayout::dense(SHAPE, KvOrder::LAYER_FIRST_NHD).unwrap();
    assert_eq!(
        layout.block_layout(),
        Some(BlockLayout {
            offset: 0,
            blocks: 64,
            block_stride: 16 * 8 * 256,
            layers: 72,
            layer_stride: 64 * 16 * 8 * 256,
            run_bytes: 16 * 8 * 256,
        })
    );
}
