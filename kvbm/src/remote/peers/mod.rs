//! G4 at other workers: blocks are read from their G2.
//!
//! Every worker tells its peers which blocks its G2 has. One that needs such a block asks for a lease:
//! the owner holds the blocks, opens a window over them and says their checksums; the reader copies
//! them into its own G2 by one-sided reads, verifies them there, and gives the lease back.
//! docs/kv-peers.md describes the messages byte by byte.

mod announce;
mod borrow;
mod codec;
mod config;
mod lend;
#[cfg(test)]
mod liar;
mod link;
mod stats;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::AtomicU64,
        mpsc::{SyncSender, sync_channel},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use blockplane_protocol::{DpRank, SequenceHash};
use blockplane_transfer::{Agent, Metadata};
use parking_lot::{Condvar, Mutex};

use self::{
    borrow::{Asked, Reply},
    codec::{Hello, Message},
    link::Known,
    stats::{Counters, Distinct, count},
};
pub use self::{
    config::{PeerParts, PeerTierConfig, PeerTierError},
    stats::PeerStats,
};
use crate::{
    arena::KvArena,
    events::{Consolidation, EventFeed, EventHub},
    fingerprint::Fingerprint,
    pool::BlockPool,
    tier::{MoveReport, MoveSpec, Mover, RemoteIndex},
};

/// Changes of G2 that are kept for peers that are behind; what is older comes as a snapshot.
const EVENTS_MAX: usize = 1 << 16;
/// Requests for leases that wait.
const ASKS_MAX: usize = 256;
/// How long a count of all names is told again.
const RETELL: Duration = Duration::from_secs(1);

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
    distinct: Mutex<Distinct>,
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
        config.validate()?;
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
            distinct: Mutex::default(),
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
        let block_bytes = self.core.host.layout().block_bytes() as u64;
        let state = self.core.state.lock();
        let usable = state.peers.values().filter(|peer| peer.usable().is_some());
        PeerStats {
            peers: state.peers.len() as u64,
            usable: usable.count() as u64,
            names: self.core.names(&state) as u64,
            ..self.core.counters.stats(block_bytes)
        }
    }
}

impl Core {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Names that usable peers have. Up to a second old.
    fn names(&self, state: &State) -> usize {
        self.distinct.lock().get(self.now(), state)
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

    /// Blocks that several peers have count once. Up to a second old.
    fn len(&self) -> usize {
        self.core.names(&self.core.state.lock())
    }

    fn is_empty(&self) -> bool {
        let state = self.core.state.lock();
        let mut usable = state.peers.values().filter(|peer| peer.usable().is_some());
        usable.all(|peer| peer.inbox.len() == 0)
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
