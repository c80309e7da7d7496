//! Planning a copy that rearranges: pure arithmetic from a nest of loops to what the kernel is given.

use super::kernels::abi::{AXES_MAX, BpAxis, BpPermute};
use super::plan::{IdTable, narrow};
use crate::plan::TensorPair;

/// Runs longer than this become an axis of shorter ones: a warp copies 32 runs at a time.
const RUN_BYTES_MAX: u64 = 2 << 10;

/// What the kernel gets for a pair of tensors that lie at these addresses; all but the range of units
/// and how the end becomes known. `None` when the nest is deeper than the kernel's.
pub(super) fn lay_out(
    pair: &TensorPair,
    src_region: u64,
    dst_region: u64,
    ids: &mut IdTable,
) -> Option<BpPermute> {
    let mut axes: Vec<_> = pair
        .axes
        .iter()
        .map(|axis| BpAxis {
            src_stride: axis.strides[0],
            dst_stride: axis.strides[1],
            count: narrow(axis.count),
            reserved: 0,
        })
        .collect();
    let run_bytes = shorter(pair.run_bytes);
    if run_bytes < pair.run_bytes || axes.is_empty() {
        axes.push(BpAxis {
            src_stride: run_bytes,
            dst_stride: run_bytes,
            count: narrow(pair.run_bytes / run_bytes),
            reserved: 0,
        });
    }
    if axes.len() > AXES_MAX {
        return None;
    }
    let (from, to) = (&pair.from, &pair.to);
    let (src, dst) = (src_region + from.base, dst_region + to.base);
    let strides = axes
        .iter()
        .flat_map(|axis| [axis.src_stride, axis.dst_stride])
        .chain([src, dst, from.block_stride, to.block_stride, run_bytes]);
    // The lowest bit that any of them has; 16 bytes are the longest access.
    let vector_bytes = 1
        << strides
            .fold(16u64, |all, field| all | field)
            .trailing_zeros();
    let units = pair.blocks()
        * axes
            .iter()
            .map(|axis| u64::from(axis.count))
            .product::<u64>();
    let (src_ids, src_first) = ids.add(&from.ids);
    let (dst_ids, dst_first) = ids.add(&to.ids);
    let mut out = BpPermute {
        src,
        dst,
        src_block: from.block_stride,
        dst_block: to.block_stride,
        src_ids,
        dst_ids,
        src_first,
        dst_first,
        blocks: narrow(pair.blocks()),
        axes: narrow(axes.len() as u64),
        run_bytes: narrow(run_bytes),
        vector_bytes,
        unit_end: units,
        ..BpPermute::default()
    };
    out.axis[..axes.len()].copy_from_slice(&axes);
    Some(out)
}

/// The longest part of a run that is short enough and divides it; the run itself if that would
/// be very short.
fn shorter(run_bytes: u64) -> u64 {
    if run_bytes <= RUN_BYTES_MAX {
        return run_bytes;
    }
    let parts = run_bytes.div_ceil(RUN_BYTES_MAX)..=run_bytes / 256;
    let even = parts
        .into_iter()
        .find(|parts| run_bytes.is_multiple_of(*parts));
    even.map_or(run_bytes, |parts| run_bytes / parts)
}
