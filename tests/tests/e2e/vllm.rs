//! All launch patterns with vLLM behind them, which `tests/python/vllm_stand_in.py` plays.

use anyhow::{Result, ensure};
use blockplane_tests::{
    ClusterBuilder, Role, client::Completion, fixtures, requests, traffic::LIMIT,
};

const MODEL: &str = "blockplane-tiny";

fn stand_in() -> String {
    let program = fixtures::repository().join("tests/python/vllm_stand_in.py");
    program.display().to_string()
}

/// Each mode starts its servers, serves every API, gives the same tokens, and leaves nothing behind.
#[test]
fn all_modes_serve_the_same_tokens() -> Result<()> {
    let program = stand_in();
    let prompt: Vec<u64> = (0..200).map(|i| 20 + i % 400).collect();
    let mut first: Option<Completion> = None;
    for (mode, workers, servers) in [
        ("agg", Role::Aggregated, 2),
        ("agg-router", Role::Aggregated, 2),
        ("disagg", Role::Decode, 3),
        ("disagg-router", Role::Decode, 3),
        ("dep", Role::Aggregated, 1),
    ] {
        eprintln!("mode {mode}");
        let frontend = "--remote-prefill-min-tokens 1";
        let arguments = [
            "--mode",
            mode,
            "--decode",
            "2",
            "--engine",
            "vllm",
            "--vllm-program",
            &program,
            "--frontend-args",
            frontend,
            "--",
            "--max-model-len",
            "2048",
            "--block-size",
            "32",
        ];
        let cluster = ClusterBuilder::new().arguments(&arguments).up()?;
        let wanted = if mode == "dep" { 1 } else { 2 };
        ensure!(cluster.processes(workers).len() == wanted, "{mode}");
        let played = cluster.all_processes();
        let played = played
            .iter()
            .filter(|entry| entry.arguments.get(1).is_some_and(|word| *word == program));
        ensure!(
            played.count() == servers,
            "{mode}: {:?}",
            cluster.all_processes()
        );

        let client = cluster.client();
        let models = client.get("/v1/models", LIMIT)?.json()?;
        ensure!(models["data"][0]["id"] == MODEL, "{models}");
        let body = requests::streamed(MODEL, &prompt, 8);
        let mut found = client.run("/v1/completions", &body, LIMIT).done()?;
        let usage = found.usage.take().unwrap_or_default();
        ensure!(usage["completion_tokens"] == 8, "{mode}: {usage}");
        found.chunks = 0;
        match &first {
            None => first = Some(found),
            Some(first) => ensure!(*first == found, "{mode}: {found:?}, {first:?}"),
        }
        let chat = requests::chat(MODEL, "hello", 4);
        client.run("/v1/chat/completions", &chat, LIMIT).done()?;
        cluster.stop()?;
    }
    Ok(())
}

/// A mode that routes by prefixes needs some.
#[test]
fn routing_by_prefix_without_a_cache_is_refused() -> Result<()> {
    let program = stand_in();
    let cluster = ClusterBuilder::new().empty()?;
    let arguments = [
        "up",
        "--engine",
        "vllm",
        "--vllm-program",
        &program,
        "--mode",
        "agg-router",
        "--http-port",
        "0",
        "--",
        "--no-enable-prefix-caching",
    ];
    let mut up = cluster.start("up", &arguments.map(str::to_owned))?;
    let status = up.wait(LIMIT)?;
    let log = up.log().join("\n");
    ensure!(
        !status.success() && log.contains("routes by cached prefixes"),
        "{log}"
    );
    Ok(())
}
