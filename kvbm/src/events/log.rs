//! The ring of recent events and those who wait for the next one.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
    task::Waker,
    time::{Duration, Instant},
};

use blockplane_protocol::{DpRank, KvEvent, KvEventData};
use parking_lot::{Condvar, Mutex, MutexGuard};

/// Blocks named in one batch, so that a batch stays far below the size limit of a message.
const BATCH_WEIGHT_MAX: usize = 8_192;

/// Recent events of one pool, numbered without gaps.
#[derive(Debug)]
pub(crate) struct EventLog {
    rank: DpRank,
    weight_max: usize,
    state: Mutex<State>,
    arrived: Condvar,
    subscribers: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// Ascending by exactly 1; the last has number `last_id`.
    ring: VecDeque<KvEvent>,
    /// Sum of the weights in the ring; at most `weight_max`.
    weight: usize,
    last_id: u64,
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
            weight_max,
            state: Mutex::new(State {
                ring: VecDeque::new(),
                weight: 0,
                last_id: 0,
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
        self.state.lock().last_id
    }

    /// Numbers and keeps an event. The caller fires `wakeups` after its own locks are released.
    pub(crate) fn append(&self, data: KvEventData, wakeups: &mut Wakeups) {
        let mut state = self.state.lock();
        state.last_id += 1;
        let event = KvEvent {
            event_id: state.last_id,
            rank: self.rank,
            data,
        };
        state.weight += weight(&event);
        state.ring.push_back(event);
        while state.weight > self.weight_max {
            let oldest = state.ring.pop_front().expect("weight is of kept events");
            state.weight -= weight(&oldest);
        }
        wakeups
            .0
            .extend(state.wakers.drain(..).map(|(_, waker)| waker));
        drop(state);
        self.arrived.notify_all();
    }

    /// No event will come any more.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.arrived.notify_all();
        wakers.into_iter().for_each(|(_, waker)| waker.wake());
    }

    pub(crate) fn take_or_wake(
        &self,
        seen: Option<u64>,
        subscriber: SubscriberId,
        waker: &Waker,
    ) -> Take {
        let mut state = self.state.lock();
        let take = take(&state, seen);
        if matches!(take, Take::Nothing) {
            match state.wakers.iter_mut().find(|(id, _)| *id == subscriber) {
                Some((_, known)) => known.clone_from(waker),
                None => state.wakers.push((subscriber, waker.clone())),
            }
        }
        take
    }

    pub(crate) fn take_within(&self, seen: Option<u64>, timeout: Duration) -> Take {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock();
        loop {
            let take = take(&state, seen);
            if !matches!(take, Take::Nothing) || self.timed_out(&mut state, deadline) {
                return take;
            }
        }
    }

    pub(crate) fn forget_waker(&self, subscriber: SubscriberId) {
        let mut state = self.state.lock();
        state.wakers.retain(|(id, _)| *id != subscriber);
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

impl Wakeups {
    pub(crate) fn fire(self) {
        self.0.into_iter().for_each(Waker::wake);
    }
}

fn take(state: &State, seen: Option<u64>) -> Take {
    let Some(seen) = seen.filter(|&seen| seen <= state.last_id) else {
        return Take::TooFarBehind;
    };
    if seen == state.last_id {
        return if state.closed {
            Take::Closed
        } else {
            Take::Nothing
        };
    }
    let first_wanted = seen + 1;
    let Some(skip) = state
        .ring
        .front()
        .and_then(|oldest| first_wanted.checked_sub(oldest.event_id))
        .and_then(|skip| usize::try_from(skip).ok())
    else {
        return Take::TooFarBehind;
    };
    let mut batch_weight = 0;
    let batch = state
        .ring
        .range(skip..)
        .enumerate()
        .take_while(|(i, event)| {
            batch_weight += weight(event);
            *i == 0 || batch_weight <= BATCH_WEIGHT_MAX
        })
        .map(|(_, event)| event.clone())
        .collect();
    Take::Events(batch)
}

fn weight(event: &KvEvent) -> usize {
    match &event.data {
        KvEventData::Stored { blocks, .. } => blocks.len().max(1),
        KvEventData::Removed { hashes, .. } => hashes.len().max(1),
        KvEventData::Cleared => 1,
    }
}
