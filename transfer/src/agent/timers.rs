//! Deadlines and other things that happen later: one thread, parked until the next one is due.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::error::TransferError;
use crate::op::TransferState;

/// Names a scheduled job.
pub(crate) type TimerKey = (Instant, u64);

enum Job {
    Deadline(Weak<TransferState>),
    Call(Box<dyn FnOnce() + Send>),
}

pub(crate) struct Timers {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<TimerKey, Job>,
    next: u64,
    /// When the thread wakes on its own.
    wakes: Option<Instant>,
    stopped: bool,
}

impl fmt::Debug for Timers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timers")
            .field("jobs", &self.state.lock().jobs.len())
            .finish()
    }
}

impl Timers {
    pub(super) fn start(agent: &str) -> io::Result<Arc<Self>> {
        let timers = Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = timers.clone();
        tracing::trace!(agent, "timer thread starts");
        std::thread::Builder::new()
            .name("bp-timer".to_owned())
            .spawn(move || thread.run())?;
        Ok(timers)
    }

    /// Stops the transfer with `DeadlineExceeded` at `at`.
    pub(crate) fn deadline(&self, at: Instant, transfer: &Arc<TransferState>) -> TimerKey {
        self.add(at, Job::Deadline(Arc::downgrade(transfer)))
    }

    /// Runs `call` on the timer thread at `at`. It must be short.
    pub(crate) fn call(&self, at: Instant, call: impl FnOnce() + Send + 'static) -> TimerKey {
        self.add(at, Job::Call(Box::new(call)))
    }

    pub(crate) fn cancel(&self, key: TimerKey) {
        let job = self.state.lock().jobs.remove(&key);
        drop(job);
    }

    fn add(&self, at: Instant, job: Job) -> TimerKey {
        let mut state = self.state.lock();
        if state.stopped {
            return (at, u64::MAX);
        }
        state.next += 1;
        let key = (at, state.next);
        state.jobs.insert(key, job);
        // Only a job before the next wake-up costs a system call.
        let wake = state.wakes.is_none_or(|wakes| at < wakes);
        drop(state);
        if wake {
            self.changed.notify_one();
        }
        key
    }

    fn run(&self) {
        let mut state = self.state.lock();
        while !state.stopped {
            let Some(entry) = state.jobs.first_entry() else {
                state.wakes = None;
                self.changed.wait(&mut state);
                continue;
            };
            let at = entry.key().0;
            if at > Instant::now() {
                state.wakes = Some(at);
                self.changed.wait_until(&mut state, at);
                continue;
            }
            let job = entry.remove();
            // While jobs run the thread looks at the list again anyway.
            state.wakes = Some(at);
            drop(state);
            match job {
                Job::Deadline(transfer) => {
                    if let Some(transfer) = transfer.upgrade() {
                        let deadline = transfer.deadline;
                        transfer.stop(TransferError::DeadlineExceeded { deadline });
                    }
                }
                Job::Call(call) => call(),
            }
            state = self.state.lock();
        }
        let rest = std::mem::take(&mut state.jobs);
        drop(state);
        drop(rest);
    }

    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
        self.changed.notify_one();
    }
}
