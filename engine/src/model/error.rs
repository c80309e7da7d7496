//! Why a checkpoint is not loaded and why a step is not run.

use std::borrow::Cow;
use std::path::PathBuf;

use blockplane_protocol::{BlockId, TokenId};
use thiserror::Error;

use crate::ops::CpuError;

/// Why a checkpoint folder is not loaded. Loading is never retryable: the files must change.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A JSON file is not valid.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// `config.json` describes a model that is not supported.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// There are no weights.
    #[error(
        "{}: no weights; accepted: model.safetensors, or model.safetensors.index.json with the \
         files that it names",
        folder.display()
    )]
    NoWeights {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// The shard index names a file outside the checkpoint folder.
    #[error(
        "{}: weight_map names the file {file:?}; accepted: names of files in the same folder",
        path.display()
    )]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The name found.
        file: String,
    },
    /// A safetensors file is damaged or cut off.
    #[error(
        "{}: not a whole safetensors file of {bytes} bytes (damaged or truncated): {source}",
        path.display()
    )]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// What is wrong with it.
        source: safetensors::SafeTensorError,
    },
    /// A tensor that the architecture needs is not there.
    #[error("{}: tensor {tensor} is missing", path.display())]
    MissingTensor {
        /// The file, or the shard index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has an element type that is not supported.
    #[error("{}: tensor {tensor} has dtype {found}; accepted: BF16, F16, F32", path.display())]
    TensorDType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element type found.
        found: String,
    },
    /// A tensor does not have the shape that `config.json` gives it.
    #[error(
        "{}: tensor {tensor} has shape {found:?}; config.json asks for {accepted:?}",
        path.display()
    )]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape found.
        found: Vec<usize>,
        /// The shape that the configuration asks for.
        accepted: Vec<usize>,
    },
    /// Memory for the weights cannot be had.
    #[error("{bytes} bytes for {what} cannot be allocated: {source}")]
    Memory {
        /// What they are for.
        what: &'static str,
        /// How many.
        bytes: usize,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The processor or its threads cannot be used as asked.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

/// What is wrong with a model configuration.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The architecture is not known.
    #[error(
        "architecture {found} is not supported; accepted: LlamaForCausalLM, Qwen2ForCausalLM, \
         Qwen3ForCausalLM, MistralForCausalLM"
    )]
    Architecture {
        /// The architecture found.
        found: String,
    },
    /// A field that has no default is not there.
    #[error("{field} is missing")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A field has a value that is not accepted.
    #[error("{field} is {found}; accepted: {accepted}")]
    Value {
        /// The field.
        field: &'static str,
        /// The value found.
        found: String,
        /// Which values are.
        accepted: Cow<'static, str>,
    },
}

/// Why [`Executor::forward`](super::Executor::forward) did not run a step. Nothing was written.
/// Every one of them is a fault of the caller, so trying again does not help.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// The KV blocks are not those of this model.
    #[error("the KV blocks do not have the layout of the model: {found}; the model has {accepted}")]
    Layout {
        /// The layout found.
        found: String,
        /// The layout of the model.
        accepted: String,
    },
    /// A sequence has no new token.
    #[error("sequence {sequence} of the batch has no tokens")]
    Empty {
        /// Index in the batch.
        sequence: usize,
    },
    /// A token is not in the vocabulary.
    #[error("sequence {sequence} of the batch has token {token}; the vocabulary has {vocab_size}")]
    Token {
        /// Index in the batch.
        sequence: usize,
        /// The token.
        token: TokenId,
        /// Tokens of the vocabulary.
        vocab_size: usize,
    },
    /// A sequence is longer than the context of the model.
    #[error("sequence {sequence} of the batch ends at {end}; the context of the model is {max}")]
    Context {
        /// Index in the batch.
        sequence: usize,
        /// Tokens of the sequence after this step.
        end: u64,
        /// The longest accepted.
        max: usize,
    },
    /// A block table does not cover its sequence.
    #[error("sequence {sequence} of the batch has {found} blocks and needs {needed}")]
    BlockTable {
        /// Index in the batch.
        sequence: usize,
        /// Blocks in the table.
        found: usize,
        /// Blocks that its tokens need.
        needed: usize,
    },
    /// A block is not in the pool.
    #[error("sequence {sequence} of the batch names block {block:?}; the pool has {blocks}")]
    Block {
        /// Index in the batch.
        sequence: usize,
        /// The block.
        block: BlockId,
        /// Blocks of the pool.
        blocks: u32,
    },
    /// A block does not hold the KV that its sequence needs. Only models that can tell say so.
    #[error(
        "sequence {sequence} of the batch: position {position}, layer {layer}, block {block:?} holds \
         {found}"
    )]
    Contents {
        /// Index in the batch.
        sequence: usize,
        /// The block.
        block: BlockId,
        /// The token's place in the sequence.
        position: u32,
        /// The layer.
        layer: u32,
        /// What was found instead.
        found: &'static str,
    },
    /// Two sequences would write into the same block.
    #[error("block {block:?} would be written for two sequences of the batch")]
    SharedBlock {
        /// The block.
        block: BlockId,
    },
    /// The batch has more tokens, or more rows of logits, than the executor was made for.
    #[error("the batch has {found} {what}; the executor was made for {max}")]
    Batch {
        /// What there is too much of.
        what: &'static str,
        /// How much of it.
        found: usize,
        /// The most accepted.
        max: usize,
    },
}
