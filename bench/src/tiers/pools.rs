//! The books of one tier: how long a block takes from being allocated to being released, how long a
//! search takes, and how much memory a block needs.

use std::{
    fs,
    hint::black_box,
    io::Write,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use blockplane_kvbm::{
    BlockPool, CompleteBlock, Consolidation, EventHub, EvictionKind, ImmutableBlock, PoolConfig,
};
use blockplane_protocol::{
    BlockHash, BlockId, DpRank, SaltHash, SequenceHash, TokenBlock, TokenSequence,
};
use serde_json::json;

use super::BENCH;
use crate::report::{Record, Report, Samples, Table, case};

const GOAL_NS: f64 = 300.0;
const GOAL_MATCH_US: f64 = 30.0;
const GOAL_BYTES: f64 = 100.0;
const BLOCKS: u32 = 100_000;
/// Blocks of a prompt.
const PROMPT: usize = 1_000;
/// Prompts that take turns: half as many blocks again as the pool has, so that each evicts.
const PROMPTS: u32 = 150;
/// Alternating rounds, so that neighbours and clocks weigh on all alike; medians count.
const ROUNDS: usize = 9;
/// How many blocks are put into a pool at once when its memory is measured.
const PART: u32 = 1 << 16;

/// Ways through a pool, from allocation to release.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    threads: usize,
    fill: fn(&BlockPool, &[TokenBlock]),
}

const WAYS: [Way; 5] = [
    Way {
        name: "one by one",
        threads: 1,
        fill: singly,
    },
    Way {
        name: "one by one",
        threads: 2,
        fill: singly,
    },
    Way {
        name: "1,000 at once",
        threads: 1,
        fill: at_once,
    },
    Way {
        name: "1,000 behind one handle",
        threads: 1,
        fill: together,
    },
    Way {
        name: "1,000 behind one handle",
        threads: 2,
        fill: together,
    },
];

/// Measures pools.
pub(super) fn measure<W: Write>(quick: bool, report: &mut Report<W>) -> anyhow::Result<()> {
    let mut table = Table::new(&["books of a tier", "", "goal"]);
    memory(if quick { 1 << 17 } else { 1 << 19 }, report, &mut table)?;
    let prompts: Vec<Vec<TokenBlock>> = (0..PROMPTS).map(prompt).collect();
    let pool = BlockPool::accounting(BLOCKS, PoolConfig::default());
    prompts.iter().for_each(|prompt| together(&pool, prompt));
    let time = Duration::from_millis(if quick { 10 } else { 100 });
    throughput(&pool, &prompts, time, report, &mut table)?;
    searches(&pool, &prompts[0], report, &mut table)?;
    report.table(&table)?;
    Ok(())
}

fn throughput<W: Write>(
    pool: &BlockPool,
    prompts: &[Vec<TokenBlock>],
    time: Duration,
    report: &mut Report<W>,
    table: &mut Table,
) -> anyhow::Result<()> {
    let mut times = WAYS.map(|_| Samples::default());
    for _ in 0..ROUNDS {
        for (way, times) in WAYS.iter().zip(&mut times) {
            times.push(ns_between_blocks(way, pool, prompts, time)?);
        }
    }
    for (at, (way, samples)) in WAYS.iter().zip(&times).enumerate() {
        let place = case([
            ("way", json!(way.name)),
            ("threads", json!(way.threads)),
            ("blocks", json!(BLOCKS)),
        ]);
        let mut record = Record::of_samples(BENCH, place, "pool_ns_per_block", "ns", samples);
        // Two threads on one pool are to be no slower together than one alone.
        let goal = match way.threads {
            1 => GOAL_NS,
            _ => times[at - 1].median(),
        };
        record.goal = Some(goal);
        report.record(&record)?;
        let what = format!(
            "allocate, register, release {}, threads: {}",
            way.name, way.threads
        );
        row(table, what, record.value, "ns a block", goal);
    }
    Ok(())
}

/// Time between two blocks that any of the threads takes from allocation to release.
fn ns_between_blocks(
    way: &Way,
    pool: &BlockPool,
    prompts: &[Vec<TokenBlock>],
    time: Duration,
) -> anyhow::Result<f64> {
    let start = Instant::now();
    let work = |thread: usize| {
        let first = thread * prompts.len() / way.threads;
        let turns = prompts.iter().cycle().skip(first);
        // One at least: on a busy machine the time may be up before a thread begins.
        let turns = turns.enumerate();
        let turns = turns.take_while(|(turn, _)| *turn == 0 || start.elapsed() < time);
        turns.map(|(_, prompt)| (way.fill)(pool, prompt)).count()
    };
    let turns: usize = thread::scope(|scope| {
        let work = &work;
        let workers: Vec<_> = (0..way.threads)
            .map(|thread| scope.spawn(move || work(thread)))
            .collect();
        let turns = workers.into_iter().map(|worker| worker.join().ok());
        turns.sum::<Option<usize>>()
    })
    .context("a thread has panicked")?;
    Ok(start.elapsed().as_secs_f64() * 1e9 / (turns * PROMPT) as f64)
}

fn singly(pool: &BlockPool, prompt: &[TokenBlock]) {
    for (name, parent) in chain(prompt) {
        let block = pool.allocate(1).expect("nothing is held").remove(0);
        drop(block.complete(name, parent).register());
    }
}

fn at_once(pool: &BlockPool, prompt: &[TokenBlock]) {
    drop(held(pool, prompt));
}

fn together(pool: &BlockPool, prompt: &[TokenBlock]) {
    let blocks = pool.lease(prompt.len()).expect("nothing is held");
    drop(blocks.register(chain(prompt)));
}

fn held(pool: &BlockPool, prompt: &[TokenBlock]) -> Vec<ImmutableBlock> {
    let blocks = pool.allocate(prompt.len()).expect("nothing is held");
    let blocks = blocks.into_iter().zip(chain(prompt));
    let complete: Vec<CompleteBlock> = blocks
        .map(|(block, (name, parent))| block.complete(name, parent))
        .collect();
    BlockPool::register(complete)
}

fn searches<W: Write>(
    pool: &BlockPool,
    prompt: &[TokenBlock],
    report: &mut Report<W>,
    table: &mut Table,
) -> anyhow::Result<()> {
    let held = held(pool, prompt);
    let in_use = search_us(pool, prompt);
    drop(held);
    for (state, times) in [("in use", in_use), ("inactive", search_us(pool, prompt))] {
        let place = case([("state", json!(state)), ("blocks", json!(PROMPT))]);
        let mut record = Record::of_samples(BENCH, place, "pool_match_us", "us", &times);
        record.goal = Some(GOAL_MATCH_US);
        report.record(&record)?;
        let what = format!("match of {PROMPT} blocks, {state}");
        row(table, what, record.value, "us", GOAL_MATCH_US);
    }
    let cached = pool.stats().cached;
    let times = (0..ROUNDS).map(|_| {
        let mut subscription = pool.events().subscribe(None);
        let start = Instant::now();
        let snapshot = subscription.try_recv();
        let time = start.elapsed().as_secs_f64() * 1e3;
        drop(black_box(snapshot));
        time
    });
    let place = case([("blocks", json!(cached))]);
    let record = Record::of_samples(BENCH, place, "pool_snapshot_ms", "ms", &times.collect());
    report.record(&record)?;
    let what = format!("snapshot of {cached} blocks");
    table.row(vec![what, format!("{:.1} ms", record.value), String::new()]);
    Ok(())
}

fn search_us(pool: &BlockPool, prompt: &[TokenBlock]) -> Samples {
    let round = |_| {
        let start = Instant::now();
        let found = black_box(pool.match_prefix(prompt));
        let time = start.elapsed().as_secs_f64() * 1e6;
        drop(found);
        time
    };
    (0..5 * ROUNDS).map(round).collect()
}

/// Memory of full pools, and of one with a hub that consolidates it with another tier.
fn memory<W: Write>(blocks: u32, report: &mut Report<W>, table: &mut Table) -> anyhow::Result<()> {
    // All are kept until the end: what was freed would be used again and not be seen.
    let mut kept = Vec::new();
    let policies = EvictionKind::ALL.map(|kind| (kind, false));
    for (kind, tiers) in policies.into_iter().chain([(EvictionKind::Lru, true)]) {
        let before = resident_bytes()?;
        kept.push(full_pool(blocks, kind, tiers)?);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
        let bytes = resident_bytes()?.saturating_sub(before) as f64 / f64::from(blocks);
        let place = case([
            ("eviction", json!(kind.word())),
            ("tiers", json!(if tiers { 2 } else { 1 })),
            ("blocks", json!(blocks)),
        ]);
        let mut record = Record::new(BENCH, place, "pool_bytes_per_block", "bytes", bytes, 1);
        record.goal = Some(GOAL_BYTES);
        report.record(&record)?;
        let hub = if tiers {
            ", with a hub of two tiers"
        } else {
            ""
        };
        let what = format!("memory, {}{hub}", kind.word());
        row(table, what, bytes, "bytes a block", GOAL_BYTES);
    }
    Ok(())
}

type Pools = (BlockPool, BlockPool, std::sync::Arc<EventHub>);

fn full_pool(blocks: u32, eviction: EvictionKind, tiers: bool) -> anyhow::Result<Pools> {
    let pool = |blocks| {
        BlockPool::builder(PoolConfig::default())
            .eviction(eviction)
            .without_own_events()
            .accounting(blocks)
    };
    let (full, other) = (pool(blocks), pool(1));
    let hub = EventHub::new(DpRank(0), 1_024, Consolidation::Dedup);
    if tiers {
        full.join(&hub)?;
        other.join(&hub)?;
    }
    let block = |i: u32| {
        let block = BlockHash::of(&[i], SaltHash::default());
        let sequence = SequenceHash::root(block);
        (BlockId(i), TokenBlock { block, sequence }, None)
    };
    // In parts, so that the list of names for the hub is small.
    for first in (0..blocks).step_by(PART as usize) {
        let part = first..blocks.min(first + PART);
        let wanted = part.len();
        ensure!(
            full.restore(part.map(block)) == wanted,
            "not all blocks went into the pool"
        );
    }
    Ok((full, other, hub))
}

fn resident_bytes() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    let kib: u64 = kib.context("/proc/self/status has no VmRSS")?.parse()?;
    Ok(kib * 1_024)
}

fn prompt(seed: u32) -> Vec<TokenBlock> {
    let tokens: Vec<u32> = (0..).map(|i| seed << 20 | i).take(PROMPT * 16).collect();
    TokenSequence::from_tokens(&tokens, 16, SaltHash::default())
        .blocks()
        .to_vec()
}

/// Each block with the name of the one before it.
fn chain(prompt: &[TokenBlock]) -> impl Iterator<Item = (TokenBlock, Option<SequenceHash>)> + '_ {
    let parents = prompt.iter().map(|block| Some(block.sequence));
    let parents = std::iter::once(None).chain(parents);
    prompt.iter().copied().zip(parents)
}

fn row(table: &mut Table, what: String, value: f64, unit: &str, goal: f64) {
    table.row(vec![
        what,
        format!("{value:.1} {unit}"),
        format!("{goal:.0}"),
    ]);
}
