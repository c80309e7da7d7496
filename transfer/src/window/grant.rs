//! The initiator's side of a window: its scope, and the transfers that use it.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{Scope, WindowAccess, WindowId};
use crate::memory::RegionId;

/// What the owner says about one of its windows.
#[derive(Debug)]
pub(crate) struct GrantSpec {
    pub(crate) region: RegionId,
    pub(crate) scope: Scope,
    pub(crate) access: WindowAccess,
}

/// How to tell the owner that nothing uses the window any more. Runs once, after the grant was
/// revoked and its last transfer is quiet.
pub(crate) type Acknowledge = Box<dyn FnOnce() + Send>;

/// A window as this agent sees it.
pub(crate) struct Grant {
    pub(crate) id: WindowId,
    pub(crate) spec: GrantSpec,
    state: Mutex<GrantState>,
}

struct GrantState {
    revoked: bool,
    active: usize,
    acknowledge: Option<Acknowledge>,
}

impl std::fmt::Debug for Grant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grant")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Grant {
    pub(crate) fn new(id: WindowId, spec: GrantSpec, acknowledge: Acknowledge) -> Arc<Self> {
        let state = GrantState {
            revoked: false,
            active: 0,
            acknowledge: Some(acknowledge),
        };
        Arc::new(Self {
            id,
            spec,
            state: Mutex::new(state),
        })
    }

    /// One transfer starts using the window; false when it is revoked.
    pub(crate) fn begin(&self) -> bool {
        let mut state = self.state.lock();
        if state.revoked {
            return false;
        }
        state.active += 1;
        true
    }

    /// One transfer has ended; none of its bytes can move any more.
    pub(crate) fn end(&self) {
        let mut state = self.state.lock();
        state.active -= 1;
        let acknowledge = if state.revoked && state.active == 0 {
            state.acknowledge.take()
        } else {
            None
        };
        drop(state);
        if let Some(acknowledge) = acknowledge {
            acknowledge();
        }
    }

    /// No transfer may start any more; the owner is told when none is left, perhaps now.
    pub(crate) fn revoke(&self) {
        let mut state = self.state.lock();
        state.revoked = true;
        let acknowledge = if state.active == 0 {
            state.acknowledge.take()
        } else {
            None
        };
        drop(state);
        if let Some(acknowledge) = acknowledge {
            acknowledge();
        }
    }
}
