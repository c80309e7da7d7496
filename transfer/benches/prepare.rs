//! What preparing and posting cost the caller, in nanoseconds per block:
//! `cargo bench -p blockplane-transfer --bench prepare`.
//!
//! Operations of 10,000 blocks between two agents of this process. Times of `prepare` begin with
//! the caller's list of ids or descriptors and include the conversion; the drop is not included. `post` has
//! blocks of 512 bytes and is what the caller's thread does until it has the handle.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its result and stops at the first failure"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockIds, BlockLayout, Descriptor, LocalBlocks, Op, Peer,
    PostOptions, Prepared, Registration, RemoteBlocks, RemoteDescriptor, WindowAccess, WindowId,
    WindowScope,
};

const BLOCKS: u32 = 10_000;
const BLOCK_BYTES: u64 = 512;
const ROUNDS: usize = 200;

struct Pair {
    a: Agent,
    b: Agent,
    peer: Peer,
}

fn main() {
    let wait = Duration::from_secs(10);
    let a = Agent::new(AgentConfig::new("a")).unwrap();
    let b = Agent::new(AgentConfig::new("b")).unwrap();
    let peer = a.connect(&b.metadata(), wait).unwrap();
    let pair = Pair { a, b, peer };
    let bytes = usize::try_from(u64::from(BLOCKS) * BLOCK_BYTES).unwrap();
    let local = pair.a.allocate(ArenaConfig::new(bytes, "local")).unwrap();
    let remote = pair.b.allocate(ArenaConfig::new(bytes, "remote")).unwrap();
    let (x, y) = (shuffled(1), shuffled(2));
    let in_order: Vec<u32> = (0..BLOCKS).collect();

    let blocks = |x: BlockIds, y: BlockIds, window| pair.blocks(&local, x, &remote, y, window);
    report("block set, scattered ids", || {
        blocks(x.as_slice().into(), y.as_slice().into(), None)
    });
    report("block set, a list of consecutive ids", || {
        blocks(in_order.as_slice().into(), in_order.as_slice().into(), None)
    });
    report("block set, a range", || {
        blocks((0..BLOCKS).into(), (0..BLOCKS).into(), None)
    });
    let layout = BlockLayout::contiguous(BLOCKS, BLOCK_BYTES);
    let scope = WindowScope::Blocks {
        layout,
        ids: y.clone(),
    };
    let window = pair
        .b
        .open_window(&remote, scope, WindowAccess::Write)
        .unwrap();
    report("block set, scattered ids, through a window", || {
        blocks(x.as_slice().into(), y.as_slice().into(), Some(window.id()))
    });
    for (count, name) in [(1, "1 region"), (128, "128 regions")] {
        let (here, there) = (regions(&pair.a, count), regions(&pair.b, count));
        for (order, x, y) in [("scattered", &x, &y), ("in order", &in_order, &in_order)] {
            let (here, there) = (local_list(&here, x), remote_list(&there, y));
            report(&format!("descriptors, {order}, {name}"), || {
                pair.a
                    .prepare_descriptors(Op::Write, &here, &pair.peer, &there)
                    .unwrap()
            });
        }
    }

    let posts = |name: &str, prepared: &Prepared| {
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let transfer = prepared.post(PostOptions::within(wait)).unwrap();
            times.push(start.elapsed());
            transfer.wait(wait).unwrap();
        }
        print(name, &mut times);
    };
    posts(
        "post, scattered ids",
        &blocks(x.as_slice().into(), y.as_slice().into(), None),
    );
    posts(
        "post, a range",
        &blocks((0..BLOCKS).into(), (0..BLOCKS).into(), None),
    );
}

impl Pair {
    fn blocks(
        &self,
        local: &Registration,
        x: BlockIds,
        remote: &Registration,
        y: BlockIds,
        window: Option<WindowId>,
    ) -> Prepared {
        let layout = BlockLayout::contiguous(BLOCKS, BLOCK_BYTES);
        let local = LocalBlocks {
            registration: local,
            layout,
            ids: x,
            layers: 0..1,
        };
        let remote = RemoteBlocks {
            peer: &self.peer,
            region: remote.id(),
            layout,
            ids: y,
            layers: 0..1,
            window,
        };
        self.a.prepare(Op::Write, local, remote).unwrap()
    }
}

fn local_list<'a>(regions: &'a [Registration], ids: &[u32]) -> Vec<Descriptor<'a>> {
    let descriptor = |&id| {
        let (region, offset) = place(id, regions.len());
        Descriptor {
            registration: &regions[region],
            offset,
            bytes: BLOCK_BYTES,
        }
    };
    ids.iter().map(descriptor).collect()
}

fn remote_list(regions: &[Registration], ids: &[u32]) -> Vec<RemoteDescriptor> {
    let descriptor = |&id| {
        let (region, offset) = place(id, regions.len());
        RemoteDescriptor {
            region: regions[region].id(),
            offset,
            window: None,
        }
    };
    ids.iter().map(descriptor).collect()
}

/// Region and offset of a block, with the blocks dealt out to the regions in order.
fn place(id: u32, regions: usize) -> (usize, u64) {
    let each = BLOCKS.div_ceil(u32::try_from(regions).unwrap());
    ((id / each) as usize, u64::from(id % each) * BLOCK_BYTES)
}

fn regions(agent: &Agent, count: u32) -> Vec<Registration> {
    let bytes = u64::from(BLOCKS.div_ceil(count)) * BLOCK_BYTES;
    (0..count)
        .map(|_| {
            let config = ArenaConfig::new(usize::try_from(bytes).unwrap(), "part");
            agent.allocate(config).unwrap()
        })
        .collect()
}

fn report(name: &str, prepare: impl Fn() -> Prepared) {
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let prepared = black_box(prepare());
        times.push(start.elapsed());
        drop(prepared);
    }
    print(name, &mut times);
}

fn print(name: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let per_block = |time: Duration| time.as_secs_f64() * 1e9 / f64::from(BLOCKS);
    println!(
        "{name:<45} {:>8.2} ns per block (median), {:>8.2} (best)",
        per_block(times[times.len() / 2]),
        per_block(times[0]),
    );
}

/// The block ids in an order without runs, the same for the same seed.
fn shuffled(seed: u64) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..BLOCKS).collect();
    let mut state = seed;
    for i in (1..ids.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let bound = i as u64 + 1;
        ids.swap(i, usize::try_from((state >> 33) % bound).unwrap());
    }
    ids
}
