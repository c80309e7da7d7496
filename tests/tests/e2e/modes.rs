//! The five launch patterns.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use blockplane_tests::{
    ClusterBuilder, Role,
    client::Completion,
    health::{self, Health},
    prompts::Random,
    requests,
    traffic::{LIMIT, all_done, send_all},
};

const MODEL: &str = "blockplane-tiny";

/// Each mode runs the processes it says, serves every API in both forms, and gives the same tokens.
#[test]
fn all_modes_serve_the_same_tokens() -> Result<()> {
    let mut first: Option<Vec<Completion>> = None;
    for (mode, prefill, decode, aggregated) in [
        ("agg", 0, 0, 2),
        ("agg-router", 0, 0, 2),
        ("disagg", 2, 2, 0),
        ("disagg-router", 2, 2, 0),
        ("dep", 0, 0, 1),
    ] {
        eprintln!("mode {mode}");
        let mut arguments = vec![
            "--mode",
            mode,
            "--decode",
            "2",
            "--threads",
            "1",
            "--blocks",
            "512",
        ];
        if prefill > 0 {
            arguments.extend(["--prefill", "2"]);
        }
        let mut cluster = ClusterBuilder::new().arguments(&arguments).up()?;
        cluster.wait_ready("every worker", |health| {
            health.count("prefill") == prefill
                && health.count("decode") == decode
                && health.count("aggregated") == aggregated
        })?;
        for (role, count) in [
            (Role::Prefill, prefill),
            (Role::Decode, decode),
            (Role::Aggregated, aggregated),
        ] {
            let found = cluster.processes(role).len();
            ensure!(
                found == count,
                "{mode}: {found} {role:?} processes, wanted {count}"
            );
        }

        let client = cluster.client();
        let mut random = Random::new(7);
        let prompts: Vec<Vec<u64>> = (0..8)
            .map(|_| random.tokens(100, requests::VOCABULARY))
            .collect();
        let bodies: Vec<_> = prompts
            .iter()
            .map(|prompt| requests::completion(MODEL, prompt, 12))
            .collect();
        let mut completions = all_done(send_all(&client, 4, &bodies)?)?;
        let streamed: Vec<_> = prompts
            .iter()
            .map(|prompt| requests::streamed(MODEL, prompt, 12))
            .collect();
        for (whole, stream) in completions
            .iter()
            .zip(all_done(send_all(&client, 4, &streamed)?)?)
        {
            ensure!(whole.text == stream.text, "{mode}: {whole:?} {stream:?}");
            ensure!(
                whole.tokens == stream.tokens,
                "{mode}: {whole:?} {stream:?}"
            );
            ensure!(stream.usage.is_some(), "{mode}: a stream without its usage");
        }
        let mut chat = requests::chat(MODEL, "Größe? 你好 🌊", 12);
        completions.push(client.run("/v1/chat/completions", &chat, LIMIT).done()?);
        chat["stream"] = true.into();
        let stream = client.run("/v1/chat/completions", &chat, LIMIT).done()?;
        ensure!(
            stream.text == completions[8].text,
            "{mode}: chat {stream:?} {completions:?}"
        );

        for completion in &mut completions {
            completion.usage = None;
        }
        match &first {
            None => first = Some(completions),
            Some(first) => ensure!(*first == completions, "{mode}: {first:?} {completions:?}"),
        }
        health::wait_idle(&client, LIMIT)?;
        work_is_spread(mode, &Health::read(&client)?)?;
        cluster.stop()?;
    }
    Ok(())
}

/// In turn, every worker has worked. By cache and load, every rank of the aggregated modes has: eight
/// prompts that share nothing leave no other reason to choose.
fn work_is_spread(mode: &str, health: &Health) -> Result<()> {
    let loads = health.workers.iter().flat_map(|worker| &worker.load);
    let idle = loads.filter(|load| load.prefill_tokens_total + load.decode_tokens_total == 0);
    ensure!(
        idle.count() == 0 || mode == "disagg-router",
        "{mode}: {health:?}"
    );
    if mode == "dep" {
        let ranks: BTreeSet<u32> = health.workers[0].load.iter().map(|l| l.rank.0).collect();
        ensure!(ranks == BTreeSet::from([0, 1]), "{health:?}");
    }
    if mode.starts_with("disagg") {
        let blocks: u64 = health
            .workers
            .iter()
            .filter(|worker| worker.role == "decode")
            .flat_map(|worker| &worker.load)
            .map(|load| load.transfer_blocks_total)
            .sum();
        ensure!(
            blocks > 0,
            "{mode}: no block came from a prefill worker: {health:?}"
        );
    }
    Ok(())
}

/// A router that knows who holds a prefix sends its continuation there.
#[test]
fn a_known_prefix_goes_to_the_worker_that_holds_it() -> Result<()> {
    let cluster = ClusterBuilder::new()
        .arguments(&[
            "--mode",
            "agg-router",
            "--decode",
            "3",
            "--threads",
            "1",
            "--blocks",
            "512",
        ])
        .up()?;
    let client = cluster.client();
    let mut random = Random::new(11);
    let shared = random.tokens(320, requests::VOCABULARY);
    let served = client
        .run(
            "/v1/completions",
            &requests::completion(MODEL, &shared, 1),
            LIMIT,
        )
        .done()?;
    ensure!(served.finish_reason.is_some());
    let cached = |health: &Health| -> u64 {
        health
            .workers
            .iter()
            .flat_map(|worker| &worker.load)
            .map(|load| load.cached_tokens_total)
            .sum()
    };
    // The feed of KV events is on its way; the first continuation may come before it has arrived.
    for _ in 0..6 {
        let mut prompt = shared.clone();
        prompt.extend(random.tokens(20, requests::VOCABULARY));
        client
            .run(
                "/v1/completions",
                &requests::completion(MODEL, &prompt, 1),
                LIMIT,
            )
            .done()?;
    }
    let found = blockplane_tests::wait::until("load reports", LIMIT, || {
        let health = Health::read(&client).map_err(|error| error.to_string())?;
        match cached(&health) {
            // By chance it would be a third of the six.
            tokens if tokens >= 4 * 320 => Ok(tokens),
            _ => Err(format!("{health:?}")),
        }
    })?;
    eprintln!("{found} tokens came from a cache");
    cluster.stop()
}
