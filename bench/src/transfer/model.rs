//! Traffic with the shape of a model: a Hugging Face `config.json` becomes the KV layout of its
//! checkpoint, and a number of tokens becomes blocks of it.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use blockplane_protocol::{AttentionGroup, AttentionKind, DType, KvLayout, LayoutOrder};
use serde_json::Value;

use super::case::Shape;

/// Element type of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DTypeName {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
}

/// Which stride is the larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Order {
    /// All blocks of a layer together, as paged attention kernels have them.
    LayerFirst,
    /// All layers of a block together: one block is one contiguous run.
    BlockFirst,
}

/// What a request of one model moves on one rank.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) layout: KvLayout,
    pub(crate) tokens: u32,
    pub(crate) ranks: u32,
    /// Every rank holds the same bytes (latent attention, or fewer heads than ranks).
    pub(crate) replicated: bool,
}

/// How a model is cut and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) tokens: u32,
    pub(crate) ranks: u32,
    pub(crate) dtype: Option<DTypeName>,
    pub(crate) block_tokens: u32,
    pub(crate) order: Order,
}

/// Largest value accepted for any dimension of a configuration.
const DIMENSION_MAX: u64 = 1 << 20;

impl Model {
    /// Reads a `config.json`, or the one in a folder.
    pub(crate) fn read(path: &Path, cut: Cut) -> anyhow::Result<Self> {
        let path = if path.is_dir() {
            path.join("config.json")
        } else {
            path.to_owned()
        };
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let config: Value = serde_json::from_str(&text)
            .with_context(|| format!("{} is not JSON", path.display()))?;
        Self::parse(&config, cut).with_context(|| path.display().to_string())
    }

    /// Understands the contents of a `config.json`.
    pub(super) fn parse(config: &Value, cut: Cut) -> anyhow::Result<Self> {
        let name = config["model_type"].as_str().unwrap_or("model").to_owned();
        // Models that also see or hear keep their language model one level down.
        let config = match &config["text_config"] {
            Value::Object(_) => &config["text_config"],
            _ => config,
        };
        let layers = required(config, "num_hidden_layers")?;
        let ranks = cut.ranks;
        let (kind, planes, heads, head_dim) = match number(config, "kv_lora_rank")? {
            Some(rank) => {
                let width = rank + required(config, "qk_rope_head_dim")?;
                (AttentionKind::Latent, 1, 1, width)
            }
            None => {
                let queries = required(config, "num_attention_heads")?;
                let heads = number(config, "num_key_value_heads")?.unwrap_or(queries);
                let head_dim = match number(config, "head_dim")? {
                    Some(head_dim) => head_dim,
                    None => required(config, "hidden_size")? / queries,
                };
                (AttentionKind::Full, 2, heads, head_dim)
            }
        };
        let held = match () {
            () if kind == AttentionKind::Latent => 1,
            () if heads.is_multiple_of(ranks) => heads / ranks,
            () if ranks.is_multiple_of(heads) => 1,
            () => bail!("--tp {ranks} does not divide {heads} KV heads, nor they it"),
        };
        let layout = KvLayout {
            layers,
            kv_heads: held,
            head_dim,
            planes,
            block_tokens: cut.block_tokens,
            dtype: dtype(config, cut.dtype)?,
            order: match cut.order {
                Order::LayerFirst => LayoutOrder::LayerFirst,
                Order::BlockFirst => LayoutOrder::BlockFirst,
            },
            groups: vec![AttentionGroup {
                kind,
                layers: (0..layers).collect(),
            }],
        };
        let model = Self {
            name,
            layout,
            tokens: cut.tokens,
            ranks,
            replicated: ranks > 1 && held * ranks != heads,
        };
        model.layout.validate(model.blocks())?;
        Ok(model)
    }

    /// Blocks of one request.
    pub(super) const fn blocks(&self) -> u32 {
        self.tokens.div_ceil(self.layout.block_tokens)
    }

    /// Bytes of one request on one rank.
    pub(crate) const fn bytes(&self) -> usize {
        self.layout.pool_bytes(self.blocks())
    }

    /// Descriptors of the same request where each is an address and a length: one for each block
    /// of each layer, keys and values apart.
    pub(super) const fn descriptors(&self) -> u64 {
        self.blocks() as u64 * self.layout.layers as u64 * self.layout.planes as u64
    }

    /// A pool of `blocks` blocks.
    pub(super) const fn shape(&self, blocks: u32) -> Shape {
        Shape {
            blocks,
            block_stride: self.layout.block_stride() as u64,
            layers: self.layout.layers,
            layer_stride: self.layout.layer_stride(blocks) as u64,
            run_bytes: self.layout.layer_bytes() as u64,
        }
    }

    /// One line for people.
    pub(super) fn describe(&self) -> String {
        let KvLayout {
            layers,
            kv_heads,
            head_dim,
            planes,
            ..
        } = self.layout;
        let what = if planes == 1 {
            format!("latent of {head_dim}")
        } else {
            format!("{kv_heads} KV heads of {head_dim}")
        };
        format!(
            "{}: {layers} layers, {what} on each of {} ranks{}, {}; {} tokens = {} blocks of {} \
             tokens ({} bytes), {:.3} GB a rank; NIXL would see {} descriptors, here it is {} block \
             ids",
            self.name,
            self.ranks,
            if self.replicated { " (replicated)" } else { "" },
            dtype_name(self.layout.dtype),
            self.tokens,
            self.blocks(),
            self.layout.block_tokens,
            self.layout.block_bytes(),
            gigabytes(self.bytes()),
            self.descriptors(),
            self.blocks(),
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
fn gigabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e9
}

const fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
    }
}

fn dtype(config: &Value, asked: Option<DTypeName>) -> anyhow::Result<DType> {
    if let Some(asked) = asked {
        return Ok(match asked {
            DTypeName::F32 => DType::F32,
            DTypeName::F16 => DType::F16,
            DTypeName::Bf16 => DType::Bf16,
        });
    }
    let said = config["torch_dtype"]
        .as_str()
        .or_else(|| config["dtype"].as_str());
    match said {
        None | Some("bfloat16") => Ok(DType::Bf16),
        Some("float16") => Ok(DType::F16),
        Some("float32") => Ok(DType::F32),
        Some(other) => bail!("the dtype '{other}' is not known here; give --dtype"),
    }
}

fn required(config: &Value, field: &str) -> anyhow::Result<u32> {
    number(config, field)?.with_context(|| format!("{field} is missing"))
}

fn number(config: &Value, field: &str) -> anyhow::Result<Option<u32>> {
    match &config[field] {
        Value::Null => Ok(None),
        value => {
            let number = value.as_u64().filter(|n| (1..=DIMENSION_MAX).contains(n));
            ensure!(
                number.is_some(),
                "{field} is {value}; accepted: 1 to {DIMENSION_MAX}"
            );
            Ok(number.and_then(|number| u32::try_from(number).ok()))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cut(tokens: u32, ranks: u32) -> Cut {
        Cut {
            tokens,
            ranks,
            dtype: None,
            block_tokens: 16,
            order: Order::LayerFirst,
        }
    }

    fn llama_8b() -> Value {
        json!({
            "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "hidden_size": 4096, "torch_dtype": "bfloat16"
        })
    }

    #[test]
    fn a_llama_keeps_128_kib_a_token() {
        let model = Model::parse(&llama_8b(), cut(1000, 1)).unwrap();
        // 1000 tokens are 62.5 blocks of 16; keys and values, 32 layers, 8 heads of 128, 2 bytes.
        assert_eq!(model.blocks(), 63);
        assert_eq!(model.bytes(), 63 * 16 * 2 * 32 * 8 * 128 * 2);
        assert_eq!(model.descriptors(), 63 * 32 * 2);
        let shape = model.shape(100);
        assert_eq!(shape.run_bytes, 2 * 8 * 16 * 128 * 2);
        assert_eq!(shape.block_stride, shape.run_bytes);
        assert_eq!(shape.layer_stride, shape.run_bytes * 100);
        assert_eq!(shape.block_bytes(), 16 * 128 * 1024);
    }

    #[test]
    fn tensor_parallelism_splits_heads_and_replicates_what_is_left() {
        let of = |ranks| Model::parse(&llama_8b(), cut(16, ranks));
        let whole = of(1).unwrap().bytes();
        for (ranks, share, replicated) in [(2, 2, false), (8, 8, false), (16, 8, true)] {
            let model = of(ranks).unwrap();
            assert_eq!(model.bytes() * share, whole, "{ranks}");
            assert_eq!(model.replicated, replicated, "{ranks}");
        }
        let error = of(3).unwrap_err().to_string();
        assert!(error.contains("--tp 3"), "{error}");
    }

    #[test]
    fn latent_attention_has_one_plane_that_every_rank_holds() {
        // The shape of DeepSeek-V3.
        let config = json!({
            "model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128,
            "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
            "hidden_size": 7168
        });
        for ranks in [1, 8] {
            let model = Model::parse(&config, cut(64, ranks)).unwrap();
            assert_eq!(model.bytes(), 64 * 61 * 576 * 2);
            assert_eq!(model.descriptors(), 4 * 61);
            assert_eq!(model.replicated, ranks > 1);
        }
    }

    #[test]
    fn head_dim_dtype_and_nesting_follow_the_configuration() {
        // Qwen3-0.6B: heads are wider than hidden_size / heads.
        let qwen = json!({
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "hidden_size": 1024, "head_dim": 128, "dtype": "float32"
        });
        let nested = json!({"model_type": "vl", "text_config": qwen});
        for config in [&qwen, &nested] {
            let mut cut = cut(16, 1);
            assert_eq!(
                Model::parse(config, cut).unwrap().bytes(),
                16 * 2 * 28 * 8 * 128 * 4
            );
            cut.dtype = Some(DTypeName::Bf16);
            cut.order = Order::BlockFirst;
            let shape = Model::parse(config, cut).unwrap().shape(10);
            assert_eq!(shape.layer_stride, shape.run_bytes);
            assert_eq!(shape.block_stride, 28 * shape.run_bytes);
        }
    }

    #[test]
    fn a_configuration_that_makes_no_sense_names_the_field() {
        for (field, value) in [
            ("num_hidden_layers", json!(null)),
            ("num_hidden_layers", json!(0)),
            ("num_key_value_heads", json!(-1)),
            ("hidden_size", json!("big")),
        ] {
            let mut config = llama_8b();
            config[field] = value;
            let error = format!("{:#}", Model::parse(&config, cut(1, 1)).unwrap_err());
            assert!(error.contains(field), "{error}");
        }
    }
}
