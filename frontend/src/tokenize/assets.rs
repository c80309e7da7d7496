//! The parts of a checkpoint that the frontend reads, loaded once for each path.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use blockplane_protocol::{ModelCard, TokenId};
use parking_lot::Mutex;
use serde_json::Value;
use thiserror::Error;
use tokenizers::Tokenizer;
use tokio::sync::OnceCell;

use super::{
    pool::{PoolError, TokenizePool},
    template::{ChatInput, ChatTemplate, RenderError},
    vocabulary::Vocabulary,
};

/// Variables under which templates know special tokens.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Tokenizer and chat templates of one checkpoint.
#[derive(Debug)]
pub(crate) struct ModelAssets {
    vocabulary: Arc<Vocabulary>,
    /// Templates by name; a template that does not compile is the reason why.
    templates: HashMap<String, Result<ChatTemplate, String>>,
}

/// Why a checkpoint's files cannot be used.
#[derive(Debug, Error)]
pub(crate) enum AssetError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    /// The tokenizer is not usable.
    #[error("{path} is not a usable tokenizer: {reason}")]
    Tokenizer { path: PathBuf, reason: String },
    /// A JSON file is not one.
    #[error("{path} is not valid JSON: {source}")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    /// No thread for loading it.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// Why a conversation could not be made a prompt.
#[derive(Debug, Error)]
pub(crate) enum TemplateError {
    /// The checkpoint has none.
    #[error("this model has no chat template; use /v1/completions")]
    None,
    /// It does not compile.
    #[error("the model's chat template is broken: {0}")]
    Broken(String),
    /// It did not render.
    #[error(transparent)]
    Render(#[from] RenderError),
}

impl ModelAssets {
    /// Reads `tokenizer.json` and, where there are, the chat templates in `directory`.
    pub(crate) fn load(directory: &Path) -> Result<Self, AssetError> {
        let path = directory.join("tokenizer.json");
        let bytes = read(&path)?;
        let unusable = |reason: String| AssetError::Tokenizer {
            path: path.clone(),
            reason,
        };
        let mut tokenizer =
            Tokenizer::from_bytes(&bytes).map_err(|error| unusable(error.to_string()))?;
        // Saved from training runs at times; no prompt may be cut or padded by them.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| unusable(error.to_string()))?;
        let config = read_json(&directory.join("tokenizer_config.json"))?;
        let special = special_tokens(
            &config,
            &read_json(&directory.join("special_tokens_map.json"))?,
        );
        let templates = template_sources(directory, &config)?
            .into_iter()
            .map(|(name, source)| (name, ChatTemplate::new(&source, &special)))
            .collect();
        Ok(Self {
            vocabulary: Arc::new(Vocabulary::new(tokenizer)),
            templates,
        })
    }

    pub(crate) fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// The prompt of a conversation.
    pub(crate) fn render(&self, input: &ChatInput) -> Result<String, TemplateError> {
        let tool_template = input
            .tools
            .as_ref()
            .and_then(|_| self.templates.get("tool_use"));
        match tool_template.or_else(|| self.templates.get("default")) {
            None => Err(TemplateError::None),
            Some(Err(reason)) => Err(TemplateError::Broken(reason.clone())),
            Some(Ok(template)) => Ok(template.render(input)?),
        }
    }

    /// The tokens of `text`.
    ///
    /// # Errors
    /// What the tokenizer says of it.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        self.vocabulary
            .tokenizer()
            .encode_fast(text, add_special)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| error.to_string())
    }
}

/// Loaded checkpoints by path. Paths that no model uses any more are dropped.
#[derive(Debug)]
pub(crate) struct AssetCache {
    pool: Arc<TokenizePool>,
    entries: Mutex<HashMap<String, Arc<OnceCell<Arc<ModelAssets>>>>>,
}

impl AssetCache {
    /// An empty cache that loads on `pool`.
    pub(crate) fn new(pool: Arc<TokenizePool>) -> Self {
        Self {
            pool,
            entries: Mutex::new(HashMap::new()),
        }
    }

    /// The files of `card`'s checkpoint; loaded once however many ask, again after an error.
    pub(crate) async fn get(
        &self,
        card: &ModelCard,
        served: &[Arc<ModelCard>],
    ) -> Result<Arc<ModelAssets>, AssetError> {
        let entry = {
            let mut entries = self.entries.lock();
            match entries.get(&card.path) {
                Some(entry) => Arc::clone(entry),
                None => {
                    entries.retain(|path, _| served.iter().any(|card| card.path == *path));
                    Arc::clone(entries.entry(card.path.clone()).or_default())
                }
            }
        };
        let path = PathBuf::from(&card.path);
        let assets = entry
            .get_or_try_init(|| async move {
                let loaded = self.pool.run(move || ModelAssets::load(&path)).await??;
                Ok::<_, AssetError>(Arc::new(loaded))
            })
            .await?;
        Ok(Arc::clone(assets))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, AssetError> {
    fs::read(path).map_err(|source| AssetError::Read {
        path: path.to_owned(),
        source,
    })
}

/// The file's contents; null where there is no file.
fn read_json(path: &Path) -> Result<Value, AssetError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| AssetError::Json {
            path: path.to_owned(),
            source,
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(AssetError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Special tokens by variable name; an entry is a string or an object with `content`.
fn special_tokens(config: &Value, map: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| {
        let value = value.get("content").unwrap_or(value);
        value.as_str().map(str::to_owned)
    };
    SPECIAL_TOKENS
        .iter()
        .filter_map(|&name| {
            let token = text(&config[name]).or_else(|| text(&map[name]))?;
            Some((name.to_owned(), token))
        })
        .collect()
}

/// Sources by name: the files `chat_template.jinja` and `additional_chat_templates/NAME.jinja`
/// where they exist, otherwise what `tokenizer_config.json` says.
fn template_sources(
    directory: &Path,
    config: &Value,
) -> Result<HashMap<String, String>, AssetError> {
    let mut sources = HashMap::new();
    let text = |path: &Path| {
        fs::read_to_string(path).map_err(|source| AssetError::Read {
            path: path.to_owned(),
            source,
        })
    };
    let main = directory.join("chat_template.jinja");
    if main.exists() {
        sources.insert("default".to_owned(), text(&main)?);
    }
    if let Ok(files) = fs::read_dir(directory.join("additional_chat_templates")) {
        for file in files.flatten() {
            let path = file.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "jinja")
                && let Some(name) = path.file_stem().and_then(|name| name.to_str())
            {
                sources.insert(name.to_owned(), text(&path)?);
            }
        }
    }
    if !sources.is_empty() {
        return Ok(sources);
    }
    match &config["chat_template"] {
        Value::String(source) => {
            sources.insert("default".to_owned(), source.clone());
        }
        Value::Array(named) => {
            for entry in named {
                if let (Some(name), Some(source)) =
                    (entry["name"].as_str(), entry["template"].as_str())
                {
                    sources.insert(name.to_owned(), source.to_owned());
                }
            }
        }
        _ => {}
    }
    Ok(sources)
}
