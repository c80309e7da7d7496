//! G4 at other workers: blocks are read from their G2.
//!
//! Every worker tells its peers which blocks its G2 has. One that needs such a block asks for a lease:
//! the owner holds the blocks, opens a window over them and says their checksums; the reader copies
//! them into its own G2 by one-sided reads, verifies them there, and gives the lease back.
//! docs/kv-peers.md describes the messages byte by byte.

mod announce;
mod borrow;
mod codec;
mod lend;
#[cfg(test)]
mod liar;
mod link;

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use blockplane_protocol::{DpRank, SequenceHash};
use blockplane_transfer::{Agent, Metadata, MetadataError};
use parking_lot::{Condvar, Mutex};
use thiserror::Error;

use self::{
    borrow::{Asked, Reply},
    codec::{Hello, Message},
    link::Known,
};
use crate::{
    arena::KvArena,
    events::{Consolidation, EventFeed, EventHub, JoinError},
    fingerprint::Fingerprint,
    pool::BlockPool,
    tier::{MoveReport, MoveSpec, Mover, RemoteIndex},
};

/// Changes of G2 that are kept for peers that are behind; what is older comes as a snapshot.
const EVENTS_MAX: usize = 1 << 16;
/// Requests for leases that wait.
const ASKS_MAX: usize = 256;

/// How a worker exchanges blocks with its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerTierConfig {
    /// Peers, at most. Default 64.
    pub peers_max: usize,
    /// Names kept of each peer, at most; what it has beyond is not found. Default 1,000,000. Cost:
    /// about 16 bytes each.
    pub names_max: usize,
    /// Blocks of the own G2 that are lent at a time, to all peers together. They cannot be evicted
    /// meanwhile. Default 1024.
    pub lent_blocks_max: usize,
    /// Longest time for which blocks are lent. Default 10 s. A reader asks for less: what is left of
    /// its move.
    pub lease_time: Duration,
    /// Longest wait for a lease. A peer that does not answer in this time is not asked again before
    /// it has said something. Default 500 ms.
    pub lease_wait: Duration,
    /// Least time between two announcements to one peer. Default 20 ms.
    pub announce_every: Duration,
}

impl Default for PeerTierConfig {
    fn default() -> Self {
        Self {
            peers_max: 64,
            names_max: 1_000_000,
            lent_blocks_max: 1024,
            lease_time: Duration::from_secs(10),
            lease_wait: Duration::from_millis(500),
            announce_every: Duration::from_millis(20),
        }
    }
}

/// What a peer tier works with.
#[derive(Debug)]
pub struct PeerParts {
    /// Carries the messages. Its notifications are used for nothing else. It may be `agent` if nobody
    /// else takes that one's notifications.
    pub control: Agent,
    /// The agent whose memory G2 is.
    pub agent: Agent,
    /// G2.
    pub host: Arc<KvArena>,
    /// What the bytes of its blocks mean. Blocks are exchanged with peers of the same only.
    pub fingerprint: Fingerprint,
}

/// Why there is no peer tier, or no such peer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PeerTierError {
    /// A setting is out of range.
    #[error("{field} is {got}; accepted: {accepted}")]
    InvalidConfig {
        /// The setting.
        field: &'static str,
        /// Its value.
        got: String,
        /// What is accepted.
        accepted: &'static str,
    },
    /// G2 is not memory of that agent.
    #[error("the memory of G2 cannot be told to peers: {0}")]
    Memory(#[from] MetadataError),
    /// A thread cannot be had.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
    /// There are as many peers as there may be.
    #[error("peer '{peer}' is one too many; at most {limit} are accepted (peers_max)")]
    TooMany {
        /// Who was to be added.
        peer: String,
        /// The bound.
        limit: usize,
    },
    /// The blocks of the pool are elsewhere.
    #[error("the pool that is to be lent from has no memory, or not that of this tier")]
    ForeignPool,
    /// The pool is gone.
    #[error(transparent)]
    Hub(#[from] JoinError),
}

/// What a peer tier did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerStats {
    /// Peers that are known.
    pub peers: u64,
    /// Those of them that blocks can be read from now.
    pub usable: u64,
    /// Peers refused, for another fingerprint or another shape of blocks.
    pub refused_peers: u64,
    /// Times that a peer was lost.
    pub lost: u64,
    /// Names that peers have told, those of several peers several times.
    pub names: u64,
    /// Blocks read from peers and verified.
    pub read: u64,
    /// Blocks that a peer had told of and does not have any more.
    pub missing: u64,
    /// Blocks whose bytes were not what their owner said.
    pub invalid: u64,
    /// Blocks that were not read for another reason, such as a deadline.
    pub failed: u64,
    /// Blocks lent to peers.
    pub lent: u64,
    /// Requests for leases that were refused.
    pub refused: u64,
    /// Leases that were not given back in time.
    pub expired: u64,
    /// Messages that were not understood, or of somebody who is no peer.
    pub ignored: u64,
    /// Blocks held for peers now.
    pub held: u64,
}

#[derive(Debug, Default)]
struct Counters {
    refused_peers: AtomicU64,
    lost: AtomicU64,
    read: AtomicU64,
    missing: AtomicU64,
    invalid: AtomicU64,
    failed: AtomicU64,
    lent: AtomicU64,
    refused: AtomicU64,
    expired: AtomicU64,
    ignored: AtomicU64,
    held: AtomicU64,
}

/// Reads blocks from the G2 of other workers, and lends them those of its own.
///
/// It knows what its peers say that they have ([`RemoteIndex`]) and reads it ([`Mover`], for
/// [`RemoteToHost`](crate::MoveKind::RemoteToHost) only). Two workers exchange blocks when each was
/// [added](Self::add_peer) at the other. Peers are trusted to say the truth about their blocks: a
/// checksum shows that bytes arrived as their owner has them, not that the owner computed them.
pub struct PeerTier {
    core: Arc<Core>,
}

/// What the threads share.
struct Core {
    control: Agent,
    agent: Agent,
    host: Arc<KvArena>,
    fingerprint: Fingerprint,
    config: PeerTierConfig,
    /// How peers reach the memory of G2.
    address: Vec<u8>,
    started: Instant,
    state: Mutex<State>,
    /// Somebody is to be dialled.
    dial: Condvar,
    control_thread: OnceLock<Thread>,
    /// Movers that wait for a lease, by its number.
    asks: Mutex<HashMap<u64, Asked>>,
    next_ask: AtomicU64,
    lender: SyncSender<lend::Command>,
    counters: Counters,
}

#[derive(Default)]
struct State {
    peers: BTreeMap<Arc<str>, Known>,
    /// Counts peers and their losses, so that threads notice that a peer is not the one they knew.
    sessions: u64,
    /// What is lent.
    own: Option<(BlockPool, EventFeed)>,
    stopping: bool,
}

impl PeerTier {
    /// Starts a tier without peers that lends nothing yet.
    ///
    /// # Errors
    /// A setting makes no sense, G2 is not memory of that agent, or a thread cannot be had.
    pub fn start(parts: PeerParts, config: PeerTierConfig) -> Result<Arc<Self>, PeerTierError> {
        let waits = [
            ("lease_time", config.lease_time),
            ("lease_wait", config.lease_wait),
        ];
        for (field, time) in waits {
            if time.is_zero() {
                return Err(PeerTierError::InvalidConfig {
                    field,
                    got: "0".to_owned(),
                    accepted: "more than 0",
                });
            }
        }
        let address = parts.agent.metadata_of(&[parts.host.registration()])?;
        let (lender, commands) = sync_channel(ASKS_MAX);
        let core = Arc::new(Core {
            address: address.to_bytes(),
            control: parts.control,
            agent: parts.agent,
            host: parts.host,
            fingerprint: parts.fingerprint,
            config,
            started: Instant::now(),
            state: Mutex::default(),
            dial: Condvar::new(),
            control_thread: OnceLock::new(),
            asks: Mutex::default(),
            next_ask: AtomicU64::new(1),
            lender,
            counters: Counters::default(),
        });
        // Stops the threads that did start when one cannot be had.
        let tier = Arc::new(Self {
            core: Arc::clone(&core),
        });
        let spawn = |name: &str, run: Box<dyn FnOnce(Arc<Core>) + Send>| {
            let core = Arc::clone(&core);
            let thread = thread::Builder::new().name(name.to_owned());
            thread.spawn(move || run(core))
        };
        let control = spawn("kvbm-peers", Box::new(|core| link::converse(&core)))?;
        // Set once, here.
        let _ = core.control_thread.set(control.thread().clone());
        spawn("kvbm-peers-dial", Box::new(|core| link::dial(&core)))?;
        spawn(
            "kvbm-peers-lend",
            Box::new(move |core| lend::lend(&core, &commands)),
        )?;
        Ok(tier)
    }

    /// Lends blocks of `pool`, the G2 whose memory this tier was started with, and tells peers what
    /// is in it. Once; later calls change nothing.
    ///
    /// # Errors
    /// The pool is another one, or gone.
    pub fn lend(&self, pool: BlockPool) -> Result<(), PeerTierError> {
        let own = pool
            .arena()
            .is_some_and(|arena| Arc::ptr_eq(arena, &self.core.host));
        if !own {
            return Err(PeerTierError::ForeignPool);
        }
        let hub = EventHub::new(DpRank(0), EVENTS_MAX, Consolidation::Passthrough);
        pool.join(&hub)?;
        self.core
            .state
            .lock()
            .own
            .get_or_insert_with(|| (pool, hub.feed()));
        self.core.wake();
        Ok(())
    }

    /// Adds a worker, by the metadata of its control agent, in the place of an earlier life of it.
    /// It is connected in the background, and again after each loss, until it is removed.
    ///
    /// # Errors
    /// There are too many.
    pub fn add_peer(&self, metadata: &Metadata) -> Result<(), PeerTierError> {
        let limit = self.core.config.peers_max;
        let name: Arc<str> = metadata.name().into();
        let mut state = self.core.state.lock();
        match state.peers.get(&name) {
            Some(known) if known.metadata.epoch() == metadata.epoch() => return Ok(()),
            None if state.peers.len() >= limit => {
                return Err(PeerTierError::TooMany {
                    peer: metadata.name().to_owned(),
                    limit,
                });
            }
            Some(_) | None => {}
        }
        state.sessions += 1;
        let known = Known::new(metadata.clone(), state.sessions, self.core.config.names_max);
        let earlier = state.peers.insert(Arc::clone(&name), known);
        drop(state);
        if earlier.is_some() {
            self.core.gone(&name);
        }
        self.core.dial.notify_all();
        Ok(())
    }

    /// Forgets a worker and what it has. False when it was not known.
    pub fn remove_peer(&self, name: &str) -> bool {
        let removed = self.core.state.lock().peers.remove_entry(name);
        if let Some((name, _)) = &removed {
            self.core.gone(name);
        }
        removed.is_some()
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> PeerStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.core.counters;
        let state = self.core.state.lock();
        let usable = || state.peers.values().filter(|peer| peer.usable().is_some());
        PeerStats {
            peers: state.peers.len() as u64,
            usable: usable().count() as u64,
            names: usable().map(|peer| peer.inbox.len() as u64).sum(),
            refused_peers: of(&counters.refused_peers),
            lost: of(&counters.lost),
            read: of(&counters.read),
            missing: of(&counters.missing),
            invalid: of(&counters.invalid),
            failed: of(&counters.failed),
            lent: of(&counters.lent),
            refused: of(&counters.refused),
            expired: of(&counters.expired),
            ignored: of(&counters.ignored),
            held: of(&counters.held),
        }
    }
}

impl Core {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Lets the control thread look at everything.
    fn wake(&self) {
        if let Some(thread) = self.control_thread.get() {
            thread.unpark();
        }
    }

    fn hello(&self, answer: bool) -> Message {
        Message::Hello(Hello {
            epoch: self.control.epoch(),
            answer,
            fingerprint: self.fingerprint,
            region: self.host.registration().id(),
            layout: self.host.transfer_layout(),
            address: self.address.clone(),
        })
    }

    /// A peer is lost, or not the one it was: movers do not wait for it, and nothing is held for it.
    fn gone(&self, name: &Arc<str>) {
        self.asks.lock().retain(|_, asked| {
            let its = asked.peer == *name;
            if its && let Some(to) = asked.to.take() {
                // Nobody waits any more: all the better.
                let _ = to.send(Reply::Refused("the peer was lost".to_owned()));
            }
            !its
        });
        // When the queue is full the leases end by their time.
        let _ = self.lender.try_send(lend::Command::Lost(Arc::clone(name)));
        self.wake();
    }
}

impl Mover for PeerTier {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        borrow::run(&self.core, spec)
    }
}

impl RemoteIndex for PeerTier {
    fn contains(&self, name: SequenceHash) -> bool {
        let state = self.core.state.lock();
        let mut usable = state.peers.values().filter(|peer| peer.usable().is_some());
        usable.any(|peer| peer.inbox.contains(name))
    }

    fn len(&self) -> usize {
        let state = self.core.state.lock();
        let usable = state.peers.values().filter(|peer| peer.usable().is_some());
        usable.map(|peer| peer.inbox.len()).sum()
    }
}

impl Drop for PeerTier {
    fn drop(&mut self) {
        self.core.state.lock().stopping = true;
        self.core.dial.notify_all();
        // A lender with a full queue looks at the flag after each command.
        let _ = self.core.lender.try_send(lend::Command::Stop);
        self.core.wake();
    }
}

impl fmt::Debug for PeerTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerTier")
            .field("control", &self.core.control.name())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
