//! A server that answers as vLLM does and computes nothing: each token comes at its time.
//!
//! HTTP/1.1 with lengths in requests and chunks in streams, as much as the two clients need.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::VllmArgs;

const MODEL: &str = "stand-in";
const BLOCK_TOKENS: u32 = 32;
const CONTEXT_TOKENS_MAX: u32 = 4_096;
/// Tokens that are generated, one after the other, from here: ordinary ones of any vocabulary.
const FIRST_TOKEN: u64 = 1_000;
const TOKENS: u64 = 64;
const BODY_BYTES_MAX: usize = 1 << 20;

/// The server. It ends when it is dropped.
#[derive(Debug)]
pub(super) struct StandIn {
    pub(super) url: String,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Settings {
    first: Duration,
    step: Duration,
    /// What it says it is.
    root: String,
}

impl StandIn {
    pub(super) async fn start(args: &VllmArgs) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let settings = Arc::new(Settings {
            first: Duration::from_millis(args.first_ms),
            step: Duration::from_millis(args.step_ms),
            root: args.model.display().to_string(),
        });
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let settings = Arc::clone(&settings);
                // A connection that breaks is the business of its other side.
                tokio::spawn(async move { serve(stream, &settings).await.ok() });
            }
        });
        Ok(Self { url, task })
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(stream: TcpStream, settings: &Settings) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).context("no path")?.to_owned();
        let mut length = 0;
        loop {
            line.clear();
            stream.read_line(&mut line).await?;
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse::<usize>()?;
            }
        }
        anyhow::ensure!(length <= BODY_BYTES_MAX, "a body of {length} bytes");
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let arrived = Instant::now();
        match path.as_str() {
            "/v1/completions" | "/inference/v1/generate" => {
                generate(&mut stream, settings, &path, &body, arrived).await?;
            }
            _ => document(&mut stream, settings, &path).await?,
        }
    }
}

async fn document(
    stream: &mut BufReader<TcpStream>,
    settings: &Settings,
    path: &str,
) -> anyhow::Result<()> {
    let (status, kind, body) = match path {
        "/health" => ("200 OK", "text/plain", String::new()),
        "/version" => json_document(&json!({"version": "0.32.0"})),
        "/v1/models" => json_document(&json!({"object": "list", "data": [
            {"id": MODEL, "object": "model", "root": settings.root, "parent": null, "max_model_len": CONTEXT_TOKENS_MAX}
        ]})),
        "/openapi.json" => {
            json_document(&json!({"paths": {"/inference/v1/generate": {}, "/v1/completions": {}}}))
        }
        "/metrics" => (
            "200 OK",
            "text/plain",
            format!(
                "vllm:cache_config_info{{block_size=\"{BLOCK_TOKENS}\",cache_dtype=\"auto\",\
             enable_prefix_caching=\"True\",engine=\"0\",num_gpu_blocks=\"65536\"}} 1.0\n\
             vllm:num_requests_running{{engine=\"0\"}} 0.0\nvllm:num_requests_waiting{{engine=\"0\"}} 0.0\n"
            ),
        ),
        _ => ("404 Not Found", "application/json", "{}".to_owned()),
    };
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n");
    stream
        .write_all([head.as_bytes(), body.as_bytes()].concat().as_slice())
        .await?;
    Ok(())
}

fn json_document(value: &Value) -> (&'static str, &'static str, String) {
    ("200 OK", "application/json", value.to_string())
}

/// Streams the tokens at their times, counted from the arrival of the request.
async fn generate(
    stream: &mut BufReader<TcpStream>,
    settings: &Settings,
    path: &str,
    body: &[u8],
    arrived: Instant,
) -> anyhow::Result<()> {
    let request: Value = serde_json::from_slice(body)?;
    let (prompt, max_tokens) = if path == "/v1/completions" {
        (&request["prompt"], &request["max_tokens"])
    } else {
        (
            &request["token_ids"],
            &request["sampling_params"]["max_tokens"],
        )
    };
    let prompt_tokens = prompt.as_array().map_or(0, Vec::len);
    let tokens = max_tokens.as_u64().unwrap_or(16).max(1);
    let streamed = request["stream"] == true;
    let usage = json!({
        "prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens as u64 + tokens,
    });
    let ids = (0..tokens).map(|number| FIRST_TOKEN + number % TOKENS);
    if !streamed {
        sleep_until(arrived + settings.first).await;
        let choice = json!({"index": 0, "text": "x", "token_ids": ids.collect::<Vec<_>>(), "finish_reason": "length"});
        let answer =
            json!({"id": "s", "model": MODEL, "choices": [choice], "usage": usage}).to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            answer.len()
        );
        stream.write_all([head, answer].concat().as_bytes()).await?;
        return Ok(());
    }
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let mut due = arrived + settings.first;
    for (number, id) in (1..).zip(ids) {
        sleep_until(due).await;
        due += settings.step;
        let finish = if number == tokens {
            "\"length\""
        } else {
            "null"
        };
        let event = format!(
            "data: {{\"id\":\"s\",\"object\":\"text_completion\",\"model\":\"{MODEL}\",\"choices\":[{{\"index\":0,\
             \"text\":\"x\",\"token_ids\":[{id}],\"logprobs\":null,\"finish_reason\":{finish}}}]}}\n\n"
        );
        chunk(stream, &event).await?;
    }
    let last = json!({"id": "s", "model": MODEL, "choices": [], "usage": usage});
    chunk(stream, &format!("data: {last}\n\ndata: [DONE]\n\n")).await?;
    stream.write_all(b"0\r\n\r\n").await?;
    Ok(())
}

async fn chunk(stream: &mut BufReader<TcpStream>, text: &str) -> anyhow::Result<()> {
    let bytes = format!("{:x}\r\n{text}\r\n", text.len());
    stream.write_all(bytes.as_bytes()).await?;
    Ok(())
}
