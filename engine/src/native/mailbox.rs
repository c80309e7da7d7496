//! The way into an engine thread.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

/// Commands for one thread, which sleeps while there is none.
///
/// The queue has no length of its own: every command belongs to a request that was admitted against
/// the engine's limit, and a request causes a few commands at most.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    state: Mutex<State<T>>,
    filled: Condvar,
}

#[derive(Debug)]
struct State<T> {
    commands: VecDeque<T>,
    /// Something changed that the thread looks up by itself, such as a cancelled stream.
    woken: bool,
    /// The thread has ended: commands are dropped, which tells whoever sent them.
    closed: bool,
}

impl<T> Mailbox<T> {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                commands: VecDeque::new(),
                woken: false,
                closed: false,
            }),
            filled: Condvar::new(),
        }
    }

    /// Leaves a command. It is dropped when the thread has ended.
    pub(crate) fn post(&self, command: T) {
        let mut state = self.state.lock();
        if state.closed {
            // Dropping a command may run code that uses this mailbox.
            drop(state);
            drop(command);
            return;
        }
        state.commands.push_back(command);
        drop(state);
        self.filled.notify_one();
    }

    /// Drops all commands, those to come included.
    pub(crate) fn close(&self) {
        let commands = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.commands)
        };
        drop(commands);
    }

    /// Makes the thread look around without a command.
    pub(crate) fn wake(&self) {
        self.state.lock().woken = true;
        self.filled.notify_one();
    }

    /// The commands so far, and whether [`Mailbox::wake`] was called; does not wait.
    pub(crate) fn take(&self) -> (VecDeque<T>, bool) {
        let mut state = self.state.lock();
        let woken = std::mem::take(&mut state.woken);
        (std::mem::take(&mut state.commands), woken)
    }

    /// Sleeps until there is something to take, for at most `timeout`, or for ever without one.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        // A timeout beyond what the clock can express is no timeout.
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state.lock();
        while state.commands.is_empty() && !state.woken {
            match until {
                None => self.filled.wait(&mut state),
                Some(until) => {
                    if self.filled.wait_until(&mut state, until).timed_out() {
                        return;
                    }
                }
            }
        }
    }
}
