//! The same streamed requests to any of the two servers.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use http::Method;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::timeout};

use super::{Run, VllmArgs};
use crate::{
    client::{EventStream, Server},
    report::Samples,
};

/// Prompts are made of these: ordinary tokens of any vocabulary.
const TOKENS: std::ops::Range<u32> = 300..3_000;

#[derive(Clone, Debug)]
pub(super) struct Client {
    server: Server,
    model: String,
    timeout: Duration,
    input_tokens: u32,
    output_tokens: u32,
}

impl Client {
    pub(super) async fn new(url: &str, timeout: Duration, args: &VllmArgs) -> anyhow::Result<Self> {
        let server = Server::new(url, timeout)?;
        let model = server.models().await?.into_iter().next();
        Ok(Self {
            server,
            model: model.with_context(|| format!("{url} serves no model"))?,
            timeout,
            input_tokens: args.input_tokens,
            output_tokens: args.output_tokens,
        })
    }

    /// `clients` at a time, each with `requests` one after the other.
    pub(super) async fn run(
        &self,
        clients: usize,
        requests: usize,
        seed: u64,
    ) -> anyhow::Result<Run> {
        let mut tasks = JoinSet::new();
        for client in 0..clients as u64 {
            let own = self.clone();
            tasks.spawn(async move {
                let mut times = Vec::with_capacity(requests);
                let mut random = StdRng::seed_from_u64(seed.rotate_left(17) ^ client);
                for _ in 0..requests {
                    let prompt = (0..own.input_tokens).map(|_| random.random_range(TOKENS));
                    times.push(own.request(prompt.collect()).await?);
                }
                anyhow::Ok(times)
            });
        }
        let (mut ttft, mut token) = (Samples::default(), Samples::default());
        while let Some(times) = tasks.join_next().await {
            for (first, later) in times.context("a client ended early")?? {
                ttft.push(first);
                token.push(later);
            }
        }
        Ok(Run {
            ttft: ttft.median(),
            token: token.median(),
        })
    }

    /// Milliseconds to the first token, and for each later one on average.
    async fn request(&self, prompt: Vec<u32>) -> anyhow::Result<(f64, f64)> {
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": self.output_tokens, "temperature": 0,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        });
        let path = "/v1/completions";
        let answer = async {
            let start = Instant::now();
            let body = body.to_string().into();
            let response = self.server.send(Method::POST, path, body).await?;
            ensure!(response.status() == 200, "status {}", response.status());
            let mut events = EventStream::new(response.into_body());
            let (mut first, mut last, mut usage) = (None, start, Value::Null);
            while let Some(event) = events.next().await? {
                ensure!(event.get("error").is_none_or(Value::is_null), "{event}");
                let now = Instant::now();
                if event["choices"]
                    .as_array()
                    .is_some_and(|choices| !choices.is_empty())
                {
                    first.get_or_insert(now);
                    last = now;
                }
                if !event["usage"].is_null() {
                    usage = event["usage"].clone();
                }
            }
            let tokens = usage["completion_tokens"].as_u64();
            ensure!(tokens == Some(self.output_tokens.into()), "usage {usage}");
            let first = first.context("no token came")?;
            let later = last - first;
            Ok((
                millis(first - start),
                millis(later) / f64::from(self.output_tokens - 1),
            ))
        };
        timeout(self.timeout, answer)
            .await
            .with_context(|| format!("no answer within {:?}", self.timeout))?
            .with_context(|| format!("a request to {}", self.server.base()))
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
