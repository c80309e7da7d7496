//! Block layouts: where block `b`, layer `l` of a region lies.

use super::tensor::KvAxis;

/// A regular arrangement of blocks in a region:
/// `address(block, layer) = offset + block * block_stride + layer * layer_stride`, and from there
/// `run_bytes` contiguous bytes. No two runs share a byte.
///
/// Block-first arenas have `layer_stride == run_bytes`, layer-first ones
/// `block_stride == run_bytes`; both come out as long contiguous copies where ids are consecutive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockLayout {
    /// First byte of block 0, layer 0, from the start of the region.
    pub offset: u64,
    /// Number of blocks; ids are `0..blocks`.
    pub blocks: u32,
    /// Bytes from one block to the next, within one layer.
    pub block_stride: u64,
    /// Number of layers, at least 1.
    pub layers: u32,
    /// Bytes from one layer to the next, within one block.
    pub layer_stride: u64,
    /// Contiguous bytes of one block in one layer.
    pub run_bytes: u64,
}

impl BlockLayout {
    /// Blocks of `block_bytes`, one after the other from the start of the region, one layer.
    #[must_use]
    pub const fn contiguous(blocks: u32, block_bytes: u64) -> Self {
        Self {
            offset: 0,
            blocks,
            block_stride: block_bytes,
            layers: 1,
            layer_stride: block_bytes,
            run_bytes: block_bytes,
        }
    }

    /// Offset of a run in the region, or `None` for a block or layer that the layout does not have.
    #[must_use]
    pub fn run_offset(&self, block: u32, layer: u32) -> Option<u64> {
        if block >= self.blocks || layer >= self.layers {
            return None;
        }
        self.address(block, layer)
    }

    /// Checks that the layout has blocks, that no two runs overlap and that all lie within
    /// `region_bytes`.
    pub fn validate(&self, region_bytes: u64) -> Result<(), LayoutError> {
        if self.blocks == 0 || self.layers == 0 || self.run_bytes == 0 {
            return Err(LayoutError::Zero {
                field: match (self.blocks, self.layers) {
                    (0, _) => "blocks",
                    (_, 0) => "layers",
                    _ => "run_bytes",
                },
            });
        }
        self.bounds(self.blocks - 1, self.layers - 1, region_bytes)?;
        // The smaller step must clear a run, the larger one the whole sweep of the smaller.
        let block_axis = (self.block_stride, u64::from(self.blocks));
        let layer_axis = (self.layer_stride, u64::from(self.layers));
        let mut axes: Vec<(u64, u64)> = [block_axis, layer_axis]
            .into_iter()
            .filter(|&(_, count)| count > 1)
            .collect();
        axes.sort_unstable();
        let mut covered = self.run_bytes;
        for (stride, count) in axes {
            if stride < covered {
                return Err(LayoutError::Overlap {
                    stride,
                    needed: covered,
                });
            }
            // Bounds were checked above, so this product does not overflow.
            covered = (count - 1).saturating_mul(stride).saturating_add(covered);
        }
        Ok(())
    }

    /// Checks that the highest byte reached by `block_max` and `layer_max` is inside the region.
    pub(crate) fn bounds(
        &self,
        block_max: u32,
        layer_max: u32,
        region_bytes: u64,
    ) -> Result<(), LayoutError> {
        match self
            .address(block_max, layer_max)
            .and_then(|at| at.checked_add(self.run_bytes))
        {
            Some(end) if end <= region_bytes => Ok(()),
            Some(end) => Err(LayoutError::OutOfRegion { end, region_bytes }),
            None => Err(LayoutError::OutOfRegion {
                end: u64::MAX,
                region_bytes,
            }),
        }
    }

    fn address(&self, block: u32, layer: u32) -> Option<u64> {
        let block = self.block_stride.checked_mul(u64::from(block))?;
        let layer = self.layer_stride.checked_mul(u64::from(layer))?;
        self.offset.checked_add(block)?.checked_add(layer)
    }
}

/// What is wrong with a layout, an id, a layer range or a byte range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A count or size is zero.
    #[error("{field} is 0; accepted: at least 1")]
    Zero {
        /// The field.
        field: &'static str,
    },
    /// Runs overlap.
    #[error("stride {stride} is shorter than the {needed} bytes that it steps over")]
    Overlap {
        /// The stride that is too short.
        stride: u64,
        /// What it has to clear.
        needed: u64,
    },
    /// Runs of a KV cache overlap.
    #[error(
        "the stride of {axis}, {stride}, is shorter than the {needed} bytes that it steps over"
    )]
    AxisOverlap {
        /// The axis whose stride is too short.
        axis: KvAxis,
        /// Its stride.
        stride: u64,
        /// What it has to clear.
        needed: u64,
    },
    /// An order that names an axis twice.
    #[error("the order names {axis} twice; accepted: each axis once")]
    AxisTwice {
        /// The axis.
        axis: KvAxis,
    },
    /// A range along an axis that is empty or that the layout does not have.
    #[error("{axis} {start}..{end} of a layout with {count} {axis}")]
    Slice {
        /// The axis.
        axis: KvAxis,
        /// First one.
        start: u32,
        /// End of the range.
        end: u32,
        /// How many there are.
        count: u32,
    },
    /// Bytes behind the end of the region.
    #[error("reaches byte {end} of a region of {region_bytes} bytes")]
    OutOfRegion {
        /// End reached.
        end: u64,
        /// Size of the region.
        region_bytes: u64,
    },
    /// A block id that the layout does not have.
    #[error("block id {id} of a layout with {blocks} blocks")]
    BlockId {
        /// The id.
        id: u32,
        /// Number of blocks.
        blocks: u32,
    },
    /// Layers that the layout does not have.
    #[error("layers {start}..{end} of a layout with {layers} layers")]
    Layers {
        /// First layer.
        start: u32,
        /// End of the range.
        end: u32,
        /// Number of layers.
        layers: u32,
    },
    /// A range that is empty or runs backwards.
    #[error("byte range {start}..{end} is empty")]
    EmptyRange {
        /// Start of the range.
        start: u64,
        /// End of the range.
        end: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_that_fit_are_accepted_and_others_named() {
        let layer_first = BlockLayout {
            offset: 64,
            blocks: 4,
            block_stride: 32,
            layers: 3,
            layer_stride: 128,
            run_bytes: 32,
        };
        assert_eq!(layer_first.validate(64 + 3 * 128), Ok(()));
        assert_eq!(
            layer_first.validate(64 + 3 * 128 - 1),
            Err(LayoutError::OutOfRegion {
                end: 448,
                region_bytes: 447
            })
        );
        let overlapping = BlockLayout {
            layer_stride: 127,
            ..layer_first
        };
        assert_eq!(
            overlapping.validate(1 << 20),
            Err(LayoutError::Overlap {
                stride: 127,
                needed: 128
            })
        );
        let overflow = BlockLayout {
            block_stride: u64::MAX / 2,
            ..layer_first
        };
        assert!(matches!(
            overflow.validate(1 << 20),
            Err(LayoutError::OutOfRegion { .. })
        ));
        assert_eq!(layer_first.run_offset(1, 2), Some(64 + 32 + 256));
        assert_eq!(layer_first.run_offset(4, 0), None);
    }
}
