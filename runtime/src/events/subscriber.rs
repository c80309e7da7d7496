//! A subscription that is kept going: reconnects, resyncs after gaps, notices silence.

use std::{collections::VecDeque, time::Duration};

use blockplane_protocol::{
    DpRank, FeedItem, KvEvent, LoadReport, WorkerId, codec, feed::SnapshotBlock,
};
use bytes::Bytes;
use futures::StreamExt;
use tokio::time::Instant;

use super::tracker::{FeedFault, FeedTracker};
use crate::rpc::{CallOptions, Responses, RpcClient, RpcError};

/// Settings of a [`FeedSubscriber`].
#[derive(Clone, Debug)]
pub struct FeedConfig {
    /// A worker that sends nothing for this long, not even a load report, is asked again. Default
    /// 10 s. (A lost connection is noticed sooner, by the RPC.)
    pub idle_timeout: Duration,
    /// A subscription is renewed after this time, since every call has a deadline. Default 1 h.
    pub renew_after: Duration,
    /// Pause after a failure; doubles up to [`backoff_max`](Self::backoff_max). Default 50 ms.
    pub backoff_min: Duration,
    /// Longest pause. Default 2 s.
    pub backoff_max: Duration,
}

impl Default for FeedConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(10),
            renew_after: Duration::from_hours(1),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
        }
    }
}

/// What a [`FeedSubscriber`] yields.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedUpdate {
    /// Replaces all that is known of a rank.
    Snapshot {
        /// The rank.
        rank: DpRank,
        /// The last event that the snapshot contains.
        last_event_id: u64,
        /// The blocks, each after its parent.
        blocks: Vec<SnapshotBlock>,
    },
    /// Changes, in order, none missing.
    Events(Vec<KvEvent>),
    /// Load of some or all ranks.
    Load(Vec<LoadReport>),
    /// Events were missed; the subscriber has asked for them or for a snapshot.
    Fault(FeedFault),
    /// The worker cannot be followed now; the subscriber tries again after the pause.
    Lost {
        /// Why.
        reason: String,
        /// The pause.
        retry_in: Duration,
    },
}

/// Follows the feed of one worker. Dropping it ends the subscription.
#[derive(Debug)]
pub struct FeedSubscriber {
    client: RpcClient,
    address: String,
    endpoint: String,
    worker: WorkerId,
    config: FeedConfig,
    tracker: FeedTracker,
    stream: Option<Responses>,
    /// When the subscription began or last brought something.
    heard_at: Instant,
    retry_at: Option<Instant>,
    failures: u32,
    ready: VecDeque<FeedUpdate>,
}

impl FeedSubscriber {
    /// A subscriber to `endpoint` of `worker`, which is at `address`. Connects on first use.
    #[must_use]
    pub fn new(
        client: RpcClient,
        address: &str,
        endpoint: &str,
        worker: WorkerId,
        config: FeedConfig,
    ) -> Self {
        Self {
            client,
            address: address.to_owned(),
            endpoint: endpoint.to_owned(),
            worker,
            config,
            tracker: FeedTracker::new(),
            stream: None,
            heard_at: Instant::now(),
            retry_at: None,
            failures: 0,
            ready: VecDeque::new(),
        }
    }

    /// The next update. Never gives up; the caller drops the subscriber of a worker that is gone.
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> FeedUpdate {
        loop {
            if let Some(update) = self.ready.pop_front() {
                return update;
            }
            if let Some(at) = self.retry_at {
                tokio::time::sleep_until(at).await;
                self.retry_at = None;
            }
            let received = match &mut self.stream {
                None => match self.subscribe().await {
                    Ok(stream) => {
                        self.stream = Some(stream);
                        self.heard_at = Instant::now();
                        continue;
                    }
                    Err(error) => Err(error.to_string()),
                },
                Some(stream) => {
                    match tokio::time::timeout_at(
                        self.heard_at + self.config.idle_timeout,
                        stream.next(),
                    )
                    .await
                    {
                        Err(_elapsed) => {
                            Err(format!("nothing came for {:?}", self.config.idle_timeout))
                        }
                        Ok(None) => Err("the worker ended the feed".to_owned()),
                        // Its time is over; the next one goes on where it ended.
                        Ok(Some(Err(RpcError::DeadlineExceeded { .. }))) => {
                            self.stream = None;
                            continue;
                        }
                        Ok(Some(Err(error))) => Err(error.to_string()),
                        Ok(Some(Ok(message))) => Ok(message),
                    }
                }
            };
            match received {
                Ok(message) => self.take(&message),
                Err(reason) => self.lost(reason),
            }
        }
    }

    /// Asks for a snapshot of a rank: for a consumer that lost or distrusts what it built.
    pub fn resync(&mut self, rank: DpRank) {
        self.tracker.forget(rank);
        self.stream = None;
    }

    async fn subscribe(&mut self) -> Result<Responses, RpcError> {
        let request = self.tracker.request(Some(self.worker));
        self.client
            .call(
                &self.address,
                &self.endpoint,
                Bytes::from(codec::encode(&request)),
                CallOptions::new(self.config.renew_after),
            )
            .await
    }

    fn take(&mut self, message: &[u8]) {
        self.heard_at = Instant::now();
        let item: FeedItem = match codec::decode(message) {
            Ok(item) => item,
            Err(error) => return self.lost(error.to_string()),
        };
        if let FeedItem::Load(reports) = item {
            self.ready.push_back(FeedUpdate::Load(reports));
            return;
        }
        let accepted = self.tracker.accept(item);
        if let Some((rank, last_event_id, blocks)) = accepted.snapshot {
            self.failures = 0;
            self.ready.push_back(FeedUpdate::Snapshot {
                rank,
                last_event_id,
                blocks,
            });
        }
        if !accepted.events.is_empty() {
            self.failures = 0;
            self.ready.push_back(FeedUpdate::Events(accepted.events));
        }
        if let Some(fault) = accepted.fault {
            // The first resync is immediate; a worker that cannot repair the gap must not be asked
            // in a tight loop.
            let pause = self.pause();
            self.stream = None;
            self.retry_at = (self.failures > 1).then(|| Instant::now() + pause);
            self.ready.push_back(FeedUpdate::Fault(fault));
        }
    }

    fn lost(&mut self, reason: String) {
        let retry_in = self.pause();
        self.stream = None;
        self.retry_at = Some(Instant::now() + retry_in);
        self.ready.push_back(FeedUpdate::Lost { reason, retry_in });
    }

    /// Counts a failure and returns the pause after it.
    fn pause(&mut self) -> Duration {
        let doubled = self
            .config
            .backoff_min
            .saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        doubled.min(self.config.backoff_max)
    }
}
