//! Peers: connections, and those that are connected when they are first needed.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::{Core, LaneChoice, Session, find_in_process};
use crate::backend::{self, LaneFailure};
use crate::clock::after;
use crate::config::{ConnectOptions, Lane};
use crate::error::{ConnectError, LossCause, PeerLost};
use crate::peer::Metadata;
use crate::stats::PeerStats;

/// Which lane a connection uses, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneInfo {
    /// The lane.
    pub lane: Lane,
    /// Why this one; names the better lanes that were not possible.
    pub reason: String,
}

/// A peer. Clones share it.
///
/// [`Agent::connect`](crate::Agent::connect) returns a connection: it stays lost once it is lost,
/// connect again. [`Agent::remember`](crate::Agent::remember) and
/// [`Agent::peer`](crate::Agent::peer) return a name that is connected when it is used, and
/// connected again when it is used after a loss.
#[derive(Clone)]
pub struct Peer {
    core: Arc<Core>,
    link: Link,
}

#[derive(Clone)]
enum Link {
    Connected(Arc<Session>),
    Known(Arc<str>),
}

/// A peer that is connected when it is first needed.
#[derive(Debug)]
pub(crate) struct KnownPeer {
    metadata: Metadata,
    options: ConnectOptions,
}

/// Why a peer cannot be used.
#[derive(Debug)]
pub(crate) enum NoSession {
    /// The handle is of another agent; the name of the peer.
    Foreign(String),
    Connect(ConnectError),
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("name", &self.name())
            .field("epoch", &self.epoch())
            .field("lane", &self.lane().lane)
            .finish_non_exhaustive()
    }
}

impl Peer {
    pub(super) fn connected(core: &Arc<Core>, session: Arc<Session>) -> Self {
        Self {
            core: core.clone(),
            link: Link::Connected(session),
        }
    }

    /// The connection of this moment, living or lost.
    fn session(&self) -> Option<Arc<Session>> {
        match &self.link {
            Link::Connected(session) => Some(session.clone()),
            Link::Known(name) => self.core.sessions.lock().get(&**name).cloned(),
        }
    }

    fn known(&self) -> Option<Arc<KnownPeer>> {
        match &self.link {
            Link::Connected(_) => None,
            Link::Known(name) => self.core.book.lock().get(name).cloned(),
        }
    }

    /// Name of the peer.
    #[must_use]
    pub fn name(&self) -> &str {
        match &self.link {
            Link::Connected(session) => session.peer_name(),
            Link::Known(name) => name,
        }
    }

    /// Epoch of the peer: that of the connection, or of the metadata before it is made. 0 for a
    /// peer that was forgotten before.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        let session = self.session().map(|session| session.epoch());
        session
            .or_else(|| self.known().map(|known| known.metadata.epoch()))
            .unwrap_or_default()
    }

    /// The lane in use, and why. Before the connection is made: the lane that is tried first, and
    /// the reason says so.
    #[must_use]
    pub fn lane(&self) -> LaneInfo {
        if let Some(session) = self.session() {
            return session.lane().clone();
        }
        let known = self.known();
        let lane = known.as_ref().and_then(|known| self.core.first_lane(known));
        let reason = match (&known, lane) {
            (None, _) => "not connected, and forgotten",
            (Some(_), None) => "not connected yet; no lane of this agent seems to reach it",
            (Some(_), Some(_)) => "not connected yet; the lane that is tried first",
        };
        LaneInfo {
            lane: lane.unwrap_or(Lane::Tcp),
            reason: reason.to_owned(),
        }
    }

    /// Counters of the connection; zero before it is made.
    #[must_use]
    pub fn stats(&self) -> PeerStats {
        self.session()
            .map(|session| session.counters().of_peer())
            .unwrap_or_default()
    }

    /// Whether there is a living connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.session()
            .is_some_and(|session| session.lost().is_none())
    }

    /// Why the connection is lost, if it is.
    #[must_use]
    pub fn lost(&self) -> Option<PeerLost> {
        self.session().and_then(|session| session.lost())
    }

    /// Waits for the loss of the connection: ready with its reason once it is lost, and with `None`
    /// where there is no connection. Until then the task of `context` is woken by the loss; each task
    /// that asked is kept until then.
    pub fn poll_lost(&self, context: &Context<'_>) -> Poll<Option<PeerLost>> {
        match self.session() {
            Some(session) => session.poll_lost(context).map(Some),
            None => Poll::Ready(None),
        }
    }

    /// Ends the connection; operations in flight fail with [`PeerLost`].
    pub fn disconnect(&self) {
        if let Some(session) = self.session() {
            self.core.disconnect(&session);
        }
    }
}

impl Core {
    pub(super) fn remember(
        self: &Arc<Self>,
        metadata: &Metadata,
        options: ConnectOptions,
    ) -> Result<Peer, ConnectError> {
        let name: Arc<str> = metadata.name().into();
        let mut book = self.book.lock();
        let limit = self.config.peers_max;
        if book.len() >= limit && !book.contains_key(&name) {
            return Err(ConnectError::TooMany { limit });
        }
        let known = KnownPeer {
            metadata: metadata.clone(),
            options,
        };
        book.insert(name.clone(), Arc::new(known));
        drop(book);
        Ok(Peer {
            core: self.clone(),
            link: Link::Known(name),
        })
    }

    pub(super) fn peer(self: &Arc<Self>, name: &str) -> Option<Peer> {
        let known = self
            .book
            .lock()
            .get_key_value(name)
            .map(|(name, _)| name.clone());
        let link = match known {
            Some(name) => Link::Known(name),
            None => Link::Connected(self.sessions.lock().get(name)?.clone()),
        };
        Some(Peer {
            core: self.clone(),
            link,
        })
    }

    pub(super) fn peers(self: &Arc<Self>) -> Vec<Peer> {
        let connected = self.sessions();
        let links = connected
            .into_iter()
            .map(|session| (session.peer_name().to_owned(), Link::Connected(session)));
        let mut by_name: BTreeMap<String, Link> = links.collect();
        for name in self.book.lock().keys() {
            by_name.insert(name.as_ref().to_owned(), Link::Known(name.clone()));
        }
        let core = || self.clone();
        by_name
            .into_values()
            .map(|link| Peer { core: core(), link })
            .collect()
    }

    /// The connection of a peer, made now if it is not there.
    pub(crate) fn session_of(self: &Arc<Self>, peer: &Peer) -> Result<Arc<Session>, NoSession> {
        if !Arc::ptr_eq(&peer.core, self) {
            return Err(NoSession::Foreign(peer.name().to_owned()));
        }
        match &peer.link {
            Link::Connected(session) => Ok(session.clone()),
            Link::Known(name) => {
                let unknown = || ConnectError::Unknown {
                    peer: name.as_ref().to_owned(),
                };
                let known = peer.known().ok_or_else(unknown);
                known
                    .and_then(|known| self.connect(&known.metadata, &known.options))
                    .map_err(NoSession::Connect)
            }
        }
    }

    /// The first allowed lane that is not out of the question.
    fn first_lane(&self, known: &KnownPeer) -> Option<Lane> {
        let addresses = known.metadata.addresses();
        let lanes = known.options.lanes.as_ref().unwrap_or(&self.config.lanes);
        lanes.iter().copied().find(|lane| match lane {
            Lane::Loopback => find_in_process(known.metadata.epoch()).is_some(),
            Lane::Shm => addresses.host == self.host() && addresses.shm.is_some(),
            Lane::Tcp => addresses.tcp.is_some(),
            Lane::Verbs => addresses.tcp.is_some() && self.rdma.is_some(),
            Lane::File | Lane::Object | Lane::Cuda => false,
        })
    }

    pub(super) fn connect(
        self: &Arc<Self>,
        metadata: &Metadata,
        options: &ConnectOptions,
    ) -> Result<Arc<Session>, ConnectError> {
        if self.is_stopped() {
            return Err(ConnectError::AgentStopped);
        }
        let lanes = options.lanes.as_ref().unwrap_or(&self.config.lanes);
        let live = |sessions: &HashMap<String, Arc<Session>>| {
            sessions
                .get(metadata.name())
                .filter(|known| {
                    known.epoch() == metadata.epoch()
                        && known.lost().is_none()
                        && lanes.contains(&known.lane().lane)
                })
                .cloned()
        };
        {
            let mut sessions = self.sessions.lock();
            if let Some(known) = live(&sessions) {
                return Ok(known);
            }
            let limit = self.config.peers_max;
            if sessions.len() >= limit {
                // The lost are kept for nothing but their handles, which have them anyway.
                sessions.retain(|_, session| session.lost().is_none());
            }
            if sessions.len() >= limit && !sessions.contains_key(metadata.name()) {
                return Err(ConnectError::TooMany { limit });
            }
        }
        let session = self.open_session(metadata, lanes, after(options.timeout))?;
        let mut sessions = self.sessions.lock();
        if let Some(known) = live(&sessions) {
            drop(sessions);
            // Somebody else connected at the same time; one connection is enough.
            session.lose(LossCause::Disconnected);
            return Ok(known);
        }
        let old = sessions.insert(metadata.name().to_owned(), session.clone());
        drop(sessions);
        if let Some(old) = old {
            old.lose(if old.epoch() == metadata.epoch() {
                LossCause::Disconnected
            } else {
                LossCause::Replaced(metadata.epoch())
            });
        }
        if self.is_stopped() {
            session.lose(LossCause::Disconnected);
            return Err(ConnectError::AgentStopped);
        }
        let lane = session.lane();
        tracing::info!(
            agent = %self.name,
            peer = metadata.name(),
            epoch = metadata.epoch(),
            lane = %lane.lane,
            reason = %lane.reason,
            "peer connected"
        );
        Ok(session)
    }

    /// Tries the allowed lanes, best first.
    fn open_session(
        self: &Arc<Self>,
        metadata: &Metadata,
        lanes: &[Lane],
        until: Instant,
    ) -> Result<Arc<Session>, ConnectError> {
        let mut tried = Vec::new();
        for &lane in lanes {
            match backend::open(self, lane, metadata, until) {
                Ok((backend, why, streams)) => {
                    let backend = backend::with_faults(self, backend);
                    let choice = LaneChoice::new(lane, &why, &tried, streams);
                    let session = Session::new(self, metadata, choice, backend);
                    return Ok(session);
                }
                Err(LaneFailure::Stale) => {
                    return Err(ConnectError::Stale {
                        peer: metadata.name().to_owned(),
                        epoch: metadata.epoch(),
                    });
                }
                Err(LaneFailure::Unusable(reason)) => tried.push((lane, reason)),
            }
        }
        Err(ConnectError::NoLane {
            peer: metadata.name().to_owned(),
            tried,
        })
    }

    fn disconnect(&self, session: &Arc<Session>) {
        session.lose(LossCause::Disconnected);
        let mut sessions = self.sessions.lock();
        if sessions
            .get(session.peer_name())
            .is_some_and(|known| Arc::ptr_eq(known, session))
        {
            sessions.remove(session.peer_name());
        }
    }

    /// Connections of this agent at this moment.
    pub(super) fn sessions(&self) -> Vec<Arc<Session>> {
        self.sessions.lock().values().cloned().collect()
    }
}
