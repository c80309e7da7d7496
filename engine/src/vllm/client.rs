//! HTTP/1.1 to one vLLM server.

use std::{fmt::Display, time::Duration};

use blockplane_protocol::{ErrorKind, GenerateError};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use serde::Deserialize;
use thiserror::Error;

/// Longest answer that does not stream.
const BODY_BYTES_MAX: usize = 16 << 20;
/// Longest part of an unexpected answer that is repeated in a message.
const SHOWN_BYTES_MAX: usize = 400;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// uvicorn closes a connection that was idle for 5 s; one that is used at that moment would fail.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3);

/// One server. Clones share its connections.
#[derive(Clone, Debug)]
pub(crate) struct Http {
    client: legacy::Client<HttpConnector, Full<Bytes>>,
    base: String,
}

/// Why a server did not give what was asked for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HttpError {
    /// Not the URL of a server.
    #[error("'{url}' is not the URL of a vLLM server; accepted: http://HOST:PORT")]
    Url {
        /// What was given.
        url: String,
    },
    /// No connection, or it broke.
    #[error("vLLM at {base} is out of reach: {reason}")]
    Unreachable {
        /// The server.
        base: String,
        /// Why.
        reason: String,
    },
    /// No answer in time.
    #[error("vLLM at {base} did not answer {path} within {limit:?}")]
    Timeout {
        /// The server.
        base: String,
        /// What was asked for.
        path: String,
        /// How long it had.
        limit: Duration,
    },
    /// An answer that refuses.
    #[error("vLLM answered status {status}: {message}")]
    Status {
        /// The HTTP status, or the `code` of an error inside a stream.
        status: u16,
        /// What the server says.
        message: String,
    },
    /// An answer that is not understood.
    #[error("vLLM's answer is not understood: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
}

/// The body of vLLM's errors.
#[derive(Debug, Deserialize)]
pub(crate) struct WireError {
    message: String,
    #[serde(default)]
    code: Option<u16>,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: WireError,
}

impl Http {
    /// The server at `url`, with or without `/v1` at its end.
    pub(crate) fn new(url: &str) -> Result<Self, HttpError> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let valid = base.parse::<Uri>().is_ok_and(|uri| {
            uri.scheme_str() == Some("http")
                && uri.host().is_some()
                && matches!(uri.path(), "" | "/")
        });
        if !valid {
            return Err(HttpError::Url {
                url: url.to_owned(),
            });
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_timer(TokioTimer::new())
            .build(connector);
        Ok(Self { client, base })
    }

    /// Its address, without a path.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// The body of a `GET`.
    pub(crate) async fn get(&self, path: &str, limit: Duration) -> Result<Bytes, HttpError> {
        let fetch = async {
            let response = self.send(Method::GET, path, &[], Bytes::new()).await?;
            self.body(response).await
        };
        self.within(path, limit, fetch).await
    }

    /// The JSON document at a path.
    pub(crate) async fn json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        limit: Duration,
    ) -> Result<T, HttpError> {
        parse(&self.get(path, limit).await?)
    }

    /// Sends JSON; returns when the head of a good answer is there, however long that takes. The
    /// server gives up the request when the answer is dropped before its end.
    pub(crate) async fn post(
        &self,
        path: &str,
        headers: &[(&'static str, String)],
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, HttpError> {
        let response = self
            .send(Method::POST, path, headers, Bytes::from(body))
            .await?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        Err(self.body(response).await.err().unwrap_or_else(|| {
            // `body` refuses every status but 200.
            malformed("a refusal without a status")
        }))
    }

    /// The whole body of an answer with status 200.
    pub(crate) async fn body(&self, response: Response<Incoming>) -> Result<Bytes, HttpError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| self.unreachable(&error))?
            .to_bytes();
        if status == StatusCode::OK {
            return Ok(body);
        }
        let message = match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => body.error.message,
            Err(_) => shown(&body),
        };
        Err(HttpError::Status {
            status: status.as_u16(),
            message,
        })
    }

    /// A connection that broke.
    pub(crate) fn unreachable(&self, error: &dyn Display) -> HttpError {
        HttpError::Unreachable {
            base: self.base.clone(),
            reason: error.to_string(),
        }
    }

    /// Bounds an exchange in time.
    pub(crate) async fn within<T>(
        &self,
        path: &str,
        limit: Duration,
        exchange: impl Future<Output = Result<T, HttpError>>,
    ) -> Result<T, HttpError> {
        tokio::time::timeout(limit, exchange)
            .await
            .unwrap_or_else(|_| {
                Err(HttpError::Timeout {
                    base: self.base.clone(),
                    path: path.to_owned(),
                    limit,
                })
            })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&'static str, String)],
        body: Bytes,
    ) -> Result<Response<Incoming>, HttpError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::CONTENT_TYPE, "application/json");
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| malformed(&error))?;
        let sent = self.client.request(request).await;
        sent.map_err(|error| {
            let cause = std::error::Error::source(&error)
                .map_or_else(|| error.to_string(), ToString::to_string);
            self.unreachable(&cause)
        })
    }
}

impl HttpError {
    /// What a caller of the worker shall make of it.
    const fn kind(&self) -> ErrorKind {
        match self {
            Self::Status { status, .. } => match *status {
                400..=428 => ErrorKind::InvalidRequest,
                429 => ErrorKind::Overloaded,
                // vLLM answers with 5xx when its engine has died or is about to.
                _ => ErrorKind::WorkerLost,
            },
            Self::Unreachable { .. } => ErrorKind::WorkerLost,
            Self::Timeout { .. } => ErrorKind::DeadlineExceeded,
            Self::Url { .. } | Self::Malformed { .. } => ErrorKind::Internal,
        }
    }
}

impl From<HttpError> for GenerateError {
    fn from(error: HttpError) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

impl From<WireError> for HttpError {
    /// An error inside a stream: its head had said 200.
    fn from(error: WireError) -> Self {
        Self::Status {
            status: error.code.unwrap_or(500),
            message: error.message,
        }
    }
}

/// Reads a JSON document.
pub(crate) fn parse<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, HttpError> {
    serde_json::from_slice(text)
        .map_err(|error| malformed(&format_args!("{error} in {}", shown(text))))
}

/// An answer that is not understood.
pub(crate) fn malformed(reason: &(impl Display + ?Sized)) -> HttpError {
    HttpError::Malformed {
        reason: reason.to_string(),
    }
}

fn shown(text: &[u8]) -> String {
    let cut = &text[..text.len().min(SHOWN_BYTES_MAX)];
    let dots = if cut.len() < text.len() { " ..." } else { "" };
    format!("'{}'{dots}", String::from_utf8_lossy(cut).trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_http_to_a_host_is_a_server() {
        for url in [
            "http://127.0.0.1:8000",
            "http://h:1/",
            "http://h/v1",
            "http://h/v1/",
        ] {
            let base = Http::new(url).expect(url).base;
            assert!(!base.ends_with('/') && !base.ends_with("v1"), "{base}");
        }
        for url in [
            "https://h",
            "h:8000",
            "",
            "http://",
            "http://h/path",
            "tcp://h:1",
        ] {
            assert!(
                matches!(Http::new(url), Err(HttpError::Url { .. })),
                "{url}"
            );
        }
    }

    #[test]
    fn a_status_decides_who_is_to_blame() {
        let kind = |status| {
            let message = String::new();
            HttpError::Status { status, message }.kind()
        };
        assert_eq!(kind(400), ErrorKind::InvalidRequest);
        assert_eq!(kind(404), ErrorKind::InvalidRequest);
        assert_eq!(kind(429), ErrorKind::Overloaded);
        assert_eq!(kind(500), ErrorKind::WorkerLost);
        assert_eq!(kind(503), ErrorKind::WorkerLost);
    }
}
