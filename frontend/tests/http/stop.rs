//! Stop strings: the text ends before them, and the generation ends with them.

use blockplane_protocol::Usage;
use serde_json::json;

use crate::support::{Server, chat, completion, endless, speech, token};

fn without_end(text: &str) -> Vec<blockplane_protocol::TokenFrame> {
    let mut frames = speech(text);
    frames.pop();
    frames
}

#[tokio::test]
async fn a_stop_string_ends_text_and_generation() {
    let server = Server::saying("").await;
    server.answer(|_| {
        let mut frames = without_end("one</s>two");
        frames[0].usage = Some(Usage {
            cached_tokens: 1,
            ..Usage::default()
        });
        Ok(endless(frames))
    });
    let body = chat(&json!({"stop": ["</s>", "never"]}));
    let reply = server.post("/v1/chat/completions", &body).await.ok();
    assert_eq!(reply["choices"][0]["message"]["content"], "one");
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    assert_eq!(reply["usage"]["completion_tokens"], 7);
    assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    server.stream_dropped().await;
}

#[tokio::test]
async fn a_stream_stops_too() {
    let server = Server::saying("").await;
    server.answer(|_| Ok(endless(without_end("one<b></s>two"))));
    let body = chat(&json!({"stop": "</s>", "stream": true}));
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.chat_text(), "one<b>");
    server.stream_dropped().await;
}

#[tokio::test]
async fn a_prefix_of_a_stop_string_comes_out_at_the_end() {
    let server = Server::saying("x</").await;
    let body = chat(&json!({"stop": "</s>", "stream": true}));
    let reply = server.post("/v1/chat/completions", &body).await;
    assert_eq!(reply.chat_text(), "x</");
}

#[tokio::test]
async fn a_stop_string_may_have_characters_that_are_not_tokens() {
    let server = Server::saying("").await;
    server.answer(|_| Ok(endless(without_end("aé世b"))));
    let reply = server
        .post("/v1/completions", &completion(&json!({"stop": "世"})))
        .await
        .ok();
    assert_eq!(reply["choices"][0]["text"], "aé");
}

#[tokio::test]
async fn tokens_of_the_cut_text_are_not_reported() {
    let server = Server::saying("").await;
    server.answer(|_| {
        let mut frames = without_end("abSTOP");
        for frame in &mut frames {
            frame.tokens[0].logprob = Some(-1.0);
        }
        frames.last_mut().unwrap().tokens.push(token(65));
        Ok(endless(frames))
    });
    let body = completion(&json!({"stop": "STOP", "logprobs": 0}));
    let reply = server.post("/v1/completions", &body).await.ok();
    assert_eq!(reply["choices"][0]["text"], "ab");
    assert_eq!(reply["choices"][0]["logprobs"]["tokens"], json!(["a", "b"]));
    assert_eq!(reply["usage"]["completion_tokens"], 6);
}
