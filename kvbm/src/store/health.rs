//! What a store is good for, and the one event when that changes.

use std::path::PathBuf;

use parking_lot::Mutex;

use super::{
    config::StoreHealth,
    disk::{DiskError, DiskErrorKind},
};

/// So many failures of the media in a row end the writing, or the reading.
const IN_A_ROW: u32 = 8;

/// Keeps the health of one store.
pub(super) struct Health {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    health: StoreHealth,
    writes_failed: u32,
    reads_failed: u32,
}

impl Health {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            state: Mutex::new(State {
                health: StoreHealth::On,
                writes_failed: 0,
                reads_failed: 0,
            }),
        }
    }

    pub(super) fn now(&self) -> StoreHealth {
        self.state.lock().health.clone()
    }

    /// Why nothing can be written.
    pub(super) fn no_writes(&self) -> Option<String> {
        match &self.state.lock().health {
            StoreHealth::On | StoreHealth::Shrunk { .. } => None,
            StoreHealth::ReadOnly { reason } | StoreHealth::Off { reason } => Some(reason.clone()),
        }
    }

    /// Why nothing can be read.
    pub(super) fn no_reads(&self) -> Option<String> {
        match &self.state.lock().health {
            StoreHealth::Off { reason } => Some(reason.clone()),
            StoreHealth::On | StoreHealth::Shrunk { .. } | StoreHealth::ReadOnly { .. } => None,
        }
    }

    pub(super) fn wrote(&self) {
        self.state.lock().writes_failed = 0;
    }

    pub(super) fn read(&self) {
        self.state.lock().reads_failed = 0;
    }

    /// A write failed.
    pub(super) fn write_failed(&self, error: &DiskError) {
        let mut state = self.state.lock();
        match error.kind {
            DiskErrorKind::ReadOnly => self.read_only(&mut state, error.message.clone()),
            DiskErrorKind::Media => {
                state.writes_failed += 1;
                if state.writes_failed >= IN_A_ROW {
                    let reason = format!("{IN_A_ROW} writes in a row failed: {}", error.message);
                    self.read_only(&mut state, reason);
                }
            }
            DiskErrorKind::Full | DiskErrorKind::TimedOut | DiskErrorKind::Other => {}
        }
    }

    /// A read failed.
    pub(super) fn read_failed(&self, error: &DiskError) {
        let mut state = self.state.lock();
        if error.kind != DiskErrorKind::Media {
            return;
        }
        state.reads_failed += 1;
        if state.reads_failed >= IN_A_ROW {
            let reason = format!("{IN_A_ROW} reads in a row failed: {}", error.message);
            self.off(&mut state, reason);
        }
    }

    /// Nothing is done from now on.
    pub(super) fn turn_off(&self, reason: String) {
        self.off(&mut self.state.lock(), reason);
    }

    /// Nothing is written from now on.
    pub(super) fn only_reads(&self, reason: String) {
        self.read_only(&mut self.state.lock(), reason);
    }

    /// Nothing is done from now on, as was asked for.
    pub(super) fn close(&self) {
        self.state.lock().health = StoreHealth::Off {
            reason: "it was closed".to_owned(),
        };
    }

    fn off(&self, state: &mut State, reason: String) {
        if !matches!(state.health, StoreHealth::Off { .. }) {
            tracing::error!(store = %self.path.display(), %reason, "KV store is off");
            state.health = StoreHealth::Off { reason };
        }
    }

    fn read_only(&self, state: &mut State, reason: String) {
        if matches!(state.health, StoreHealth::On | StoreHealth::Shrunk { .. }) {
            tracing::error!(store = %self.path.display(), %reason, "KV store only reads from now on");
            state.health = StoreHealth::ReadOnly { reason };
        }
    }

    /// So many slots more are missing.
    pub(super) fn lose(&self, slots: u32, why: &str) {
        let mut state = self.state.lock();
        match &mut state.health {
            StoreHealth::On => {
                let reason = why.to_owned();
                tracing::warn!(
                    store = %self.path.display(), slots, %reason, "KV store has fewer slots"
                );
                state.health = StoreHealth::Shrunk {
                    lost: slots,
                    reason,
                };
            }
            StoreHealth::Shrunk { lost, reason } => {
                *lost = lost.saturating_add(slots);
                why.clone_into(reason);
            }
            StoreHealth::ReadOnly { .. } | StoreHealth::Off { .. } => {}
        }
    }
}
