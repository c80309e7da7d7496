//! The benchmarks behind `blockplane bench ...`.
//!
//! Every one prints a table for people or, with `--json`, one object a line (see
//! [`report::Record`]). Limits such as memcpy or a raw socket are measured in the same run as the
//! figures they bound, because machines and their neighbours change. `--quick` ends in under 30 s.
//!
//! * [`serve`]: load on any OpenAI-compatible server.
//!
//! Only the launcher depends on this crate: it mounts [`BenchArgs`] and calls [`run`].

pub mod report;
pub mod serve;

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
    /// Load an OpenAI-compatible server and measure its latencies and throughput.
    Serve(serve::ServeArgs),
}

/// Runs a benchmark to its end.
///
/// # Errors
/// When an option makes no sense, or the benchmark cannot be carried out.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Serve(args) => serve::run(&args),
    }
}
