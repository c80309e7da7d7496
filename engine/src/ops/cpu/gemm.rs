//! Matrix products against packed weights.
//!
//! A packed matrix is a row of panels, each with all inputs of `width` outputs. One call computes
//! one panel for any number of rows. Every output is summed over the inputs in one fixed order,
//! however many rows are computed together, so a row's bits do not depend on its batch.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "all loads and stores of a tile rest on the one contract of `Product`"
)]

use super::simd::Simd;

/// One panel times some rows. Pointers, because rows and panels of one buffer are written by
/// several threads at a time.
///
/// Whoever calls a kernel with it promises: `x` has `rows` rows of at least `inputs` elements (one
/// more, zero, where `inputs` is odd and weights come in pairs), `x_stride` elements apart;
/// `panel` has the packed weights; `out` has `rows` rows of `width` numbers, `out_stride` apart,
/// that nobody else touches during the call; `bias`, if not null, has `width` numbers.
#[derive(Clone, Copy)]
pub(super) struct Product<X, P> {
    pub(super) x: *const X,
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) panel: *const P,
    pub(super) bias: *const f32,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Add to the output instead of replacing it.
    pub(super) add: bool,
}

/// How a panel stores its weights.
pub(super) trait Panel: Copy {
    /// Inputs whose weights lie together.
    const STEP: usize;
    /// Stored numbers of one step per output.
    const STORED: usize;

    /// The weights of one step for `LANES` outputs: of the first input and of the second, if the
    /// step has two.
    ///
    /// # Safety
    /// `from` is valid for reading `LANES * STORED` numbers.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> (S::F, S::F);
}

impl Panel for f32 {
    const STEP: usize = 1;
    const STORED: usize = 1;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> (S::F, S::F) {
        // SAFETY: the caller's.
        (unsafe { s.load(from) }, s.splat(0.0))
    }
}

/// bfloat16, two inputs interleaved.
impl Panel for u16 {
    const STEP: usize = 2;
    const STORED: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> (S::F, S::F) {
        // SAFETY: the caller's.
        unsafe { s.load_bf16_pairs(from) }
    }
}

/// All rows against a panel of `VECTORS * LANES` outputs, at most `ROWS` at a time (up to 6).
///
/// # Safety
/// As [`Product`] says.
#[inline(always)]
pub(super) unsafe fn product<S: Simd, P: Panel, const ROWS: usize, const VECTORS: usize>(
    s: S,
    p: Product<f32, P>,
) {
    const { assert!(ROWS >= 1 && ROWS <= 6) };
    let mut row = 0;
    while row < p.rows {
        let rows = (p.rows - row).min(ROWS);
        // SAFETY: the caller's; `rows` rows from `row` on are there.
        unsafe {
            match rows {
                1 => tile::<S, P, 1, VECTORS>(s, p, row),
                2 => tile::<S, P, 2, VECTORS>(s, p, row),
                3 => tile::<S, P, 3, VECTORS>(s, p, row),
                4 => tile::<S, P, 4, VECTORS>(s, p, row),
                5 => tile::<S, P, 5, VECTORS>(s, p, row),
                _ => tile::<S, P, 6, VECTORS>(s, p, row),
            }
        }
        row += rows;
    }
}

/// # Safety
/// As [`Product`] says, and `row + M <= rows`.
#[inline(always)]
unsafe fn tile<S: Simd, P: Panel, const M: usize, const V: usize>(
    s: S,
    p: Product<f32, P>,
    row: usize,
) {
    let mut sums = [[s.splat(0.0); V]; M];
    let steps = p.inputs.div_ceil(P::STEP);
    // SAFETY: `Product` covers `steps` steps of the panel and of each row.
    unsafe {
        let x = p.x.add(row * p.x_stride);
        for step in 0..steps {
            // A loop and not a closure: closures do not inherit the instruction set.
            let mut weights = [(s.splat(0.0), s.splat(0.0)); V];
            for (v, weight) in weights.iter_mut().enumerate() {
                *weight = P::load(s, p.panel.add((step * V + v) * S::LANES * P::STORED));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = x.add(m * p.x_stride + step * P::STEP);
                let first = s.splat(*x);
                for (sum, weight) in sums.iter_mut().zip(&weights) {
                    *sum = s.fma(first, weight.0, *sum);
                }
                if P::STEP == 2 {
                    let second = s.splat(*x.add(1));
                    for (sum, weight) in sums.iter_mut().zip(&weights) {
                        *sum = s.fma(second, weight.1, *sum);
                    }
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            finish(s, sums, p.bias, p.out.add((row + m) * p.out_stride), p.add);
        }
    }
}

/// Writes one row of sums.
///
/// # Safety
/// `out`, and `bias` if not null, are valid for `V * LANES` numbers.
#[inline(always)]
pub(super) unsafe fn finish<S: Simd, const V: usize>(
    s: S,
    sums: &[S::F; V],
    bias: *const f32,
    out: *mut f32,
    add: bool,
) {
    for (v, &sum) in sums.iter().enumerate() {
        let mut sum = sum;
        let at = v * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            if !bias.is_null() {
                sum = s.add(sum, s.load(bias.add(at)));
            }
            if add {
                sum = s.add(sum, s.load(out.add(at)));
            }
            s.store(out.add(at), sum);
        }
    }
}
