//! The serving side: accepts connections and runs handlers.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use blockplane_protocol::codec::MESSAGE_BYTES_MAX;
use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Request, Response, Status, Streaming, body::Body, server::Grpc, server::StreamingService,
    transport::Server, transport::server::TcpIncoming,
};
use tonic_prost::ProstCodec;
use tower::Service;

use super::{
    frame::{BATCH_BYTES_MAX, Batch, METHOD_PATH},
    handler::Handler,
    outbox::{Outbox, OutboxStream},
    session,
    transport::{HTTP2_FRAME_BYTES, HTTP2_WINDOW_BYTES, PingTimes},
};

/// How long connections get to close after the calls are over.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Settings of an [`RpcServer`].
#[derive(Clone, Debug)]
pub struct RpcServerConfig {
    /// A client that does not answer for this long is lost and its calls are cancelled. Default 2 s.
    pub peer_loss_timeout: Duration,
    /// Largest request or response message, in bytes. Default 32 MiB.
    pub message_bytes_max: usize,
    /// Bytes of requests that may be incomplete, per connection; a call beyond it is refused as
    /// overloaded. Default 256 MiB.
    pub pending_bytes_max: usize,
    /// Calls that may run for one connection; more are refused as overloaded. Default 16,384.
    pub calls_max: usize,
    /// Connections that may be open; more are refused. Default 1024.
    pub connections_max: usize,
}

impl Default for RpcServerConfig {
    fn default() -> Self {
        Self {
            peer_loss_timeout: Duration::from_secs(2),
            message_bytes_max: MESSAGE_BYTES_MAX,
            pending_bytes_max: 256 << 20,
            calls_max: 16_384,
            connections_max: 1024,
        }
    }
}

/// Why a server does not start.
#[derive(Debug, Error)]
#[error("cannot listen on {address}: {source}")]
pub struct BindError {
    /// The address asked for.
    pub address: SocketAddr,
    /// What the operating system said.
    pub source: io::Error,
}

/// How a shutdown went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainReport {
    /// Calls that ran when it began.
    pub running: usize,
    /// Calls that were cut off when the grace period ended.
    pub cancelled: usize,
}

/// Serves endpoints at one address. Clones are the same server. When the last one is dropped the
/// server stops at once; [`shutdown`](Self::shutdown) stops it gently.
#[derive(Clone)]
pub struct RpcServer {
    inner: Arc<ServerInner>,
}

struct ServerInner {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    accept: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for ServerInner {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.close_connections();
    }
}

/// What connections and calls see of the server.
pub(crate) struct Shared {
    pub(crate) config: RpcServerConfig,
    pub(crate) handlers: RwLock<BTreeMap<String, Arc<dyn Handler>>>,
    /// New calls are refused.
    pub(crate) draining: AtomicBool,
    /// Running calls are cut off.
    pub(crate) stop: CancellationToken,
    pub(crate) calls: TaskTracker,
    /// No new connections; open ones end with their stream.
    closing: CancellationToken,
    connections: Mutex<HashMap<u64, Arc<Outbox>>>,
    next_connection: AtomicU64,
}

impl RpcServer {
    /// Where to listen when nothing else is asked for: loopback, any free port.
    pub const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    /// Listens on `address` and serves from now on. Port 0 takes a free one.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn bind(address: SocketAddr, config: RpcServerConfig) -> Result<Self, BindError> {
        let error = |source| BindError { address, source };
        let listener = TcpListener::bind(address).await.map_err(error)?;
        let local_addr = listener.local_addr().map_err(error)?;
        let pings = PingTimes::within(config.peer_loss_timeout);
        let shared = Arc::new(Shared {
            config,
            handlers: RwLock::default(),
            draining: AtomicBool::new(false),
            stop: CancellationToken::new(),
            calls: TaskTracker::new(),
            closing: CancellationToken::new(),
            connections: Mutex::default(),
            next_connection: AtomicU64::new(1),
        });
        let serving = Server::builder()
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES)
            .max_frame_size(HTTP2_FRAME_BYTES)
            .http2_keepalive_interval(Some(pings.interval))
            .http2_keepalive_timeout(Some(pings.timeout))
            .serve_with_incoming_shutdown(
                PeerService {
                    shared: Arc::clone(&shared),
                },
                TcpIncoming::from(listener).with_nodelay(Some(true)),
                shared.closing.clone().cancelled_owned(),
            );
        let accept = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%local_addr, %error, "the RPC server stopped accepting");
            }
        });
        Ok(Self {
            inner: Arc::new(ServerInner {
                shared,
                local_addr,
                accept: Mutex::new(Some(accept)),
            }),
        })
    }

    /// Serves `endpoint` with this handler, in place of an earlier one.
    pub fn handle(&self, endpoint: &str, handler: Arc<dyn Handler>) {
        self.inner
            .shared
            .handlers
            .write()
            .insert(endpoint.to_owned(), handler);
    }

    /// The address that it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.local_addr
    }

    /// Calls that are running.
    #[must_use]
    pub fn calls_running(&self) -> usize {
        self.inner.shared.calls.len()
    }

    /// Stops: refuses new calls as leaving (which callers may retry elsewhere), lets running ones
    /// finish for up to `grace`, cuts off the rest with the same error, closes the connections. Takes
    /// at most two seconds longer than `grace`. Later calls of it return at once.
    pub async fn shutdown(&self, grace: Duration) -> DrainReport {
        let shared = &self.inner.shared;
        shared.draining.store(true, Ordering::Release);
        let running = shared.calls.len();
        shared.calls.close();
        let drained = tokio::time::timeout(grace, shared.calls.wait()).await;
        let cancelled = match drained {
            Ok(()) => 0,
            Err(_elapsed) => shared.calls.len(),
        };
        shared.stop.cancel();
        if tokio::time::timeout(CLOSE_TIMEOUT, shared.calls.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                calls = shared.calls.len(),
                "handlers do not yield; leaving them behind"
            );
        }
        shared.close_connections();
        let accept = self.inner.accept.lock().take();
        if let Some(mut accept) = accept
            && tokio::time::timeout(CLOSE_TIMEOUT, &mut accept)
                .await
                .is_err()
        {
            accept.abort();
        }
        DrainReport { running, cancelled }
    }
}

impl Shared {
    fn close_connections(&self) {
        self.closing.cancel();
        for outbox in self.connections.lock().values() {
            outbox.close();
        }
    }

    /// Starts serving a new stream.
    fn connect(
        self: &Arc<Self>,
        inbound: Streaming<Batch>,
        peer: Option<SocketAddr>,
    ) -> Result<OutboxStream, Status> {
        let outbox = Outbox::new();
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        {
            let mut connections = self.connections.lock();
            if self.closing.is_cancelled() {
                return Err(Status::unavailable("the server is shutting down"));
            }
            if connections.len() >= self.config.connections_max {
                return Err(Status::resource_exhausted(format!(
                    "{} connections are open, which is the limit",
                    self.config.connections_max
                )));
            }
            connections.insert(id, Arc::clone(&outbox));
        }
        let stream = OutboxStream(Arc::clone(&outbox));
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            let end = tokio::select! {
                biased;
                () = shared.closing.cancelled() => "shut down".to_owned(),
                end = session::serve(&shared, inbound, &outbox) => end,
            };
            tracing::debug!(peer = ?peer, end, "RPC connection closed");
            outbox.close();
            shared.connections.lock().remove(&id);
        });
        Ok(stream)
    }
}

impl fmt::Debug for RpcServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpcServer")
            .field("local_addr", &self.inner.local_addr)
            .field(
                "endpoints",
                &self.inner.shared.handlers.read().keys().collect::<Vec<_>>(),
            )
            .finish_non_exhaustive()
    }
}

/// The gRPC service with its one method.
#[derive(Clone)]
struct PeerService {
    shared: Arc<Shared>,
}

impl Service<http::Request<Body>> for PeerService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = ConnectMethod(Arc::clone(&self.shared));
        Box::pin(async move {
            if request.uri().path() != METHOD_PATH {
                let status = Status::unimplemented(format!(
                    "no method {}; this build speaks {METHOD_PATH}",
                    request.uri().path()
                ));
                return Ok(status.into_http());
            }
            let mut grpc = Grpc::new(ProstCodec::<Batch, Batch>::default())
                .max_decoding_message_size(BATCH_BYTES_MAX);
            Ok(grpc.streaming(method, request).await)
        })
    }
}

struct ConnectMethod(Arc<Shared>);

impl StreamingService<Batch> for ConnectMethod {
    type Response = Batch;
    type ResponseStream = OkStream;
    type Future = std::future::Ready<Result<Response<OkStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Batch>>) -> Self::Future {
        let peer = request.remote_addr();
        std::future::ready(
            self.0
                .connect(request.into_inner(), peer)
                .map(|stream| Response::new(OkStream(stream))),
        )
    }
}

/// The outbox in the form that tonic's server wants.
struct OkStream(OutboxStream);

impl futures::Stream for OkStream {
    type Item = Result<Batch, Status>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Self::Item>> {
        std::pin::Pin::new(&mut self.0)
            .poll_next(cx)
            .map(|batch| batch.map(Ok))
    }
}
