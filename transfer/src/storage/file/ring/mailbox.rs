//! What other threads tell the ring thread; an eventfd wakes it when it is parked.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::memory::RegionId;
use crate::op::TransferState;

/// Something to do for the ring thread.
#[derive(Debug)]
pub(super) enum Command {
    /// Move the bytes of a transfer.
    Start(Arc<TransferState>),
    /// The transfer is called off: ask for its requests back.
    Stop(Arc<TransferState>),
    /// The registration of a region has ended.
    ForgetRegion(RegionId),
    /// A file was closed.
    ForgetFile(u64),
    /// End, once nothing is in flight.
    Quit,
}

/// Bounded by what fills it: operations in flight per store, registrations, open files.
#[derive(Debug)]
pub(super) struct Mailbox {
    state: Mutex<State>,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    commands: Vec<Command>,
    parked: bool,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        // Blocking on purpose: the ring waits for it, and a non-blocking one would answer at once.
        let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        Ok(Self {
            state: Mutex::default(),
            wake,
        })
    }

    pub(super) fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    pub(super) fn send(&self, command: Command) {
        let mut state = self.state.lock();
        state.commands.push(command);
        let wake = std::mem::take(&mut state.parked);
        drop(state);
        if wake {
            self.wake();
        }
    }

    /// Lets a read of the eventfd complete.
    pub(super) fn wake(&self) {
        // Any count but zero does.
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_le_bytes()) {
            tracing::error!(%error, "cannot wake the ring thread");
        }
    }

    /// Moves what has come in behind `into`.
    pub(super) fn take(&self, into: &mut Vec<Command>) {
        let mut state = self.state.lock();
        state.parked = false;
        into.append(&mut state.commands);
    }

    /// Announces that the thread is about to wait; false when something has come in.
    pub(super) fn park(&self) -> bool {
        let mut state = self.state.lock();
        state.parked = state.commands.is_empty();
        state.parked
    }
}
