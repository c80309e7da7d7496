//! Copies between mapped memories.
//!
//! Ordinary stores read the target's cache lines before they overwrite them. Once a transfer is
//! larger than the caches of a core, streaming stores, which do not, move 1.3 to 2 times as much.

use std::sync::LazyLock;

use crate::plan::Row;

/// Moves bytes between two places that this agent keeps alive.
///
/// # Safety
/// `from..from + bytes` must be mapped readable and `to..to + bytes` mapped writable for the whole
/// call. The ranges may overlap. Nobody holds a reference into either of them.
pub(crate) unsafe fn copy_bytes(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: mapped by the caller's contract; `copy` allows overlap and u8 needs no alignment. A
    // peer that writes the source or the destination at the same time makes the copied bytes
    // unspecified, which is what the protocol above (windows, completions) rules out.
    unsafe { std::ptr::copy(from, to, bytes) }
}

/// How the pieces of one transfer are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stores {
    /// Through the caches: the bytes are probably read again before they are evicted.
    Cached,
    /// Past the caches.
    Streaming,
}

impl Stores {
    /// Streaming stores from the size at which source and target do not fit a core's own cache.
    pub(crate) fn for_transfer(bytes: u64) -> Self {
        if bytes >= *STREAM_BYTES_MIN {
            Self::Streaming
        } else {
            Self::Cached
        }
    }
}

/// Half of the second-level cache; `u64::MAX` where there are no streaming stores.
static STREAM_BYTES_MIN: LazyLock<u64> = LazyLock::new(|| {
    if !streaming::available() {
        return u64::MAX;
    }
    // SAFETY: a question about the system without any precondition.
    let level2 = unsafe { libc::sysconf(libc::_SC_LEVEL2_CACHE_SIZE) };
    match u64::try_from(level2) {
        Ok(bytes) if bytes > 0 => bytes / 2,
        // Some kernels and C libraries do not know; the smallest that is common.
        _ => 512 << 10,
    }
});

/// Pieces below this length are not worth streaming.
const STREAM_PIECE_MIN: usize = 2048;

/// Like [`copy_bytes`], with the stores that the size of the whole transfer asks for. After the
/// last piece of a part comes [`publish`].
///
/// # Safety
/// As for [`copy_bytes`].
pub(crate) unsafe fn copy_piece(from: *const u8, to: *mut u8, bytes: usize, stores: Stores) {
    let apart = from.addr().abs_diff(to.addr()) >= bytes;
    if stores == Stores::Streaming && bytes >= STREAM_PIECE_MIN && apart {
        // SAFETY: by the contract of this function; the ranges do not overlap, and `for_transfer`
        // chose streaming on a processor that has it.
        unsafe { streaming::copy(from, to, bytes) }
    } else {
        // SAFETY: by the contract of this function.
        unsafe { copy_bytes(from, to, bytes) }
    }
}

/// Copies the runs of a row between two regions, with the stores that the size of the whole transfer
/// asks for.
///
/// # Safety
/// `from` and `to` are the first bytes of the regions whose offsets the row has, and every run of
/// the row lies in them; otherwise as for [`copy_bytes`].
pub(crate) unsafe fn copy_row(from: *const u8, to: *mut u8, row: Row, stores: Stores) {
    // Offsets and lengths inside regions, whose lengths are usize.
    let size = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    // SAFETY: inside the region, by the contract of this function.
    let mut from = unsafe { from.add(size(row.from)) };
    // SAFETY: as above.
    let mut to = unsafe { to.add(size(row.to)) };
    let (from_step, to_step) = (size(row.from_step), size(row.to_step));
    let (count, bytes) = (size(row.count), size(row.bytes));
    let extent = |step: usize| (count - 1) * step + bytes;
    let apart =
        from.addr() + extent(from_step) <= to.addr() || to.addr() + extent(to_step) <= from.addr();
    let whole_lines = (to.addr() | to_step | bytes).is_multiple_of(64);
    let short = count > 1 || bytes < STREAM_PIECE_MIN;
    if stores == Stores::Streaming && apart && whole_lines && short {
        // SAFETY: by the contract of this function; the runs do not overlap, are whole lines, and
        // `for_transfer` chose streaming on a processor that has it.
        unsafe { streaming::rows(from, to, bytes / 64, count, from_step, to_step) };
        return;
    }
    for _ in 0..count {
        // SAFETY: a run of the row, by the contract of this function.
        unsafe { copy_piece(from, to, bytes, stores) };
        from = from.wrapping_add(from_step);
        to = to.wrapping_add(to_step);
    }
}

/// Orders streamed bytes before everything that this thread does next: they are outside of the
/// order that release stores give to ordinary ones.
pub(crate) fn publish(stores: Stores) {
    if stores == Stores::Streaming {
        streaming::fence();
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod streaming {
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128,
        _mm256_loadu_si256, _mm256_stream_si256, _mm512_loadu_si512, _mm512_stream_si512,
    };
    use std::sync::LazyLock;

    /// Streams whole cache lines: `count` times `lines` of 64 bytes at these distances, the targets
    /// aligned to 64.
    type Lines = unsafe fn(
        from: *const u8,
        to: *mut u8,
        lines: usize,
        count: usize,
        from_step: usize,
        to_step: usize,
    );

    static LINES: LazyLock<Lines> = LazyLock::new(|| {
        if is_x86_feature_detected!("avx512f") {
            lines_512
        } else if is_x86_feature_detected!("avx") {
            lines_256
        } else {
            lines_128
        }
    });

    pub(super) const fn available() -> bool {
        true
    }

    pub(super) fn fence() {
        // SAFETY: every x86-64 processor has SSE.
        unsafe { _mm_sfence() };
    }

    /// # Safety
    /// As for `copy_bytes`, and the ranges do not overlap.
    pub(super) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
        let head = to.align_offset(64).min(bytes);
        // SAFETY: the first `head` bytes of both ranges.
        unsafe { std::ptr::copy_nonoverlapping(from, to, head) };
        let lines = (bytes - head) / 64;
        // SAFETY: `head <= bytes`.
        let from = unsafe { from.add(head) };
        // SAFETY: as above.
        let to = unsafe { to.add(head) };
        // SAFETY: `lines` whole lines lie within both ranges, `to` is aligned to 64 (or there are
        // no lines), and the function was chosen for this processor.
        unsafe { LINES(from, to, lines, 1, 0, 0) };
        let done = lines * 64;
        // SAFETY: `head + done <= bytes`.
        let from = unsafe { from.add(done) };
        // SAFETY: as above.
        let to = unsafe { to.add(done) };
        // SAFETY: the rest of both ranges.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes - head - done) };
    }

    /// Streams runs of whole cache lines.
    ///
    /// # Safety
    /// As for `copy_bytes` with each run; no run overlaps another, and every target is aligned to 64.
    pub(super) unsafe fn rows(
        from: *const u8,
        to: *mut u8,
        lines: usize,
        count: usize,
        from_step: usize,
        to_step: usize,
    ) {
        // SAFETY: by the contract of this function, chosen for this processor.
        unsafe { LINES(from, to, lines, count, from_step, to_step) };
    }

    macro_rules! lines {
        ($name:ident, $feature:literal, $vector:ty, $load:ident, $store:ident) => {
            #[target_feature(enable = $feature)]
            unsafe fn $name(
                from: *const u8,
                to: *mut u8,
                lines: usize,
                count: usize,
                from_step: usize,
                to_step: usize,
            ) {
                const PER_LINE: usize = 64 / size_of::<$vector>();
                for run in 0..count {
                    let mut from = from.wrapping_add(run * from_step).cast::<$vector>();
                    let mut to = to.wrapping_add(run * to_step).cast::<$vector>();
                    for _ in 0..lines {
                        let mut line =
                            [const { std::mem::MaybeUninit::<$vector>::uninit() }; PER_LINE];
                        for (index, part) in line.iter_mut().enumerate() {
                            // SAFETY: within the line that the caller vouches for.
                            let from = unsafe { from.add(index) };
                            // SAFETY: readable, and the load is an unaligned one.
                            part.write(unsafe { $load(from.cast()) });
                        }
                        for (index, part) in line.iter().enumerate() {
                            // SAFETY: within the line that the caller vouches for.
                            let to = unsafe { to.add(index) };
                            // SAFETY: written by the loop above.
                            let part = unsafe { part.assume_init() };
                            // SAFETY: writable and aligned to 64.
                            unsafe { $store(to.cast(), part) };
                        }
                        // SAFETY: at most one past the end of the source.
                        from = unsafe { from.add(PER_LINE) };
                        // SAFETY: at most one past the end of the target.
                        to = unsafe { to.add(PER_LINE) };
                    }
                }
            }
        };
    }

    lines!(
        lines_128,
        "sse2",
        __m128i,
        _mm_loadu_si128,
        _mm_stream_si128
    );
    lines!(
        lines_256,
        "avx",
        __m256i,
        _mm256_loadu_si256,
        _mm256_stream_si256
    );
    lines!(
        lines_512,
        "avx512f",
        __m512i,
        _mm512_loadu_si512,
        _mm512_stream_si512
    );

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn every_width_copies_every_byte() {
            let mut widths: Vec<(&str, Lines)> = vec![("sse2", lines_128)];
            if is_x86_feature_detected!("avx") {
                widths.push(("avx", lines_256));
            }
            if is_x86_feature_detected!("avx512f") {
                widths.push(("avx512f", lines_512));
            }
            for (name, lines) in widths {
                let from: Vec<u8> = (0..=255).cycle().take(64 * 9 + 3).collect();
                let mut to = vec![0u8; 64 * 10];
                let at = to.as_ptr().align_offset(64);
                let (source, target) = (from[3..].as_ptr(), to[at..].as_mut_ptr());
                // SAFETY: 8 lines from an odd place in `from` to an aligned place in `to`.
                unsafe { lines(source, target, 8, 1, 0, 0) };
                fence();
                assert_eq!(&to[at..at + 512], &from[3..515], "{name}");
                assert!(to[at + 512..].iter().all(|byte| *byte == 0), "{name}");
                to.fill(0);
                let target = to[at..].as_mut_ptr();
                // SAFETY: two lines at three places of each, 100 and 192 bytes apart.
                unsafe { lines(source, target, 2, 3, 100, 192) };
                fence();
                for (place, bytes) in to[at..at + 512].chunks(64).enumerate() {
                    let run = &from[3 + place / 3 * 100..];
                    match place % 3 {
                        2 => assert!(bytes.iter().all(|byte| *byte == 0), "{name}"),
                        line => assert_eq!(bytes, &run[line * 64..][..64], "{name}"),
                    }
                }
            }
        }
    }
}

#[cfg(any(not(target_arch = "x86_64"), miri))]
mod streaming {
    pub(super) const fn available() -> bool {
        false
    }

    pub(super) const fn fence() {}

    /// # Safety
    /// As for `copy_bytes`.
    pub(super) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
        // SAFETY: by the contract of this function.
        unsafe { super::copy_bytes(from, to, bytes) }
    }

    /// # Safety
    /// As for `copy_bytes` with each run.
    pub(super) unsafe fn rows(
        from: *const u8,
        to: *mut u8,
        lines: usize,
        count: usize,
        from_step: usize,
        to_step: usize,
    ) {
        for run in 0..count {
            let (from, to) = (
                from.wrapping_add(run * from_step),
                to.wrapping_add(run * to_step),
            );
            // SAFETY: by the contract of this function.
            unsafe { super::copy_bytes(from, to, lines * 64) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_place_and_length_arrive_whole() {
        let from: Vec<u8> = (0..=250).cycle().take(20_000).collect();
        for bytes in [0, 1, 63, 64, 65, 2047, 2048, 2049, 4096, 9999] {
            for (from_at, to_at) in [(0, 0), (1, 0), (0, 1), (13, 51), (63, 64)] {
                let mut to = vec![0xee; 12_000];
                // SAFETY: both ranges lie in their vectors, which are apart.
                unsafe {
                    copy_piece(
                        from[from_at..].as_ptr(),
                        to[to_at..].as_mut_ptr(),
                        bytes,
                        Stores::Streaming,
                    );
                }
                publish(Stores::Streaming);
                assert_eq!(to[to_at..to_at + bytes], from[from_at..from_at + bytes]);
                assert!(to[..to_at].iter().all(|b| *b == 0xee));
                assert!(to[to_at + bytes..].iter().all(|b| *b == 0xee));
            }
        }
    }

    #[test]
    fn rows_of_any_shape_arrive_whole() {
        let from: Vec<u8> = (0..=250).cycle().take(20_000).collect();
        for (bytes, count) in [(1, 9), (64, 5), (96, 3), (256, 8), (256, 1), (4096, 2)] {
            for (from_step, to_step) in [(1, 0), (0, 1), (64, 128), (3, 7)] {
                let mut to = vec![0xee; 20_000];
                let align = to.as_ptr().align_offset(64);
                for at in [align, align + 1] {
                    to.fill(0xee);
                    let row = Row {
                        from: 11,
                        to: at as u64,
                        count: count as u64,
                        from_step: bytes as u64 + from_step,
                        to_step: bytes as u64 + to_step,
                        bytes: bytes as u64,
                    };
                    let mut expected = to.clone();
                    for run in 0..count {
                        let x = 11 + run * (bytes + usize::try_from(from_step).unwrap());
                        let y = at + run * (bytes + usize::try_from(to_step).unwrap());
                        expected[y..y + bytes].copy_from_slice(&from[x..x + bytes]);
                    }
                    for stores in [Stores::Cached, Stores::Streaming] {
                        to.fill(0xee);
                        // SAFETY: the row lies in both vectors, which are apart.
                        unsafe { copy_row(from.as_ptr(), to.as_mut_ptr(), row, stores) };
                        publish(stores);
                        assert_eq!(to, expected, "{row:?} {stores:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn overlapping_ranges_move() {
        let mut bytes: Vec<u8> = (0..=250).cycle().take(10_000).collect();
        let expected = bytes[..9000].to_vec();
        let base = bytes.as_mut_ptr();
        let to = base.wrapping_add(1000);
        // SAFETY: both ranges lie in the vector.
        unsafe { copy_piece(base, to, 9000, Stores::Streaming) };
        assert_eq!(bytes[1000..], expected);
    }
}
