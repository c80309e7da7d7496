//! The calling side: one connection per address, made by the first call and shared by all.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use blockplane_protocol::{RequestId, codec::MESSAGE_BYTES_MAX};
use bytes::Bytes;
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use tokio::{
    sync::{broadcast, oneshot},
    time::Instant,
};

use super::{
    connection::{Connection, ConnectionHandle},
    error::RpcError,
    handler::CENTURY,
    responses::Responses,
};

/// Addresses with a failed connect that are remembered before old ones are forgotten.
const FAILED_SLOTS_MAX: usize = 1024;
/// Connection events that a slow reader may be behind before it misses some.
const EVENTS_MAX: usize = 1024;

/// Settings of an [`RpcClient`].
#[derive(Clone, Debug)]
pub struct RpcClientConfig {
    /// A connect that takes longer has failed. Default 2 s.
    pub connect_timeout: Duration,
    /// A peer that does not answer for this long, dead or stopped, is lost. A fifth of it is the
    /// pause between pings of a silent connection. Default 2 s.
    pub peer_loss_timeout: Duration,
    /// After a failed connect, calls to that address fail at once for this long; doubles with each
    /// failure up to [`backoff_max`](Self::backoff_max). Default 20 ms.
    pub backoff_min: Duration,
    /// Longest such pause. Default 1 s.
    pub backoff_max: Duration,
    /// Largest request or response message, in bytes. Default 32 MiB.
    pub message_bytes_max: usize,
    /// Bytes (128 per message added) that a server may send ahead of the consumer, per call.
    /// Default 512 KiB.
    pub window_bytes: u32,
    /// Calls that may be open on one connection. Default 16,384.
    pub calls_max: usize,
}

impl Default for RpcClientConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            peer_loss_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
            message_bytes_max: MESSAGE_BYTES_MAX,
            window_bytes: 512 << 10,
            calls_max: 16_384,
        }
    }
}

/// Settings of one call.
#[derive(Clone, Debug)]
pub struct CallOptions {
    /// Time for the whole call: connecting, the handler, and all responses.
    pub deadline: Duration,
    /// Name of the request in logs on both sides; without one the call's number on its connection.
    pub request_id: Option<RequestId>,
}

impl CallOptions {
    /// A call that may take this long.
    #[must_use]
    pub const fn new(deadline: Duration) -> Self {
        Self {
            deadline,
            request_id: None,
        }
    }

    /// The same for this request.
    #[must_use]
    pub fn request_id(mut self, id: RequestId) -> Self {
        self.request_id = Some(id);
        self
    }
}

/// What happened to a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionEvent {
    /// A connection to this address was made.
    Connected {
        /// The peer.
        address: String,
    },
    /// The connection is gone; every call on it has failed with [`RpcError::PeerLost`].
    Lost {
        /// The peer.
        address: String,
        /// How it was noticed.
        reason: String,
    },
    /// The reader was too slow and this many events were dropped.
    Missed(u64),
}

/// Subscription made by [`RpcClient::connection_events`].
#[derive(Debug)]
pub struct ConnectionEvents(broadcast::Receiver<ConnectionEvent>);

impl ConnectionEvents {
    /// The next event; `None` when the client is gone.
    pub async fn recv(&mut self) -> Option<ConnectionEvent> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                Some(ConnectionEvent::Missed(missed))
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Makes calls. Clones share their connections; when the last clone and the last open call are gone,
/// the connections close.
#[derive(Clone)]
pub struct RpcClient {
    inner: Arc<ClientInner>,
}

pub(crate) struct ClientInner {
    pub(crate) config: RpcClientConfig,
    slots: Mutex<HashMap<String, Slot>>,
    events: broadcast::Sender<ConnectionEvent>,
}

type SharedConnect = Shared<BoxFuture<'static, Result<Arc<ConnectionHandle>, RpcError>>>;

enum Slot {
    /// The first call is connecting; the others wait for the same outcome.
    Connecting {
        attempt: SharedConnect,
        failures: u32,
    },
    Ready(Arc<ConnectionHandle>),
    Failed {
        until: Instant,
        failures: u32,
        error: RpcError,
    },
}

impl RpcClient {
    /// A client without any connection yet.
    #[must_use]
    pub fn new(config: RpcClientConfig) -> Self {
        Self {
            inner: Arc::new(ClientInner {
                config,
                slots: Mutex::default(),
                events: broadcast::Sender::new(EVENTS_MAX),
            }),
        }
    }

    /// Calls `endpoint` at `address` (`host:port`). Returns when the request is on its way.
    ///
    /// # Errors
    /// When the message is too large, there is no connection and none can be made, or the deadline
    /// passes before that. What the handler answers comes with the responses.
    pub async fn call(
        &self,
        address: &str,
        endpoint: &str,
        payload: Bytes,
        options: CallOptions,
    ) -> Result<Responses, RpcError> {
        let config = &self.inner.config;
        if payload.len() > config.message_bytes_max {
            return Err(RpcError::MessageTooLarge {
                bytes: payload.len(),
                limit: config.message_bytes_max,
            });
        }
        let until = Instant::now() + options.deadline.min(CENTURY);
        let start = async {
            let handle = self.inner.connection(address).await?;
            Responses::open(
                handle,
                endpoint,
                payload,
                options.request_id.as_ref(),
                until,
                options.deadline,
                config,
            )
            .await
        };
        tokio::time::timeout_at(until, start)
            .await
            .unwrap_or_else(|_elapsed| {
                Err(RpcError::DeadlineExceeded {
                    address: address.to_owned(),
                    endpoint: endpoint.to_owned(),
                    limit: options.deadline,
                })
            })
    }

    /// Calls an endpoint that answers with exactly one message.
    ///
    /// # Errors
    /// As [`call`](Self::call), what the handler answers, and [`RpcError::Protocol`] when it answers
    /// with no message or with several.
    pub async fn call_unary(
        &self,
        address: &str,
        endpoint: &str,
        payload: Bytes,
        options: CallOptions,
    ) -> Result<Bytes, RpcError> {
        self.call(address, endpoint, payload, options)
            .await?
            .only()
            .await
    }

    /// Connections made and lost from now on. A router drops a worker the moment its connection
    /// breaks, without waiting for a lease.
    #[must_use]
    pub fn connection_events(&self) -> ConnectionEvents {
        ConnectionEvents(self.inner.events.subscribe())
    }

    /// Whether a connection to `address` is up.
    #[must_use]
    pub fn is_connected(&self, address: &str) -> bool {
        matches!(self.inner.slots.lock().get(address), Some(Slot::Ready(_)))
    }

    /// Forgets `address`: its connection closes when the calls that are open on it have ended.
    pub fn disconnect(&self, address: &str) {
        let slot = self.inner.slots.lock().remove(address);
        drop(slot);
    }
}

impl ClientInner {
    async fn connection(
        self: &Arc<Self>,
        address: &str,
    ) -> Result<Arc<ConnectionHandle>, RpcError> {
        let attempt = {
            let mut slots = self.slots.lock();
            let failures = match slots.get(address) {
                Some(Slot::Ready(handle)) => return Ok(Arc::clone(handle)),
                Some(Slot::Failed { until, error, .. }) if Instant::now() < *until => {
                    return Err(error.clone());
                }
                Some(Slot::Failed { failures, .. }) => Ok(*failures),
                Some(Slot::Connecting { attempt, .. }) => Err(attempt.clone()),
                None => Ok(0),
            };
            match failures {
                Err(attempt) => attempt,
                Ok(failures) => {
                    forget_failed(&mut slots);
                    let attempt = self.connect(address);
                    slots.insert(
                        address.to_owned(),
                        Slot::Connecting {
                            attempt: attempt.clone(),
                            failures,
                        },
                    );
                    attempt
                }
            }
        };
        attempt.await
    }

    /// Connects in a task of its own, so that the attempt outlives the call that started it.
    fn connect(self: &Arc<Self>, address: &str) -> SharedConnect {
        let (done, outcome) = oneshot::channel();
        let client = Arc::downgrade(self);
        let config = self.config.clone();
        let address_owned = address.to_owned();
        tokio::spawn(async move {
            let result = Connection::connect(&address_owned, &config, Weak::clone(&client)).await;
            if let Some(client) = client.upgrade() {
                client.settle(&address_owned, &result);
            }
            // All who waited may have given up.
            let _gone = done.send(result);
        });
        let address = address.to_owned();
        async move {
            outcome.await.unwrap_or_else(|_dropped| {
                Err(RpcError::CannotConnect {
                    address,
                    reason: "the runtime is shutting down".to_owned(),
                })
            })
        }
        .boxed()
        .shared()
    }

    fn settle(&self, address: &str, result: &Result<Arc<ConnectionHandle>, RpcError>) {
        let mut slots = self.slots.lock();
        let Some(slot @ Slot::Connecting { .. }) = slots.get_mut(address) else {
            return;
        };
        let Slot::Connecting { failures, .. } = slot else {
            return;
        };
        *slot = match result {
            // A connection that broke already must not be kept: nobody would remove it.
            Ok(handle) if handle.is_lost() => Slot::Failed {
                until: Instant::now(),
                failures: 0,
                error: handle.lost_error(),
            },
            Ok(handle) => {
                // Under the lock, so that its loss is published after it.
                self.publish(ConnectionEvent::Connected {
                    address: address.to_owned(),
                });
                Slot::Ready(Arc::clone(handle))
            }
            Err(error) => {
                let doubled = self
                    .config
                    .backoff_min
                    .saturating_mul(1 << (*failures).min(16));
                Slot::Failed {
                    until: Instant::now() + doubled.min(self.config.backoff_max),
                    failures: failures.saturating_add(1),
                    error: error.clone(),
                }
            }
        };
    }

    /// A connection broke.
    pub(crate) fn lost(&self, connection: &Connection, reason: &str) {
        {
            let mut slots = self.slots.lock();
            if let Some(Slot::Ready(handle)) = slots.get(connection.address())
                && handle.is(connection)
            {
                slots.remove(connection.address());
            }
        }
        self.publish(ConnectionEvent::Lost {
            address: connection.address().to_owned(),
            reason: reason.to_owned(),
        });
    }

    fn publish(&self, event: ConnectionEvent) {
        // Nobody has to listen.
        let _listeners = self.events.send(event);
    }
}

/// Keeps the table bounded: addresses that failed and are not in their pause need not be remembered.
fn forget_failed(slots: &mut HashMap<String, Slot>) {
    if slots.len() < FAILED_SLOTS_MAX {
        return;
    }
    let now = Instant::now();
    slots.retain(|_, slot| !matches!(slot, Slot::Failed { until, .. } if *until <= now));
}

impl fmt::Debug for RpcClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut addresses: Vec<String> = self.inner.slots.lock().keys().cloned().collect();
        addresses.sort();
        f.debug_struct("RpcClient")
            .field("addresses", &addresses)
            .finish_non_exhaustive()
    }
}
