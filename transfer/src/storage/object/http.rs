//! HTTP for the clients of the stores: hyper with rustls and the certificates of the machine.

use std::cell::Cell;
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::BodyExt;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector as TcpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
    HttpResponse, HttpResponseBody, HttpService,
};

/// Unused connections are closed after this time.
const IDLE: Duration = Duration::from_secs(30);

/// How the last request of a task ended. The client of a store tells it in words only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum LastAnswer {
    #[default]
    None,
    Status(u16),
    TimedOut,
    Broken,
}

tokio::task_local! {
    /// Set around every use of a store's client.
    pub(super) static LAST_ANSWER: Cell<LastAnswer>;
}

fn remember(answer: LastAnswer) {
    // Outside of a scope (credentials fetched by a background task) nobody asks.
    let _ = LAST_ANSWER.try_with(|last| last.set(answer));
}

/// Makes [`Service`]s.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    client: Client<HttpsConnector<TcpConnector>, HttpRequestBody>,
    timeout: Duration,
}

impl Connector {
    pub(super) fn new(timeout: Duration) -> Result<Self, String> {
        let tls = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .map_err(|error| format!("the machine's certificates: {error}"))?;
        let mut tcp = TcpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(timeout));
        let tls = tls.https_or_http().enable_http1().wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .build(tls);
        Ok(Self { client, timeout })
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Connector {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = tokio::time::timeout(self.timeout, self.client.request(request)).await;
        match answer {
            Err(late) => {
                remember(LastAnswer::TimedOut);
                Err(HttpError::new(HttpErrorKind::Timeout, late))
            }
            Ok(Err(error)) => {
                remember(LastAnswer::Broken);
                let kind = if error.is_connect() {
                    HttpErrorKind::Connect
                } else {
                    HttpErrorKind::Interrupted
                };
                Err(HttpError::new(kind, error))
            }
            Ok(Ok(response)) => {
                remember(LastAnswer::Status(response.status().as_u16()));
                Ok(response.map(|body| {
                    HttpResponseBody::new(
                        body.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error)),
                    )
                }))
            }
        }
    }
}
