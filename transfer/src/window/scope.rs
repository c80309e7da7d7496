//! What a window covers, and whether an operation stays inside.

use std::ops::Range;

use crate::plan::{BlockLayout, BlockSet, LayoutError, Order, Segments};

/// The part of a region that a window opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WindowScope {
    /// The whole region.
    Region,
    /// Byte ranges of the region, in any order.
    Ranges(Vec<Range<u64>>),
    /// Blocks of a layout, all layers. Operations through the window use the same layout.
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
    /// Sorted ids without repetition.
    Blocks {
        layout: BlockLayout,
        ids: Vec<u32>,
    },
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
            WindowScope::Blocks { layout, mut ids } => {
                layout.validate(region_bytes)?;
                ids.sort_unstable();
                ids.dedup();
                match ids.last() {
                    None => Err(LayoutError::Zero { field: "ids" }),
                    Some(&id) if id >= layout.blocks => Err(LayoutError::BlockId {
                        id,
                        blocks: layout.blocks,
                    }),
                    Some(_) => Ok(Self::Blocks { layout, ids }),
                }
            }
        }
    }

    /// Whether the (validated) set stays inside; the error says what does not.
    pub(crate) fn covers(&self, set: &BlockSet) -> Result<(), String> {
        match self {
            Self::Region => Ok(()),
            Self::Ranges(ranges) => {
                for (offset, bytes) in Segments::new(set, Order::BlockMajor, 0..set.bytes()) {
                    let at = ranges.partition_point(|range| range.end <= offset);
                    let inside = ranges
                        .get(at)
                        .is_some_and(|range| range.start <= offset && offset + bytes <= range.end);
                    if !inside {
                        return Err(format!("bytes {offset}..{}", offset + bytes));
                    }
                }
                Ok(())
            }
            Self::Blocks { layout, ids } => {
                if *layout != set.layout {
                    return Err("the layout is not the one that the window was opened with".into());
                }
                // Requests name ids mostly in the order of the window: try the next one first.
                let mut next = 0;
                for id in set.ids.iter() {
                    if ids.get(next) != Some(id) {
                        next = ids.binary_search(id).map_err(|_| format!("block {id}"))?;
                    }
                    next += 1;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u32]) -> BlockSet {
        BlockSet {
            layout: BlockLayout::contiguous(10, 8),
            ids: ids.into(),
            layers: 0..1,
        }
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
        let ranges = Scope::new(WindowScope::Ranges(vec![32..40, 16..24, 24..32]), 80).unwrap();
        assert_eq!(ranges, Scope::Ranges(std::iter::once(16..40).collect()));
        assert_eq!(ranges.covers(&set(&[2, 3, 4])), Ok(()));
        assert!(ranges.covers(&set(&[4, 5])).is_err());
        assert!(ranges.covers(&set(&[1])).is_err());
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
