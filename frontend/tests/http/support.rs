//! A server with a scripted service, a checkpoint whose tokens are bytes, and a plain HTTP client.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use blockplane_frontend::{FrameStream, Frontend, FrontendConfig, ModelService, ServiceStatus};
use blockplane_protocol::{
    DType, FinishReason, GenerateError, GenerateRequest, KvLayout, ModelCard, TokenFrame,
    TokenOutput, Usage, WorkerRole,
};
use futures::{Stream, StreamExt as _, stream};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, oneshot},
    task::JoinHandle,
    time::timeout,
};

/// Most time that a step of a test may take; it only bounds how long a failure takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const MODEL: &str = "org/byte-model";
pub(crate) const IM_START: u32 = 256;
pub(crate) const IM_END: u32 = 257;
pub(crate) const VOCABULARY: u32 = 258;
pub(crate) const CONTEXT: u32 = 1000;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}\
     {% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}<|im_end|>\
     {% endfor %}{% if tools %}T{{ tools | length }}{% endif %}\
     {% if add_generation_prompt %}<|im_start|>{% endif %}";

type Behaviour = dyn FnMut(&GenerateRequest) -> Result<FrameStream, GenerateError> + Send + 'static;

/// A service that does what a test tells it.
pub(crate) struct Script {
    pub(crate) models: Mutex<Vec<Arc<ModelCard>>>,
    pub(crate) status: Mutex<ServiceStatus>,
    behaviour: Mutex<Box<Behaviour>>,
    requests: Mutex<VecDeque<GenerateRequest>>,
    /// One permit for each stream that was dropped.
    dropped: Arc<Semaphore>,
    /// `generate` waits for a permit of this.
    pub(crate) gate: Semaphore,
    /// One permit for each call of `generate` that has begun.
    pub(crate) called: Semaphore,
}

#[async_trait]
impl ModelService for Script {
    fn models(&self) -> Vec<Arc<ModelCard>> {
        self.models.lock().unwrap().clone()
    }

    async fn generate(&self, request: GenerateRequest) -> Result<FrameStream, GenerateError> {
        self.called.add_permits(1);
        self.gate.acquire().await.unwrap().forget();
        let stream = (self.behaviour.lock().unwrap())(&request);
        self.requests.lock().unwrap().push_back(request);
        let stream = Tracked {
            stream: stream?,
            dropped: Arc::clone(&self.dropped),
        };
        Ok(Box::pin(stream))
    }

    fn status(&self) -> ServiceStatus {
        self.status.lock().unwrap().clone()
    }
}

/// Reports its drop.
struct Tracked {
    stream: FrameStream,
    dropped: Arc<Semaphore>,
}

impl Stream for Tracked {
    type Item = Result<TokenFrame, GenerateError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stream.as_mut().poll_next(cx)
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.dropped.add_permits(1);
    }
}

/// A running frontend.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) script: Arc<Script>,
    pub(crate) checkpoint: TempDir,
    shutdown: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
}

/// A whole response.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

/// A response that is being read.
pub(crate) struct Open {
    stream: TcpStream,
    pub(crate) received: String,
}

impl Server {
    /// A frontend whose service answers with `text`.
    pub(crate) async fn saying(text: &str) -> Self {
        let server = Self::start(FrontendConfig::default()).await;
        server.say(text);
        server
    }

    pub(crate) async fn start(config: FrontendConfig) -> Self {
        let checkpoint = checkpoint();
        let script = Arc::new(Script {
            models: Mutex::new(vec![Arc::new(card(&checkpoint))]),
            status: Mutex::new(ServiceStatus {
                ready: true,
                ..ServiceStatus::default()
            }),
            behaviour: Mutex::new(Box::new(|_| Ok(Box::pin(stream::pending())))),
            requests: Mutex::default(),
            dropped: Arc::new(Semaphore::new(0)),
            gate: Semaphore::new(1000),
            called: Semaphore::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service: Arc<dyn ModelService> = Arc::<Script>::clone(&script);
        let frontend = Frontend::new(config, service).unwrap();
        let (shutdown, stop) = oneshot::channel();
        let serving = tokio::spawn(async move {
            let stop = async {
                let _ = stop.await;
            };
            frontend.serve(listener, stop).await.unwrap();
        });
        Self {
            address,
            script,
            checkpoint,
            shutdown: Some(shutdown),
            serving,
        }
    }

    /// Makes the service answer each request with `text`, one token a frame, end token included.
    pub(crate) fn say(&self, text: &str) {
        let text = text.to_owned();
        self.answer(move |_| Ok(stream_of(speech(&text))));
    }

    pub(crate) fn answer(
        &self,
        behaviour: impl FnMut(&GenerateRequest) -> Result<FrameStream, GenerateError> + Send + 'static,
    ) {
        *self.script.behaviour.lock().unwrap() = Box::new(behaviour);
    }

    /// The oldest request that the service got and no test has looked at.
    pub(crate) fn request(&self) -> GenerateRequest {
        let request = self.script.requests.lock().unwrap().pop_front();
        request.expect("the service got a request")
    }

    pub(crate) fn requests_seen(&self) -> usize {
        self.script.requests.lock().unwrap().len()
    }

    /// Waits until a token stream was dropped.
    pub(crate) async fn stream_dropped(&self) {
        let dropped = timeout(PATIENCE, self.script.dropped.acquire()).await;
        dropped.expect("a stream is dropped").unwrap().forget();
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, &[], body.to_string().as_bytes())
            .await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"").await
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Reply {
        let mut open = self.open(method, path, headers, body).await;
        open.read_all().await;
        open.reply()
    }

    pub(crate) async fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Open {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
        let has = |name: &str| {
            headers
                .iter()
                .any(|(given, _)| given.eq_ignore_ascii_case(name))
        };
        if method == "POST" && !has("content-type") {
            head.push_str("Content-Type: application/json\r\n");
        }
        if !has("content-length") && !has("transfer-encoding") {
            write!(head, "Content-Length: {}\r\n", body.len()).unwrap();
        }
        for (name, value) in headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        head.push_str("\r\n");
        let mut open = self.connect().await;
        open.write(head.as_bytes()).await;
        open.write(body).await;
        open
    }

    pub(crate) async fn connect(&self) -> Open {
        Open {
            stream: TcpStream::connect(self.address).await.unwrap(),
            received: String::new(),
        }
    }

    /// Sends the shutdown signal.
    pub(crate) fn begin_shutdown(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    /// Waits until the server is done.
    pub(crate) async fn ended(self) {
        timeout(PATIENCE, self.serving).await.unwrap().unwrap();
    }

    pub(crate) async fn metric(&self, line_start: &str) -> Option<f64> {
        let text = self.get("/metrics").await.body;
        let line = text.lines().find(|line| line.starts_with(line_start))?;
        line.rsplit(' ').next()?.parse().ok()
    }
}

impl Open {
    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        // The server may have answered and closed before everything was sent.
        let _ = self.stream.write_all(bytes).await;
    }

    /// Reads until `text` was received.
    pub(crate) async fn until(&mut self, text: &str) {
        while !self.received.contains(text) {
            assert!(
                self.read().await,
                "the connection ended before {text:?}: {}",
                self.received
            );
        }
    }

    pub(crate) async fn read_all(&mut self) {
        while self.read().await {}
    }

    async fn read(&mut self) -> bool {
        let mut buffer = vec![0; 64 << 10];
        let read = timeout(PATIENCE, self.stream.read(&mut buffer)).await;
        let bytes = read.expect("bytes or the end in time").unwrap_or(0);
        let text = str::from_utf8(&buffer[..bytes]).expect("no character is split between writes");
        self.received.push_str(text);
        bytes > 0
    }

    /// What was received, as a response.
    pub(crate) fn reply(&self) -> Reply {
        let (head, body) = self
            .received
            .split_once("\r\n\r\n")
            .expect("a head and a body");
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let chunked = headers
            .iter()
            .any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        Reply {
            status: status.unwrap().parse().unwrap(),
            headers,
            body: if chunked {
                unchunked(body)
            } else {
                body.to_owned()
            },
        }
    }
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(given, _)| given == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }

    /// The error of a refused request, checked to have OpenAI's envelope.
    pub(crate) fn error(&self) -> Value {
        let mut body = self.json();
        let error = body["error"].take();
        for field in ["message", "type", "param", "code"] {
            assert!(error.get(field).is_some(), "{field} is in {self:?}");
        }
        assert_eq!(self.header("content-type"), Some("application/json"));
        error
    }

    /// The data of the events, checked to have their form.
    pub(crate) fn events(&self) -> Vec<String> {
        assert_eq!(self.status, 200, "{self:?}");
        assert_eq!(
            self.header("content-type"),
            Some("text/event-stream; charset=utf-8")
        );
        let events = self.body.split_terminator("\n\n");
        events
            .map(|event| event.strip_prefix("data: ").unwrap().to_owned())
            .collect()
    }

    /// The events as JSON, checked to end with the end mark, which is left out.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{self:?}");
        let chunks = events.iter().map(|event| serde_json::from_str(event));
        chunks.collect::<Result<_, _>>().unwrap()
    }

    /// The text of a stream of chat chunks.
    pub(crate) fn chat_text(&self) -> String {
        let chunks = self.chunks();
        let texts = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
        texts.collect()
    }
}

fn unchunked(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 || rest.len() < size {
            break;
        }
        out.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").unwrap_or_default();
    }
    out
}

/// A request for a chat of one message.
pub(crate) fn chat(extra: &Value) -> Value {
    with(
        json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}),
        extra,
    )
}

/// A request to complete `Hi`.
pub(crate) fn completion(extra: &Value) -> Value {
    with(json!({"model": MODEL, "prompt": "Hi"}), extra)
}

fn with(mut body: Value, extra: &Value) -> Value {
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

pub(crate) fn token(id: u32) -> TokenOutput {
    TokenOutput {
        id,
        logprob: None,
        top: Vec::new(),
    }
}

pub(crate) fn frame(tokens: impl IntoIterator<Item = u32>) -> TokenFrame {
    TokenFrame {
        tokens: tokens.into_iter().map(token).collect(),
        finish: None,
        usage: None,
    }
}

pub(crate) fn last(finish: FinishReason, usage: Usage) -> TokenFrame {
    TokenFrame {
        tokens: Vec::new(),
        finish: Some(finish),
        usage: Some(usage),
    }
}

/// Frames of one token for each byte of `text`, then the end token with usage.
pub(crate) fn speech(text: &str) -> Vec<TokenFrame> {
    let mut frames: Vec<TokenFrame> = text.bytes().map(|byte| frame([byte.into()])).collect();
    let usage = Usage {
        completion_tokens: u32::try_from(text.len() + 1).unwrap(),
        cached_tokens: 2,
        ..Usage::default()
    };
    frames.push(TokenFrame {
        tokens: vec![token(IM_END)],
        ..last(FinishReason::Stop, usage)
    });
    frames
}

pub(crate) fn stream_of(frames: Vec<TokenFrame>) -> FrameStream {
    Box::pin(stream::iter(frames.into_iter().map(Ok)))
}

/// `frames`, then nothing for ever.
pub(crate) fn endless(frames: Vec<TokenFrame>) -> FrameStream {
    Box::pin(stream_of(frames).chain(stream::pending()))
}

fn checkpoint() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    write(&directory, "tokenizer.json", &tokenizer().to_string());
    let config = json!({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"});
    write(&directory, "tokenizer_config.json", &config.to_string());
    directory
}

pub(crate) fn write(directory: &TempDir, name: &str, text: &str) {
    std::fs::write(directory.path().join(name), text).unwrap();
}

/// A byte-level tokenizer without merges: the id of a token is its byte.
fn tokenizer() -> Value {
    let mut next = 0x100;
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..=u8::MAX {
        let c = if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap()
        };
        vocabulary.insert(c.to_string(), byte.into());
    }
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [special(IM_START, "<|im_start|>"), special(IM_END, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    })
}

fn card(checkpoint: &TempDir) -> ModelCard {
    ModelCard {
        name: MODEL.to_owned(),
        path: checkpoint.path().to_str().unwrap().to_owned(),
        context_tokens_max: CONTEXT,
        vocab_size: VOCABULARY,
        eos_token_ids: vec![IM_END],
        kv_layout: KvLayout::dense(1, 1, 8, 16, DType::F32),
        blocks: 8,
        dp_size: 1,
        role: WorkerRole::Aggregated,
    }
}
