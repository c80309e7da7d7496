//! A transfer in flight.

use std::time::Duration;

use blockplane_transfer::{Transfer, TransferError, TransferStatus};
use parking_lot::RwLock;
use pyo3::prelude::*;

use super::fault::classify;
use crate::tiers::seconds;

/// Bytes on their way.
#[pyclass(module = "blockplane._core", frozen)]
pub(crate) struct TransferCore {
    state: RwLock<State>,
    /// In the agent's queue of ends.
    #[pyo3(get)]
    token: u64,
}

enum State {
    Open(Transfer),
    /// It holds no memory any more.
    Ended {
        outcome: Result<(), TransferError>,
        bytes: u64,
        time: Duration,
    },
    Detached,
}

impl TransferCore {
    pub(super) const fn new(transfer: Transfer, token: u64) -> Self {
        Self {
            state: RwLock::new(State::Open(transfer)),
            token,
        }
    }

    /// How it ended, if it does within `wait`.
    fn outcome(&self, wait: Duration) -> Option<Result<(), TransferError>> {
        let outcome = match &*self.state.read() {
            State::Ended { outcome, .. } => return Some(outcome.clone()),
            State::Detached => return Some(Err(TransferError::Cancelled)),
            State::Open(transfer) => match transfer.status() {
                TransferStatus::Done => Ok(()),
                TransferStatus::Failed(error) => Err(error),
                TransferStatus::InFlight if wait.is_zero() => return None,
                TransferStatus::InFlight => match transfer.wait(wait) {
                    Err(TransferError::StillInFlight { .. }) => return None,
                    ended => ended,
                },
            },
        };
        let mut state = self.state.write();
        if let State::Open(transfer) = &*state {
            let telemetry = transfer.telemetry();
            *state = State::Ended {
                outcome: outcome.clone(),
                bytes: telemetry.as_ref().map_or(0, |told| told.bytes),
                time: telemetry.map_or(Duration::ZERO, |told| told.total),
            };
        }
        Some(outcome)
    }
}

#[pymethods]
impl TransferCore {
    /// Whether it ended well; false while it is in flight after `timeout` seconds.
    fn wait(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = seconds(timeout);
        match py.detach(|| self.outcome(timeout)) {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(error)) => Err(classify(&error)),
        }
    }

    /// Whether it ended, in any way.
    #[getter]
    fn done(&self) -> bool {
        self.outcome(Duration::ZERO).is_some()
    }

    /// Asks for its end, without waiting for it.
    fn cancel(&self) {
        if let State::Open(transfer) = &*self.state.read() {
            transfer.request_cancel();
        }
    }

    /// Bytes, and seconds from post to end; once it has ended.
    #[getter]
    fn telemetry(&self) -> Option<(u64, f64)> {
        let _how = self.outcome(Duration::ZERO)?;
        match &*self.state.read() {
            State::Ended { bytes, time, .. } => Some((*bytes, time.as_secs_f64())),
            State::Open(_) | State::Detached => None,
        }
    }

    /// Lets it go on without anybody who waits.
    fn detach(&self) {
        let state = std::mem::replace(&mut *self.state.write(), State::Detached);
        if let State::Open(transfer) = state {
            transfer.detach();
        }
    }
}
