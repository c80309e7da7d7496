//! The recent events and those who wait for the next one.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    task::Waker,
    time::{Duration, Instant},
};

use blockplane_protocol::{DpRank, KvEvent};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::ring::Ring;

/// Blocks named in one batch, so that a batch stays far below the size limit of a message.
const BATCH_WEIGHT_MAX: usize = 8_192;

/// Recent events of one pool, and its subscribers.
#[derive(Debug)]
pub(crate) struct EventLog {
    rank: DpRank,
    state: Mutex<State>,
    arrived: Condvar,
    subscribers: AtomicU64,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    /// At most one per subscription.
    wakers: Vec<(SubscriberId, Waker)>,
    closed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SubscriberId(u64);

/// What there is for a subscriber.
#[derive(Debug)]
pub(crate) enum Take {
    Events(Vec<KvEvent>),
    /// The event after the one it saw is not in the ring.
    TooFarBehind,
    Nothing,
    Closed,
}

/// Tasks to wake once no lock is held: waking runs code that is not ours.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Wakeups(Vec<Waker>);

impl EventLog {
    pub(crate) fn new(rank: DpRank, weight_max: usize) -> Self {
        Self {
            rank,
            state: Mutex::new(State {
                ring: Ring::new(weight_max),
                wakers: Vec::new(),
                closed: false,
            }),
            arrived: Condvar::new(),
            subscribers: AtomicU64::new(0),
        }
    }

    pub(crate) fn subscriber_id(&self) -> SubscriberId {
        SubscriberId(self.subscribers.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn last_id(&self) -> u64 {
        self.state.lock().ring.last_id()
    }

    /// Adds events. The caller fires the result after its own locks are released.
    pub(crate) fn append(&self, push: impl FnOnce(&mut Ring)) -> Wakeups {
        let mut state = self.state.lock();
        push(&mut state.ring);
        let wakers = state.wakers.drain(..).map(|(_, waker)| waker).collect();
        drop(state);
        self.arrived.notify_all();
        Wakeups(wakers)
    }

    /// No event will come any more.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let wakers = state.wakers.drain(..).map(|(_, waker)| waker).collect();
        drop(state);
        self.arrived.notify_all();
        Wakeups(wakers).fire();
    }

    pub(crate) fn take_or_wake(
        &self,
        seen: Option<u64>,
        subscriber: SubscriberId,
        waker: &Waker,
    ) -> Take {
        // Cloned before and dropped after the lock is held: wakers run code that is not ours.
        let waker = waker.clone();
        let mut state = self.state.lock();
        let take = self.take(&state, seen);
        let replaced = match take {
            Take::Nothing => state.set_waker(subscriber, Some(waker)),
            Take::Events(_) | Take::TooFarBehind | Take::Closed => None,
        };
        drop(state);
        drop(replaced);
        take
    }

    pub(crate) fn take_within(&self, seen: Option<u64>, timeout: Duration) -> Take {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock();
        loop {
            let take = self.take(&state, seen);
            if !matches!(take, Take::Nothing) || self.timed_out(&mut state, deadline) {
                return take;
            }
        }
    }

    pub(crate) fn forget_waker(&self, subscriber: SubscriberId) {
        let forgotten = self.state.lock().set_waker(subscriber, None);
        drop(forgotten);
    }

    fn take(&self, state: &State, seen: Option<u64>) -> Take {
        let Some(seen) = seen else {
            return Take::TooFarBehind;
        };
        if seen == state.ring.last_id() {
            return if state.closed {
                Take::Closed
            } else {
                Take::Nothing
            };
        }
        seen.checked_add(1)
            .and_then(|first| state.ring.batch(first, self.rank, BATCH_WEIGHT_MAX))
            .map_or(Take::TooFarBehind, Take::Events)
    }

    /// Waits for an arrival; a deadline beyond the clock's range never passes.
    fn timed_out(&self, state: &mut MutexGuard<'_, State>, deadline: Option<Instant>) -> bool {
        match deadline {
            Some(deadline) => self.arrived.wait_until(state, deadline).timed_out(),
            None => {
                self.arrived.wait(state);
                false
            }
        }
    }
}

impl State {
    /// Replaces the waker of a subscriber; returns the one it had.
    fn set_waker(&mut self, subscriber: SubscriberId, waker: Option<Waker>) -> Option<Waker> {
        let place = self.wakers.iter().position(|(id, _)| *id == subscriber);
        let had = place.map(|place| self.wakers.swap_remove(place).1);
        self.wakers.extend(waker.map(|waker| (subscriber, waker)));
        had
    }
}

impl Wakeups {
    pub(crate) fn fire(self) {
        self.0.into_iter().for_each(Waker::wake);
    }
}
