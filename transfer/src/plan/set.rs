//! Block sets: a layout, ids and a range of layers.
//!
//! The bytes of a set form one logical sequence: its runs in order (block after block, or layer
//! after layer), each `run_bytes` long. Where blocks are rearranged on their way through a stream, there
//! are further loops inside of each block and layer. Positions in that sequence are all that parts, stripes and
//! wire frames need to say; addresses follow by arithmetic.

use std::ops::Range;

use super::ids::BlockIds;
use super::layout::{BlockLayout, LayoutError};
use super::tensor::Axis;

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
    pub(crate) ids: BlockIds,
    pub(crate) layers: Range<u32>,
    /// Loops inside of a layer of a block, outermost first, with a run at each of their turns. Most
    /// sets have none; those that have some go over streams, which walk each side by itself.
    pub(crate) inner: Vec<Axis>,
}

/// Most loops inside of a layer of a block.
pub(crate) const INNER_MAX: usize = 3;

impl BlockSet {
    /// A set without inner loops.
    pub(crate) const fn new(layout: BlockLayout, ids: BlockIds, layers: Range<u32>) -> Self {
        Self {
            layout,
            ids,
            layers,
            inner: Vec::new(),
        }
    }

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
        let Some(max) = self.ids.max() else {
            return Err(LayoutError::Zero { field: "ids" });
        };
        if max >= layout.blocks {
            return Err(LayoutError::BlockId {
                id: max,
                blocks: layout.blocks,
            });
        }
        if self.inner.iter().any(|axis| axis.count == 0) || self.inner.len() > INNER_MAX {
            return Err(LayoutError::Zero {
                field: "a loop inside of the blocks",
            });
        }
        // Offsets grow with ids, layers and inner loops: the last run reaches furthest.
        let last = layout
            .run_offset(max, end - 1)
            .and_then(|at| {
                self.inner.iter().try_fold(at, |at, axis| {
                    at.checked_add(axis.stride.checked_mul(u64::from(axis.count - 1))?)
                })
            })
            .and_then(|at| at.checked_add(layout.run_bytes))
            .unwrap_or(u64::MAX);
        if last > region_bytes || self.checked_bytes().is_none() {
            return Err(LayoutError::OutOfRegion {
                end: last,
                region_bytes,
            });
        }
        Ok(())
    }

    fn checked_bytes(&self) -> Option<u64> {
        let runs = (self.ids.len() as u64).checked_mul(self.layer_count())?;
        let runs = self
            .inner
            .iter()
            .try_fold(runs, |runs, axis| runs.checked_mul(axis.count.into()))?;
        runs.checked_mul(self.layout.run_bytes)
    }

    /// The bytes of the region from the first to the last that the set touches.
    pub(crate) fn touched(&self) -> Range<u64> {
        let layout = &self.layout;
        let at = |id: Option<u32>, layer: u32| {
            layout.offset
                + u64::from(id.unwrap_or(0)) * layout.block_stride
                + u64::from(layer) * layout.layer_stride
        };
        let start = at(self.ids.iter().min(), self.layers.start);
        start..at(self.ids.max(), self.layers.end.saturating_sub(1)) + layout.run_bytes
    }

    pub(crate) fn layer_count(&self) -> u64 {
        u64::from(self.layers.end.saturating_sub(self.layers.start))
    }

    /// Runs, of a set without inner loops.
    pub(crate) fn runs(&self) -> u64 {
        debug_assert!(self.inner.is_empty());
        self.ids.len() as u64 * self.layer_count()
    }

    /// All bytes of a validated set.
    pub(crate) fn bytes(&self) -> u64 {
        self.checked_bytes().unwrap_or(u64::MAX)
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
