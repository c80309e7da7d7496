//! Faults of the frontend itself.

use std::time::Duration;

use anyhow::{Result, ensure};
use blockplane_tests::{ClusterBuilder, Role, health, process, process::Signal, requests, wait};

use crate::scene::{HUNG, Scene, streams};

/// A frontend that is stopped for less than anybody's patience loses nothing.
#[test]
fn a_short_stop_is_not_noticed() -> Result<()> {
    let scene = Scene::new(&[Role::Prefill, Role::Decode], "shm,tcp")?;
    let bodies = streams(31, 4, 100, 300);
    let running = scene.start(bodies.clone());
    running.wait_begun()?;
    let frontend = scene.cluster.signal(Role::Frontend, Signal::STOP)?;
    wait::pass(Duration::from_millis(300));
    process::send(frontend, Signal::CONT)?;
    let outcome = running.finish()?;
    let reference = scene.reference(&bodies)?;
    let served = outcome.check(&reference)?;
    ensure!(served == 4, "{served} of 4 were served");
    scene.end()
}

/// A frontend that is stopped for long is given up by the workers, which take their blocks back. Its
/// clients learn what became of their requests when it goes on.
#[test]
fn a_long_stop_frees_the_blocks() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode], "shm,tcp")?;
    let bodies = streams(32, 4, 100, 3000);
    let running = scene.start(bodies);
    running.wait_begun()?;
    let frontend = scene.cluster.signal(Role::Frontend, Signal::STOP)?;
    wait::pass(Duration::from_secs(6));
    process::send(frontend, Signal::CONT)?;
    let outcome = running.finish()?;
    // It has lost its connections to them meanwhile.
    scene.wait_workers(Role::Decode, 1)?;
    scene.wait_workers(Role::Prefill, 1)?;
    let reference = scene.reference(&streams(32, 4, 100, 3000))?;
    outcome.check(&reference)?;
    scene.end()
}

/// The frontend dies: its workers cancel what it had asked for, and serve the next frontend.
#[test]
fn killed_with_streams_running() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode], "shm,tcp")?;
    let running = scene.start(streams(33, 4, 100, 3000));
    running.wait_begun()?;
    let frontend = scene.cluster.pid(Role::Frontend)?;
    scene.cluster.kill(frontend)?;
    // No server is left to tell the clients anything; that they see a cut at once is all there is.
    running.finish()?.assert_cut()?;
    scene.cluster.start_frontend()?;
    scene.wait_workers(Role::Decode, 1)?;
    scene.wait_workers(Role::Prefill, 1)?;
    let pools = health::wait_idle(&scene.client, HUNG)?;
    ensure!(
        pools == scene.pools,
        "{pools:?}, at the start {:?}",
        scene.pools
    );
    scene.end()
}

/// Under the launcher, each role may be stopped for good: it is taken for hung, killed and started
/// again.
#[test]
fn a_hung_role_is_replaced() -> Result<()> {
    let mut cluster = ClusterBuilder::new().empty()?;
    let file = cluster.folder().join("deployment.toml");
    let text = format!(
        "discovery = \"{}\"\nmodel = \"{}\"\n[nodes.a]\nunhealthy_secs = 5\nrun_dir = \"{}\"\n\
         [[nodes.a.roles]]\nrole = \"frontend\"\nhttp_port = {}\n\
         [[nodes.a.roles]]\nrole = \"aggregated\"\nthreads = 1\nblocks = 256\n",
        cluster.discovery(),
        blockplane_tests::fixtures::checkpoint("qwen3")?.display(),
        cluster.run_dir().display(),
        cluster.port(),
    );
    std::fs::write(&file, text)?;
    let arguments = ["launch", &file.display().to_string(), "--node", "a"].map(str::to_owned);
    let launcher = cluster.start("launch", &arguments)?;
    cluster.adopt(Role::Frontend, launcher);
    cluster.wait_ready("the node", |health| health.count("aggregated") == 1)?;
    for role in [Role::Aggregated, Role::Frontend] {
        let stopped = cluster.signal(role, Signal::STOP)?;
        wait::until("another process", HUNG, || match cluster.pid(role) {
            Ok(pid) if pid != stopped => Ok(()),
            Ok(pid) => Err(format!("still process {pid}")),
            Err(error) => Err(error.to_string()),
        })?;
        cluster.wait_ready("the node again", |health| health.count("aggregated") == 1)?;
        let body = requests::completion("qwen3", &[3; 40], 4);
        cluster
            .client()
            .run("/v1/completions", &body, HUNG)
            .done()?;
    }
    cluster.stop()
}
