//! How long it takes to open a store that is full.

use std::{
    io::Write,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use blockplane_kvbm::store::{BlockOutcome, SlotStore, SlotWrite, StoreMemory};
use blockplane_transfer::{Agent, ArenaConfig, BlockLayout};
use serde_json::json;

use super::{BENCH, GOAL_RECOVERY_S, name, store_config};
use crate::report::{Record, Report, Samples, case};

/// Small blocks: recovery reads none of them.
const BLOCK: u64 = 4096;
const BATCH: u32 = 32;
const THREADS: u32 = 4;
const RUNS: u32 = 3;

/// Fills a store of `slots` slots and opens it again.
pub(super) fn measure<W: Write>(
    agent: &Agent,
    folder: &Path,
    slots: u32,
    report: &mut Report<W>,
) -> anyhow::Result<()> {
    let path = folder.join("recovery");
    let config = store_config(&path, slots, BLOCK);
    fill(&SlotStore::open(agent, &config)?.0, agent, slots)?;
    let mut times = Samples::default();
    for _ in 0..RUNS {
        let start = Instant::now();
        let (store, recovered) = SlotStore::open(agent, &config)?;
        times.push(start.elapsed().as_secs_f64());
        ensure!(
            recovered.len() == slots as usize && store.recovery().damaged == 0,
            "{} of {slots} blocks were recovered",
            recovered.len()
        );
    }
    std::fs::remove_file(&path)?;
    let place = case([("slots", json!(slots))]);
    let mut record = Record::of_samples(BENCH, place, "recovery_s", "s", &times);
    record.goal = (slots >= 1_000_000).then_some(GOAL_RECOVERY_S);
    report.record(&record)?;
    report.note(&format!(
        "recovery of {slots} slots: {:.2} s (median of {RUNS})",
        record.value
    ))?;
    Ok(())
}

fn fill(store: &SlotStore, agent: &Agent, slots: u32) -> anyhow::Result<()> {
    let bytes = usize::try_from(BLOCK)?;
    let registration = agent.allocate(ArenaConfig::new(bytes, "recovery"))?;
    let memory = StoreMemory {
        registration: &registration,
        layout: BlockLayout::contiguous(1, BLOCK),
    };
    let stretch = slots.div_ceil(THREADS).next_multiple_of(BATCH);
    let work = |thread: u32| {
        let end = slots.min((thread + 1).saturating_mul(stretch));
        let all: Vec<u32> = (thread * stretch..end).collect();
        for some in all.chunks(BATCH as usize) {
            let blocks: Vec<SlotWrite> = some
                .iter()
                .map(|&slot| SlotWrite {
                    slot,
                    block: 0,
                    name: name(slot, 1),
                    // Chains of 64 blocks.
                    parent: (slot % 64 > 0).then(|| name(slot - 1, 1).sequence),
                })
                .collect();
            let until = Instant::now() + Duration::from_secs(60);
            let report = store.write(&memory, &blocks, until);
            let other = report.outcomes.iter().find(|&o| *o != BlockOutcome::Moved);
            ensure!(other.is_none(), "a block was not moved: {other:?}");
        }
        Ok(())
    };
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || work(thread)))
            .collect();
        for thread in threads {
            thread.join().ok().context("a thread has panicked")??;
        }
        Ok(())
    })
}
