//! A client of OpenAI-compatible servers over HTTP: JSON answers, and answers that stream.

mod sse;

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use thiserror::Error;

use self::sse::Events;

/// Largest body of an answer that is not streamed.
const BODY_BYTES_MAX: usize = 4 << 20;

/// One server. Clones share its connections.
#[derive(Clone, Debug)]
pub struct Server {
    http: legacy::Client<HttpConnector, Full<Bytes>>,
    base: String,
    timeout: Duration,
}

/// The events of an answer that streams.
#[derive(Debug)]
pub struct EventStream {
    body: Incoming,
    events: Events,
}

/// Why a stream ended before its end.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The connection broke.
    #[error("the connection broke before the answer was complete: {0}")]
    Broken(#[from] hyper::Error),
    /// Not server-sent events of JSON.
    #[error("the stream is not what the API promises")]
    Malformed,
}

impl Server {
    /// The server at `url`, with or without `/v1` at its end. `timeout` bounds connecting, and
    /// answers that do not stream.
    ///
    /// # Errors
    /// When the URL is not `http://HOST[:PORT]`.
    pub fn new(url: &str, timeout: Duration) -> anyhow::Result<Self> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let uri: Uri = base.parse().with_context(|| format!("--url '{url}'"))?;
        ensure!(
            uri.scheme_str() == Some("http") && uri.host().is_some(),
            "--url is '{url}'; accepted: http://HOST[:PORT] (TLS is not supported here)"
        );
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(timeout));
        Ok(Self {
            http: legacy::Client::builder(TokioExecutor::new()).build(connector),
            base,
            timeout,
        })
    }

    /// Its address, without a path.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The names of its models.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn models(&self) -> anyhow::Result<Vec<String>> {
        let list = self
            .get("/v1/models")
            .await
            .with_context(|| format!("cannot list the models of {}", self.base))?;
        let models = list["data"].as_array().into_iter().flatten();
        let names = models.filter_map(|model| model["id"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    /// The JSON document at a path.
    ///
    /// # Errors
    /// When there is no answer in time, its status is not 200, or it is not JSON.
    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.answer(Method::GET, path, Bytes::new()).await
    }

    /// The JSON answer to a JSON body.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn post(&self, path: &str, body: Bytes) -> anyhow::Result<Value> {
        self.answer(Method::POST, path, body).await
    }

    /// Sends a JSON body; returns as soon as the head of the answer is there, however long that takes.
    ///
    /// # Errors
    /// When there is no connection, or it breaks.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> anyhow::Result<Response<Incoming>> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        Ok(self.http.request(request).await?)
    }

    async fn answer(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Value> {
        tokio::time::timeout(self.timeout, async {
            json(self.send(method, path, body).await?).await
        })
        .await
        .with_context(|| format!("no answer within {:?}", self.timeout))?
    }
}

/// The body of an answer with status 200; what another one says is the error.
///
/// # Errors
/// When the status is not 200, the body is too long, or it is not JSON.
pub async fn json(response: Response<Incoming>) -> anyhow::Result<Value> {
    let status = response.status();
    let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| anyhow::anyhow!("{error}"))?
        .to_bytes();
    let parsed: Option<Value> = serde_json::from_slice(&body).ok();
    if status != StatusCode::OK {
        let message = parsed
            .as_ref()
            .and_then(|body| body["error"]["message"].as_str());
        let text = String::from_utf8_lossy(&body);
        anyhow::bail!("status {status}: {}", message.unwrap_or(&text));
    }
    parsed.context("the answer is not JSON")
}

impl EventStream {
    /// Reads the body of a response as server-sent events.
    #[must_use]
    pub fn new(body: Incoming) -> Self {
        Self {
            body,
            events: Events::default(),
        }
    }

    /// The next event; `None` at the end of the stream. Cancel safe.
    ///
    /// # Errors
    /// When the stream breaks or is not JSON.
    pub async fn next(&mut self) -> Result<Option<Value>, StreamError> {
        loop {
            if let Some(data) = self.events.next() {
                if data == b"[DONE]" {
                    return Ok(None);
                }
                let event = serde_json::from_slice(data);
                return event.map(Some).map_err(|_| StreamError::Malformed);
            }
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            if let Some(bytes) = frame?.data_ref()
                && !self.events.push(bytes)
            {
                return Err(StreamError::Malformed);
            }
        }
    }
}
