//! The handle of a posted operation.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::state::{Phase, TransferState};
use super::telemetry::TransferTelemetry;
use crate::clock::after;
use crate::error::TransferError;

/// Where a transfer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferStatus {
    /// Bytes or the notification are on their way.
    InFlight,
    /// All bytes are in place, and the notification (if any) is queued at the peer.
    Done,
    /// It failed; no byte of it moves any more.
    Failed(TransferError),
}

/// How a cancel ended. In every case no byte of the transfer is read or written locally any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CancelOutcome {
    /// The transfer was complete before the cancel took effect.
    Completed,
    /// Called off, and the peer's memory is quiet as well.
    Cancelled,
    /// It had failed with another error. After [`TransferError::PeerLost`] over tcp, what the peer
    /// had already received may still be placed by the peer itself if it was merely stopped; its
    /// own windows guard that.
    Failed(TransferError),
}

/// A posted operation. It can be polled, waited for, awaited and cancelled; dropping the handle
/// cancels in the background. The memory it names stays registered until no byte moves any more.
///
/// Its deadline is its own: awaiting needs no timer around it, in any executor.
///
/// ```
/// use std::time::Duration;
///
/// use blockplane_transfer::{PostOptions, Prepared, TransferError};
///
/// /// How long it took, or `None` when it missed its deadline.
/// async fn send(prepared: &Prepared) -> Result<Option<Duration>, Box<dyn std::error::Error>> {
///     let options = PostOptions::within(Duration::from_millis(50)).notify("there");
///     let mut transfer = prepared.post(options)?;
///     match (&mut transfer).await {
///         Ok(()) => Ok(transfer.telemetry().map(|told| told.total)),
///         // No byte of it moves any more: the memory can be used for something else.
///         Err(TransferError::DeadlineExceeded { .. }) => Ok(None),
///         Err(error) => Err(error.into()),
///     }
/// }
/// ```
///
/// The ends of many transfers are better had from one [`CompletionQueue`](crate::CompletionQueue).
#[must_use = "dropping a transfer cancels it"]
pub struct Transfer {
    state: Arc<TransferState>,
    detached: bool,
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transfer")
            .field("id", &self.state.id)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl Transfer {
    pub(crate) const fn new(state: Arc<TransferState>) -> Self {
        Self {
            state,
            detached: false,
        }
    }

    /// Where the transfer stands, without waiting.
    #[must_use]
    pub fn status(&self) -> TransferStatus {
        match self.state.phase() {
            Phase::Moving | Phase::Notifying => TransferStatus::InFlight,
            Phase::Finished(Ok(())) => TransferStatus::Done,
            Phase::Finished(Err(error)) => TransferStatus::Failed(error),
        }
    }

    /// Waits for the end. On the memory lanes the waiting thread helps to copy.
    ///
    /// # Errors
    /// The reason of the failure, or [`TransferError::StillInFlight`] when `timeout` passes first.
    pub fn wait(&self, timeout: Duration) -> Result<(), TransferError> {
        let until = after(timeout);
        self.state.copy_parts();
        self.state.spin_for_workers();
        self.state
            .wait_until(until)
            .unwrap_or(Err(TransferError::StillInFlight { waited: timeout }))
    }

    /// Asks for the end without waiting; await or wait for the transfer to see it.
    pub fn request_cancel(&self) {
        self.state.stop(TransferError::Cancelled);
    }

    /// Cancels and returns when no byte of the transfer can land any more. That takes at most one
    /// part of a copy, or one answer of the peer, who is lost after `peer_loss_timeout`.
    pub fn cancel(self) -> CancelOutcome {
        self.request_cancel();
        let bound = self.state.core.config.peer_loss_timeout * 4;
        loop {
            match self.state.wait_until(after(bound)) {
                Some(Ok(())) => return CancelOutcome::Completed,
                Some(Err(TransferError::Cancelled)) => return CancelOutcome::Cancelled,
                Some(Err(error)) => return CancelOutcome::Failed(error),
                None => {
                    // Only a stalled thread of this process can get here; say so and keep the
                    // promise rather than the bound.
                    tracing::warn!(
                        id = self.state.id,
                        ?bound,
                        "cancelled transfer is not quiet"
                    );
                }
            }
        }
    }

    /// How the transfer went; `None` while it is in flight. To look at it after awaiting, await
    /// `&mut transfer`.
    #[must_use]
    pub fn telemetry(&self) -> Option<TransferTelemetry> {
        self.state.telemetry()
    }

    /// Lets the transfer run to its end without a handle.
    pub fn detach(mut self) {
        self.detached = true;
    }
}

impl Future for Transfer {
    type Output = Result<(), TransferError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.state
            .poll(context.waker())
            .map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if !self.detached {
            self.request_cancel();
        }
    }
}
