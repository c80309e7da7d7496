//! Many simulations at once.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::Context;

use crate::kvbm::{Outcome, Simulation, Trace, simulate};

/// Plays a trace against every simulation, on all cores; the outcomes are in the same order.
pub(super) fn sweep(trace: &Trace, simulations: &[Simulation]) -> anyhow::Result<Vec<Outcome>> {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::with_capacity(simulations.len()));
    let work = || -> anyhow::Result<()> {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(simulation) = simulations.get(at) else {
                return Ok(());
            };
            let outcome = simulate(trace, simulation)?;
            let mut outcomes = outcomes.lock().map_err(|_| lost())?;
            outcomes.push((at, outcome));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.min(simulations.len()))
            .map(|_| scope.spawn(work))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| lost())?)
    })?;
    let mut outcomes = outcomes.into_inner().ok().context("a simulation failed")?;
    outcomes.sort_by_key(|(at, _)| *at);
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

fn lost() -> anyhow::Error {
    anyhow::anyhow!("a thread of the sweep panicked")
}
