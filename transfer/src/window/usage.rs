//! Counting who uses something that may be taken away.

use parking_lot::Mutex;

/// How to tell the owner that nothing uses it any more. Runs once, after [`Usage::revoke`] and the
/// end of the last use.
pub(crate) type Acknowledge = Box<dyn FnOnce() + Send>;

/// Uses of one thing of a peer: a window, or memory that the kernel copies into.
pub(crate) struct Usage {
    state: Mutex<State>,
}

struct State {
    revoked: bool,
    active: usize,
    acknowledge: Option<Acknowledge>,
}

impl std::fmt::Debug for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Usage")
            .field("active", &self.state.lock().active)
            .finish_non_exhaustive()
    }
}

impl Usage {
    pub(crate) fn new(acknowledge: Acknowledge) -> Self {
        Self {
            state: Mutex::new(State {
                revoked: false,
                active: 0,
                acknowledge: Some(acknowledge),
            }),
        }
    }

    /// One transfer starts using it; false when it is taken away.
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
        let acknowledge = state.due();
        drop(state);
        if let Some(acknowledge) = acknowledge {
            acknowledge();
        }
    }

    /// Whether it is taken away.
    pub(crate) fn revoked(&self) -> bool {
        self.state.lock().revoked
    }

    /// No transfer may start any more; the owner is told when none is left, perhaps now.
    pub(crate) fn revoke(&self) {
        let mut state = self.state.lock();
        state.revoked = true;
        let acknowledge = state.due();
        drop(state);
        if let Some(acknowledge) = acknowledge {
            acknowledge();
        }
    }
}

impl State {
    fn due(&mut self) -> Option<Acknowledge> {
        (self.revoked && self.active == 0)
            .then(|| self.acknowledge.take())
            .flatten()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn the_owner_is_told_once_after_the_last_use() {
        let told = Arc::new(AtomicUsize::new(0));
        let tell = told.clone();
        let usage = Usage::new(Box::new(move || {
            tell.fetch_add(1, Ordering::Relaxed);
        }));
        assert!(usage.begin() && usage.begin());
        usage.end();
        usage.revoke();
        assert!(!usage.begin());
        assert_eq!(told.load(Ordering::Relaxed), 0);
        usage.end();
        usage.revoke();
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }
}
