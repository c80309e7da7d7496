//! What a vLLM server says of itself, and what the checkpoint says of the model.

use std::{collections::BTreeSet, path::Path, time::Duration};

use blockplane_protocol::{DType, KvLayout, TokenId};
use serde::Deserialize;
use serde_json::Value;

use super::{
    VllmError,
    client::{Http, HttpError, malformed},
    metrics::Samples,
};
use crate::model::ModelConfig;

/// How long the server may take to describe itself. Making its API description takes a second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// The first version whose generate route streams the form that is read here.
const GENERATE_SINCE: (u32, u32) = (0, 26);

/// The way tokens get in and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/inference/v1/generate`: tokens in, tokens out, no text in between.
    Generate,
    /// `/v1/completions` with a prompt of token ids: it also makes text, which nobody reads.
    Completions,
}

/// What a server says of itself. Constant for the life of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFacts {
    /// Version of vLLM.
    pub version: String,
    /// How requests are sent.
    pub route: Route,
    /// Its name for the model.
    pub model: String,
    /// Where it has the model from.
    pub root: String,
    /// Longest sequence.
    pub context_tokens_max: u32,
    /// Tokens per KV block.
    pub block_tokens: u32,
    /// KV blocks of each rank.
    pub blocks: u32,
    /// Element type of the KV, in its words; `auto` is the model's.
    pub kv_dtype: String,
    /// Whether KV is found again by prompts that begin alike.
    pub prefix_caching: bool,
    /// Data-parallel ranks behind it.
    pub dp_size: u32,
}

/// What a checkpoint says, whatever its architecture.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CheckpointFacts {
    pub(super) vocab_size: u32,
    pub(super) eos_token_ids: Vec<TokenId>,
    layers: u32,
    kv_heads: u32,
    head_dim: u32,
    dtype: DType,
    known: Option<Box<ModelConfig>>,
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    #[serde(default)]
    root: Option<String>,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    max_model_len: Option<u32>,
}

#[derive(Deserialize)]
struct ApiDescription {
    paths: serde_json::Map<String, Value>,
}

impl Route {
    /// Its path.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Generate => "/inference/v1/generate",
            Self::Completions => "/v1/completions",
        }
    }
}

impl ServerFacts {
    /// Asks a server that is ready.
    pub(super) async fn read(http: &Http) -> Result<Self, VllmError> {
        let Version { version } = http.json("/version", ANSWER_TIMEOUT).await?;
        let Models { data } = http.json("/v1/models", ANSWER_TIMEOUT).await?;
        let metrics = http.get("/metrics", ANSWER_TIMEOUT).await?;
        let metrics = Samples::parse(&String::from_utf8_lossy(&metrics));
        // A server may be told not to describe its API; completions are always there.
        let paths = match http
            .json::<ApiDescription>("/openapi.json", ANSWER_TIMEOUT)
            .await
        {
            Ok(api) => api.paths.into_iter().map(|(path, _)| path).collect(),
            Err(HttpError::Status { .. }) => BTreeSet::new(),
            Err(error) => return Err(error.into()),
        };
        Self::of(version, data, &metrics, &paths)
    }

    fn of(
        version: String,
        models: Vec<Model>,
        metrics: &Samples,
        paths: &BTreeSet<String>,
    ) -> Result<Self, VllmError> {
        // Adapters are listed behind the model that they adapt.
        let model = models
            .into_iter()
            .find(|model| model.parent.is_none())
            .ok_or_else(|| malformed("/v1/models lists no model"))?;
        let context = model.max_model_len.filter(|&tokens| tokens > 1);
        let unknown = |what: &str| malformed(&format_args!("the server does not tell {what}"));
        let context_tokens_max = context.ok_or_else(|| unknown("max_model_len in /v1/models"))?;
        let caches: Vec<_> = metrics.named("vllm:cache_config_info").collect();
        let ranks: BTreeSet<&str> = caches.iter().filter_map(|c| c.label("engine")).collect();
        let cache = caches
            .first()
            .ok_or_else(|| unknown("vllm:cache_config_info in /metrics"))?;
        let number = |label: &str| {
            let value = cache.label(label).and_then(|text| text.parse::<u32>().ok());
            value.filter(|&n| n > 0)
        };
        let block_tokens =
            number("block_size").ok_or_else(|| unknown("block_size in vllm:cache_config_info"))?;
        let blocks = number("num_gpu_blocks")
            .ok_or_else(|| unknown("num_gpu_blocks in vllm:cache_config_info"))?;
        let generate = paths.contains(Route::Generate.path()) && !older(&version, GENERATE_SINCE);
        Ok(Self {
            route: if generate {
                Route::Generate
            } else {
                Route::Completions
            },
            root: model.root.unwrap_or_else(|| model.id.clone()),
            model: model.id,
            context_tokens_max,
            block_tokens,
            blocks,
            kv_dtype: cache.label("cache_dtype").unwrap_or("auto").to_owned(),
            prefix_caching: cache.label("enable_prefix_caching") != Some("False"),
            dp_size: u32::try_from(ranks.len()).unwrap_or(u32::MAX).max(1),
            version,
        })
    }
}

impl CheckpointFacts {
    /// Reads `config.json` and, where there is one, `generation_config.json`.
    pub(super) fn read(folder: &Path) -> Result<Self, VllmError> {
        let file = |name: &str| -> Result<Option<Value>, VllmError> {
            let path = folder.join(name);
            let fault = |reason: String| VllmError::Checkpoint {
                path: path.display().to_string(),
                reason,
            };
            match std::fs::read(&path) {
                Ok(text) => serde_json::from_slice(&text)
                    .map(Some)
                    .map_err(|error| fault(error.to_string())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(fault(error.to_string())),
            }
        };
        let fault = |reason: &str| VllmError::Checkpoint {
            path: folder.join("config.json").display().to_string(),
            reason: reason.to_owned(),
        };
        let config = file("config.json")?.ok_or_else(|| fault("it is not there"))?;
        let generation = file("generation_config.json")?.unwrap_or_default();
        // Models that also see or hear keep what concerns text in a part of its own.
        let text = config
            .get("text_config")
            .or_else(|| config.get("llm_config"))
            .unwrap_or(&config);
        let number = |names: &[&str]| {
            let value = names.iter().find_map(|name| text.get(name)?.as_u64());
            value.and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0)
        };
        let vocab_size = number(&["vocab_size"]).ok_or_else(|| fault("it has no vocab_size"))?;
        let heads = number(&["num_attention_heads", "n_head"]).unwrap_or(1);
        let width = number(&["hidden_size", "n_embd"]).unwrap_or(heads);
        let mut eos_token_ids = Vec::new();
        for source in [&config, text, &generation] {
            for id in ids(source.get("eos_token_id")) {
                if id < vocab_size && !eos_token_ids.contains(&id) {
                    eos_token_ids.push(id);
                }
            }
        }
        let dtype = ["dtype", "torch_dtype"]
            .iter()
            .find_map(|name| text.get(name)?.as_str());
        Ok(Self {
            vocab_size,
            eos_token_ids,
            layers: number(&["num_hidden_layers", "n_layer"]).unwrap_or(1),
            kv_heads: number(&["num_key_value_heads"]).unwrap_or(heads),
            head_dim: number(&["head_dim"]).unwrap_or_else(|| (width / heads).max(1)),
            dtype: match dtype {
                Some("float32") => DType::F32,
                Some("float16") => DType::F16,
                _ => DType::Bf16,
            },
            known: ModelConfig::parse(&config).ok().map(Box::new),
        })
    }

    /// The shape of its KV. Of a model that the native engine does not know, it is that of a model
    /// with full attention in all layers: good for sizes, and never exchanged.
    pub(super) fn layout(&self, block_tokens: u32) -> KvLayout {
        match &self.known {
            Some(model) => model.kv_layout(block_tokens, self.dtype),
            None => KvLayout::dense(
                self.layers,
                self.kv_heads,
                self.head_dim,
                block_tokens,
                self.dtype,
            ),
        }
    }
}

/// Whether a version is older than `than`; one that is not a release is taken for new.
pub(super) fn older(version: &str, than: (u32, u32)) -> bool {
    let mut parts = version.split(['.', '+']).map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < than && !version.contains("dev"),
        _ => false,
    }
}

fn ids(value: Option<&Value>) -> Vec<TokenId> {
    let one = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match value {
        Some(Value::Array(all)) => all.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = concat!(
        "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig\n",
        "vllm:cache_config_info{block_size=\"32\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",",
        "engine=\"0\",kv_cache_dtype_skip_layers=\"[]\",num_gpu_blocks=\"65536\"} 1.0\n",
        "vllm:cache_config_info{block_size=\"32\",engine=\"1\",num_gpu_blocks=\"65536\"} 1.0\n",
    );

    fn facts(version: &str, metrics: &str, paths: &[&str]) -> Result<ServerFacts, VllmError> {
        let models: Models = serde_json::from_str(
            r#"{"data":[{"id":"adapter","parent":"tiny"},
            {"id":"tiny","root":"/m/tiny","parent":null,"max_model_len":1024}]}"#,
        )
        .unwrap();
        let paths = paths.iter().map(|&path| path.to_owned()).collect();
        ServerFacts::of(
            version.to_owned(),
            models.data,
            &Samples::parse(metrics),
            &paths,
        )
    }

    #[test]
    fn a_server_tells_what_it_is() {
        let facts = facts("0.32.0", METRICS, &["/inference/v1/generate"]).unwrap();
        assert_eq!(facts.route, Route::Generate);
        assert_eq!(
            (facts.model.as_str(), facts.root.as_str()),
            ("tiny", "/m/tiny")
        );
        assert_eq!((facts.context_tokens_max, facts.block_tokens), (1024, 32));
        assert_eq!((facts.blocks, facts.dp_size), (65536, 2));
        assert!(facts.prefix_caching);
    }

    #[test]
    fn the_route_follows_from_what_the_server_offers() {
        let route = |version, paths: &[&str]| facts(version, METRICS, paths).unwrap().route;
        let generate = ["/inference/v1/generate", "/v1/completions"];
        assert_eq!(route("0.26.0", &generate), Route::Generate);
        assert_eq!(route("0.33.1.dev5+gabc", &generate), Route::Generate);
        assert_eq!(route("0.25.1", &generate), Route::Completions);
        assert_eq!(route("0.32.0", &["/v1/completions"]), Route::Completions);
        assert_eq!(route("0.32.0", &[]), Route::Completions);
    }

    #[test]
    fn a_server_may_come_back_with_other_memory_and_not_as_another() {
        let first = facts("0.32.0", METRICS, &[]).unwrap();
        let mut again = first.clone();
        again.blocks -= 7;
        assert!(first.same_as(&again).is_ok());
        again.version = "0.33.0".to_owned();
        let error = first.same_as(&again).unwrap_err().to_string();
        assert!(
            error.contains("0.32.0") && error.contains("0.33.0"),
            "{error}"
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        for (metrics, what) in [
            ("", "vllm:cache_config_info"),
            ("vllm:cache_config_info{block_size=\"x\"} 1", "block_size"),
            (
                "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"None\"} 1",
                "num_gpu_blocks",
            ),
        ] {
            let error = facts("0.32.0", metrics, &[]).unwrap_err().to_string();
            assert!(error.contains(what), "{what}: {error}");
        }
    }

    #[test]
    fn a_checkpoint_of_any_architecture_is_enough() {
        let folder = tempfile::tempdir().unwrap();
        let read = || CheckpointFacts::read(folder.path());
        assert!(read().unwrap_err().to_string().contains("not there"));
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("config.json", "{}");
        assert!(read().unwrap_err().to_string().contains("vocab_size"));
        write(
            "config.json",
            r#"{"architectures":["New"],"eos_token_id":9,"text_config":{"vocab_size":100,
            "num_hidden_layers":3,"num_attention_heads":8,"num_key_value_heads":2,"hidden_size":64,
            "dtype":"float16"}}"#,
        );
        write("generation_config.json", r#"{"eos_token_id":[9,7,100]}"#);
        let facts = read().unwrap();
        assert_eq!(facts.eos_token_ids, [9, 7]);
        assert_eq!(facts.layout(16), KvLayout::dense(3, 2, 8, 16, DType::F16));
    }
}
