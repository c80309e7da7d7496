//! `blockplane worker`.

use std::{path::PathBuf, time::Duration};

use blockplane_engine::ops::Isa;
use blockplane_protocol::{EndpointId, WorkerRole};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::KvbmArgs;

/// What part of a request a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RoleArg {
    /// Prefill and decode in one.
    Aggregated,
    /// Computes prompts for decode workers.
    Prefill,
    /// Generates tokens.
    Decode,
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EngineArg {
    /// The model itself, on this machine's CPU.
    #[default]
    Native,
    /// A timing model with real KV blocks and made-up tokens.
    Mock,
    /// A vLLM server, which is started and kept; its arguments go behind `--`.
    Vllm,
}

/// Arithmetic of the native engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ComputeArg {
    /// bfloat16 weights and KV, float32 accumulation.
    #[default]
    Bf16,
    /// float32 throughout: slower, for comparisons.
    F32,
}

/// How KV travels between workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LaneArg {
    /// Shared memory, on one host.
    Shm,
    /// TCP.
    Tcp,
}

/// Where processes find each other.
#[derive(Clone, Debug, Args)]
pub(crate) struct DiscoveryArgs {
    /// `file:DIR`: a directory shared by all processes of a deployment.
    #[arg(help_heading = "Place in the deployment", long, env = "DYN_DISCOVERY", value_name = "file:DIR", value_parser = discovery_dir, default_value_os_t = default_discovery_dir())]
    pub(crate) discovery: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub(crate) discovery: DiscoveryArgs,
    /// Checkpoint directory in Hugging Face form, or the id of a model on the Hugging Face hub; the
    /// small model inside the binary when absent.
    #[arg(help_heading = "Model", long, value_name = "DIR|ID")]
    pub(crate) model: Option<PathBuf>,
    /// Name in the OpenAI API; the id, or the directory's name, when absent.
    #[arg(help_heading = "Model", long)]
    pub(crate) served_model_name: Option<String>,
    /// What the worker does.
    #[arg(
        help_heading = "Place in the deployment",
        long,
        value_enum,
        default_value = "aggregated",
        conflicts_with = "is_prefill_worker"
    )]
    pub(crate) role: RoleArg,
    /// Same as `--role prefill`.
    #[arg(help_heading = "Place in the deployment", long)]
    pub(crate) is_prefill_worker: bool,
    /// Name to register under; `dyn://blockplane.ROLE.generate` when absent.
    #[arg(
        help_heading = "Place in the deployment",
        long,
        env = "DYN_ENDPOINT",
        value_name = "dyn://NAMESPACE.COMPONENT.ENDPOINT"
    )]
    pub(crate) endpoint: Option<EndpointId>,
    /// Name in logs and status; the process id when absent.
    #[arg(help_heading = "Place in the deployment", long)]
    pub(crate) name: Option<String>,
    /// What computes.
    #[arg(help_heading = "Engine", long, value_enum, default_value_t)]
    pub(crate) engine: EngineArg,
    /// Arithmetic of the native engine.
    #[arg(help_heading = "Engine", long, value_enum, default_value_t)]
    pub(crate) compute: ComputeArg,
    /// Instruction set of the native engine (portable, avx2, avx512, avx512-bf16, avx512-fp16); the
    /// fastest that the processor has when absent.
    #[arg(help_heading = "Engine", long)]
    pub(crate) isa: Option<Isa>,
    /// Compute threads; all cores when absent.
    #[arg(help_heading = "Engine", long)]
    pub(crate) threads: Option<usize>,
    /// Tokens per KV block; 16 when absent, with vLLM its own choice.
    #[arg(help_heading = "KV blocks", long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) block_size: Option<u32>,
    /// KV blocks of each rank's pool; sized by `--kv-gb` when absent.
    #[arg(help_heading = "KV blocks", long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) blocks: Option<u32>,
    /// Memory for KV over all ranks, in GB (10^9 bytes), where `--blocks` does not say it.
    #[arg(help_heading = "KV blocks", long, default_value_t = 1.0)]
    pub(crate) kv_gb: f64,
    /// Sequences computed at once, per rank.
    #[arg(help_heading = "Engine", long, default_value_t = 64)]
    pub(crate) max_num_seqs: usize,
    /// Tokens computed in one step, per rank.
    #[arg(help_heading = "Engine", long, default_value_t = 512)]
    pub(crate) max_num_batched_tokens: usize,
    /// Requests that may wait, per rank; more are answered as overload.
    #[arg(help_heading = "Engine", long, default_value_t = 256)]
    pub(crate) max_waiting: usize,
    /// Data-parallel ranks behind this worker; 1 when absent.
    #[arg(help_heading = "Engine", long, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) data_parallel_size: Option<u32>,
    /// Do not reuse KV between requests.
    #[arg(help_heading = "KV blocks", long)]
    pub(crate) no_prefix_caching: bool,
    /// Lanes that may move KV, best first.
    #[arg(help_heading = "KV blocks", long = "lane", value_enum, value_delimiter = ',', default_values_t = [LaneArg::Shm, LaneArg::Tcp])]
    pub(crate) lanes: Vec<LaneArg>,
    /// Address for requests and KV from other workers.
    #[arg(
        help_heading = "Place in the deployment",
        long,
        env = "DYN_TCP_RPC_HOST",
        default_value = "127.0.0.1"
    )]
    pub(crate) host: String,
    /// Prompts with fewer uncached tokens are prefilled here, not by a prefill worker.
    #[arg(help_heading = "KV blocks", long, default_value_t = 32)]
    pub(crate) remote_prefill_min_tokens: u32,
    /// Mock engine: prompt tokens computed per second.
    #[arg(help_heading = "Mock engine", long, default_value_t = 20_000.0)]
    pub(crate) mock_prefill_tokens_per_s: f64,
    /// Mock engine: tokens per second of one sequence that decodes alone.
    #[arg(help_heading = "Mock engine", long, default_value_t = 100.0)]
    pub(crate) mock_decode_tokens_per_s: f64,
    /// Mock engine: everything this many times faster.
    #[arg(help_heading = "Mock engine", long, default_value_t = 1.0)]
    pub(crate) mock_speedup: f64,
    /// Time for running requests to finish on shutdown, in seconds.
    #[arg(help_heading = "Place in the deployment", long, env = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", value_parser = seconds, default_value = "5")]
    pub(crate) grace: Duration,
    #[command(flatten)]
    pub(crate) kvbm: KvbmArgs,
    /// Stop when standard input closes (set by the launcher for its children).
    #[arg(long, hide = true)]
    pub(crate) exit_with_parent: bool,
    #[command(flatten)]
    pub(crate) hub: super::HubArgs,
    #[command(flatten)]
    pub(crate) vllm: super::VllmArgs,
}

impl WorkerArgs {
    /// Tokens per KV block of an engine of our own.
    pub(crate) fn block_tokens(&self) -> u32 {
        self.block_size.unwrap_or(16)
    }

    /// Data-parallel ranks of an engine of our own.
    pub(crate) fn ranks(&self) -> u32 {
        self.data_parallel_size.unwrap_or(1)
    }

    /// The role, by either of its flags.
    pub(crate) const fn worker_role(&self) -> WorkerRole {
        match self.role {
            _ if self.is_prefill_worker => WorkerRole::Prefill,
            RoleArg::Prefill => WorkerRole::Prefill,
            RoleArg::Decode => WorkerRole::Decode,
            RoleArg::Aggregated => WorkerRole::Aggregated,
        }
    }
}

/// The directory used where `--discovery` is not given: shared by the processes of one user.
fn default_discovery_dir() -> PathBuf {
    let user = rustix::process::getuid().as_raw();
    std::env::temp_dir()
        .join(format!("blockplane-{user}"))
        .join("discovery")
}

fn discovery_dir(text: &str) -> Result<PathBuf, String> {
    let dir = match text.split_once(':') {
        Some(("file", dir)) => dir,
        Some((scheme, _)) if !scheme.contains('/') => {
            return Err(format!(
                "discovery '{scheme}' is not known; accepted: file:DIR"
            ));
        }
        _ => text,
    };
    if dir.is_empty() {
        return Err("the directory is empty; accepted: file:DIR".to_owned());
    }
    Ok(PathBuf::from(dir))
}

/// Parses a positive number of seconds, fractions allowed.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let accepted = "accepted: a number of seconds such as 5 or 0.5";
    let value: f64 = text.parse().map_err(|_| accepted.to_owned())?;
    Duration::try_from_secs_f64(value).map_err(|_| accepted.to_owned())
}
