//! What rearranging costs beside moving: `cargo bench -p blockplane-transfer --bench tensors`.
//!
//! Blocks of a model with 36 layers and 8 heads of 128 elements of 2 bytes, 16 tokens each, between
//! two agents of this process over the shm lane (each has its own mapping) and over tcp. Ids are
//! scattered on both sides. The limit is `memcpy` of as many bytes by one thread. An argument chooses
//! the cases whose name contains it: `-- tcp`.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its result and stops at the first failure"
)]

use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, KvBlockLayout, KvOrder, KvShape, KvSlice, Lane, LocalTensor,
    Op, PostOptions, Prepared, RemoteTensor,
};

const WAIT: Duration = Duration::from_secs(60);
const BLOCKS: u32 = 256;
const SHAPE: KvShape = KvShape {
    blocks: 320,
    layers: 36,
    planes: 2,
    tokens: 16,
    heads: 8,
    head_bytes: 256,
};
const ROUNDS: usize = 7;

fn main() {
    let only = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let half = KvShape { heads: 4, ..SHAPE };
    let cases = [
        (
            "as it is (32 KiB runs)",
            (SHAPE, KvOrder::LAYER_FIRST_NHD),
            (SHAPE, KvOrder::LAYER_FIRST_NHD),
            KvSlice::ALL,
        ),
        (
            "layers first to blocks first (32 KiB runs)",
            (SHAPE, KvOrder::LAYER_FIRST_NHD),
            (SHAPE, KvOrder::BLOCK_FIRST_NHD),
            KvSlice::ALL,
        ),
        (
            "4 heads into 8, NHD (1 KiB runs)",
            (half, KvOrder::LAYER_FIRST_NHD),
            (SHAPE, KvOrder::LAYER_FIRST_NHD),
            KvSlice::ALL.heads(4..8),
        ),
        (
            "NHD to HND (256-byte runs)",
            (SHAPE, KvOrder::LAYER_FIRST_NHD),
            (SHAPE, KvOrder::LAYER_FIRST_HND),
            KvSlice::ALL,
        ),
        (
            "HND to NHD (256-byte runs)",
            (SHAPE, KvOrder::LAYER_FIRST_HND),
            (SHAPE, KvOrder::LAYER_FIRST_NHD),
            KvSlice::ALL,
        ),
        (
            "layers first NHD to blocks first HND (256-byte runs)",
            (SHAPE, KvOrder::LAYER_FIRST_NHD),
            (SHAPE, KvOrder::BLOCK_FIRST_HND),
            KvSlice::ALL,
        ),
    ];
    let bytes = usize::try_from(dense(SHAPE, cases[0].1.1).end().unwrap()).unwrap();
    println!("memcpy, one thread: {:.1} GB/s", memcpy(bytes));
    for lane in [Lane::Shm, Lane::Tcp] {
        let agent = |name| Agent::new(AgentConfig::new(name).with_lanes([lane])).unwrap();
        let (a, b) = (agent("a"), agent("b"));
        let peer = a.connect(&b.metadata(), WAIT).unwrap();
        let local = a.allocate(ArenaConfig::new(bytes, "local")).unwrap();
        let remote = b.allocate(ArenaConfig::new(bytes, "remote")).unwrap();
        local.write_at(0, &vec![1; bytes]).unwrap();
        remote.write_at(0, &vec![1; bytes]).unwrap();
        for (name, here, there, slice) in &cases {
            for op in [Op::Write, Op::Read] {
                let case = format!("{lane} {op:?} {name}");
                if only.as_ref().is_some_and(|only| !case.contains(only)) {
                    continue;
                }
                let prepare = || {
                    let local = LocalTensor {
                        registration: &local,
                        layout: dense(here.0, here.1),
                        ids: scattered(1).into(),
                        slice: KvSlice::ALL,
                    };
                    let remote = RemoteTensor {
                        peer: &peer,
                        region: remote.id(),
                        layout: dense(there.0, there.1),
                        ids: scattered(2).into(),
                        slice: slice.clone(),
                        window: None,
                    };
                    a.prepare_tensors(op, local, remote).unwrap()
                };
                let begin = Instant::now();
                let prepared = prepare();
                let prepare = begin.elapsed();
                let rate = rate(&prepared);
                println!("{case:<63} {rate:>6.2} GB/s, prepared in {prepare:?}");
            }
        }
    }
}

fn dense(shape: KvShape, order: KvOrder) -> KvBlockLayout {
    KvBlockLayout::dense(shape, order).unwrap()
}

/// GB/s, the median.
fn rate(prepared: &Prepared) -> f64 {
    let bytes = prepared.plan().bytes;
    let times = (0..ROUNDS).map(|_| {
        let begin = Instant::now();
        let transfer = prepared.post(PostOptions::within(WAIT)).unwrap();
        transfer.wait(WAIT).unwrap();
        begin.elapsed()
    });
    median_rate(bytes, times.collect())
}

fn memcpy(bytes: usize) -> f64 {
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    let times = (0..ROUNDS).map(|_| {
        let begin = Instant::now();
        std::hint::black_box(&mut to).copy_from_slice(std::hint::black_box(&from));
        begin.elapsed()
    });
    median_rate(bytes as u64, times.collect())
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn median_rate(bytes: u64, mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    bytes as f64 / times[times.len() / 2].as_secs_f64() / 1e9
}

/// `BLOCKS` of the block ids in an order without runs, the same for the same seed.
fn scattered(seed: u64) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..SHAPE.blocks).collect();
    let mut state = seed;
    for i in (1..ids.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let bound = i as u64 + 1;
        ids.swap(i, usize::try_from((state >> 33) % bound).unwrap());
    }
    ids.truncate(BLOCKS as usize);
    ids
}
