//! Where models come from that are named by an id, and `blockplane model`.

use std::path::PathBuf;

use clap::{Args, Subcommand, builder::FalseyValueParser};

/// The Hugging Face hub and its cache. The variables are those of its own tools.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Models by id")]
pub(crate) struct HubArgs {
    /// Branch, tag or commit of the model.
    #[arg(long, value_name = "REV", default_value = "main")]
    pub(crate) revision: String,
    /// Folder of the hub's tools: cache in `hub`, token in `token`; ~/.cache/huggingface when absent.
    #[arg(long, value_name = "DIR", env = "HF_HOME")]
    pub(crate) hf_home: Option<PathBuf>,
    /// Cache of downloaded models; `hub` in the folder above when absent.
    #[arg(long, value_name = "DIR", env = "HF_HUB_CACHE")]
    pub(crate) hf_hub_cache: Option<PathBuf>,
    /// The hub.
    #[arg(
        long,
        value_name = "URL",
        env = "HF_ENDPOINT",
        default_value = "https://huggingface.co"
    )]
    pub(crate) hf_endpoint: String,
    /// Access token for private and gated models; what `token` in the folder holds when absent.
    #[arg(long, value_name = "TOKEN", env = "HF_TOKEN", hide_env_values = true)]
    pub(crate) hf_token: Option<String>,
    /// Ask nobody: only what is in the cache.
    #[arg(long, env = "HF_HUB_OFFLINE", value_parser = FalseyValueParser::new())]
    pub(crate) hf_hub_offline: bool,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Download a model before it is needed.
    Fetch(FetchArgs),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct FetchArgs {
    /// The model's id, such as Qwen/Qwen3-0.6B.
    pub(crate) id: String,
    /// Put its files into this folder, to be carried elsewhere; into the cache only when absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
}
