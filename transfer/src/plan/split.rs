//! Cutting a logical byte sequence into parts for threads and stripes for streams.

use std::ops::Range;

/// Number of parts of `part_bytes` in `bytes`.
pub(crate) fn parts_of(bytes: u64, part_bytes: u64) -> u64 {
    bytes.div_ceil(part_bytes)
}

/// Logical range of part `index`.
pub(crate) fn part_range(bytes: u64, part_bytes: u64, index: u64) -> Range<u64> {
    let start = index * part_bytes;
    start..bytes.min(start.saturating_add(part_bytes))
}

/// Cuts `bytes` into at most `streams` stripes of nearly equal size, none below `stripe_bytes_min`
/// except when there is only one.
pub(crate) fn stripes(
    bytes: u64,
    streams: usize,
    stripe_bytes_min: u64,
) -> impl Iterator<Item = Range<u64>> {
    let count = (bytes / stripe_bytes_min.max(1)).clamp(1, streams.max(1) as u64);
    let each = bytes.div_ceil(count).next_multiple_of(64);
    (0..count)
        .map(move |i| part_range(bytes, each, i))
        .filter(|range| range.start < range.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_transfers_stay_on_one_stream() {
        assert_eq!(
            stripes(1000, 4, 4096).collect::<Vec<_>>(),
            std::iter::once(0..1000).collect::<Vec<_>>()
        );
        assert_eq!(stripes(1 << 20, 4, 4096).count(), 4);
        assert_eq!(stripes(0, 4, 4096).count(), 0);
    }
}
