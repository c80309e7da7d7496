//! kill -9 of a worker with requests in it.

use anyhow::{Result, ensure};
use blockplane_tests::{Role, process::Signal};

use crate::scene::{Scene, streams};

/// The prefill worker dies with prompts in it. It is stopped first, so that the kill surely comes
/// while it holds them.
#[test]
fn prefill_worker_during_prefill() -> Result<()> {
    for lane in ["shm", "tcp"] {
        eprintln!("lane {lane}");
        let mut scene = Scene::new(&[Role::Prefill, Role::Decode], lane)?;
        let bodies = streams(1, 4, 600, 16);
        let reference = scene.reference(&streams(1, 4, 600, 16))?;
        let bodies_fresh = streams(2, 4, 600, 16);
        let prefill = scene.cluster.signal(Role::Prefill, Signal::STOP)?;
        let fresh = scene.start(bodies_fresh.clone());
        scene.wait_busy(Role::Decode)?;
        scene.cluster.kill(prefill)?;
        scene.wait_workers(Role::Prefill, 0)?;
        // Nobody is left to prefill, so the decode worker does it; these prompts are partly cached.
        let repeated = scene.start(bodies);
        let served = repeated.check(&reference)?;
        ensure!(
            served == 4,
            "{served} of 4 were served without a prefill worker"
        );
        let reference = scene.reference(&bodies_fresh)?;
        let served = fresh.check(&reference)?;
        ensure!(
            served == 4,
            "{served} of 4 were prefilled by the decode worker instead"
        );

        scene.cluster.start_worker(Role::Prefill)?;
        scene.wait_workers(Role::Prefill, 1)?;
        scene.end()?;
    }
    Ok(())
}

/// The prefill worker dies at any moment of its work: in compute, between two layers, in a transfer.
#[test]
fn prefill_worker_at_a_random_moment() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode], "shm,tcp")?;
    for round in 0..6 {
        let bodies = streams(100 + round, 6, 2500, 8);
        let running = scene.start(bodies.clone());
        // A different part of the streams has begun each time.
        running.wait_some_begun(usize::try_from(round % 4)?)?;
        let prefill = scene.cluster.pid(Role::Prefill)?;
        scene.cluster.kill(prefill)?;
        scene.wait_workers(Role::Prefill, 0)?;
        let reference = scene.reference(&bodies)?;
        let served = running.check(&reference)?;
        ensure!(served == 6, "{served} of 6 were served");
        scene.cluster.start_worker(Role::Prefill)?;
        scene.wait_workers(Role::Prefill, 1)?;
    }
    scene.end()
}

/// One of two decode workers dies while both generate.
#[test]
fn decode_worker_during_decode() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode, Role::Decode], "shm,tcp")?;
    let bodies = streams(3, 8, 100, 600);
    let running = scene.start(bodies.clone());
    running.wait_begun()?;
    let victim = scene.cluster.processes(Role::Decode)[0].pid;
    scene.cluster.kill(victim)?;
    scene.wait_workers(Role::Decode, 1)?;
    let reference = scene.reference(&bodies)?;
    let served = running.check(&reference)?;
    ensure!(
        served == 8,
        "{served} of 8 were served, in part by migration"
    );
    scene.end()
}

/// The only decode worker dies: its streams end in an error, and a new one serves again.
#[test]
fn the_only_decode_worker() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode], "shm,tcp")?;
    let bodies = streams(4, 4, 100, 600);
    let running = scene.start(bodies.clone());
    running.wait_begun()?;
    let victim = scene.cluster.pid(Role::Decode)?;
    scene.cluster.kill(victim)?;
    let outcome = scene.client.get("/health", crate::scene::HUNG)?;
    eprintln!("right after: {} {}", outcome.status, outcome.body);
    scene.cluster.start_worker(Role::Decode)?;
    scene.wait_workers(Role::Decode, 1)?;
    let reference = scene.reference(&bodies)?;
    running.check(&reference)?;
    scene.end()
}

/// An aggregated worker of two.
#[test]
fn aggregated_worker() -> Result<()> {
    let mut scene = Scene::new(&[Role::Aggregated, Role::Aggregated], "shm")?;
    let bodies = streams(5, 6, 300, 300);
    let running = scene.start(bodies.clone());
    running.wait_some_begun(3)?;
    let victim = scene.cluster.processes(Role::Aggregated)[1].pid;
    scene.cluster.kill(victim)?;
    scene.wait_workers(Role::Aggregated, 1)?;
    let reference = scene.reference(&bodies)?;
    let served = running.check(&reference)?;
    ensure!(served == 6, "{served} of 6 were served");
    scene.end()
}
