//! Calls between processes: one multiplexed connection per pair.
//!
//! A client opens one HTTP/2 connection to a server's address and on it one bidirectional gRPC stream
//! (`docs/protocol.md`, section "RPC frames"). All calls to that server share it; the request goes out
//! and the responses come back on the same connection, so that its loss is known to every call at once.
//!
//! * Responses are flow-controlled per call by byte credits: a consumer that does not read stops its
//!   own handler after a window and delays nobody else. Both ends always read the stream.
//! * Messages above 128 KiB are cut into fragments that interleave with other calls.
//! * Dropping [`Responses`] sends a cancel that drops the handler's future and stream.
//! * A killed peer is noticed by the reset of its connection, a stopped one by HTTP/2 pings within
//!   [`RpcClientConfig::peer_loss_timeout`]; every call fails with [`RpcError::PeerLost`].
//! * The next call connects again; after a failed connect, calls fail at once for a short pause.

mod client;
mod connection;
mod credit;
mod error;
mod frame;
mod handler;
mod outbox;
mod responses;
mod server;
mod session;
mod transport;

pub use client::{CallOptions, ConnectionEvent, ConnectionEvents, RpcClient, RpcClientConfig};
pub use error::RpcError;
pub use handler::{CallContext, Handler, ResponseStream, handler_fn, unary_fn};
pub use responses::Responses;
pub use server::{BindError, DrainReport, RpcServer, RpcServerConfig};
