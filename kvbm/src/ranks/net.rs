//! Leader and ranks in different processes: messages are notifications of transfer agents, which are
//! used for nothing else.

use std::{
    collections::HashMap,
    fmt, io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use blockplane_transfer::{
    Agent, ConnectError, FetchError, LossCause, Metadata, Peer, RecvError, Transfer,
};
use parking_lot::{Condvar, Mutex};
use thiserror::Error;

use super::{RankLink, RankWorker, RankedMover, codec::Message, leader::RankError};

/// How often losses are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often a rank greets a leader that it has.
const GREET_EVERY: Duration = Duration::from_secs(1);
/// Longest time for one try to reach the other side.
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// Senders that are known, for each rank.
const SENDERS_PER_RANK: usize = 4;

/// Why a rank did not reach its leader.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NetError {
    /// Nobody answers at the address.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The leader does not take this rank.
    #[error(transparent)]
    Rank(#[from] RankError),
    /// A thread cannot be had.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
}

/// Messages to one agent.
struct Notify {
    agent: Agent,
    peer: Peer,
}

impl RankLink for Notify {
    fn send(&self, message: Vec<u8>, time: Duration) -> Result<(), String> {
        let time = time.max(Duration::from_millis(1));
        let sent = self.agent.notify(&self.peer, message, time);
        sent.map(Transfer::detach)
            .map_err(|error| error.to_string())
    }
}

/// Tells threads to end when it is dropped. They look at it every few milliseconds; nobody needs to
/// wait for that.
#[derive(Default)]
struct Threads {
    stop: Arc<Stop>,
}

#[derive(Default)]
struct Stop {
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    fn is_set(&self) -> bool {
        *self.stopped.lock()
    }

    /// Waits; true when it is time to end.
    fn pause(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut stopped = self.stopped.lock();
        while !*stopped {
            if self.changed.wait_until(&mut stopped, until).timed_out() {
                break;
            }
        }
        *stopped
    }
}

impl Threads {
    fn start(&self, name: &str, run: impl FnOnce(&Stop) + Send + 'static) -> io::Result<()> {
        let stop = Arc::clone(&self.stop);
        let thread = thread::Builder::new().name(name.to_owned());
        thread.spawn(move || run(&stop)).map(drop)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        *self.stop.stopped.lock() = true;
        self.stop.changed.notify_all();
    }
}

/// Serves the ranks of a leader until it is dropped.
#[must_use = "dropping it leaves the ranks alone"]
pub struct RankHost {
    _threads: Threads,
}

/// The connection of a rank to its leader: kept, and made again after a loss, until it is dropped.
#[must_use = "dropping it leaves the leader"]
pub struct LeaderLink {
    _threads: Threads,
}

/// A sender of greetings, as the leader knows it.
struct Sender {
    rank: u32,
    epoch: u64,
    peer: Peer,
    link: Arc<dyn RankLink>,
}

/// Lets ranks join `mover` through `agent`. They find it at the address where it listens, which
/// serves its metadata ([`AgentConfig::serve_metadata`](blockplane_transfer::AgentConfig)).
///
/// # Errors
/// A thread cannot be had.
pub fn serve_ranks(agent: &Agent, mover: &RankedMover) -> io::Result<RankHost> {
    let (agent, mover) = (agent.clone(), mover.clone());
    let threads = Threads::default();
    threads.start("kvbm-leader", move |stop| lead(&agent, &mover, stop))?;
    Ok(RankHost { _threads: threads })
}

/// Joins the leader at `address` (`host:port`) and stays joined. `worker` was made with the
/// [epoch](Agent::epoch) and the [metadata](Agent::metadata) of `agent`.
///
/// # Errors
/// The leader is not there within `timeout`, or refuses.
pub fn join_leader(
    agent: &Agent,
    address: &str,
    worker: &Arc<RankWorker>,
    timeout: Duration,
) -> Result<LeaderLink, NetError> {
    let until = Instant::now() + timeout;
    let (own, receiver) = (agent.clone(), Arc::clone(worker));
    let threads = Threads::default();
    threads.start("kvbm-rank-net", move |stop| receive(&own, &receiver, stop))?;
    let peer = loop {
        match meet(agent, address, worker, until) {
            Ok(peer) => break peer,
            Err(error @ NetError::Rank(_)) => return Err(error),
            Err(error) if Instant::now() >= until => return Err(error),
            Err(error) => tracing::debug!(%error, address, "the leader is not there yet"),
        }
        threads.stop.pause(LOOK_EVERY);
    };
    let (own, keeper, address) = (agent.clone(), Arc::clone(worker), address.to_owned());
    threads.start("kvbm-rank-keep", move |stop| {
        keep(&own, &keeper, &address, peer, stop);
    })?;
    Ok(LeaderLink { _threads: threads })
}

/// One try to join.
fn meet(
    agent: &Agent,
    address: &str,
    worker: &RankWorker,
    until: Instant,
) -> Result<Peer, NetError> {
    let left = || until.saturating_duration_since(Instant::now());
    let metadata = agent.fetch_metadata(address, left().min(CONNECT_TIME))?;
    let peer = agent.connect(&metadata, left().min(CONNECT_TIME))?;
    let link = Notify {
        agent: agent.clone(),
        peer: peer.clone(),
    };
    worker.join(Arc::new(link), left())?;
    Ok(peer)
}

/// Hands the leader's messages to the worker.
fn receive(agent: &Agent, worker: &RankWorker, stop: &Stop) {
    let notifications = agent.notifications();
    while !stop.is_set() {
        match notifications.recv_timeout(LOOK_EVERY) {
            Ok(next) => worker.receive(&next.payload),
            Err(RecvError::TimedOut) => {}
            Err(RecvError::Stopped(_)) => return,
        }
    }
}

/// Joins anew when the leader is lost.
fn keep(agent: &Agent, worker: &RankWorker, address: &str, mut peer: Peer, stop: &Stop) {
    let mut greeted = Instant::now();
    while !stop.pause(LOOK_EVERY) {
        if peer.is_connected() {
            if greeted.elapsed() >= GREET_EVERY {
                greeted = Instant::now();
                worker.greet();
            }
            continue;
        }
        match meet(agent, address, worker, Instant::now() + CONNECT_TIME) {
            Ok(again) => peer = again,
            Err(error) => tracing::debug!(%error, address, "the leader is not back yet"),
        }
    }
}

/// Hands the ranks' messages to the leader, and tells it of losses.
fn lead(agent: &Agent, mover: &RankedMover, stop: &Stop) {
    let notifications = agent.notifications();
    let mut senders: HashMap<Arc<str>, Sender> = HashMap::new();
    let mut looked = Instant::now();
    while !stop.is_set() {
        match notifications.recv_timeout(LOOK_EVERY) {
            Ok(next) => {
                if let Some(Message::Hello {
                    epoch,
                    shape,
                    address,
                    ..
                }) = Message::decode(&next.payload)
                {
                    let rank = shape.fingerprint.tp_rank;
                    let known = senders.get(&next.from);
                    let current = known.is_some_and(|known| {
                        known.epoch == epoch && known.rank == rank && known.peer.is_connected()
                    });
                    let limit = SENDERS_PER_RANK * mover.size() as usize;
                    let room = known.is_some() || senders.len() < limit;
                    if !current && room && next.epoch == epoch {
                        match sender(agent, rank, epoch, &next.from, &address) {
                            Ok(sender) => drop(senders.insert(Arc::clone(&next.from), sender)),
                            Err(error) => tracing::warn!(from = %next.from, error, "no way back"),
                        }
                    }
                }
                if let Some(sender) = senders.get(&next.from)
                    && sender.epoch == next.epoch
                {
                    mover.receive(&next.payload, &sender.link);
                }
            }
            Err(RecvError::TimedOut) => {}
            Err(RecvError::Stopped(_)) => return,
        }
        if looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            for sender in senders.values() {
                match sender.peer.lost().map(|lost| lost.cause) {
                    Some(LossCause::Closed | LossCause::ProcessExited) => {
                        mover.ended(sender.rank, sender.epoch);
                    }
                    Some(_) => mover.lost(sender.rank, sender.epoch),
                    None => {}
                }
            }
        }
    }
}

/// The way back to a rank that greets.
fn sender(
    agent: &Agent,
    rank: u32,
    epoch: u64,
    name: &str,
    address: &[u8],
) -> Result<Sender, String> {
    let metadata = Metadata::from_bytes(address).map_err(|error| error.to_string())?;
    if metadata.name() != name || metadata.epoch() != epoch {
        return Err("it gives the metadata of another agent".to_owned());
    }
    let peer = agent.connect(&metadata, CONNECT_TIME);
    let peer = peer.map_err(|error| error.to_string())?;
    let link = Notify {
        agent: agent.clone(),
        peer: peer.clone(),
    };
    Ok(Sender {
        rank,
        epoch,
        peer,
        link: Arc::new(link),
    })
}

impl fmt::Debug for RankHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RankHost").finish_non_exhaustive()
    }
}

impl fmt::Debug for LeaderLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaderLink").finish_non_exhaustive()
    }
}
