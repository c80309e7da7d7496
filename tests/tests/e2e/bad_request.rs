//! Requests that cannot be served: one clear error each, and the next request is served.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blockplane_tests::{
    Client, ClusterBuilder, health, requests,
    requests::{BUNDLED_VOCABULARY, CONTEXT},
    traffic::LIMIT,
};
use serde_json::{Value, json};

const MODEL: &str = "blockplane-tiny";

fn with(key: &str, value: impl Into<Value>) -> Vec<u8> {
    let mut body = requests::completion(MODEL, &[1, 2, 3], 4);
    body[key] = value.into();
    body.to_string().into_bytes()
}

fn chat_with(key: &str, value: Value) -> Vec<u8> {
    let mut body = requests::chat(MODEL, "hi", 4);
    body[key] = value;
    body.to_string().into_bytes()
}

#[test]
fn each_bad_request_gets_one_clear_error() -> Result<()> {
    let cluster = ClusterBuilder::new()
        .arguments(&[
            "--threads",
            "1",
            "--blocks",
            "256",
            "--frontend-args",
            "--body-limit-mb 1",
        ])
        .up()?;
    let client = cluster.client();
    let start = health::wait_idle(&client, LIMIT)?;

    let completions = "/v1/completions";
    let chat = "/v1/chat/completions";
    let too_long: Vec<u64> = vec![5; usize::try_from(CONTEXT)? + 1];
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)).into_bytes();
    // Path, body, status, and a word that the message must hold.
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        (completions, with("prompt", json!(too_long)), 400, "4096"),
        (
            completions,
            with("prompt", json!([1, BUNDLED_VOCABULARY])),
            400,
            "4096",
        ),
        (completions, with("prompt", json!([])), 400, "prompt"),
        (completions, with("prompt", Value::Null), 400, "prompt"),
        (completions, with("max_tokens", -1), 400, "max_tokens"),
        (completions, with("max_tokens", 0), 400, "max_tokens"),
        (completions, with("max_tokens", 1.5), 400, "max_tokens"),
        (completions, with("temperature", -0.5), 400, "temperature"),
        (completions, with("temperature", "hot"), 400, "temperature"),
        (completions, with("top_p", 1.5), 400, "top_p"),
        (completions, with("n", 2), 400, "n is"),
        (completions, with("logprobs", 1000), 400, "logprobs"),
        (completions, with("stop", json!(["a", 5])), 400, "stop"),
        (
            completions,
            with("stop", json!(vec!["x"; 10_000])),
            400,
            "stop",
        ),
        (
            completions,
            with("logit_bias", json!({"99999": 1})),
            400,
            "logit_bias",
        ),
        (completions, with("seed", "x"), 400, "seed"),
        (completions, with("stream", "yes"), 400, "stream"),
        (
            completions,
            with("model", "no-such-model"),
            404,
            "no-such-model",
        ),
        (completions, b"".to_vec(), 400, "JSON"),
        (completions, b"{\"model\": ".to_vec(), 400, "JSON"),
        (completions, b"[1, 2]".to_vec(), 400, "object"),
        (
            completions,
            b"{\"model\": \"\xff\xfe\"}".to_vec(),
            400,
            "UTF-8",
        ),
        (completions, deep, 400, "JSON"),
        (completions, vec![b' '; 2 << 20], 413, "limit"),
        (chat, chat_with("messages", json!([])), 400, "messages"),
        (chat, chat_with("messages", json!("hi")), 400, "messages"),
        (
            chat,
            chat_with("messages", json!([{"content": "hi"}])),
            400,
            "role",
        ),
        (
            chat,
            chat_with("messages", json!([{"role": "user", "content": 5}])),
            400,
            "content",
        ),
        (chat, chat_with("max_tokens", json!(-1)), 400, "max_tokens"),
        ("/v1/nothing", b"{}".to_vec(), 404, "/v1/nothing"),
        ("/v1/models", b"{}".to_vec(), 405, "POST"),
    ];
    let mut wrong = Vec::new();
    for (path, body, status, word) in &cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        match refused(&client, path, body, *status, word) {
            Ok(()) => {}
            Err(error) => wrong.push(format!("POST {path} {shown}: {error:#}")),
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of {} cases:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );

    // Nothing of that is left behind, and the next request is served.
    let body = requests::completion(MODEL, &[1, 2, 3], 4);
    client.run(completions, &body, LIMIT).done()?;
    ensure!(health::wait_idle(&client, LIMIT)? == start);
    cluster.stop()
}

fn refused(client: &Client, path: &str, body: &[u8], status: u16, word: &str) -> Result<()> {
    let answer = client.post(path, body, LIMIT)?;
    let error = answer.error()?;
    ensure!(
        answer.status == status,
        "status {}, wanted {status}: {error:?}",
        answer.status
    );
    ensure!(
        error.message.contains(word),
        "no word {word:?} in {error:?}"
    );
    Ok(())
}

/// Odd but valid: served, not refused.
#[test]
fn odd_requests_are_served() -> Result<()> {
    let cluster = ClusterBuilder::new()
        .arguments(&["--mode", "agg", "--threads", "1"])
        .up()?;
    let client = cluster.client();
    for (key, value) in [
        // No token of the vocabulary spells these.
        ("stop", json!(["\u{1F9A7}\u{1F9A7}", "\u{0}", "never said"])),
        ("top_k", json!(100_000)),
        ("temperature", json!(2)),
        ("seed", json!(u64::MAX)),
        ("logit_bias", json!({"3": -100})),
        ("user", json!("somebody")),
        (
            "prompt",
            json!("a string \u{0} with everything 你好 \u{200d}🌊"),
        ),
    ] {
        let body: Value = serde_json::from_slice(&with(key, value.clone()))?;
        let completion = client
            .run("/v1/completions", &body, LIMIT)
            .done()
            .with_context(|| format!("{key} = {value}"))?;
        ensure!(completion.finish_reason.is_some(), "{completion:?}");
    }
    // As many tokens as fit: it ends by length, at the end of the context.
    let mut body = requests::completion(MODEL, &[5; 4000], 96);
    let completion = client.run("/v1/completions", &body, LIMIT).done()?;
    ensure!(
        completion.finish_reason.as_deref() == Some("length"),
        "{completion:?}"
    );
    body["max_tokens"] = json!(97);
    let answer = client.post("/v1/completions", body.to_string().as_bytes(), LIMIT)?;
    ensure!(answer.status == 400, "{answer:?}");
    cluster.stop()
}

/// A client that speaks no HTTP, half of it, or too slowly, costs nobody else anything.
#[test]
fn broken_connections_do_no_harm() -> Result<()> {
    let cluster = ClusterBuilder::new()
        .arguments(&[
            "--mode",
            "agg",
            "--threads",
            "1",
            "--frontend-args",
            "--body-limit-mb 1",
        ])
        .up()?;
    let client = cluster.client();
    for request in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nhost",
    ] {
        // Whatever the answer, if any: the server has to live on.
        let answer = client.raw(request, Duration::from_secs(1));
        eprintln!("{:?}: {answer:?}", String::from_utf8_lossy(request));
    }
    // A body that is announced as huge is refused before it is sent, where the client asks first.
    let announced =
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
        content-length: 99999999999\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n";
    let answer = client.raw(announced, Duration::from_secs(5))?;
    ensure!(answer.status == 413, "{answer:?}");
    answer.error()?;
    let body = requests::completion(MODEL, &[1, 2, 3], 4);
    client.run("/v1/completions", &body, LIMIT).done()?;
    cluster.stop()
}
