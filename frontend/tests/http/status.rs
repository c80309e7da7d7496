//! Models, health, metrics, request ids.

use std::sync::Arc;

use blockplane_frontend::{ServiceStatus, WorkerStatus};
use blockplane_protocol::{DpRank, LoadReport, WorkerId, WorkerRole};
use serde_json::{Value, json};

use crate::support::{CONTEXT, MODEL, Server, chat};

const CHAT: &str = "/v1/chat/completions";

pub(super) fn worker() -> WorkerStatus {
    WorkerStatus {
        id: WorkerId(7),
        name: "decode-0".to_owned(),
        role: WorkerRole::Decode,
        address: "127.0.0.1:1".to_owned(),
        state: "ready".to_owned(),
        load: vec![LoadReport {
            rank: DpRank(1),
            blocks_total: 64,
            blocks_active: 3,
            ..LoadReport::default()
        }],
    }
}

#[tokio::test]
async fn models_are_listed_once_each() {
    let server = Server::saying("x").await;
    let twice = Arc::clone(&server.script.models.lock().unwrap()[0]);
    server.script.models.lock().unwrap().push(twice);
    let mut list = server.get("/v1/models").await.ok();
    let created = list["data"][0]["created"].take();
    assert!(created.as_u64().unwrap() > 1_600_000_000);
    let model = json!({
        "id": MODEL, "object": "model", "created": null, "owned_by": "blockplane",
        "max_model_len": CONTEXT,
    });
    assert_eq!(list, json!({"object": "list", "data": [model]}));
    for path in ["/v1/models/org/byte-model", "/v1/models/org%2Fbyte-model"] {
        assert_eq!(server.get(path).await.ok()["id"], MODEL);
    }
    let missing = server.get("/v1/models/other").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.error()["code"], "model_not_found");
}

#[tokio::test]
async fn ready_means_that_a_request_would_be_served() {
    let server = Server::saying("x").await;
    server.script.status.lock().unwrap().workers = vec![worker()];
    let health = server.get("/health").await.ok();
    assert_eq!(health["status"], "ready");
    assert_eq!(health["reasons"], json!([]));
    assert_eq!(health["workers"][0]["id"], "0000000000000007");
    assert_eq!(health["workers"][0]["role"], "decode");
    assert_eq!(health["workers"][0]["load"][0]["blocks_total"], 64);

    *server.script.status.lock().unwrap() = ServiceStatus {
        ready: false,
        reason: "no decode worker".to_owned(),
        workers: Vec::new(),
    };
    let health = server.get("/health").await;
    assert_eq!(health.status, 503);
    assert_eq!(health.json()["status"], "not_ready");
    assert_eq!(health.json()["reasons"], json!(["no decode worker"]));
    assert_eq!(server.get("/live").await.ok()["status"], "live");
}

#[tokio::test]
async fn a_model_that_cannot_be_tokenised_for_is_not_ready() {
    let server = Server::saying("x").await;
    std::fs::remove_file(server.checkpoint.path().join("tokenizer.json")).unwrap();
    let health = server.get("/health").await;
    assert_eq!(health.status, 503);
    let reason = health.json()["reasons"][0].as_str().unwrap().to_owned();
    assert!(
        reason.contains(MODEL) && reason.contains("tokenizer.json"),
        "{reason}"
    );
    server.script.models.lock().unwrap().clear();
    let health = server.get("/health").await;
    assert_eq!(health.status, 503);
    assert_eq!(health.json()["reasons"], json!(["no model is available"]));
}

#[tokio::test]
async fn metrics_have_dynamos_names() {
    let server = Server::saying("abc").await;
    server.script.status.lock().unwrap().workers = vec![worker()];
    server.post(CHAT, &chat(&json!({}))).await.ok();
    server
        .post(CHAT, &chat(&json!({"stream": true})))
        .await
        .chunks();
    server.post(CHAT, &chat(&json!({"temperature": 9}))).await;
    let text = server.get("/metrics").await.body;
    for line in [
        "dynamo_frontend_requests_total{model=\"org/byte-model\",endpoint=\"chat_completions\",request_type=\"unary\",status=\"success\"} 1",
        "dynamo_frontend_requests_total{model=\"org/byte-model\",endpoint=\"chat_completions\",request_type=\"stream\",status=\"success\"} 1",
        "dynamo_frontend_requests_total{model=\"\",endpoint=\"chat_completions\",request_type=\"unknown\",status=\"error\"} 1",
        "dynamo_frontend_inflight_requests{model=\"org/byte-model\"} 0",
        "dynamo_frontend_request_duration_seconds_count{model=\"org/byte-model\"} 2",
        "dynamo_frontend_time_to_first_token_seconds_count{model=\"org/byte-model\"} 2",
        "dynamo_frontend_inter_token_latency_seconds_count{model=\"org/byte-model\"} 6",
        "dynamo_frontend_input_sequence_tokens_sum{model=\"org/byte-model\"} 20.0",
        "dynamo_frontend_output_sequence_tokens_sum{model=\"org/byte-model\"} 8.0",
        "dynamo_frontend_output_tokens_total{model=\"org/byte-model\"} 8",
        "dynamo_frontend_cached_tokens_sum{model=\"org/byte-model\"} 4.0",
        "dynamo_frontend_disconnected_clients 0",
        "blockplane_ready 1",
        "blockplane_worker_blocks_active{worker=\"0000000000000007\",role=\"decode\",rank=\"1\"} 3",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is in\n{text}"
        );
    }
}

#[tokio::test]
async fn request_ids_are_taken_and_given() {
    let server = Server::saying("x").await;
    let own = [("X-Request-Id", "from-the-client")];
    let body = chat(&json!({})).to_string();
    let reply = server.send("POST", CHAT, &own, body.as_bytes()).await;
    assert_eq!(reply.header("x-request-id"), Some("from-the-client"));
    let mut ids: Vec<Value> = vec![reply.ok()["id"].clone()];
    let long = "x".repeat(200);
    for unusable in [
        &[("X-Request-Id", long.as_str())][..],
        &[("X-Request-Id", "a b")],
        &[],
    ] {
        let reply = server.send("POST", CHAT, unusable, body.as_bytes()).await;
        let name = reply.header("x-request-id").unwrap();
        assert_eq!(name.len(), 32);
        assert_eq!(reply.ok()["id"], format!("chatcmpl-{name}"));
        ids.push(reply.ok()["id"].clone());
    }
    let errors = server.get("/nothing").await;
    assert!(errors.header("x-request-id").is_some());
    ids.sort_by_key(ToString::to_string);
    ids.dedup();
    assert_eq!(ids.len(), 4, "ids are unique whatever the client sends");
}
