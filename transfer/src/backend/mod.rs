//! Backends: ways to reach a peer, behind one trait, all run by one conformance suite.

mod faulty;
mod loopback;
mod shm;
mod tcp;
mod verbs;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::agent::{Core, RemoteRegion, Session};
use crate::config::Lane;
use crate::error::TransferError;
use crate::memory::RegionId;
use crate::op::TransferState;
use crate::peer::Metadata;
use crate::window::{Grant, WindowId};
use crate::wire::{HandshakeFailure, Hello, HelloRole, ask_metadata};

/// One connection to a peer, as the session sees it.
///
/// Whatever a backend does with a transfer, it claims parts ([`TransferState::claim_part`]) before
/// it touches their bytes and reports each claimed part once ([`TransferState::part_done`]) when it
/// does not touch them any more.
pub(crate) trait Backend: Send + Sync + fmt::Debug {
    /// Tells the backend which session it serves; called once before anything else.
    fn attach(&self, session: &Arc<Session>);

    /// Finds a region of the peer.
    fn region(&self, id: RegionId, until: Instant) -> Result<RemoteRegion, Refusal>;

    /// Finds a window of the peer and installs the grant in the session.
    fn window(
        &self,
        session: &Arc<Session>,
        id: WindowId,
        until: Instant,
    ) -> Result<Arc<Grant>, Refusal>;

    /// Starts moving the bytes of a transfer. Returns at once.
    fn start(&self, transfer: &Arc<TransferState>);

    /// The transfer is called off: give claimed parts back as soon as their bytes are quiet.
    fn stop(&self, transfer: &Arc<TransferState>);

    /// Sends the notification of a transfer. The answer is returned if it is known already, and
    /// given to [`TransferState::notified`] otherwise.
    fn notify(&self, transfer: &Arc<TransferState>) -> Option<Result<(), TransferError>>;

    /// Lends the calling thread, which waits for the transfer, to whatever brings it forward, until
    /// it is finished or `until` passes. May return early.
    fn help(&self, transfer: &Arc<TransferState>, until: Instant) {
        let _ = (transfer, until);
    }

    /// A transfer is finished that a thread parked in [`Self::help`] waits for.
    fn wake_helpers(&self) {}

    /// The peer is lost: give all claimed parts back.
    fn abandon(&self);

    /// No byte moves any more: end the connection.
    fn close(&self);
}

/// Why a peer's region or window could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It does not exist, or not any more.
    Unknown,
    /// It is not for peers.
    Denied,
    /// The peer is lost.
    Lost,
    /// No answer in time.
    TimedOut,
}

/// Why a lane was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LaneFailure {
    /// Another life of the peer answers: no lane is going to work.
    Stale,
    /// This lane cannot be used.
    Unusable(String),
}

impl LaneFailure {
    fn unusable(what: impl fmt::Display) -> Self {
        Self::Unusable(what.to_string())
    }
}

impl From<HandshakeFailure> for LaneFailure {
    fn from(failure: HandshakeFailure) -> Self {
        match failure {
            HandshakeFailure::Stale => Self::Stale,
            other => Self::unusable(other),
        }
    }
}

/// Says hello on a first connection and on the data connections that follow it.
fn greeting(core: &Core, metadata: &Metadata, role: HelloRole) -> Hello {
    Hello {
        role,
        loss_timeout: core.config.peer_loss_timeout,
        from: core.name.as_ref().to_owned(),
        from_epoch: core.epoch,
        to: metadata.name().to_owned(),
        to_epoch: metadata.epoch(),
    }
}

/// Time left for a lane, or its failure.
fn time_left(until: Instant) -> Result<Duration, LaneFailure> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(LaneFailure::unusable("no time left"))
    } else {
        Ok(left)
    }
}

/// A backend, why its lane was taken, and its number of streams.
pub(crate) type Opened = (Arc<dyn Backend>, String, usize);

/// Connects over one lane.
pub(crate) fn open(
    core: &Arc<Core>,
    lane: Lane,
    metadata: &Metadata,
    until: Instant,
) -> Result<Opened, LaneFailure> {
    match lane {
        Lane::Loopback => loopback::open(core, metadata),
        Lane::Shm => shm::open(core, metadata, until),
        Lane::Tcp => tcp::open(core, metadata, until),
        Lane::Verbs => verbs::open(core, metadata, until),
        Lane::File => Err(LaneFailure::unusable("files are opened, not connected to")),
        Lane::Object => Err(LaneFailure::unusable(
            "object stores are opened, not connected to",
        )),
        Lane::Cuda => Err(LaneFailure::unusable(
            "device memory is reached over loopback and shm",
        )),
    }
}

/// Asks a listening agent for its metadata: the blob as it came.
pub(crate) fn ask(core: &Core, address: &str, until: Instant) -> Result<Vec<u8>, AskFailure> {
    let path = address
        .strip_prefix("unix:")
        .or_else(|| address.starts_with('/').then_some(address));
    let unreachable = |failure| match failure {
        LaneFailure::Unusable(reason) => AskFailure::Unreachable(reason),
        LaneFailure::Stale => AskFailure::Unreachable("another agent answers".to_owned()),
    };
    let blob = match path {
        Some(path) => ask_metadata(&mut shm::connect(path).map_err(unreachable)?, until),
        None => {
            let mut socket = tcp::connect(core, address, until).map_err(unreachable)?;
            match &core.tls {
                Some(tls) => tls.ask(&mut socket, address, until),
                None => ask_metadata(&mut socket, until),
            }
        }
    };
    blob.map_err(AskFailure::Handshake)
}

/// Why an agent did not give its metadata.
#[derive(Debug)]
pub(crate) enum AskFailure {
    Unreachable(String),
    Handshake(HandshakeFailure),
}

/// Wraps a backend with the configured faults, if any.
pub(crate) fn with_faults(core: &Core, backend: Arc<dyn Backend>) -> Arc<dyn Backend> {
    match &core.config.faults {
        Some(faults) => Arc::new(faulty::Faulty::new(
            faults.clone(),
            core.timers.clone(),
            backend,
        )),
        None => backend,
    }
}
