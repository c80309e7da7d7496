//! The OpenAI-compatible front door: HTTP, chat templates, tokenising, streaming.
//!
//! A [`Frontend`] turns HTTP requests into
//! [`GenerateRequest`](blockplane_protocol::GenerateRequest)s for a [`ModelService`] and its token
//! frames into JSON bodies or server-sent events. It knows nothing of workers, routing or KV: the
//! launcher gives it a service that does. It reads no environment variables and opens no sockets
//! of its own.
//!
//! Routes: `POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`,
//! `GET /v1/models/{id}`, `GET /health`, `GET /live`, `GET /metrics`; a status page at `GET /` with
//! `GET /blockplane/status` and `GET /blockplane/requests/{id}` behind it. Every error has OpenAI's
//! envelope.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use blockplane_frontend::{Frontend, FrontendConfig, ModelService};
//!
//! # async fn run(service: Arc<dyn ModelService>) -> std::io::Result<()> {
//! let mut config = FrontendConfig::default();
//! config.requests_max = 256;
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:8000").await?;
//! let stop = async {
//!     let _ = tokio::signal::ctrl_c().await;
//! };
//! Frontend::new(config, service)?.serve(listener, stop).await
//! # }
//! ```
#![forbid(unsafe_code)]

mod config;
mod error;
mod generation;
mod http;
mod metrics;
mod openai;
mod record;
mod server;
mod service;
mod stall;
mod tokenize;

use std::{fmt, future::Future, io, sync::Arc};

pub use config::FrontendConfig;
pub use service::{FrameStream, ModelService, ServiceStatus, WorkerStatus};
use tokio::net::TcpListener;

/// The HTTP server, ready to serve.
pub struct Frontend {
    app: Arc<http::App>,
}

impl Frontend {
    /// A frontend for the models of `service`.
    ///
    /// # Errors
    /// When the threads of the tokenising pool cannot be started.
    pub fn new(config: FrontendConfig, service: Arc<dyn ModelService>) -> io::Result<Self> {
        Ok(Self {
            app: Arc::new(http::App::new(config, service)?),
        })
    }

    /// Serves connections of `listener` until `shutdown` completes, then lets requests in progress
    /// finish for [`FrontendConfig::shutdown_grace`] and cancels the rest.
    ///
    /// Dropping the future stops at once: connections are closed and generations cancelled.
    ///
    /// # Errors
    /// None at present; failures of single connections are logged and end only these.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let router = http::router(Arc::clone(&self.app));
        server::serve(&self.app.config, router, listener, shutdown).await
    }
}

impl fmt::Debug for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frontend")
            .field("config", &self.app.config)
            .finish_non_exhaustive()
    }
}
