//! Reading request bodies within their limits.

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use tokio::time::timeout;

use crate::{config::FrontendConfig, error::ApiError};

/// Checks that the client says it sends JSON. No Content-Type at all is taken as JSON.
pub(super) fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(found) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let text = found.to_str().unwrap_or("not readable");
    let essence = text.split(';').next().unwrap_or_default().trim();
    let essence = essence.to_ascii_lowercase();
    if essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"))
    {
        Ok(())
    } else {
        Err(ApiError::media_type(text))
    }
}

/// The whole body.
pub(super) async fn read(
    config: &FrontendConfig,
    headers: &HeaderMap,
    body: Body,
) -> Result<Bytes, ApiError> {
    timeout(
        config.body_timeout,
        collect(config.body_bytes_max, headers, body),
    )
    .await
    .unwrap_or_else(|_| Err(ApiError::body_timeout(config.body_timeout)))
}

async fn collect(limit: usize, headers: &HeaderMap, mut body: Body) -> Result<Bytes, ApiError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let too_large = announced.is_some_and(|length| length > limit as u64);
    if too_large && headers.contains_key(header::EXPECT) {
        // The client waits for leave to send; it gets the answer instead.
        return Err(ApiError::body_too_large(limit));
    }
    let mut first: Option<Bytes> = None;
    let mut rest = BytesMut::new();
    let mut received = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            ApiError::malformed(format!("the request body cannot be read: {error}"))
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        received += data.len();
        if received > limit.saturating_mul(2) {
            break;
        }
        if received > limit || too_large {
            // Read on for as much again, so that a client which only reads the answer after it
            // has sent everything gets to see it.
            first = None;
            rest = BytesMut::new();
            continue;
        }
        match &first {
            None => first = Some(data),
            Some(head) => {
                if rest.is_empty() {
                    rest.extend_from_slice(head);
                }
                rest.extend_from_slice(&data);
            }
        }
    }
    if received > limit || too_large {
        return Err(ApiError::body_too_large(limit));
    }
    if rest.is_empty() {
        Ok(first.unwrap_or_default())
    } else {
        Ok(rest.freeze())
    }
}
