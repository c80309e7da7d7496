//! What changed in the pools of a rank, for those who keep an index of them.
//!
//! A pool tells its changes to one or more [`EventHub`]s: to one of its own, or to those that it
//! joined. The hub of a rank has all tiers in which the rank finds blocks, some of which other ranks
//! share. Blocks that an engine outside of this process holds are told by an [`EventWriter`].
//!
//! Every event has a number, one higher than the one before. A subscriber says which number it saw
//! last; it gets what came after, or, when that is no longer kept, a snapshot of everything and
//! then what came after the snapshot. So a subscriber is never told of a change that it cannot
//! place, and a slow one costs the pools nothing.

mod hub;
mod present;
mod ring;
mod snapshot;
mod writer;

use std::{
    fmt,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use blockplane_protocol::KvEvent;
pub(crate) use hub::{Change, Membership, Wakeups};
pub use hub::{Consolidation, EventHub, HUB_POOLS_MAX, JoinError};
use hub::{SubscriberId, Take};
pub use snapshot::KvSnapshot;
pub use writer::EventWriter;

/// Source of the events of one hub. Cheap to clone.
#[derive(Clone)]
pub struct EventFeed {
    hub: Arc<EventHub>,
}

/// One subscriber's place in the events.
pub struct EventSubscription {
    feed: EventFeed,
    id: SubscriberId,
    /// The last event delivered; `None` asks for a snapshot.
    seen: Option<u64>,
}

/// What a subscriber gets at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvBatch {
    /// Forget what you knew; this is everything.
    Snapshot(KvSnapshot),
    /// At least one event; the first has the number after the last one delivered.
    Events(Vec<KvEvent>),
}

impl EventFeed {
    pub(crate) fn new(hub: Arc<EventHub>) -> Self {
        Self { hub }
    }

    /// Number of the last event; 0 before the first.
    #[must_use]
    pub fn last_event_id(&self) -> u64 {
        self.hub.last_id()
    }

    /// Events after number `from`. The first batch is a snapshot when `from` is `None`, or when the
    /// event after it is no longer or not yet known. Numbers are of this hub: a subscriber of an
    /// earlier life of the worker must pass `None`.
    #[must_use]
    pub fn subscribe(&self, from: Option<u64>) -> EventSubscription {
        EventSubscription {
            feed: self.clone(),
            id: self.hub.subscriber_id(),
            seen: from,
        }
    }
}

impl EventSubscription {
    /// The next batch, or `None` when a pool or the writer is gone and everything was
    /// delivered.
    ///
    /// Cancel safe, and not tied to an async runtime.
    pub async fn next(&mut self) -> Option<KvBatch> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`EventSubscription::next`] for those who implement futures by hand.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<KvBatch>> {
        match self.feed.hub.take_or_wake(self.seen, self.id, cx.waker()) {
            Take::Nothing => Poll::Pending,
            other => Poll::Ready(self.deliver(other)),
        }
    }

    /// Waits on this thread for at most `timeout`. `Ok(None)` when a pool is gone and everything
    /// was delivered.
    ///
    /// # Errors
    /// [`NoEventYet`] when the time passed.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Option<KvBatch>, NoEventYet> {
        match self.feed.hub.take_within(self.seen, timeout) {
            Take::Nothing => Err(NoEventYet),
            other => Ok(self.deliver(other)),
        }
    }

    /// What is there now. `Ok(None)` when a pool is gone and everything was delivered.
    ///
    /// # Errors
    /// [`NoEventYet`] when there is nothing new.
    pub fn try_recv(&mut self) -> Result<Option<KvBatch>, NoEventYet> {
        self.recv_timeout(Duration::ZERO)
    }

    fn deliver(&mut self, take: Take) -> Option<KvBatch> {
        match take {
            Take::Events(events) => {
                self.seen = events.last().map(|event| event.event_id);
                Some(KvBatch::Events(events))
            }
            Take::TooFarBehind => {
                let snapshot = self.feed.hub.snapshot()?;
                self.seen = Some(snapshot.last_event_id);
                Some(KvBatch::Snapshot(snapshot))
            }
            Take::Closed => None,
            Take::Nothing => unreachable!("callers handle it"),
        }
    }
}

/// No event came in the time given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no KV event yet")]
pub struct NoEventYet;

impl Drop for EventSubscription {
    fn drop(&mut self) {
        self.feed.hub.forget_waker(self.id);
    }
}

impl fmt::Debug for EventFeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventFeed")
            .field("last_event_id", &self.last_event_id())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for EventSubscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventSubscription")
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}
