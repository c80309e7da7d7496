//! The generic kernels, instantiated for each instruction set and chosen once.

use super::Isa;
use super::attention::{Attend, attend};
use super::gemm::{Product, product};
use super::rows;
use super::simd::Scalar;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};

/// Kernels of one instruction set. Every entry requires that instruction set, and what the generic
/// kernel of the same name requires.
pub(super) struct Kernels {
    /// Outputs per panel of the products here.
    pub(super) width: usize,
    pub(super) product_f32: unsafe fn(Product<f32, f32>),
    pub(super) product_bf16: unsafe fn(Product<f32, u16>),
    pub(super) attend_f32: unsafe fn(&mut Attend<'_, f32>),
    pub(super) attend_bf16: unsafe fn(&mut Attend<'_, u16>),
    pub(super) rms_norm: unsafe fn(usize, *const f32, *const f32, f32, *mut f32),
    pub(super) silu_mul: unsafe fn(usize, *const f32, *const f32, *mut f32),
    pub(super) rotate: unsafe fn(usize, *const f32, *const f32, *const f32, *mut f32),
    pub(super) narrow_bf16: unsafe fn(usize, *const f32, *mut u16),
}

impl Kernels {
    /// The kernels for single-precision operands of `isa`, which the processor must have.
    pub(super) fn of(isa: Isa) -> &'static Self {
        match isa {
            Isa::Portable => &portable::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Avx512Fp16 => &avx512::KERNELS,
            #[cfg(not(target_arch = "x86_64"))]
            _ => &portable::KERNELS,
        }
    }
}

macro_rules! instantiate {
    ($module:ident, $proof:expr, $simd:ty, rows $rows:literal, rows_bf16 $rows_bf16:literal,
     vectors $vectors:literal $(, $feature:literal)?) => {
        mod $module {
            use super::*;
            use crate::ops::cpu::simd::Simd;

            pub(super) static KERNELS: Kernels = Kernels {
                width: $vectors * <$simd as Simd>::LANES,
                product_f32,
                product_bf16,
                attend_f32,
                attend_bf16,
                rms_norm,
                silu_mul,
                rotate,
                narrow_bf16,
            };

            $(#[target_feature(enable = $feature)])?
            unsafe fn product_f32(p: Product<f32, f32>) {
                // SAFETY: the caller's, the instruction set included.
                unsafe { product::<$simd, f32, $rows, $vectors>($proof, p) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn product_bf16(p: Product<f32, u16>) {
                // SAFETY: the caller's, the instruction set included.
                unsafe { product::<$simd, u16, $rows_bf16, $vectors>($proof, p) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn attend_f32(a: &mut Attend<'_, f32>) {
                // SAFETY: the caller's, the instruction set included.
                unsafe { attend::<$simd, f32, $rows, $vectors>($proof, a) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn attend_bf16(a: &mut Attend<'_, u16>) {
                // SAFETY: the caller's, the instruction set included.
                unsafe { attend::<$simd, u16, $rows, $vectors>($proof, a) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn rms_norm(n: usize, x: *const f32, weight: *const f32, eps: f32, out: *mut f32) {
                // SAFETY: the caller's, the instruction set included.
                unsafe { rows::rms_norm($proof, n, x, weight, eps, out) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn silu_mul(n: usize, gate: *const f32, up: *const f32, out: *mut f32) {
                // SAFETY: the caller's, the instruction set included.
                unsafe { rows::silu_mul($proof, n, gate, up, out) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn rotate(n: usize, x: *const f32, cosines: *const f32, sines: *const f32, out: *mut f32) {
                // SAFETY: the caller's, the instruction set included.
                unsafe { rows::rotate($proof, n, x, cosines, sines, out) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn narrow_bf16(n: usize, x: *const f32, out: *mut u16) {
                // SAFETY: the caller's, the instruction set included.
                unsafe { rows::narrow_bf16(n, x, out) }
            }
        }
    };
}

instantiate!(portable, Scalar, Scalar, rows 3, rows_bf16 3, vectors 2);
#[cfg(target_arch = "x86_64")]
instantiate!(avx2, Avx2::assume(), Avx2, rows 6, rows_bf16 6, vectors 2, "avx2,fma");
#[cfg(target_arch = "x86_64")]
instantiate!(avx512, Avx512::assume(), Avx512, rows 6, rows_bf16 5, vectors 4,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma");
