//! Deadlines and bounded queues, with a model that is slow on purpose.

use std::time::Duration;

use anyhow::{Result, ensure};
use blockplane_tests::{
    Cluster, ClusterBuilder, Outcome, Role, fixtures, health,
    prompts::Random,
    requests,
    traffic::{LIMIT, all_clear, send_all},
};
use serde_json::Value;

const MODEL: &str = "qwen3";

fn slow(worker: &[&str], workers: &[Role]) -> Result<Cluster> {
    ClusterBuilder::new()
        .checkpoint(&fixtures::checkpoint(MODEL)?)
        .worker_arguments(&["--engine", "mock", "--blocks", "256"])
        .worker_arguments(worker)
        .by_hand(workers)
}

fn bodies(count: usize, max_tokens: u32) -> Vec<Value> {
    let mut random = Random::new(3);
    (0..count)
        .map(|_| {
            let prompt = random.tokens(64, requests::VOCABULARY);
            requests::streamed(MODEL, &prompt, max_tokens)
        })
        .collect()
}

/// A request of minutes with a deadline of a second ends after about a second, in an error that says
/// so, and holds nothing afterwards. The bound here is generous; that it is not minutes is the point.
#[test]
fn a_deadline_ends_a_request_and_frees_its_blocks() -> Result<()> {
    let roles: [&[Role]; 2] = [&[Role::Aggregated], &[Role::Prefill, Role::Decode]];
    for workers in roles {
        let cluster = slow(&["--mock-decode-tokens-per-s", "3"], workers)?;
        let client = cluster.client().deadline(Duration::from_secs(1));
        let start = health::wait_idle(&client, LIMIT)?;
        for outcome in send_all(&client, 4, &bodies(4, 1000))? {
            let message = match &outcome {
                Outcome::Failed { error, so_far } => {
                    ensure!(so_far.tokens.len() < 20, "{outcome:?}");
                    &error.message
                }
                Outcome::Refused { status: 504, error } => &error.message,
                _ => anyhow::bail!("expected an error about the deadline, got {outcome:?}"),
            };
            let named = ["deadline", "time", "1000 ms"];
            ensure!(named.iter().any(|word| message.contains(word)), "{message}");
        }
        ensure!(health::wait_idle(&client, LIMIT)? == start);
        cluster.stop()?;
    }
    Ok(())
}

/// More requests than a worker takes: some are served, the others are told to come back, and the
/// worker takes new ones afterwards.
#[test]
fn overload_is_an_answer() -> Result<()> {
    let arguments = [
        "--mock-decode-tokens-per-s",
        "50",
        "--max-num-seqs",
        "1",
        "--max-waiting",
        "2",
    ];
    let cluster = slow(&arguments, &[Role::Aggregated])?;
    let client = cluster.client();
    let start = health::wait_idle(&client, LIMIT)?;
    let outcomes = send_all(&client, 12, &bodies(12, 40))?;
    all_clear(&outcomes)?;
    let mut served = 0;
    for outcome in &outcomes {
        match outcome {
            Outcome::Done(_) => served += 1,
            Outcome::Refused {
                status: 429 | 503, ..
            } => {}
            _ => anyhow::bail!("neither served nor told to come back: {outcome:?}"),
        }
    }
    ensure!((1..12).contains(&served), "{served} of 12 were served");
    ensure!(health::wait_idle(&client, LIMIT)? == start);
    client
        .run("/v1/completions", &bodies(1, 4)[0], LIMIT)
        .done()?;
    cluster.stop()
}
