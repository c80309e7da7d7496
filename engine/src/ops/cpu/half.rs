//! Matrix products on 16-bit operands: half precision (AVX512-FP16) and bfloat16 (AVX512-BF16).
//!
//! Both read panels of 64 outputs and rows of 16-bit activations, and sum every output over the
//! inputs in one fixed order.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "all loads and stores of a tile rest on the one contract of `Product`"
)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::buffers::CACHE_LINE_BYTES;
use super::gemm::{Part, Product, write_rows};
use super::rows;
use super::simd::{Avx512, Simd};

/// Outputs per panel.
pub(super) const WIDTH: usize = 64;
/// Terms summed in half precision, in each of two sums per output, before these are added up in
/// single precision.
const TERMS: usize = 64;
/// Cache lines of the weights of two inputs.
const LINES: usize = 4;
/// Operands of half-precision products are scaled by powers of two to magnitudes below this, so
/// that no two sums of `TERMS` products can overflow: 2 * 64 * 16 * 16 < 65504.
const MAGNITUDE: f32 = 16.0;

/// Half-precision rows and panels: a product, and the powers of two to undo the scaling.
#[derive(Clone, Copy)]
pub(super) struct Scaled {
    pub(super) product: Product<u16, u16>,
    /// One per row of `x`.
    pub(super) row_scales: *const f32,
    pub(super) panel_scale: f32,
}

/// The power of two that brings `magnitude` into half of `MAGNITUDE`..`MAGNITUDE`, and its inverse.
pub(super) fn scales(magnitude: f32) -> (f32, f32) {
    const EXPONENT: u32 = 0xff << 23;
    // Where there is nothing to scale, or nothing that scaling would save.
    if !(magnitude.is_normal() && magnitude < f32::MAX / 4.0) {
        return (1.0, 1.0);
    }
    // At most the magnitude, more than half of it.
    let power = f32::from_bits(magnitude.to_bits() & EXPONENT);
    let down = MAGNITUDE / 2.0 / power;
    if down.is_normal() && (1.0 / down).is_normal() {
        (down, 1.0 / down)
    } else {
        (1.0, 1.0)
    }
}

/// Scales `n` numbers and rounds them to half precision; returns the inverse of the scale, or NaN
/// if not all numbers are finite: the products do not carry infinities and NaN, their scale does.
///
/// # Safety
/// `x` is valid for reading `n` numbers, `out` for writing as many; the processor has
/// AVX512-FP16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16,avx2,fma")]
pub(super) unsafe fn narrow_fp16(n: usize, x: *const f32, out: *mut u16) -> f32 {
    // SAFETY: the caller's.
    let s = unsafe { Avx512::assume() };
    // SAFETY: the caller's.
    let (down, up) = scales(unsafe { rows::magnitude(s, n, x) });
    let mut finite = true;
    for i in (0..n).step_by(Avx512::LANES) {
        // At most 15, shifted into the low bits.
        let mask = (1_u32 << (n - i).min(Avx512::LANES)) - 1;
        #[expect(clippy::cast_possible_truncation, reason = "16 bits at most")]
        let mask = mask as u16;
        // SAFETY: the caller's; the mask ends at `n`.
        unsafe {
            let v = _mm512_maskz_loadu_ps(mask, x.add(i));
            // Quiet and signalling NaN, both infinities.
            finite &= _mm512_fpclass_ps_mask::<0b1001_1001>(v) == 0;
            let v = _mm512_mul_ps(v, _mm512_set1_ps(down));
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_mask_storeu_epi16(out.add(i).cast(), mask, half);
        }
    }
    if finite { up } else { f32::NAN }
}

/// All rows against a panel `[input / 2][64][2]` of half precision.
///
/// The inputs are taken in chunks that stay in the first-level cache while all rows pass by.
///
/// # Safety
/// As [`Product`] says; `row_scales` has one number per row; the processor has AVX512-FP16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16,avx2,fma")]
pub(super) unsafe fn product_fp16(p: Scaled) {
    let pairs = p.product.inputs.div_ceil(2);
    for first in (0..pairs).step_by(TERMS) {
        let chunk = first..(first + TERMS).min(pairs);
        let tiles = p.product.rows.div_ceil(6);
        for (tile, row) in (0..p.product.rows).step_by(6).enumerate() {
            // The next chunk comes into the cache a part per tile.
            let part = Part::new(row, (tile, tiles), TERMS, LINES * CACHE_LINE_BYTES);
            let chunk = chunk.clone();
            // SAFETY: the caller's; `rows` rows from `row` on are there, and so are the pairs.
            unsafe {
                match p.product.rows - row {
                    // One row alone waits for memory in any case, and asking takes its time.
                    1 => tile_fp16::<1, false>(p, part, chunk),
                    2 => tile_fp16::<2, true>(p, part, chunk),
                    3 => tile_fp16::<3, true>(p, part, chunk),
                    4 => tile_fp16::<4, true>(p, part, chunk),
                    5 => tile_fp16::<5, true>(p, part, chunk),
                    _ if part.lines.is_empty() => tile_fp16::<6, false>(p, part, chunk),
                    _ => tile_fp16::<6, true>(p, part, chunk),
                }
            }
        }
    }
}

/// Even inputs are summed in the low half of every 32 bits, odd ones in the high half, so that one
/// broadcast of 32 bits brings two inputs; a broadcast of 16 bits would take the port that the
/// products need.
///
/// # Safety
/// As [`product_fp16`] says, `row + M <= rows`, and the panel has these pairs of inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16,avx2,fma")]
unsafe fn tile_fp16<const M: usize, const AHEAD: bool>(
    scaled: Scaled,
    part: Part,
    pairs: Range<usize>,
) {
    let p = scaled.product;
    let Part {
        row,
        lines,
        distance,
    } = part;
    let is_first = pairs.start == 0;
    let mut sums = [[_mm512_setzero_ph(); 4]; M];
    // SAFETY: `Product` covers the pairs of the panel and of `M` rows from `row` on.
    unsafe {
        let x = p.x.add(row * p.x_stride);
        for pair in pairs {
            let weights = p.panel.add(pair * 2 * WIDTH);
            if AHEAD {
                for line in lines.clone() {
                    // Beyond the last panel there is nothing, and asking for it is harmless.
                    let next = weights.wrapping_add((distance * LINES + line) * 32);
                    _mm_prefetch::<_MM_HINT_T1>(next.cast());
                }
            }
            let mut panel = [_mm512_setzero_ph(); 4];
            for (v, panel) in panel.iter_mut().enumerate() {
                let bits = _mm512_loadu_si512(weights.add(v * 32).cast());
                *panel = _mm512_castsi512_ph(bits);
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = x.add(m * p.x_stride + 2 * pair).cast::<i32>();
                let x = _mm512_castsi512_ph(_mm512_set1_epi32(x.read_unaligned()));
                for (sum, &weights) in sums.iter_mut().zip(&panel) {
                    *sum = _mm512_fmadd_ph(x, weights, *sum);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            let scale = *scaled.row_scales.add(row + m) * scaled.panel_scale;
            let scale = _mm512_set1_ps(scale);
            let out = p.out.add((row + m) * p.out_stride);
            for (v, &sum) in sums.iter().enumerate() {
                let at = out.add(v * 16);
                let mut so_far = _mm512_setzero_ps();
                if p.add || !is_first {
                    so_far = _mm512_loadu_ps(at);
                }
                if is_first && !p.bias.is_null() {
                    so_far = _mm512_add_ps(so_far, _mm512_loadu_ps(p.bias.add(v * 16)));
                }
                _mm512_storeu_ps(at, _mm512_fmadd_ps(add_halves(sum), scale, so_far));
            }
        }
    }
}

/// The sum of the two half-precision numbers in every 32 bits, in single precision.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16,avx2,fma")]
fn add_halves(x: __m512h) -> __m512 {
    // Sign, and exponent and fraction moved to their places; the exponents differ by 112.
    const SIGN_AND_REST: i32 = 0x8fff_e000_u32.cast_signed();
    const TWO_TO_112: f32 = 5.192_297e33;
    let bits = _mm512_castph_si512(x);
    let swapped = _mm512_castsi512_ph(_mm512_rol_epi32::<16>(bits));
    let bits = _mm512_castph_si512(_mm512_add_ph(x, swapped));
    let moved = _mm512_and_si512(
        _mm512_srai_epi32::<3>(bits),
        _mm512_set1_epi32(SIGN_AND_REST),
    );
    _mm512_mul_ps(_mm512_castsi512_ps(moved), _mm512_set1_ps(TWO_TO_112))
}

/// All rows against a panel `[input / 2][64][2]` of bfloat16.
///
/// # Safety
/// As [`Product`] says; the processor has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(super) unsafe fn product_bf16(p: Product<u16, u16>) {
    for (tile, row) in (0..p.rows).step_by(6).enumerate() {
        let tile = (tile, p.rows.div_ceil(6));
        let part = Part::new(row, tile, p.inputs.div_ceil(2), LINES * CACHE_LINE_BYTES);
        // SAFETY: the caller's; as many rows from `row` on are there.
        unsafe {
            match p.rows - row {
                1 => tile_bf16::<1, true>(p, part),
                2 => tile_bf16::<2, true>(p, part),
                3 => tile_bf16::<3, true>(p, part),
                4 => tile_bf16::<4, true>(p, part),
                5 => tile_bf16::<5, true>(p, part),
                _ if part.lines.is_empty() => tile_bf16::<6, false>(p, part),
                _ => tile_bf16::<6, true>(p, part),
            }
        }
    }
}

/// # Safety
/// As [`product_bf16`] says, and `row + M <= rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn tile_bf16<const M: usize, const AHEAD: bool>(p: Product<u16, u16>, part: Part) {
    let Part {
        row,
        lines,
        distance,
    } = part;
    let pairs = p.inputs.div_ceil(2);
    let mut sums = [[_mm512_setzero_ps(); 4]; M];
    // SAFETY: `Product` covers all pairs of inputs of the panel and of `M` rows from `row` on.
    unsafe {
        let x = p.x.add(row * p.x_stride);
        for pair in 0..pairs {
            let weights = p.panel.add(pair * 2 * WIDTH);
            if AHEAD {
                for line in lines.clone() {
                    // Beyond the last panel there is nothing, and asking for it is harmless.
                    let next = weights.wrapping_add((distance * LINES + line) * 32);
                    _mm_prefetch::<_MM_HINT_T1>(next.cast());
                }
            }
            let mut panel = [_mm512_setzero_si512(); 4];
            for (v, panel) in panel.iter_mut().enumerate() {
                *panel = _mm512_loadu_si512(weights.add(v * 32).cast());
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = x.add(m * p.x_stride + 2 * pair).cast::<i32>();
                let x = _mm512_set1_epi32(x.read_unaligned());
                for (sum, &weights) in sums.iter_mut().zip(&panel) {
                    *sum = _mm512_dpbf16_ps(*sum, as_bf16(x), as_bf16(weights));
                }
            }
        }
        write_rows(Avx512::assume(), &sums, &p, row);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(bits) }
}
