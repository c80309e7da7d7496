//! Kernels on single rows: norms, activation, rotation, conversion.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "the loads and stores of a loop rest on the one contract of its function"
)]

use super::simd::Simd;

/// `out = x / rms(x) * weight` over `n` numbers.
///
/// # Safety
/// `x`, `weight` and `out` are valid for `n` numbers; `out` may be `x`.
#[inline(always)]
pub(super) unsafe fn rms_norm<S: Simd>(
    s: S,
    n: usize,
    x: *const f32,
    weight: *const f32,
    eps: f32,
    out: *mut f32,
) {
    let whole = n - n % S::LANES;
    // SAFETY: the caller's; every access is below `n`.
    unsafe {
        let mut squares = s.splat(0.0);
        for i in (0..whole).step_by(S::LANES) {
            let v = s.load(x.add(i));
            squares = s.fma(v, v, squares);
        }
        let mut sum = s.sum(squares);
        for i in whole..n {
            sum += *x.add(i) * *x.add(i);
        }
        let scale = 1.0 / (sum / count(n) + eps).sqrt();
        let scales = s.splat(scale);
        for i in (0..whole).step_by(S::LANES) {
            let v = s.mul(s.load(x.add(i)), scales);
            s.store(out.add(i), s.mul(v, s.load(weight.add(i))));
        }
        for i in whole..n {
            *out.add(i) = *x.add(i) * scale * *weight.add(i);
        }
    }
}

/// `out = gate * sigmoid(gate) * up` over `n` numbers.
///
/// # Safety
/// `gate`, `up` and `out` are valid for `n` numbers.
#[inline(always)]
pub(super) unsafe fn silu_mul<S: Simd>(
    s: S,
    n: usize,
    gate: *const f32,
    up: *const f32,
    out: *mut f32,
) {
    let whole = n - n % S::LANES;
    let one = s.splat(1.0);
    // SAFETY: the caller's; every access is below `n`.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            let g = s.load(gate.add(i));
            let decay = s.exp(s.sub(s.splat(0.0), g));
            let activated = s.div(g, s.add(one, decay));
            s.store(out.add(i), s.mul(activated, s.load(up.add(i))));
        }
        for i in whole..n {
            let g = *gate.add(i);
            *out.add(i) = g / (1.0 + (-g).exp()) * *up.add(i);
        }
    }
}

/// Turns the pairs `(x[i], x[i + n / 2])` of a head of `n` numbers by the given angles.
///
/// # Safety
/// `x` and `out` are valid for `n` numbers, `cosines` and `sines` for `n / 2`; `out` may be `x`.
#[inline(always)]
pub(super) unsafe fn rotate<S: Simd>(
    s: S,
    n: usize,
    x: *const f32,
    cosines: *const f32,
    sines: *const f32,
    out: *mut f32,
) {
    let half = n / 2;
    let whole = half - half % S::LANES;
    // SAFETY: the caller's; every access is below `n`, those of the angles below `n / 2`.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            let (first, second) = (s.load(x.add(i)), s.load(x.add(half + i)));
            let (cos, sin) = (s.load(cosines.add(i)), s.load(sines.add(i)));
            let turned = s.sub(s.mul(first, cos), s.mul(second, sin));
            let other = s.add(s.mul(second, cos), s.mul(first, sin));
            s.store(out.add(i), turned);
            s.store(out.add(half + i), other);
        }
        for i in whole..half {
            let (first, second) = (*x.add(i), *x.add(half + i));
            let (cos, sin) = (*cosines.add(i), *sines.add(i));
            *out.add(i) = first * cos - second * sin;
            *out.add(half + i) = second * cos + first * sin;
        }
    }
}

/// The greatest magnitude among `n` numbers.
///
/// # Safety
/// `x` is valid for `n` numbers.
#[inline(always)]
pub(super) unsafe fn magnitude<S: Simd>(s: S, n: usize, x: *const f32) -> f32 {
    let whole = n - n % S::LANES;
    let mut greatest = s.splat(0.0);
    // SAFETY: the caller's; every access is below `n`.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            let v = s.load(x.add(i));
            greatest = s.max(greatest, s.max(v, s.sub(s.splat(0.0), v)));
        }
        let mut rest = s.greatest(greatest);
        for i in whole..n {
            rest = rest.max((*x.add(i)).abs());
        }
        rest
    }
}

/// Rounds to bfloat16, to the nearest and ties to even; NaN stays NaN.
#[inline(always)]
pub(super) const fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
    let bits = if x.is_nan() {
        (bits >> 16) | 0x40
    } else {
        rounded
    };
    // Shifted right by 16, it fits.
    (bits & 0xffff) as u16
}

/// Rounds `n` numbers to bfloat16.
///
/// # Safety
/// `x` is valid for reading `n` numbers, `out` for writing as many.
#[inline(always)]
pub(super) unsafe fn narrow_bf16(n: usize, x: *const f32, out: *mut u16) {
    for i in 0..n {
        // SAFETY: the caller's; `i < n`.
        unsafe { *out.add(i) = to_bf16(*x.add(i)) };
    }
}

/// Dimensions are far below 2^24, where single precision is exact.
#[expect(clippy::cast_precision_loss, reason = "as the function says")]
#[inline(always)]
pub(super) const fn count(n: usize) -> f32 {
    n as f32
}

/// Positions up to 2^24 are exact; the rounding beyond is that of the models' own training code.
#[expect(clippy::cast_precision_loss, reason = "as the function says")]
pub(super) const fn position(n: u32) -> f32 {
    n as f32
}
