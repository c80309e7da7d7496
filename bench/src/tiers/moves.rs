//! Batches between memory and the store, and the same without a store.

use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use blockplane_kvbm::store::{BlockOutcome, SlotRead, SlotStore, SlotWrite, StoreMemory};
use blockplane_transfer::{
    Agent, ArenaConfig, BlockLayout, FileBlocks, FileConfig, FileStore, LocalBlocks, Op,
    PostOptions, Registration,
};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

use super::{Case, name, store_config};
use crate::transfer::{OpName, gb_per_s, process_cpu};

/// Longer than any batch takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Memory for one batch of each thread.
fn arena(agent: &Agent, case: &Case) -> anyhow::Result<(Registration, BlockLayout)> {
    let blocks = case.threads * case.batch;
    let bytes = usize::try_from(u64::from(blocks) * case.block_bytes)?;
    let registration = agent.allocate(ArenaConfig::new(bytes, "g2"))?;
    let mut contents = vec![0; usize::try_from(case.block_bytes)?];
    SmallRng::seed_from_u64(case.seed).fill(&mut contents[..]);
    for block in 0..blocks {
        contents[..4].copy_from_slice(&block.to_le_bytes());
        registration.write_at(u64::from(block) * case.block_bytes, &contents)?;
    }
    Ok((
        registration,
        BlockLayout::contiguous(blocks, case.block_bytes),
    ))
}

/// Different slots of the stretch of a thread, at random places.
fn places(case: &Case, thread: u32, random: &mut SmallRng) -> Vec<u32> {
    let stretch = case.slots / case.threads;
    let step = stretch / case.batch;
    (0..case.batch)
        .map(|i| thread * stretch + i * step + random.next_u32() % step)
        .collect()
}

/// Runs `batch(thread, slots)` on all threads for a while: GB/s and cores.
pub(super) fn repeat(
    case: &Case,
    time: Duration,
    round: u64,
    batch: impl Fn(u32, &[u32]) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<(f64, f64)> {
    let (start, cpu) = (Instant::now(), process_cpu());
    let work = |thread: u32| {
        let seed = case.seed ^ round << 8 ^ u64::from(thread);
        let mut random = SmallRng::seed_from_u64(seed);
        let mut batches = 0u64;
        while start.elapsed() < time {
            batch(thread, &places(case, thread, &mut random))?;
            batches += 1;
        }
        anyhow::Ok(batches)
    };
    let work = &work;
    let batches = thread::scope(|scope| {
        let threads: Vec<_> = (0..case.threads)
            .map(|thread| scope.spawn(move || work(thread)))
            .collect();
        let mut batches = 0;
        for thread in threads {
            batches += thread.join().ok().context("a thread has panicked")??;
        }
        anyhow::Ok(batches)
    })?;
    let took = start.elapsed().as_secs_f64();
    let used = process_cpu().saturating_sub(cpu).as_secs_f64();
    let bytes = batches * u64::from(case.batch) * case.block_bytes;
    Ok((gb_per_s(bytes, took), used / took))
}

/// The store.
pub(super) struct Bench {
    case: Case,
    store: Arc<SlotStore>,
    registration: Registration,
    layout: BlockLayout,
    round: u64,
}

impl Bench {
    /// Makes a store and fills it: reading what was never written measures nothing.
    pub(super) fn open(agent: &Agent, path: &Path, case: Case) -> anyhow::Result<Self> {
        let (store, _) = SlotStore::open(agent, &store_config(path, case.slots, case.block_bytes))?;
        let (registration, layout) = arena(agent, &case)?;
        let bench = Self {
            case,
            store,
            registration,
            layout,
            round: 0,
        };
        let slots: Vec<u32> = (0..case.slots).collect();
        for slots in slots.chunks(case.batch as usize) {
            bench.write(0, slots)?;
        }
        Ok(bench)
    }

    fn memory(&self) -> StoreMemory<'_> {
        StoreMemory {
            registration: &self.registration,
            layout: self.layout,
        }
    }

    fn write(&self, thread: u32, slots: &[u32]) -> anyhow::Result<()> {
        let first = thread * self.case.batch;
        let blocks: Vec<SlotWrite> = (first..)
            .zip(slots)
            .map(|(block, &slot)| SlotWrite {
                slot,
                block,
                name: name(slot, 0),
                parent: None,
            })
            .collect();
        let report = self
            .store
            .write(&self.memory(), &blocks, Instant::now() + PATIENCE);
        moved(&report.outcomes)
    }

    fn read(&self, thread: u32, slots: &[u32]) -> anyhow::Result<()> {
        let first = thread * self.case.batch;
        let blocks: Vec<SlotRead> = (first..)
            .zip(slots)
            .map(|(block, &slot)| SlotRead {
                slot,
                block,
                name: name(slot, 0),
            })
            .collect();
        let report = self
            .store
            .read(&self.memory(), &blocks, Instant::now() + PATIENCE);
        moved(&report.outcomes)
    }

    /// Writes a batch, reads it back and compares.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let mut random = SmallRng::seed_from_u64(self.case.seed);
        let slots = places(&self.case, 0, &mut random);
        let bytes = usize::try_from(u64::from(self.case.batch) * self.case.block_bytes)?;
        let (mut sent, mut found) = (vec![0; bytes], vec![0; bytes]);
        random.fill(&mut sent[..]);
        self.registration.write_at(0, &sent)?;
        self.write(0, &slots)?;
        self.registration.write_at(0, &found)?;
        self.read(0, &slots)?;
        self.registration.read_at(0, &mut found)?;
        ensure!(sent == found, "blocks came back wrong");
        Ok(())
    }

    /// GB/s and cores used.
    pub(super) fn measure(&mut self, op: OpName, time: Duration) -> anyhow::Result<(f64, f64)> {
        self.round += 1;
        let batch = |thread: u32, slots: &[u32]| match op {
            OpName::Write => self.write(thread, slots),
            OpName::Read => self.read(thread, slots),
        };
        repeat(&self.case, time, self.round, batch)
    }
}

fn moved(outcomes: &[BlockOutcome]) -> anyhow::Result<()> {
    let other = outcomes
        .iter()
        .find(|&outcome| *outcome != BlockOutcome::Moved);
    ensure!(other.is_none(), "a block was not moved: {other:?}");
    Ok(())
}

/// The same blocks in a plain file.
pub(super) struct Raw {
    case: Case,
    agent: Agent,
    file: FileStore,
    registration: Registration,
    layout: BlockLayout,
    round: u64,
}

impl Raw {
    /// Makes a file and fills it.
    pub(super) fn open(agent: &Agent, path: &Path, case: Case) -> anyhow::Result<Self> {
        let bytes = u64::from(case.slots) * case.block_bytes;
        let (registration, layout) = arena(agent, &case)?;
        let raw = Self {
            case,
            agent: agent.clone(),
            file: agent.open_file(FileConfig::new(path).create(bytes))?,
            registration,
            layout,
            round: 0,
        };
        let slots: Vec<u32> = (0..case.slots).collect();
        for slots in slots.chunks(case.batch as usize) {
            raw.transfer(Op::Write, 0, slots)?;
        }
        Ok(raw)
    }

    fn transfer(&self, op: Op, thread: u32, slots: &[u32]) -> anyhow::Result<()> {
        let first = thread * self.case.batch;
        let local: Vec<u32> = (first..).take(slots.len()).collect();
        let prepared = self.agent.prepare_file(
            op,
            LocalBlocks {
                registration: &self.registration,
                layout: self.layout,
                ids: local.into(),
                layers: 0..1,
            },
            FileBlocks {
                file: &self.file,
                layout: BlockLayout::contiguous(self.case.slots, self.case.block_bytes),
                ids: slots.to_vec().into(),
                layers: 0..1,
                durable: false,
            },
        )?;
        prepared
            .post(PostOptions::within(PATIENCE))?
            .wait(PATIENCE)?;
        Ok(())
    }

    /// GB/s and cores used.
    pub(super) fn measure(&mut self, op: OpName, time: Duration) -> anyhow::Result<(f64, f64)> {
        self.round += 1;
        let batch = |thread: u32, slots: &[u32]| self.transfer(op.op(), thread, slots);
        repeat(&self.case, time, self.round, batch)
    }
}
