//! Random schedules against two agents, with an oracle for every byte.
//!
//! A seed is a schedule: operations of both sides in both directions, cancels, deadlines that
//! cannot be met, windows that close under load, memory released under way, floods of
//! notifications, connections that end, and a process that is killed, stopped or cut off in the
//! middle of it. Threads and kernels have a will of their own: a seed repeats the schedule, not
//! every interleaving.
//!
//! `BLOCKPLANE_CHAOS=tcp:apart:17` runs one seed, `BLOCKPLANE_CHAOS_SEEDS=5000` that many of each
//! kind; a failure prints what to set.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a failed unwrap is a failed test, sizes are small, the environment selects seeds"
)]

mod actor;
mod blocks;
mod flight;
mod link;
mod owner;
mod pattern;
mod proxy;
mod random;
mod world;

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use blockplane_transfer::Lane;

use world::{Place, Report, World};

/// Longer than anything takes on a busy machine; who gets here has failed.
const WAIT: Duration = Duration::from_secs(20);
/// Longer than a whole seed takes: something hangs that should have a deadline.
const HANG: Duration = Duration::from_secs(150);
const BLOCK: u64 = 4096;
const BLOCKS: u32 = 48;
const SLOT: usize = BLOCK as usize * BLOCKS as usize;
const SLOTS: usize = 6;
const NOTIFICATIONS_MAX: usize = 32;
/// Seeds of one kind that run at the same time. They wait for each other much.
const WORKERS: u64 = 2;

fn seeds(lane: Lane, place: Place, count: u64) {
    let world = |seed| World { lane, place, seed };
    if let Ok(one) = std::env::var("BLOCKPLANE_CHAOS") {
        let (kind, seed) = one.rsplit_once(':').unwrap();
        let wanted = world(seed.parse().unwrap());
        if wanted.to_string().starts_with(&format!("{kind}:")) {
            println!("{wanted}: {:?}", run(wanted));
        }
        return;
    }
    let count = match std::env::var("BLOCKPLANE_CHAOS_SEEDS") {
        Ok(wanted) => wanted.parse().unwrap(),
        Err(_) => count,
    };
    let next = AtomicU64::new(0);
    let reports: Vec<Report> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|_| {
                scope.spawn(|| {
                    let mut reports = Vec::new();
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= count {
                            return reports;
                        }
                        reports.push(run(world(seed)));
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap())
            .collect()
    });
    let sum = |field: fn(&Report) -> u64| reports.iter().map(field).sum::<u64>();
    let (completed, failed) = (sum(|r| r.completed), sum(|r| r.failed));
    let events: Vec<usize> = (0..5)
        .map(|event| reports.iter().filter(|r| r.event == event).count())
        .collect();
    println!("{count} seeds: {completed} operations done, {failed} ended early, events {events:?}");
    // An oracle that sees only one kind of end proves little.
    assert!(
        completed > count * 5 && failed > count,
        "{completed} {failed}"
    );
}

/// Runs one seed, says how to repeat it when it fails, and does not wait for ever.
fn run(world: World) -> Report {
    let (finished, result) = channel();
    std::thread::spawn(move || {
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| world::run(world)));
        let _ = finished.send(outcome);
    });
    let repeat = format!("to repeat: BLOCKPLANE_CHAOS={world}");
    match result.recv_timeout(HANG) {
        Ok(Ok(report)) => report,
        Ok(Err(_)) => panic!("seed {world} failed; {repeat}"),
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            panic!("seed {world} hangs; {repeat}")
        }
    }
}

#[test]
fn loopback_together() {
    seeds(Lane::Loopback, Place::Together, 60);
}

#[test]
fn shm_together() {
    seeds(Lane::Shm, Place::Together, 60);
}

#[test]
fn tcp_together() {
    seeds(Lane::Tcp, Place::Together, 60);
}

#[test]
fn shm_apart() {
    seeds(Lane::Shm, Place::Apart, 120);
}

#[test]
fn tcp_apart() {
    seeds(Lane::Tcp, Place::Apart, 120);
}

/// Not a test: the other process of worlds that are apart.
#[test]
#[ignore = "started by the other tests"]
fn other_process() {
    world::other_process();
}
