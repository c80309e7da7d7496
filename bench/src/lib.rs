//! The benchmarks behind `blockplane bench ...`.
//!
//! Every one prints a table for people or, with `--json`, one object a line (see
//! [`report::Record`]). Limits such as memcpy or a raw socket are measured in the same run as the
//! figures they bound, because machines and their neighbours change. `--quick` ends in under 30 s.
//!
//! * [`transfer`]: block transfers between processes.
//! * [`transfer::qualify`]: everything that the GPUs of a node do for block transfers.
//! * [`engine`]: prefill and decode speed of the native engine.
//! * [`tiers`]: the tiers below a GPU: host memory to disk and back, recovery, checksums.
//! * [`serve`]: load on any OpenAI-compatible server.
//! * [`vllm`]: what our frontend and worker add in front of vLLM.
//!
//! [`kvbm`] plays traffic against the manager of the KV cache: `blockplane kvbm replay|advise`.
//! [`selftest`] checks instead of measuring: `blockplane selftest gpu`. [`client`] talks to
//! OpenAI-compatible servers.
//!
//! Only the launcher depends on this crate: it mounts [`BenchArgs`] and calls [`run`].

mod child;
pub mod client;
pub mod engine;
mod gpu;
pub mod kvbm;
pub mod report;
pub mod selftest;
pub mod serve;
pub mod tiers;
pub mod transfer;
pub mod vllm;

use blockplane_transfer::KernelConfig;

/// Options of `blockplane bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What can be measured.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum BenchCommand {
    /// Measure prefill and decode speed of the native engine, without a server.
    Engine(engine::EngineArgs),
    /// Load an OpenAI-compatible server and measure its latencies and throughput.
    Serve(serve::ServeArgs),
    /// Move blocks between host memory and the store on disk, and recover it.
    Kvbm(tiers::TiersArgs),
    /// Move blocks between agents and measure bandwidth, latency and what it costs.
    Transfer(Box<transfer::TransferArgs>),
    /// Measure what our frontend and worker add to requests that vLLM serves.
    Vllm(vllm::VllmArgs),
    /// Check and time everything that GPUs of this node do for block transfers, in minutes.
    Gpu(transfer::GpuArgs),
    /// The other process of `bench transfer`; takes its orders on standard input.
    #[command(hide = true)]
    TransferPeer,
}

/// Runs a benchmark to its end. `kernels` says where kernels for GPUs are compiled and kept.
///
/// # Errors
/// When an option makes no sense, or the benchmark cannot be carried out.
pub fn run(args: BenchArgs, kernels: &KernelConfig) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Engine(args) => engine::run(&args),
        BenchCommand::Serve(args) => serve::run(&args),
        BenchCommand::Kvbm(args) => tiers::run(&args),
        BenchCommand::Transfer(args) => transfer::run(&args, kernels),
        BenchCommand::Vllm(args) => vllm::run(&args),
        BenchCommand::Gpu(args) => transfer::qualify(&args, kernels),
        BenchCommand::TransferPeer => transfer::run_peer(kernels),
    }
}
