//! Writing responses: bodies and server-sent events.
//!
//! What does not change from event to event is written once for each request; an event costs a
//! copy of that and the escaping of its text.

use std::{fmt::Write as _, io::Write as _, sync::Arc};

use blockplane_protocol::{FinishReason, TokenId};
use serde::Serialize;

use crate::{
    error::ApiError,
    generation::{Finish, Piece, TokenLog},
    tokenize::Vocabulary,
};

/// Value of `system_fingerprint`: the build that answered.
const FINGERPRINT: &str = concat!("blockplane-", env!("CARGO_PKG_VERSION"));

/// Stands for the logarithm of 0, which JSON cannot express.
const LOGPROB_MIN: f32 = -9999.0;

/// Which of the two schemas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Schema {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// Writes the response to one request.
#[derive(Debug)]
pub(crate) struct ResponseWriter {
    schema: Schema,
    vocabulary: Arc<Vocabulary>,
    /// `"created":...,"model":...,"system_fingerprint":...,"choices":[`
    common: String,
    id: String,
    /// An event up to the delta or text.
    event_head: String,
    /// What follows `finish_reason`, usage placeholder included.
    event_tail: &'static str,
    include_usage: bool,
    /// Text before the generated one (echo), until it is out.
    echo: String,
    /// Characters of it, which token offsets count.
    echo_chars: usize,
}

impl ResponseWriter {
    pub(crate) fn new(
        schema: Schema,
        id: String,
        created: u64,
        model: &str,
        vocabulary: Arc<Vocabulary>,
        include_usage: bool,
    ) -> Self {
        let mut common = format!("\"created\":{created},\"model\":");
        push_json(&mut common, model);
        let _ = write!(
            common,
            ",\"system_fingerprint\":\"{FINGERPRINT}\",\"choices\":["
        );
        let object = schema.object(true);
        let open = match schema {
            Schema::Chat => "{\"index\":0,\"delta\":",
            Schema::Completion => "{\"index\":0,\"text\":",
        };
        let event_head = format!("data: {{\"id\":\"{id}\",\"object\":\"{object}\",{common}{open}");
        Self {
            schema,
            vocabulary,
            common,
            id,
            event_head,
            event_tail: if include_usage {
                "}],\"usage\":null}\n\n"
            } else {
                "}]}\n\n"
            },
            include_usage,
            echo: String::new(),
            echo_chars: 0,
        }
    }

    /// Puts `text` before the generated text.
    #[must_use]
    pub(crate) fn with_echo(self, text: String) -> Self {
        Self {
            echo_chars: text.chars().count(),
            echo: text,
            ..self
        }
    }

    /// The first event of a stream: the role of a chat, the echo of a completion.
    pub(crate) fn start_events(&mut self, out: &mut Vec<u8>) {
        match self.schema {
            Schema::Chat => {
                self.event(out, "{\"role\":\"assistant\",\"content\":\"\"}", &[], None);
            }
            Schema::Completion if self.echo.is_empty() => {}
            Schema::Completion => {
                let echo = json(&std::mem::take(&mut self.echo));
                self.event(out, &echo, &[], None);
            }
        }
    }

    /// The events of a piece; of the last one also usage and the end mark.
    pub(crate) fn piece_events(&self, out: &mut Vec<u8>, piece: &Piece) {
        let reason = piece.finish.map(|finish| finish.reason);
        match self.schema {
            Schema::Chat => {
                if !piece.text.is_empty() || !piece.tokens.is_empty() {
                    let mut delta = String::with_capacity(piece.text.len() + 16);
                    delta.push_str("{\"content\":");
                    push_json(&mut delta, &piece.text);
                    delta.push('}');
                    self.event(out, &delta, &piece.tokens, None);
                }
                if reason.is_some() {
                    self.event(out, "{}", &[], reason);
                }
            }
            Schema::Completion => self.event(out, &json(&piece.text), &piece.tokens, reason),
        }
        if let Some(finish) = piece.finish {
            if self.include_usage {
                let _ = write!(
                    out,
                    "data: {{\"id\":\"{}\",\"object\":\"{}\",{}],\"usage\":{}}}\n\n",
                    self.id,
                    self.schema.object(true),
                    self.common,
                    usage(finish)
                );
            }
            out.extend_from_slice(b"data: [DONE]\n\n");
        }
    }

    /// The body of a response that is not streamed.
    pub(crate) fn body(&self, text: &str, tokens: &[TokenLog], finish: Finish) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len() + tokens.len() * 128 + 640);
        let _ = write!(
            out,
            "{{\"id\":\"{}\",\"object\":\"{}\",{}{{\"index\":0,",
            self.id,
            self.schema.object(false),
            self.common
        );
        match self.schema {
            Schema::Chat => {
                out.extend_from_slice(b"\"message\":{\"role\":\"assistant\",\"content\":");
                write_json(&mut out, text);
                out.extend_from_slice(b",\"refusal\":null}");
            }
            Schema::Completion => {
                out.extend_from_slice(b"\"text\":");
                if self.echo.is_empty() {
                    write_json(&mut out, text);
                } else {
                    write_json(&mut out, &format!("{}{text}", self.echo));
                }
            }
        }
        self.write_logprobs(&mut out, tokens);
        let _ = write!(
            out,
            ",\"finish_reason\":{}}}],\"usage\":{}}}",
            reason_json(Some(finish.reason)),
            usage(finish)
        );
        out
    }

    fn event(
        &self,
        out: &mut Vec<u8>,
        delta: &str,
        tokens: &[TokenLog],
        reason: Option<FinishReason>,
    ) {
        out.extend_from_slice(self.event_head.as_bytes());
        out.extend_from_slice(delta.as_bytes());
        self.write_logprobs(out, tokens);
        out.extend_from_slice(b",\"finish_reason\":");
        out.extend_from_slice(reason_json(reason).as_bytes());
        out.extend_from_slice(self.event_tail.as_bytes());
    }

    fn write_logprobs(&self, out: &mut Vec<u8>, tokens: &[TokenLog]) {
        out.extend_from_slice(b",\"logprobs\":");
        if tokens.is_empty() {
            out.extend_from_slice(b"null");
            return;
        }
        match self.schema {
            Schema::Chat => write_json(out, &self.chat_logprobs(tokens)),
            Schema::Completion => self.write_completion_logprobs(out, tokens),
        }
    }

    fn chat_logprobs(&self, tokens: &[TokenLog]) -> ChatLogprobs {
        let entry = |id: TokenId, logprob: f32| ChatAlternative {
            token: self.vocabulary.display(id),
            logprob: finite(logprob),
            bytes: self.vocabulary.bytes(id).to_vec(),
        };
        let content = tokens.iter().map(|log| ChatToken {
            chosen: entry(log.output.id, log.output.logprob.unwrap_or(LOGPROB_MIN)),
            top_logprobs: log
                .output
                .top
                .iter()
                .map(|other| entry(other.id, other.logprob))
                .collect(),
        });
        ChatLogprobs {
            content: content.collect(),
            refusal: None,
        }
    }

    fn write_completion_logprobs(&self, out: &mut Vec<u8>, tokens: &[TokenLog]) {
        let chosen = |log: &TokenLog| finite(log.output.logprob.unwrap_or(LOGPROB_MIN));
        out.extend_from_slice(b"{\"tokens\":");
        write_json(
            out,
            &tokens
                .iter()
                .map(|log| self.completion_token(log.output.id))
                .collect::<Vec<_>>(),
        );
        out.extend_from_slice(b",\"token_logprobs\":");
        write_json(out, &tokens.iter().map(chosen).collect::<Vec<_>>());
        out.extend_from_slice(b",\"text_offset\":");
        let offsets = tokens.iter().map(|log| log.offset + self.echo_chars);
        write_json(out, &offsets.collect::<Vec<_>>());
        out.extend_from_slice(b",\"top_logprobs\":[");
        for (index, log) in tokens.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            let mut top = serde_json::Map::new();
            for other in &log.output.top {
                top.insert(
                    self.completion_token(other.id),
                    finite(other.logprob).into(),
                );
            }
            // The chosen token is reported whether or not it is among the likeliest.
            top.entry(self.completion_token(log.output.id))
                .or_insert_with(|| chosen(log).into());
            write_json(out, &top);
        }
        out.extend_from_slice(b"]}");
    }

    /// A token as a key: bytes that are not text are spelled out, so that keys differ.
    fn completion_token(&self, token: TokenId) -> String {
        let bytes = self.vocabulary.bytes(token);
        str::from_utf8(bytes).map_or_else(
            |_| {
                let mut spelled = "bytes:".to_owned();
                for byte in bytes {
                    let _ = write!(spelled, "\\x{byte:02x}");
                }
                spelled
            },
            str::to_owned,
        )
    }
}

/// The event that ends a stream that failed.
pub(crate) fn error_event(out: &mut Vec<u8>, error: &ApiError) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(error.to_json().as_bytes());
    out.extend_from_slice(b"\n\n");
}

impl Schema {
    /// Prefix of response ids.
    pub(crate) const fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completion => "cmpl-",
        }
    }

    /// The route's name in metrics.
    pub(crate) const fn endpoint(self) -> &'static str {
        match self {
            Self::Chat => "chat_completions",
            Self::Completion => "completions",
        }
    }

    const fn object(self, event: bool) -> &'static str {
        match (self, event) {
            (Self::Chat, true) => "chat.completion.chunk",
            (Self::Chat, false) => "chat.completion",
            (Self::Completion, _) => "text_completion",
        }
    }
}

#[derive(Serialize)]
struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChatToken {
    #[serde(flatten)]
    chosen: ChatAlternative,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(Serialize)]
struct ChatAlternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

fn reason_json(reason: Option<FinishReason>) -> &'static str {
    match reason {
        None => "null",
        Some(FinishReason::Length) => "\"length\"",
        Some(FinishReason::Stop | FinishReason::Cancelled) => "\"stop\"",
    }
}

fn usage(finish: Finish) -> String {
    let Finish {
        prompt_tokens: prompt,
        completion_tokens: completion,
        cached_tokens: cached,
        ..
    } = finish;
    format!(
        "{{\"prompt_tokens\":{prompt},\"completion_tokens\":{completion},\"total_tokens\":{},\
         \"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}}}",
        u64::from(prompt) + u64::from(completion)
    )
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        LOGPROB_MIN
    }
}

fn write_json<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value)
        .expect("writing to memory does not fail and the keys are strings");
}

fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    push_json(&mut out, text);
    out
}

fn push_json(out: &mut String, text: &str) {
    // Strings always serialise, and to UTF-8.
    out.push_str(&serde_json::to_string(text).unwrap_or_default());
}
