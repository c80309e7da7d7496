//! Block sets: a layout, ids and a range of layers, and the walk over their bytes.
//!
//! The bytes of a set form one logical sequence: its runs in order (block after block, or layer
//! after layer), each `run_bytes` long. Positions in that sequence are all that parts, stripes and
//! wire frames need to say; addresses follow by arithmetic.

use std::ops::Range;
use std::sync::Arc;

use super::layout::{BlockLayout, LayoutError};

/// Most ids that one set carries.
pub(crate) const IDS_MAX: usize = 1 << 22;

/// In which order the runs of a set follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// All layers of the first id, then of the second.
    BlockMajor,
    /// The first layer of all ids, then the second.
    LayerMajor,
}

/// Blocks of a region, or a part of their layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockSet {
    pub(crate) layout: BlockLayout,
    pub(crate) ids: Arc<[u32]>,
    pub(crate) layers: Range<u32>,
}

impl BlockSet {
    /// Checks ids, layers and bounds, not that the layout is free of overlap: sets that come from
    /// descriptor lists step in units smaller than a run.
    pub(crate) fn validate(&self, region_bytes: u64) -> Result<(), LayoutError> {
        let layout = &self.layout;
        if layout.run_bytes == 0 || layout.blocks == 0 || layout.layers == 0 {
            return Err(LayoutError::Zero {
                field: "run_bytes, blocks or layers",
            });
        }
        let Range { start, end } = self.layers;
        if start >= end || end > layout.layers {
            return Err(LayoutError::Layers {
                start,
                end,
                layers: layout.layers,
            });
        }
        let Some(&max) = self.ids.iter().max() else {
            return Err(LayoutError::Zero { field: "ids" });
        };
        if max >= layout.blocks {
            return Err(LayoutError::BlockId {
                id: max,
                blocks: layout.blocks,
            });
        }
        layout.bounds(max, end - 1, region_bytes)?;
        // Offsets grow with ids and layers, so the total fits 64 bits if each count does.
        match self.runs().checked_mul(layout.run_bytes) {
            Some(_) => Ok(()),
            None => Err(LayoutError::OutOfRegion {
                end: u64::MAX,
                region_bytes,
            }),
        }
    }

    pub(crate) fn layer_count(&self) -> u64 {
        u64::from(self.layers.end - self.layers.start)
    }

    pub(crate) fn runs(&self) -> u64 {
        self.ids.len() as u64 * self.layer_count()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.runs() * self.layout.run_bytes
    }

    /// Offset of run number `run` in `order`. The set is validated and `run < self.runs()`.
    #[inline]
    fn run_offset(&self, order: Order, run: u64) -> u64 {
        let (block, layer) = match order {
            Order::BlockMajor => (run / self.layer_count(), run % self.layer_count()),
            Order::LayerMajor => (run % self.ids.len() as u64, run / self.ids.len() as u64),
        };
        // `block` is below the number of ids, which came from a slice length.
        let id = self.ids[usize::try_from(block).unwrap_or(usize::MAX)];
        self.layout.offset
            + u64::from(id) * self.layout.block_stride
            + (u64::from(self.layers.start) + layer) * self.layout.layer_stride
    }

    /// The order in which more runs of both sets touch.
    pub(crate) fn best_order(&self, other: &Self) -> Order {
        let by_layer = |set: &Self| {
            set.layer_count() > 1
                && set.layout.layer_stride != set.layout.run_bytes
                && set.layout.block_stride == set.layout.run_bytes
        };
        if by_layer(self) && by_layer(other) {
            Order::LayerMajor
        } else {
            Order::BlockMajor
        }
    }
}

/// Iterator over the contiguous pieces `(offset, bytes)` of a logical range of one set; touching
/// runs come out as one piece.
#[derive(Debug)]
pub(crate) struct Segments<'a> {
    set: &'a BlockSet,
    order: Order,
    at: u64,
    end: u64,
}

impl<'a> Segments<'a> {
    /// `range` lies within `0..set.bytes()`.
    pub(crate) fn new(set: &'a BlockSet, order: Order, range: Range<u64>) -> Self {
        debug_assert!(range.end <= set.bytes());
        Self {
            set,
            order,
            at: range.start,
            end: range.end,
        }
    }
}

impl Iterator for Segments<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.at >= self.end {
            return None;
        }
        let run_bytes = self.set.layout.run_bytes;
        let mut run = self.at / run_bytes;
        let within = self.at % run_bytes;
        let offset = self.set.run_offset(self.order, run) + within;
        let mut bytes = (run_bytes - within).min(self.end - self.at);
        self.at += bytes;
        while self.at < self.end {
            run += 1;
            if self.set.run_offset(self.order, run) != offset + bytes {
                break;
            }
            let more = run_bytes.min(self.end - self.at);
            bytes += more;
            self.at += more;
        }
        Some((offset, bytes))
    }
}

/// Calls `f(offset in a, offset in b, bytes)` for the pieces of a logical range that are
/// contiguous on both sides. Both sets are validated and have the same shape.
pub(crate) fn for_each_segment(
    a: &BlockSet,
    b: &BlockSet,
    order: Order,
    range: Range<u64>,
    mut f: impl FnMut(u64, u64, u64),
) {
    let run_bytes = a.layout.run_bytes;
    if range.start >= range.end {
        return;
    }
    let mut at = range.start;
    let mut pending: Option<(u64, u64, u64)> = None;
    while at < range.end {
        let run = at / run_bytes;
        let within = at % run_bytes;
        let bytes = (run_bytes - within).min(range.end - at);
        let from_a = a.run_offset(order, run) + within;
        let from_b = b.run_offset(order, run) + within;
        at += bytes;
        pending = match pending {
            Some((pa, pb, len)) if pa + len == from_a && pb + len == from_b => {
                Some((pa, pb, len + bytes))
            }
            Some((pa, pb, len)) => {
                f(pa, pb, len);
                Some((from_a, from_b, bytes))
            }
            None => Some((from_a, from_b, bytes)),
        };
    }
    if let Some((pa, pb, len)) = pending {
        f(pa, pb, len);
    }
}

/// Number of pieces that [`for_each_segment`] yields for the whole set.
pub(crate) fn segment_count(a: &BlockSet, b: &BlockSet, order: Order) -> u64 {
    let mut count = 0;
    for_each_segment(a, b, order, 0..a.bytes(), |_, _, _| count += 1);
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::{part_range, parts_of, stripes};

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

    fn pair() -> impl Strategy<Value = (BlockSet, BlockSet)> {
        (layout(), layout()).prop_flat_map(|(a, mut b)| {
            b.run_bytes = a.run_bytes;
            b.layers = a.layers;
            b.layer_stride = b.layer_stride.max(b.run_bytes);
            b.block_stride = b.layer_stride * u64::from(b.layers) + 3;
            let count = a.blocks.min(b.blocks);
            let ids = |blocks: u32| {
                Just((0..blocks).collect::<Vec<_>>())
                    .prop_shuffle()
                    .prop_map(move |mut ids| {
                        ids.truncate(count as usize);
                        ids
                    })
            };
            let layers = (0..a.layers, 0..a.layers).prop_map(|(x, y)| x.min(y)..x.max(y) + 1);
            (Just(a), Just(b), ids(a.blocks), ids(b.blocks), layers).prop_map(
                |(a, b, ids_a, ids_b, layers)| {
                    (
                        BlockSet {
                            layout: a,
                            ids: ids_a.into(),
                            layers: layers.clone(),
                        },
                        BlockSet {
                            layout: b,
                            ids: ids_b.into(),
                            layers,
                        },
                    )
                },
            )
        })
    }

    const REGION: u64 = 1 << 16;

    /// What the walk must produce, byte by byte, written as naively as possible.
    fn oracle(a: &BlockSet, b: &BlockSet) -> Vec<(u64, u64)> {
        let mut pairs = Vec::new();
        for (&id_a, &id_b) in a.ids.iter().zip(b.ids.iter()) {
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
        let set = |ids: &[u32]| BlockSet {
            layout: BlockLayout::contiguous(8, 10),
            ids: ids.into(),
            layers: 0..1,
        };
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
        let set = BlockSet {
            layout,
            ids: [2, 3, 4].as_slice().into(),
            layers: 0..4,
        };
        let order = set.best_order(&set);
        assert_eq!(order, Order::LayerMajor);
        assert_eq!(segment_count(&set, &set, order), 4);
    }
}
