//! Received notifications: a bounded queue with blocking, polling and async receivers.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::clock::after;
use crate::error::AgentStopped;

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

/// Queue of one agent.
pub(crate) struct NotificationQueue {
    limit: usize,
    state: Mutex<QueueState>,
    arrived: Condvar,
}

#[derive(Default)]
struct QueueState {
    queue: VecDeque<Notification>,
    wakers: Vec<Waker>,
    stopped: bool,
}

impl fmt::Debug for NotificationQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NotificationQueue")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl NotificationQueue {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            state: Mutex::default(),
            arrived: Condvar::new(),
        }
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
        self.arrived.notify_one();
        wakers.into_iter().for_each(Waker::wake);
        true
    }

    pub(crate) fn stop(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.arrived.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// Receiver of an agent's notifications. Clones share the queue: each notification goes to one.
#[derive(Clone, Debug)]
pub struct Notifications {
    pub(crate) queue: Arc<NotificationQueue>,
}

impl Notifications {
    /// The next notification if one is waiting.
    ///
    /// # Errors
    /// The agent is shut down and the queue is empty.
    pub fn try_recv(&self) -> Result<Option<Notification>, AgentStopped> {
        let mut state = self.queue.state.lock();
        match state.queue.pop_front() {
            None if state.stopped => Err(AgentStopped),
            next => Ok(next),
        }
    }

    /// Waits for the next notification; the thread is parked meanwhile.
    ///
    /// # Errors
    /// Nothing arrived within `timeout`, or the agent is shut down and the queue is empty.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Notification, RecvError> {
        let until = after(timeout);
        let mut state = self.queue.state.lock();
        loop {
            if let Some(next) = state.queue.pop_front() {
                return Ok(next);
            }
            if state.stopped {
                return Err(AgentStopped.into());
            }
            if self.queue.arrived.wait_until(&mut state, until).timed_out() {
                return state.queue.pop_front().ok_or(RecvError::TimedOut);
            }
        }
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
        let mut state = self.notifications.queue.state.lock();
        if let Some(next) = state.queue.pop_front() {
            return Poll::Ready(Ok(next));
        }
        if state.stopped {
            return Poll::Ready(Err(AgentStopped));
        }
        if !state
            .wakers
            .iter()
            .any(|waker| waker.will_wake(context.waker()))
        {
            state.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }
}
