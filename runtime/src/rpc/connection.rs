//! The client's end of one connection: opens the stream and hands what arrives to the calls.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use http::uri::PathAndQuery;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tonic::{
    Streaming,
    client::Grpc,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::{
    client::{ClientInner, RpcClientConfig},
    error::RpcError,
    frame::{BATCH_BYTES_MAX, Batch, Data, ErrorFrame, FRAME_COST, Frame, Kind, METHOD_PATH},
    outbox::{Outbox, OutboxStream},
    transport::{HTTP2_FRAME_BYTES, HTTP2_WINDOW_BYTES, PingTimes},
};

/// What a call receives.
#[derive(Debug)]
pub(crate) enum Incoming {
    Data { payload: Bytes, more: bool },
    End,
    Error(ErrorFrame),
}

/// State shared by the calls and the reading task.
#[derive(Debug)]
pub(crate) struct Connection {
    address: String,
    outbox: Arc<Outbox>,
    calls: Mutex<HashMap<u64, mpsc::Sender<Incoming>>>,
    next_call: AtomicU64,
    lost: OnceLock<String>,
    /// This side has closed it.
    released: AtomicBool,
    calls_max: usize,
}

/// What keeps a connection up: held by the client and by each open call.
#[derive(Debug)]
pub(crate) struct ConnectionHandle(Arc<Connection>);

impl Drop for ConnectionHandle {
    fn drop(&mut self) {
        self.0.released.store(true, Ordering::Release);
        self.0.outbox.close();
    }
}

impl std::ops::Deref for ConnectionHandle {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0
    }
}

impl ConnectionHandle {
    pub(crate) fn is(&self, connection: &Connection) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.0), connection)
    }
}

impl Connection {
    /// Connects and opens the stream.
    pub(crate) async fn connect(
        address: &str,
        config: &RpcClientConfig,
        client: Weak<ClientInner>,
    ) -> Result<Arc<ConnectionHandle>, RpcError> {
        let outbox = Outbox::new();
        let opened = tokio::time::timeout(
            config.connect_timeout,
            open_stream(address, config, OutboxStream(Arc::clone(&outbox))),
        )
        .await
        .unwrap_or_else(|_elapsed| Err(format!("no answer within {:?}", config.connect_timeout)));
        let (channel, inbound) = opened.map_err(|reason| RpcError::CannotConnect {
            address: address.to_owned(),
            reason,
        })?;
        let connection = Arc::new(Self {
            address: address.to_owned(),
            outbox,
            calls: Mutex::default(),
            next_call: AtomicU64::new(1),
            lost: OnceLock::new(),
            released: AtomicBool::new(false),
            calls_max: config.calls_max,
        });
        tokio::spawn(read(Arc::clone(&connection), channel, inbound, client));
        Ok(Arc::new(ConnectionHandle(connection)))
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    pub(crate) fn lost_error(&self) -> RpcError {
        RpcError::PeerLost {
            address: self.address.clone(),
            reason: self
                .lost
                .get()
                .map_or("the connection closed", String::as_str)
                .to_owned(),
        }
    }

    /// Enters a call into the table.
    pub(crate) fn enter(&self, window: u32) -> Result<(u64, mpsc::Receiver<Incoming>), RpcError> {
        // The window bounds what a well-behaved server has in flight: overdrawn by one frame, and
        // one end or error.
        let capacity = (window / FRAME_COST) as usize + 3;
        let (sender, receiver) = mpsc::channel(capacity);
        let call = self.next_call.fetch_add(1, Ordering::Relaxed);
        let mut calls = self.calls.lock();
        if self.is_lost() {
            return Err(self.lost_error());
        }
        if calls.len() >= self.calls_max {
            return Err(RpcError::TooManyCalls {
                address: self.address.clone(),
                limit: self.calls_max,
            });
        }
        calls.insert(call, sender);
        Ok((call, receiver))
    }

    /// Takes a call out of the table; what still arrives for it is dropped.
    pub(crate) fn leave(&self, call: u64) {
        self.calls.lock().remove(&call);
    }

    fn dispatch(&self, frame: Frame) -> Result<(), String> {
        let call = frame.call;
        let (incoming, last) = match frame.kind {
            Some(Kind::Data(data)) => (received(data), false),
            Some(Kind::End(_)) => (Incoming::End, true),
            Some(Kind::Error(error)) => (Incoming::Error(error), true),
            // A newer peer may send kinds that this build does not know.
            None => return Ok(()),
            Some(Kind::Open(_) | Kind::Cancel(_) | Kind::Credit(_)) => {
                return Err("it sent a frame that only a client sends".to_owned());
            }
        };
        let mut calls = self.calls.lock();
        let Some(sender) = calls.get(&call) else {
            return Ok(());
        };
        let overrun = sender.try_send(incoming).is_err_and(|error| {
            // A closed receiver is a call that was just dropped.
            matches!(error, mpsc::error::TrySendError::Full(_))
        });
        if overrun || last {
            // Without an end or an error before it, the closed channel tells the call of the overrun.
            calls.remove(&call);
        }
        Ok(())
    }

    fn fail(&self, reason: String) {
        // Only the reading task gets here, once; the first reason stays.
        let _first = self.lost.set(reason);
        self.outbox.close();
        // Each call reads what has arrived, then finds its channel closed.
        let calls = std::mem::take(&mut *self.calls.lock());
        drop(calls);
    }
}

fn received(data: Data) -> Incoming {
    let more = data.more;
    Incoming::Data {
        payload: data.into_payload(),
        more,
    }
}

async fn open_stream(
    address: &str,
    config: &RpcClientConfig,
    outbound: OutboxStream,
) -> Result<(Channel, Streaming<Batch>), String> {
    let pings = PingTimes::within(config.peer_loss_timeout);
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| format!("not an address of the form host:port: {error}"))?
        .tcp_nodelay(true)
        .http2_keep_alive_interval(pings.interval)
        .keep_alive_timeout(pings.timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(HTTP2_WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES);
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| error_chain(&error))?;
    let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(BATCH_BYTES_MAX);
    grpc.ready().await.map_err(|error| error_chain(&error))?;
    let response = grpc
        .streaming(
            tonic::Request::new(outbound),
            PathAndQuery::from_static(METHOD_PATH),
            ProstCodec::<Batch, Batch>::default(),
        )
        .await
        .map_err(|status| format!("the peer refused the stream: {}", status_text(&status)))?;
    Ok((channel, response.into_inner()))
}

/// Reads until the connection ends. Holds the channel, because dropping it may close the connection.
async fn read(
    connection: Arc<Connection>,
    channel: Channel,
    mut inbound: Streaming<Batch>,
    client: Weak<ClientInner>,
) {
    let reason = loop {
        match inbound.message().await {
            Ok(Some(batch)) => {
                let outcome = batch
                    .frames
                    .into_iter()
                    .try_for_each(|frame| connection.dispatch(frame));
                if let Err(reason) = outcome {
                    break reason;
                }
            }
            Ok(None) => break "the peer closed the connection".to_owned(),
            Err(status) => break status_text(&status),
        }
    };
    drop(inbound);
    drop(channel);
    connection.fail(reason.clone());
    if !connection.released.load(Ordering::Acquire)
        && let Some(client) = client.upgrade()
    {
        client.lost(&connection, &reason);
    }
}

fn status_text(status: &tonic::Status) -> String {
    let source = std::error::Error::source(status).map(error_chain);
    source.map_or_else(
        || format!("{}: {}", status.code(), status.message()),
        |source| format!("{}: {source}", status.message()),
    )
}

/// The messages of an error and its causes, without repetitions.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
