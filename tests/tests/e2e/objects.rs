//! Blocks of a real worker in an object store: written through, found after a restart, and computed
//! again when the store is silent or gone.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use blockplane_tests::{Client, ClusterBuilder, cluster::free_port, health, traffic::LIMIT, wait};

use crate::tiers::{CACHED_TOKENS, Scene, sample};

/// The stand-in for S3 on loopback that the tests of `transfer` use.
#[expect(
    dead_code,
    clippy::unwrap_used,
    reason = "other tests use the rest of it, and panic where it is misused"
)]
#[path = "../../../transfer/tests/storage/server.rs"]
mod server;

use server::{Fault, Server};

/// Blocks of a prompt.
const BLOCKS: u32 = 25;
/// Time for one transfer from a lower tier.
const ONBOARD: Duration = Duration::from_secs(1);
/// An answer that waited for a dead store, at most: the time above, and computing.
const ANSWER: Duration = Duration::from_secs(8);

#[test]
fn blocks_come_back_from_an_object_store_after_a_restart_and_a_dead_one_costs_a_moment()
-> Result<()> {
    let server = Server::start();
    let folder = tempfile::tempdir()?;
    let port = free_port()?;
    let builder = ClusterBuilder::new()
        .variable("DYN_KVBM_METRICS", &true)
        .variable("DYN_KVBM_METRICS_PORT", &port)
        .variable("DYN_KVBM_ONBOARD_TIMEOUT_MS", &ONBOARD.as_millis())
        .variable("DYN_KVBM_OBJECT_ENABLED", &true)
        .variable("DYN_KVBM_OBJECT_BUCKET", &"kv")
        .variable("DYN_KVBM_OBJECT_ENDPOINT", &server.endpoint())
        .variable("DYN_KVBM_OBJECT_REGION", &"us-east-1")
        .variable("DYN_KVBM_OBJECT_ACCESS_KEY", &"id")
        .variable("DYN_KVBM_OBJECT_SECRET_KEY", &"secret");
    let mut scene = Scene::with(builder, folder.path(), 200, 0)?;
    let metrics = Client::new((Ipv4Addr::LOCALHOST, port).into());
    let at_least = |name: &str, least: u32| -> Result<()> {
        wait::until(name, LIMIT, || {
            let text = metrics
                .get("/metrics", LIMIT)
                .map_err(|error| format!("{error:#}"))?;
            if sample(&text.body, name) >= f64::from(least) {
                Ok(())
            } else {
                Err(text.body)
            }
        })
    };
    let known = "kvbm_blocks{tier=\"remote\",state=\"cached\"}";
    let remote = |least: u32| -> Result<()> {
        wait::until("the names of all objects", LIMIT, || {
            let text = metrics
                .get("/metrics", LIMIT)
                .map_err(|error| format!("{error:#}"))?;
            let line = text.body.lines().find(|line| line.starts_with(known));
            let names = line.and_then(|line| line.rsplit(' ').next()?.parse::<u32>().ok());
            if names >= Some(least) {
                Ok(())
            } else {
                Err(text.body)
            }
        })
    };
    let prompts = [scene.prompt(), scene.prompt(), scene.prompt()];
    let mut answers = Vec::new();
    for prompt in &prompts {
        answers.push(scene.ask(prompt)?.0);
    }
    // Written through: nothing was pushed out of host memory.
    at_least("kvbm_offload_blocks_d2o", 3 * BLOCKS)?;
    at_least("kvbm_offload_bytes_object", 1)?;

    // Pool and host memory are empty; there is no disk.
    scene.crash(|| Ok(()))?;
    remote(3 * BLOCKS)?;
    let (again, cached) = scene.ask(&prompts[0])?;
    ensure!(again == answers[0], "{again:?} is not {:?}", answers[0]);
    ensure!(cached == CACHED_TOKENS, "{cached} tokens were there");
    scene.wait_load("what was loaded", |load| {
        load.cached_remote_tokens_total == CACHED_TOKENS
    })?;
    at_least("kvbm_onboard_blocks_o2d", 24)?;
    at_least("kvbm_onboard_bytes_object", 1)?;

    // A store that takes requests and answers none.
    server.fail("GET", Fault::Silence, 10_000);
    let began = Instant::now();
    let (again, _) = scene.ask(&prompts[1])?;
    ensure!(again == answers[1], "{again:?} is not {:?}", answers[1]);
    ensure!(began.elapsed() < ANSWER, "{:?}", began.elapsed());
    at_least("kvbm_object_read_failures", 1)?;

    // A store that is gone, whose names are known.
    drop(server);
    let began = Instant::now();
    let (again, _) = scene.ask(&prompts[2])?;
    ensure!(again == answers[2], "{again:?} is not {:?}", answers[2]);
    ensure!(began.elapsed() < ANSWER, "{:?}", began.elapsed());
    health::wait_idle(&scene.client, LIMIT)?;
    scene.cluster.stop()
}
