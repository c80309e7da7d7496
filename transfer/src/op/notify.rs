//! Received notifications: a bounded queue with blocking, polling and async receivers.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::clock::after;
use crate::error::AgentStopped;
use crate::ring::{Bell, Reader};
use crate::wire::{Reactors, Wanted};

/// A message from a peer. One that was bound to a transfer arrives after all bytes of the transfer
/// are in place, and those of one peer arrive in the order in which they were posted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Name of the sender.
    pub from: Arc<str>,
    /// Epoch of the sender.
    pub epoch: u64,
    /// What it sent.
    pub payload: Bytes,
}

/// Why nothing was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecvError {
    /// Nothing arrived in time.
    #[error("no notification arrived in time")]
    TimedOut,
    /// The agent is shut down and the queue is empty.
    #[error(transparent)]
    Stopped(#[from] AgentStopped),
}

/// What an agent has received: from peers on sockets and in this process in a queue, from peers on
/// this host in the rings into which they write.
pub(crate) struct NotificationQueue {
    limit: usize,
    bell: Bell,
    /// Rings in use.
    open_rings: AtomicUsize,
    /// How long receivers look before they park, in nanoseconds.
    spin: AtomicU64,
    state: Mutex<QueueState>,
}

#[derive(Default)]
struct QueueState {
    queue: VecDeque<Notification>,
    rings: Vec<Option<Ring>>,
    /// Counts of the rings that are gone.
    closed: (u64, u64),
    /// Where to look next, so that every ring gets its turn.
    turn: usize,
    wakers: Vec<Waker>,
    stopped: bool,
}

/// A ring of one connection.
struct Ring {
    from: Arc<str>,
    epoch: u64,
    reader: Reader,
    /// How often it was found empty since it had something.
    empty: u32,
    /// The connection is gone; what it has brought is still delivered.
    ended: bool,
}

/// A ring that was found empty so often is not looked at until it has something again.
const EMPTY_MAX: u32 = 256;

impl fmt::Debug for NotificationQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NotificationQueue")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// What a new connection needs to send notifications through shared memory.
#[derive(Debug)]
pub(crate) struct OpenedRing {
    /// Names the ring in this agent.
    pub(crate) index: usize,
    pub(crate) ring: Arc<OwnedFd>,
    pub(crate) bell: Arc<OwnedFd>,
}

impl NotificationQueue {
    /// A queue for at most `limit` notifications, and as many again in each of `rings` rings.
    pub(crate) fn new(limit: usize, rings: usize) -> io::Result<Self> {
        Ok(Self {
            limit,
            bell: Bell::new(rings)?,
            open_rings: AtomicUsize::new(0),
            spin: AtomicU64::new(0),
            state: Mutex::new(QueueState {
                rings: std::iter::repeat_with(|| None).take(rings).collect(),
                ..QueueState::default()
            }),
        })
    }

    /// Notifications that came through rings so far, and those that found their ring full.
    pub(crate) fn ring_counts(&self) -> (u64, u64) {
        let state = self.state.lock();
        let open = state
            .rings
            .iter()
            .flatten()
            .map(|ring| ring.reader.counts());
        open.fold(state.closed, |sum, (sent, refused)| {
            (sum.0.wrapping_add(sent), sum.1.wrapping_add(refused))
        })
    }

    /// Queues a notification; false when the queue is full.
    pub(crate) fn push(&self, notification: Notification) -> bool {
        let mut state = self.state.lock();
        if state.queue.len() >= self.limit {
            return false;
        }
        state.queue.push_back(notification);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.bell.ring_local();
        wakers.into_iter().for_each(Waker::wake);
        true
    }

    /// A peer says that it has rung the bell while nobody was parked on it.
    pub(crate) fn wake_tasks(&self) {
        let wakers = std::mem::take(&mut self.state.lock().wakers);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// A ring for a connection from `from`.
    pub(crate) fn open_ring(
        &self,
        from: Arc<str>,
        epoch: u64,
        payload_max: usize,
    ) -> io::Result<OpenedRing> {
        let (reader, ring) = Reader::new(self.limit, payload_max)?;
        let mut state = self.state.lock();
        let index = state.rings.iter().position(Option::is_none);
        let index = index.ok_or_else(|| io::Error::other("all notification rings are in use"))?;
        state.rings[index] = Some(Ring {
            from,
            epoch,
            reader,
            empty: 0,
            ended: false,
        });
        self.open_rings.fetch_add(1, Ordering::Relaxed);
        Ok(OpenedRing {
            index,
            ring,
            bell: self.bell.file().clone(),
        })
    }

    /// The connection of a ring is gone. What it has brought moves to the queue; what does not fit
    /// stays in the ring until it is received.
    pub(crate) fn close_ring(&self, index: usize) {
        let mut state = self.state.lock();
        let mut moved = false;
        let QueueState { queue, rings, .. } = &mut *state;
        let Some(Some(ring)) = rings.get_mut(index) else {
            return;
        };
        ring.ended = true;
        while queue.len() < self.limit {
            let Some(notification) = ring.next() else {
                break;
            };
            queue.push_back(notification);
            moved = true;
        }
        if ring.reader.has_more() {
            // A writer that was killed in between may have left the bit unset.
            self.bell.set(index);
        } else {
            self.free_ring(&mut state, index);
        }
        drop(state);
        if moved {
            self.bell.ring_local();
            self.wake_tasks();
        }
    }

    pub(crate) fn stop(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.bell.ring_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    fn free_ring(&self, state: &mut QueueState, index: usize) {
        if let Some(ring) = state.rings.get_mut(index).and_then(Option::take) {
            let (sent, refused) = ring.reader.counts();
            state.closed.0 = state.closed.0.wrapping_add(sent);
            state.closed.1 = state.closed.1.wrapping_add(refused);
            self.open_rings.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The next notification; `Err` when there is none and there will be none.
    fn next(&self, state: &mut QueueState) -> Result<Option<Notification>, AgentStopped> {
        if let Some(next) = state.queue.pop_front() {
            return Ok(Some(next));
        }
        // Every ring once, beginning behind the one that was served last.
        for range in [state.turn..state.rings.len(), 0..state.turn] {
            let mut at = range.start;
            while let Some(index) = self.bell.next_ready(at..range.end) {
                at = index + 1;
                if let Some(next) = self.next_of(state, index) {
                    state.turn = index + 1;
                    return Ok(Some(next));
                }
            }
        }
        if state.stopped {
            return Err(AgentStopped);
        }
        Ok(None)
    }

    /// The next notification of one ring.
    fn next_of(&self, state: &mut QueueState, index: usize) -> Option<Notification> {
        let Some(Some(ring)) = state.rings.get_mut(index) else {
            self.bell.clear(index);
            return None;
        };
        if let Some(next) = ring.next() {
            ring.empty = 0;
            return Some(next);
        }
        ring.empty += 1;
        if ring.ended {
            self.free_ring(state, index);
        } else if ring.empty >= EMPTY_MAX {
            ring.empty = 0;
            self.bell.clear(index);
            if ring.reader.has_more() {
                self.bell.set(index);
            }
        }
        None
    }
}

impl Ring {
    fn next(&mut self) -> Option<Notification> {
        match self.reader.pop() {
            Ok(payload) => payload.map(|payload| Notification {
                from: self.from.clone(),
                epoch: self.epoch,
                payload: payload.into(),
            }),
            Err(error) => {
                tracing::warn!(from = %self.from, %error, "notifications of this peer are lost");
                self.reader.give_up();
                None
            }
        }
    }
}

/// Longest time that a receiver looks for the next notification before it parks. A wake-up costs
/// 15 to 25 us, so looking longer than that cannot pay.
const SPIN_MAX: Duration = Duration::from_micros(40);
/// What a receiver begins with, and falls back to when looking was in vain.
const SPIN_MIN: Duration = Duration::from_micros(1);

/// Receiver of an agent's notifications. Clones share the queue: each notification goes to one.
#[derive(Clone, Debug)]
pub struct Notifications {
    pub(crate) queue: Arc<NotificationQueue>,
    pub(crate) reactors: Arc<Reactors>,
}

impl Wanted for NotificationQueue {
    fn here(&self) -> bool {
        let state = self.state.lock();
        state.stopped || !state.queue.is_empty() || self.open_rings.load(Ordering::Relaxed) > 0
    }

    fn parked(&self, _parked: bool) -> bool {
        self.here()
    }
}

impl Notifications {
    /// The next notification if one is waiting.
    ///
    /// # Errors
    /// The agent is shut down and the queue is empty.
    pub fn try_recv(&self) -> Result<Option<Notification>, AgentStopped> {
        self.queue.next(&mut self.queue.state.lock())
    }

    /// Waits for the next notification. The thread looks for it a few microseconds longer when that
    /// has helped lately, and is parked after that.
    ///
    /// # Errors
    /// Nothing arrived within `timeout`, or the agent is shut down and the queue is empty.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Notification, RecvError> {
        let until = after(timeout);
        let found = || Ok::<_, RecvError>(self.try_recv()?);
        if let Some(next) = found()? {
            return Ok(next);
        }
        if let Some(next) = self.spin(until)? {
            return Ok(next);
        }
        loop {
            let sleeper = self.queue.bell.sleeper();
            if let Some(next) = found()? {
                return Ok(next);
            }
            if Instant::now() >= until {
                return Err(RecvError::TimedOut);
            }
            sleeper.sleep(until);
            drop(sleeper);
            if let Some(next) = found()? {
                return Ok(next);
            }
        }
    }

    /// Looks a little while. How long adapts: twice as long each time that it was worth it.
    fn spin(&self, until: Instant) -> Result<Option<Notification>, AgentStopped> {
        if self.queue.open_rings.load(Ordering::Relaxed) == 0 {
            // They can only come through sockets: this thread serves those as long as they are busy.
            self.reactors.look(until, &*self.queue);
            return self.try_recv();
        }
        let nanos = self.queue.spin.load(Ordering::Relaxed);
        let budget = Duration::from_nanos(nanos).clamp(SPIN_MIN, SPIN_MAX);
        let enough = (Instant::now() + budget).min(until);
        let found = loop {
            let next = self.try_recv()?;
            if next.is_some() || Instant::now() >= enough {
                break next;
            }
            std::hint::spin_loop();
        };
        let budget = if found.is_some() {
            budget * 2
        } else {
            budget / 2
        };
        let nanos = u64::try_from(budget.clamp(SPIN_MIN, SPIN_MAX).as_nanos()).unwrap_or(0);
        self.queue.spin.store(nanos, Ordering::Relaxed);
        Ok(found)
    }

    /// Waits for the next notification without blocking a thread. Dropping the future loses
    /// nothing. The caller brings the deadline.
    #[must_use]
    pub const fn recv(&self) -> Recv<'_> {
        Recv {
            notifications: self,
        }
    }
}

/// Future of [`Notifications::recv`].
#[derive(Debug)]
pub struct Recv<'a> {
    notifications: &'a Notifications,
}

impl Future for Recv<'_> {
    type Output = Result<Notification, AgentStopped>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let queue = &self.notifications.queue;
        let mut state = queue.state.lock();
        match queue.next(&mut state) {
            Ok(Some(next)) => return Poll::Ready(Ok(next)),
            Err(stopped) => return Poll::Ready(Err(stopped)),
            Ok(None) => {}
        }
        if !state
            .wakers
            .iter()
            .any(|waker| waker.will_wake(context.waker()))
        {
            state.wakers.push(context.waker().clone());
        }
        // From now on a peer that brings something says so; what came before is found here.
        queue.bell.set_alarm();
        match queue.next(&mut state) {
            Ok(Some(next)) => Poll::Ready(Ok(next)),
            Err(stopped) => Poll::Ready(Err(stopped)),
            Ok(None) => Poll::Pending,
        }
    }
}
