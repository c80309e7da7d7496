//! What two vLLM workers do for ordinary clients: the same tokens as vLLM alone, conversations that find
//! their cache.

use anyhow::{Result, ensure};
use blockplane_tests::{prompts::Random, requests, traffic::LIMIT};
use serde_json::{Value, json};

use crate::scene::{MODEL, Scene, Server, done, for_vllm, usage};

#[test]
#[ignore = "needs a vLLM: tests/run vllm"]
fn vllm_behind_the_frontend() -> Result<()> {
    let scene = Scene::new(2)?;
    tokens_are_those_of_vllm_alone(&scene)?;
    the_second_turn_goes_where_the_first_went(&scene)?;
    scene.end()
}

fn tokens_are_those_of_vllm_alone(scene: &Scene) -> Result<()> {
    let servers = scene.servers()?;
    let mut random = Random::new(7);
    let mut bodies: Vec<(&str, Value)> = [3, 31, 32, 33, 100, 700]
        .map(|tokens| {
            let prompt = random.tokens(tokens, requests::BUNDLED_VOCABULARY);
            ("/v1/completions", requests::completion(MODEL, &prompt, 24))
        })
        .into();
    for text in [
        "Hello!",
        "What is a block?",
        "Say this backwards: one two three",
    ] {
        bodies.push(("/v1/chat/completions", requests::chat(MODEL, text, 32)));
    }
    let mut streamed =
        requests::streamed(MODEL, &random.tokens(50, requests::BUNDLED_VOCABULARY), 24);
    streamed["ignore_eos"] = json!(false);
    bodies.push(("/v1/completions", streamed));
    for (path, body) in &bodies {
        // Both compute the whole prompt: a cached one is other arithmetic.
        servers.iter().try_for_each(Server::forget)?;
        let alone = done(servers[0].client.run(path, &for_vllm(body.clone()), LIMIT))?;
        servers.iter().try_for_each(Server::forget)?;
        let ours = done(scene.client.run(path, body, LIMIT))?;
        ensure!(
            ours.tokens == alone.tokens,
            "{body}: {ours:?}, vLLM alone {alone:?}"
        );
        // vLLM repeats the end of a prompt that ends within a character, as one of random tokens may.
        let same_text = ours.text == alone.text || !path.ends_with("/chat/completions");
        ensure!(same_text, "{body}: {ours:?}, vLLM alone {alone:?}");
        ensure!(
            ours.finish_reason == alone.finish_reason,
            "{body}: {ours:?}, {alone:?}"
        );
        for part in ["prompt_tokens", "completion_tokens"] {
            let (ours, alone) = (usage(&ours, &[part]), usage(&alone, &[part]));
            ensure!(ours == alone, "{body}: {part} {ours}, vLLM alone {alone}");
        }
    }
    eprintln!("{} requests gave the tokens of vLLM alone", bodies.len());
    Ok(())
}

/// Eight conversations; by chance, all of their second turns would go to the right one of two workers
/// once in 256 times.
fn the_second_turn_goes_where_the_first_went(scene: &Scene) -> Result<()> {
    let servers = scene.servers()?;
    servers.iter().try_for_each(Server::forget)?;
    let before = served(&servers)?;
    let mut random = Random::new(8);
    let first: Vec<Vec<u64>> = (0..8)
        .map(|_| random.tokens(200, requests::BUNDLED_VOCABULARY))
        .collect();
    let bodies: Vec<Value> = first
        .iter()
        .map(|prompt| requests::completion(MODEL, prompt, 8))
        .collect();
    // At once, so that both workers get some.
    let threads: Vec<_> = bodies
        .into_iter()
        .map(|body| {
            let client = scene.client.clone();
            std::thread::spawn(move || client.run("/v1/completions", &body, LIMIT))
        })
        .collect();
    for thread in threads {
        done(
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))?,
        )?;
    }
    let after = served(&servers)?;
    let shares: Vec<f64> = after
        .iter()
        .zip(&before)
        .map(|(after, before)| after - before)
        .collect();
    ensure!(
        shares.iter().all(|share| *share >= 2.0),
        "shares of the first turns: {shares:?}"
    );
    // Its blocks, but for the last that is not full.
    let mut cached = Vec::new();
    for prompt in &first {
        // A router also looks at the load, and that of a quarter of a second ago.
        scene.wait_idle()?;
        let more = random.tokens(30, requests::BUNDLED_VOCABULARY);
        let body = requests::completion(MODEL, &[&prompt[..], &more].concat(), 4);
        let answer = done(scene.client.run("/v1/completions", &body, LIMIT))?;
        cached.push(usage(&answer, &["prompt_tokens_details", "cached_tokens"]));
    }
    eprintln!("first turns went {shares:?}; cached tokens of the second turns: {cached:?}");
    if !cached.iter().all(|tokens| *tokens >= 192) {
        let metrics = scene.client.get("/metrics", LIMIT)?.body;
        let about = |line: &&str| {
            line.contains("kv_events") || line.contains("router") || line.contains("index")
        };
        metrics
            .lines()
            .filter(about)
            .for_each(|line| eprintln!("{line}"));
        anyhow::bail!("not all of the second turns went where the first went: {cached:?}");
    }
    Ok(())
}

fn served(servers: &[Server]) -> Result<Vec<f64>> {
    servers
        .iter()
        .map(|server| server.metric("vllm:request_success_total"))
        .collect()
}
