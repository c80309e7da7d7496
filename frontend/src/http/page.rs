//! The status page and what it asks for: a few files inside the binary, and two JSON documents.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{App, id, status};
use crate::{error::ApiError, service::ServiceStatus};

/// Ended requests that the status lists if `?recent=N` does not say how many.
const RECENT: usize = 64;

/// The page may load nothing but what this server has, and nobody may frame it.
const POLICY: HeaderValue =
    HeaderValue::from_static("default-src 'self'; frame-ancestors 'none'; base-uri 'none'");

macro_rules! file {
    ($name:literal, $media:literal) => {
        ($name, $media, include_str!(concat!("../../assets/", $name)))
    };
}

const INDEX: (&str, &str, &str) = file!("index.html", "text/html; charset=utf-8");

const FILES: [(&str, &str, &str); 3] = [
    file!("page.css", "text/css; charset=utf-8"),
    file!("page.js", "text/javascript; charset=utf-8"),
    file!("icon.svg", "image/svg+xml"),
];

/// What of the status is wanted.
#[derive(Debug, Deserialize)]
pub(super) struct Wanted {
    /// Ended requests at most.
    recent: Option<usize>,
}

/// `GET /`: the status page.
pub(super) async fn index() -> Response {
    send(INDEX)
}

/// `GET /assets/{name}`: its files.
pub(super) async fn asset(Path(name): Path<String>) -> Response {
    match FILES.into_iter().find(|file| file.0 == name) {
        Some(file) => send(file),
        None => ApiError::route_not_found(&http::Method::GET, &format!("/assets/{name}"))
            .into_response(),
    }
}

/// `GET /blockplane/status`: everything the page shows.
pub(super) async fn overview(
    State(app): State<Arc<App>>,
    Query(Wanted { recent }): Query<Wanted>,
) -> Response {
    let ServiceStatus {
        ready,
        reason,
        workers,
    } = app.service.status();
    let models: Vec<Value> = status::cards(&app)
        .iter()
        .map(|card| {
            json!({
                "id": card.name,
                "context_tokens_max": card.context_tokens_max,
                "block_tokens": card.kv_layout.block_tokens,
                "block_bytes": card.kv_layout.block_bytes(),
            })
        })
        .collect();
    let workers: Vec<Value> = workers.iter().map(status::worker_json).collect();
    let records = app.metrics.records();
    status::respond(
        StatusCode::OK,
        &json!({
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_s": id::unix_seconds().saturating_sub(app.started),
            "now_unix_ms": id::unix_time().as_millis(),
            "ready": ready,
            "reason": reason,
            "models": models,
            "totals": records.totals(),
            "workers": workers,
            "recent": records.recent(recent.unwrap_or(RECENT)),
        }),
    )
}

/// `GET /blockplane/requests/{id}`: what one of the last requests cost.
pub(super) async fn request(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    // A client that has just read the last byte of its answer is faster than the end of the request.
    for wait in [0, 5, 50] {
        tokio::time::sleep(Duration::from_millis(wait)).await;
        if let Some(record) = app.metrics.records().find(&id) {
            return status::respond(StatusCode::OK, &json!(record));
        }
    }
    ApiError::request_not_found(&id).into_response()
}

fn send((_, media, text): (&'static str, &'static str, &'static str)) -> Response {
    let headers: [(HeaderName, HeaderValue); 4] = [
        (header::CONTENT_TYPE, HeaderValue::from_static(media)),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ),
    ];
    (headers, text).into_response()
}
