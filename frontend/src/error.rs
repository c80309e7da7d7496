//! The one error of every route, in OpenAI's envelope.

use std::{borrow::Cow, fmt::Write as _, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use blockplane_protocol::{ErrorKind, GenerateError};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

/// Longest rendering of a value found in a request that a message repeats.
const SHOWN_CHARS_MAX: usize = 60;

/// A failed request: status and the fields of `{"error": {...}}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<Cow<'static, str>>,
    message: String,
    retry_after: Option<Duration>,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            kind,
            code: Some(code),
            param: None,
            message: message.into(),
            retry_after: None,
        }
    }

    fn request(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    fn retryable(self) -> Self {
        Self {
            retry_after: Some(Duration::from_secs(1)),
            ..self
        }
    }

    fn with_param(self, param: impl Into<Cow<'static, str>>) -> Self {
        Self {
            param: Some(param.into()),
            ..self
        }
    }

    /// 400: a parameter has a value that is not accepted.
    pub(crate) fn invalid(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::request(StatusCode::BAD_REQUEST, "invalid_value", message).with_param(param)
    }

    /// 400: parameter `param` is `found`, which is not one of `accepted`.
    pub(crate) fn value(
        param: impl Into<Cow<'static, str>>,
        found: &Value,
        accepted: &str,
    ) -> Self {
        let param = param.into();
        let message = format!("{param} is {}; accepted: {accepted}", shown(found));
        Self::invalid(param, message)
    }

    /// 400: a parameter that must be there is not.
    pub(crate) fn missing(param: &'static str, accepted: &str) -> Self {
        Self::request(
            StatusCode::BAD_REQUEST,
            "missing_required_parameter",
            format!("{param} is required; accepted: {accepted}"),
        )
        .with_param(param)
    }

    /// 400: a feature that this server does not have.
    pub(crate) fn unsupported(param: &'static str, message: impl Into<String>) -> Self {
        Self::request(StatusCode::BAD_REQUEST, "unsupported_parameter", message).with_param(param)
    }

    /// 400: prompt, or prompt and output, do not fit the model.
    pub(crate) fn context_length(param: &'static str, message: String) -> Self {
        Self::request(StatusCode::BAD_REQUEST, "context_length_exceeded", message).with_param(param)
    }

    /// 400: the body is not JSON, or not UTF-8, or not an object.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::request(StatusCode::BAD_REQUEST, "invalid_json", message)
    }

    /// 404: no such model.
    pub(crate) fn model_not_found(model: &str, available: &[&str]) -> Self {
        let mut message = format!("model '{}' does not exist here; ", truncated(model));
        if available.is_empty() {
            message.push_str("no model is available now");
        } else {
            let _ = write!(message, "available: {}", available.join(", "));
        }
        Self::request(StatusCode::NOT_FOUND, "model_not_found", message).with_param("model")
    }

    /// 404: no such route.
    pub(crate) fn route_not_found(method: &http::Method, path: &str) -> Self {
        Self::request(
            StatusCode::NOT_FOUND,
            "unknown_url",
            format!("there is no route {method} {}", truncated(path)),
        )
    }

    /// 404: no request of this id is remembered.
    pub(crate) fn request_not_found(id: &str) -> Self {
        Self::request(
            StatusCode::NOT_FOUND,
            "request_not_found",
            format!(
                "request '{}' is not among those that ended last here",
                truncated(id)
            ),
        )
    }

    /// 405: the route has other methods.
    pub(crate) fn method_not_allowed(method: &http::Method, path: &str) -> Self {
        Self::request(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            format!(
                "{} does not accept {method}; see the Allow header",
                truncated(path)
            ),
        )
    }

    /// 408: the body did not arrive in time.
    pub(crate) fn body_timeout(limit: Duration) -> Self {
        Self::request(
            StatusCode::REQUEST_TIMEOUT,
            "request_timeout",
            format!(
                "the request body did not arrive within {} s",
                limit.as_secs_f32()
            ),
        )
    }

    /// 413.
    pub(crate) fn body_too_large(limit: usize) -> Self {
        Self::request(
            StatusCode::PAYLOAD_TOO_LARGE,
            "request_too_large",
            format!("the request body is over the limit of {limit} bytes"),
        )
    }

    /// 415.
    pub(crate) fn media_type(found: &str) -> Self {
        Self::request(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            format!(
                "Content-Type is '{}'; accepted: application/json",
                truncated(found)
            ),
        )
    }

    /// 429: a limit of this frontend is reached.
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            "too_many_requests",
            message,
        )
        .retryable()
    }

    /// 500: a fault on this side.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "internal_error",
            message,
        )
    }

    /// 503: the worker's stream ended before the generation did.
    pub(crate) fn stream_incomplete() -> Self {
        GenerateError::new(
            ErrorKind::WorkerLost,
            "the worker's stream ended before the generation finished",
        )
        .into()
    }

    /// 503: somebody else than the client cancelled the request.
    pub(crate) fn cancelled() -> Self {
        GenerateError::new(
            ErrorKind::Cancelled,
            "the request was cancelled by the worker",
        )
        .into()
    }

    /// 504: the request's time is over.
    pub(crate) fn deadline(limit: Duration) -> Self {
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout_error",
            "deadline_exceeded",
            format!(
                "the request did not finish within its {} ms",
                limit.as_millis()
            ),
        )
    }

    /// The envelope: the body of a response, or the data of a server-sent event.
    pub(crate) fn to_json(&self) -> String {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
        .to_string()
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }
}

impl From<GenerateError> for ApiError {
    fn from(error: GenerateError) -> Self {
        let server = |status, code| Self::new(status, "server_error", code, error.message.clone());
        match error.kind {
            ErrorKind::InvalidRequest => Self::request(
                StatusCode::BAD_REQUEST,
                "invalid_request",
                error.message.clone(),
            ),
            ErrorKind::Overloaded => {
                server(StatusCode::SERVICE_UNAVAILABLE, "overloaded").retryable()
            }
            ErrorKind::Unavailable => {
                server(StatusCode::SERVICE_UNAVAILABLE, "unavailable").retryable()
            }
            ErrorKind::WorkerLost => {
                server(StatusCode::SERVICE_UNAVAILABLE, "worker_lost").retryable()
            }
            ErrorKind::Cancelled => {
                server(StatusCode::SERVICE_UNAVAILABLE, "cancelled").retryable()
            }
            ErrorKind::DeadlineExceeded => Self {
                kind: "timeout_error",
                ..server(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded")
            },
            ErrorKind::Internal => server(StatusCode::INTERNAL_SERVER_ERROR, "internal_error"),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.to_json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs()));
        }
        response
    }
}

/// `value` as compact JSON, cut to a length fit for a message.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Array(items) if items.is_empty() => "[]".to_owned(),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) => format!("\"{}\"", truncated(text)),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

/// `text` cut to a length fit for a message.
fn truncated(text: &str) -> Cow<'_, str> {
    text.char_indices()
        .nth(SHOWN_CHARS_MAX)
        .map_or(Cow::Borrowed(text), |(end, _)| {
            Cow::Owned(format!("{}...", &text[..end]))
        })
}
