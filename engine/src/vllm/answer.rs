//! vLLM's answers: server-sent events as they come, or one document.

use std::borrow::Cow;

use blockplane_protocol::{TokenId, TokenLogprob, TokenOutput};
use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use super::client::{HttpError, WireError, malformed, parse};

/// Longest event that is accepted. One with 20 alternatives for each of 100 tokens has 150 KB.
const EVENT_BYTES_MAX: usize = 4 << 20;

/// Cuts a byte stream into the data of its events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    buffer: Vec<u8>,
    /// Up to here it was handed out.
    taken: usize,
    /// Up to here there is no end of line after `taken`.
    searched: usize,
}

/// What one event says.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// New tokens.
    pub(crate) tokens: Vec<TokenOutput>,
    /// The generation has ended, and why, in vLLM's words.
    pub(crate) finish: Option<String>,
    /// What it cost; on the last event.
    pub(crate) usage: Option<WireUsage>,
}

/// What a request cost, as vLLM counts it.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct WireUsage {
    #[serde(default)]
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct PromptDetails {
    #[serde(default)]
    cached_tokens: Option<u32>,
}

/// The answer to a prefill.
#[derive(Debug, Deserialize)]
pub(crate) struct Prefilled {
    #[serde(default)]
    pub(crate) usage: Option<WireUsage>,
    #[serde(default)]
    pub(crate) kv_transfer_params: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    #[serde(default)]
    usage: Option<WireUsage>,
    #[serde(default)]
    error: Option<WireError>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    token_ids: Option<Vec<TokenId>>,
    #[serde(borrow, default)]
    logprobs: Option<Logprobs<'a>>,
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

/// Both forms of log-probabilities: `content` of the generate route, the others of completions.
#[derive(Deserialize)]
struct Logprobs<'a> {
    #[serde(borrow, default)]
    content: Option<Vec<Scored<'a>>>,
    #[serde(default)]
    token_logprobs: Vec<Option<f32>>,
    #[serde(default)]
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

/// A token with its log-probability. Before vLLM 0.27 it is called `token_id:ID`.
#[derive(Deserialize)]
struct Scored<'a> {
    #[serde(default)]
    token_id: Option<TokenId>,
    #[serde(borrow, default)]
    token: Option<Cow<'a, str>>,
    logprob: f32,
    #[serde(borrow, default)]
    top_logprobs: Vec<Self>,
}

impl Events {
    /// Adds bytes as they came.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), HttpError> {
        if self.taken == self.buffer.len() {
            self.buffer.clear();
        } else {
            self.buffer.drain(..self.taken);
        }
        self.searched -= self.taken.min(self.searched);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() > EVENT_BYTES_MAX {
            let reason = format!("an event of more than {EVENT_BYTES_MAX} bytes");
            return Err(malformed(&reason));
        }
        Ok(())
    }

    /// The data of the next complete event.
    pub(crate) fn next(&mut self) -> Option<&[u8]> {
        loop {
            let from = self.searched.max(self.taken);
            let Some(length) = self.buffer[from..].iter().position(|&byte| byte == b'\n') else {
                self.searched = self.buffer.len();
                return None;
            };
            let line = self.taken..from + length;
            self.taken = line.end + 1;
            self.searched = self.taken;
            if self.buffer[line.clone()].starts_with(b"data:") {
                return Some(self.buffer[line.start + b"data:".len()..line.end].trim_ascii());
            }
        }
    }
}

impl WireUsage {
    /// Prompt tokens whose KV was there; 0 where the server does not tell.
    pub(crate) fn cached_tokens(&self) -> u32 {
        let details = self.prompt_tokens_details.unwrap_or_default();
        details.cached_tokens.unwrap_or(0)
    }
}

/// Reads the data of an event; `None` for the mark at the end of the stream. `top` alternatives were
/// asked for.
pub(crate) fn read(data: &[u8], top: usize) -> Result<Option<Said>, HttpError> {
    if data == b"[DONE]" {
        return Ok(None);
    }
    let event: Event<'_> = parse(data)?;
    if let Some(error) = event.error {
        return Err(error.into());
    }
    let mut said = Said {
        usage: event.usage,
        ..Said::default()
    };
    for choice in event.choices {
        said.finish = choice.finish_reason.map(Cow::into_owned);
        let ids = choice
            .token_ids
            .ok_or_else(|| malformed("a choice without token_ids"))?;
        match choice.logprobs {
            None => said.tokens.extend(ids.into_iter().map(plain)),
            Some(logprobs) => scored(&ids, logprobs, top, &mut said.tokens)?,
        }
    }
    Ok(Some(said))
}

const fn plain(id: TokenId) -> TokenOutput {
    TokenOutput {
        id,
        logprob: None,
        top: Vec::new(),
    }
}

fn scored(
    ids: &[TokenId],
    logprobs: Logprobs<'_>,
    top: usize,
    out: &mut Vec<TokenOutput>,
) -> Result<(), HttpError> {
    let all = match logprobs.content {
        Some(content) => content
            .into_iter()
            .map(|token| {
                let top: Result<Vec<_>, _> = token.top_logprobs.iter().map(Scored::entry).collect();
                Ok((Some(token.logprob), top?))
            })
            .collect::<Result<Vec<_>, HttpError>>()?,
        None => logprobs
            .token_logprobs
            .into_iter()
            .zip(logprobs.top_logprobs)
            .map(|(logprob, top)| {
                let top = top.unwrap_or_default();
                let top: Result<Vec<_>, _> = top.iter().map(named).collect();
                Ok((logprob, top?))
            })
            .collect::<Result<Vec<_>, HttpError>>()?,
    };
    if all.len() != ids.len() {
        let reason = format!("{} tokens with {} log-probabilities", ids.len(), all.len());
        return Err(malformed(&reason));
    }
    for (&id, (logprob, mut alternatives)) in ids.iter().zip(all) {
        // The chosen token is among them, and first, whatever its rank.
        alternatives.sort_by(|a: &TokenLogprob, b| b.logprob.total_cmp(&a.logprob));
        alternatives.truncate(top);
        out.push(TokenOutput {
            id,
            logprob,
            top: alternatives,
        });
    }
    Ok(())
}

impl Scored<'_> {
    fn entry(&self) -> Result<TokenLogprob, HttpError> {
        let id = match (self.token_id, &self.token) {
            (Some(id), _) => id,
            (None, Some(token)) => token_of(token)?,
            (None, None) => return Err(malformed("a log-probability without a token id")),
        };
        Ok(TokenLogprob {
            id,
            logprob: self.logprob,
        })
    }
}

fn named((token, logprob): (&String, &Value)) -> Result<TokenLogprob, HttpError> {
    let number = logprob
        .as_f64()
        .ok_or_else(|| malformed("a log-probability that is not a number"))?;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the nearest 32-bit float is what is meant"
    )]
    let logprob = number as f32;
    Ok(TokenLogprob {
        id: token_of(token)?,
        logprob,
    })
}

fn token_of(name: &str) -> Result<TokenId, HttpError> {
    name.strip_prefix("token_id:")
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| {
            malformed(&format_args!(
                "log-probabilities of '{name}' where 'token_id:ID' is expected; start vLLM with \
                 --return-tokens-as-token-ids"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_any_cut() {
        let stream = b": ping\r\ndata: {\"a\":1}\r\n\r\nevent: x\ndata:two\n\ndata: [DONE]\n\n";
        for size in 1..=stream.len() {
            let mut events = Events::default();
            let mut found: Vec<String> = Vec::new();
            for piece in stream.chunks(size) {
                events.push(piece).unwrap();
                while let Some(data) = events.next() {
                    found.push(String::from_utf8(data.to_vec()).unwrap());
                }
            }
            assert_eq!(found, ["{\"a\":1}", "two", "[DONE]"], "cut at {size}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut events = Events::default();
        events.push(&vec![b'x'; EVENT_BYTES_MAX]).unwrap();
        assert_eq!(events.next(), None);
        assert!(events.push(b"x").is_err());
    }

    #[test]
    fn tokens_and_the_best_alternatives_of_the_generate_route() {
        let said = read(
            br#"{"request_id":"r","usage":null,"choices":[{"index":0,"finish_reason":null,
            "token_ids":[9,3],"logprobs":{"content":[
            {"token_id":9,"logprob":-4.5,"rank":7,"top_logprobs":[
              {"token_id":9,"logprob":-4.5,"rank":7},{"token_id":1,"logprob":-0.5,"rank":1},
              {"token_id":2,"logprob":-1.5,"rank":2}]},
            {"token_id":3,"logprob":-0.25,"rank":1,"top_logprobs":[
              {"token_id":3,"logprob":-0.25,"rank":1},{"token_id":4,"logprob":-2.0,"rank":2}]}]}}]}"#,
            2,
        )
        .unwrap()
        .unwrap();
        assert_eq!(said.tokens[0].id, 9);
        assert_eq!(said.tokens[0].logprob, Some(-4.5));
        let ids = |at: usize| -> Vec<u32> { said.tokens[at].top.iter().map(|t| t.id).collect() };
        assert_eq!(ids(0), [1, 2]);
        assert_eq!(ids(1), [3, 4]);
        assert!(said.finish.is_none() && said.usage.is_none());
    }

    #[test]
    fn older_forms_name_tokens_by_their_ids() {
        let completions = br#"{"choices":[{"text":"x","token_ids":[127],"finish_reason":"length",
            "logprobs":{"text_offset":[0],"token_logprobs":[-3.5],"tokens":["token_id:127"],
            "top_logprobs":[{"token_id:127":-3.5,"token_id:334":-4.0}]}}]}"#;
        let said = read(completions, 1).unwrap().unwrap();
        assert_eq!(said.finish.as_deref(), Some("length"));
        assert_eq!(said.tokens[0].logprob, Some(-3.5));
        assert_eq!(said.tokens[0].top.len(), 1);
        let chat_form = br#"{"choices":[{"token_ids":[5],"logprobs":{"content":[{"token":
            "token_id:5","logprob":-1.0,"top_logprobs":[{"token":"token_id:5","logprob":-1.0}]}]}}]}"#;
        assert_eq!(read(chat_form, 1).unwrap().unwrap().tokens[0].top[0].id, 5);
        let text = br#"{"choices":[{"token_ids":[5],"logprobs":{"content":[{"token":
            " the","logprob":-1.0,"top_logprobs":[{"token":" the","logprob":-1.0}]}]}}]}"#;
        let error = read(text, 1).unwrap_err().to_string();
        assert!(error.contains("--return-tokens-as-token-ids"), "{error}");
    }

    #[test]
    fn the_last_event_tells_what_was_cached() {
        let usage = br#"{"usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3,
            "prompt_tokens_details":{"cached_tokens":2}},"choices":[]}"#;
        let usage = read(usage, 0).unwrap().unwrap().usage.unwrap();
        assert_eq!(usage.cached_tokens(), 2);
        let without = br#"{"usage":{"prompt_tokens":3},"choices":[]}"#;
        let usage = read(without, 0).unwrap().unwrap().usage.unwrap();
        assert_eq!(usage.cached_tokens(), 0);
        assert!(read(b"[DONE]", 0).unwrap().is_none());
    }

    #[test]
    fn an_error_inside_a_stream_keeps_its_code() {
        let error = br#"{"error":{"message":"data_parallel_rank 3 is out of range","code":400}}"#;
        let Err(HttpError::Status { status, message }) = read(error, 0) else {
            panic!("an error is expected");
        };
        assert_eq!(status, 400);
        assert!(message.contains("out of range"));
        for broken in [&b"{"[..], b"5", br#"{"choices":[{"index":0}]}"#] {
            let error = read(broken, 0).unwrap_err();
            assert!(matches!(error, HttpError::Malformed { .. }), "{error}");
        }
    }
}
