//! SIGSTOP of a worker: alive for the kernel, silent for everybody else.

use anyhow::{Result, ensure};
use blockplane_tests::{Role, process, process::Signal};

use crate::scene::{Scene, streams};

/// A stopped prefill worker delays its prompts until it is given up; then they are prefilled by the
/// decode worker. When it comes back, late bytes of it land nowhere, and no block stays behind.
#[test]
fn prefill_worker_during_prefill() -> Result<()> {
    for lane in ["shm", "tcp"] {
        eprintln!("lane {lane}");
        let mut scene = Scene::new(&[Role::Prefill, Role::Decode], lane)?;
        let bodies = streams(21, 8, 3000, 16);
        let running = scene.start(bodies.clone());
        scene.wait_busy(Role::Prefill)?;
        let stopped = scene.cluster.signal(Role::Prefill, Signal::STOP)?;
        let outcome = running.finish()?;
        process::send(stopped, Signal::CONT)?;
        scene.wait_workers(Role::Prefill, 1)?;
        let reference = scene.reference(&bodies)?;
        let served = outcome.check(&reference)?;
        ensure!(served == 8, "{served} of 8 were served");
        scene.end()?;
    }
    Ok(())
}

/// One of two decode workers is stopped while both generate: the streams of the other one do not
/// notice; its own end within their deadline.
#[test]
fn decode_worker_during_decode() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode, Role::Decode], "shm,tcp")?;
    let bodies = streams(22, 8, 100, 600);
    let running = scene.start(bodies.clone());
    running.wait_begun()?;
    let stopped = scene.cluster.processes(Role::Decode)[0].pid;
    process::send(stopped, Signal::STOP)?;
    let outcome = running.finish()?;
    scene.serves()?;
    process::send(stopped, Signal::CONT)?;
    scene.wait_workers(Role::Decode, 2)?;
    let reference = scene.reference(&bodies)?;
    outcome.check(&reference)?;
    scene.end()
}

/// Both sides of a hand-off are stopped, one after the other, and come back in the other order.
#[test]
fn both_sides_of_a_hand_off() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode], "shm,tcp")?;
    let bodies = streams(23, 8, 3000, 16);
    let running = scene.start(bodies.clone());
    scene.wait_busy(Role::Prefill)?;
    let prefill = scene.cluster.signal(Role::Prefill, Signal::STOP)?;
    let decode = scene.cluster.signal(Role::Decode, Signal::STOP)?;
    let outcome = running.finish()?;
    process::send(decode, Signal::CONT)?;
    process::send(prefill, Signal::CONT)?;
    scene.wait_workers(Role::Decode, 1)?;
    scene.wait_workers(Role::Prefill, 1)?;
    let reference = scene.reference(&bodies)?;
    outcome.check(&reference)?;
    scene.end()
}
