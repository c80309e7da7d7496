//! `blockplane selftest`: whether this machine moves the right bytes, and fails the right way.
//!
//! `selftest gpu` runs named checks of the `cuda` backend on the devices that are there. They run in a
//! process of their own (`worker`), which this one only watches: a check that hangs, crashes or
//! loses a device is reported with what it was doing, and the rest goes on in a fresh process.
//! Checks between processes start a third one (`node`, told by `link` what to do).

mod case;
mod check;
mod copies;
mod events;
mod faults;
mod large;
mod leaks;
mod link;
mod many;
mod node;
mod notify;
mod place;
mod random;
mod raw;
mod sanitizer;
mod stage;
mod tend;
mod tensors;
mod tiers;
mod worker;
mod world;

use std::process::ExitCode;

use blockplane_transfer::KernelConfig;

/// Options of `blockplane selftest`.
#[derive(Clone, Debug, clap::Args)]
pub struct SelftestArgs {
    /// What to check.
    #[command(subcommand)]
    pub command: SelftestCommand,
}

/// What can be checked.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum SelftestCommand {
    /// Check that GPUs move the right bytes and that faults end as they should.
    Gpu(GpuArgs),
    /// The process in which checks run; takes their names on standard input.
    #[command(hide = true)]
    GpuWorker(GpuWorkerArgs),
    /// The other process of checks between processes; takes its orders on standard input.
    #[command(hide = true)]
    GpuNode,
}

/// Options of `blockplane selftest gpu`.
#[derive(Clone, Debug, clap::Args)]
pub struct GpuArgs {
    /// List the checks and stop.
    #[arg(long)]
    pub list: bool,
    /// Only checks whose names contain this; may be given several times.
    #[arg(long, value_name = "PATTERN")]
    pub only: Vec<String>,
    /// Seed of contents, sizes and places; the same seed gives the same checks.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// One JSON object a line instead of text.
    #[arg(long)]
    pub json: bool,
    /// Time limits this many times longer: for tools that slow a GPU down.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub patience: u32,
}

/// Options of the process in which checks run.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct GpuWorkerArgs {
    /// As for `selftest gpu`.
    #[arg(long)]
    pub seed: u64,
}

/// Runs it. `kernels` says where kernels are compiled and kept.
///
/// # Errors
/// A process cannot be started, or the output is closed. A failed check is an exit status.
pub fn run(args: SelftestArgs, kernels: KernelConfig) -> anyhow::Result<ExitCode> {
    match args.command {
        SelftestCommand::Gpu(args) => tend::run(&args),
        SelftestCommand::GpuWorker(args) => worker::run(args, kernels),
        SelftestCommand::GpuNode => node::run(kernels),
    }
}
