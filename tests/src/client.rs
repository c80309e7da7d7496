//! A small OpenAI client that sorts every end of a request into an [`Outcome`].

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    ops::ControlFlow,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use ureq::Agent;

/// A client of one server.
#[derive(Clone, Debug)]
pub struct Client {
    agent: Agent,
    address: SocketAddr,
    deadline: Option<Duration>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// With all of its tokens.
    Done(Completion),
    /// With an HTTP status and an error in OpenAI's envelope.
    Refused {
        /// HTTP status.
        status: u16,
        /// The error.
        error: ApiError,
    },
    /// With an error event in a stream that had begun.
    Failed {
        /// The error.
        error: ApiError,
        /// What had come before it.
        so_far: Completion,
    },
    /// The client went away because it wanted to.
    Left(Completion),
    /// Without an answer that a client can use: connection cut, status without envelope, no `[DONE]`.
    Broken(String),
    /// Not within its limit.
    Hung(Duration),
}

/// A completion, put together from one body or from the events of a stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completion {
    /// The text.
    pub text: String,
    /// The tokens as `logprobs` of `/v1/completions` spells them, when the request asked for it.
    pub tokens: Vec<String>,
    /// `stop`, `length`, ...
    pub finish_reason: Option<String>,
    /// `usage`, when it came.
    pub usage: Option<Value>,
    /// Events with text or tokens (1 when not streamed).
    pub chunks: usize,
}

/// An error in OpenAI's envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// For people.
    pub message: String,
    /// Class.
    pub kind: String,
}

/// A plain HTTP answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: String,
}

impl Client {
    /// A client of the server at `address`. It opens a connection per request, so that none is
    /// shared between a request that is cut and the next one.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_idle_connections(0)
            .proxy(None)
            .build();
        Self {
            agent: config.into(),
            address,
            deadline: None,
        }
    }

    /// Asks the server to end each request within `deadline`, in tokens or in an error.
    #[must_use]
    pub const fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Where the server listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// `GET path`.
    ///
    /// # Errors
    /// No answer within `limit`.
    pub fn get(&self, path: &str, limit: Duration) -> Result<Answer> {
        let response = self
            .agent
            .get(self.url(path))
            .config()
            .timeout_global(Some(limit))
            .build()
            .call()
            .with_context(|| format!("GET {path}"))?;
        answer(response)
    }

    /// `POST path` with any bytes as a JSON body.
    ///
    /// # Errors
    /// No answer within `limit`.
    pub fn post(&self, path: &str, body: &[u8], limit: Duration) -> Result<Answer> {
        answer(
            self.send(path, body, limit)
                .with_context(|| format!("POST {path}"))?,
        )
    }

    /// Runs a request to its end. `stream` in `body` says in which form it is answered.
    #[must_use]
    pub fn run(&self, path: &str, body: &Value, limit: Duration) -> Outcome {
        self.run_with(path, body, limit, &mut |_| ControlFlow::Continue(()))
    }

    /// Like [`Self::run`]; calls `on_chunk` after each event of a stream with what has come so far.
    /// `Break` cuts the connection.
    pub fn run_with(
        &self,
        path: &str,
        body: &Value,
        limit: Duration,
        on_chunk: &mut dyn FnMut(&Completion) -> ControlFlow<()>,
    ) -> Outcome {
        let end = Instant::now() + limit;
        let response = match self.send(path, body.to_string().as_bytes(), limit) {
            Ok(response) => response,
            Err(ureq::Error::Timeout(_)) => return Outcome::Hung(limit),
            Err(error) => return Outcome::Broken(error.to_string()),
        };
        let status = response.status().as_u16();
        let streamed = response
            .headers()
            .get("content-type")
            .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        let mut reader = BufReader::new(response.into_body().into_reader());
        let result = if streamed && status == 200 {
            read_events(&mut reader, on_chunk)
        } else {
            read_body(&mut reader, status)
        };
        match result {
            Ok(outcome) => outcome,
            Err(_) if Instant::now() >= end => Outcome::Hung(limit),
            Err(error) => Outcome::Broken(format!("{error:#}")),
        }
    }

    /// Writes `request` to a new connection as it is and reads what comes back until the server closes,
    /// whether or not the server took all of it. Our side stays open.
    ///
    /// # Errors
    /// No HTTP answer within `limit`.
    pub fn raw(&self, request: &[u8], limit: Duration) -> Result<Answer> {
        let mut stream = TcpStream::connect_timeout(&self.address, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let mut reader = stream.try_clone()?;
        let (head, body) = std::thread::scope(|scope| {
            scope.spawn(|| {
                // A server may answer and close before it has read everything.
                stream.write_all(request).ok();
            });
            let mut bytes = Vec::new();
            let mut piece = [0; 4096];
            loop {
                match reader.read(&mut piece) {
                    Ok(0) => break,
                    Ok(n) => bytes.extend_from_slice(&piece[..n]),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // A reset after the answer is how a server refuses the rest of a body.
                    Err(_) => break,
                }
            }
            reader.shutdown(Shutdown::Both).ok();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            text.split_once("\r\n\r\n")
                .map(|(head, body)| (head.to_owned(), body.to_owned()))
                .with_context(|| format!("not an HTTP answer: {text:?}"))
        })?;
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .with_context(|| format!("no status in {head:?}"))?;
        Ok(Answer { status, body })
    }

    fn send(
        &self,
        path: &str,
        body: &[u8],
        limit: Duration,
    ) -> Result<ureq::http::Response<ureq::Body>, ureq::Error> {
        let mut request = self
            .agent
            .post(self.url(path))
            .header("content-type", "application/json");
        if let Some(deadline) = self.deadline {
            request = request.header("x-request-timeout-ms", deadline.as_millis().to_string());
        }
        request
            .config()
            .timeout_global(Some(limit))
            .build()
            .send(body)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

impl Outcome {
    /// The completion, if the request was served to its end.
    ///
    /// # Errors
    /// It was not; the message says how it ended.
    pub fn done(self) -> Result<Completion> {
        match self {
            Self::Done(completion) => Ok(completion),
            Self::Refused { .. }
            | Self::Failed { .. }
            | Self::Left(_)
            | Self::Broken(_)
            | Self::Hung(_) => bail!("expected a completion, got {self:?}"),
        }
    }

    /// Whether a client was told what became of its request: tokens, or an error it can read.
    #[must_use]
    pub const fn is_clear(&self) -> bool {
        matches!(
            self,
            Self::Done(_) | Self::Refused { .. } | Self::Failed { .. } | Self::Left(_)
        )
    }
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// It is not JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body)
            .with_context(|| format!("status {} with {:?}", self.status, self.body))
    }

    /// The error of the body.
    ///
    /// # Errors
    /// The body is not an error in OpenAI's envelope.
    pub fn error(&self) -> Result<ApiError> {
        api_error(&self.json()?)
            .with_context(|| format!("no error envelope: {} {}", self.status, self.body))
    }
}

fn answer(response: ureq::http::Response<ureq::Body>) -> Result<Answer> {
    let status = response.status().as_u16();
    let body = response.into_body().read_to_string()?;
    Ok(Answer { status, body })
}

fn read_body(reader: &mut dyn Read, status: u16) -> Result<Outcome> {
    let mut body = String::new();
    reader.read_to_string(&mut body)?;
    let value: Value =
        serde_json::from_str(&body).with_context(|| format!("status {status} with {body:?}"))?;
    if let Some(error) = api_error(&value) {
        return Ok(Outcome::Refused { status, error });
    }
    ensure!(status == 200, "status {status} without an error: {body}");
    let mut completion = Completion::default();
    completion.add(&value);
    Ok(Outcome::Done(completion))
}

fn read_events(
    reader: &mut dyn BufRead,
    on_chunk: &mut dyn FnMut(&Completion) -> ControlFlow<()>,
) -> Result<Outcome> {
    let mut completion = Completion::default();
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            bail!("the stream ended without [DONE] after {completion:?}");
        }
        let Some(data) = line.strip_prefix("data:").map(str::trim) else {
            continue;
        };
        if data == "[DONE]" {
            return Ok(Outcome::Done(completion));
        }
        let value: Value = serde_json::from_str(data).with_context(|| format!("event {data:?}"))?;
        if let Some(error) = api_error(&value) {
            return Ok(Outcome::Failed {
                error,
                so_far: completion,
            });
        }
        completion.add(&value);
        if on_chunk(&completion).is_break() {
            return Ok(Outcome::Left(completion));
        }
    }
}

fn api_error(value: &Value) -> Option<ApiError> {
    let error = value.get("error")?;
    Some(ApiError {
        message: error.get("message")?.as_str()?.to_owned(),
        kind: error.get("type")?.as_str()?.to_owned(),
    })
}

impl Completion {
    fn add(&mut self, value: &Value) {
        if let Some(usage) = value.get("usage").filter(|usage| !usage.is_null()) {
            self.usage = Some(usage.clone());
        }
        let Some(choice) = value.pointer("/choices/0") else {
            return;
        };
        let text = ["/text", "/message/content", "/delta/content"]
            .iter()
            .find_map(|path| choice.pointer(path)?.as_str());
        let tokens = choice.pointer("/logprobs/tokens").and_then(Value::as_array);
        let before = (self.text.len(), self.tokens.len());
        self.text.push_str(text.unwrap_or_default());
        self.tokens
            .extend(tokens.into_iter().flatten().map(spelled));
        self.chunks += usize::from(before != (self.text.len(), self.tokens.len()));
        if let Some(reason) = choice.get("finish_reason").and_then(Value::as_str) {
            self.finish_reason = Some(reason.to_owned());
        }
    }
}

fn spelled(token: &Value) -> String {
    token
        .as_str()
        .map_or_else(|| token.to_string(), str::to_owned)
}
