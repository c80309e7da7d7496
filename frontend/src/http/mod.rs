//! The routes and what they share.

mod body;
mod generate;
mod id;
mod page;
mod status;

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::{
    Router,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures::FutureExt as _;
use http::{HeaderName, HeaderValue};
use tokio::sync::Semaphore;
use tracing::Instrument as _;

pub(crate) use id::unix_time;

use crate::{
    config::FrontendConfig,
    error::ApiError,
    metrics::Metrics,
    openai::response::Schema,
    service::ModelService,
    tokenize::{AssetCache, TokenizePool},
};

/// Names the request in logs of client and server; taken from the client or made here.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id taken from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// What every handler works with.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) config: FrontendConfig,
    pub(crate) service: Arc<dyn ModelService>,
    pub(crate) pool: Arc<TokenizePool>,
    pub(crate) assets: AssetCache,
    pub(crate) metrics: Metrics,
    pub(crate) requests: Arc<Semaphore>,
    /// When this frontend started, in seconds since 1970.
    pub(crate) started: u64,
    pub(crate) ids: id::Ids,
}

impl App {
    pub(crate) fn new(
        config: FrontendConfig,
        service: Arc<dyn ModelService>,
    ) -> std::io::Result<Self> {
        let pool = Arc::new(TokenizePool::new(
            config.tokenize_threads,
            config.tokenize_queue_max,
        )?);
        Ok(Self {
            requests: Arc::new(Semaphore::new(
                config.requests_max.min(Semaphore::MAX_PERMITS),
            )),
            assets: AssetCache::new(Arc::clone(&pool)),
            metrics: Metrics::new(Arc::clone(&service)),
            ids: id::Ids::new(),
            started: id::unix_seconds(),
            config,
            service,
            pool,
        })
    }
}

/// Unique part of the ids of one request.
#[derive(Clone, Debug)]
struct UniqueId(String);

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route(
            "/v1/chat/completions",
            post(|app, request| generate::handle(app, Schema::Chat, request)),
        )
        .route(
            "/v1/completions",
            post(|app, request| generate::handle(app, Schema::Completion, request)),
        )
        .route("/v1/models", get(status::models))
        .route("/v1/models/{*id}", get(status::model))
        .route("/health", get(status::health))
        .route("/live", get(status::live))
        .route("/metrics", get(status::metrics))
        .route("/", get(page::index))
        .route("/assets/{name}", get(page::asset))
        .route("/blockplane/status", get(page::overview))
        .route("/blockplane/requests/{id}", get(page::request))
        .fallback(|request: Request| async move {
            ApiError::route_not_found(request.method(), request.uri().path())
        })
        .method_not_allowed_fallback(|request: Request| async move {
            ApiError::method_not_allowed(request.method(), request.uri().path())
        })
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            name_request,
        ))
        .with_state(app)
}

/// Gives the request its id and span, and turns a panic into an answer.
async fn name_request(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let unique = app.ids.next();
    let name = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|id| {
            let bytes = id.as_bytes();
            !bytes.is_empty()
                && bytes.len() <= REQUEST_ID_BYTES_MAX
                && bytes.iter().all(u8::is_ascii_graphic)
        })
        .cloned()
        .or_else(|| HeaderValue::from_str(&unique).ok());
    let span = tracing::info_span!(
        "request",
        id = name.as_ref().and_then(|name| name.to_str().ok()),
        unique,
        path = request.uri().path(),
    );
    request.extensions_mut().insert(UniqueId(unique));
    let answered = AssertUnwindSafe(next.run(request).instrument(span))
        .catch_unwind()
        .await;
    let mut response = answered.unwrap_or_else(|_| {
        tracing::error!("a request handler panicked");
        ApiError::internal("the server failed to handle the request").into_response()
    });
    if let Some(name) = name {
        response.headers_mut().insert(REQUEST_ID, name);
    }
    response
}
