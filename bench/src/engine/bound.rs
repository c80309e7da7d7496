//! What the memory of this machine allows a decode step.

use std::{hint::black_box, thread, time::Instant};

/// Larger than caches, in 8-byte words.
const WORDS: usize = (256 << 20) / 8;

/// Bytes that a decode step has to read, and how fast they can be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemoryBound {
    pub(super) bytes_per_s: f64,
    pub(super) weight_bytes: u64,
    pub(super) kv_bytes_per_token: u64,
}

impl MemoryBound {
    /// Most tokens per second of all sequences together.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
    pub(super) fn decode_tokens_per_s(&self, sequences: u32, context: u32) -> f64 {
        let kv = self.kv_bytes_per_token * u64::from(context) * u64::from(sequences);
        let step = (self.weight_bytes + kv) as f64;
        f64::from(sequences) * self.bytes_per_s / step
    }
}

/// Bytes per second that `threads` threads read together. A bound is what is possible: the best of
/// several passes counts.
pub(crate) fn read_bandwidth(threads: usize) -> f64 {
    let words = vec![1u64; WORDS];
    let mut best = 0.0_f64;
    for _ in 0..5 {
        let start = Instant::now();
        thread::scope(|scope| {
            for part in words.chunks(WORDS.div_ceil(threads)) {
                scope.spawn(|| black_box(sum(part)));
            }
        });
        let bytes = f64::from(u32::try_from(WORDS * 8).unwrap_or(u32::MAX));
        best = best.max(bytes / start.elapsed().as_secs_f64());
    }
    best
}

/// Independent sums, so that reading and not adding is what takes the time.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    let chunks = words.chunks_exact(16);
    let rest: u64 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(rest, |a, &b| a.wrapping_add(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reads_the_weights_once_for_all_sequences() {
        let bound = MemoryBound {
            bytes_per_s: 1e9,
            weight_bytes: 900_000,
            kv_bytes_per_token: 100,
        };
        let near = |left: f64, right: f64| (left - right).abs() < 1e-6;
        assert!(near(bound.decode_tokens_per_s(1, 1000), 1_000.0));
        assert!(near(bound.decode_tokens_per_s(4, 1000), 4e9 / 1_300_000.0));
    }

    #[test]
    fn sums_are_whole() {
        let words: Vec<u64> = (0..37).collect();
        assert_eq!(sum(&words), 666);
    }
}
