//! The responses of one call.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use blockplane_protocol::RequestId;
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use tokio::{
    sync::mpsc,
    time::{Instant, Sleep},
};

use super::{
    client::RpcClientConfig,
    connection::{ConnectionHandle, Incoming},
    credit::Consumed,
    error::RpcError,
    frame::{Cancel, Frame, Kind, Open, fragments, payload_cost},
};

/// Stream of the messages that a handler sends. It ends after the last one or after an error. Dropping
/// it before that cancels the handler.
#[derive(Debug)]
#[must_use = "dropping the responses cancels the call"]
pub struct Responses {
    handle: Arc<ConnectionHandle>,
    call: u64,
    endpoint: String,
    incoming: mpsc::Receiver<Incoming>,
    consumed: Consumed,
    /// Start of a message whose rest is still to come.
    partial: BytesMut,
    message_bytes_max: usize,
    deadline: Pin<Box<Sleep>>,
    limit: Duration,
    /// The remote side is finished or was told to stop.
    done: bool,
}

impl Responses {
    /// Sends the request. Dropping the future cancels the call.
    pub(crate) async fn open(
        handle: Arc<ConnectionHandle>,
        endpoint: &str,
        payload: Bytes,
        request_id: Option<&RequestId>,
        until: Instant,
        limit: Duration,
        config: &RpcClientConfig,
    ) -> Result<Self, RpcError> {
        let (call, incoming) = handle.enter(config.window_bytes)?;
        let responses = Self {
            handle,
            call,
            endpoint: endpoint.to_owned(),
            incoming,
            consumed: Consumed::new(config.window_bytes),
            partial: BytesMut::new(),
            message_bytes_max: config.message_bytes_max,
            deadline: Box::pin(tokio::time::sleep_until(until)),
            limit,
            done: false,
        };
        let mut pieces = fragments(payload);
        let left = until.saturating_duration_since(Instant::now());
        let open = Open {
            endpoint: endpoint.to_owned(),
            request_id: request_id.map_or_else(|| call.to_string(), |id| id.0.clone()),
            deadline_us: u64::try_from(left.as_micros()).unwrap_or(u64::MAX),
            window: config.window_bytes,
            data: pieces.next(),
        };
        responses.send(Kind::Open(open)).await?;
        for piece in pieces {
            responses.send(Kind::Data(piece)).await?;
        }
        Ok(responses)
    }

    async fn send(&self, kind: Kind) -> Result<(), RpcError> {
        self.handle
            .outbox()
            .send(Frame::new(self.call, kind))
            .await
            .map_err(|_closed| self.handle.lost_error())
    }

    /// The one message of a call that answers with one.
    ///
    /// # Errors
    /// When the call fails, or answers with no message or with several ([`RpcError::Protocol`]).
    pub async fn only(mut self) -> Result<Bytes, RpcError> {
        let wrong_count = |this: &Self, found: &str| RpcError::Protocol {
            address: this.handle.address().to_owned(),
            reason: format!("'{}' answered with {found}, one is expected", this.endpoint),
        };
        let Some(message) = self.next().await else {
            return Err(wrong_count(&self, "no message"));
        };
        let message = message?;
        match self.next().await {
            None => Ok(message),
            Some(Ok(_)) => Err(wrong_count(&self, "several messages")),
            Some(Err(error)) => Err(error),
        }
    }

    /// The address that was called.
    #[must_use]
    pub fn address(&self) -> &str {
        self.handle.address()
    }

    /// Takes the call out of the table and, if the remote side may still be working, stops it.
    fn finish(&mut self, cancel: bool) {
        if self.done {
            return;
        }
        self.done = true;
        self.handle.leave(self.call);
        if cancel {
            // A closed outbox means that the connection is gone, and with it the handler.
            let _closed = self
                .handle
                .outbox()
                .push(Frame::new(self.call, Kind::Cancel(Cancel {})));
        }
    }

    /// Counts a received piece, and returns the message if it is complete.
    fn take_piece(&mut self, payload: Bytes, more: bool) -> Result<Option<Bytes>, RpcError> {
        if let Some(credit) = self.consumed.add(payload_cost(payload.len())) {
            let _closed = self
                .handle
                .outbox()
                .push(Frame::new(self.call, Kind::Credit(credit)));
        }
        let bytes = self.partial.len() + payload.len();
        if bytes > self.message_bytes_max {
            return Err(RpcError::MessageTooLarge {
                bytes,
                limit: self.message_bytes_max,
            });
        }
        if !more && self.partial.is_empty() {
            return Ok(Some(payload));
        }
        self.partial.extend_from_slice(&payload);
        Ok((!more).then(|| self.partial.split().freeze()))
    }

    fn closed_error(&self) -> RpcError {
        if self.handle.is_lost() {
            self.handle.lost_error()
        } else {
            RpcError::Protocol {
                address: self.handle.address().to_owned(),
                reason: "it sent more than was granted".to_owned(),
            }
        }
    }
}

impl Stream for Responses {
    type Item = Result<Bytes, RpcError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        loop {
            let failed = match self.incoming.poll_recv(cx) {
                Poll::Ready(Some(Incoming::Data { payload, more })) => {
                    match self.take_piece(payload, more) {
                        Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
                        Ok(None) => continue,
                        Err(error) => error,
                    }
                }
                Poll::Ready(Some(Incoming::End)) => {
                    self.finish(false);
                    if !self.partial.is_empty() {
                        return Poll::Ready(Some(Err(RpcError::Protocol {
                            address: self.handle.address().to_owned(),
                            reason: "the responses end within a message".to_owned(),
                        })));
                    }
                    return Poll::Ready(None);
                }
                Poll::Ready(Some(Incoming::Error(error))) => {
                    self.finish(false);
                    return Poll::Ready(Some(Err(RpcError::Remote(error.into()))));
                }
                Poll::Ready(None) => self.closed_error(),
                Poll::Pending => {
                    if self.deadline.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    RpcError::DeadlineExceeded {
                        address: self.handle.address().to_owned(),
                        endpoint: self.endpoint.clone(),
                        limit: self.limit,
                    }
                }
            };
            self.finish(true);
            return Poll::Ready(Some(Err(failed)));
        }
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        self.finish(true);
    }
}
