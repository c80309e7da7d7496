//! A connection that this agent made: operations in flight, their notifications in order, and what
//! is known of the peer's regions and windows.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use parking_lot::Mutex;

use super::{Core, LaneInfo, RemoteRegion};
use crate::backend::{Backend, Refusal};
use crate::config::Lane;
use crate::error::{LossCause, PeerLost, PostError, TransferError};
use crate::memory::RegionId;
use crate::op::TransferState;
use crate::peer::Metadata;
use crate::stats::{Counters, Meter};
use crate::window::{Acknowledge, Grant, GrantSpec, WindowId};

/// Tells connections apart, in both directions and over all agents of the process.
static KEYS: AtomicU64 = AtomicU64::new(1);

pub(crate) fn next_session_key() -> u64 {
    KEYS.fetch_add(1, Ordering::Relaxed)
}

/// The lane that was chosen.
#[derive(Debug)]
pub(crate) struct LaneChoice {
    info: LaneInfo,
    streams: usize,
}

impl LaneChoice {
    pub(crate) fn new(lane: Lane, why: &str, tried: &[(Lane, String)], streams: usize) -> Self {
        let mut reason = why.to_owned();
        for (lane, failed) in tried {
            reason.push_str(&format!("; not {lane}: {failed}"));
        }
        Self {
            info: LaneInfo { lane, reason },
            streams,
        }
    }
}

pub(crate) struct Session {
    key: u64,
    peer: Arc<str>,
    epoch: u64,
    choice: LaneChoice,
    backend: Arc<dyn Backend>,
    posts_max: usize,
    core_counters: Arc<Counters>,
    counters: Counters,
    meter: Meter,
    state: Mutex<State>,
    /// Operations whose notification is still to be sent, in the order in which they were posted.
    order: Mutex<VecDeque<Arc<TransferState>>>,
    regions: Mutex<HashMap<RegionId, Arc<RemoteRegion>>>,
    grants: Mutex<HashMap<WindowId, Arc<Grant>>>,
}

#[derive(Default)]
struct State {
    lost: Option<PeerLost>,
    closed: bool,
    in_flight: HashMap<u64, Arc<TransferState>>,
    /// Who is to be woken by the loss.
    mourners: Vec<Waker>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("peer", &self.peer)
            .field("epoch", &self.epoch)
            .field("lane", &self.choice.info.lane)
            .finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn new(
        core: &Core,
        metadata: &Metadata,
        choice: LaneChoice,
        backend: Arc<dyn Backend>,
    ) -> Arc<Self> {
        Self::start(core, metadata.name(), metadata.epoch(), choice, backend)
    }

    /// A session with a store of this agent instead of a peer.
    pub(crate) fn stored(
        core: &Core,
        store: &str,
        choice: LaneChoice,
        backend: Arc<dyn Backend>,
    ) -> Arc<Self> {
        Self::start(core, store, core.epoch, choice, backend)
    }

    fn start(
        core: &Core,
        peer: &str,
        epoch: u64,
        choice: LaneChoice,
        backend: Arc<dyn Backend>,
    ) -> Arc<Self> {
        let session = Arc::new(Self {
            key: next_session_key(),
            peer: peer.into(),
            epoch,
            choice,
            backend,
            posts_max: core.config.posts_max,
            core_counters: core.counters.clone(),
            counters: Counters::default(),
            meter: Meter::default(),
            state: Mutex::default(),
            order: Mutex::default(),
            regions: Mutex::default(),
            grants: Mutex::default(),
        });
        session.backend.attach(&session);
        session
    }

    pub(crate) const fn key(&self) -> u64 {
        self.key
    }

    pub(crate) fn peer_name(&self) -> &str {
        &self.peer
    }

    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) const fn lane(&self) -> &LaneInfo {
        &self.choice.info
    }

    pub(crate) const fn streams(&self) -> usize {
        self.choice.streams
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    pub(crate) fn lost(&self) -> Option<PeerLost> {
        self.state.lock().lost.clone()
    }

    pub(crate) const fn meter(&self) -> &Meter {
        &self.meter
    }

    pub(crate) const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Takes an operation into the books, and its notification into the order.
    pub(crate) fn admit(&self, transfer: &Arc<TransferState>) -> Result<(), PostError> {
        let mut state = self.state.lock();
        if let Some(lost) = &state.lost {
            return Err(PostError::PeerLost(lost.clone()));
        }
        if state.in_flight.len() >= self.posts_max {
            return Err(PostError::TooManyInFlight {
                limit: self.posts_max,
            });
        }
        state.in_flight.insert(transfer.id, transfer.clone());
        self.core_counters.started();
        self.counters.started();
        if transfer.notification.is_some() {
            self.order.lock().push_back(transfer.clone());
        }
        Ok(())
    }

    /// Takes a half of an operation into the books, which is within the limits and counted already.
    pub(crate) fn admit_half(&self, half: &Arc<TransferState>) -> Result<(), PeerLost> {
        let mut state = self.state.lock();
        if let Some(lost) = &state.lost {
            return Err(lost.clone());
        }
        state.in_flight.insert(half.id, half.clone());
        Ok(())
    }

    pub(crate) fn operation(&self, id: u64) -> Option<Arc<TransferState>> {
        self.state.lock().in_flight.get(&id).cloned()
    }

    pub(crate) fn retire(&self, id: u64) {
        let retired = self.state.lock().in_flight.remove(&id);
        drop(retired);
        self.close_when_quiet();
    }

    /// The connection of a lost peer closes when nothing of it moves any more: a peer that sees it
    /// closed may rely on that.
    fn close_when_quiet(&self) {
        let mut state = self.state.lock();
        if state.lost.is_some() && state.in_flight.is_empty() && !state.closed {
            state.closed = true;
            drop(state);
            self.backend.close();
        }
    }

    /// Whether the notification of `transfer` may go along with its bytes: when no earlier one is
    /// waiting or, as the backend knows, on its way. Later ones wait for its answer then.
    pub(crate) fn claim_ride(
        &self,
        transfer: &Arc<TransferState>,
        none_on_its_way: impl FnOnce() -> bool,
    ) -> bool {
        let order = self.order.lock();
        let first = order
            .front()
            .is_some_and(|front| Arc::ptr_eq(front, transfer));
        let rides = first && none_on_its_way();
        if rides {
            transfer.set_rides();
        }
        rides
    }

    /// Sends the notifications whose turn has come.
    pub(crate) fn send_due_notifications(&self) {
        let mut answered = Vec::new();
        let mut order = self.order.lock();
        while let Some(front) = order.front() {
            use crate::op::Turn;
            if front.turn() == Turn::Waiting || front.rides() && !front.is_finished() {
                break;
            }
            let Some(front) = order.pop_front() else {
                break;
            };
            if !front.rides() && front.take_turn() {
                // Sent under the lock: the order of the queue is the order on the wire.
                if let Some(answer) = self.backend.notify(&front) {
                    answered.push((front, answer));
                }
            }
        }
        drop(order);
        for (transfer, answer) in answered {
            transfer.notified(&answer);
        }
    }

    /// Why the peer is lost; or the task is woken when it is.
    pub(crate) fn poll_lost(&self, context: &Context<'_>) -> Poll<PeerLost> {
        let mut state = self.state.lock();
        if let Some(lost) = &state.lost {
            return Poll::Ready(lost.clone());
        }
        let waker = context.waker();
        if !state.mourners.iter().any(|known| known.will_wake(waker)) {
            state.mourners.push(waker.clone());
        }
        Poll::Pending
    }

    /// The peer is gone: everything in flight ends, nothing new starts.
    pub(crate) fn lose(&self, cause: LossCause) {
        let mut state = self.state.lock();
        if state.lost.is_some() {
            return;
        }
        let lost = PeerLost {
            peer: self.peer.as_ref().to_owned(),
            epoch: self.epoch,
            cause,
        };
        let (peer, epoch) = (&*self.peer, self.epoch);
        if lost.cause == LossCause::Disconnected {
            // Our own wish; stores end like this as well.
            tracing::debug!(peer, epoch, "disconnected");
        } else {
            tracing::info!(peer, epoch, cause = %lost.cause, "peer lost");
        }
        state.lost = Some(lost.clone());
        let in_flight: Vec<_> = state.in_flight.values().cloned().collect();
        let mourners = std::mem::take(&mut state.mourners);
        drop(state);
        for transfer in in_flight {
            transfer.stop(TransferError::PeerLost(lost.clone()));
        }
        mourners.into_iter().for_each(Waker::wake);
        self.backend.abandon();
        self.regions.lock().clear();
        let grants: Vec<_> = self.grants.lock().drain().collect();
        for (_, grant) in grants {
            grant.usage.revoke();
        }
        self.close_when_quiet();
    }

    pub(crate) fn region(
        &self,
        id: RegionId,
        until: Instant,
    ) -> Result<Arc<RemoteRegion>, Refusal> {
        if let Some(known) = self
            .regions
            .lock()
            .get(&id)
            .filter(|known| !known.released())
        {
            return Ok(known.clone());
        }
        let region = Arc::new(self.backend.region(id, until)?);
        if self.lost().is_some() {
            return Err(Refusal::Lost);
        }
        let region = self.regions.lock().entry(id).or_insert(region).clone();
        if region.released() {
            // It was released between the answer and the entry, which would keep its memory.
            self.forget_region(id);
        }
        Ok(region)
    }

    /// The peer has released a region: its mapping goes with the last transfer that names it.
    pub(crate) fn forget_region(&self, id: RegionId) {
        let forgotten = self.regions.lock().remove(&id);
        if let Some(region) = forgotten {
            region.mark_released();
        }
    }

    pub(crate) fn grant(
        self: &Arc<Self>,
        id: WindowId,
        until: Instant,
    ) -> Result<Arc<Grant>, Refusal> {
        if let Some(known) = self.grants.lock().get(&id) {
            return Ok(known.clone());
        }
        self.backend.window(self, id, until)
    }

    /// Takes a grant into the books. Backends call this before anything else that the peer says
    /// about the window can be seen, so that no revocation is missed.
    pub(crate) fn install_grant(
        &self,
        id: WindowId,
        spec: GrantSpec,
        acknowledge: Acknowledge,
    ) -> Arc<Grant> {
        let mut grants = self.grants.lock();
        grants
            .entry(id)
            .or_insert_with(|| Grant::new(id, spec, acknowledge))
            .clone()
    }

    /// The peer closes a window, or never had it: its transfers are called off, and the owner is
    /// told when none of them moves any more. False when this side does not know the window.
    pub(crate) fn revoke(&self, window: WindowId) -> bool {
        let Some(grant) = self.grants.lock().remove(&window) else {
            return false;
        };
        grant.usage.revoke();
        let using: Vec<_> = self
            .state
            .lock()
            .in_flight
            .values()
            .filter(|transfer| {
                let work = transfer.work.as_ref();
                work.and_then(|work| work.grant.as_ref())
                    .is_some_and(|used| Arc::ptr_eq(used, &grant))
            })
            .cloned()
            .collect();
        for transfer in using {
            transfer.stop(TransferError::WindowClosed { window });
        }
        true
    }
}
