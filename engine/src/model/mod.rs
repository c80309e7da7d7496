//! Decoder-only transformers from Hugging Face checkpoints: Llama, Qwen2, Qwen3, Mistral.
//!
//! * [`ModelConfig`]: what the configuration says, checked.
//! * [`Model`]: the weights, shared by all executors of a process.
//! * [`Executor`]: runs batches of sequences over the blocks of a KV pool.

mod checkpoint;
mod config;
mod error;
mod executor;
mod rope;

use std::path::Path;
use std::sync::Arc;

use blockplane_protocol::KvLayout;
use xxhash_rust::xxh3::xxh3_64;

use self::checkpoint::{Checkpoint, Place};
use crate::ops::{Compute, CpuOps, CpuOptions, Isa, MatrixView, Ops};

pub use self::config::{Architecture, ModelConfig};
pub use self::error::{ConfigError, ForwardError, LoadError};
pub use self::executor::{Executor, ExecutorOptions, Logits, SequenceSlice};
pub use self::rope::RopeConfig;

/// How to load a model onto the host processor.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// How exact, how many threads, which instruction set.
    pub cpu: CpuOptions,
}

/// A model in memory. Cheap to share, never changed.
#[derive(Debug)]
pub struct Model<O: Ops = CpuOps> {
    config: ModelConfig,
    ops: O,
    checkpoint: Checkpoint,
    /// Names the weights.
    digest: u64,
    embedding: Place,
    layers: Vec<LayerWeights<O>>,
    norm: O::Vector,
    output: O::Weight,
    rope_frequencies: O::Vector,
}

/// The weights of one transformer layer.
#[derive(Debug)]
struct LayerWeights<O: Ops> {
    input_norm: O::Vector,
    /// Queries, keys and values, stacked.
    qkv: O::Weight,
    qkv_bias: Option<O::Vector>,
    head_norms: Option<(O::Vector, O::Vector)>,
    attention_output: O::Weight,
    attention_output_bias: Option<O::Vector>,
    post_norm: O::Vector,
    /// Gate and up projection, stacked.
    gate_up: O::Weight,
    gate_up_bias: Option<O::Vector>,
    down: O::Weight,
    down_bias: Option<O::Vector>,
}

impl LoadOptions {
    /// With this exactness and number of threads, and the best instruction set.
    #[must_use]
    pub fn new(compute: Compute, threads: usize) -> Self {
        Self {
            cpu: CpuOptions {
                compute,
                threads,
                isa: None,
            },
        }
    }

    /// With this instruction set.
    #[must_use]
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.cpu.isa = Some(isa);
        self
    }
}

impl Model<CpuOps> {
    /// Reads the checkpoint in `folder` and packs its weights for this processor.
    ///
    /// # Errors
    /// A [`LoadError`] that names the file, and the tensor or field, that is at fault.
    pub fn load(folder: &Path, options: &LoadOptions) -> Result<Arc<Self>, LoadError> {
        Self::load_with_progress(folder, options, &|_, _| ())
    }

    /// The same; `progress` is told after each layer how many of how many are ready.
    ///
    /// # Errors
    /// A [`LoadError`] that names the file, and the tensor or field, that is at fault.
    pub fn load_with_progress(
        folder: &Path,
        options: &LoadOptions,
        progress: &dyn Fn(u32, u32),
    ) -> Result<Arc<Self>, LoadError> {
        let config = ModelConfig::read(folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let ops = CpuOps::new(&options.cpu)?;
        Self::with_ops(config, checkpoint, ops, progress).map(Arc::new)
    }
}

impl<O: Ops<Error = std::io::Error>> Model<O> {
    fn with_ops(
        config: ModelConfig,
        checkpoint: Checkpoint,
        ops: O,
        progress: &dyn Fn(u32, u32),
    ) -> Result<Self, LoadError> {
        let loader = Loader {
            config: &config,
            checkpoint: &checkpoint,
            ops: &ops,
        };
        let hidden = config.hidden_size;
        let embedding =
            checkpoint.matrix("model.embed_tokens.weight", config.vocab_size, hidden)?;
        // Shapes first: a checkpoint that does not fit is refused before the long work.
        let plans = (0..config.layers)
            .map(|layer| loader.find_layer(layer))
            .collect::<Result<Vec<_>, _>>()?;
        let head = if config.tied_embeddings {
            embedding.clone()
        } else {
            checkpoint.matrix("lm_head.weight", config.vocab_size, hidden)?
        };
        let total = u32::try_from(config.layers).unwrap_or(u32::MAX);
        let layers = plans
            .into_iter()
            .zip(1..)
            .map(|(plan, done)| {
                let layer = loader.pack_layer(plan)?;
                progress(done, total);
                Ok(layer)
            })
            .collect::<Result<Vec<_>, LoadError>>()?;
        let norm = loader.vector("model.norm.weight", hidden)?;
        let output = loader.pack(&[head])?;
        let rope_frequencies = loader.upload(&config.rope.inverse_frequencies)?;
        let digest = checkpoint.digest();
        checkpoint.release();
        Ok(Self {
            digest,
            embedding,
            layers,
            norm,
            output,
            rope_frequencies,
            checkpoint,
            ops,
            config,
        })
    }
}

impl<O: Ops> Model<O> {
    /// What the configuration says.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The processor.
    #[must_use]
    pub const fn ops(&self) -> &O {
        &self.ops
    }

    /// The layout of KV blocks of `block_tokens` tokens for this model and compute mode.
    #[must_use]
    pub fn kv_layout(&self, block_tokens: u32) -> KvLayout {
        self.config.kv_layout(block_tokens, self.ops.kv_dtype())
    }

    /// Names the keys and values that this model computes when it is served under `name`: workers
    /// exchange KV, and find it again after a restart, only under the same fingerprint. It covers
    /// every parameter and every weight; precision is part of the layout.
    #[must_use]
    pub fn kv_fingerprint(&self, name: &str) -> u64 {
        // Debug output has every parameter that the KV depends on, by name.
        let facts = format!("{name} {:?} {:016x}", self.config, self.digest);
        xxh3_64(facts.as_bytes())
    }

    fn embedding(&self) -> MatrixView<'_> {
        self.checkpoint.view(&self.embedding)
    }
}

/// The places of one layer's matrices, and its vectors.
struct LayerPlan {
    input_norm: Vec<f32>,
    qkv: [Place; 3],
    qkv_bias: Option<Vec<f32>>,
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    attention_output: Place,
    attention_output_bias: Option<Vec<f32>>,
    post_norm: Vec<f32>,
    gate_up: [Place; 2],
    gate_up_bias: Option<Vec<f32>>,
    down: Place,
    down_bias: Option<Vec<f32>>,
}

struct Loader<'a, O> {
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
    ops: &'a O,
}

impl<O: Ops<Error = std::io::Error>> Loader<'_, O> {
    fn find_layer(&self, layer: usize) -> Result<LayerPlan, LoadError> {
        let c = self.config;
        let name = |tensor: &str| format!("model.layers.{layer}.{tensor}");
        let matrix = |tensor: &str, rows, columns| {
            self.checkpoint
                .matrix(&name(&format!("{tensor}.weight")), rows, columns)
        };
        let vector = |tensor: &str, length| self.checkpoint.vector(&name(tensor), length);
        // The biases of stacked matrices, stacked; checkpoints either have all or none.
        let biases = |wanted: bool, parts: &[(&str, usize)]| -> Result<_, LoadError> {
            if !wanted {
                return Ok(None);
            }
            let mut stacked = Vec::new();
            for &(tensor, length) in parts {
                stacked.extend(vector(&format!("{tensor}.bias"), length)?);
            }
            Ok(Some(stacked))
        };
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let head_norms = if c.qk_norm {
            Some((
                vector("self_attn.q_norm.weight", c.head_dim)?,
                vector("self_attn.k_norm.weight", c.head_dim)?,
            ))
        } else {
            None
        };
        let (q_proj, k_proj, v_proj, o_proj) = (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        );
        let (gate_proj, up_proj, down_proj) = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj");
        Ok(LayerPlan {
            input_norm: vector("input_layernorm.weight", hidden)?,
            qkv: [
                matrix(q_proj, q, hidden)?,
                matrix(k_proj, kv, hidden)?,
                matrix(v_proj, kv, hidden)?,
            ],
            qkv_bias: biases(c.qkv_bias, &[(q_proj, q), (k_proj, kv), (v_proj, kv)])?,
            head_norms,
            attention_output: matrix(o_proj, hidden, q)?,
            attention_output_bias: biases(c.output_bias, &[(o_proj, hidden)])?,
            post_norm: vector("post_attention_layernorm.weight", hidden)?,
            gate_up: [
                matrix(gate_proj, inner, hidden)?,
                matrix(up_proj, inner, hidden)?,
            ],
            gate_up_bias: biases(c.mlp_bias, &[(gate_proj, inner), (up_proj, inner)])?,
            down: matrix(down_proj, hidden, inner)?,
            down_bias: biases(c.mlp_bias, &[(down_proj, hidden)])?,
        })
    }

    fn pack_layer(&self, plan: LayerPlan) -> Result<LayerWeights<O>, LoadError> {
        let optional = |bias: Option<Vec<f32>>| bias.map(|bias| self.upload(&bias)).transpose();
        Ok(LayerWeights {
            input_norm: self.upload(&plan.input_norm)?,
            qkv: self.pack(&plan.qkv)?,
            qkv_bias: optional(plan.qkv_bias)?,
            head_norms: match plan.head_norms {
                Some((query, key)) => Some((self.upload(&query)?, self.upload(&key)?)),
                None => None,
            },
            attention_output: self.pack(&[plan.attention_output])?,
            attention_output_bias: optional(plan.attention_output_bias)?,
            post_norm: self.upload(&plan.post_norm)?,
            gate_up: self.pack(&plan.gate_up)?,
            gate_up_bias: optional(plan.gate_up_bias)?,
            down: self.pack(&[plan.down])?,
            down_bias: optional(plan.down_bias)?,
        })
    }

    fn pack(&self, places: &[Place]) -> Result<O::Weight, LoadError> {
        let views: Vec<_> = places
            .iter()
            .map(|place| self.checkpoint.view(place))
            .collect();
        self.ops.pack(&views).map_err(|source| LoadError::Memory {
            what: "weights",
            bytes: views.iter().map(|view| view.data.len()).sum(),
            source,
        })
    }

    fn vector(&self, tensor: &str, length: usize) -> Result<O::Vector, LoadError> {
        self.upload(&self.checkpoint.vector(tensor, length)?)
    }

    fn upload(&self, values: &[f32]) -> Result<O::Vector, LoadError> {
        self.ops.vector(values).map_err(|source| LoadError::Memory {
            what: "weights",
            bytes: size_of_val(values),
            source,
        })
    }
}
