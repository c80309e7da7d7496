//! Matrix products against packed weights.
//!
//! A packed matrix is a row of panels, each with all inputs of `width` outputs. One call computes
//! one panel for any number of rows. Every output is summed over the inputs in one fixed order,
//! however many rows are computed together, so a row's bits do not depend on its batch.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "all loads and stores of a tile rest on the one contract of `Product`"
)]

use std::ops::Range;

use super::buffers::CACHE_LINE_BYTES;
use super::simd::Simd;

/// Repeats a block for rows `0..M`, at most 6, with `m` a constant: sums indexed by constants stay in
/// registers, while the compiler gives up on unrolling a loop of this size in time for that.
macro_rules! each_row {
    ($m:ident of $rows:ident $body:block) => {
        each_row!(@ $m of $rows $body, 0 1 2 3 4 5)
    };
    (@ $m:ident of $rows:ident $body:block, $($row:literal)*) => {
        $(if $rows > $row {
            let $m = $row;
            $body
        })*
    };
}

/// How far a single tile asks ahead.
const AHEAD_BYTES: usize = 16 << 10;

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

    /// The weights of the first input of a step for `LANES` outputs.
    ///
    /// # Safety
    /// `from` is valid for reading `LANES * STORED` numbers.
    unsafe fn first<S: Simd>(s: S, from: *const Self) -> S::F;

    /// Those of the second input, if the step has two.
    ///
    /// # Safety
    /// As for `first`.
    unsafe fn second<S: Simd>(s: S, from: *const Self) -> S::F;
}

impl Panel for f32 {
    const STEP: usize = 1;
    const STORED: usize = 1;

    #[inline(always)]
    unsafe fn first<S: Simd>(s: S, from: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load(from) }
    }
    #[inline(always)]
    unsafe fn second<S: Simd>(s: S, _from: *const Self) -> S::F {
        s.splat(0.0)
    }
}

/// bfloat16, two inputs interleaved.
impl Panel for u16 {
    const STEP: usize = 2;
    const STORED: usize = 2;

    #[inline(always)]
    unsafe fn first<S: Simd>(s: S, from: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_bf16_even(from) }
    }
    #[inline(always)]
    unsafe fn second<S: Simd>(s: S, from: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_bf16_odd(from) }
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
    let bytes = VECTORS * S::LANES * P::STORED * size_of::<P>();
    for (tile_index, row) in (0..p.rows).step_by(ROWS).enumerate() {
        let which = (tile_index, p.rows.div_ceil(ROWS));
        let part = Part::new(row, which, p.inputs.div_ceil(P::STEP), bytes);
        // SAFETY: the caller's; as many rows from `row` on are there.
        unsafe {
            match ((p.rows - row).min(ROWS), part.lines.is_empty()) {
                (1, true) => tile::<S, P, 1, VECTORS, false>(s, p, part),
                (2, true) => tile::<S, P, 2, VECTORS, false>(s, p, part),
                (3, true) => tile::<S, P, 3, VECTORS, false>(s, p, part),
                (4, true) => tile::<S, P, 4, VECTORS, false>(s, p, part),
                (5, true) => tile::<S, P, 5, VECTORS, false>(s, p, part),
                (_, true) => tile::<S, P, 6, VECTORS, false>(s, p, part),
                (1, false) => tile::<S, P, 1, VECTORS, true>(s, p, part),
                (2, false) => tile::<S, P, 2, VECTORS, true>(s, p, part),
                (3, false) => tile::<S, P, 3, VECTORS, true>(s, p, part),
                (4, false) => tile::<S, P, 4, VECTORS, true>(s, p, part),
                (5, false) => tile::<S, P, 5, VECTORS, true>(s, p, part),
                (_, false) => tile::<S, P, 6, VECTORS, true>(s, p, part),
            }
        }
    }
}

/// What one tile of a product does.
pub(super) struct Part {
    pub(super) row: usize,
    /// Which cache lines of each step it asks for in advance...
    pub(super) lines: Range<usize>,
    /// ...and by how many steps.
    pub(super) distance: usize,
}

impl Part {
    /// Part `tile` of `tiles`, which share in asking for the lines of a step of `bytes`: those of
    /// the next panel, which begins `steps` later, or those soon to come if there is one tile only.
    #[inline(always)]
    pub(super) fn new(
        row: usize,
        (tile, tiles): (usize, usize),
        steps: usize,
        bytes: usize,
    ) -> Self {
        let lines = bytes / CACHE_LINE_BYTES;
        let sharing = tiles.min(lines);
        let lines = if tile < sharing {
            lines * tile / sharing..lines * (tile + 1) / sharing
        } else {
            0..0
        };
        let distance = if tiles == 1 {
            AHEAD_BYTES / bytes
        } else {
            steps
        };
        Self {
            row,
            lines,
            distance,
        }
    }
}

/// # Safety
/// As [`Product`] says, and `row + M <= rows`.
#[inline(always)]
unsafe fn tile<S: Simd, P: Panel, const M: usize, const V: usize, const AHEAD: bool>(
    s: S,
    p: Product<f32, P>,
    part: Part,
) {
    let Part {
        row,
        lines,
        distance,
    } = part;
    let mut sums = [[s.splat(0.0); V]; M];
    let steps = p.inputs.div_ceil(P::STEP);
    // SAFETY: `Product` covers `steps` steps of the panel and of each row.
    unsafe {
        let x = p.x.add(row * p.x_stride);
        for step in 0..steps {
            // Loops and not closures, which do not inherit the instruction set; one input after the
            // other, so that the weights of one only take up registers.
            let panel = p.panel.add(step * V * S::LANES * P::STORED);
            if AHEAD {
                // Beyond the last panel there is nothing, and asking for it is harmless.
                let next = panel.wrapping_add(distance * V * S::LANES * P::STORED);
                for line in lines.clone() {
                    s.prefetch(next.cast::<u8>().wrapping_add(line * CACHE_LINE_BYTES));
                }
            }
            let mut weights = [s.splat(0.0); V];
            for (v, weights) in weights.iter_mut().enumerate() {
                *weights = P::first(s, panel.add(v * S::LANES * P::STORED));
            }
            each_row!(m of M {
                let x = s.splat(*x.add(m * p.x_stride + step * P::STEP));
                for (sum, &weights) in sums[m].iter_mut().zip(&weights) {
                    *sum = s.fma(x, weights, *sum);
                }
            });
            if P::STEP == 2 {
                for (v, weights) in weights.iter_mut().enumerate() {
                    *weights = P::second(s, panel.add(v * S::LANES * P::STORED));
                }
                each_row!(m of M {
                    let x = s.splat(*x.add(m * p.x_stride + step * P::STEP + 1));
                    for (sum, &weights) in sums[m].iter_mut().zip(&weights) {
                        *sum = s.fma(x, weights, *sum);
                    }
                });
            }
        }
        write_rows(s, &sums, &p, row);
    }
}

/// Writes the sums of `M` rows from `row` on, with bias and what was there before.
///
/// # Safety
/// As [`Product`] says, and `row + M <= rows`.
#[inline(always)]
pub(super) unsafe fn write_rows<S: Simd, X, P, const M: usize, const V: usize>(
    s: S,
    sums: &[[S::F; V]; M],
    p: &Product<X, P>,
    row: usize,
) {
    each_row!(m of M {
        for (v, &sum) in sums[m].iter().enumerate() {
            let at = v * S::LANES;
            let mut sum = sum;
            // SAFETY: the caller's.
            unsafe {
                let out = p.out.add((row + m) * p.out_stride + at);
                if !p.bias.is_null() {
                    sum = s.add(sum, s.load(p.bias.add(at)));
                }
                if p.add {
                    sum = s.add(sum, s.load(out));
                }
                s.store(out, sum);
            }
        }
    });
}
