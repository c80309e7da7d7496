//! Request bodies of the tests.

use serde_json::{Value, json};

/// Tokens in the vocabulary of the generated checkpoints.
pub const VOCABULARY: u64 = 512;
/// Tokens in the vocabulary of the checkpoint that the binary carries.
pub const BUNDLED_VOCABULARY: u64 = 4096;
/// Longest sequence of the generated checkpoints, and of the bundled one.
pub const CONTEXT: u64 = 4096;

/// A `/v1/completions` body: greedy, exactly `max_tokens` tokens, each spelled out in the
/// answer.
#[must_use]
pub fn completion(model: &str, prompt: &[u64], max_tokens: u32) -> Value {
    json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "logprobs": 0,
    })
}

/// The same as a stream that ends with its usage.
#[must_use]
pub fn streamed(model: &str, prompt: &[u64], max_tokens: u32) -> Value {
    let mut body = completion(model, prompt, max_tokens);
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    body
}

/// A `/v1/chat/completions` body with one user message.
#[must_use]
pub fn chat(model: &str, text: &str, max_tokens: u32) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
    })
}
