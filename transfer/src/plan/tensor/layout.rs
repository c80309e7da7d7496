//! Where each head of each token of a KV cache lies.

use super::nest::{Loop, simplify};
use super::order::{Axis, KvAxis, KvOrder, KvShape};
use super::set::TensorSet;
use super::slice::KvSlice;
use crate::plan::{BlockIds, BlockLayout, LayoutError};

/// A regular arrangement of a KV cache in a region, down to the heads:
///
/// `address(block, layer, plane, token, head) = offset + block * blocks.stride + layer *
/// layers.stride + plane * planes.stride + token * tokens.stride + head * heads.stride`, and from
/// there `head_bytes` contiguous bytes. No two of these runs share a byte.
///
/// Any order of the axes and any padding can be said. [`KvBlockLayout::dense`] makes the usual
/// ones:
///
/// ```
/// use blockplane_transfer::{KvBlockLayout, KvOrder, KvShape};
///
/// // 36 layers, 8 heads of 128 elements of 2 bytes, 16 tokens a block.
/// let shape = KvShape {
///     blocks: 1024,
///     layers: 36,
///     planes: 2,
///     tokens: 16,
///     heads: 8,
///     head_bytes: 256,
/// };
/// let layout = KvBlockLayout::dense(shape, KvOrder::LAYER_FIRST_NHD)?;
/// assert_eq!(layout.tokens.stride, 8 * 256);
/// assert_eq!(layout.end(), Some(1024 * 36 * 2 * 16 * 8 * 256));
/// # Ok::<(), blockplane_transfer::LayoutError>(())
/// ```
///
/// A framework that has one allocation per layer describes each as a layout of one layer, and moves
/// one layer per operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvBlockLayout {
    /// First byte of the cache, from the start of the region.
    pub offset: u64,
    /// Blocks; ids are `0..blocks.count`.
    pub blocks: Axis,
    /// Layers.
    pub layers: Axis,
    /// Keys and values: 2 of them, or 1 for a latent cache (MLA).
    pub planes: Axis,
    /// Tokens of a block.
    pub tokens: Axis,
    /// Key/value heads held by this worker; 1 for a latent cache.
    pub heads: Axis,
    /// Contiguous bytes of one head of one token: head size times bytes of an element.
    pub head_bytes: u64,
}

impl KvBlockLayout {
    /// An array without gaps from the start of the region, its axes in this order.
    ///
    /// # Errors
    /// A size is 0, or the array does not fit 64 bits.
    pub fn dense(shape: KvShape, order: KvOrder) -> Result<Self, LayoutError> {
        let mut layout = Self {
            offset: 0,
            blocks: Axis::of(shape.blocks),
            layers: Axis::of(shape.layers),
            planes: Axis::of(shape.planes),
            tokens: Axis::of(shape.tokens),
            heads: Axis::of(shape.heads),
            head_bytes: shape.head_bytes,
        };
        layout.check_counts()?;
        let mut stride = shape.head_bytes;
        for &axis in order.axes().iter().rev() {
            layout.axis_mut(axis).stride = stride;
            stride = stride.checked_mul(u64::from(shape.count(axis))).ok_or(
                LayoutError::OutOfRegion {
                    end: u64::MAX,
                    region_bytes: u64::MAX,
                },
            )?;
        }
        Ok(layout)
    }

    /// The same from another byte of the region on.
    #[must_use]
    pub const fn at(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    /// An axis by name.
    #[must_use]
    pub const fn axis(&self, axis: KvAxis) -> Axis {
        match axis {
            KvAxis::Blocks => self.blocks,
            KvAxis::Layers => self.layers,
            KvAxis::Planes => self.planes,
            KvAxis::Tokens => self.tokens,
            KvAxis::Heads => self.heads,
        }
    }

    const fn axis_mut(&mut self, axis: KvAxis) -> &mut Axis {
        match axis {
            KvAxis::Blocks => &mut self.blocks,
            KvAxis::Layers => &mut self.layers,
            KvAxis::Planes => &mut self.planes,
            KvAxis::Tokens => &mut self.tokens,
            KvAxis::Heads => &mut self.heads,
        }
    }

    /// Offset of one head of one token in the region, or `None` for one that the layout does not
    /// have.
    #[must_use]
    pub fn head_offset(
        &self,
        block: u32,
        layer: u32,
        plane: u32,
        token: u32,
        head: u32,
    ) -> Option<u64> {
        let index = [block, layer, plane, token, head];
        let mut offset = self.offset;
        for (axis, index) in KvAxis::ALL.into_iter().zip(index) {
            let Axis { count, stride } = self.axis(axis);
            if index >= count {
                return None;
            }
            offset = offset.checked_add(stride.checked_mul(u64::from(index))?)?;
        }
        Some(offset)
    }

    /// The byte behind the last one, or `None` when that does not fit 64 bits or an axis is empty.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        let last = |axis: Axis| axis.count.checked_sub(1);
        self.head_offset(
            last(self.blocks)?,
            last(self.layers)?,
            last(self.planes)?,
            last(self.tokens)?,
            last(self.heads)?,
        )?
        .checked_add(self.head_bytes)
    }

    /// The same blocks without their insides, for a [window](crate::WindowScope::Blocks) over them
    /// or an operation that rearranges nothing. `None` when the layers and planes of a block are
    /// not evenly spaced runs.
    #[must_use]
    pub fn block_layout(&self) -> Option<BlockLayout> {
        let mut loops: Vec<Loop<1>> = self.inner().map(|(_, axis)| axis.into()).collect();
        let run_bytes = simplify(&mut loops, self.head_bytes);
        let (layers, layer_stride) = match loops[..] {
            [] => (1, run_bytes),
            [
                Loop {
                    count,
                    strides: [stride],
                },
            ] => (u32::try_from(count).ok()?, stride),
            _ => return None,
        };
        Some(BlockLayout {
            offset: self.offset,
            blocks: self.blocks.count,
            block_stride: self.blocks.stride,
            layers,
            layer_stride,
            run_bytes,
        })
    }

    /// Checks that no size is 0, that no two runs overlap and that all lie within `region_bytes`.
    ///
    /// # Errors
    /// Names the axis.
    pub fn validate(&self, region_bytes: u64) -> Result<(), LayoutError> {
        self.check_counts()?;
        match self.end() {
            Some(end) if end <= region_bytes => {}
            end => {
                return Err(LayoutError::OutOfRegion {
                    end: end.unwrap_or(u64::MAX),
                    region_bytes,
                });
            }
        }
        // From the smallest stride to the largest, each must clear what the smaller ones sweep.
        let mut axes: Vec<(Axis, KvAxis)> = KvAxis::ALL
            .into_iter()
            .map(|axis| (self.axis(axis), axis))
            .filter(|(axis, _)| axis.count > 1)
            .collect();
        axes.sort_by_key(|(axis, _)| axis.stride);
        let mut covered = self.head_bytes;
        for (Axis { count, stride }, axis) in axes {
            if stride < covered {
                return Err(LayoutError::AxisOverlap {
                    axis,
                    stride,
                    needed: covered,
                });
            }
            // The end was checked above, so this product does not overflow.
            covered = u64::from(count - 1)
                .saturating_mul(stride)
                .saturating_add(covered);
        }
        Ok(())
    }

    fn check_counts(&self) -> Result<(), LayoutError> {
        for axis in KvAxis::ALL {
            if self.axis(axis).count == 0 {
                return Err(LayoutError::Zero { field: axis.name() });
            }
        }
        if self.head_bytes == 0 {
            return Err(LayoutError::Zero {
                field: "head_bytes",
            });
        }
        Ok(())
    }

    /// A part of some blocks. The layout is valid for its region.
    pub(crate) fn select(&self, slice: &KvSlice, ids: BlockIds) -> Result<TensorSet, LayoutError> {
        if let Some(id) = ids.max().filter(|id| *id >= self.blocks.count) {
            return Err(LayoutError::BlockId {
                id,
                blocks: self.blocks.count,
            });
        }
        let mut base = self.offset;
        let mut counts = [0; 4];
        for (count, (name, axis)) in counts.iter_mut().zip(self.inner()) {
            let range = slice.range(name, axis.count);
            if range.start >= range.end || range.end > axis.count {
                return Err(LayoutError::Slice {
                    axis: name,
                    start: range.start,
                    end: range.end,
                    count: axis.count,
                });
            }
            *count = range.end - range.start;
            base += u64::from(range.start) * axis.stride;
        }
        Ok(TensorSet {
            base,
            blocks: self.blocks.count,
            block_stride: self.blocks.stride,
            ids,
            axes: std::array::from_fn(|at| Axis {
                count: counts[at],
                stride: self.axis(KvAxis::ALL[at + 1]).stride,
            }),
            run_bytes: self.head_bytes,
        })
    }

    /// The axes of a block.
    fn inner(&self) -> impl Iterator<Item = (KvAxis, Axis)> + '_ {
        KvAxis::ALL[1..].iter().map(|&axis| (axis, self.axis(axis)))
    }
}

impl Axis {
    const fn of(count: u32) -> Self {
        Self { count, stride: 0 }
    }
}

impl From<Axis> for Loop<1> {
    fn from(axis: Axis) -> Self {
        Self {
            count: axis.count.into(),
            strides: [axis.stride],
        }
    }
}
