//! Models, health, metrics.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use blockplane_protocol::ModelCard;
use http::{StatusCode, header};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::App;
use crate::{
    error::ApiError,
    metrics,
    service::{ServiceStatus, WorkerStatus},
};

/// Time that a health check waits for a tokenizer that is being loaded.
const LOAD_WAIT: Duration = Duration::from_secs(2);

/// `GET /v1/models`.
pub(super) async fn models(State(app): State<Arc<App>>) -> Response {
    let cards = cards(&app);
    let data: Vec<Value> = cards.iter().map(|card| model_json(&app, card)).collect();
    respond(StatusCode::OK, &json!({"object": "list", "data": data}))
}

/// The models that are served, each name once, in order.
pub(super) fn cards(app: &App) -> Vec<Arc<ModelCard>> {
    let mut cards = app.service.models();
    cards.sort_by(|a, b| a.name.cmp(&b.name));
    cards.dedup_by(|a, b| a.name == b.name);
    cards
}

/// `GET /v1/models/{id}`.
pub(super) async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    let cards = app.service.models();
    match cards.iter().find(|card| card.name == id) {
        Some(card) => respond(StatusCode::OK, &model_json(&app, card)),
        None => {
            let names: Vec<&str> = cards.iter().map(|card| card.name.as_str()).collect();
            ApiError::model_not_found(&id, &names).into_response()
        }
    }
}

/// `GET /health`: 200 when a request would be served, 503 when not.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let status = app.service.status();
    let reasons = reasons(&app, &status).await;
    let (code, word) = if reasons.is_empty() && status.ready {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not_ready")
    };
    let mut notes = reasons;
    if !status.reason.is_empty() {
        notes.insert(0, status.reason);
    }
    let workers: Vec<Value> = status.workers.iter().map(worker_json).collect();
    respond(
        code,
        &json!({"status": word, "reasons": notes, "workers": workers}),
    )
}

/// `GET /live`: the process answers.
pub(super) async fn live() -> Response {
    respond(StatusCode::OK, &json!({"status": "live"}))
}

/// `GET /metrics`.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    match app.metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(_) => ApiError::internal("the metrics cannot be written").into_response(),
    }
}

/// What keeps this frontend from serving although the service may be ready.
async fn reasons(app: &App, status: &ServiceStatus) -> Vec<String> {
    let cards = app.service.models();
    let mut reasons = Vec::new();
    if cards.is_empty() {
        reasons.push("no model is available".to_owned());
    } else if !status.ready && status.reason.is_empty() {
        reasons.push("no worker can serve a request".to_owned());
    }
    for card in &cards {
        match timeout(LOAD_WAIT, app.assets.get(card, &cards)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => reasons.push(format!("model '{}': {error}", card.name)),
            Err(_) => reasons.push(format!("model '{}': loading its tokenizer", card.name)),
        }
    }
    reasons
}

fn model_json(app: &App, card: &ModelCard) -> Value {
    json!({
        "id": card.name,
        "object": "model",
        "created": app.started,
        "owned_by": "blockplane",
        "max_model_len": card.context_tokens_max,
    })
}

pub(super) fn worker_json(worker: &WorkerStatus) -> Value {
    json!({
        "id": worker.id.to_string(),
        "name": worker.name,
        "role": worker.role,
        "address": worker.address,
        "state": worker.state,
        "load": worker.load,
    })
}

pub(super) fn respond(status: StatusCode, body: &Value) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (status, headers, body.to_string()).into_response()
}
