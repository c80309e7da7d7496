//! Bad requests: one clear answer each, in OpenAI's envelope, and the server goes on.

use serde_json::{Value, json};

use crate::support::{MODEL, Server, chat, completion, write};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Asserts that `body` is refused with 400, naming `param`, and a message with all of `words`.
async fn refused(server: &Server, path: &str, body: &Value, param: &str, words: &[&str]) {
    let reply = server.post(path, body).await;
    assert_eq!(reply.status, 400, "{body}: {reply:?}");
    let error = reply.error();
    assert_eq!(error["param"], param, "{error}");
    assert_eq!(error["type"], "invalid_request_error");
    let message = error["message"].as_str().unwrap();
    for word in words {
        assert!(message.contains(word), "{word:?} is in {message:?}");
    }
    assert_eq!(
        server.requests_seen(),
        0,
        "{body} did not reach the service"
    );
}

#[tokio::test]
async fn values_out_of_range_are_named() {
    let server = Server::saying("x").await;
    for (extra, param, words) in [
        (
            json!({"temperature": 3}),
            "temperature",
            &["3", "0 to 2"][..],
        ),
        (
            json!({"temperature": "hot"}),
            "temperature",
            &["\"hot\"", "number"],
        ),
        (json!({"top_p": -0.5}), "top_p", &["-0.5", "0 to 1"]),
        (json!({"top_k": 1.5}), "top_k", &["1.5", "integer"]),
        (json!({"min_p": 2}), "min_p", &["2", "0 to 1"]),
        (
            json!({"presence_penalty": 5}),
            "presence_penalty",
            &["5", "-2 to 2"],
        ),
        (
            json!({"frequency_penalty": -5}),
            "frequency_penalty",
            &["-5", "-2 to 2"],
        ),
        (
            json!({"repetition_penalty": 0}),
            "repetition_penalty",
            &["0.01"],
        ),
        (json!({"seed": 0.5}), "seed", &["0.5", "integer"]),
        (json!({"max_tokens": -1}), "max_tokens", &["-1", "from 1"]),
        (json!({"max_tokens": 0}), "max_tokens", &["0", "from 1"]),
        (json!({"max_tokens": 1e30}), "max_tokens", &["integer"]),
        (json!({"n": 2}), "n", &["2", "accepted: 1"]),
        (json!({"n": "1"}), "n", &["\"1\""]),
        (
            json!({"stream": "yes"}),
            "stream",
            &["\"yes\"", "true or false"],
        ),
        (
            json!({"stream_options": {}}),
            "stream_options",
            &["stream is true"],
        ),
        (
            json!({"stream": true, "stream_options": 1}),
            "stream_options",
            &["1", "object"],
        ),
        (
            json!({"stop": ""}),
            "stop",
            &["\"\"", "at least one character"],
        ),
        (json!({"stop": ["a", 7]}), "stop", &["7", "strings"]),
        (
            json!({"stop": vec!["a"; 17]}),
            "stop",
            &["17", "at most 16"],
        ),
        (json!({"stop": "s".repeat(5000)}), "stop", &["5000", "4096"]),
        (
            json!({"stop_token_ids": [-1]}),
            "stop_token_ids",
            &["token ids"],
        ),
        (
            json!({"stop_token_ids": [9999]}),
            "stop_token_ids",
            &["9999", "258"],
        ),
        (
            json!({"logit_bias": {"x": 1}}),
            "logit_bias",
            &["\"x\"", "token ids"],
        ),
        (
            json!({"logit_bias": {"1": 101}}),
            "logit_bias.1",
            &["101", "-100 to 100"],
        ),
        (
            json!({"logit_bias": {"9999": 1}}),
            "logit_bias",
            &["9999", "258"],
        ),
        (
            json!({"logit_bias": [1]}),
            "logit_bias",
            &["list", "object"],
        ),
        (
            json!({"min_tokens": 9, "max_tokens": 3}),
            "min_tokens",
            &["9", "3"],
        ),
        (json!({"ignore_eos": 1}), "ignore_eos", &["true or false"]),
        (json!({"cache_salt": 1}), "cache_salt", &["string"]),
        (
            json!({"nvext": {"cache_salt": 1}}),
            "nvext.cache_salt",
            &["string"],
        ),
        (
            json!({"nvext": {"agent_hints": 5}}),
            "nvext.agent_hints",
            &["an object"],
        ),
        (
            json!({"nvext": {"agent_hints": {"priority": 101}}}),
            "nvext.agent_hints.priority",
            &["101", "0 to 100"],
        ),
        (
            json!({"nvext": {"agent_hints": {"priority": -1}}}),
            "nvext.agent_hints.priority",
            &["-1", "0 to 100"],
        ),
        (
            json!({"nvext": {"agent_hints": {"priority": 0.5}}}),
            "nvext.agent_hints.priority",
            &["an integer"],
        ),
        (
            json!({"priority": 3}),
            "priority",
            &["3", "nvext.agent_hints.priority"],
        ),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
            &["json_object"],
        ),
        (
            json!({"guided_json": {}}),
            "guided_json",
            &["not supported"],
        ),
        (json!({"model": ""}), "model", &["required"]),
        (json!({"model": 7}), "model", &["7", "string"]),
    ] {
        refused(&server, CHAT, &chat(&extra), param, words).await;
        refused(&server, COMPLETIONS, &completion(&extra), param, words).await;
    }
    // It still serves.
    server.post(CHAT, &chat(&json!({}))).await.ok();
}

#[tokio::test]
async fn chat_parameters_are_checked() {
    let server = Server::saying("x").await;
    let messages = |messages: Value| json!({"messages": messages});
    for (extra, param, words) in [
        (
            messages(json!([])),
            "messages",
            &["[]", "at least one message"][..],
        ),
        (messages(json!("hi")), "messages", &["\"hi\""]),
        (messages(Value::Null), "messages", &["required"]),
        (
            messages(json!(["hi"])),
            "messages[0]",
            &["\"hi\"", "role and content"],
        ),
        (
            messages(json!([{"content": "x"}])),
            "messages[0].role",
            &["null", "user"],
        ),
        (
            messages(json!([{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}])),
            "messages[1].role",
            &["\"wizard\"", "system, developer, user, assistant, tool"],
        ),
        (
            messages(json!([{"role": "user"}])),
            "messages[0].content",
            &["null", "string"],
        ),
        (
            messages(json!([{"role": "user", "content": 5}])),
            "messages[0].content",
            &["5"],
        ),
        (
            messages(
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            ),
            "messages[0].content",
            &["image_url", "text"],
        ),
        (
            json!({"top_logprobs": 21, "logprobs": true}),
            "top_logprobs",
            &["21", "0 to 20"],
        ),
        (
            json!({"top_logprobs": 2}),
            "top_logprobs",
            &["logprobs is true"],
        ),
        (json!({"logprobs": 3}), "logprobs", &["3", "true or false"]),
        (
            json!({"max_tokens": 1, "max_completion_tokens": 2}),
            "max_tokens",
            &["1", "2"],
        ),
        (json!({"tools": [1]}), "tools", &["1", "objects"]),
        (
            json!({"tool_choice": "required"}),
            "tool_choice",
            &["required", "auto"],
        ),
        (json!({"functions": []}), "functions", &["tools"]),
        (
            json!({"chat_template": "x"}),
            "chat_template",
            &["checkpoint"],
        ),
        (
            json!({"chat_template_kwargs": 1}),
            "chat_template_kwargs",
            &["object"],
        ),
        (
            json!({"max_completion_tokens": 5000}),
            "max_completion_tokens",
            &["5000", "990", "1000"],
        ),
    ] {
        refused(&server, CHAT, &chat(&extra), param, words).await;
    }
}

#[tokio::test]
async fn completion_parameters_are_checked() {
    let server = Server::saying("x").await;
    for (extra, param, words) in [
        (json!({"prompt": null}), "prompt", &["required"][..]),
        (json!({"prompt": 5}), "prompt", &["5", "string"]),
        (json!({"prompt": ""}), "prompt", &["no token"]),
        (json!({"prompt": []}), "prompt", &["[]"]),
        (
            json!({"prompt": ["a", "b"]}),
            "prompt",
            &["\"a\"", "one string"],
        ),
        (json!({"prompt": [1, "b"]}), "prompt", &["\"b\""]),
        (json!({"prompt": [1, -2]}), "prompt", &["-2"]),
        (json!({"prompt": [99_999]}), "prompt", &["99999", "258"]),
        (json!({"logprobs": 21}), "logprobs", &["21", "0 to 20"]),
        (json!({"logprobs": true}), "logprobs", &["true", "integer"]),
        (json!({"echo": true, "logprobs": 1}), "logprobs", &["echo"]),
        (json!({"best_of": 3}), "best_of", &["3"]),
        (json!({"suffix": "x"}), "suffix", &["not supported"]),
        (
            json!({"prompt": "y".repeat(1000)}),
            "prompt",
            &["1000 tokens", "at most 999"],
        ),
        (
            json!({"prompt": "y".repeat(990), "max_tokens": 11}),
            "max_tokens",
            &["11", "10"],
        ),
    ] {
        refused(&server, COMPLETIONS, &completion(&extra), param, words).await;
    }
    let code = async |extra: Value| {
        let reply = server.post(COMPLETIONS, &completion(&extra)).await;
        reply.error()["code"].clone()
    };
    assert_eq!(
        code(json!({"prompt": "y".repeat(1000)})).await,
        "context_length_exceeded"
    );
}

#[tokio::test]
async fn the_context_may_be_filled_to_its_last_token() {
    let server = Server::saying("x").await;
    let body = completion(&json!({"prompt": "y".repeat(999)}));
    server.post(COMPLETIONS, &body).await.ok();
    assert_eq!(server.request().stop.max_tokens, 1);
}

#[tokio::test]
async fn bodies_that_are_not_json_say_where() {
    let server = Server::saying("x").await;
    for (body, words) in [
        (
            &b"{\"model\": \"m\",\n \"prompt\" 5}"[..],
            &["line 2", "column"][..],
        ),
        (b"{\"model\": ", &["ends too early"]),
        (b"", &["empty"]),
        (b"  \n", &["empty"]),
        (b"[1]", &["object"]),
        (b"\"text\"", &["object"]),
        (b"{\"prompt\": \"a\xff\"}", &["UTF-8", "byte 13"]),
        (b"{\"prompt\": \"\\ud800\"}", &["line 1"]),
        (b"{\"prompt\": NaN}", &["line 1"]),
    ] {
        for path in [CHAT, COMPLETIONS] {
            let reply = server.send("POST", path, &[], body).await;
            assert_eq!(reply.status, 400, "{reply:?}");
            let error = reply.error();
            let message = error["message"].as_str().unwrap();
            for word in words {
                assert!(message.contains(word), "{word:?} is in {message:?}");
            }
            assert_eq!(error["code"], "invalid_json");
        }
    }
    let deep = "[".repeat(100_000);
    let reply = server.send("POST", CHAT, &[], deep.as_bytes()).await;
    assert_eq!(reply.status, 400, "nesting without end");
}

#[tokio::test]
async fn an_unknown_model_is_404_with_the_known_ones() {
    let server = Server::saying("x").await;
    let reply = server.post(CHAT, &chat(&json!({"model": "gpt-9"}))).await;
    assert_eq!(reply.status, 404);
    let error = reply.error();
    assert_eq!(error["code"], "model_not_found");
    assert_eq!(error["param"], "model");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("gpt-9") && message.contains(MODEL),
        "{message}"
    );
    server.script.models.lock().unwrap().clear();
    let reply = server.post(CHAT, &chat(&json!({}))).await;
    assert_eq!(reply.status, 404, "models come and go with the service");
}

#[tokio::test]
async fn routes_and_methods_that_are_not_there() {
    let server = Server::saying("x").await;
    let reply = server.post("/v1/nothing", &json!({})).await;
    assert_eq!(reply.status, 404);
    assert_eq!(reply.error()["code"], "unknown_url");
    let reply = server.get(CHAT).await;
    assert_eq!(reply.status, 405);
    assert_eq!(reply.header("allow"), Some("POST"));
    assert_eq!(reply.error()["code"], "method_not_allowed");
    let reply = server.post("/v1/models", &json!({})).await;
    assert_eq!(reply.status, 405);
}

#[tokio::test]
async fn other_media_types_are_415() {
    let server = Server::saying("x").await;
    let body = chat(&json!({})).to_string();
    for (media_type, status) in [
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
    ] {
        let headers = [("Content-Type", media_type)];
        let reply = server.send("POST", CHAT, &headers, body.as_bytes()).await;
        assert_eq!(reply.status, status, "{media_type}");
    }
}

#[tokio::test]
async fn a_template_may_refuse_a_conversation() {
    let server = Server::saying("x").await;
    write(
        &server.checkpoint,
        "chat_template.jinja",
        "{{ raise_exception('roles must alternate') }}",
    );
    refused(
        &server,
        CHAT,
        &chat(&json!({})),
        "messages",
        &["roles must alternate"],
    )
    .await;
}

#[tokio::test]
async fn a_broken_template_is_a_fault_of_the_checkpoint() {
    let server = Server::saying("x").await;
    write(&server.checkpoint, "chat_template.jinja", "{% for %}");
    let reply = server.post(CHAT, &chat(&json!({}))).await;
    assert_eq!(reply.status, 500);
    let message = reply.error()["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("chat template") && message.contains("line 1"),
        "{message}"
    );
    server.post(COMPLETIONS, &completion(&json!({}))).await.ok();
}

#[tokio::test]
async fn a_checkpoint_without_template_completes_only() {
    let server = Server::saying("x").await;
    write(&server.checkpoint, "tokenizer_config.json", "{}");
    refused(
        &server,
        CHAT,
        &chat(&json!({})),
        "messages",
        &["/v1/completions"],
    )
    .await;
    server.post(COMPLETIONS, &completion(&json!({}))).await.ok();
}

#[tokio::test]
async fn a_broken_tokenizer_is_named_and_may_be_repaired() {
    let server = Server::saying("x").await;
    let file = server.checkpoint.path().join("tokenizer.json");
    let good = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let reply = server.post(CHAT, &chat(&json!({}))).await;
    assert_eq!(reply.status, 500);
    assert!(
        reply.error()["message"]
            .as_str()
            .unwrap()
            .contains("tokenizer.json")
    );
    write(
        &server.checkpoint,
        "tokenizer.json",
        &good[..good.len() / 2],
    );
    assert_eq!(server.post(CHAT, &chat(&json!({}))).await.status, 500);
    write(&server.checkpoint, "tokenizer.json", &good);
    server.post(CHAT, &chat(&json!({}))).await.ok();
}

#[tokio::test]
async fn a_panic_behind_the_routes_costs_one_request() {
    let server = Server::saying("x").await;
    server.answer(|_| panic!("on purpose"));
    let reply = server.post(CHAT, &chat(&json!({}))).await;
    assert_eq!(reply.status, 500);
    assert_eq!(reply.error()["code"], "internal_error");
    assert_eq!(server.get("/live").await.status, 200);
}

#[tokio::test]
async fn a_text_that_cannot_fit_is_refused_without_tokenising_it() {
    let server = Server::saying("x").await;
    let text = "y".repeat(20_000_000);
    for (path, body) in [
        (COMPLETIONS, completion(&json!({"prompt": text}))),
        (
            CHAT,
            chat(&json!({"messages": [{"role": "user", "content": text}]})),
        ),
    ] {
        let reply = server.post(path, &body).await;
        assert_eq!(reply.status, 400);
        let error = reply.error();
        assert_eq!(error["code"], "context_length_exceeded");
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains("at least 1666") && message.contains("at most 999"),
            "{message}"
        );
    }
}
