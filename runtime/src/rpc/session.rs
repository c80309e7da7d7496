//! The server's end of one connection: puts requests together, runs calls, sends their responses.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use blockplane_protocol::{ErrorKind, GenerateError, RequestId};
use bytes::{Bytes, BytesMut};
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Streaming;

use super::{
    credit::Credits,
    frame::{Batch, Data, End, ErrorFrame, FRAME_COST, Frame, Kind, Open, fragments},
    handler::{CENTURY, CallContext, Handler, ResponseStream},
    outbox::Outbox,
    server::Shared,
};
use crate::panic_text;

/// Serves until the stream ends; returns why it did. Every call of the connection is cancelled then.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    mut inbound: Streaming<Batch>,
    outbox: &Arc<Outbox>,
) -> String {
    let connection = shared.stop.child_token();
    let mut session = Session {
        shared: Arc::clone(shared),
        outbox: Arc::clone(outbox),
        running: Arc::default(),
        pending: HashMap::new(),
        pending_bytes: 0,
        connection: connection.clone(),
        _cancel_on_end: connection.drop_guard(),
    };
    loop {
        let batch = match inbound.message().await {
            Ok(Some(batch)) => batch,
            Ok(None) => return "closed by the client".to_owned(),
            Err(status) => return status.to_string(),
        };
        for frame in batch.frames {
            if let Err(violation) = session.accept(frame) {
                return format!("protocol violation: {violation}");
            }
        }
    }
}

struct Session {
    shared: Arc<Shared>,
    outbox: Arc<Outbox>,
    running: Running,
    /// Requests of which a part has arrived.
    pending: HashMap<u64, Pending>,
    pending_bytes: usize,
    connection: CancellationToken,
    _cancel_on_end: DropGuard,
}

type Running = Arc<Mutex<HashMap<u64, RunningCall>>>;

struct RunningCall {
    cancellation: CancellationToken,
    credits: Arc<Credits>,
}

struct Pending {
    head: Head,
    request: BytesMut,
}

/// An [`Open`] without its data, with its deadline on this machine's clock.
struct Head {
    endpoint: String,
    request_id: String,
    deadline: Instant,
    window: u32,
}

impl Session {
    fn accept(&mut self, frame: Frame) -> Result<(), &'static str> {
        let call = frame.call;
        match frame.kind {
            Some(Kind::Open(open)) => self.open(call, open)?,
            Some(Kind::Data(data)) => self.more(call, &data),
            Some(Kind::Cancel(_)) => {
                self.forget(call);
                // The call's task takes it out of the table.
                if let Some(running) = self.running.lock().get(&call) {
                    running.cancellation.cancel();
                }
            }
            Some(Kind::Credit(amount)) => {
                if let Some(running) = self.running.lock().get(&call) {
                    running.credits.grant(amount);
                }
            }
            Some(Kind::End(_) | Kind::Error(_)) => {
                return Err("it sent a frame that only a server sends");
            }
            // A newer peer may send kinds that this build does not know.
            None => {}
        }
        Ok(())
    }

    fn open(&mut self, call: u64, open: Open) -> Result<(), &'static str> {
        if self.pending.contains_key(&call) || self.running.lock().contains_key(&call) {
            return Err("it opened a call with the number of an open one");
        }
        let head = Head {
            endpoint: open.endpoint,
            request_id: open.request_id,
            deadline: Instant::now() + Duration::from_micros(open.deadline_us).min(CENTURY),
            window: open.window,
        };
        let data = open.data.unwrap_or_default();
        if data.more {
            self.pending.insert(
                call,
                Pending {
                    head,
                    request: BytesMut::new(),
                },
            );
            // What an entry costs by itself counts, or tiny ones would be free.
            self.pending_bytes += FRAME_COST as usize;
            self.more(call, &data);
        } else {
            self.start(call, head, data.into_payload());
        }
        Ok(())
    }

    fn more(&mut self, call: u64, data: &Data) {
        let Some(pending) = self.pending.get_mut(&call) else {
            // The rest of a request that was refused or cancelled.
            return;
        };
        let limit = self.shared.config.message_bytes_max;
        if pending.request.len() + data.payload.len() > limit {
            self.refuse(
                call,
                GenerateError::new(
                    ErrorKind::InvalidRequest,
                    format!("the request message is over the limit of {limit} bytes"),
                ),
            );
            return;
        }
        pending.request.extend_from_slice(&data.payload);
        self.pending_bytes += data.payload.len();
        if !data.more {
            if let Some(pending) = self.forget(call) {
                self.start(call, pending.head, pending.request.freeze());
            }
            return;
        }
        if self.pending_bytes > self.shared.config.pending_bytes_max {
            self.drop_overdue();
        }
        if self.pending_bytes > self.shared.config.pending_bytes_max {
            self.refuse(
                call,
                GenerateError::new(
                    ErrorKind::Overloaded,
                    format!(
                        "incomplete requests hold {} bytes, over the limit of {}",
                        self.pending_bytes, self.shared.config.pending_bytes_max
                    ),
                ),
            );
        }
    }

    /// Requests whose deadline has passed need not be completed; their callers know.
    fn drop_overdue(&mut self) {
        let now = Instant::now();
        let overdue: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| pending.head.deadline <= now)
            .map(|(&call, _)| call)
            .collect();
        for call in overdue {
            self.forget(call);
        }
    }

    fn forget(&mut self, call: u64) -> Option<Pending> {
        let pending = self.pending.remove(&call)?;
        self.pending_bytes -= pending.request.len() + FRAME_COST as usize;
        Some(pending)
    }

    fn refuse(&mut self, call: u64, error: GenerateError) {
        self.forget(call);
        // A closed outbox means that nobody is there to be told.
        let _closed = self
            .outbox
            .push(Frame::new(call, Kind::Error(error.into())));
    }

    fn start(&mut self, call: u64, head: Head, request: Bytes) {
        let handler = match self.admit(&head) {
            Ok(handler) => handler,
            Err(error) => return self.refuse(call, error),
        };
        let cancellation = self.connection.child_token();
        let credits = Arc::new(Credits::new(head.window));
        self.running.lock().insert(
            call,
            RunningCall {
                cancellation: cancellation.clone(),
                credits: Arc::clone(&credits),
            },
        );
        let task = CallTask {
            call,
            head,
            credits,
            cancellation,
            outbox: Arc::clone(&self.outbox),
            message_bytes_max: self.shared.config.message_bytes_max,
            server_stop: self.shared.stop.clone(),
            running: Arc::clone(&self.running),
        };
        self.shared.calls.spawn(task.run(handler, request));
    }

    fn admit(&self, head: &Head) -> Result<Arc<dyn Handler>, GenerateError> {
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(leaving());
        }
        let limit = self.shared.config.calls_max;
        if self.running.lock().len() >= limit {
            return Err(GenerateError::new(
                ErrorKind::Overloaded,
                format!("{limit} calls of this connection are running, which is the limit"),
            ));
        }
        let handlers = self.shared.handlers.read();
        handlers.get(&head.endpoint).cloned().ok_or_else(|| {
            let known: Vec<&str> = handlers.keys().map(String::as_str).collect();
            GenerateError::new(
                ErrorKind::Unavailable,
                format!(
                    "no endpoint '{}' here; there is: {}",
                    head.endpoint,
                    known.join(", ")
                ),
            )
        })
    }
}

fn leaving() -> GenerateError {
    GenerateError::new(
        ErrorKind::WorkerLost,
        "the worker is shutting down; another one may serve the request",
    )
}

/// One running call.
struct CallTask {
    call: u64,
    head: Head,
    credits: Arc<Credits>,
    cancellation: CancellationToken,
    outbox: Arc<Outbox>,
    message_bytes_max: usize,
    server_stop: CancellationToken,
    running: Running,
}

impl CallTask {
    async fn run(self, handler: Arc<dyn Handler>, request: Bytes) {
        let context = CallContext::until(
            RequestId(self.head.request_id.clone()),
            self.head.deadline.into_std(),
            self.cancellation.clone(),
        );
        let work = AssertUnwindSafe(self.drive(handler.as_ref(), context, request)).catch_unwind();
        let outcome = tokio::select! {
            biased;
            () = self.cancellation.cancelled() => {
                // Besides the server only the client cancels, and it does not wait for an answer.
                self.server_stop.is_cancelled().then(|| Err(leaving()))
            }
            () = tokio::time::sleep_until(self.head.deadline) => {
                Some(Err(GenerateError::new(
                    ErrorKind::DeadlineExceeded,
                    format!("'{}' did not finish within its deadline", self.head.endpoint),
                )))
            }
            outcome = work => Some(outcome.unwrap_or_else(|panic| {
                Err(self.panicked(panic.as_ref()))
            })),
        };
        self.running.lock().remove(&self.call);
        let last = match outcome {
            Some(Ok(())) => Kind::End(End {}),
            Some(Err(error)) => {
                self.cancellation.cancel();
                Kind::Error(ErrorFrame::from(error))
            }
            None => return,
        };
        // A closed outbox means that nobody is there to be told.
        let _closed = self.outbox.push(Frame::new(self.call, last));
    }

    async fn drive(
        &self,
        handler: &dyn Handler,
        context: CallContext,
        request: Bytes,
    ) -> Result<(), GenerateError> {
        let mut responses: ResponseStream = handler.call(context, request).await?;
        while let Some(message) = responses.next().await {
            self.send(message?).await?;
        }
        Ok(())
    }

    async fn send(&self, message: Bytes) -> Result<(), GenerateError> {
        if message.len() > self.message_bytes_max {
            return Err(GenerateError::new(
                ErrorKind::Internal,
                format!(
                    "a response message of '{}' has {} bytes, over the limit of {}",
                    self.head.endpoint,
                    message.len(),
                    self.message_bytes_max
                ),
            ));
        }
        for piece in fragments(message) {
            self.credits.take(piece.cost()).await;
            self.outbox
                .send(Frame::new(self.call, Kind::Data(piece)))
                .await
                .map_err(|_closed| {
                    GenerateError::new(ErrorKind::Cancelled, "the client is gone")
                })?;
        }
        Ok(())
    }

    fn panicked(&self, panic: &(dyn std::any::Any + Send)) -> GenerateError {
        let text = panic_text(panic);
        tracing::error!(
            endpoint = self.head.endpoint,
            request_id = self.head.request_id,
            panic = text,
            "a handler panicked"
        );
        GenerateError::new(
            ErrorKind::Internal,
            format!("the handler of '{}' panicked: {text}", self.head.endpoint),
        )
    }
}
