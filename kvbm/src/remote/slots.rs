//! The bounce memory of an object tier: slots for one object each.

use std::time::Instant;

use blockplane_transfer::{Transfer, TransferStatus};
use parking_lot::{Condvar, Mutex};

/// Which slots are free. One whose transfer is not over at its deadline is not used again before it
/// is.
#[derive(Debug)]
pub(super) struct Slots {
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug)]
struct State {
    free: Vec<u32>,
    busy: Vec<(Transfer, u32)>,
}

impl Slots {
    pub(super) fn new(count: u32) -> Self {
        Self {
            state: Mutex::new(State {
                free: (0..count).collect(),
                busy: Vec::new(),
            }),
            freed: Condvar::new(),
        }
    }

    /// Takes one to `wanted` slots; none when the deadline passes first.
    pub(super) fn take(&self, wanted: usize, deadline: Instant) -> Vec<u32> {
        let mut state = self.state.lock();
        loop {
            state.reclaim();
            if !state.free.is_empty() {
                let rest = state.free.len().saturating_sub(wanted);
                return state.free.split_off(rest);
            }
            if self.freed.wait_until(&mut state, deadline).timed_out() {
                return Vec::new();
            }
        }
    }

    pub(super) fn give_back(&self, slot: u32) {
        self.state.lock().free.push(slot);
        self.freed.notify_one();
    }

    /// Gives a slot back when its transfer is over.
    pub(super) fn give_back_after(&self, transfer: Transfer, slot: u32) {
        transfer.request_cancel();
        self.state.lock().busy.push((transfer, slot));
    }
}

impl State {
    fn reclaim(&mut self) {
        let Self { free, busy } = self;
        busy.retain(|(transfer, slot)| {
            let over = transfer.status() != TransferStatus::InFlight;
            if over {
                free.push(*slot);
            }
            !over
        });
    }
}
