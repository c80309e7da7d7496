//! The control plane between processes: who is there, how to call them, how to stop.
//!
//! * [`discovery`]: instances register under a lease and are watched; in memory, or in a directory.
//! * [`rpc`]: calls and streams over one multiplexed connection per pair of processes.
//! * [`events`]: following a worker's KV events and load without gaps.
//! * [`lifecycle`]: readiness, named tasks, shutdown in phases.
//!
//! Nothing here reads the environment or handles signals; the launcher does.
//!
//! # Example
//!
//! A worker registers an endpoint, a caller finds it and streams from it:
//!
//! ```
//! use std::time::Duration;
//!
//! use blockplane_protocol::WorkerId;
//! use blockplane_runtime::{
//!     discovery::{Discovery, Instance, MemoryDiscovery},
//!     rpc::{CallOptions, RpcClient, RpcClientConfig, RpcServer, RpcServerConfig, handler_fn},
//! };
//! use bytes::Bytes;
//! use futures::StreamExt;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = RpcServer::bind(RpcServer::LOOPBACK, RpcServerConfig::default()).await?;
//! server.handle(
//!     "generate",
//!     handler_fn(|_context, prompt: Bytes| async move {
//!         let words: Vec<Bytes> = prompt.split(|&b| b == b' ').map(Bytes::copy_from_slice).collect();
//!         Ok(futures::stream::iter(words.into_iter().map(Ok)).boxed())
//!     }),
//! );
//! let discovery = MemoryDiscovery::new();
//! let lease = discovery
//!     .register(Instance {
//!         id: WorkerId(1),
//!         endpoint: "dyn://demo.worker.generate".parse()?,
//!         address: server.local_addr().to_string(),
//!         metadata: serde_json::Value::Null,
//!     })
//!     .await?;
//!
//! let mut workers = discovery.watch("demo").await?;
//! let found = workers.wait_for(|instances| !instances.is_empty()).await?;
//! let worker = found.values().next().expect("waited for one");
//! let client = RpcClient::new(RpcClientConfig::default());
//! let options = CallOptions::new(Duration::from_secs(10));
//! let responses = client
//!     .call(&worker.address, worker.endpoint.endpoint(), Bytes::from_static(b"one two"), options)
//!     .await?;
//! let words: Vec<_> = responses.map(|word| word.expect("the worker is up")).collect().await;
//! assert_eq!(words, ["one", "two"]);
//!
//! lease.revoke().await?;
//! server.shutdown(Duration::from_secs(5)).await;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod discovery;
pub mod events;
pub mod lifecycle;
pub mod rpc;

/// The message of a panic.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}
