//! One streamed request to an OpenAI-compatible server, with the time of every piece.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{Method, StatusCode};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::client::{EventStream, Server, StreamError};

/// Endpoint to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// Talks to one server. Clones share its connections.
#[derive(Clone, Debug)]
pub(super) struct Client {
    server: Server,
    api: Api,
    model: String,
    ignore_eos: bool,
    timeout: Duration,
}

/// What became of a request.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// From the start to the first text.
    pub(super) ttft: Duration,
    /// Between one piece of text and the next.
    pub(super) gaps: Vec<Duration>,
    /// From the start to the end of the stream.
    pub(super) total: Duration,
    pub(super) usage: Usage,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Failure {
    /// No connection, or it broke before the answer started.
    Connection,
    /// Not finished in time.
    Timeout,
    /// An HTTP status other than 200.
    Status(u16),
    /// The stream carried an error.
    InStream,
    /// The stream ended without a finish reason.
    Incomplete,
    /// The stream was not what the API promises.
    Malformed,
    /// Not sent: too many in flight.
    NotSent,
}

/// Token counts as the server reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
    pub(super) prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct PromptDetails {
    pub(super) cached_tokens: u32,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Chunk {
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
}

impl Client {
    pub(super) fn new(
        url: &str,
        api: Api,
        stop_at_eos: bool,
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            server: Server::new(url, timeout)?,
            api,
            model: String::new(),
            ignore_eos: !stop_at_eos,
            timeout,
        })
    }

    /// Takes the model to ask for, or the first that the server has.
    pub(super) async fn find_model(&mut self, name: Option<&str>) -> anyhow::Result<()> {
        if let Some(name) = name {
            name.clone_into(&mut self.model);
            return Ok(());
        }
        let models = self.server.models().await?;
        let Some(first) = models.first() else {
            bail!(
                "{} lists no model; name one with --model",
                self.server.base()
            );
        };
        first.clone_into(&mut self.model);
        Ok(())
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// How many tokens the server counts for a prompt, template included.
    pub(super) async fn count_tokens(&self, prompt: &str) -> anyhow::Result<Option<u32>> {
        let body = self.body(prompt, 1, false);
        let answer = self
            .server
            .post(self.api.path(), body)
            .await
            .with_context(|| format!("a first request to {} failed", self.server.base()))?;
        let tokens = answer["usage"]["prompt_tokens"].as_u64();
        Ok(tokens.and_then(|tokens| u32::try_from(tokens).ok()))
    }

    /// Sends a prompt and reads the stream to its end. Times count from `start`.
    pub(super) async fn generate(
        &self,
        prompt: &str,
        output_tokens: u32,
        start: Instant,
    ) -> Result<Answer, Failure> {
        let body = self.body(prompt, output_tokens, true);
        tokio::time::timeout(self.timeout, async {
            let response = self
                .server
                .send(Method::POST, self.api.path(), body)
                .await
                .map_err(|_| Failure::Connection)?;
            if response.status() != StatusCode::OK {
                return Err(Failure::Status(response.status().as_u16()));
            }
            read_stream(response.into_body(), start).await
        })
        .await
        .unwrap_or(Err(Failure::Timeout))
    }

    fn body(&self, prompt: &str, output_tokens: u32, stream: bool) -> Bytes {
        let mut body = json!({
            "model": self.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": stream,
        });
        match self.api {
            Api::Chat => body["messages"] = json!([{ "role": "user", "content": prompt }]),
            Api::Completions => body["prompt"] = json!(prompt),
        }
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        if stream {
            body["stream_options"] = json!({ "include_usage": true });
        }
        Bytes::from(body.to_string())
    }
}

impl Api {
    const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
        }
    }
}

impl Failure {
    pub(super) fn name(self) -> String {
        match self {
            Self::Connection => "connection".to_owned(),
            Self::Timeout => "timeout".to_owned(),
            Self::Status(code) => format!("status_{code}"),
            Self::InStream => "in_stream".to_owned(),
            Self::Incomplete => "incomplete".to_owned(),
            Self::Malformed => "malformed".to_owned(),
            Self::NotSent => "not_sent".to_owned(),
        }
    }
}

impl Choice {
    fn has_text(&self) -> bool {
        let delta = self
            .delta
            .iter()
            .flat_map(|delta| [&delta.content, &delta.reasoning_content]);
        std::iter::once(&self.text)
            .chain(delta)
            .flatten()
            .any(|text| !text.is_empty())
    }
}

async fn read_stream(body: Incoming, start: Instant) -> Result<Answer, Failure> {
    let mut events = EventStream::new(body);
    let mut first: Option<Instant> = None;
    let mut last = start;
    let mut gaps = Vec::new();
    let mut usage = Usage::default();
    let mut finished = false;
    while let Some(event) = events.next().await? {
        let now = Instant::now();
        let chunk: Chunk = serde_json::from_value(event).map_err(|_| Failure::Malformed)?;
        if chunk.error.is_some() {
            return Err(Failure::InStream);
        }
        usage = chunk.usage.unwrap_or(usage);
        finished |= chunk.choices.iter().any(|c| c.finish_reason.is_some());
        if chunk.choices.iter().any(Choice::has_text) {
            if first.is_some() {
                gaps.push(now - last);
            }
            first.get_or_insert(now);
            last = now;
        }
    }
    if !finished {
        return Err(Failure::Incomplete);
    }
    let end = Instant::now();
    Ok(Answer {
        ttft: first.unwrap_or(end) - start,
        gaps,
        total: end - start,
        usage,
    })
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Broken(_) => Self::Incomplete,
            StreamError::Malformed => Self::Malformed,
        }
    }
}
