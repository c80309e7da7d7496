//! Which kernel copies, and in which shape: pure rules, made from measurements on two H200 (NVLink 18 x
//! 26.6 GB/s, PCIe 5; `bench/gpu/kernels_check.py`).
//!
//! In GB/s, scattered blocks of 4 / 32 KiB in chunks of 4 / 8 KiB, by the number of CTAs:
//!
//! | kernel | push 4 | 8 | 16 | 64 | pull 4 | 8 | 16 | 64 |
//! |---|---|---|---|---|---|---|---|---|
//! | `bp_copy_bulk`, 48 / 24 stages | 177 / 172 | 346 / 334 | 343 / 337 | 360 / 353 | 195 / 197 | 362 / 359 | 365 / 365 | 362 / 360 |
//! | `bp_copy_lanes`, 24 warps | 166 / 169 | 324 / 331 | 344 / 344 | 362 / 360 | 170 / 182 | 343 / 363 | 368 / 370 | 368 / 367 |
//!
//! So the bulk kernel copies with few CTAs and the other one with many; what is not aligned, and older
//! devices, have the other one only. Over the bus to host memory four CTAs of either are enough (52 and
//! 51 GB/s). What fits in the registers of one CTA is copied by one, which needs no counter to know
//! that it is the last one, and no shared memory.

/// Rows of 512 bytes in the slots of a warp, `BP_ROWS`.
const WARP_SLOTS_BYTES: u32 = 16 * 512;
/// Warps of a CTA of `bp_copy_lanes` and `bp_permute`: their launch bound, and what fills the shared
/// memory.
const WARPS_MAX: u32 = 24;
/// `BP_STAGES_MAX` and `BP_STAGES_PER_WARP`.
const STAGES_MAX: u32 = 48;
const STAGES_PER_WARP: u32 = 4;
/// Dynamic shared memory of a CTA that the kernels make use of.
pub(crate) const SHARED_BYTES_MAX: u32 = WARPS_MAX * WARP_SLOTS_BYTES;
/// Their static shared memory, and what the driver keeps for itself.
pub(crate) const SHARED_BYTES_STATIC: u32 = 2 << 10;
/// Warps of the one CTA of `bp_copy_small`, and the bytes that they hold in registers: 4 rows a warp.
const SMALL_WARPS: u32 = 32;
const SMALL_BYTES_MAX: u64 = SMALL_WARPS as u64 * SMALL_CHUNK_BYTES_MAX;
const SMALL_CHUNK_BYTES_MAX: u64 = 4 * ROW_BYTES;
/// What one instruction of a warp moves.
const ROW_BYTES: u64 = 512;
/// A chunk is what a warp fetches at a time, at most; less where that leaves warps without one.
const CHUNK_BYTES_MAX: u64 = WARP_SLOTS_BYTES as u64;
const CHUNK_BYTES_MIN: u64 = 2 * ROW_BYTES;
/// Up to this many CTAs bulk copies are faster, with chunks of at least this size.
const BULK_CTAS_MAX: u32 = 8;
const BULK_CHUNK_BYTES_MIN: u32 = 4 << 10;
/// Runs that a warp of the permuting kernel should get before there are more of them.
const UNITS_PER_WARP: u64 = 8;

/// What a device can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// It has bulk copies.
    pub(crate) bulk: bool,
    /// Dynamic shared memory of a CTA, up to [`SHARED_BYTES_MAX`]; at least 32 KiB, and every
    /// device has three times as much.
    pub(crate) shared_bytes: u32,
}

/// The kernels that keep the order of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyBy {
    /// `bp_copy_small`.
    Small,
    /// `bp_copy_lanes`.
    Lanes,
    /// `bp_copy_bulk`.
    Bulk,
}

/// A launch: CTAs, threads of each, and dynamic shared memory of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) ctas: u32,
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

/// How large the chunks are of an operation that copies `bytes` in pieces of up to `piece_bytes_max`,
/// with about `sms` multiprocessors.
pub(crate) fn chunk_bytes(bytes: u64, piece_bytes_max: u64, sms: u32) -> u64 {
    let parts = piece_bytes_max.div_ceil(CHUNK_BYTES_MAX).max(1);
    // Chunks of a piece are about as long as each other.
    let largest = if parts == 1 {
        piece_bytes_max.max(16).next_multiple_of(16)
    } else {
        piece_bytes_max.div_ceil(parts).next_multiple_of(ROW_BYTES)
    };
    let (warps, smallest, largest) = if bytes <= SMALL_BYTES_MAX {
        let warps = u64::from(SMALL_WARPS);
        (warps, ROW_BYTES, largest.min(SMALL_CHUNK_BYTES_MAX))
    } else {
        let warps = u64::from(sms.max(1)) * u64::from(WARPS_MAX);
        (warps, CHUNK_BYTES_MIN, largest)
    };
    let fair = bytes.div_ceil(warps).next_multiple_of(ROW_BYTES);
    fair.clamp(smallest.min(largest), largest)
}

/// Who copies `chunks` chunks of an operation that copies `bytes` in all, with up to `sms` CTAs.
pub(crate) fn copy(
    limits: Limits,
    aligned: bool,
    bytes: u64,
    chunk_bytes: u32,
    chunks: u32,
    sms: u32,
) -> (CopyBy, Shape) {
    let (chunks, sms) = (chunks.max(1), sms.max(1));
    if bytes <= SMALL_BYTES_MAX {
        let shape = Shape {
            ctas: 1,
            threads: 32 * chunks.min(SMALL_WARPS),
            shared_bytes: 0,
        };
        return (CopyBy::Small, shape);
    }
    let spread = chunks.div_ceil(sms);
    if limits.bulk && aligned && sms <= BULK_CTAS_MAX && chunk_bytes >= BULK_CHUNK_BYTES_MIN {
        let most = (limits.shared_bytes / chunk_bytes).min(STAGES_MAX) / STAGES_PER_WARP;
        let warps = spread.div_ceil(STAGES_PER_WARP).min(most).max(1);
        let stages = warps * STAGES_PER_WARP;
        let shape = Shape {
            ctas: chunks.div_ceil(stages).min(sms),
            threads: 32 * warps,
            shared_bytes: stages * chunk_bytes,
        };
        return (CopyBy::Bulk, shape);
    }
    (CopyBy::Lanes, slotted(limits, chunks.into(), sms))
}

/// The launch of `bp_permute` for `units` units, with up to `sms` CTAs.
pub(crate) fn permute(limits: Limits, units: u64, sms: u32) -> Shape {
    slotted(limits, units.div_ceil(UNITS_PER_WARP), sms.max(1))
}

/// A launch of a kernel whose warps have slots, for `warps` warps if there can be as many.
fn slotted(limits: Limits, warps: u64, sms: u32) -> Shape {
    let most = (limits.shared_bytes / WARP_SLOTS_BYTES).min(WARPS_MAX);
    let each = warps.div_ceil(sms.into()).clamp(1, most.max(1).into());
    let ctas = warps.div_ceil(each).clamp(1, sms.into());
    let each = u32::try_from(each).unwrap_or(most);
    Shape {
        ctas: u32::try_from(ctas).unwrap_or(sms),
        threads: 32 * each,
        shared_bytes: each * WARP_SLOTS_BYTES,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const H200: Limits = Limits {
        bulk: true,
        shared_bytes: SHARED_BYTES_MAX,
    };
    const OLDER: Limits = Limits {
        bulk: false,
        shared_bytes: 99 << 10,
    };

    fn whole(limits: Limits, bytes: u64, piece: u64, sms: u32) -> (u64, CopyBy, Shape) {
        let chunk = chunk_bytes(bytes, piece, sms);
        let chunks = bytes / piece * piece.div_ceil(chunk);
        let chunks = u32::try_from(chunks).unwrap();
        let small = u32::try_from(chunk).unwrap();
        let (by, shape) = copy(limits, true, bytes, small, chunks, sms);
        (chunk, by, shape)
    }

    fn shape(ctas: u32, threads: u32, shared_bytes: u32) -> Shape {
        Shape {
            ctas,
            threads,
            shared_bytes,
        }
    }

    #[test]
    fn sizes_have_the_shapes_that_were_measured() {
        let scattered = |piece, sms| whole(H200, 512 << 20, piece, sms);
        let full = |ctas| shape(ctas, 768, 192 << 10);
        assert_eq!(scattered(4096, 16), (4096, CopyBy::Lanes, full(16)));
        assert_eq!(scattered(32 << 10, 64), (8192, CopyBy::Lanes, full(64)));
        let few = (4096, CopyBy::Bulk, shape(4, 384, 192 << 10));
        assert_eq!(scattered(4096, 4), few);
        // As many stages as fit.
        let few = (8192, CopyBy::Bulk, shape(8, 192, 192 << 10));
        assert_eq!(scattered(1 << 20, 8), few);
        // Chunks of a piece are about as long as each other.
        assert_eq!(scattered(20 << 10, 16).0, 7168);
        // An older device has fewer warps.
        let (_, by, less) = whole(OLDER, 512 << 20, 32 << 10, 4);
        assert_eq!((by, less), (CopyBy::Lanes, shape(4, 384, 96 << 10)));
    }

    #[test]
    fn what_is_small_is_for_one_cta_and_all_at_once() {
        assert_eq!(
            whole(H200, 16, 16, 16),
            (16, CopyBy::Small, shape(1, 32, 0))
        );
        let four = (512, CopyBy::Small, shape(1, 256, 0));
        assert_eq!(whole(H200, 4096, 4096, 16), four);
        let most = (2048, CopyBy::Small, shape(1, 1024, 0));
        assert_eq!(whole(H200, 64 << 10, 64 << 10, 16), most);
        assert_eq!(whole(H200, 64 << 10, 4096, 4), most);
        // A mebibyte has a chunk for almost every warp.
        let (chunk, by, shape) = whole(H200, 1 << 20, 1 << 20, 16);
        assert_eq!((chunk, by), (3072, CopyBy::Lanes));
        assert_eq!((shape.ctas, shape.threads), (16, 704));
    }

    proptest! {
        #[test]
        fn every_launch_is_within_the_bounds_of_its_kernel(
            piece in 1u64..1 << 21,
            pieces in 1u64..5000,
            sms in 1u32..200,
            shared_bytes in (32u32 << 10)..=SHARED_BYTES_MAX,
            bulk: bool,
            aligned: bool,
        ) {
            let limits = Limits { bulk, shared_bytes };
            let bytes = piece * pieces;
            let chunk = chunk_bytes(bytes, piece, sms);
            prop_assert!(chunk.is_multiple_of(16) && (16..=CHUNK_BYTES_MAX).contains(&chunk));
            let chunks = u32::try_from(pieces * piece.div_ceil(chunk)).unwrap();
            let chunk = u32::try_from(chunk).unwrap();
            let (by, shape) = copy(limits, aligned, bytes, chunk, chunks, sms);
            prop_assert!((1..=sms).contains(&shape.ctas) && shape.ctas <= chunks);
            prop_assert!(shape.threads % 32 == 0 && shape.shared_bytes <= shared_bytes);
            let warps = shape.threads / 32;
            match by {
                CopyBy::Small => prop_assert!(shape.ctas == 1 && (1..=32).contains(&warps)),
                CopyBy::Lanes => {
                    prop_assert!((1..=WARPS_MAX).contains(&warps));
                    prop_assert_eq!(shape.shared_bytes, warps * WARP_SLOTS_BYTES);
                }
                CopyBy::Bulk => {
                    prop_assert!(aligned && bulk && (1..=STAGES_MAX / 4).contains(&warps));
                    prop_assert_eq!(shape.shared_bytes, warps * 4 * chunk);
                }
            }
            let shape = permute(limits, bytes, sms);
            prop_assert!((1..=sms).contains(&shape.ctas) && shape.threads <= 768);
            prop_assert!(shape.shared_bytes == shape.threads / 32 * WARP_SLOTS_BYTES);
            prop_assert!(shape.shared_bytes <= shared_bytes);
        }
    }
}
