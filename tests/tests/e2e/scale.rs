//! More workers and requests than a test machine could compute for, with the timing model.

use std::time::Duration;

use anyhow::{Result, ensure};
use blockplane_tests::{
    ClusterBuilder,
    health::{self, Health},
    prompts::{Random, sharing_prefixes},
    requests,
    traffic::{LIMIT, all_done, send_all},
};

/// Eight workers, three hundred streams, forty-eight at a time.
#[test]
fn eight_mock_workers_and_three_hundred_streams() -> Result<()> {
    let mut cluster = ClusterBuilder::new()
        .arguments(&[
            "--mode",
            "disagg-router",
            "--prefill",
            "3",
            "--decode",
            "5",
            "--engine",
            "mock",
            "--blocks",
            "512",
            "--worker-args",
            "--mock-speedup 10",
        ])
        .up()?;
    cluster.wait_ready("all workers", |health| {
        health.count("prefill") == 3 && health.count("decode") == 5
    })?;
    let client = cluster.client().deadline(Duration::from_secs(50));
    let start = health::wait_idle(&client, LIMIT)?;
    let mut random = Random::new(5);
    let bodies: Vec<_> = sharing_prefixes(&mut random, 300, 400, requests::VOCABULARY)
        .iter()
        .map(|prompt| requests::streamed("blockplane-tiny", prompt, 24))
        .collect();
    for completion in all_done(send_all(&client, 48, &bodies)?)? {
        ensure!(completion.tokens.len() == 24, "{completion:?}");
    }
    let end = health::wait_idle(&client, LIMIT)?;
    ensure!(start == end, "the pools were {start:?} and are {end:?}");
    let health = Health::read(&client)?;
    let idle = health.workers.iter().filter(|worker| {
        worker
            .load
            .iter()
            .all(|load| load.prefill_tokens_total + load.decode_tokens_total == 0)
    });
    ensure!(idle.count() == 0, "a worker had nothing to do: {health:?}");
    cluster.stop()
}
