//! `blockplane up`, `blockplane launch` and `blockplane doctor`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};

use super::{
    HubArgs,
    worker::{ComputeArg, EngineArg, LaneArg, seconds},
};

/// How prefill, decode and routing are put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum UpMode {
    /// Aggregated workers, requests in turn.
    Agg,
    /// Aggregated workers, requests routed by cached prefix and load.
    AggRouter,
    /// Prefill and decode workers, requests in turn.
    Disagg,
    /// Prefill and decode workers, requests routed by cached prefix and load.
    #[default]
    DisaggRouter,
    /// One aggregated worker with data-parallel ranks that the router addresses one by one.
    Dep,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct UpArgs {
    /// Checkpoint directory in Hugging Face form, or the id of a model on the Hugging Face hub; the
    /// small model inside the binary when absent.
    #[arg(help_heading = "Model", long, value_name = "DIR|ID")]
    pub(crate) model: Option<PathBuf>,
    /// Name in the OpenAI API; the id, or the directory's name, when absent.
    #[arg(help_heading = "Model", long)]
    pub(crate) served_model_name: Option<String>,
    /// How prefill, decode and routing are put together.
    #[arg(help_heading = "Deployment", long, value_enum, default_value_t)]
    pub(crate) mode: UpMode,
    /// Prefill workers (disagg modes); 1 when absent.
    #[arg(help_heading = "Deployment", long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub(crate) prefill: Option<u32>,
    /// Decode workers (disagg modes), aggregated workers (agg modes), or ranks (dep); 1 when absent, 2 ranks.
    #[arg(help_heading = "Deployment", long, value_name = "M", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) decode: Option<u32>,
    /// Address to listen on.
    #[arg(
        help_heading = "HTTP",
        long,
        env = "DYN_HTTP_HOST",
        default_value = "127.0.0.1"
    )]
    pub(crate) http_host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(
        help_heading = "HTTP",
        long,
        env = "DYN_HTTP_PORT",
        default_value_t = 8000
    )]
    pub(crate) http_port: u16,
    /// What computes.
    #[arg(help_heading = "Engine", long, value_enum, default_value_t)]
    pub(crate) engine: EngineArg,
    /// Arithmetic of the native engine; bf16 when absent.
    #[arg(help_heading = "Engine", long, value_enum)]
    pub(crate) compute: Option<ComputeArg>,
    /// Compute threads of each worker; all cores when absent.
    #[arg(help_heading = "Engine", long)]
    pub(crate) threads: Option<usize>,
    /// Tokens per KV block.
    #[arg(help_heading = "KV blocks", long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) block_size: Option<u32>,
    /// KV blocks of each worker's pool; 1 GB of memory when absent.
    #[arg(help_heading = "KV blocks", long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) blocks: Option<u32>,
    /// Lanes that may move KV, best first: shm, tcp.
    #[arg(
        help_heading = "KV blocks",
        long = "lane",
        value_enum,
        value_delimiter = ','
    )]
    pub(crate) lanes: Vec<LaneArg>,
    /// Further arguments for every worker, as one string: `--worker-args "--max-num-seqs 8"`.
    #[arg(
        help_heading = "Passed on",
        long,
        value_name = "ARGS",
        allow_hyphen_values = true,
        default_value = ""
    )]
    pub(crate) worker_args: String,
    /// Further arguments for the frontend, as one string.
    #[arg(
        help_heading = "Passed on",
        long,
        value_name = "ARGS",
        allow_hyphen_values = true,
        default_value = ""
    )]
    pub(crate) frontend_args: String,
    /// Seed that makes the whole run repeatable.
    #[arg(help_heading = "Deployment", long)]
    pub(crate) seed: Option<u64>,
    /// Directory for discovery, sockets and logs; a temporary one, removed at the end, when absent.
    #[arg(help_heading = "Deployment", long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Plain lines instead of the live view, on a terminal too.
    #[arg(help_heading = "Deployment", long)]
    pub(crate) plain: bool,
    /// Time for running requests to finish on shutdown, in seconds.
    #[arg(help_heading = "Deployment", long, env = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", value_parser = seconds, default_value = "5")]
    pub(crate) grace: Duration,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
    /// vLLM's program.
    #[arg(help_heading = "Engine", long, value_name = "PROGRAM")]
    pub(crate) vllm_program: Option<PathBuf>,
    /// Arguments of `vllm serve`, the same for every worker.
    #[arg(help_heading = "Engine", last = true, value_name = "VLLM ARGUMENTS")]
    pub(crate) vllm_args: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LaunchArgs {
    /// Deployment file (TOML).
    pub(crate) file: PathBuf,
    /// The node of the file that this machine is.
    #[arg(long)]
    pub(crate) node: String,
    /// Plain lines instead of the live view, on a terminal too.
    #[arg(long)]
    pub(crate) plain: bool,
    /// Directory for logs and sockets; overrides the file's.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DoctorArgs {
    /// One JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}
