//! Vectors of single-precision numbers, one type per instruction set.
//!
//! A value of a [`Simd`] type is the proof that its instruction set is there, so arithmetic on its
//! vectors is safe; only loads and stores, which take pointers, are not. Kernels are written once,
//! generic over [`Simd`], marked `#[inline(always)]`, and instantiated inside functions that
//! enable the instruction set.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "the loads and stores of a square rest on the one contract of its function"
)]

/// Terms of the polynomial for `2^x` on a reduced argument, highest power first; error below one
/// unit in the last place of single precision.
const EXP: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_6e-1,
    5.000_000_3e-1,
];
/// ln 2 in two parts: the first has zeros at its end, so that small multiples of it are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Below it, and above minus it, `exp` is not a normal number.
const EXP_MIN: f32 = -87.3;

/// An instruction set, as a proof that it is available.
pub(super) trait Simd: Copy {
    /// A vector.
    type F: Copy;
    /// Numbers in a vector.
    const LANES: usize;

    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// `from` is valid for reading `LANES` numbers.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// # Safety
    /// `to` is valid for writing `LANES` numbers.
    unsafe fn store(self, to: *mut f32, x: Self::F);
    /// Widens bfloat16.
    /// # Safety
    /// `from` is valid for reading `LANES` numbers of 16 bits.
    unsafe fn load_bf16(self, from: *const u16) -> Self::F;
    /// Widens the even ones of `2 * LANES` bfloat16.
    /// # Safety
    /// `from` is valid for reading `2 * LANES` numbers of 16 bits.
    unsafe fn load_bf16_even(self, from: *const u16) -> Self::F;
    /// Widens the odd ones of `2 * LANES` bfloat16.
    /// # Safety
    /// `from` is valid for reading `2 * LANES` numbers of 16 bits.
    unsafe fn load_bf16_odd(self, from: *const u16) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the instruction set can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The nearest integers.
    fn round(self, x: Self::F) -> Self::F;
    /// `2^n` for integers `n` from -126 to 127.
    fn power_of_two(self, n: Self::F) -> Self::F;
    /// Sum of the numbers, always in the same order.
    fn sum(self, x: Self::F) -> f32;
    /// Greatest of the numbers.
    fn greatest(self, x: Self::F) -> f32;

    /// Asks for the cache line at an address, which need not be valid.
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}

    /// Turns a square: number `r` of row `c` goes to `to + r * stride + c`.
    ///
    /// # Safety
    /// `LANES` pointers at `rows` are valid for reading `LANES` numbers, `to` for writing `LANES`
    /// rows of `LANES` numbers, `stride` apart.
    #[inline(always)]
    unsafe fn transpose(self, rows: *const *const f32, to: *mut f32, stride: usize) {
        for c in 0..Self::LANES {
            for r in 0..Self::LANES {
                // SAFETY: the caller's; `c` and `r` are below `LANES`.
                unsafe {
                    to.add(r * stride + c)
                        .write(rows.add(c).read().add(r).read())
                };
            }
        }
    }

    /// Like [`transpose`](Self::transpose) for rows of `2 * LANES` bfloat16, widened.
    ///
    /// # Safety
    /// As for `transpose`, with twice as many elements of each row and rows of `to`.
    #[inline(always)]
    unsafe fn transpose_bf16(self, rows: *const *const u16, to: *mut f32, stride: usize) {
        for c in 0..Self::LANES {
            for r in 0..2 * Self::LANES {
                // SAFETY: the caller's; `c` is below `LANES` and `r` below twice that.
                unsafe {
                    let bits = u32::from(rows.add(c).read().add(r).read()) << 16;
                    to.add(r * stride + c).write(f32::from_bits(bits));
                }
            }
        }
    }

    /// `e^x`; arguments outside of what single precision can hold are moved to its ends.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let x = self.min(self.max(x, self.splat(EXP_MIN)), self.splat(-EXP_MIN));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-LN_2_HIGH), x);
        let r = self.fma(n, self.splat(-LN_2_LOW), r);
        let mut y = self.splat(EXP[0]);
        for &term in &EXP[1..] {
            y = self.fma(y, r, self.splat(term));
        }
        let y = self.fma(self.mul(y, r), r, self.add(r, self.splat(1.0)));
        self.mul(y, self.power_of_two(n))
    }
}

/// Plain arrays, for whatever the compiler makes of them.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

const SCALAR_LANES: usize = 8;
type ScalarF = [f32; SCALAR_LANES];

#[inline(always)]
fn zip(a: ScalarF, b: ScalarF, f: impl Fn(f32, f32) -> f32) -> ScalarF {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    type F = ScalarF;
    const LANES: usize = SCALAR_LANES;

    #[inline(always)]
    fn splat(self, x: f32) -> ScalarF {
        [x; SCALAR_LANES]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> ScalarF {
        // SAFETY: the caller's; unaligned.
        unsafe { from.cast::<ScalarF>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: ScalarF) {
        // SAFETY: the caller's; unaligned.
        unsafe { to.cast::<ScalarF>().write_unaligned(x) };
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> ScalarF {
        // SAFETY: the caller's; unaligned.
        let bits = unsafe { from.cast::<[u16; SCALAR_LANES]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_even(self, from: *const u16) -> ScalarF {
        // SAFETY: the caller's; unaligned.
        let pairs = unsafe { from.cast::<[[u16; 2]; SCALAR_LANES]>().read_unaligned() };
        pairs.map(|[even, _]| f32::from_bits(u32::from(even) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_odd(self, from: *const u16) -> ScalarF {
        // SAFETY: the caller's; unaligned.
        let pairs = unsafe { from.cast::<[[u16; 2]; SCALAR_LANES]>().read_unaligned() };
        pairs.map(|[_, odd]| f32::from_bits(u32::from(odd) << 16))
    }
    #[inline(always)]
    fn add(self, a: ScalarF, b: ScalarF) -> ScalarF {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: ScalarF, b: ScalarF) -> ScalarF {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: ScalarF, b: ScalarF) -> ScalarF {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: ScalarF, b: ScalarF) -> ScalarF {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: ScalarF, b: ScalarF) -> ScalarF {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: ScalarF, b: ScalarF) -> ScalarF {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn fma(self, a: ScalarF, b: ScalarF, c: ScalarF) -> ScalarF {
        // Without an instruction for it, a fused product is a slow library call.
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn round(self, x: ScalarF) -> ScalarF {
        // Adding and removing 1.5 * 2^23 leaves the nearest integer, for what `exp` needs.
        const SHIFT: f32 = 12_582_912.0;
        x.map(|x| (x + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn power_of_two(self, n: ScalarF) -> ScalarF {
        // The integer lands in the low bits of 1.5 * 2^23 + 127; shifted up it is the exponent.
        n.map(|n| f32::from_bits((n + (12_582_912.0 + 127.0)).to_bits() << 23))
    }
    #[inline(always)]
    fn sum(self, x: ScalarF) -> f32 {
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }
    #[inline(always)]
    fn greatest(self, x: ScalarF) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;
    use crate::ops::cpu::Isa;

    /// AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(in crate::ops::cpu) struct Avx2(());

    /// AVX-512 (F, BW, DQ, VL).
    #[derive(Clone, Copy)]
    pub(in crate::ops::cpu) struct Avx512(());

    impl Avx2 {
        /// # Safety
        /// This processor has [`Isa::Avx2`].
        #[inline(always)]
        pub(in crate::ops::cpu) unsafe fn assume() -> Self {
            debug_assert!(Isa::Avx2.is_available());
            Self(())
        }
    }

    impl Avx512 {
        /// # Safety
        /// This processor has [`Isa::Avx512`].
        #[inline(always)]
        pub(in crate::ops::cpu) unsafe fn assume() -> Self {
            debug_assert!(Isa::Avx512.is_available());
            Self(())
        }
    }

    /// Evaluates intrinsics of the instruction set that `$proof` stands for.
    macro_rules! proven {
        ($proof:ident: $e:expr) => {{
            let _: Self = $proof;
            // SAFETY: `$proof` exists only where the instruction set does.
            unsafe { $e }
        }};
    }

    impl Avx512 {
        /// Swaps rows and columns: first within squares of 4 by 4, then the squares.
        #[inline(always)]
        fn turn(self, x: &mut [__m512; 16]) {
            let mut y = *x;
            for i in (0..16).step_by(4) {
                let low_01 = proven!(self: _mm512_unpacklo_ps(x[i], x[i + 1]));
                let high_01 = proven!(self: _mm512_unpackhi_ps(x[i], x[i + 1]));
                let low_23 = proven!(self: _mm512_unpacklo_ps(x[i + 2], x[i + 3]));
                let high_23 = proven!(self: _mm512_unpackhi_ps(x[i + 2], x[i + 3]));
                y[i] = proven!(self: _mm512_shuffle_ps::<0x44>(low_01, low_23));
                y[i + 1] = proven!(self: _mm512_shuffle_ps::<0xee>(low_01, low_23));
                y[i + 2] = proven!(self: _mm512_shuffle_ps::<0x44>(high_01, high_23));
                y[i + 3] = proven!(self: _mm512_shuffle_ps::<0xee>(high_01, high_23));
            }
            // `y[4 * g + j]` now has, in its quarter `q`, column `4 * q + j` of the rows of group `g`.
            for j in 0..4 {
                let even_01 = proven!(self: _mm512_shuffle_f32x4::<0x88>(y[j], y[4 + j]));
                let odd_01 = proven!(self: _mm512_shuffle_f32x4::<0xdd>(y[j], y[4 + j]));
                let even_23 = proven!(self: _mm512_shuffle_f32x4::<0x88>(y[8 + j], y[12 + j]));
                let odd_23 = proven!(self: _mm512_shuffle_f32x4::<0xdd>(y[8 + j], y[12 + j]));
                x[j] = proven!(self: _mm512_shuffle_f32x4::<0x88>(even_01, even_23));
                x[8 + j] = proven!(self: _mm512_shuffle_f32x4::<0xdd>(even_01, even_23));
                x[4 + j] = proven!(self: _mm512_shuffle_f32x4::<0x88>(odd_01, odd_23));
                x[12 + j] = proven!(self: _mm512_shuffle_f32x4::<0xdd>(odd_01, odd_23));
            }
        }
    }

    impl Simd for Avx2 {
        type F = __m256;
        const LANES: usize = 8;

        #[inline(always)]
        fn prefetch(self, at: *const u8) {
            proven!(self: _mm_prefetch::<_MM_HINT_T1>(at.cast()));
        }
        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            proven!(self: _mm256_set1_ps(x))
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m256 {
            proven!(self: _mm256_loadu_ps(from))
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, x: __m256) {
            proven!(self: _mm256_storeu_ps(to, x));
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u16) -> __m256 {
            let narrow = proven!(self: _mm_loadu_si128(from.cast()));
            let wide = proven!(self: _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow)));
            proven!(self: _mm256_castsi256_ps(wide))
        }
        #[inline(always)]
        unsafe fn load_bf16_even(self, from: *const u16) -> __m256 {
            let pairs = proven!(self: _mm256_loadu_si256(from.cast()));
            let even = proven!(self: _mm256_slli_epi32::<16>(pairs));
            proven!(self: _mm256_castsi256_ps(even))
        }
        #[inline(always)]
        unsafe fn load_bf16_odd(self, from: *const u16) -> __m256 {
            let pairs = proven!(self: _mm256_loadu_si256(from.cast()));
            let odd = proven!(self: _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff)));
            proven!(self: _mm256_castsi256_ps(odd))
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            proven!(self: _mm256_add_ps(a, b))
        }
        #[inline(always)]
        fn sub(self, a: __m256, b: __m256) -> __m256 {
            proven!(self: _mm256_sub_ps(a, b))
        }
        #[inline(always)]
        fn mul(self, a: __m256, b: __m256) -> __m256 {
            proven!(self: _mm256_mul_ps(a, b))
        }
        #[inline(always)]
        fn div(self, a: __m256, b: __m256) -> __m256 {
            proven!(self: _mm256_div_ps(a, b))
        }
        #[inline(always)]
        fn max(self, a: __m256, b: __m256) -> __m256 {
            proven!(self: _mm256_max_ps(a, b))
        }
        #[inline(always)]
        fn min(self, a: __m256, b: __m256) -> __m256 {
            proven!(self: _mm256_min_ps(a, b))
        }
        #[inline(always)]
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            proven!(self: _mm256_fmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn round(self, x: __m256) -> __m256 {
            proven!(self: _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
        }
        #[inline(always)]
        fn power_of_two(self, n: __m256) -> __m256 {
            let biased = proven!(self: _mm256_cvtps_epi32(_mm256_add_ps(n, _mm256_set1_ps(127.0))));
            proven!(self: _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
        }
        #[inline(always)]
        fn sum(self, x: __m256) -> f32 {
            let half =
                proven!(self: _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)));
            let pair = proven!(self: _mm_add_ps(half, _mm_movehl_ps(half, half)));
            proven!(self: _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair))))
        }
        #[inline(always)]
        fn greatest(self, x: __m256) -> f32 {
            let half =
                proven!(self: _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)));
            let pair = proven!(self: _mm_max_ps(half, _mm_movehl_ps(half, half)));
            proven!(self: _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair))))
        }
    }

    impl Simd for Avx512 {
        type F = __m512;
        const LANES: usize = 16;

        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            proven!(self: _mm512_set1_ps(x))
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m512 {
            proven!(self: _mm512_loadu_ps(from))
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, x: __m512) {
            proven!(self: _mm512_storeu_ps(to, x));
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const u16) -> __m512 {
            let narrow = proven!(self: _mm256_loadu_si256(from.cast()));
            let wide = proven!(self: _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)));
            proven!(self: _mm512_castsi512_ps(wide))
        }
        #[inline(always)]
        unsafe fn load_bf16_even(self, from: *const u16) -> __m512 {
            let pairs = proven!(self: _mm512_loadu_si512(from.cast()));
            let even = proven!(self: _mm512_slli_epi32::<16>(pairs));
            proven!(self: _mm512_castsi512_ps(even))
        }
        #[inline(always)]
        unsafe fn load_bf16_odd(self, from: *const u16) -> __m512 {
            let pairs = proven!(self: _mm512_loadu_si512(from.cast()));
            let odd = proven!(self: _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)));
            proven!(self: _mm512_castsi512_ps(odd))
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            proven!(self: _mm512_add_ps(a, b))
        }
        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            proven!(self: _mm512_sub_ps(a, b))
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            proven!(self: _mm512_mul_ps(a, b))
        }
        #[inline(always)]
        fn div(self, a: __m512, b: __m512) -> __m512 {
            proven!(self: _mm512_div_ps(a, b))
        }
        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            proven!(self: _mm512_max_ps(a, b))
        }
        #[inline(always)]
        fn min(self, a: __m512, b: __m512) -> __m512 {
            proven!(self: _mm512_min_ps(a, b))
        }
        #[inline(always)]
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            proven!(self: _mm512_fmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn round(self, x: __m512) -> __m512 {
            proven!(self: _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
        }
        #[inline(always)]
        fn power_of_two(self, n: __m512) -> __m512 {
            let biased = proven!(self: _mm512_cvtps_epi32(_mm512_add_ps(n, _mm512_set1_ps(127.0))));
            proven!(self: _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
        }
        #[inline(always)]
        fn sum(self, x: __m512) -> f32 {
            proven!(self: _mm512_reduce_add_ps(x))
        }
        #[inline(always)]
        fn greatest(self, x: __m512) -> f32 {
            proven!(self: _mm512_reduce_max_ps(x))
        }
        #[inline(always)]
        fn prefetch(self, at: *const u8) {
            proven!(self: _mm_prefetch::<_MM_HINT_T1>(at.cast()));
        }
        #[inline(always)]
        unsafe fn transpose(self, rows: *const *const f32, to: *mut f32, stride: usize) {
            let mut square = [proven!(self: _mm512_setzero_ps()); 16];
            for (c, row) in square.iter_mut().enumerate() {
                *row = proven!(self: _mm512_loadu_ps(*rows.add(c)));
            }
            self.turn(&mut square);
            for (r, &row) in square.iter().enumerate() {
                proven!(self: _mm512_storeu_ps(to.add(r * stride), row));
            }
        }
        #[inline(always)]
        unsafe fn transpose_bf16(self, rows: *const *const u16, to: *mut f32, stride: usize) {
            // Pairs of elements are turned as 32 bits and widened afterwards.
            let mut square = [proven!(self: _mm512_setzero_ps()); 16];
            for (c, row) in square.iter_mut().enumerate() {
                *row = proven!(self: _mm512_loadu_ps((*rows.add(c)).cast()));
            }
            self.turn(&mut square);
            for (r, &row) in square.iter().enumerate() {
                let pairs = proven!(self: _mm512_castps_si512(row));
                let even = proven!(self: _mm512_slli_epi32::<16>(pairs));
                let odd = proven!(self: _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)));
                let to = to.wrapping_add(2 * r * stride);
                proven!(self: _mm512_storeu_ps(to, _mm512_castsi512_ps(even)));
                proven!(self: _mm512_storeu_ps(to.add(stride), _mm512_castsi512_ps(odd)));
            }
        }
    }
}
