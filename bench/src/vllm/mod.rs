//! `blockplane bench vllm`: what our frontend and worker add to a request that vLLM serves.
//!
//! The same requests go to the server directly and through our front door, in turns, with one and with
//! many clients. Against a stand-in that costs nothing what is added is our own cost; against a real
//! vLLM (`--url`) it also holds what the processes take from each other.

mod client;
mod deployment;
mod standin;

use std::{io::Write, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use self::{client::Client, deployment::Deployment, standin::StandIn};
use crate::report::{Record, Report, Samples, Table, case};

/// What our part may add to the time to the first token, in milliseconds.
const GOAL_TTFT_MS: f64 = 1.0;
/// And to each later token.
const GOAL_TOKEN_MS: f64 = 0.1;
/// Seed of the requests that do not count.
const WARM_UP: u64 = 1 << 60;

/// Options of `blockplane bench vllm`.
#[derive(Clone, Debug, clap::Args)]
pub struct VllmArgs {
    /// Folder of the model: our frontend reads its tokenizer.
    #[arg(long)]
    pub model: PathBuf,
    /// A vLLM server that serves this model; a stand-in that only keeps time when absent.
    #[arg(long, value_name = "http://HOST:PORT")]
    pub url: Option<String>,
    /// Clients at a time, one run for each number.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16])]
    pub concurrency: Vec<usize>,
    /// Runs of each, directly and through us in turns.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Requests of each client in a run.
    #[arg(long, default_value_t = 6)]
    pub requests: usize,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 128)]
    pub input_tokens: u32,
    /// Tokens to generate for each prompt.
    #[arg(long, default_value_t = 64)]
    pub output_tokens: u32,
    /// The stand-in's time to the first token, in milliseconds.
    #[arg(long, default_value_t = 20)]
    pub first_ms: u64,
    /// The stand-in's time for each later token, in milliseconds.
    #[arg(long, default_value_t = 5)]
    pub step_ms: u64,
    /// A request fails after this many seconds.
    #[arg(long, default_value_t = 60)]
    pub timeout: u64,
    /// Two rounds of short requests.
    #[arg(long)]
    pub quick: bool,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// The medians of one run, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Run {
    ttft: f64,
    token: f64,
}

/// A figure of a run: its name, the name of what is added to it, where it is, what may be added.
type Figure = (&'static str, &'static str, fn(&Run) -> f64, f64);

/// Runs it.
///
/// # Errors
/// When an option makes no sense, a process does not start, or a request fails.
pub fn run(args: &VllmArgs) -> anyhow::Result<()> {
    run_to(args, &mut Report::stdout(args.json))
}

/// Runs it with its output going to `report`.
///
/// # Errors
/// As for [`run`].
pub fn run_to<W: Write>(args: &VllmArgs, report: &mut Report<W>) -> anyhow::Result<()> {
    let args = args.effective()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the client's threads")?;
    let result = runtime.block_on(measure(&args, report));
    // Connections that are still open must not keep the process.
    runtime.shutdown_background();
    result
}

async fn measure<W: Write>(args: &VllmArgs, report: &mut Report<W>) -> anyhow::Result<()> {
    let timeout = Duration::from_secs(args.timeout);
    let standin = match args.url {
        Some(_) => None,
        None => Some(StandIn::start(args).await?),
    };
    let url = match (&args.url, &standin) {
        (Some(url), _) => url.clone(),
        (None, Some(standin)) => standin.url.clone(),
        (None, None) => unreachable!("one of them is there"),
    };
    let deployment = Deployment::start(&args.model, &url, timeout).await?;
    let direct = Client::new(&url, timeout, args).await?;
    let ours = Client::new(&deployment.url, timeout, args).await?;
    let server = if standin.is_some() {
        "stand-in"
    } else {
        "vllm"
    };
    report.note(&format!(
        "{server} at {url}, and through our frontend at {}",
        deployment.url
    ))?;
    let mut table = Table::new(&["clients", "ms", "direct", "ours", "added", "goal", "runs"]);
    // Connections, caches and code are warm before anything counts.
    direct.run(2, 1, WARM_UP).await?;
    ours.run(2, 1, WARM_UP + 1).await?;
    for &clients in &args.concurrency {
        let mut runs = Vec::with_capacity(args.rounds);
        for round in 0..args.rounds {
            let seed = seed(clients, round);
            // Who comes first changes, so that a machine that gets slower is fair to both.
            let pair = if round % 2 == 0 {
                let direct = direct.run(clients, args.requests, seed).await?;
                (direct, ours.run(clients, args.requests, seed + 1).await?)
            } else {
                let ours = ours.run(clients, args.requests, seed).await?;
                (direct.run(clients, args.requests, seed + 1).await?, ours)
            };
            runs.push(pair);
        }
        let mut fields = case([("server", json!(server)), ("concurrency", json!(clients))]);
        for (name, value) in [
            ("input_tokens", args.input_tokens),
            ("output_tokens", args.output_tokens),
        ] {
            fields.insert(name.to_owned(), Value::from(value));
        }
        let figures: [Figure; 2] = [
            ("ttft_ms", "added_ttft_ms", |run| run.ttft, GOAL_TTFT_MS),
            (
                "per_token_ms",
                "added_per_token_ms",
                |run| run.token,
                GOAL_TOKEN_MS,
            ),
        ];
        for (metric, added_metric, of, goal) in figures {
            let direct: Samples = runs.iter().map(|(direct, _)| of(direct)).collect();
            let ours: Samples = runs.iter().map(|(_, ours)| of(ours)).collect();
            let added: Samples = runs
                .iter()
                .map(|(direct, ours)| of(ours) - of(direct))
                .collect();
            let mut record = Record::of_samples("vllm", fields.clone(), metric, "ms", &ours);
            record.peer = Some(direct.median());
            record.ratio = Some(ours.median() / direct.median());
            report.record(&record)?;
            let mut record = Record::of_samples("vllm", fields.clone(), added_metric, "ms", &added);
            record.goal = Some(goal);
            report.record(&record)?;
            table.row(vec![
                clients.to_string(),
                metric.trim_end_matches("_ms").replace('_', " "),
                format!("{:.3}", direct.median()),
                format!("{:.3}", ours.median()),
                format!("{:.3}", added.median()),
                format!("{goal:.1}"),
                runs.len().to_string(),
            ]);
        }
    }
    report.table(&table)?;
    drop(standin);
    Ok(())
}

impl VllmArgs {
    fn effective(&self) -> anyhow::Result<Self> {
        let mut args = self.clone();
        if args.quick {
            args.rounds = args.rounds.min(2);
            args.requests = args.requests.min(3);
            args.output_tokens = args.output_tokens.min(16);
        }
        ensure!(
            args.output_tokens >= 2,
            "--output-tokens is {}; accepted: at least 2",
            args.output_tokens
        );
        ensure!(
            args.input_tokens >= 1,
            "--input-tokens is 0; accepted: at least 1"
        );
        let counts = [("--rounds", args.rounds), ("--requests", args.requests)];
        let all = counts
            .into_iter()
            .chain(args.concurrency.iter().map(|n| ("--concurrency", *n)));
        for (name, value) in all {
            ensure!(
                (1..=1_000).contains(&value),
                "{name} is {value}; accepted: 1 to 1000"
            );
        }
        Ok(args)
    }
}

/// No two runs share prompts, so that none finds the cache of another.
const fn seed(clients: usize, round: usize) -> u64 {
    (clients as u64) << 32 | (round as u64) << 8
}
