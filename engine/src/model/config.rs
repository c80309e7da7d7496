//! What `config.json` and `generation_config.json` of a checkpoint say, checked.

use std::borrow::Cow;
use std::path::Path;

use blockplane_protocol::{AttentionGroup, AttentionKind, DType, KvLayout, TokenId};
use serde_json::Value;

use super::error::{ConfigError, LoadError};
use super::rope::RopeConfig;

/// The longest file read as configuration.
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Limits that keep every size computation of a hostile file far from overflow.
const LAYERS_MAX: usize = 1 << 10;
const WIDTH_MAX: usize = 1 << 20;
const HEADS_MAX: usize = 1 << 12;
const HEAD_DIM_MAX: usize = 1 << 10;
const VOCAB_MAX: usize = 1 << 24;
const CONTEXT_MAX: usize = 1 << 28;

/// The architectures that share one decoder: they differ in what this configuration says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`.
    Qwen2,
    /// `Qwen3ForCausalLM`.
    Qwen3,
    /// `MistralForCausalLM`.
    Mistral,
}

/// A dense decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Which architecture.
    pub architecture: Architecture,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head, even.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Tokens of the longest sequence.
    pub context_tokens_max: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Tokens seen by each layer, the current one included; `None`: all.
    pub windows: Vec<Option<u32>>,
    /// Whether keys, queries and values have biases.
    pub qkv_bias: bool,
    /// Whether the attention output has a bias.
    pub output_bias: bool,
    /// Whether the feed-forward layers have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised per head.
    pub qk_norm: bool,
    /// Whether the embedding is also the output projection.
    pub tied_embeddings: bool,
    /// Tokens that end a sequence, from both files, in the order found.
    pub eos_token_ids: Vec<TokenId>,
}

impl ModelConfig {
    /// Reads `config.json` and, where there is one, `generation_config.json`.
    ///
    /// # Errors
    /// [`LoadError::Read`], [`LoadError::Json`] or [`LoadError::Config`], with the file.
    pub fn read(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("config.json");
        let mut config =
            Self::parse(&read_json(&path)?).map_err(|source| LoadError::Config { path, source })?;
        let path = folder.join("generation_config.json");
        if path.exists() {
            let ids = token_ids(&read_json(&path)?, "eos_token_id", config.vocab_size)
                .map_err(|source| LoadError::Config { path, source })?;
            for id in ids {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        Ok(config)
    }

    /// Understands the contents of a `config.json`, in the form of transformers 4 (`rope_theta`,
    /// `rope_scaling`) or 5 (`rope_parameters`).
    ///
    /// # Errors
    /// A [`ConfigError`] that names the first field that is missing or not accepted.
    pub fn parse(json: &Value) -> Result<Self, ConfigError> {
        let architecture = architecture(json)?;
        reject_unsupported(json)?;
        let layers = required(json, "num_hidden_layers", 1, LAYERS_MAX)?;
        let hidden_size = required(json, "hidden_size", 1, WIDTH_MAX)?;
        let heads = required(json, "num_attention_heads", 1, HEADS_MAX)?;
        let kv_heads = optional(json, "num_key_value_heads", 1, HEADS_MAX)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(value(
                "num_key_value_heads",
                &kv_heads,
                "a divisor of num_attention_heads",
            ));
        }
        let head_dim = match optional(json, "head_dim", 2, HEAD_DIM_MAX)? {
            Some(head_dim) => head_dim,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => {
                return Err(value(
                    "hidden_size",
                    &hidden_size,
                    "a multiple of num_attention_heads where head_dim is not given",
                ));
            }
        };
        if !head_dim.is_multiple_of(2) || head_dim > HEAD_DIM_MAX {
            return Err(value("head_dim", &head_dim, "an even number up to 1024"));
        }
        let vocab_size = required(json, "vocab_size", 1, VOCAB_MAX)?;
        let context_tokens_max = required(json, "max_position_embeddings", 1, CONTEXT_MAX)?;
        let eps = number(json, "rms_norm_eps")?.unwrap_or(1e-6);
        if !(eps.is_finite() && eps > 0.0 && eps < 1.0) {
            return Err(value("rms_norm_eps", &eps, "between 0 and 1"));
        }
        let attention_bias = flag(json, "attention_bias")?.unwrap_or(false);
        Ok(Self {
            architecture,
            layers,
            hidden_size,
            intermediate_size: required(json, "intermediate_size", 1, WIDTH_MAX)?,
            heads,
            kv_heads,
            head_dim,
            vocab_size,
            context_tokens_max,
            rms_norm_eps: narrow(eps),
            rope: RopeConfig::parse(json, head_dim, context_tokens_max)?,
            windows: windows(json, architecture, layers)?,
            qkv_bias: match architecture {
                Architecture::Qwen2 => true,
                Architecture::Llama | Architecture::Qwen3 => attention_bias,
                Architecture::Mistral => false,
            },
            output_bias: match architecture {
                Architecture::Llama | Architecture::Qwen3 => attention_bias,
                Architecture::Qwen2 | Architecture::Mistral => false,
            },
            mlp_bias: architecture == Architecture::Llama
                && flag(json, "mlp_bias")?.unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3,
            tied_embeddings: flag(json, "tie_word_embeddings")?.unwrap_or(false),
            eos_token_ids: token_ids(json, "eos_token_id", vocab_size)?,
        })
    }

    /// Layers with the same window, full attention first, as the block pool wants to know them.
    #[must_use]
    pub fn attention_groups(&self) -> Vec<AttentionGroup> {
        let mut kinds: Vec<Option<u32>> = self.windows.clone();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
            .into_iter()
            .map(|window| AttentionGroup {
                kind: window.map_or(AttentionKind::Full, |window| AttentionKind::SlidingWindow {
                    window,
                }),
                layers: (0u32..)
                    .zip(&self.windows)
                    .filter(|&(_, &of_layer)| of_layer == window)
                    .map(|(layer, _)| layer)
                    .collect(),
            })
            .collect()
    }

    /// The block layout of this model with `block_tokens` tokens per block.
    #[must_use]
    pub fn kv_layout(&self, block_tokens: u32, dtype: DType) -> KvLayout {
        let dimension = |n: usize| u32::try_from(n).expect("parsing limits every dimension");
        KvLayout {
            groups: self.attention_groups(),
            ..KvLayout::dense(
                dimension(self.layers),
                dimension(self.kv_heads),
                dimension(self.head_dim),
                block_tokens,
                dtype,
            )
        }
    }

    /// Width of the fused query, key and value projection.
    pub(crate) fn qkv_size(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

fn architecture(json: &Value) -> Result<Architecture, ConfigError> {
    let name = json
        .get("architectures")
        .and_then(|names| names.get(0))
        .or_else(|| json.get("model_type"))
        .and_then(Value::as_str)
        .ok_or(ConfigError::Missing {
            field: "architectures",
        })?;
    match name {
        "LlamaForCausalLM" | "llama" => Ok(Architecture::Llama),
        "Qwen2ForCausalLM" | "qwen2" => Ok(Architecture::Qwen2),
        "Qwen3ForCausalLM" | "qwen3" => Ok(Architecture::Qwen3),
        "MistralForCausalLM" | "mistral" => Ok(Architecture::Mistral),
        other => Err(ConfigError::Architecture {
            found: other.to_owned(),
        }),
    }
}

/// Fields that change the computation in ways that are not implemented.
fn reject_unsupported(json: &Value) -> Result<(), ConfigError> {
    let activation = present(json, "hidden_act").map_or(Ok("silu"), |act| {
        act.as_str()
            .ok_or_else(|| value("hidden_act", &act, "silu"))
    })?;
    if activation != "silu" {
        return Err(value("hidden_act", &activation, "silu"));
    }
    if let Some(quantization) = present(json, "quantization_config") {
        let method = quantization.get("quant_method").unwrap_or(quantization);
        return Err(value(
            "quantization_config",
            &method,
            "none (weights in BF16, F16 or F32)",
        ));
    }
    Ok(())
}

fn windows(
    json: &Value,
    architecture: Architecture,
    layers: usize,
) -> Result<Vec<Option<u32>>, ConfigError> {
    const WINDOW: &str = "sliding_window";
    let window = match optional(json, WINDOW, 1, CONTEXT_MAX)? {
        Some(window) => u32::try_from(window).ok(),
        None => None,
    };
    if let Some(types) = present(json, "layer_types") {
        const ACCEPTED: &str =
            "one of full_attention and sliding_attention (with sliding_window) for each layer";
        let types = types
            .as_array()
            .filter(|types| types.len() == layers)
            .ok_or_else(|| value("layer_types", &types, ACCEPTED))?;
        return types
            .iter()
            .map(|kind| match (kind.as_str(), window) {
                (Some("full_attention"), _) => Ok(None),
                (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
                _ => Err(value("layer_types", &kind, ACCEPTED)),
            })
            .collect();
    }
    match architecture {
        Architecture::Llama => Ok(vec![None; layers]),
        Architecture::Mistral => Ok(vec![window; layers]),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let enabled = flag(json, "use_sliding_window")?.unwrap_or(false);
            let first = optional(json, "max_window_layers", 0, usize::MAX)?.unwrap_or(28);
            Ok((0..layers)
                .map(|layer| window.filter(|_| enabled && layer >= first))
                .collect())
        }
    }
}

fn token_ids(
    json: &Value,
    field: &'static str,
    vocab_size: usize,
) -> Result<Vec<TokenId>, ConfigError> {
    const ACCEPTED: &str = "a token id, a list of token ids, or null";
    let Some(found) = present(json, field) else {
        return Ok(Vec::new());
    };
    let one = std::slice::from_ref(found);
    found
        .as_array()
        .map_or(one, Vec::as_slice)
        .iter()
        .map(|id| {
            id.as_u64()
                .filter(|&id| id < vocab_size as u64)
                .and_then(|id| TokenId::try_from(id).ok())
                .ok_or_else(|| value(field, &id, ACCEPTED))
        })
        .collect()
}

pub(super) fn read_json(path: &Path) -> Result<Value, LoadError> {
    let read = |path: &Path| -> std::io::Result<Vec<u8>> {
        let length = std::fs::metadata(path)?.len();
        if length > CONFIG_BYTES_MAX {
            return Err(std::io::Error::other(format!(
                "{length} bytes; accepted: up to {CONFIG_BYTES_MAX}"
            )));
        }
        std::fs::read(path)
    };
    let bytes = read(path).map_err(|source| LoadError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&bytes).map_err(|source| LoadError::Json {
        path: path.to_owned(),
        source,
    })
}

/// The field, where it is there and not null.
pub(super) fn present<'a>(json: &'a Value, field: &str) -> Option<&'a Value> {
    json.get(field).filter(|value| !value.is_null())
}

pub(super) fn number(json: &Value, field: &'static str) -> Result<Option<f64>, ConfigError> {
    present(json, field)
        .map(|found| {
            found
                .as_f64()
                .ok_or_else(|| value(field, &found, "a number"))
        })
        .transpose()
}

pub(super) fn flag(json: &Value, field: &'static str) -> Result<Option<bool>, ConfigError> {
    present(json, field)
        .map(|found| {
            found
                .as_bool()
                .ok_or_else(|| value(field, &found, "true or false"))
        })
        .transpose()
}

pub(super) fn optional(
    json: &Value,
    field: &'static str,
    min: usize,
    max: usize,
) -> Result<Option<usize>, ConfigError> {
    present(json, field)
        .map(|found| {
            found
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| (min..=max).contains(n))
                .ok_or_else(|| value(field, &found, format!("an integer from {min} to {max}")))
        })
        .transpose()
}

fn required(
    json: &Value,
    field: &'static str,
    min: usize,
    max: usize,
) -> Result<usize, ConfigError> {
    optional(json, field, min, max)?.ok_or(ConfigError::Missing { field })
}

pub(super) fn value(
    field: &'static str,
    found: &dyn ToString,
    accepted: impl Into<Cow<'static, str>>,
) -> ConfigError {
    const SHOWN_CHARS_MAX: usize = 80;
    ConfigError::Value {
        field,
        found: found.to_string().chars().take(SHOWN_CHARS_MAX).collect(),
        accepted: accepted.into(),
    }
}

/// The nearest single-precision number.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to single precision is the purpose"
)]
pub(super) const fn narrow(wide: f64) -> f32 {
    wide as f32
}
