//! Seeded faults around any backend: delay (and with it reorder), loss, disconnect, tearing.
//!
//! Faults hit the start of an operation. Because a backend claims parts only when it starts, an
//! operation that is delayed or lost can be cancelled like any other one: nothing is claimed. A torn
//! one has some of its parts claimed here, which never move; they are given back when it fails.

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{Backend, Refusal};
use crate::agent::{RemoteRegion, Session, Timers};
use crate::config::FaultConfig;
use crate::error::{LossCause, TransferError};
use crate::memory::RegionId;
use crate::op::{Path, TransferState};
use crate::window::{Grant, WindowId};

#[derive(Debug)]
pub(super) struct Faulty {
    faults: FaultConfig,
    random: Mutex<u64>,
    /// Of its own, so that tearing leaves the other faults of a seed where they were.
    random_torn: Mutex<u64>,
    timers: Arc<Timers>,
    session: OnceLock<Weak<Session>>,
    inner: Arc<dyn Backend>,
}

/// What happens to one operation.
enum Fault {
    None,
    Delay(Duration),
    Loss,
    Disconnect,
    /// So many parts do not move.
    Torn(u32),
}

/// Parts of a torn operation that do not move.
struct Torn {
    transfer: Arc<TransferState>,
    parts: u32,
}

impl Drop for Torn {
    fn drop(&mut self) {
        self.transfer.stop(TransferError::Injected);
        for _ in 0..self.parts {
            self.transfer.part_done();
        }
    }
}

impl Faulty {
    pub(super) fn new(faults: FaultConfig, timers: Arc<Timers>, inner: Arc<dyn Backend>) -> Self {
        let random = Mutex::new(faults.seed);
        let random_torn = Mutex::new(!faults.seed);
        Self {
            faults,
            random,
            random_torn,
            timers,
            session: OnceLock::new(),
            inner,
        }
    }

    /// Three numbers are drawn for every operation whatever they decide, so that changing one
    /// probability leaves the other faults where they were.
    fn draw(&self, transfer: &TransferState) -> Fault {
        let mut state = self.random.lock();
        let [disconnect, loss, delay, amount] = std::array::from_fn(|_| unit(&mut state));
        drop(state);
        if disconnect < self.faults.disconnect {
            Fault::Disconnect
        } else if loss < self.faults.loss {
            Fault::Loss
        } else if delay < self.faults.delay {
            Fault::Delay(self.faults.delay_max.mul_f64(amount))
        } else {
            self.draw_torn(transfer)
        }
    }

    fn draw_torn(&self, transfer: &TransferState) -> Fault {
        let mut state = self.random_torn.lock();
        let [torn, amount] = std::array::from_fn(|_| unit(&mut state));
        drop(state);
        let parts = match &transfer.work {
            // The two sides of a stream agree on all parts before the first one moves.
            Some(work) if !matches!(work.path, Path::Stream { .. }) => work.parts,
            _ => 0,
        };
        if torn >= self.faults.torn || parts == 0 {
            return Fault::None;
        }
        let mut still = 1;
        while still < parts && f64::from(still) < f64::from(parts) * amount {
            still += 1;
        }
        Fault::Torn(still)
    }
}

/// SplitMix64, scaled to `0.0..1.0`.
fn unit(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let bits = u32::try_from((z ^ (z >> 31)) >> 32).unwrap_or(u32::MAX);
    f64::from(bits) / (f64::from(u32::MAX) + 1.0)
}

impl Backend for Faulty {
    fn attach(&self, session: &Arc<Session>) {
        // Attached once, right after construction.
        let _ = self.session.set(Arc::downgrade(session));
        self.inner.attach(session);
    }

    fn region(&self, id: RegionId, until: Instant) -> Result<RemoteRegion, Refusal> {
        self.inner.region(id, until)
    }

    fn window(
        &self,
        session: &Arc<Session>,
        id: WindowId,
        until: Instant,
    ) -> Result<Arc<Grant>, Refusal> {
        self.inner.window(session, id, until)
    }

    fn start(&self, transfer: &Arc<TransferState>) {
        match self.draw(transfer) {
            Fault::None => self.inner.start(transfer),
            Fault::Loss => tracing::debug!(id = transfer.id, "fault: operation lost"),
            Fault::Delay(delay) => {
                tracing::debug!(id = transfer.id, ?delay, "fault: operation delayed");
                let (inner, transfer) = (self.inner.clone(), transfer.clone());
                self.timers
                    .call(Instant::now() + delay, move || inner.start(&transfer));
            }
            Fault::Torn(parts) => {
                tracing::debug!(id = transfer.id, parts, "fault: operation torn");
                let mut torn = Torn {
                    transfer: transfer.clone(),
                    parts: 0,
                };
                while torn.parts < parts && transfer.claim_part().is_some() {
                    torn.parts += 1;
                }
                self.inner.start(transfer);
                let fails = Instant::now() + self.faults.delay_max;
                self.timers.call(fails, move || drop(torn));
            }
            Fault::Disconnect => {
                tracing::debug!(id = transfer.id, "fault: disconnect");
                if let Some(session) = self.session.get().and_then(Weak::upgrade) {
                    session.lose(LossCause::Injected);
                }
            }
        }
    }

    fn stop(&self, transfer: &Arc<TransferState>) {
        self.inner.stop(transfer);
    }

    fn notify(&self, transfer: &Arc<TransferState>) -> Option<Result<(), TransferError>> {
        self.inner.notify(transfer)
    }

    fn help(&self, transfer: &Arc<TransferState>, until: Instant) {
        self.inner.help(transfer, until);
    }

    fn wake_helpers(&self) {
        self.inner.wake_helpers();
    }

    fn abandon(&self) {
        self.inner.abandon();
    }

    fn close(&self) {
        self.inner.close();
    }
}
