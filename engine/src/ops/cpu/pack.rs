//! Weights, turned once into the panels that the kernels read.

use std::io;

use blockplane_protocol::DType;

use super::memory::Zeroed;
use super::pool::Pool;
use super::rows::to_bf16;
use super::{Format, Shared};
use crate::ops::MatrixView;

/// A packed matrix.
#[derive(Debug)]
pub struct Weight {
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) panels: Panels,
}

/// Panels `[outputs / width][...]`; outputs beyond the last are zero.
#[derive(Debug)]
pub(super) enum Panels {
    /// `[inputs][width]`.
    F32(Zeroed<f32>),
    /// `[inputs / 2][width][2]`.
    Bf16(Zeroed<u16>),
    /// `[inputs / 2][width][2]`, each panel scaled by a power of two whose inverse is in `scales`.
    Fp16 {
        panels: Zeroed<u16>,
        scales: Zeroed<f32>,
    },
}

/// Packs `parts`, stacked, in panels of `width` outputs.
pub(super) fn pack(
    pool: &Pool,
    format: Format,
    width: usize,
    parts: &[MatrixView<'_>],
) -> io::Result<Weight> {
    let inputs = parts.first().map_or(0, |part| part.columns);
    assert!(
        parts.iter().all(|part| part.columns == inputs
            && part.data.len() == part.rows * part.columns * part.dtype.bytes()),
        "parts of one packed matrix have the same columns and all their bytes"
    );
    let outputs = parts.iter().map(|part| part.rows).sum::<usize>();
    let count = outputs.div_ceil(width);
    // The row of `parts` with one output.
    let row = |output: usize| -> Option<Row<'_>> {
        let mut output = output;
        for part in parts {
            if output < part.rows {
                let bytes = inputs * part.dtype.bytes();
                let data = &part.data[output * bytes..(output + 1) * bytes];
                return Some(Row {
                    data,
                    dtype: part.dtype,
                });
            }
            output -= part.rows;
        }
        None
    };
    let panels = match format {
        Format::F32 => {
            let length = inputs * width;
            let mut panels = Zeroed::new(count * length)?;
            let out = Shared::new(panels.as_mut_ptr());
            pool.run(count, outputs * inputs, &|panel| {
                // SAFETY: every panel is written by one item only.
                let out = unsafe { out.slice(panel * length, length) };
                for lane in 0..width {
                    let Some(row) = row(panel * width + lane) else {
                        break;
                    };
                    row.for_each(|input, x| out[input * width + lane] = x);
                }
            });
            Panels::F32(panels)
        }
        Format::Bf16 => {
            let length = inputs.next_multiple_of(2) * width;
            let mut panels = Zeroed::new(count * length)?;
            let out = Shared::new(panels.as_mut_ptr());
            pool.run(count, outputs * inputs, &|panel| {
                // SAFETY: every panel is written by one item only.
                let out = unsafe { out.slice(panel * length, length) };
                for lane in 0..width {
                    let Some(row) = row(panel * width + lane) else {
                        break;
                    };
                    row.for_each(|input, x| {
                        out[(input / 2 * width + lane) * 2 + input % 2] = to_bf16(x);
                    });
                }
            });
            Panels::Bf16(panels)
        }
        Format::Fp16 => {
            let length = inputs.next_multiple_of(2) * width;
            let mut panels = Zeroed::new(count * length)?;
            let mut scales = Zeroed::new(count)?;
            let out = Shared::new(panels.as_mut_ptr());
            let inverses = Shared::new(scales.as_mut_ptr());
            pool.run(count, outputs * inputs, &|panel| {
                // SAFETY: every panel is written by one item only.
                let out = unsafe { out.slice(panel * length, length) };
                // SAFETY: and so is its scale.
                let inverse = unsafe { inverses.slice(panel, 1) };
                let rows = || {
                    (0..width)
                        .map_while(|lane| row(panel * width + lane))
                        .enumerate()
                };
                let (mut magnitude, mut finite) = (0.0_f32, true);
                for (_, row) in rows() {
                    row.for_each(|_, x| {
                        magnitude = magnitude.max(x.abs());
                        finite &= x.is_finite();
                    });
                }
                let (down, up) = super::fp16_scales(magnitude);
                // The products do not carry infinities and NaN; their scale does.
                inverse[0] = if finite { up } else { f32::NAN };
                for (lane, row) in rows() {
                    row.for_each(|input, x| {
                        let at = (input / 2 * width + lane) * 2 + input % 2;
                        out[at] = half::f16::from_f32(x * down).to_bits();
                    });
                }
            });
            Panels::Fp16 { panels, scales }
        }
    };
    Ok(Weight {
        outputs,
        inputs,
        panels,
    })
}

/// One row of a matrix as it is in the file.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) data: &'a [u8],
    pub(super) dtype: DType,
}

impl Row<'_> {
    /// Calls `f` with the index and value of every element.
    #[inline]
    pub(super) fn for_each(self, mut f: impl FnMut(usize, f32)) {
        match self.dtype {
            DType::F32 => {
                for (i, bytes) in self.data.as_chunks::<4>().0.iter().enumerate() {
                    f(i, f32::from_le_bytes(*bytes));
                }
            }
            DType::F16 => {
                for (i, bytes) in self.data.as_chunks::<2>().0.iter().enumerate() {
                    f(i, half::f16::from_le_bytes(*bytes).to_f32());
                }
            }
            DType::Bf16 => {
                for (i, bytes) in self.data.as_chunks::<2>().0.iter().enumerate() {
                    f(i, half::bf16::from_le_bytes(*bytes).to_f32());
                }
            }
        }
    }
}
