//! `POST /v1/chat/completions`.

use blockplane_protocol::{FinishReason, SamplingParams, StopConditions, TokenLogprob, Usage};
use serde_json::{Value, json};

use crate::support::{
    IM_END, IM_START, MODEL, Server, chat, frame, last, speech, stream_of, token,
};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_chat_is_answered_as_openai_answers() {
    let server = Server::saying("Hello 世界!").await;
    let reply = server.post(PATH, &chat(&json!({}))).await;
    let mut body = reply.ok();
    let id = body["id"].take();
    assert!(id.as_str().unwrap().starts_with("chatcmpl-"), "{id}");
    assert!(body["created"].take().as_u64().unwrap() > 1_600_000_000);
    assert_eq!(
        body,
        json!({
            "id": null,
            "object": "chat.completion",
            "created": null,
            "model": MODEL,
            "system_fingerprint": concat!("blockplane-", env!("CARGO_PKG_VERSION")),
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": "Hello 世界!", "refusal": null},
                "logprobs": null,
                "finish_reason": "stop",
            }],
            "usage": {
                "prompt_tokens": 10,
                "completion_tokens": 14,
                "total_tokens": 24,
                "prompt_tokens_details": {"cached_tokens": 2},
            },
        })
    );
    let request = server.request();
    assert_eq!(json!(request.request_id), id);
    let mut prompt = vec![IM_START];
    prompt.extend("user:Hi".bytes().map(u32::from));
    prompt.extend([IM_END, IM_START]);
    assert_eq!(request.token_ids, prompt);
    assert_eq!(request.sampling.temperature, 1.0);
    assert_eq!(request.stop.max_tokens, 990, "the rest of the context");
}

#[tokio::test]
async fn a_stream_is_role_text_reason_usage_and_end_mark() {
    let server = Server::saying("a世").await;
    let body = chat(&json!({"stream": true, "stream_options": {"include_usage": true}}));
    let reply = server.post(PATH, &body).await;
    let chunks = reply.chunks();
    let first = &chunks[0];
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        for field in ["id", "created", "model", "system_fingerprint"] {
            assert_eq!(chunk[field], first[field]);
        }
    }
    let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"]).collect();
    let choice = |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
    assert_eq!(
        choices,
        [
            &choice(json!({"role": "assistant", "content": ""}), Value::Null),
            &choice(json!({"content": "a"}), Value::Null),
            &choice(json!({"content": "世"}), Value::Null),
            &choice(json!({}), json!("stop")),
            &json!([]),
        ]
    );
    let (usage, others) = chunks.split_last().unwrap();
    assert_eq!(usage["usage"]["total_tokens"], 15);
    assert!(
        others
            .iter()
            .all(|chunk| chunk["usage"] == Value::Null && chunk.get("usage").is_some())
    );
}

#[tokio::test]
async fn usage_is_streamed_only_when_asked_for() {
    let server = Server::saying("a").await;
    let reply = server.post(PATH, &chat(&json!({"stream": true}))).await;
    assert!(
        reply
            .chunks()
            .iter()
            .all(|chunk| chunk.get("usage").is_none())
    );
}

#[tokio::test]
async fn a_frame_of_several_tokens_is_one_event() {
    let server = Server::saying("").await;
    server.answer(|_| {
        Ok(stream_of(vec![
            frame("ab".bytes().map(u32::from)),
            frame("\u{e9}".bytes().map(u32::from)),
            last(FinishReason::Length, Usage::default()),
        ]))
    });
    let reply = server.post(PATH, &chat(&json!({"stream": true}))).await;
    let chunks = reply.chunks();
    let texts: Vec<&Value> = chunks
        .iter()
        .map(|c| &c["choices"][0]["delta"]["content"])
        .collect();
    assert_eq!(texts, [&json!(""), &json!("ab"), &json!("é"), &Value::Null]);
    assert_eq!(chunks[3]["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_character_that_is_never_completed_is_replaced_at_the_end() {
    let server = Server::saying("").await;
    server.answer(|_| {
        Ok(stream_of(vec![
            frame([0xE4, 0xB8]),
            last(FinishReason::Length, Usage::default()),
        ]))
    });
    let reply = server.post(PATH, &chat(&json!({"stream": true}))).await;
    assert_eq!(reply.chat_text(), "\u{FFFD}");
}

#[tokio::test]
async fn logprobs_come_with_tokens_bytes_and_alternatives() {
    let server = Server::saying("").await;
    server.answer(|_| {
        let mut frames = speech("é");
        for (frame, logprob) in frames.iter_mut().zip([-0.5, f32::NEG_INFINITY]) {
            frame.tokens[0].logprob = Some(logprob);
            frame.tokens[0].top = vec![TokenLogprob {
                id: 65,
                logprob: -0.25,
            }];
        }
        Ok(stream_of(frames))
    });
    let asked = json!({"logprobs": true, "top_logprobs": 1});
    let expected = json!({
        "content": [
            {
                "token": "\u{FFFD}", "logprob": -0.5, "bytes": [0xC3],
                "top_logprobs": [{"token": "A", "logprob": -0.25, "bytes": [65]}],
            },
            {
                "token": "\u{FFFD}", "logprob": -9999.0, "bytes": [0xA9],
                "top_logprobs": [{"token": "A", "logprob": -0.25, "bytes": [65]}],
            },
        ],
        "refusal": null,
    });
    let reply = server.post(PATH, &chat(&asked)).await;
    assert_eq!(reply.ok()["choices"][0]["logprobs"], expected);
    assert_eq!(server.request().logprobs, Some(1));

    let mut streamed = chat(&asked);
    streamed["stream"] = true.into();
    let chunks = server.post(PATH, &streamed).await.chunks();
    let with_text = &chunks[1]["choices"][0];
    assert_eq!(with_text["delta"]["content"], "é");
    assert_eq!(
        with_text["logprobs"], expected,
        "both come with the text they made"
    );
}

#[tokio::test]
async fn every_parameter_reaches_the_service() {
    let server = Server::saying("x").await;
    let body = chat(&json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": -3,
        "presence_penalty": 1.5, "frequency_penalty": -1.5, "repetition_penalty": 1.25,
        "logit_bias": {"65": -100, "66": 0.5}, "max_completion_tokens": 9, "min_tokens": 2,
        "stop_token_ids": [10], "ignore_eos": true, "cache_salt": "tenant", "logprobs": true,
        "user": "u", "metadata": {"a": "b"}, "store": true, "n": 1, "made_up": [1, 2],
    }));
    server.post(PATH, &body).await.ok();
    let request = server.request();
    assert_eq!(
        request.sampling,
        SamplingParams {
            temperature: 0.5,
            top_p: 0.25,
            top_k: 7,
            min_p: 0.125,
            seed: Some(u64::MAX - 2),
            presence_penalty: 1.5,
            frequency_penalty: -1.5,
            repetition_penalty: 1.25,
            logit_bias: vec![(65, -100.0), (66, 0.5)],
        }
    );
    assert_eq!(
        request.stop,
        StopConditions {
            max_tokens: 9,
            min_tokens: 2,
            stop_token_ids: vec![10],
            ignore_eos: true,
        }
    );
    assert_eq!(request.cache_salt.as_deref(), Some("tenant"));
    assert_eq!(request.logprobs, Some(0));
    assert_eq!(request.model, MODEL);
    assert!((1..=600_000).contains(&request.deadline_ms));
}

#[tokio::test]
async fn nvext_names_the_cache_salt_too() {
    let server = Server::saying("x").await;
    let body = chat(&json!({"nvext": {"cache_salt": "t", "ignore_eos": true}, "top_k": -1}));
    server.post(PATH, &body).await.ok();
    let request = server.request();
    assert_eq!(request.cache_salt.as_deref(), Some("t"));
    assert!(request.stop.ignore_eos);
    assert_eq!(request.sampling.top_k, 0);
    assert_eq!(request.priority, None);
}

#[tokio::test]
async fn the_priority_is_dynamos_agent_hint() {
    let server = Server::saying("x").await;
    for priority in [0, 100] {
        let hints = json!({"priority": priority, "osl": 7});
        let body = chat(&json!({"nvext": {"agent_hints": hints}, "priority": 0}));
        server.post(PATH, &body).await.ok();
        assert_eq!(server.request().priority, Some(priority));
    }
    let body = chat(&json!({"nvext": {"agent_hints": {"osl": 7}}}));
    server.post(PATH, &body).await.ok();
    assert_eq!(server.request().priority, None);
}

/// The prompt that the service got, as text with the special tokens as `[` and `]`.
async fn prompt_of(server: &Server, body: &Value) -> String {
    server.post(PATH, body).await.ok();
    let tokens = server.request().token_ids;
    let bytes = tokens.iter().map(|&id| match id {
        IM_START => b'[',
        IM_END => b']',
        byte => u8::try_from(byte).unwrap(),
    });
    String::from_utf8(bytes.collect()).unwrap()
}

#[tokio::test]
async fn messages_are_brought_into_the_form_that_templates_expect() {
    let server = Server::saying("x").await;
    let messages = json!([
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}},
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
    ]);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let body = chat(&json!({"messages": messages, "tools": tools}));
    assert_eq!(
        prompt_of(&server, &body).await,
        "[system:a\nb][assistant:{\"x\": 1}][tool:r]T1["
    );
    let mut none = body.clone();
    none["tool_choice"] = "none".into();
    assert!(!prompt_of(&server, &none).await.contains("T1"));
    let open = chat(&json!({
        "messages": [{"role": "assistant", "content": "so "}],
        "continue_final_message": true,
    }));
    assert_eq!(prompt_of(&server, &open).await, "[assistant:so");
    let bare = chat(&json!({"add_generation_prompt": false}));
    assert_eq!(prompt_of(&server, &bare).await, "[user:Hi]");
}

#[tokio::test]
async fn the_end_token_never_shows_and_others_do_when_asked() {
    let server = Server::saying("").await;
    server.answer(|_| {
        let mut frames = vec![frame([104, IM_START, IM_END])];
        frames[0].tokens.push(token(105));
        frames.push(last(FinishReason::Stop, Usage::default()));
        Ok(stream_of(frames))
    });
    let text = async |extra: Value| {
        let body = server.post(PATH, &chat(&extra)).await.ok();
        body["choices"][0]["message"]["content"].clone()
    };
    assert_eq!(text(json!({})).await, "hi");
    assert_eq!(
        text(json!({"skip_special_tokens": false})).await,
        "h<|im_start|>i"
    );
    assert_eq!(
        text(json!({"skip_special_tokens": false, "ignore_eos": true})).await,
        "h<|im_start|><|im_end|>i"
    );
}

#[tokio::test]
async fn a_long_body_is_prepared_off_the_sockets() {
    let server = Server::saying("x").await;
    // Long enough for the pool, escaped so that the prompt still fits the context.
    let filler = "y".repeat(80 << 10);
    let body = chat(&json!({"user": filler}));
    server.post(PATH, &body).await.ok();
    assert_eq!(server.request().token_ids.len(), 10);
}
