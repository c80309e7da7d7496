//! Time of the pool's operations, and its memory: `cargo run --release --example pool_speed -p
//! blockplane-kvbm`. Each time is the best of several rounds, those of several threads
//! the median; aims are in brackets.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::{
    env, fs,
    hint::black_box,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    BlockPool, CompleteBlock, Consolidation, EventHub, EvictionKind, ImmutableBlock, PoolConfig,
};
use blockplane_protocol::{
    BlockHash, BlockId, DpRank, SaltHash, SequenceHash, TokenBlock, TokenSequence,
};

const ROUNDS: usize = 50;
/// Blocks of the pool whose memory is measured.
const MANY: u32 = 1 << 20;
/// The measurement with a hub.
const TIERS: &str = "lru, and a hub of several tiers";
/// How many of them are filled at once.
const PART: u32 = 1 << 16;
/// How long threads work together for one figure.
const TOGETHER: Duration = Duration::from_millis(100);

fn main() {
    if let Some(what) = env::args().nth(1) {
        return print_memory(&what);
    }
    // Each in a process of its own: memory that was freed counts for nobody then.
    for what in EvictionKind::ALL
        .map(EvictionKind::word)
        .iter()
        .chain(&[TIERS])
    {
        let own = env::current_exe().expect("this program has a path");
        let status = Command::new(own).arg(what).status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "memory of {what}"
        );
    }

    let pool = BlockPool::accounting(100_000, PoolConfig::default());
    let prompts: Vec<Vec<TokenBlock>> = (0..150).map(|seed| prompt(seed, 1_000)).collect();

    // The pool overflows by half: from the 101st prompt on every allocation evicts.
    let mut turn = prompts.iter().cycle();
    turn.by_ref()
        .take(150)
        .for_each(|prompt| drop(fill(&pool, prompt)));
    let evicting = best_ns(1_000, || {
        fill_and_release_singly(&pool, turn.next().expect("endless"))
    });
    println!("the same, 100,000 blocks                   {evicting:7.1} ns a block  [300]");

    for threads in 1..=2 {
        let mut rates = [(); 9].map(|()| blocks_per_s(&pool, &prompts, threads));
        rates.sort_by(f64::total_cmp);
        let median = 1e9 / rates[rates.len() / 2];
        println!(
            "the same, threads: {threads}                       {median:7.1} ns between blocks"
        );
    }

    let evicting = best_ns(1_000, || drop(fill(&pool, turn.next().expect("endless"))));
    println!("the same, 1,000 at once                    {evicting:7.1} ns a block");

    let lease = best_ns(1_000, || {
        for _ in 0..1_000 {
            drop(black_box(pool.allocate(1)));
        }
    });
    println!("allocate + drop                            {lease:7.1} ns a block");

    let held = fill(&pool, &prompts[0]);
    let shared = best_us(|| black_box(pool.match_prefix(&prompts[0])));
    println!("match of 1,000 blocks in use               {shared:7.1} us            [30]");
    drop(held);
    let inactive = best_us(|| black_box(pool.match_prefix(&prompts[0])));
    println!("match of 1,000 inactive blocks             {inactive:7.1} us            [30]");
    let peek = best_us(|| black_box(pool.peek_prefix(&prompts[0])));
    println!("peek at 1,000 blocks                       {peek:7.1} us");
    let snapshot = best_us(|| black_box(pool.events().subscribe(None).try_recv()));
    println!(
        "snapshot of {} blocks                  {snapshot:7.1} us",
        pool.stats().cached
    );
}

fn prompt(seed: u32, blocks: usize) -> Vec<TokenBlock> {
    let tokens: Vec<u32> = (0..).map(|i| seed << 20 | i).take(blocks * 16).collect();
    TokenSequence::from_tokens(&tokens, 16, SaltHash::default())
        .blocks()
        .to_vec()
}

fn fill(pool: &BlockPool, prompt: &[TokenBlock]) -> Vec<ImmutableBlock> {
    let fresh = pool.allocate(prompt.len()).expect("nothing is held");
    let parents = parents(prompt);
    let complete: Vec<CompleteBlock> = fresh
        .into_iter()
        .zip(prompt.iter().zip(parents))
        .map(|(block, (hashes, parent))| block.complete(*hashes, parent))
        .collect();
    BlockPool::register(complete)
}

fn fill_and_release_singly(pool: &BlockPool, prompt: &[TokenBlock]) {
    for (hashes, parent) in prompt.iter().zip(parents(prompt)) {
        let block = pool.allocate(1).expect("nothing is held").remove(0);
        drop(block.complete(*hashes, parent).register());
    }
}

/// Blocks that all `threads` together fill and release singly in a second.
fn blocks_per_s(pool: &BlockPool, prompts: &[Vec<TokenBlock>], threads: usize) -> f64 {
    let start = Instant::now();
    let fill = |thread| {
        let first = thread * prompts.len() / threads;
        let turns = prompts.iter().cycle().skip(first);
        let turns = turns.take_while(|_| start.elapsed() < TOGETHER);
        turns
            .map(|prompt| {
                fill_and_release_singly(pool, prompt);
                prompt.len()
            })
            .sum::<usize>()
    };
    let blocks: usize = thread::scope(|scope| {
        let fill = &fill;
        let workers: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || fill(thread)))
            .collect();
        let blocks = workers.into_iter().map(|worker| worker.join());
        blocks.map(|blocks| blocks.expect("no panic")).sum()
    });
    blocks as f64 / start.elapsed().as_secs_f64()
}

/// Memory of a full pool of [`MANY`] blocks, in bytes a block; with `tiers`, of the pool and what a
/// hub adds that consolidates it with another one that holds nothing.
fn bytes_per_block(eviction: EvictionKind, tiers: bool) -> f64 {
    let before = resident_bytes();
    let pool = |blocks| {
        BlockPool::builder(PoolConfig::default())
            .eviction(eviction)
            .without_own_events()
            .accounting(blocks)
    };
    let (full, other) = (pool(MANY), pool(1));
    let hub = EventHub::new(DpRank(0), 1_024, Consolidation::Dedup);
    if tiers {
        full.join(&hub).expect("it has room");
        other.join(&hub).expect("it has room");
    }
    let block = |i: u32| {
        let block = BlockHash::of(&[i], SaltHash::default());
        let sequence = SequenceHash::root(block);
        (BlockId(i), TokenBlock { block, sequence }, None)
    };
    // In parts, so that the list of names for the hub is small.
    let parts = (0..MANY).step_by(PART as usize);
    let restored = parts.map(|first| full.restore((first..first + PART).map(block)));
    assert_eq!(restored.sum::<usize>(), MANY as usize);
    (resident_bytes() - before) as f64 / f64::from(MANY)
}

fn print_memory(what: &str) {
    let bytes = match what.parse() {
        Ok(eviction) => bytes_per_block(eviction, false),
        Err(_) => bytes_per_block(EvictionKind::Lru, true),
    };
    println!("memory, {what:<34} {bytes:7.1} bytes a block [100]");
}

fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    let kib: u64 = kib
        .and_then(|kib| kib.parse().ok())
        .expect("a number of KiB");
    kib * 1_024
}

fn parents(prompt: &[TokenBlock]) -> impl Iterator<Item = Option<SequenceHash>> + '_ {
    let rest = prompt.iter().map(|block| Some(block.sequence));
    std::iter::once(None).chain(rest)
}

fn best_ns(operations: u32, mut run: impl FnMut()) -> f64 {
    let round = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64() * 1e9 / f64::from(operations)
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}

/// Dropping the result is not part of the time.
fn best_us<T>(mut run: impl FnMut() -> T) -> f64 {
    let round = |_| {
        let start = Instant::now();
        let result = run();
        let time = start.elapsed().as_secs_f64() * 1e6;
        drop(result);
        time
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}
