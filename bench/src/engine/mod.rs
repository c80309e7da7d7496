//! `blockplane bench engine`: prefill and decode speed of the native engine, without a server.
//!
//! Prefill is one prompt in one batch. Decode is steps of one token for each of several sequences
//! that already have a context, the likeliest token of each being fed back. The limit beside a
//! decode figure is what memory allows: every step has to read all weights and the keys and values
//! of all sequences once, at the bandwidth that the same number of threads reaches in this run.
//! (A model that fits the caches can be faster.)

mod bound;
mod tiers;

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::ensure;
use blockplane_engine::{
    model::{Executor, ExecutorOptions, LoadOptions, Model, ModelConfig, SequenceSlice},
    ops::{Compute, Isa},
};
use blockplane_kvbm::KvArena;
use blockplane_protocol::{BlockId, TokenId};
use blockplane_transfer::{Agent, AgentConfig, Lane};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Map, Value, json};

use self::bound::MemoryBound;
pub(crate) use self::bound::read_bandwidth;
pub use self::tiers::TierArgs;
use crate::report::{Record, Report, Samples, Table, case};

/// Options of `blockplane bench engine`.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineArgs {
    /// Checkpoint directory.
    #[arg(long)]
    pub model: PathBuf,
    /// Precision of weights, keys and values.
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    pub compute: Precision,
    /// Threads that compute [default: the cores of this machine].
    #[arg(long)]
    pub threads: Option<usize>,
    /// Instruction set [default: the fastest that the processor has].
    #[arg(long)]
    pub isa: Option<Isa>,
    /// Prompt lengths to prefill.
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    pub prefill: Vec<u32>,
    /// Numbers of sequences to decode together.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16")]
    pub decode: Vec<u32>,
    /// Tokens that each sequence has when decoding starts.
    #[arg(long, default_value_t = 128)]
    pub decode_context: u32,
    /// Decode steps of one run.
    #[arg(long, default_value_t = 32)]
    pub decode_steps: u32,
    /// Runs of each case; the median counts.
    #[arg(long, default_value_t = 3)]
    pub runs: u32,
    /// Tokens of a KV block.
    #[arg(long, default_value_t = 16)]
    pub block_tokens: u32,
    /// Seed of the prompts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Two runs, 8 decode steps, no prompt over 128 tokens.
    #[arg(long)]
    pub quick: bool,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    pub json: bool,
    /// The time to the first token by tier.
    #[command(flatten)]
    pub tiers: TierArgs,
}

/// Precision of weights, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// 16 bits.
    Bf16,
    /// 32 bits.
    F32,
}

/// A model with memory for the largest case.
struct Bench {
    executor: Executor,
    arena: Arc<KvArena>,
    // Keeps the arena registered.
    _agent: Agent,
    block_tokens: u32,
    rng: StdRng,
}

/// Runs it.
///
/// # Errors
/// When an option makes no sense, the checkpoint cannot be loaded, or the output is closed.
pub fn run(args: &EngineArgs) -> anyhow::Result<()> {
    run_to(args, &mut Report::stdout(args.json))
}

/// Runs it with its output going to `report`.
///
/// # Errors
/// As for [`run`].
pub fn run_to<W: Write>(args: &EngineArgs, report: &mut Report<W>) -> anyhow::Result<()> {
    let mut args = args.effective()?;
    let start = Instant::now();
    let mut bench = Bench::new(&args)?;
    args.isa = Some(bench.isa());
    report.note(&format!(
        "{}, {}, {}, {} threads, loaded in {:.1} s",
        model_name(&args.model),
        args.compute.as_str(),
        bench.isa(),
        args.threads(),
        start.elapsed().as_secs_f64()
    ))?;
    let bound = bench.bound(&args);
    let mut table = Table::new(&[
        "case", "tokens/s", "ms p50", "ms p99", "limit", "ratio", "n",
    ]);
    for &tokens in &args.prefill {
        let times = bench.prefill(&args, tokens)?;
        let place = args.place("prefill", [("tokens", json!(tokens))]);
        let title = format!("prefill {tokens}");
        table.row(figure(report, place, title, &times, tokens, None)?);
    }
    for &sequences in &args.decode {
        let times = bench.decode(&args, sequences)?;
        let place = args.place(
            "decode",
            [
                ("sequences", json!(sequences)),
                ("context", json!(args.decode_context)),
            ],
        );
        let limit = bound.decode_tokens_per_s(sequences, args.decode_context);
        let title = format!("decode x{sequences}");
        table.row(figure(
            report,
            place,
            title,
            &times,
            sequences,
            Some(limit),
        )?);
    }
    report.table(&table)?;
    if let Some(dir) = &args.tiers.tiers_dir {
        let model = Arc::clone(bench.executor.model());
        drop(bench);
        tiers::run(&args, dir, &model, report)?;
    }
    Ok(())
}

impl Bench {
    fn new(args: &EngineArgs) -> anyhow::Result<Self> {
        let compute = match args.compute {
            Precision::Bf16 => Compute::Bf16,
            Precision::F32 => Compute::F32,
        };
        let mut options = LoadOptions::new(compute, args.threads());
        options.cpu.isa = args.isa;
        let model = Model::load(&args.model, &options)?;
        let prefill = args.prefill.iter().copied().max().unwrap_or(1);
        let sequences = args.decode.iter().copied().max().unwrap_or(1);
        let decode = args.decode_context + args.decode_steps;
        let context = model.config().context_tokens_max;
        let longest = prefill.max(decode) as usize;
        ensure!(
            longest <= context,
            "the longest case has {longest} tokens; the model's context is {context}"
        );
        let agent = Agent::new(AgentConfig::new("bench-engine").with_lanes([Lane::Loopback]))?;
        let blocks = prefill
            .div_ceil(args.block_tokens)
            .max(sequences * decode.div_ceil(args.block_tokens));
        let layout = model.kv_layout(args.block_tokens);
        let arena = KvArena::allocate(&agent, layout, blocks, "bench-engine")?;
        let options = ExecutorOptions {
            batch_tokens_max: prefill.max(args.decode_context).max(sequences) as usize,
            logit_rows_max: sequences as usize,
        };
        Ok(Self {
            executor: Executor::new(model, options)?,
            arena,
            _agent: agent,
            block_tokens: args.block_tokens,
            rng: StdRng::seed_from_u64(args.seed),
        })
    }

    /// The instruction set in use.
    fn isa(&self) -> Isa {
        self.executor.model().ops().isa()
    }

    fn bound(&self, args: &EngineArgs) -> MemoryBound {
        let element = match args.compute {
            Precision::Bf16 => 2,
            Precision::F32 => 4,
        };
        let layout = self.arena.layout();
        MemoryBound {
            bytes_per_s: read_bandwidth(args.threads()),
            weight_bytes: weights(self.executor.model().config()) * element,
            kv_bytes_per_token: layout.block_bytes() as u64 / u64::from(layout.block_tokens),
        }
    }

    /// Seconds of each run.
    fn prefill(&mut self, args: &EngineArgs, tokens: u32) -> anyhow::Result<Samples> {
        let blocks = self.blocks(0, tokens);
        let mut times = Samples::default();
        for i in 0..=args.runs {
            let prompt = self.prompt(tokens);
            let start = Instant::now();
            self.executor.forward(
                &[SequenceSlice {
                    tokens: &prompt,
                    position: 0,
                    blocks: &blocks,
                    logits: true,
                }],
                &*self.arena,
                &mut |_| {},
            )?;
            // The first run warms up.
            if i > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
        Ok(times)
    }

    /// Seconds of each step.
    fn decode(&mut self, args: &EngineArgs, sequences: u32) -> anyhow::Result<Samples> {
        let tables: Vec<Vec<BlockId>> = (0..sequences)
            .map(|i| self.blocks(i, args.decode_context + args.decode_steps))
            .collect();
        let mut times = Samples::default();
        for i in 0..=args.runs {
            let mut tokens = Vec::new();
            for table in &tables {
                let prompt = self.prompt(args.decode_context);
                let logits = self.executor.forward(
                    &[SequenceSlice {
                        tokens: &prompt,
                        position: 0,
                        blocks: table,
                        logits: true,
                    }],
                    &*self.arena,
                    &mut |_| {},
                )?;
                tokens.push(likeliest(logits.row(0)));
            }
            for step in 0..args.decode_steps {
                let start = Instant::now();
                let slices: Vec<SequenceSlice<'_>> = tokens
                    .iter()
                    .zip(&tables)
                    .map(|(token, blocks)| SequenceSlice {
                        tokens: std::slice::from_ref(token),
                        position: args.decode_context + step,
                        blocks,
                        logits: true,
                    })
                    .collect();
                let logits = self.executor.forward(&slices, &*self.arena, &mut |_| {})?;
                let next = (0..logits.rows()).map(|row| likeliest(logits.row(row)));
                tokens = next.collect();
                // The first run warms up.
                if i > 0 {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
        }
        Ok(times)
    }

    /// Blocks of the `i`-th sequence of this length.
    fn blocks(&self, i: u32, tokens: u32) -> Vec<BlockId> {
        let each = tokens.div_ceil(self.block_tokens);
        (i * each..(i + 1) * each).map(BlockId).collect()
    }

    fn prompt(&mut self, tokens: u32) -> Vec<TokenId> {
        let vocab = self.executor.model().config().vocab_size;
        let vocab = TokenId::try_from(vocab).unwrap_or(TokenId::MAX);
        (0..tokens)
            .map(|_| self.rng.random_range(0..vocab))
            .collect()
    }
}

/// Writes the figures of one case, of which each sample gave `tokens` tokens; returns its row.
fn figure<W: Write>(
    report: &mut Report<W>,
    place: Map<String, Value>,
    title: String,
    times: &Samples,
    tokens: u32,
    limit: Option<f64>,
) -> anyhow::Result<Vec<String>> {
    let n = times.len() as u64;
    let (p50, p99) = (times.median(), times.percentile(99));
    let rate = f64::from(tokens) / p50;
    report.record(
        &Record::new("engine", place.clone(), "tokens_per_s", "1/s", rate, n)
            .percentiles(rate, f64::from(tokens) / p99)
            .limit(limit),
    )?;
    report.record(
        &Record::new("engine", place, "step_ms", "ms", p50 * 1e3, n)
            .percentiles(p50 * 1e3, p99 * 1e3),
    )?;
    let optional = |value: Option<f64>, digits| {
        value.map_or_else(String::new, |value| format!("{value:.digits$}"))
    };
    Ok(vec![
        title,
        format!("{rate:.1}"),
        format!("{:.2}", p50 * 1e3),
        format!("{:.2}", p99 * 1e3),
        optional(limit, 1),
        optional(limit.map(|limit| rate / limit), 2),
        n.to_string(),
    ])
}

/// Weights that every step reads: all layers and the output matrix.
fn weights(config: &ModelConfig) -> u64 {
    let heads = config.heads * config.head_dim;
    let kv_heads = config.kv_heads * config.head_dim;
    let attention = config.hidden_size * (2 * heads + 2 * kv_heads);
    let feed_forward = 3 * config.hidden_size * config.intermediate_size;
    let output = config.vocab_size * config.hidden_size;
    (config.layers * (attention + feed_forward) + output) as u64
}

fn likeliest(logits: &[f32]) -> TokenId {
    let best = (0..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(token, _)| token)
}

fn model_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}

impl Precision {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

impl EngineArgs {
    /// Checks the options and applies `--quick`.
    fn effective(&self) -> anyhow::Result<Self> {
        let mut args = self.clone();
        if args.quick {
            args.runs = args.runs.min(2);
            args.decode_steps = args.decode_steps.min(8);
            args.prefill.retain(|&tokens| tokens <= 128);
            args.decode_context = args.decode_context.min(32);
        }
        let all = [
            ("--runs", args.runs),
            ("--decode-steps", args.decode_steps),
            ("--decode-context", args.decode_context),
            ("--block-tokens", args.block_tokens),
            ("--tiers-prompt", args.tiers.tiers_prompt),
        ];
        let lists = [("--prefill", &args.prefill), ("--decode", &args.decode)];
        let lists = lists
            .into_iter()
            .flat_map(|(name, list)| list.iter().map(move |&value| (name, value)));
        for (name, value) in all.into_iter().chain(lists) {
            ensure!(
                (1..=1 << 20).contains(&value),
                "{name} has {value}; accepted: 1 to 1048576"
            );
        }
        Ok(args)
    }

    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores).max(1)
    }

    fn place<const N: usize>(&self, phase: &str, more: [(&str, Value); N]) -> Map<String, Value> {
        let mut place = case([
            ("phase", json!(phase)),
            ("model", json!(model_name(&self.model))),
            ("compute", json!(self.compute.as_str())),
            ("isa", json!(self.isa.map(Isa::name))),
            ("threads", json!(self.threads())),
        ]);
        for (name, value) in more {
            place.insert(name.to_owned(), value);
        }
        place
    }
}
