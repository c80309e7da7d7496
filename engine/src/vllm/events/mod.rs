//! The KV events of a vLLM server, as the event feed of one of its ranks.
//!
//! vLLM publishes what its prefix cache gains and loses over `ZeroMQ`. A router needs the same in our
//! form: numbered, under our sequence hashes, with a snapshot for whoever comes late. So the events
//! cross two hops, and neither loses one without anybody noticing: vLLM's own numbers are followed here
//! and what is missing is asked for again (`follow`); from here on it is an
//! [`EventFeed`] like that of any worker. `docs/vllm-events.md` has the whole picture.
//!
//! * [`wire`]: the messages; `msgpack`: their encoding; `socket`: the sockets.
//! * `chain`: from vLLM's names of blocks to ours.
//! * `follow`: gaps, replays, restarts; pure.
//! * `status`: how well it goes.

mod chain;
mod follow;
mod msgpack;
mod socket;
mod status;
#[cfg(test)]
mod tests;
pub mod wire;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_kvbm::{EventFeed, EventWriter};
use blockplane_protocol::DpRank;
use bytes::Bytes;
use chain::Chain;
use follow::{Ask, Follower};
use parking_lot::Mutex;
use socket::{Kind, Socket};
use tokio::{
    runtime::Handle,
    task::JoinHandle,
    time::{sleep, timeout},
};

pub use msgpack::FormError;
pub use socket::{Endpoint, EndpointError, SocketError};
pub use status::{Confidence, EventsCounters, EventsStatus};

/// Between two attempts to connect, at first and at most.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
const CONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// A subscription needs that long to have an effect. What is published before comes by the replay,
/// which is asked for after it.
const SUBSCRIBE_PAUSE: Duration = Duration::from_millis(50);
/// Without a message for so long, it is asked whether one was lost: nothing else would tell.
const IDLE: Duration = Duration::from_secs(5);
/// vLLM looks for requests of replays every 0.1 s, and between two batches of its own.
const REPLAY_PAUSE_MAX: Duration = Duration::from_secs(3);
/// Longest replay: 10,000 batches take well below a second.
const REPLAY_MAX: Duration = Duration::from_secs(60);
/// Number of the message that ends a replay.
const REPLAY_END: u64 = u64::MAX;

/// Which events to follow.
#[derive(Clone, Debug)]
pub struct EventsConfig {
    /// Where rank 0 publishes: `endpoint` of `--kv-events-config`.
    pub endpoint: Endpoint,
    /// Where rank 0 answers who missed some: its `replay_endpoint`. Without one, every gap and every
    /// lost connection means to start anew.
    pub replay: Option<Endpoint>,
    /// Its `topic`, or the beginning of it; empty for all topics.
    pub topic: String,
    /// The rank: of the feed, and of the ports, to which vLLM adds it.
    pub rank: DpRank,
    /// Tokens per block, as the worker registers it.
    pub block_tokens: u32,
    /// Blocks that may be known at most, in all of vLLM's tiers together: 100 to 180 bytes each. With
    /// more, all are forgotten, with a warning.
    pub blocks_max: usize,
    /// As in [`PoolConfig`](blockplane_kvbm::PoolConfig::events_max).
    pub events_max: usize,
}

/// Follows the KV events of one rank until it is dropped.
pub struct VllmEvents {
    feed: EventFeed,
    status: Arc<Mutex<EventsStatus>>,
    task: JoinHandle<()>,
}

impl VllmEvents {
    /// Starts following. vLLM need not be there yet.
    ///
    /// # Errors
    /// When the rank has no endpoint.
    pub fn start(config: EventsConfig, runtime: &Handle) -> Result<Self, EndpointError> {
        let rank = config.rank;
        let endpoint = config.endpoint.of_rank(rank.0)?;
        let replay = config
            .replay
            .map(|replay| replay.of_rank(rank.0))
            .transpose()?;
        let writer = EventWriter::new(rank, config.events_max);
        let feed = writer.feed();
        let chain = Chain::new(config.block_tokens, config.blocks_max);
        let follower = Follower::new(rank, chain, writer, replay.is_some());
        let status = Arc::new(Mutex::new(follower.status()));
        let connection = Connection {
            endpoint,
            replay,
            topic: config.topic.into_bytes(),
            follower,
            status: Arc::clone(&status),
        };
        Ok(Self {
            feed,
            status,
            task: runtime.spawn(connection.run()),
        })
    }

    /// The events under our names.
    #[must_use]
    pub fn feed(&self) -> EventFeed {
        self.feed.clone()
    }

    /// How well it goes.
    #[must_use]
    pub fn status(&self) -> EventsStatus {
        self.status.lock().clone()
    }
}

impl Drop for VllmEvents {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl fmt::Debug for VllmEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VllmEvents")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// The I/O around a [`Follower`].
struct Connection {
    endpoint: Endpoint,
    replay: Option<Endpoint>,
    topic: Vec<u8>,
    follower: Follower,
    status: Arc<Mutex<EventsStatus>>,
}

impl Connection {
    async fn run(mut self) {
        let mut pause = CONNECT_PAUSE;
        loop {
            match self.subscribe().await {
                Ok(socket) => {
                    pause = CONNECT_PAUSE;
                    let error = self.follow(socket).await;
                    self.lost(&error);
                }
                Err(error) => self.lost(&error),
            }
            sleep(pause).await;
            pause = (pause * 2).min(CONNECT_PAUSE_MAX);
        }
    }

    async fn subscribe(&self) -> Result<Socket, SocketError> {
        let mut socket = Socket::connect(&self.endpoint, Kind::Sub).await?;
        socket.subscribe(&self.topic).await?;
        sleep(SUBSCRIBE_PAUSE).await;
        Ok(socket)
    }

    /// Returns why the connection ended.
    async fn follow(&mut self, mut socket: Socket) -> SocketError {
        let mut ask = self.follower.connected();
        loop {
            self.answer(ask).await;
            ask = match timeout(IDLE, socket.receive()).await {
                Ok(Ok(frames)) => match self.live(&frames) {
                    Some((number, payload)) => self.follower.live(number, payload, Instant::now()),
                    None => Ask::Nothing,
                },
                Ok(Err(error)) => return error,
                Err(_) => self.follower.idle(),
            };
        }
    }

    /// Has all that is asked for answered.
    async fn answer(&mut self, mut ask: Ask) {
        while let Ask::Replay(from) = ask {
            ask = match timeout(REPLAY_MAX, self.replay(from)).await {
                Ok(Ok(ask)) => ask,
                Ok(Err(error)) => self.follower.replay_failed(&error.to_string()),
                Err(_) => {
                    let error = SocketError::Late(REPLAY_MAX);
                    self.follower.replay_failed(&error.to_string())
                }
            };
        }
        *self.status.lock() = self.follower.status();
    }

    /// One request and its answer, over a connection of its own, so that no answer can be taken for
    /// that of another request.
    async fn replay(&mut self, from: u64) -> Result<Ask, SocketError> {
        let Some(endpoint) = &self.replay else {
            return Err(SocketError::Closed);
        };
        let mut socket = Socket::connect(endpoint, Kind::Dealer).await?;
        socket.send(&[b"", &from.to_be_bytes()]).await?;
        loop {
            let late = |_| SocketError::Late(REPLAY_PAUSE_MAX);
            let frames = timeout(REPLAY_PAUSE_MAX, socket.receive())
                .await
                .map_err(late)??;
            // After the delimiter: topic, number, payload; some engines leave out the topic.
            let (number, payload) = match &frames[..] {
                [delimiter, _, number, payload] | [delimiter, number, payload]
                    if delimiter.is_empty() =>
                {
                    (number_of(number), payload)
                }
                _ => (None, &Bytes::new()),
            };
            let number = number.ok_or(SocketError::Protocol("a replay has other frames"))?;
            if number == REPLAY_END {
                return Ok(self.follower.replay_ended());
            }
            let ask = self.follower.replayed(number, payload);
            if ask != Ask::Nothing {
                return Ok(ask);
            }
        }
    }

    /// Number and payload of a published message.
    fn live<'a>(&self, frames: &'a [Bytes]) -> Option<(u64, &'a [u8])> {
        match frames {
            [topic, number, payload] if topic.starts_with(&self.topic) => {
                Some((number_of(number)?, payload))
            }
            _ => None,
        }
    }

    fn lost(&mut self, error: &SocketError) {
        if self.follower.status().connected {
            tracing::warn!(endpoint = %self.endpoint, %error, "KV events of vLLM do not come");
        }
        self.follower
            .disconnected(&format!("{}: {error}", self.endpoint));
        *self.status.lock() = self.follower.status();
    }
}

fn number_of(frame: &[u8]) -> Option<u64> {
    frame.try_into().ok().map(u64::from_be_bytes)
}
