//! Completion queues: the ends of many transfers in one place, for a poll loop or one thread.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};

use crate::clock::after;
use crate::error::TransferError;

/// How one transfer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Completion {
    /// The number given to [`PostOptions::complete_to`](crate::PostOptions::complete_to).
    pub token: u64,
    /// How it ended. After an error no byte of the transfer moves any more.
    pub outcome: Result<(), TransferError>,
    /// Bytes of the operation, 0 for a notification.
    pub bytes: u64,
    /// From post to end.
    pub elapsed: Duration,
}

/// A bounded queue of completions. Made by
/// [`Agent::completion_queue`](crate::Agent::completion_queue); clones share it.
///
/// A transfer posted with [`PostOptions::complete_to`](crate::PostOptions::complete_to) takes a
/// place when it is posted and gives it back when its completion is taken out: a full queue refuses
/// the post, and no completion is ever lost.
///
/// In a poll or epoll loop, watch the descriptor ([`AsFd`]) for reading. It is a level: readable
/// exactly while completions are waiting, so take out as many or as few as you like, and never read
/// from it. Registered edge-triggered, it reports when the queue stops being empty. Neither needs a
/// thread, and what is not watched costs no system call.
///
/// ```
/// use std::time::Duration;
///
/// use blockplane_transfer::{Agent, AgentConfig, PostOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let timeout = Duration::from_secs(5);
/// let agent = Agent::new(AgentConfig::new("worker"))?;
/// let peer = agent.connect(&agent.metadata(), timeout)?;
/// let queue = agent.completion_queue(128)?;
/// for token in 0..3 {
///     let options = PostOptions::within(timeout).complete_to(&queue, token);
///     agent.notify_with(&peer, "hello", options)?.detach();
/// }
/// for _ in 0..3 {
///     let completion = queue.wait_timeout(timeout).ok_or("nothing ended")?;
///     assert!(completion.outcome.is_ok() && completion.token < 3);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct CompletionQueue {
    queue: Arc<Queue>,
}

struct Queue {
    capacity: usize,
    /// How long a receiver looks before it parks.
    spin: Duration,
    event: OwnedFd,
    /// Completions that wait, for receivers that look without the lock.
    waiting: AtomicUsize,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    done: VecDeque<Completion>,
    /// Places of transfers in flight.
    reserved: usize,
    /// Somebody has the descriptor: from then on its level follows the queue.
    watched: bool,
    /// The descriptor is readable.
    raised: bool,
}

impl State {
    /// Makes the descriptor say what the queue says.
    fn level(&mut self, event: &OwnedFd) {
        let raised = !self.done.is_empty();
        if !self.watched || raised == self.raised {
            return;
        }
        self.raised = raised;
        // Neither can fail: the counter is 0 before the write and 1 before the read.
        if raised {
            let _ = rustix::io::write(event, &1u64.to_le_bytes());
        } else {
            let _ = rustix::io::read(event, &mut [0; 8]);
        }
    }
}

impl CompletionQueue {
    pub(crate) fn new(capacity: usize, spin: Duration) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            queue: Arc::new(Queue {
                capacity,
                spin,
                event,
                waiting: AtomicUsize::new(0),
                state: Mutex::default(),
                arrived: Condvar::new(),
            }),
        })
    }

    /// Most completions and transfers in flight that the queue holds together.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.queue.capacity
    }

    /// Completions that are waiting.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.waiting.load(Ordering::Acquire)
    }

    /// Whether none is waiting.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes out the oldest completion, without waiting.
    #[must_use]
    pub fn pop(&self) -> Option<Completion> {
        if self.is_empty() {
            return None;
        }
        self.take(&mut self.queue.state.lock())
    }

    /// Takes out all that are waiting, into `into`; says how many.
    pub fn drain(&self, into: &mut Vec<Completion>) -> usize {
        if self.is_empty() {
            return 0;
        }
        let mut state = self.queue.state.lock();
        let count = state.done.len();
        into.extend(state.done.drain(..));
        self.queue.waiting.store(0, Ordering::Release);
        state.level(&self.queue.event);
        count
    }

    /// Waits for the next completion: looks for `AgentConfig::copy_spin`, then parks the thread.
    /// `None` when nothing ended within `timeout`.
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Completion> {
        let until = after(timeout);
        let look_until = after(timeout.min(self.queue.spin));
        while self.is_empty() && Instant::now() < look_until {
            std::hint::spin_loop();
        }
        let mut state = self.queue.state.lock();
        loop {
            if let Some(next) = self.take(&mut state) {
                return Some(next);
            }
            if self.queue.arrived.wait_until(&mut state, until).timed_out() {
                return self.take(&mut state);
            }
        }
    }

    fn take(&self, state: &mut State) -> Option<Completion> {
        let next = state.done.pop_front()?;
        self.queue
            .waiting
            .store(state.done.len(), Ordering::Release);
        state.level(&self.queue.event);
        Some(next)
    }

    /// Takes a place for a transfer; false when the queue is full.
    pub(super) fn reserve(&self) -> bool {
        let mut state = self.queue.state.lock();
        let free = state.done.len() + state.reserved < self.queue.capacity;
        state.reserved += usize::from(free);
        free
    }

    /// Gives a place back: the transfer was not posted after all.
    pub(super) fn release(&self) {
        self.queue.state.lock().reserved -= 1;
    }

    /// Fills a place that was reserved.
    pub(super) fn complete(&self, completion: Completion) {
        let mut state = self.queue.state.lock();
        state.reserved -= 1;
        state.done.push_back(completion);
        self.queue
            .waiting
            .store(state.done.len(), Ordering::Release);
        state.level(&self.queue.event);
        drop(state);
        self.queue.arrived.notify_one();
    }
}

impl AsFd for CompletionQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let mut state = self.queue.state.lock();
        state.watched = true;
        state.level(&self.queue.event);
        drop(state);
        self.queue.event.as_fd()
    }
}

/// Two handles are equal when they share the queue.
impl PartialEq for CompletionQueue {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.queue, &other.queue)
    }
}

impl Eq for CompletionQueue {}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue")
            .field("capacity", &self.queue.capacity)
            .field("waiting", &self.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn completion(token: u64) -> Completion {
        Completion {
            token,
            outcome: Ok(()),
            bytes: 0,
            elapsed: Duration::ZERO,
        }
    }

    fn readable(queue: &CompletionQueue) -> bool {
        let mut poll = libc::pollfd {
            fd: queue.as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one descriptor, valid during the call; no waiting.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }

    #[test]
    fn the_descriptor_is_readable_exactly_while_completions_wait() {
        let queue = CompletionQueue::new(2, Duration::ZERO).unwrap();
        assert!(queue.reserve() && queue.reserve() && !queue.reserve());
        queue.complete(completion(1));
        assert!(readable(&queue), "what was there before it was watched");
        queue.complete(completion(2));
        assert!(readable(&queue));
        assert_eq!(queue.pop().unwrap().token, 1);
        assert!(readable(&queue));
        assert!(queue.reserve() && !queue.reserve());
        queue.release();
        assert_eq!(queue.pop().unwrap().token, 2);
        assert!(!readable(&queue) && queue.pop().is_none());
        assert!(queue.reserve());
        queue.complete(completion(3));
        let mut all = Vec::new();
        assert!(readable(&queue));
        assert_eq!((queue.drain(&mut all), queue.drain(&mut all)), (1, 0));
        assert!(!readable(&queue));
        assert_eq!(queue.wait_timeout(Duration::ZERO), None);
    }

    #[test]
    fn completions_reach_many_receivers_once() {
        let queue = CompletionQueue::new(1000, Duration::from_micros(20)).unwrap();
        let receive = || {
            let queue = queue.clone();
            std::thread::spawn(move || {
                let mut got = Vec::new();
                while let Some(next) = queue.wait_timeout(Duration::from_secs(10)) {
                    if next.token == u64::MAX {
                        break;
                    }
                    got.push(next.token);
                }
                got
            })
        };
        let receivers = [receive(), receive()];
        for token in (0..500).chain([u64::MAX, u64::MAX]) {
            assert!(queue.reserve());
            queue.complete(completion(token));
        }
        let mut got: Vec<u64> = receivers
            .into_iter()
            .flat_map(|receiver| receiver.join().unwrap())
            .collect();
        got.sort_unstable();
        assert!(got.into_iter().eq(0..500));
    }
}
