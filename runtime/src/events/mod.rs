//! Following a worker's feed of KV events and load: gaps are noticed and repaired.
//!
//! [`FeedTracker`] is the pure part: it knows the position in each rank's sequence. [`FeedSubscriber`]
//! keeps a subscription going over the RPC. A worker answers one with [`feed_response`].

mod subscriber;
mod tracker;

use blockplane_protocol::{FeedItem, codec};
use bytes::Bytes;
use futures::{Stream, StreamExt};

pub use subscriber::{FeedConfig, FeedSubscriber, FeedUpdate};
pub use tracker::{Accepted, FeedFault, FeedTracker};

use crate::rpc::ResponseStream;

/// What a worker's handler returns for a subscription.
pub fn feed_response(items: impl Stream<Item = FeedItem> + Send + 'static) -> ResponseStream {
    items
        .map(|item| Ok(Bytes::from(codec::encode(&item))))
        .boxed()
}
