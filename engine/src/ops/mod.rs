//! The operations that a transformer is made of, on a flattened batch of tokens.
//!
//! Model code is written once over [`Ops`]; [`CpuOps`] is the implementation for host processors.
//! A batch flattens the new tokens of all its sequences into rows, so that chunks of prompts and
//! single decode steps run in the same matrix products.
//!
//! Every operation computes each row in an order that does not depend on the other rows: a token
//! gets the same bits alone, in a batch, in one chunk or in several (invariant 5).

mod batch;
pub mod cpu;
mod kv;

use std::fmt;

use blockplane_protocol::{DType, LayerIndex};

pub use batch::{Batch, BatchSequence};
pub use cpu::{Compute, CpuError, CpuOps, CpuOptions, Isa, IsaError, PoolError};
pub use kv::KvView;

/// A matrix in a checkpoint: `rows x columns` elements, row-major, little-endian.
#[derive(Clone, Copy)]
pub struct MatrixView<'a> {
    /// Its elements; `rows * columns * dtype.bytes()` bytes, not aligned.
    pub data: &'a [u8],
    /// Element type.
    pub dtype: DType,
    /// Rows (outputs of a linear layer).
    pub rows: usize,
    /// Columns (inputs of a linear layer).
    pub columns: usize,
}

/// What a matrix product does with what is already in its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Replaces it.
    Store,
    /// Adds to it.
    Add,
}

/// Shape of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Tokens seen, the current one included; `None`: all.
    pub window: Option<u32>,
}

/// Per-head norm of queries and keys, where an architecture has one.
#[derive(Debug)]
pub struct HeadNorms<'a, V> {
    /// Weights of the query norm, `head_dim` long.
    pub query: &'a V,
    /// Weights of the key norm, `head_dim` long.
    pub key: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// One kind of processor.
///
/// Three kinds of data: `Matrix` holds single-precision rows, `Input` holds rows in the form that
/// matrix products read, `Vector` holds parameters.
pub trait Ops: Send + Sync + fmt::Debug + Sized + 'static {
    /// The weights of a linear layer, packed for this processor.
    type Weight: Send + Sync + fmt::Debug;
    /// A vector of single-precision parameters.
    type Vector: Send + Sync + fmt::Debug;
    /// Rows of single-precision activations.
    type Matrix: Send + fmt::Debug;
    /// Rows of activations as a matrix product reads them.
    type Input: Send + fmt::Debug;
    /// Why memory for weights or activations cannot be had.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Element type of keys and values in this compute mode.
    fn kv_dtype(&self) -> DType;

    /// Packs matrices with the same number of columns as one, stacked by rows.
    ///
    /// # Errors
    /// When memory cannot be had.
    fn pack(&self, parts: &[MatrixView<'_>]) -> Result<Self::Weight, Self::Error>;

    /// Takes over a vector of parameters.
    ///
    /// # Errors
    /// When memory cannot be had.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector, Self::Error>;

    /// A matrix for up to `rows` rows of `columns`.
    ///
    /// # Errors
    /// When memory cannot be had.
    fn matrix(&self, rows: usize, columns: usize) -> Result<Self::Matrix, Self::Error>;

    /// An input of matrix products for up to `rows` rows of `columns`.
    ///
    /// # Errors
    /// When memory cannot be had.
    fn input(&self, rows: usize, columns: usize) -> Result<Self::Input, Self::Error>;

    /// `out[row] = table[batch.tokens[row]]`.
    fn embed(&self, batch: &Batch, table: MatrixView<'_>, out: &mut Self::Matrix);

    /// Sine and cosine of every row's position into `out` (`head_dim` columns: cosines, sines).
    fn rotation(
        &self,
        batch: &Batch,
        frequencies: &Self::Vector,
        scale: f32,
        out: &mut Self::Matrix,
    );

    /// `out = x / rms(x) * weight` for the first `rows` rows.
    fn rms_norm(
        &self,
        rows: usize,
        x: &Self::Matrix,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Input,
    );

    /// Like [`rms_norm`](Self::rms_norm) for the chosen rows of `x` only, in the order given.
    fn rms_norm_rows(
        &self,
        rows: &[usize],
        x: &Self::Matrix,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Input,
    );

    /// `out = x * weight^T + bias`, or adds that, for the first `rows` rows.
    fn linear(
        &self,
        rows: usize,
        x: &Self::Input,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        mode: Output,
        out: &mut Self::Matrix,
    );

    /// Normalises (where asked) and turns queries and keys, leaves the queries in `queries` and
    /// writes keys and values of every row into its block.
    #[expect(
        clippy::too_many_arguments,
        reason = "one fused pass over what it touches"
    )]
    fn rope_and_write_kv(
        &self,
        batch: &Batch,
        layer: LayerIndex,
        shape: AttentionShape,
        norms: Option<HeadNorms<'_, Self::Vector>>,
        qkv: &Self::Matrix,
        rotation: &Self::Matrix,
        queries: &mut Self::Matrix,
        kv: &dyn KvView,
    );

    /// Causal attention of every row over the blocks of its sequence, whose keys and values up to
    /// the row itself are already in place.
    fn attention(
        &self,
        batch: &Batch,
        layer: LayerIndex,
        shape: AttentionShape,
        queries: &Self::Matrix,
        kv: &dyn KvView,
        out: &mut Self::Matrix,
    );

    /// The first `rows` rows of `x` as a matrix product reads them.
    fn convert(&self, rows: usize, x: &Self::Matrix, out: &mut Self::Input);

    /// `out = silu(gate) * up` where `x` holds `[gate, up]` side by side, for the first `rows` rows.
    fn silu_mul(&self, rows: usize, x: &Self::Matrix, out: &mut Self::Input);

    /// One row of a matrix, in host memory.
    fn row<'a>(&self, x: &'a Self::Matrix, row: usize) -> &'a [f32];
}

impl fmt::Debug for MatrixView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "MatrixView({:?} {}x{})",
            self.dtype, self.rows, self.columns
        )
    }
}

impl MatrixView<'_> {
    /// All elements in single precision.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let bytes = self.data.chunks_exact(self.dtype.bytes());
        match self.dtype {
            DType::F32 => bytes
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            DType::F16 => bytes
                .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            DType::Bf16 => bytes
                .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
        }
    }
}
