//! `blockplane kvbm ...`: tools around the KV cache below the GPU.

mod config;
mod observe;

use std::process::ExitCode;

use blockplane_bench::kvbm::{AdviseArgs, ReplayArgs, advise, replay};
use clap::Subcommand;

pub(crate) use config::ConfigArgs;
pub(crate) use observe::observe;

/// What can be done.
#[derive(Debug, Subcommand)]
pub(crate) enum KvbmCommand {
    /// Print every setting of the KV tiers with its value, unit and origin, what that takes of memory and
    /// disk, and what is wrong with it.
    Config(Box<ConfigArgs>),
    /// Play a trace against the manager of the KV cache, in virtual time: hits, writes, queues.
    Replay(Box<ReplayArgs>),
    /// Try sizes and policies on a trace and say which settings to take, and why.
    Advise(Box<AdviseArgs>),
}

pub(crate) fn run(command: KvbmCommand) -> anyhow::Result<ExitCode> {
    match command {
        KvbmCommand::Config(args) => return config::run(&args),
        KvbmCommand::Replay(args) => replay(&args)?,
        KvbmCommand::Advise(args) => advise(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}
