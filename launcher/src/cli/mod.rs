//! The command line. Every setting has one flag, one variable where Dynamo's users know one, and a
//! documented default; nothing else in the workspace reads the environment.

mod chat;
pub(crate) mod docs;
mod frontend;
mod hub;
mod kvbm;
mod node;
mod vllm;
mod worker;

use clap::{Parser, Subcommand};

pub(crate) use chat::ChatArgs;
pub(crate) use frontend::{FrontendArgs, RouterModeArg};
pub(crate) use hub::{FetchArgs, HubArgs, ModelCommand};
pub(crate) use kvbm::{KvbmArgs, TABLE_FLAG, settings_of_file};
pub(crate) use node::{DoctorArgs, LaunchArgs, UpArgs, UpMode};
pub(crate) use vllm::{GuardArgs, VllmArgs};
pub(crate) use worker::{ComputeArg, EngineArg, LaneArg, WorkerArgs};

/// The subcommand below which a worker runs vLLM.
pub(crate) const GUARD: &str = "vllm-guard";

/// Moves, keeps and finds KV-cache blocks, and serves LLMs from them.
#[derive(Debug, Parser)]
#[command(
    name = "blockplane",
    version,
    max_term_width = 110,
    propagate_version = true
)]
pub(crate) struct Cli {
    /// Log filter: error, warn, info, debug, trace, or TARGET=LEVEL pairs.
    #[arg(
        long,
        global = true,
        env = "DYN_LOG",
        default_value = "warn,blockplane=info"
    )]
    pub(crate) log: String,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model on this machine: frontend, router and workers, each its own process.
    Up(Box<UpArgs>),
    /// Start and supervise what a deployment file assigns to one node.
    Launch(LaunchArgs),
    /// Run an OpenAI-compatible frontend with its router.
    Frontend(FrontendArgs),
    /// Run one worker.
    Worker(Box<WorkerArgs>),
    /// Talk to a model that is served, and see what each answer cost.
    Chat(ChatArgs),
    /// Report what this machine offers, what is used, and what to do about what is missing.
    Doctor(DoctorArgs),
    /// Measure links, the engine, or a running deployment.
    Bench(blockplane_bench::BenchArgs),
    /// Get models ready.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Tune the KV cache below the GPU.
    #[command(subcommand)]
    Kvbm(crate::kvbm::KvbmCommand),
    /// Run vLLM in a process group that ends with our standard input.
    #[command(name = GUARD, hide = true)]
    VllmGuard(GuardArgs),
    /// Print the completions of a shell: `source <(blockplane completions bash)`.
    Completions(docs::CompletionsArgs),
    /// Print the manual page, or write the pages of all commands.
    Man(docs::ManArgs),
    /// Check that this machine moves the right bytes.
    Selftest(blockplane_bench::selftest::SelftestArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
