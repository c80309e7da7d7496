//! Invariant 5: the greedy output of a request does not depend on who computed it.

use anyhow::{Result, ensure};
use blockplane_tests::{
    ClusterBuilder,
    client::Completion,
    fixtures,
    health::{self, Health},
    prompts::{Random, sharing_prefixes},
    requests,
    traffic::{LIMIT, all_done, send_all},
};
use serde_json::Value;

const PROMPTS: usize = 200;

/// 200 random prompts that share prefixes give the same tokens, one after the other on one
/// aggregated worker, and many at once with prefill and decode in processes of their own, whatever
/// lane moves the blocks. The pools are small, so that blocks are evicted and prompts recomputed.
#[test]
fn disaggregated_equals_aggregated_token_for_token() -> Result<()> {
    let seed = fixtures::seed();
    for name in ["qwen3", "mistral-swa"] {
        let mut random = Random::new(seed);
        let prompts = sharing_prefixes(&mut random, PROMPTS, 160, requests::VOCABULARY);
        let bodies: Vec<Value> = prompts
            .iter()
            .map(|prompt| requests::completion(name, prompt, 12))
            .collect();

        let aggregated = run(name, &["--mode", "agg", "--threads", "1"], 1, &bodies)?;
        for lane in ["shm", "tcp"] {
            let arguments = [
                "--mode",
                "disagg-router",
                "--lane",
                lane,
                "--threads",
                "1",
                "--blocks",
                "128",
                "--worker-args",
                "--remote-prefill-min-tokens 1",
                "--frontend-args",
                "--remote-prefill-min-tokens 1",
            ];
            let disaggregated = run(name, &arguments, 8, &bodies)?;
            for (index, (one, other)) in aggregated.iter().zip(&disaggregated).enumerate() {
                ensure!(
                    one.tokens == other.tokens && one.text == other.text,
                    "{name} over {lane}, prompt {index} {:?}: {one:?} and {other:?}",
                    prompts[index]
                );
            }
        }
    }
    Ok(())
}

fn run(
    name: &str,
    arguments: &[&str],
    clients: usize,
    bodies: &[Value],
) -> Result<Vec<Completion>> {
    let cluster = ClusterBuilder::new()
        .checkpoint(&fixtures::checkpoint(name)?)
        .arguments(arguments)
        .up()?;
    let client = cluster.client();
    let start = health::wait_idle(&client, LIMIT)?;
    let completions = all_done(send_all(&client, clients, bodies)?)?;
    for completion in &completions {
        ensure!(completion.tokens.len() == 12, "{completion:?}");
    }
    let end = health::wait_idle(&client, LIMIT)?;
    ensure!(start == end, "the pools were {start:?} and are {end:?}");
    if clients > 1 {
        remote_prefill_was_used(&Health::read(&client)?)?;
    }
    cluster.stop()?;
    Ok(completions)
}

/// Without this the comparison could be one of local prefill with itself.
fn remote_prefill_was_used(health: &Health) -> Result<()> {
    for worker in &health.workers {
        for load in &worker.load {
            let worked = match worker.role.as_str() {
                "prefill" => load.prefill_tokens_total > 1000,
                _ => load.transfer_blocks_total > 100,
            };
            ensure!(worked, "remote prefill was hardly used: {health:?}");
        }
    }
    Ok(())
}
