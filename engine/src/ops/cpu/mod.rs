//! The operations on host processors.
//!
//! Weights are packed once, for the widest instruction set of the processor, and serve prefill and
//! decode alike. Work is cut into items that a pool of threads takes from a counter.

mod attention;
mod buffers;
mod gemm;
#[cfg(target_arch = "x86_64")]
mod half;
mod isa;
mod kernels;
mod linear;
mod memory;
mod pack;
mod paged;
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

use self::attention::Scratch;
use self::buffers::{InputData, Shared};
use self::kernels::Kernels;
use self::pack::Row;
use self::pool::Pool;
use super::{AttentionShape, Batch, HeadNorms, KvView, MatrixView, Ops, Output};

pub use self::buffers::{Input, Matrix, Vector};
pub use self::isa::{Isa, IsaError};
pub use self::pack::Weight;
pub use self::pool::PoolError;

/// What an element-wise loop does with each number, roughly.
const OPERATIONS_PER_NUMBER: usize = 10;
/// Rows of one item of an element-wise loop.
const ROWS_PER_ITEM: usize = 8;

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

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
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

    /// Runs `body` on ranges that cover `0..rows`, each of `columns` numbers.
    fn for_rows(&self, rows: usize, columns: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
        let operations = rows * columns * OPERATIONS_PER_NUMBER;
        let items = rows.div_ceil(ROWS_PER_ITEM);
        self.pool.run(items, operations, &|item| {
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
                self.for_rows(rows, columns, &|rows| {
                    for row in rows {
                        // SAFETY: every row is written by one item only.
                        fill(row, unsafe { data.slice(row * stride, columns) });
                    }
                });
            }
            InputData::Narrow { data, scales } => {
                let data = Shared::new(data.as_mut_ptr());
                let scales = Shared::new(scales.as_mut_ptr());
                self.for_rows(rows, columns, &|rows| {
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
        Vector::new(values)
    }

    fn matrix(&self, rows: usize, columns: usize) -> io::Result<Matrix> {
        Matrix::new(rows, columns)
    }

    fn input(&self, rows: usize, columns: usize) -> io::Result<Input> {
        Input::new(rows, columns, self.narrow_inputs)
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
        self.for_rows(batch.rows(), columns, &|rows| {
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
        self.for_rows(batch.rows(), columns, &|rows| {
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
        self.linear_rows(rows, x, weight, bias, mode, out);
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
        self.turn_and_write(batch, layer, shape, norms, qkv, rotation, queries, kv);
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
            out.copy_from_slice(x.row(row));
        });
    }

    fn silu_mul(&self, rows: usize, x: &Matrix, out: &mut Input) {
        let n = out.columns;
        assert!(
            rows <= x.rows && x.columns == 2 * n,
            "the buffers were made for each other"
        );
        self.fill_input(rows, out, &|row, out| {
            let (gate, up) = x.row(row).split_at(n);
            // SAFETY: all have `n` numbers, and the kernels are those of this processor.
            unsafe {
                (self.kernels.silu_mul)(n, gate.as_ptr(), up.as_ptr(), out.as_mut_ptr());
            }
        });
    }

    fn row<'a>(&self, x: &'a Matrix, row: usize) -> &'a [f32] {
        x.row(row)
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
            let x = x.row(source(row));
            // SAFETY: all have `n` numbers, and the kernels are those of this processor.
            unsafe {
                (self.kernels.rms_norm)(n, x.as_ptr(), weight.as_ptr(), eps, out.as_mut_ptr());
            }
        });
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
