//! What a window covers, and whether an operation stays inside.

use std::ops::Range;

use crate::plan::{BlockIds, BlockLayout, BlockSet, LayoutError, Order, Segments, TensorSet};

/// Runs that are looked up one by one in a window over ranges; what a peer asks for takes this
/// agent's time.
const RUNS_MAX: u64 = 1 << 24;

/// The part of a region that a window opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WindowScope {
    /// The whole region.
    Region,
    /// Byte ranges of the region, in any order.
    Ranges(Vec<Range<u64>>),
    /// Blocks of a layout, all layers. Operations through the window use the same layout, or another
    /// one that has the same blocks at the same places and stays within their runs.
    Blocks {
        /// The layout.
        layout: BlockLayout,
        /// Block ids, in any order.
        ids: Vec<u32>,
    },
}

/// A scope in the form that is checked: sorted, merged, or a bit set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Region,
    /// Sorted, not touching.
    Ranges(Vec<Range<u64>>),
    Blocks(BlockScope),
}

/// Blocks that a window opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockScope {
    pub(crate) layout: BlockLayout,
    /// Sorted, without repetition.
    pub(crate) ids: BlockIds,
    /// One bit per block of the layout up to the highest id, where that is not much larger than the
    /// list; empty otherwise.
    bits: Vec<u64>,
}

impl BlockScope {
    /// Whether a set of another layout stays within the blocks.
    fn covers_parts(&self, set: &TensorSet) -> Result<(), String> {
        let differs = || Err("the layout does not have the blocks of the window's".to_owned());
        let own = &self.layout;
        let Some(base) = set.base.checked_sub(own.offset) else {
            return differs();
        };
        if set.block_stride != own.block_stride {
            return differs();
        }
        // Layers that touch are one run.
        let touch = own.layers == 1 || own.layer_stride == own.run_bytes;
        let (layers, run_bytes) = match own.run_bytes.checked_mul(own.layers.into()) {
            Some(all) if touch => (1, all),
            _ => (u64::from(own.layers), own.run_bytes),
        };
        let stretches = set.stretches();
        few(stretches.count())?;
        let within = stretches.all(|at| {
            let at = base.saturating_add(at);
            let (layer, at) = match layers {
                1 => (0, at),
                _ => match at.checked_div(own.layer_stride) {
                    Some(layer) => (layer, at % own.layer_stride),
                    None => return false,
                },
            };
            layer < layers && at.saturating_add(stretches.bytes) <= run_bytes
        });
        if within {
            self.covers(&set.ids)
        } else {
            differs()
        }
    }

    fn covers(&self, ids: &BlockIds) -> Result<(), String> {
        let outside = |id: u32| Err(format!("block {id}"));
        let (own, wanted) = (self.ids.as_span(), ids.as_span());
        if let Some((first, count)) = own {
            let end = u64::from(first) + u64::from(count);
            let inside = |id: u32| id >= first && u64::from(id) < end;
            return match (wanted, ids.max()) {
                (Some((id, _)), Some(max)) if inside(id) && inside(max) => Ok(()),
                (None, Some(max)) if inside(max) && ids.iter().all(|id| id >= first) => Ok(()),
                _ => outside(ids.iter().find(|id| !inside(*id)).unwrap_or(first)),
            };
        }
        let own = self.ids.list().unwrap_or_default();
        if let (Some((first, count)), Some(last)) = (wanted, ids.max()) {
            // Sorted and without repetition: a span is there if both ends are, that far apart.
            let there = own
                .binary_search(&first)
                .is_ok_and(|at| own.get(at + count as usize - 1) == Some(&last));
            return if there { Ok(()) } else { outside(first) };
        }
        let listed = ids.list().unwrap_or_default();
        if !self.bits.is_empty() {
            let open = |id: u32| {
                self.bits
                    .get(id as usize / 64)
                    .is_some_and(|word| word >> (id % 64) & 1 == 1)
            };
            return match listed.iter().find(|id| !open(**id)) {
                None => Ok(()),
                Some(id) => outside(*id),
            };
        }
        // Requests name ids mostly in the order of the window: try the next one first.
        let mut next = 0;
        for id in listed {
            if own.get(next) != Some(id) {
                next = match own.binary_search(id) {
                    Ok(at) => at,
                    Err(_) => return outside(*id),
                };
            }
            next += 1;
        }
        Ok(())
    }
}

impl Scope {
    pub(crate) fn new(scope: WindowScope, region_bytes: u64) -> Result<Self, LayoutError> {
        match scope {
            WindowScope::Region => Ok(Self::Region),
            WindowScope::Ranges(mut ranges) => {
                ranges.sort_unstable_by_key(|range| range.start);
                let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
                for Range { start, end } in ranges {
                    if start >= end {
                        return Err(LayoutError::EmptyRange { start, end });
                    }
                    if end > region_bytes {
                        return Err(LayoutError::OutOfRegion { end, region_bytes });
                    }
                    match merged.last_mut() {
                        Some(last) if last.end >= start => last.end = last.end.max(end),
                        _ => merged.push(start..end),
                    }
                }
                if merged.is_empty() {
                    return Err(LayoutError::Zero { field: "ranges" });
                }
                Ok(Self::Ranges(merged))
            }
            WindowScope::Blocks { layout, ids } => {
                layout.validate(region_bytes)?;
                let scope = Self::blocks(layout, &ids.into());
                match &scope {
                    Self::Blocks(blocks) => match blocks.ids.max() {
                        None => Err(LayoutError::Zero { field: "ids" }),
                        Some(id) if id >= layout.blocks => Err(LayoutError::BlockId {
                            id,
                            blocks: layout.blocks,
                        }),
                        Some(_) => Ok(scope),
                    },
                    Self::Region | Self::Ranges(_) => Ok(scope),
                }
            }
        }
    }

    /// Blocks of a layout; ids in any order.
    pub(crate) fn blocks(layout: BlockLayout, ids: &BlockIds) -> Self {
        let mut bits = Vec::new();
        let ids = match ids.list() {
            None => ids.clone(),
            Some(list) => {
                let mut sorted = list.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                let words = sorted.last().map_or(0, |last| *last as usize / 64 + 1);
                if words <= sorted.len() * 2 {
                    bits = vec![0u64; words];
                    for id in &sorted {
                        bits[*id as usize / 64] |= 1 << (id % 64);
                    }
                }
                sorted.into()
            }
        };
        Self::Blocks(BlockScope { layout, ids, bits })
    }

    /// Whether the (validated) set stays inside; the error says what does not.
    pub(crate) fn covers(&self, set: &BlockSet) -> Result<(), String> {
        match self {
            Self::Region => Ok(()),
            Self::Ranges(ranges) => {
                if !set.inner.is_empty() {
                    return self.covers_parts(&set.into());
                }
                few(set.runs())?;
                Segments::new(set, Order::BlockMajor, 0..set.bytes())
                    .try_for_each(|(offset, bytes)| inside(ranges, offset, bytes))
            }
            Self::Blocks(blocks) if blocks.layout == set.layout && set.inner.is_empty() => {
                blocks.covers(&set.ids)
            }
            Self::Blocks(blocks) => blocks.covers_parts(&set.into()),
        }
    }

    /// The same for parts of blocks.
    pub(crate) fn covers_parts(&self, set: &TensorSet) -> Result<(), String> {
        match self {
            Self::Region => Ok(()),
            Self::Ranges(ranges) => {
                let stretches = set.stretches();
                few(stretches.count().saturating_mul(set.ids.len() as u64))?;
                set.ids.iter().try_for_each(|id| {
                    let block = set.block_at(id);
                    let mut outside = Ok(());
                    stretches.all(|at| {
                        outside = inside(ranges, block + at, stretches.bytes);
                        outside.is_ok()
                    });
                    outside
                })
            }
            Self::Blocks(blocks) => blocks.covers_parts(set),
        }
    }
}

/// Whether so many runs are looked up one by one.
fn few(runs: u64) -> Result<(), String> {
    if runs > RUNS_MAX {
        return Err(format!(
            "{runs} runs; a window over ranges is looked up for up to {RUNS_MAX}"
        ));
    }
    Ok(())
}

/// Whether a stretch lies in one of the ranges, which are sorted.
fn inside(ranges: &[Range<u64>], offset: u64, bytes: u64) -> Result<(), String> {
    let end = offset.saturating_add(bytes);
    let at = ranges.partition_point(|range| range.end <= offset);
    match ranges.get(at) {
        Some(range) if range.start <= offset && end <= range.end => Ok(()),
        _ => Err(format!("bytes {offset}..{end}")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::{KvAxis, KvBlockLayout, KvOrder, KvShape, KvSlice};

    fn set(ids: &[u32]) -> BlockSet {
        BlockSet::new(BlockLayout::contiguous(10, 8), ids.into(), 0..1)
    }

    #[test]
    fn scopes_cover_what_they_name_and_nothing_else() {
        let layout = BlockLayout::contiguous(10, 8);
        let blocks = Scope::new(
            WindowScope::Blocks {
                layout,
                ids: vec![7, 2, 2, 3],
            },
            80,
        )
        .unwrap();
        assert_eq!(blocks.covers(&set(&[2, 3, 7])), Ok(()));
        assert_eq!(blocks.covers(&set(&[7, 2])), Ok(()));
        assert!(blocks.covers(&set(&[2, 4])).is_err());
        assert!(blocks.covers(&set(&[2, 3])).is_ok());
        assert!(blocks.covers(&set(&[3, 4])).is_err());
        assert!(blocks.covers(&set(&[6, 7])).is_err());
        let ranges = Scope::new(WindowScope::Ranges(vec![32..40, 16..24, 24..32]), 80).unwrap();
        assert_eq!(ranges, Scope::Ranges(std::iter::once(16..40).collect()));
        assert_eq!(ranges.covers(&set(&[2, 3, 4])), Ok(()));
        assert!(ranges.covers(&set(&[4, 5])).is_err());
        assert!(ranges.covers(&set(&[1])).is_err());
    }

    proptest! {
        /// Dense, sparse and consecutive scopes say what a set of numbers says.
        #[test]
        fn block_scopes_are_sets(
            of in 1u32..400,
            open in proptest::collection::vec(0u32..400, 1..60),
            span: bool,
            wanted in proptest::collection::vec(0u32..400, 1..12),
            from_open: bool,
        ) {
            let layout = BlockLayout::contiguous(400, 8);
            let open: Vec<u32> = match span {
                true => (open[0]..(open[0] + of).min(400)).collect(),
                false => open.into_iter().map(|id| id % of * 3 % 400).collect(),
            };
            let wanted: Vec<u32> = match from_open {
                true => wanted.iter().map(|id| open[*id as usize % open.len()]).collect(),
                false => (wanted[0]..400).take(wanted.len()).collect(),
            };
            let scope = WindowScope::Blocks { layout, ids: open.clone() };
            let scope = Scope::new(scope, 3200).unwrap();
            let set = BlockSet::new(layout, wanted.as_slice().into(), 0..1);
            let expected = wanted.iter().all(|id| open.contains(id));
            prop_assert_eq!(scope.covers(&set).is_ok(), expected);
        }
    }

    proptest! {
        /// A window over the blocks of a cache covers every part of them, and only bytes of them;
        /// so does one over their ranges.
        #[test]
        fn parts_of_blocks_are_covered(
            order in Just(KvAxis::ALL).prop_shuffle(),
            open in proptest::collection::vec(0u32..5, 1..5),
            ids in proptest::collection::vec(0u32..5, 1..4),
            from_open: bool,
            slice in (0u32..2, 0u32..3, 0u32..2),
            // Layouts that the window does not know.
            moved in prop_oneof![4 => Just(0u64), 1 => 0u64..700],
            stretched in prop_oneof![4 => Just(0u64), 1 => 0u64..90],
        ) {
            let shape = KvShape { blocks: 5, layers: 2, planes: 2, tokens: 3, heads: 2, head_bytes: 7 };
            let layout = KvBlockLayout::dense(shape, KvOrder::new(order).unwrap()).unwrap().at(20);
            let Some(blocks) = layout.block_layout() else { return Ok(()) };
            let region = 1 << 13;
            let ids: Vec<u32> = match from_open {
                true => ids.iter().map(|id| open[*id as usize % open.len()]).collect(),
                false => ids,
            };
            let mut other = layout.at(20 + moved);
            other.blocks.stride += stretched;
            prop_assume!(other.validate(region).is_ok());
            let part = KvSlice::ALL
                .layers(slice.0..2)
                .tokens(slice.1..3)
                .heads(slice.2..2);
            let set = other.select(&part, ids.as_slice().into()).unwrap();
            let runs = |blocks_of: &[u32]| -> Vec<Range<u64>> {
                let runs = blocks_of.iter().flat_map(|id| {
                    (0..blocks.layers).map(|layer| blocks.run_offset(*id, layer).unwrap())
                });
                runs.map(|at| at..at + blocks.run_bytes).collect()
            };
            let mut inside = true;
            for (block, layer) in ids.iter().flat_map(|id| [(*id, 0), (*id, 1)]) {
                if layer < slice.0 {
                    continue;
                }
                for (plane, token, head) in (0..2).flat_map(|plane| {
                    (slice.1..3).flat_map(move |token| {
                        (slice.2..2).map(move |head| (plane, token, head))
                    })
                }) {
                    let at = other.head_offset(block, layer, plane, token, head).unwrap();
                    let open = runs(&open);
                    inside &= (at..at + 7).all(|byte| open.iter().any(|run| run.contains(&byte)));
                }
            }
            let ranges = Scope::new(WindowScope::Ranges(runs(&open)), region).unwrap();
            prop_assert_eq!(ranges.covers_parts(&set).is_ok(), inside);
            let scope = WindowScope::Blocks { layout: blocks, ids: open };
            let covered = Scope::new(scope, region).unwrap().covers_parts(&set).is_ok();
            if covered {
                prop_assert!(inside);
            }
            if moved == 0 && stretched == 0 {
                prop_assert_eq!(covered, inside);
            }
        }
    }

    #[test]
    fn scopes_outside_of_the_region_are_refused() {
        let layout = BlockLayout::contiguous(10, 8);
        assert!(
            Scope::new(
                WindowScope::Blocks {
                    layout,
                    ids: vec![1]
                },
                79
            )
            .is_err()
        );
        assert!(
            Scope::new(
                WindowScope::Blocks {
                    layout,
                    ids: vec![10]
                },
                80
            )
            .is_err()
        );
        assert!(
            Scope::new(
                WindowScope::Blocks {
                    layout,
                    ids: vec![]
                },
                80
            )
            .is_err()
        );
        assert!(Scope::new(WindowScope::Ranges(vec![1..2, 70..81]), 80).is_err());
        assert!(Scope::new(WindowScope::Ranges(vec![1..2, 8..8]), 80).is_err());
    }
}
