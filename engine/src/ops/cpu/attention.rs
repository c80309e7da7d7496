//! Attention of a tile of rows over the blocks of one sequence, for one key/value head.
//!
//! Keys are taken in tiles of 64 positions, aligned to position 0, and folded into a running
//! softmax (maximum, sum, weighted values) in single precision. A tile that a row cannot see
//! leaves its state untouched bit for bit, so the result for a row depends neither on the other
//! rows nor on where a chunk begins.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "the loads and stores of a tile rest on the one contract of `Attend`"
)]

use std::ops::Range;

use super::gemm::{Product, product};
use super::rows;
use super::simd::Simd;

/// Keys folded in at a time.
pub(super) const KEYS: usize = 64;

/// With no more rows than this a tile waits for memory and not for arithmetic.
const ROWS_AHEAD: usize = 16;

/// Where the rows of keys and values are.
pub(super) trait Cached: Copy {
    /// Widens `LANES` elements.
    ///
    /// # Safety
    /// `from` is valid for reading as many.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::F;
    /// Widens one element.
    fn widen(self) -> f32;
    /// Elements of each row that [`transpose`](Self::transpose) takes.
    fn transposed<S: Simd>() -> usize;
    /// Widens a square of `LANES` rows and turns it: number `r` of row `c` goes to
    /// `to + r * stride + c`.
    ///
    /// # Safety
    /// `LANES` pointers at `rows` are valid for reading `transposed` elements, `to` for writing
    /// as many rows of `LANES` numbers.
    unsafe fn transpose<S: Simd>(s: S, rows: *const *const Self, to: *mut f32, stride: usize);
}

impl Cached for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn transposed<S: Simd>() -> usize {
        S::LANES
    }
    #[inline(always)]
    unsafe fn transpose<S: Simd>(s: S, rows: *const *const Self, to: *mut f32, stride: usize) {
        // SAFETY: the caller's.
        unsafe { s.transpose(rows, to, stride) };
    }
}

/// bfloat16.
impl Cached for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_bf16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
    #[inline(always)]
    fn transposed<S: Simd>() -> usize {
        2 * S::LANES
    }
    #[inline(always)]
    unsafe fn transpose<S: Simd>(s: S, rows: *const *const Self, to: *mut f32, stride: usize) {
        // SAFETY: the caller's.
        unsafe { s.transpose_bf16(rows, to, stride) };
    }
}

/// One tile of rows of one sequence for one key/value head.
///
/// Whoever calls the kernel with it promises: `queries` has `tokens * group` rows of `head_dim`
/// numbers, token by token; `key_run(p)` points to whole keys, and `value_offset` elements after it
/// to their values, for every position `p` below `position + tokens`; `out` has `head_dim` numbers for head `g` of token `t`
/// at `out + t * out_stride + g * head_dim` that nobody else touches.
pub(super) struct Attend<'a, K> {
    pub(super) queries: *const f32,
    /// Query heads that share this key/value head.
    pub(super) group: usize,
    pub(super) head_dim: usize,
    pub(super) tokens: usize,
    /// Position of the first token.
    pub(super) position: usize,
    /// Tokens seen, the current one included.
    pub(super) window: usize,
    /// The key at a position, and how many keys from there on lie one after the other.
    pub(super) key_run: &'a dyn Fn(usize) -> (*const K, usize),
    pub(super) value_offset: usize,
    /// How many elements after a key of this head is that of the head computed next, 0 if none is.
    pub(super) next_head: usize,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    pub(super) scratch: &'a mut Scratch,
}

/// Working memory of one thread, grown as needed.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    floats: Vec<f32>,
}

impl Scratch {
    /// `n` numbers of any value.
    pub(super) fn get(&mut self, n: usize) -> &mut [f32] {
        if self.floats.len() < n {
            self.floats.resize(n, 0.0);
        }
        &mut self.floats[..n]
    }
}

/// Computes the tile with panels of `VECTORS * LANES`.
///
/// # Safety
/// As [`Attend`] says.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, K: Cached, const ROWS: usize, const VECTORS: usize>(
    s: S,
    a: &mut Attend<'_, K>,
) {
    let width = VECTORS * S::LANES;
    let dim = a.head_dim;
    let padded = dim.next_multiple_of(width);
    let rows = a.tokens * a.group;
    let scratch = a
        .scratch
        .get((dim + padded + rows) * KEYS + rows * (padded + 2));
    let (keys, scratch) = scratch.split_at_mut(dim * KEYS);
    let (values, scratch) = scratch.split_at_mut(padded * KEYS);
    let (scores, scratch) = scratch.split_at_mut(rows * KEYS);
    let (sums, scratch) = scratch.split_at_mut(rows * padded);
    let (maxima, totals) = scratch.split_at_mut(rows);
    sums.fill(0.0);
    maxima.fill(f32::NEG_INFINITY);
    totals.fill(0.0);
    let scale = 1.0 / rows_root(dim);

    let end = a.position + a.tokens;
    let first = (a.position + 1).saturating_sub(a.window);
    let first = first - first % KEYS;
    let mut next = locate(a.key_run, first..end, dim);
    for base in (first..end).step_by(KEYS) {
        let count = KEYS.min(end - base);
        let at = next;
        if base + KEYS < end {
            next = locate(a.key_run, base + KEYS..end, dim);
        }
        if rows <= ROWS_AHEAD {
            // So few rows wait for memory: ask for the values of this tile and the next keys.
            for &row in &at[..count] {
                ask(s, row.wrapping_add(a.value_offset), dim);
            }
            let (ahead, offset) = if base + KEYS < end {
                (next, 0)
            } else {
                (locate(a.key_run, first..end, dim), a.next_head)
            };
            for &row in ahead.iter().take_while(|row| !row.is_null()) {
                ask(s, row.wrapping_add(offset), dim);
            }
        }
        // SAFETY: the rows are there by the contract, the panels have room for `KEYS` positions.
        unsafe {
            pack_keys(s, &at[..count], dim, width, keys);
            pack_values(s, &at[..count], a.value_offset, dim, width, values);
        }
        for panel in 0..KEYS / width {
            // SAFETY: `rows` queries of `dim`, a whole panel of keys, and `rows` rows of scores.
            unsafe {
                product::<S, f32, ROWS, VECTORS>(
                    s,
                    Product {
                        x: a.queries,
                        x_stride: dim,
                        rows,
                        inputs: dim,
                        panel: keys.as_ptr().add(panel * width * dim),
                        bias: std::ptr::null(),
                        out: scores.as_mut_ptr().add(panel * width),
                        out_stride: KEYS,
                        add: false,
                    },
                );
            }
        }
        for row in 0..rows {
            let position = a.position + row / a.group;
            let from = (position + 1).saturating_sub(a.window).saturating_sub(base);
            let to = (position + 1).saturating_sub(base);
            let seen = from.min(KEYS)..to.min(KEYS);
            let scores = &mut scores[row * KEYS..(row + 1) * KEYS];
            let sums = &mut sums[row * padded..(row + 1) * padded];
            fold(
                s,
                scores,
                seen,
                scale,
                &mut maxima[row],
                &mut totals[row],
                sums,
            );
        }
        for panel in 0..padded / width {
            // SAFETY: `rows` rows of `count` weights, a whole panel of values, padded sums.
            unsafe {
                product::<S, f32, ROWS, VECTORS>(
                    s,
                    Product {
                        x: scores.as_ptr(),
                        x_stride: KEYS,
                        rows,
                        inputs: count,
                        panel: values.as_ptr().add(panel * width * KEYS),
                        bias: std::ptr::null(),
                        out: sums.as_mut_ptr().add(panel * width),
                        out_stride: padded,
                        add: true,
                    },
                );
            }
        }
    }

    for row in 0..rows {
        let inverse = 1.0 / totals[row];
        // SAFETY: the row of this head and token is ours by the contract.
        let out = unsafe {
            let out = a
                .out
                .add((row / a.group) * a.out_stride + (row % a.group) * dim);
            std::slice::from_raw_parts_mut(out, dim)
        };
        for (out, sum) in out.iter_mut().zip(&sums[row * padded..]) {
            *out = sum * inverse;
        }
    }
}

/// The keys at `positions`, at most `KEYS` of them; null beyond.
#[inline(always)]
fn locate<K>(
    key_run: &dyn Fn(usize) -> (*const K, usize),
    positions: Range<usize>,
    dim: usize,
) -> [*const K; KEYS] {
    let mut at = [std::ptr::null(); KEYS];
    let count = KEYS.min(positions.len());
    let mut t = 0;
    while t < count {
        let (key, run) = key_run(positions.start + t);
        for (i, at) in at[t..count].iter_mut().take(run).enumerate() {
            *at = key.wrapping_add(i * dim);
        }
        t += run;
    }
    at
}

/// Asks for the cache lines of a row of `dim` elements.
#[inline(always)]
fn ask<S: Simd, K>(s: S, row: *const K, dim: usize) {
    let row = row.cast::<u8>();
    for byte in (0..dim * size_of::<K>()).step_by(64) {
        s.prefetch(row.wrapping_add(byte));
    }
}

/// Turns one row of scores into weights, and moves what was summed so far to the new maximum.
#[inline(always)]
fn fold<S: Simd>(
    s: S,
    scores: &mut [f32],
    seen: Range<usize>,
    scale: f32,
    maximum: &mut f32,
    total: &mut f32,
    sums: &mut [f32],
) {
    if seen.is_empty() {
        scores.fill(0.0);
        return;
    }
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    let vectors = scores.len() / S::LANES;
    let base = scores.as_mut_ptr();
    // SAFETY: `vectors` whole vectors lie inside `scores`.
    let greatest = unsafe {
        let mut greatest = s.load(base);
        for v in 1..vectors {
            greatest = s.max(greatest, s.load(base.add(v * S::LANES)));
        }
        s.greatest(greatest)
    };
    let new = maximum.max(greatest * scale);
    if new > *maximum {
        let shrink = (*maximum - new).exp();
        *maximum = new;
        *total *= shrink;
        for sum in sums.iter_mut() {
            *sum *= shrink;
        }
    }
    // SAFETY: as above.
    unsafe {
        for v in 0..vectors {
            let at = base.add(v * S::LANES);
            let shifted = s.fma(s.load(at), s.splat(scale), s.splat(-*maximum));
            s.store(at, s.exp(shifted));
        }
    }
    // What is not seen counts nothing at all, not merely little.
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    // SAFETY: as above.
    *total += unsafe {
        let mut sum = s.load(base);
        for v in 1..vectors {
            sum = s.add(sum, s.load(base.add(v * S::LANES)));
        }
        s.sum(sum)
    };
}

/// Keys as panels `[position / width][dim][position % width]`; anything where there is none.
///
/// # Safety
/// Every pointer of `at` is valid for `dim` elements, and `out` has `dim * KEYS` numbers.
#[inline(always)]
unsafe fn pack_keys<S: Simd, K: Cached>(
    s: S,
    at: &[*const K],
    dim: usize,
    width: usize,
    out: &mut [f32],
) {
    let step = K::transposed::<S>();
    for (group, at) in at.chunks(S::LANES).enumerate() {
        let t = group * S::LANES;
        let out = &mut out[t / width * width * dim + t % width..];
        let whole = if at.len() == S::LANES {
            dim - dim % step
        } else {
            0
        };
        for d in (0..whole).step_by(step) {
            let mut rows = [std::ptr::null::<K>(); KEYS];
            for (row, &at) in rows.iter_mut().zip(at) {
                *row = at.wrapping_add(d);
            }
            // SAFETY: a whole group of rows with `step` more elements, and room for as many.
            unsafe { K::transpose(s, rows.as_ptr(), out.as_mut_ptr().add(d * width), width) };
        }
        for (t, &row) in at.iter().enumerate() {
            for d in whole..dim {
                // SAFETY: the caller's; `d < dim`.
                out[d * width + t] = unsafe { *row.add(d) }.widen();
            }
        }
    }
}

/// Values as panels `[dim / width][position][dim % width]`, zero beyond `dim`.
///
/// # Safety
/// Every pointer of `at`, moved on by `offset`, is valid for `dim` elements, and `out` has room for
/// `KEYS` positions of `dim` rounded up to `width`.
#[inline(always)]
unsafe fn pack_values<S: Simd, K: Cached>(
    s: S,
    at: &[*const K],
    offset: usize,
    dim: usize,
    width: usize,
    out: &mut [f32],
) {
    for panel in 0..dim.div_ceil(width) {
        let out = &mut out[panel * width * KEYS..][..width * KEYS];
        let columns = width.min(dim - panel * width);
        let whole = columns - columns % S::LANES;
        for (t, &row) in at.iter().enumerate() {
            let out = &mut out[t * width..(t + 1) * width];
            // SAFETY: the caller's; every access is below `dim`.
            unsafe {
                let row = row.add(offset + panel * width);
                for i in (0..whole).step_by(S::LANES) {
                    s.store(out.as_mut_ptr().add(i), K::load(s, row.add(i)));
                }
                for (i, out) in out.iter_mut().enumerate().skip(whole) {
                    *out = if i < columns {
                        (*row.add(i)).widen()
                    } else {
                        0.0
                    };
                }
            }
        }
    }
}

fn rows_root(dim: usize) -> f32 {
    rows::count(dim).sqrt()
}
