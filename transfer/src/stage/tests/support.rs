//! What stands in for devices, and what the tests share.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::super::Near;
use crate::agent::Core;
use crate::cuda::{CudaError, DeviceEvent};
use crate::error::{DeviceFailure, PrepareError, TransferError};
use crate::memory::Region;
use crate::op::{Op, Path, SetPair, TransferState};
use crate::plan::parts_of;
use crate::{
    Agent, AgentConfig, ArenaConfig, BlockIds, BlockLayout, Descriptor, LocalBlocks, PostOptions,
    Prepared, Registration,
};

/// Longer than anything takes on a busy machine; a test that gets here has failed.
pub(super) const WAIT: Duration = Duration::from_secs(20);

/// Guard bytes.
pub(super) const GUARD: u8 = 0xa5;

/// How the stand-in does its copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Like the copy workers.
    Plain,
    /// After a while.
    Slow(Duration),
    /// The n-th copy from now fails, and all later ones.
    Fails(usize),
    /// Copies are begun and never end, until they are called off.
    Stuck,
}

/// Host memory in regions named `device` and a digit.
#[derive(Debug)]
pub(super) struct StandIn {
    mode: Mutex<Mode>,
    stuck: Mutex<Vec<(Arc<TransferState>, u32)>>,
    begun: AtomicUsize,
    /// Whether the caller's events are past.
    past: AtomicBool,
}

impl StandIn {
    pub(super) fn set(&self, mode: Mode) {
        self.begun.store(0, Ordering::Relaxed);
        *self.mode.lock() = mode;
    }

    pub(super) fn set_past(&self, past: bool) {
        self.past.store(past, Ordering::Relaxed);
    }

    /// Copies begun since the mode was set.
    pub(super) fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }
}

pub(super) fn broken() -> DeviceFailure {
    DeviceFailure {
        device: 0,
        error: CudaError {
            what: "copy",
            code: 719,
            name: "CUDA_ERROR_LAUNCH_FAILED".to_owned(),
            description: "as the test asked for".to_owned(),
        },
        poisoned: false,
    }
}

impl Near for StandIn {
    fn device_of(&self, region: &Region) -> Option<u32> {
        region.label.strip_prefix("device")?.parse().ok()
    }

    fn plan(
        &self,
        core: &Core,
        _op: Op,
        sets: &[SetPair],
    ) -> Result<(Path, u32, String), PrepareError> {
        let bytes = sets.iter().map(|set| set.local.bytes()).sum();
        let part_bytes = core.config.copy_part_bytes;
        let parts = u32::try_from(parts_of(bytes, part_bytes)).unwrap();
        Ok((
            Path::Copy { part_bytes },
            parts,
            "a stand-in copies".to_owned(),
        ))
    }

    fn start(&self, half: &Arc<TransferState>) {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let mode = *self.mode.lock();
        match mode {
            Mode::Fails(first) if number >= first => half.stop(TransferError::Device(broken())),
            Mode::Plain | Mode::Fails(_) => half.start_here(),
            Mode::Slow(while_) => {
                let later = half.clone();
                let at = Instant::now() + while_;
                half.core.timers.call(at, move || later.start_here());
            }
            Mode::Stuck => {
                let mut parts = 0;
                while half.claim_part().is_some() {
                    parts += 1;
                }
                self.stuck.lock().push((half.clone(), parts));
            }
        }
    }

    fn stop(&self, half: &Arc<TransferState>) {
        let mut stuck = self.stuck.lock();
        let place = stuck.iter().position(|(known, _)| Arc::ptr_eq(known, half));
        let given_back = place.map(|place| stuck.swap_remove(place));
        drop(stuck);
        for _ in 0..given_back.map_or(0, |(_, parts)| parts) {
            half.part_done();
        }
    }

    fn is_past(&self, _region: &Region, _event: DeviceEvent) -> Result<bool, TransferError> {
        Ok(self.past.load(Ordering::Relaxed))
    }
}

/// An agent whose device is host memory; 4 slots of 64 KiB.
pub(super) fn agent_with(
    name: &str,
    change: impl FnOnce(&mut AgentConfig),
) -> (Agent, Arc<StandIn>) {
    let mut config = AgentConfig::new(name);
    config.cuda.staging.slots = 4;
    config.cuda.staging.slot_bytes = 64 << 10;
    // Several parts even in small copies, and requests in small parts.
    config.copy_part_bytes = 16 << 10;
    config.storage.file_request_bytes = 16 << 10;
    change(&mut config);
    let agent = Agent::new(config).unwrap();
    let near = Arc::new(StandIn {
        mode: Mutex::new(Mode::Plain),
        stuck: Mutex::default(),
        begun: AtomicUsize::new(0),
        past: AtomicBool::new(true),
    });
    agent.core().stage.stand_in(near.clone());
    (agent, near)
}

pub(super) fn device(agent: &Agent, bytes: usize) -> Registration {
    agent.allocate(ArenaConfig::new(bytes, "device0")).unwrap()
}

pub(super) fn host(agent: &Agent, bytes: usize) -> Registration {
    agent.allocate(ArenaConfig::new(bytes, "host")).unwrap()
}

/// Bytes in which every position and salt differs from its neighbours.
pub(super) fn pattern(bytes: usize, salt: u64) -> Vec<u8> {
    (0..bytes as u64)
        .map(|i| {
            let mixed = i
                .wrapping_add(salt << 32)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            u8::try_from(mixed >> 56).unwrap()
        })
        .collect()
}

pub(super) fn fill(memory: &Registration, salt: u64) -> Vec<u8> {
    let bytes = pattern(memory.len(), salt);
    memory.write_at(0, &bytes).unwrap();
    bytes
}

pub(super) fn bytes(memory: &Registration) -> Vec<u8> {
    let mut all = vec![0; memory.len()];
    memory.read_at(0, &mut all).unwrap();
    all
}

/// One side of an operation.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    pub(super) layout: BlockLayout,
    pub(super) ids: BlockIds,
    pub(super) layers: Range<u32>,
}

impl Blocks {
    pub(super) fn flat(blocks: u32, block_bytes: u64, ids: impl Into<BlockIds>) -> Self {
        Self {
            layout: BlockLayout::contiguous(blocks, block_bytes),
            ids: ids.into(),
            layers: 0..1,
        }
    }

    pub(super) fn local<'a>(&self, registration: &'a Registration) -> LocalBlocks<'a> {
        LocalBlocks {
            registration,
            layout: self.layout,
            ids: self.ids.clone(),
            layers: self.layers.clone(),
        }
    }

    /// Offsets of the runs, in pairing order.
    fn runs(&self) -> impl Iterator<Item = usize> + '_ {
        self.ids.iter().flat_map(move |id| {
            let at = move |layer| self.layout.run_offset(id, layer).unwrap();
            self.layers
                .clone()
                .map(at)
                .map(|at| usize::try_from(at).unwrap())
        })
    }
}

/// Copies as naively as possible.
pub(super) fn oracle(from: &[u8], a: &Blocks, to: &mut [u8], b: &Blocks) {
    let run = usize::try_from(a.layout.run_bytes).unwrap();
    for (x, y) in a.runs().zip(b.runs()) {
        to[y..y + run].copy_from_slice(&from[x..x + run]);
    }
}

/// `count` of the ids `0..of` in an order that has no runs, the same for the same seed.
pub(super) fn scattered(of: u32, count: usize, seed: u64) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..of).collect();
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    for i in (1..ids.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let other = usize::try_from(state >> 33).unwrap() % (i + 1);
        ids.swap(i, other);
    }
    ids.truncate(count);
    ids
}

/// Layouts and ids that are hard in one way or another, on both sides.
pub(super) fn shapes() -> Vec<(Blocks, Blocks)> {
    let layered = |blocks: u32, layers: u32, run: u64, by_layer: bool, gap: u64| BlockLayout {
        offset: gap,
        blocks,
        block_stride: if by_layer {
            run
        } else {
            u64::from(layers) * run + gap
        },
        layers,
        layer_stride: if by_layer {
            u64::from(blocks) * run + gap
        } else {
            run
        },
        run_bytes: run,
    };
    let of = |layout: BlockLayout, ids: Vec<u32>, layers: Range<u32>| Blocks {
        layout,
        ids: ids.into(),
        layers,
    };
    vec![
        // Whole pages, in part consecutive; a part is several blocks.
        (
            Blocks::flat(64, 16384, 3..47),
            Blocks::flat(64, 16384, scattered(64, 44, 1)),
        ),
        // A block is several slots.
        (
            Blocks::flat(5, 200_000, [4, 0, 2]),
            Blocks::flat(4, 200_000, [1, 2, 0]),
        ),
        // One operation of one part.
        (Blocks::flat(8, 100, [5, 1]), Blocks::flat(8, 100, [0, 7])),
        // Layers inside of blocks here, blocks inside of layers there.
        (
            of(layered(40, 4, 1000, false, 24), scattered(40, 30, 2), 1..4),
            of(layered(33, 6, 1000, true, 8), scattered(33, 30, 3), 2..5),
        ),
        // Layer by layer on both sides, odd sizes.
        (
            of(layered(50, 3, 3001, true, 0), (7..40).collect(), 0..3),
            of(layered(60, 5, 3001, true, 5), (1..34).collect(), 2..5),
        ),
    ]
}

/// Descriptors of different lengths, with gaps; offsets here and there.
pub(super) fn ragged() -> Vec<(u64, u64, u64)> {
    let lengths = [
        1, 70_000, 4096, 3, 200_001, 65536, 65536, 65536, 511, 40_000, 8192,
    ];
    let (mut here, mut there) = (10, 700_000);
    let mut out = Vec::new();
    for bytes in lengths {
        there -= bytes + 13;
        out.push((here, there, bytes));
        here += bytes + 7;
    }
    out
}

pub(super) fn descriptors<'a>(
    memory: &'a Registration,
    pieces: &[(u64, u64, u64)],
) -> Vec<Descriptor<'a>> {
    let piece = |&(offset, _, bytes): &(u64, u64, u64)| Descriptor {
        registration: memory,
        offset,
        bytes,
    };
    pieces.iter().map(piece).collect()
}

pub(super) fn run(prepared: &Prepared) -> Result<(), TransferError> {
    prepared.post(PostOptions::within(WAIT)).unwrap().wait(WAIT)
}

/// Waits until `done` holds, giving other threads the processor in between.
pub(super) fn eventually(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + WAIT;
    while !done() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}
