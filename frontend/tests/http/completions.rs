//! `POST /v1/completions`.

use blockplane_protocol::{FinishReason, TokenLogprob, Usage};
use serde_json::{Value, json};

use crate::support::{IM_START, MODEL, Server, completion, frame, last, speech, stream_of};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_completion_is_answered_as_openai_answers() {
    let server = Server::saying(" there").await;
    let mut body = server.post(PATH, &completion(&json!({}))).await.ok();
    let id = body["id"].take();
    assert!(id.as_str().unwrap().starts_with("cmpl-"), "{id}");
    body["created"].take();
    assert_eq!(
        body,
        json!({
            "id": null,
            "object": "text_completion",
            "created": null,
            "model": MODEL,
            "system_fingerprint": concat!("blockplane-", env!("CARGO_PKG_VERSION")),
            "choices": [{"index": 0, "text": " there", "logprobs": null, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": 2,
                "completion_tokens": 7,
                "total_tokens": 9,
                "prompt_tokens_details": {"cached_tokens": 2},
            },
        })
    );
    let request = server.request();
    assert_eq!(request.token_ids, [72, 105]);
    assert_eq!(request.stop.max_tokens, 16, "OpenAI's default");
}

#[tokio::test]
async fn prompts_come_in_four_forms() {
    let server = Server::saying("x").await;
    for prompt in [
        json!("Hi"),
        json!(["Hi"]),
        json!([72, 105]),
        json!([[72, 105]]),
    ] {
        server
            .post(PATH, &completion(&json!({"prompt": prompt})))
            .await
            .ok();
        assert_eq!(server.request().token_ids, [72, 105], "{prompt}");
    }
}

#[tokio::test]
async fn echo_repeats_the_prompt() {
    let server = Server::saying(" you").await;
    for prompt in [json!("Hi"), json!([72, 105])] {
        let body = completion(&json!({"prompt": prompt, "echo": true}));
        let reply = server.post(PATH, &body).await.ok();
        assert_eq!(reply["choices"][0]["text"], "Hi you");
        let mut streamed = body.clone();
        streamed["stream"] = true.into();
        let chunks = server.post(PATH, &streamed).await.chunks();
        let texts = chunks
            .iter()
            .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap());
        assert_eq!(texts.collect::<String>(), "Hi you");
    }
}

#[tokio::test]
async fn a_stream_ends_with_its_reason_and_usage() {
    let server = Server::saying("ab").await;
    let body = completion(&json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = server.post(PATH, &body).await.chunks();
    let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"]).collect();
    let choice = |text: &str, reason: Value| json!([{"index": 0, "text": text, "logprobs": null, "finish_reason": reason}]);
    assert_eq!(
        choices,
        [
            &choice("a", Value::Null),
            &choice("b", Value::Null),
            &choice("", json!("stop")),
            &json!([]),
        ]
    );
    assert_eq!(chunks[3]["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn logprobs_have_the_older_form() {
    let server = Server::saying("").await;
    server.answer(|_| {
        let mut frames = speech("aé");
        for frame in &mut frames {
            frame.tokens[0].logprob = Some(-0.5);
            frame.tokens[0].top = vec![TokenLogprob {
                id: 66,
                logprob: -0.25,
            }];
        }
        Ok(stream_of(frames))
    });
    let body = server
        .post(PATH, &completion(&json!({"logprobs": 1})))
        .await
        .ok();
    assert_eq!(
        body["choices"][0]["logprobs"],
        json!({
            "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
            "token_logprobs": [-0.5, -0.5, -0.5],
            "text_offset": [0, 1, 1],
            "top_logprobs": [
                {"B": -0.25, "a": -0.5},
                {"B": -0.25, "bytes:\\xc3": -0.5},
                {"B": -0.25, "bytes:\\xa9": -0.5},
            ],
        })
    );
}

#[tokio::test]
async fn a_token_without_text_is_reported_at_the_end() {
    let server = Server::saying("").await;
    server.answer(|_| {
        let mut frames = vec![frame([97]), frame([IM_START])];
        for frame in &mut frames {
            frame.tokens[0].logprob = Some(-0.5);
        }
        frames.push(last(FinishReason::Length, Usage::default()));
        Ok(stream_of(frames))
    });
    let body = completion(&json!({"logprobs": 0}));
    let reply = server.post(PATH, &body).await.ok();
    assert_eq!(reply["choices"][0]["text"], "a");
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "<|im_start|>"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1]));
}
