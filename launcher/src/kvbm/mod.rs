//! `blockplane kvbm ...`: tools around the KV cache below the GPU.

use std::process::ExitCode;

use blockplane_bench::kvbm::{AdviseArgs, ReplayArgs, advise, replay};
use clap::Subcommand;

/// What can be done.
#[derive(Debug, Subcommand)]
pub(crate) enum KvbmCommand {
    /// Play a trace against the manager of the KV cache, in virtual time: hits, writes, queues.
    Replay(Box<ReplayArgs>),
    /// Try sizes and policies on a trace and say which settings to take, and why.
    Advise(Box<AdviseArgs>),
}

pub(crate) fn run(command: KvbmCommand) -> anyhow::Result<ExitCode> {
    match command {
        KvbmCommand::Replay(args) => replay(&args)?,
        KvbmCommand::Advise(args) => advise(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}
