//! Speed of the CPU engine on one checkpoint: prefill and decode, in tokens per second.
//!
//! ```text
//! cargo run --release -p blockplane-engine --example engine_speed -- DIR [--threads N] [--isa NAME] [--only prefill|decode]
//! ```
//!
//! Each figure is the best of several runs.
#![expect(clippy::print_stdout, reason = "a command-line program")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use blockplane_engine::model::{Executor, ExecutorOptions, LoadOptions, Model, SequenceSlice};
use blockplane_engine::ops::Compute;
use blockplane_kvbm::KvArena;
use blockplane_protocol::{BlockId, TokenId};
use blockplane_transfer::{Agent, AgentConfig};

const BLOCK_TOKENS: u32 = 16;
const CONTEXT: usize = 128;
const DECODE_STEPS: usize = 12;
const ROUNDS: usize = 3;

fn main() -> anyhow::Result<()> {
    let mut folder = None;
    let mut only = None;
    let mut options = LoadOptions::new(
        Compute::Bf16,
        usize::from(std::thread::available_parallelism()?),
    );
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().context("a value is missing");
        match argument.as_str() {
            "--threads" => options.cpu.threads = value()?.parse()?,
            "--isa" => options.cpu.isa = Some(value()?.parse()?),
            "--only" => only = Some(value()?),
            "--f32" => options.cpu.compute = Compute::F32,
            _ if folder.is_none() => folder = Some(PathBuf::from(argument)),
            other => bail!("unexpected argument {other}"),
        }
    }
    let folder = folder.context("usage: engine_speed DIR [--threads N] [--isa NAME] [--f32]")?;
    let start = Instant::now();
    let model = Model::load(&folder, &options)?;
    println!(
        "{:?}, loaded in {:.1} s",
        model.ops(),
        start.elapsed().as_secs_f64()
    );

    let agent = Agent::new(AgentConfig::new("engine-speed"))?;
    let sequences = 16;
    let blocks_each =
        (CONTEXT.max(512) + DECODE_STEPS * ROUNDS).div_ceil(BLOCK_TOKENS as usize) + 1;
    let blocks = u32::try_from(sequences * blocks_each)?;
    let arena = KvArena::allocate(&agent, model.kv_layout(BLOCK_TOKENS), blocks, "kv")?;
    let mut bench = Bench {
        vocab: u32::try_from(model.config().vocab_size)?,
        executor: Executor::new(Arc::clone(&model), ExecutorOptions::default())?,
        tables: (0..sequences)
            .map(|s| {
                (0..blocks_each)
                    .map(|b| BlockId(u32::try_from(s * blocks_each + b).unwrap_or(0)))
                    .collect()
            })
            .collect(),
        arena,
    };
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    for tokens in [128, 512].into_iter().filter(|_| wanted("prefill")) {
        let best = (0..ROUNDS + 1)
            .map(|_| bench.prefill(tokens))
            .collect::<Result<Vec<_>, _>>()?;
        let best = best.into_iter().fold(f64::INFINITY, f64::min);
        println!(
            "prefill {tokens:4}: {:8.1} tok/s  ({:.1} ms)",
            tokens as f64 / best,
            best * 1e3
        );
    }
    for sequences in [1, 4, 16].into_iter().filter(|_| wanted("decode")) {
        let best = bench.decode(sequences)?;
        println!(
            "decode  {sequences:4}: {:8.1} tok/s  ({:.1} ms per step)",
            sequences as f64 / best,
            best * 1e3
        );
    }
    Ok(())
}

struct Bench {
    vocab: u32,
    executor: Executor,
    tables: Vec<Vec<BlockId>>,
    arena: Arc<KvArena>,
}

impl Bench {
    fn prompt(&self, tokens: usize) -> Vec<TokenId> {
        (0..)
            .map(|i: u32| i.wrapping_mul(7919) % self.vocab)
            .take(tokens)
            .collect()
    }

    /// Seconds for one prompt.
    fn prefill(&mut self, tokens: usize) -> anyhow::Result<f64> {
        let prompt = self.prompt(tokens);
        let slice = SequenceSlice {
            tokens: &prompt,
            position: 0,
            blocks: &self.tables[0],
            logits: true,
        };
        let start = Instant::now();
        self.executor.forward(&[slice], &*self.arena, &mut |_| {})?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Seconds for one step of that many sequences at the usual context.
    fn decode(&mut self, sequences: usize) -> anyhow::Result<f64> {
        let prompt = self.prompt(CONTEXT);
        for table in &self.tables[..sequences] {
            let slice = SequenceSlice {
                tokens: &prompt,
                position: 0,
                blocks: table,
                logits: false,
            };
            self.executor.forward(&[slice], &*self.arena, &mut |_| {})?;
        }
        let mut best = f64::INFINITY;
        for step in 0..DECODE_STEPS * ROUNDS {
            let slices: Vec<_> = self.tables[..sequences]
                .iter()
                .map(|table| SequenceSlice {
                    tokens: &prompt[..1],
                    position: u32::try_from(CONTEXT + step).unwrap_or(u32::MAX),
                    blocks: table,
                    logits: true,
                })
                .collect();
            let start = Instant::now();
            self.executor.forward(&slices, &*self.arena, &mut |_| {})?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    }
}
