//! The operations on host processors.
//!
//! Weights are packed once, for the widest instruction set of the processor, and serve prefill and
//! decode alike. Work is cut into items that a [pool](pool::Pool) of threads takes from a counter.

mod attention;
mod gemm;
#[cfg(target_arch = "x86_64")]
mod half;
mod isa;
mod kernels;
mod memory;
mod pack;
mod pool;
mod rows;
mod simd;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::ops::Range;

use blockplane_protocol::{DType, LayerIndex};
use thiserror::Error;

use self::attention::{Attend, Cached, Scratch};
use self::gemm::Product;
use self::kernels::Kernels;
use self::memory::Zeroed;
use self::pack::{Panels, Row};
use self::pool::Pool;
use super::{AttentionShape, Batch, HeadNorms, KvView, MatrixView, Ops, Output};

pub use self::isa::{Isa, IsaError};
pub use self::pack::Weight;
pub use self::pool::PoolError;

/// Single-precision rows are padded to whole panels of every instruction set.
const COLUMNS_MULTIPLE: usize = 64;
/// Bytes of a cache line of every processor here.
const CACHE_LINE_BYTES: usize = 64;
/// A multiple of the rows of a tile of every kernel.
const TILE_ROWS_MULTIPLE: usize = 12;
/// Rows of one item of an element-wise loop.
const ROWS_PER_ITEM: usize = 8;
/// Query rows of one item of attention: enough to pay for packing the keys.
const ATTENTION_ROWS: usize = 64;
/// Bytes of activations that stay in a core's cache while panels pass by.
const INPUT_BYTES_CACHED: usize = 1 << 20;
/// Bytes of weights of one item: long enough for the processor's prefetching, short enough to
/// leave little to wait for at the end.
const PANEL_BYTES_PER_ITEM: usize = 1 << 20;

/// How exact the computation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compute {
    /// Weights, keys and values in single precision, as in the checkpoint: the reference.
    F32,
    /// Weights in 16 bits, keys and values in bfloat16, sums and everything else in single
    /// precision. Where the instruction set multiplies 16-bit operands, activations are rounded to
    /// 16 bits before matrix products.
    Bf16,
}

/// How to make a [`CpuOps`].
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// How exact.
    pub compute: Compute,
    /// Threads that compute, the caller's included. Default: the cores of this machine.
    pub threads: usize,
    /// Instruction set; `None` (the default): the fastest that the processor has.
    pub isa: Option<Isa>,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self {
            compute: Compute::Bf16,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            isa: None,
        }
    }
}

/// Why a [`CpuOps`] is not made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CpuError {
    /// The instruction set asked for is not available.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The compute threads cannot be started.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// Operands of matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    F32,
    Bf16,
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(
            dead_code,
            reason = "no other processor computes in half precision here"
        )
    )]
    Fp16,
}

/// Host processors.
pub struct CpuOps {
    compute: Compute,
    isa: Isa,
    format: Format,
    /// Outputs per panel.
    width: usize,
    /// Whether products read activations of 16 bits.
    narrow_inputs: bool,
    kernels: &'static Kernels,
    pool: Pool,
}

/// Single-precision parameters, padded with zeros.
#[derive(Debug)]
pub struct Vector(Zeroed<f32>);

/// Rows of single-precision numbers, padded with zeros.
#[derive(Debug)]
pub struct Matrix {
    data: Zeroed<f32>,
    rows: usize,
    columns: usize,
    stride: usize,
}

/// Rows as matrix products read them.
#[derive(Debug)]
pub struct Input {
    rows: usize,
    columns: usize,
    stride: usize,
    data: InputData,
}

#[derive(Debug)]
enum InputData {
    Wide(Zeroed<f32>),
    Narrow {
        data: Zeroed<u16>,
        /// Inverse of each row's scale; 1 unless the format is half precision.
        scales: Zeroed<f32>,
    },
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A pointer that several threads write through, each to its own part.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: only `slice` gives access, and its callers keep the parts apart.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    const fn new(pointer: *mut T) -> Self {
        Self(pointer)
    }

    /// # Safety
    /// `at + len` elements are there, and nobody else uses these `len` while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the callers keep the parts apart")]
    unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }

    /// A pointer to one element, to be used under the conditions of `slice`.
    fn at(&self, at: usize) -> *mut T {
        self.0.wrapping_add(at)
    }
}

impl CpuOps {
    /// Starts the compute threads.
    ///
    /// # Errors
    /// A [`CpuError`] when the processor does not have the instruction set asked for, or when the
    /// threads cannot be started.
    pub fn new(options: &CpuOptions) -> Result<Self, CpuError> {
        let isa = options.isa.unwrap_or_else(Isa::best);
        if !isa.is_available() {
            return Err(IsaError::NotAvailable {
                wanted: isa,
                available: Isa::available(),
            }
            .into());
        }
        let kernels = Kernels::of(isa);
        let (format, width, narrow_inputs) = match (options.compute, isa) {
            (Compute::F32, _) => (Format::F32, kernels.width, false),
            #[cfg(target_arch = "x86_64")]
            (Compute::Bf16, Isa::Avx512Fp16) => (Format::Fp16, half::WIDTH, true),
            #[cfg(target_arch = "x86_64")]
            (Compute::Bf16, Isa::Avx512Bf16) => (Format::Bf16, half::WIDTH, true),
            (Compute::Bf16, _) => (Format::Bf16, kernels.width, false),
        };
        Ok(Self {
            compute: options.compute,
            isa,
            format,
            width,
            narrow_inputs,
            kernels,
            pool: Pool::new(options.threads)?,
        })
    }

    /// The instruction set in use.
    #[must_use]
    pub const fn isa(&self) -> Isa {
        self.isa
    }

    /// How exact the computation is.
    #[must_use]
    pub const fn compute(&self) -> Compute {
        self.compute
    }

    /// Threads that compute.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs `body` on ranges that cover `0..rows`.
    fn for_rows(&self, rows: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
        self.pool.run(rows.div_ceil(ROWS_PER_ITEM), &|item| {
            let first = item * ROWS_PER_ITEM;
            body(first..rows.min(first + ROWS_PER_ITEM));
        });
    }

    /// Turns rows of numbers, given one by one by `fill`, into rows of `out`.
    fn fill_input(&self, rows: usize, out: &mut Input, fill: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        assert!(rows <= out.rows, "the buffer was made for the batch");
        let (columns, stride) = (out.columns, out.stride);
        match &mut out.data {
            InputData::Wide(data) => {
                let data = Shared::new(data.as_mut_ptr());
                self.for_rows(rows, &|rows| {
                    for row in rows {
                        // SAFETY: every row is written by one item only.
                        fill(row, unsafe { data.slice(row * stride, columns) });
                    }
                });
            }
            InputData::Narrow { data, scales } => {
                let data = Shared::new(data.as_mut_ptr());
                let scales = Shared::new(scales.as_mut_ptr());
                self.for_rows(rows, &|rows| {
                    SCRATCH.with_borrow_mut(|scratch| {
                        let wide = scratch.get(columns);
                        for row in rows {
                            fill(row, wide);
                            // SAFETY: every row is written by one item only.
                            let narrow = unsafe { data.slice(row * stride, columns) };
                            // SAFETY: as above.
                            let scale = unsafe { scales.slice(row, 1) };
                            scale[0] = self.narrow(wide, narrow);
                        }
                    });
                });
            }
        }
    }

    /// Rounds a row to the 16-bit format; returns the inverse of its scale.
    fn narrow(&self, wide: &[f32], narrow: &mut [u16]) -> f32 {
        assert_eq!(wide.len(), narrow.len(), "a row keeps its length");
        match self.format {
            #[cfg(target_arch = "x86_64")]
            Format::Fp16 => {
                // SAFETY: both have this length, and the format implies the instruction set.
                unsafe { half::narrow_fp16(wide.len(), wide.as_ptr(), narrow.as_mut_ptr()) }
            }
            _ => {
                // SAFETY: both have this length, and the kernels are those of this processor.
                unsafe {
                    (self.kernels.narrow_bf16)(wide.len(), wide.as_ptr(), narrow.as_mut_ptr());
                }
                1.0
            }
        }
    }

    /// `rows` rows from `first` on, against one panel.
    ///
    /// # Safety
    /// `out` is valid for `rows` rows of a panel that nobody else touches.
    #[expect(
        clippy::too_many_arguments,
        reason = "one place where all parts of a product meet"
    )]
    unsafe fn product(
        &self,
        x: &Input,
        rows: Range<usize>,
        weight: &Weight,
        panel: usize,
        bias: Option<&Vector>,
        mode: Output,
        out: *mut f32,
        out_stride: usize,
    ) {
        let bias = bias.map_or(std::ptr::null(), |bias| {
            bias.0.as_slice()[panel * self.width..].as_ptr()
        });
        let inputs = weight.inputs;
        match (&x.data, &weight.panels) {
            (InputData::Wide(data), Panels::F32(panels)) => {
                let p = Product {
                    x: data.as_slice()[rows.start * x.stride..].as_ptr(),
                    x_stride: x.stride,
                    rows: rows.len(),
                    inputs,
                    panel: panels.as_slice()[panel * inputs * self.width..].as_ptr(),
                    bias,
                    out,
                    out_stride,
                    add: mode == Output::Add,
                };
                // SAFETY: the slices hold the rows and the panel; the output is the caller's.
                unsafe { (self.kernels.product_f32)(p) };
            }
            (InputData::Wide(data), Panels::Bf16(panels)) => {
                let length = inputs.next_multiple_of(2) * self.width;
                let p = Product {
                    x: data.as_slice()[rows.start * x.stride..].as_ptr(),
                    x_stride: x.stride,
                    rows: rows.len(),
                    inputs,
                    panel: panels.as_slice()[panel * length..].as_ptr(),
                    bias,
                    out,
                    out_stride,
                    add: mode == Output::Add,
                };
                // SAFETY: as above; rows are padded with zeros beyond an odd number of inputs.
                unsafe { (self.kernels.product_bf16)(p) };
            }
            #[cfg(target_arch = "x86_64")]
            (InputData::Narrow { data, .. }, Panels::Bf16(panels)) => {
                let length = inputs.next_multiple_of(2) * self.width;
                let p = Product {
                    x: data.as_slice()[rows.start * x.stride..].as_ptr(),
                    x_stride: x.stride,
                    rows: rows.len(),
                    inputs,
                    panel: panels.as_slice()[panel * length..].as_ptr(),
                    bias,
                    out,
                    out_stride,
                    add: mode == Output::Add,
                };
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
                let length = inputs.next_multiple_of(2) * self.width;
                let p = half::Scaled {
                    product: Product {
                        x: data.as_slice()[rows.start * x.stride..].as_ptr(),
                        x_stride: x.stride,
                        rows: rows.len(),
                        inputs,
                        panel: panels.as_slice()[panel * length..].as_ptr(),
                        bias,
                        out,
                        out_stride,
                        add: mode == Output::Add,
                    },
                    row_scales: scales.as_slice()[rows.start..].as_ptr(),
                    panel_scale: of_panels.as_slice()[panel],
                };
                // SAFETY: as above; the format implies the instruction set.
                unsafe { half::product_fp16(p) };
            }
            _ => unreachable!("weights and activations of one CpuOps have matching formats"),
        }
    }

    /// Attention with keys and values of type `K`.
    fn attend<K: Cached + Send + Sync>(
        &self,
        kernel: unsafe fn(Attend<'_, K>),
        batch: &Batch,
        layer: LayerIndex,
        shape: AttentionShape,
        queries: &Matrix,
        kv: &dyn KvView,
        out: &mut Matrix,
    ) {
        let group = shape.heads / shape.kv_heads;
        let tile = (ATTENTION_ROWS / group).max(1);
        let block_tokens = kv.layout().block_tokens as usize;
        let head_elements = block_tokens * shape.head_dim;
        // (sequence, first token of the tile): later tiles first, they are the longest.
        let mut tiles: Vec<(usize, usize)> = Vec::new();
        for (index, sequence) in batch.sequences.iter().enumerate() {
            tiles.extend(
                (0..sequence.rows.len())
                    .step_by(tile)
                    .map(|token| (index, token)),
            );
        }
        tiles.sort_by_key(|&(index, token)| {
            std::cmp::Reverse(batch.sequences[index].position + token)
        });
        let rows = batch.rows();
        let stride = out.stride;
        let out = Shared::new(out.data.as_mut_ptr());
        self.pool.run(tiles.len() * shape.kv_heads, &|item| {
            let (index, token) = tiles[item / shape.kv_heads];
            let head = item % shape.kv_heads;
            let sequence = &batch.sequences[index];
            let tokens = tile.min(sequence.rows.len() - token);
            let row = sequence.rows.start + token;
            let blocks = &batch.blocks[sequence.blocks.clone()];
            let key_run = |position: usize| {
                let run = kv.run_ptr(blocks[position / block_tokens], layer);
                let token = position % block_tokens;
                let at = head * head_elements + token * shape.head_dim;
                let key = run.as_ptr().cast::<K>().cast_const().wrapping_add(at);
                (key, block_tokens - token)
            };
            let first_query = (head * rows + row) * group * shape.head_dim;
            SCRATCH.with_borrow_mut(|scratch| {
                let attend = Attend {
                    queries: queries.data.as_slice()[first_query..].as_ptr(),
                    group,
                    head_dim: shape.head_dim,
                    tokens,
                    position: sequence.position + token,
                    window: shape.window.map_or(usize::MAX, |window| window as usize),
                    key_run: &key_run,
                    value_offset: shape.kv_heads * head_elements,
                    out: out.at(row * stride + head * group * shape.head_dim),
                    out_stride: stride,
                    scratch,
                };
                // SAFETY: the queries of this head are contiguous and there; the block table
                // covers every position, and `KvView` promises the runs; this item alone writes
                // these heads of these rows.
                unsafe { kernel(attend) };
            });
        });
    }
}

impl Ops for CpuOps {
    type Weight = Weight;
    type Vector = Vector;
    type Matrix = Matrix;
    type Input = Input;
    type Error = io::Error;

    fn kv_dtype(&self) -> DType {
        match self.compute {
            Compute::F32 => DType::F32,
            Compute::Bf16 => DType::Bf16,
        }
    }

    fn pack(&self, parts: &[MatrixView<'_>]) -> io::Result<Weight> {
        pack::pack(&self.pool, self.format, self.width, parts)
    }

    fn vector(&self, values: &[f32]) -> io::Result<Vector> {
        let mut vector = Zeroed::new(values.len().next_multiple_of(COLUMNS_MULTIPLE))?;
        vector.as_mut_slice()[..values.len()].copy_from_slice(values);
        Ok(Vector(vector))
    }

    fn matrix(&self, rows: usize, columns: usize) -> io::Result<Matrix> {
        // Whole panels, and an odd number of cache lines: rows then fall into different sets.
        let line = CACHE_LINE_BYTES / size_of::<f32>();
        let stride = columns.next_multiple_of(COLUMNS_MULTIPLE) + line;
        Ok(Matrix {
            data: Zeroed::new(rows * stride)?,
            rows,
            columns,
            stride,
        })
    }

    fn input(&self, rows: usize, columns: usize) -> io::Result<Input> {
        // An odd number of cache lines: the rows of a tile then fall into different sets.
        let element = if self.narrow_inputs { 2 } else { 4 };
        let line = CACHE_LINE_BYTES / element;
        let stride = (columns.div_ceil(line) | 1) * line;
        let data = if self.narrow_inputs {
            InputData::Narrow {
                data: Zeroed::new(rows * stride)?,
                scales: Zeroed::new(rows)?,
            }
        } else {
            InputData::Wide(Zeroed::new(rows * stride)?)
        };
        Ok(Input {
            rows,
            columns,
            stride,
            data,
        })
    }

    fn embed(&self, batch: &Batch, table: MatrixView<'_>, out: &mut Matrix) {
        assert!(
            batch.rows() <= out.rows,
            "the buffer was made for the batch"
        );
        let bytes = table.columns * table.dtype.bytes();
        let (columns, stride) = (out.columns, out.stride);
        assert_eq!(columns, table.columns, "the buffer was made for the table");
        let out = Shared::new(out.data.as_mut_ptr());
        self.for_rows(batch.rows(), &|rows| {
            for row in rows {
                let token = batch.tokens[row] as usize;
                let row_data = Row {
                    data: &table.data[token * bytes..(token + 1) * bytes],
                    dtype: table.dtype,
                };
                // SAFETY: every row is written by one item only.
                let out = unsafe { out.slice(row * stride, columns) };
                row_data.for_each(|i, x| out[i] = x);
            }
        });
    }

    fn rotation(&self, batch: &Batch, frequencies: &Vector, scale: f32, out: &mut Matrix) {
        assert!(
            batch.rows() <= out.rows,
            "the buffer was made for the batch"
        );
        let (columns, stride) = (out.columns, out.stride);
        let frequencies = &frequencies.0.as_slice()[..columns / 2];
        let out = Shared::new(out.data.as_mut_ptr());
        self.for_rows(batch.rows(), &|rows| {
            for row in rows {
                let position = rows::position(batch.positions[row]);
                // SAFETY: every row is written by one item only.
                let out = unsafe { out.slice(row * stride, columns) };
                let (cosines, sines) = out.split_at_mut(columns / 2);
                for ((cos, sin), frequency) in cosines.iter_mut().zip(sines).zip(frequencies) {
                    let (s, c) = (position * frequency).sin_cos();
                    (*cos, *sin) = (c * scale, s * scale);
                }
            }
        });
    }

    fn rms_norm(&self, rows: usize, x: &Matrix, weight: &Vector, eps: f32, out: &mut Input) {
        self.norm(rows, &|row| row, x, weight, eps, out);
    }

    fn rms_norm_rows(
        &self,
        rows: &[usize],
        x: &Matrix,
        weight: &Vector,
        eps: f32,
        out: &mut Input,
    ) {
        self.norm(rows.len(), &|row| rows[row], x, weight, eps, out);
    }

    fn linear(
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
        self.pool.run(row_items * panel_items, &|item| {
            let first_row = item / panel_items * rows_per_item;
            let of_rows = first_row..rows.min(first_row + rows_per_item);
            let first = item % panel_items * panels_per_item;
            for panel in first..panels.min(first + panels_per_item) {
                let out = out.at(first_row * stride + panel * self.width);
                // SAFETY: these columns of these rows belong to this item; strides are multiples
                // of every panel width.
                unsafe {
                    self.product(x, of_rows.clone(), weight, panel, bias, mode, out, stride);
                }
            }
        });
    }

    fn rope_and_write_kv(
        &self,
        batch: &Batch,
        layer: LayerIndex,
        shape: AttentionShape,
        norms: Option<HeadNorms<'_, Vector>>,
        qkv: &Matrix,
        rotation: &Matrix,
        queries: &mut Matrix,
        kv: &dyn KvView,
    ) {
        let rows = batch.rows();
        let dim = shape.head_dim;
        let group = shape.heads / shape.kv_heads;
        let block_tokens = kv.layout().block_tokens as usize;
        let plane = shape.kv_heads * block_tokens * dim;
        assert!(
            qkv.columns == (shape.heads + 2 * shape.kv_heads) * dim
                && rotation.columns == dim
                && rows * shape.heads * dim <= queries.data.len(),
            "the buffers were made for the layer and the batch"
        );
        let queries = Shared::new(queries.data.as_mut_ptr());
        let turn =
            |head: &[f32], norm: Option<&Vector>, eps: f32, angles: &[f32], out: &mut [f32]| {
                assert!(
                    head.len() == dim && out.len() == dim && angles.len() == dim,
                    "one head"
                );
                let (cosines, sines) = angles.split_at(dim / 2);
                let mut from = head.as_ptr();
                if let Some(norm) = norm {
                    let weight = &norm.0.as_slice()[..dim];
                    // SAFETY: all have `dim` numbers, and the kernels are those of this processor.
                    unsafe {
                        (self.kernels.rms_norm)(dim, from, weight.as_ptr(), eps, out.as_mut_ptr());
                    }
                    from = out.as_ptr();
                }
                // SAFETY: as above; the angles have half as many.
                unsafe {
                    (self.kernels.rotate)(
                        dim,
                        from,
                        cosines.as_ptr(),
                        sines.as_ptr(),
                        out.as_mut_ptr(),
                    );
                }
            };
        let (query_norm, key_norm, eps) = norms.map_or((None, None, 0.0), |norms| {
            (Some(norms.query), Some(norms.key), norms.eps)
        });
        self.for_rows(rows, &|of_rows| {
            SCRATCH.with_borrow_mut(|scratch| {
                let turned = scratch.get(dim);
                for row in of_rows {
                    let source = &qkv.data.as_slice()[row * qkv.stride..][..qkv.columns];
                    let angles = &rotation.data.as_slice()[row * rotation.stride..][..dim];
                    let (q, rest) = source.split_at(shape.heads * dim);
                    let (k, v) = rest.split_at(shape.kv_heads * dim);
                    for (head, q) in q.chunks_exact(dim).enumerate() {
                        let at = ((head / group * rows + row) * group + head % group) * dim;
                        // SAFETY: every head of every row is written by one item only.
                        let out = unsafe { queries.slice(at, dim) };
                        turn(q, query_norm, eps, angles, out);
                    }
                    let position = batch.positions[row] as usize;
                    let sequence = &batch.sequences[batch.owners[row] as usize];
                    let block = batch.blocks[sequence.blocks.start + position / block_tokens];
                    let run = kv.run_ptr(block, layer).as_ptr();
                    for head in 0..shape.kv_heads {
                        let at = (head * block_tokens + position % block_tokens) * dim;
                        turn(&k[head * dim..][..dim], key_norm, eps, angles, turned);
                        // SAFETY: inside the run that `KvView` promises, in the slot of this row.
                        unsafe { self.write_kv(turned, run, at) };
                        // SAFETY: as above, in the plane of values.
                        unsafe { self.write_kv(&v[head * dim..][..dim], run, plane + at) };
                    }
                }
            });
        });
    }

    fn attention(
        &self,
        batch: &Batch,
        layer: LayerIndex,
        shape: AttentionShape,
        queries: &Matrix,
        kv: &dyn KvView,
        out: &mut Matrix,
    ) {
        assert!(
            batch.rows() <= out.rows && out.columns == shape.heads * shape.head_dim,
            "the buffers were made for the layer and the batch"
        );
        match self.compute {
            Compute::F32 => {
                self.attend(
                    self.kernels.attend_f32,
                    batch,
                    layer,
                    shape,
                    queries,
                    kv,
                    out,
                );
            }
            Compute::Bf16 => {
                self.attend(
                    self.kernels.attend_bf16,
                    batch,
                    layer,
                    shape,
                    queries,
                    kv,
                    out,
                );
            }
        }
    }

    fn convert(&self, rows: usize, x: &Matrix, out: &mut Input) {
        assert!(
            rows <= x.rows && x.columns == out.columns,
            "the buffers were made for each other"
        );
        self.fill_input(rows, out, &|row, out| {
            out.copy_from_slice(&x.data.as_slice()[row * x.stride..][..x.columns]);
        });
    }

    fn silu_mul(&self, rows: usize, x: &Matrix, out: &mut Input) {
        let n = out.columns;
        assert!(
            rows <= x.rows && x.columns == 2 * n,
            "the buffers were made for each other"
        );
        self.fill_input(rows, out, &|row, out| {
            let (gate, up) = x.data.as_slice()[row * x.stride..][..2 * n].split_at(n);
            // SAFETY: all have `n` numbers, and the kernels are those of this processor.
            unsafe {
                (self.kernels.silu_mul)(n, gate.as_ptr(), up.as_ptr(), out.as_mut_ptr());
            }
        });
    }

    fn row<'a>(&self, x: &'a Matrix, row: usize) -> &'a [f32] {
        &x.data.as_slice()[row * x.stride..][..x.columns]
    }
}

impl CpuOps {
    fn norm(
        &self,
        rows: usize,
        source: &(dyn Fn(usize) -> usize + Sync),
        x: &Matrix,
        weight: &Vector,
        eps: f32,
        out: &mut Input,
    ) {
        let n = out.columns;
        let weight = &weight.0.as_slice()[..n];
        assert_eq!(x.columns, n, "the buffers were made for each other");
        self.fill_input(rows, out, &|row, out| {
            let x = &x.data.as_slice()[source(row) * x.stride..][..n];
            // SAFETY: all have `n` numbers, and the kernels are those of this processor.
            unsafe {
                (self.kernels.rms_norm)(n, x.as_ptr(), weight.as_ptr(), eps, out.as_mut_ptr());
            }
        });
    }

    /// Writes one head of keys or values, `at` elements after the start of its run.
    ///
    /// # Safety
    /// The elements are inside the run and nobody else touches them.
    unsafe fn write_kv(&self, head: &[f32], run: *mut u8, at: usize) {
        match self.compute {
            Compute::F32 => {
                let to = run.cast::<f32>().wrapping_add(at);
                // SAFETY: the caller's.
                unsafe { std::ptr::copy_nonoverlapping(head.as_ptr(), to, head.len()) };
            }
            Compute::Bf16 => {
                let to = run.cast::<u16>().wrapping_add(at);
                // SAFETY: the caller's, and the kernels are those of this processor.
                unsafe { (self.kernels.narrow_bf16)(head.len(), head.as_ptr(), to) };
            }
        }
    }
}

impl fmt::Debug for CpuOps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuOps")
            .field("compute", &self.compute)
            .field("isa", &self.isa)
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}

/// See [`half::scales`]; without half precision nothing is scaled.
fn fp16_scales(magnitude: f32) -> (f32, f32) {
    #[cfg(target_arch = "x86_64")]
    {
        half::scales(magnitude)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = magnitude;
        (1.0, 1.0)
    }
}
