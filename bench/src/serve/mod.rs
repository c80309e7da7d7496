//! `blockplane bench serve`: load on any OpenAI-compatible server.
//!
//! Closed loop (a fixed number of clients, each waits for its answer) or open loop (requests start
//! at given times whether or not earlier ones are answered; latencies count from the time they
//! should have started, so that a stalled server cannot hide behind a stalled client).

mod client;
mod load;
mod prompt;
mod summary;
mod trace;
mod workload;

use std::{io::Write, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};

pub use self::client::Api;
use self::{client::Client, prompt::calibrate, workload::Workload};
use crate::report::Report;

/// Options of `blockplane bench serve`.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Server to load, without the /v1.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Model to ask for; the first that the server lists when absent.
    #[arg(long)]
    pub model: Option<String>,
    /// Endpoint.
    #[arg(long, value_enum, default_value_t = Api::Chat)]
    pub api: Api,
    /// Closed loop: clients that each wait for their answer.
    #[arg(long, default_value_t = 4)]
    pub concurrency: usize,
    /// Open loop: mean requests per second, with exponential gaps (Poisson arrivals).
    #[arg(long, conflicts_with_all = ["concurrency", "trace"])]
    pub rate: Option<f64>,
    /// Requests to send.
    #[arg(long, default_value_t = 64)]
    pub requests: usize,
    /// No request starts after this many seconds.
    #[arg(long, default_value_t = 120.0)]
    pub duration: f64,
    /// A request fails after this many seconds.
    #[arg(long, default_value_t = 60.0)]
    pub timeout: f64,
    /// Requests before the measurement starts.
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Open loop: requests in flight at most; those beyond count as failed.
    #[arg(long, default_value_t = 1024)]
    pub in_flight_max: usize,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 128)]
    pub input_tokens: u32,
    /// Tokens to generate for each prompt.
    #[arg(long, default_value_t = 32)]
    pub output_tokens: u32,
    /// Leading tokens of each prompt that it shares with others.
    #[arg(long, default_value_t = 0)]
    pub shared_prefix_tokens: u32,
    /// Number of different shared prefixes.
    #[arg(long, default_value_t = 1)]
    pub prefixes: u32,
    /// Replay a trace in Mooncake's format (`timestamp`, `input_length`, `output_length`,
    /// `hash_ids`; one JSON object a line) instead of synthetic prompts; open loop.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Replay a trace this many times faster.
    #[arg(long, default_value_t = 1.0)]
    pub trace_speed: f64,
    /// Scale the lengths of a trace's prompts and outputs, to fit a small model.
    #[arg(long, default_value_t = 1.0)]
    pub trace_scale: f64,
    /// Let the model end its output before --output-tokens.
    #[arg(long)]
    pub stop_at_eos: bool,
    /// Seed of prompts and arrival times.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// At most 8 requests of 16 tokens, none longer than 7 seconds, and no warm-up.
    #[arg(long)]
    pub quick: bool,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Runs it.
///
/// # Errors
/// When an option makes no sense, the server cannot be reached, no request succeeds, or the output
/// is closed.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let mut report = Report::stdout(args.json);
    run_to(args, &mut report)
}

/// Runs it with its output going to `report`.
///
/// # Errors
/// As for [`run`].
pub fn run_to<W: Write>(args: &ServeArgs, report: &mut Report<W>) -> anyhow::Result<()> {
    let args = args.effective()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the client's threads")?;
    let outcome = runtime.block_on(async {
        let timeout = Duration::from_secs_f64(args.timeout);
        let mut client = Client::new(&args.url, args.api, args.stop_at_eos, timeout)?;
        client.find_model(args.model.as_deref()).await?;
        let calibration = calibrate(&client, args.seed).await?;
        let workload = Workload::new(&args, calibration)?;
        load::run(&args, client, workload).await
    })?;
    // Connections that are still open must not keep the process.
    runtime.shutdown_background();
    summary::write(&args, &outcome, report)?;
    ensure!(
        outcome.succeeded() > 0,
        "no request succeeded: {}",
        outcome.failures_text()
    );
    Ok(())
}

impl ServeArgs {
    /// Checks the options and applies `--quick`.
    fn effective(&self) -> anyhow::Result<Self> {
        let mut args = self.clone();
        if args.quick {
            args.requests = args.requests.min(8);
            args.output_tokens = args.output_tokens.min(16);
            // Two to learn the tokenizer, then the run: 27 s even if every request just makes it.
            args.duration = args.duration.min(6.0);
            args.timeout = args.timeout.min(7.0);
            args.warmup = 0;
        }
        let positive = [
            ("--duration", args.duration),
            ("--timeout", args.timeout),
            ("--trace-speed", args.trace_speed),
            ("--trace-scale", args.trace_scale),
            ("--rate", args.rate.unwrap_or(1.0)),
        ];
        for (name, value) in positive {
            ensure!(
                value.is_finite() && value > 0.0 && value <= 1e6,
                "{name} is {value}; accepted: above 0, up to 1000000"
            );
        }
        let counts = [
            ("--concurrency", args.concurrency),
            ("--requests", args.requests),
            ("--in-flight-max", args.in_flight_max),
            ("--prefixes", args.prefixes as usize),
            ("--input-tokens", args.input_tokens as usize),
            ("--output-tokens", args.output_tokens as usize),
        ];
        for (name, value) in counts {
            ensure!(value > 0, "{name} is 0; accepted: at least 1");
        }
        ensure!(
            args.shared_prefix_tokens <= args.input_tokens,
            "--shared-prefix-tokens is {}; accepted: at most --input-tokens, {}",
            args.shared_prefix_tokens,
            args.input_tokens
        );
        Ok(args)
    }
}
