//! Linear layers: which rows meet which panels, on which thread, in which format.

use std::ops::Range;

use super::CpuOps;
use super::buffers::{Input, InputData, Matrix, Shared, Vector};
use super::gemm::Product;
#[cfg(target_arch = "x86_64")]
use super::half;
use super::pack::{Panels, Weight};
use crate::ops::Output;

/// A multiple of the rows of a tile of every kernel.
const TILE_ROWS_MULTIPLE: usize = 12;
/// Bytes of activations that stay in a core's cache while panels pass by.
const INPUT_BYTES_CACHED: usize = 1 << 20;
/// Bytes of weights of one item: long enough for the processor's prefetching, short enough to
/// leave little to wait for at the end.
const PANEL_BYTES_PER_ITEM: usize = 1 << 20;

/// Some rows against one panel.
struct Tile<'a> {
    x: &'a Input,
    rows: Range<usize>,
    weight: &'a Weight,
    panel: usize,
    bias: Option<&'a Vector>,
    mode: Output,
    out: *mut f32,
    out_stride: usize,
}

impl CpuOps {
    /// See [`Ops::linear`](crate::ops::Ops::linear).
    pub(super) fn linear_rows(
        &self,
        rows: usize,
        x: &Input,
        weight: &Weight,
        bias: Option<&Vector>,
        mode: Output,
        out: &mut Matrix,
    ) {
        assert!(
            rows <= x.rows && rows <= out.rows,
            "the buffers were made for the batch"
        );
        assert!(
            weight.inputs == x.columns && weight.outputs == out.columns,
            "the buffers were made for the layer"
        );
        let panels = weight.outputs.div_ceil(self.width);
        let element = if self.narrow_inputs { 2 } else { 4 };
        let rows_cached = (INPUT_BYTES_CACHED / (x.stride * element)).max(48);
        // Chunks of about the same size, in whole tiles.
        let rows_per_item = rows
            .div_ceil(rows.div_ceil(rows_cached).max(1))
            .next_multiple_of(TILE_ROWS_MULTIPLE);
        let row_items = rows.div_ceil(rows_per_item);
        let panel_bytes = weight.inputs * self.width * 2;
        // At least four items per thread, so that a thread that is late has little left to do.
        let panels_per_item = (PANEL_BYTES_PER_ITEM / panel_bytes)
            .min(panels * row_items / (4 * self.threads()))
            .max(1);
        let panel_items = panels.div_ceil(panels_per_item);
        let stride = out.stride;
        let out = Shared::new(out.data.as_mut_ptr());
        let operations = rows * weight.inputs * weight.outputs;
        self.pool.run(row_items * panel_items, operations, &|item| {
            let first_row = item / panel_items * rows_per_item;
            let of_rows = first_row..rows.min(first_row + rows_per_item);
            let first = item % panel_items * panels_per_item;
            for panel in first..panels.min(first + panels_per_item) {
                let tile = Tile {
                    x,
                    rows: of_rows.clone(),
                    weight,
                    panel,
                    bias,
                    mode,
                    out: out.at(first_row * stride + panel * self.width),
                    out_stride: stride,
                };
                // SAFETY: these columns of these rows belong to this item; strides are multiples
                // of every panel width.
                unsafe { self.product(&tile) };
            }
        });
    }

    /// # Safety
    /// `tile.out` is valid for the rows of a panel that nobody else touches.
    unsafe fn product(&self, tile: &Tile<'_>) {
        let inputs = tile.weight.inputs;
        let paired = inputs.next_multiple_of(2) * self.width;
        match (&tile.x.data, &tile.weight.panels) {
            (InputData::Wide(x), Panels::F32(panels)) => {
                let p = tile.parts(
                    x.as_slice(),
                    panels.as_slice(),
                    inputs * self.width,
                    self.width,
                );
                // SAFETY: the slices hold the rows and the panel; the output is the caller's.
                unsafe { (self.kernels.product_f32)(p) };
            }
            (InputData::Wide(x), Panels::Bf16(panels)) => {
                let p = tile.parts(x.as_slice(), panels.as_slice(), paired, self.width);
                // SAFETY: as above; rows are padded with zeros beyond an odd number of inputs.
                unsafe { (self.kernels.product_bf16)(p) };
            }
            #[cfg(target_arch = "x86_64")]
            (InputData::Narrow { data, .. }, Panels::Bf16(panels)) => {
                let p = tile.parts(data.as_slice(), panels.as_slice(), paired, self.width);
                // SAFETY: as above; narrow rows of bfloat16 imply the instruction set.
                unsafe { half::product_bf16(p) };
            }
            #[cfg(target_arch = "x86_64")]
            (
                InputData::Narrow { data, scales },
                Panels::Fp16 {
                    panels,
                    scales: of_panels,
                },
            ) => {
                let p = half::Scaled {
                    product: tile.parts(data.as_slice(), panels.as_slice(), paired, self.width),
                    row_scales: scales.as_slice()[tile.rows.clone()].as_ptr(),
                    panel_scale: of_panels.as_slice()[tile.panel],
                };
                // SAFETY: as above; the format implies the instruction set.
                unsafe { half::product_fp16(p) };
            }
            _ => unreachable!("weights and activations of one CpuOps have matching formats"),
        }
    }
}

impl Tile<'_> {
    /// The pointers of a kernel call, where a panel is `length` stored numbers long.
    fn parts<X, P>(&self, x: &[X], panels: &[P], length: usize, width: usize) -> Product<X, P> {
        let bias = self
            .bias
            .map(|bias| &bias.0.as_slice()[self.panel * width..][..width]);
        Product {
            x: x[self.rows.start * self.x.stride..self.rows.end * self.x.stride].as_ptr(),
            x_stride: self.x.stride,
            rows: self.rows.len(),
            inputs: self.weight.inputs,
            panel: panels[self.panel * length..][..length].as_ptr(),
            bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            out: self.out,
            out_stride: self.out_stride,
            add: self.mode == Output::Add,
        }
    }
}
