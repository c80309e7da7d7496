//! Time of the pool's operations on one thread: `cargo run --release --example pool_speed -p
//! blockplane-kvbm`. Each figure is the best of several rounds; aims are in brackets.
#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::{
    hint::black_box,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use blockplane_kvbm::{BlockPool, CompleteBlock, ImmutableBlock, PoolConfig};
use blockplane_protocol::{SaltHash, SequenceHash, TokenBlock, TokenSequence};

const ROUNDS: usize = 50;
/// How long threads work together for one figure.
const TOGETHER: Duration = Duration::from_millis(100);

fn main() {
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
    let stop = AtomicBool::new(false);
    let start = Instant::now();
    let blocks: usize = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let stop = &stop;
                scope.spawn(move || {
                    let turns = prompts
                        .iter()
                        .cycle()
                        .skip(thread * prompts.len() / threads);
                    turns
                        .take_while(|_| !stop.load(Ordering::Relaxed))
                        .map(|prompt| {
                            fill_and_release_singly(pool, prompt);
                            prompt.len()
                        })
                        .sum::<usize>()
                })
            })
            .collect();
        thread::sleep(TOGETHER);
        stop.store(true, Ordering::Relaxed);
        let blocks = workers.into_iter().map(|worker| worker.join());
        blocks.map(|blocks| blocks.expect("no panic")).sum()
    });
    blocks as f64 / start.elapsed().as_secs_f64()
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
