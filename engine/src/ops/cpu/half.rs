//! Matrix products on 16-bit operands: half precision (AVX512-FP16) and bfloat16 (AVX512-BF16).
//!
//! Both read panels of 64 outputs and rows of 16-bit activations, and sum every output over the
//! inputs in one fixed order.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "all loads and stores of a tile rest on the one contract of `Product`"
)]

use std::arch::x86_64::*;

use super::gemm::{Product, finish};
use super::rows;
use super::simd::{Avx512, Simd};

/// Outputs per panel.
pub(super) const WIDTH: usize = 64;
/// Terms summed in half precision before they are added in single precision.
const TERMS: usize = 64;
/// Operands of half-precision products are scaled by powers of two to magnitudes below this, so
/// that no sum of `TERMS` products can overflow: 64 * 16 * 16 < 65504.
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

/// Scales `n` numbers and rounds them to half precision; returns the inverse of the scale.
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
    for i in (0..n).step_by(Avx512::LANES) {
        // At most 15, shifted into the low bits.
        let mask = (1_u32 << (n - i).min(Avx512::LANES)) - 1;
        #[expect(clippy::cast_possible_truncation, reason = "16 bits at most")]
        let mask = mask as u16;
        // SAFETY: the caller's; the mask ends at `n`.
        unsafe {
            let v = _mm512_maskz_loadu_ps(mask, x.add(i));
            let v = _mm512_mul_ps(v, _mm512_set1_ps(down));
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_mask_storeu_epi16(out.add(i).cast(), mask, half);
        }
    }
    up
}

/// All rows against a panel `[input][64]` of half precision.
///
/// # Safety
/// As [`Product`] says; `row_scales` has one number per row; the processor has AVX512-FP16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16,avx2,fma")]
pub(super) unsafe fn product_fp16(p: Scaled) {
    macro_rules! dispatch {
        ($rows:expr, $row:expr, $($m:literal)*) => {
            match $rows {
                // SAFETY: the caller's; that many rows from `row` on are there.
                $($m => unsafe { tile_fp16::<$m>(p, $row) },)*
                // SAFETY: as above.
                _ => unsafe { tile_fp16::<12>(p, $row) },
            }
        };
    }
    let mut row = 0;
    while row < p.product.rows {
        let rows = (p.product.rows - row).min(12);
        dispatch!(rows, row, 1 2 3 4 5 6 7 8 9 10 11);
        row += rows;
    }
}

/// # Safety
/// As [`product_fp16`] says, and `row + M <= rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512fp16,avx2,fma")]
unsafe fn tile_fp16<const M: usize>(scaled: Scaled, row: usize) {
    let p = scaled.product;
    let mut sums = [[_mm512_setzero_ps(); 4]; M];
    // SAFETY: `Product` covers `inputs` inputs of the panel and of `M` rows from `row` on.
    unsafe {
        let x = p.x.add(row * p.x_stride);
        let mut from = 0;
        while from < p.inputs {
            let to = (from + TERMS).min(p.inputs);
            let mut halves = [[_mm512_setzero_ph(); 2]; M];
            for input in from..to {
                let weights = p.panel.add(input * WIDTH);
                let low = _mm512_castsi512_ph(_mm512_loadu_si512(weights.cast()));
                let high = _mm512_castsi512_ph(_mm512_loadu_si512(weights.add(32).cast()));
                for (m, halves) in halves.iter_mut().enumerate() {
                    let x = x.add(m * p.x_stride + input).cast::<i16>();
                    let x = _mm512_castsi512_ph(_mm512_set1_epi16(*x));
                    halves[0] = _mm512_fmadd_ph(x, low, halves[0]);
                    halves[1] = _mm512_fmadd_ph(x, high, halves[1]);
                }
            }
            for (sums, halves) in sums.iter_mut().zip(&halves) {
                for (half, &sum) in halves.iter().enumerate() {
                    let bits = _mm512_castph_si512(sum);
                    let low = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
                    let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(bits));
                    sums[2 * half] = _mm512_add_ps(sums[2 * half], low);
                    sums[2 * half + 1] = _mm512_add_ps(sums[2 * half + 1], high);
                }
            }
            from = to;
        }
        let s = Avx512::assume();
        for (m, sums) in sums.iter_mut().enumerate() {
            let scale = s.splat(*scaled.row_scales.add(row + m) * scaled.panel_scale);
            for sum in sums.iter_mut() {
                *sum = s.mul(*sum, scale);
            }
            finish(s, sums, p.bias, p.out.add((row + m) * p.out_stride), p.add);
        }
    }
}

/// All rows against a panel `[input / 2][64][2]` of bfloat16.
///
/// # Safety
/// As [`Product`] says; the processor has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(super) unsafe fn product_bf16(p: Product<u16, u16>) {
    let mut row = 0;
    while row < p.rows {
        let rows = (p.rows - row).min(6);
        // SAFETY: the caller's; `rows` rows from `row` on are there.
        unsafe {
            match rows {
                1 => tile_bf16::<1>(p, row),
                2 => tile_bf16::<2>(p, row),
                3 => tile_bf16::<3>(p, row),
                4 => tile_bf16::<4>(p, row),
                5 => tile_bf16::<5>(p, row),
                _ => tile_bf16::<6>(p, row),
            }
        }
        row += rows;
    }
}

/// # Safety
/// As [`product_bf16`] says, and `row + M <= rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn tile_bf16<const M: usize>(p: Product<u16, u16>, row: usize) {
    let mut sums = [[_mm512_setzero_ps(); 4]; M];
    // SAFETY: `Product` covers all pairs of inputs of the panel and of `M` rows from `row` on.
    unsafe {
        let x = p.x.add(row * p.x_stride);
        for pair in 0..p.inputs.div_ceil(2) {
            let weights = p.panel.add(pair * 2 * WIDTH);
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
        let s = Avx512::assume();
        for (m, sums) in sums.iter().enumerate() {
            finish(s, sums, p.bias, p.out.add((row + m) * p.out_stride), p.add);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(bits) }
}
