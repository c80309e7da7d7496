//! Errors as Python gets them: a kind, a message, and whether to try again. `blockplane.errors` has a
//! class for each kind.

use blockplane_transfer::{ConnectError, PostError, PrepareError, TransferError};
use pyo3::{create_exception, exceptions::PyException, prelude::*};

create_exception!(
    blockplane._core,
    CoreFault,
    PyException,
    "Kind, message and whether to try again."
);

/// An error of this kind.
pub(super) fn fault(kind: &'static str, error: impl std::fmt::Display) -> PyErr {
    CoreFault::new_err((kind, error.to_string(), false))
}

/// What an error of a transfer is.
pub(super) fn classify(error: &TransferError) -> PyErr {
    let kind = match error {
        TransferError::PeerLost(_) => "peer_lost",
        TransferError::DeadlineExceeded { .. } | TransferError::StillInFlight { .. } => "timeout",
        TransferError::Cancelled => "cancelled",
        TransferError::WindowClosed { .. } => "window_closed",
        TransferError::Rejected(_) => "refused",
        TransferError::Storage(_) => "storage",
        TransferError::Device(_) => "device",
        _ => "transfer",
    };
    CoreFault::new_err((kind, error.to_string(), error.retryable()))
}

/// What an error before a transfer is.
pub(super) fn prepare(error: &PrepareError) -> PyErr {
    let kind = match error {
        PrepareError::PeerLost(_) => "peer_lost",
        _ => "invalid",
    };
    fault(kind, error)
}

/// What an error when posting is.
pub(super) fn post(error: &PostError) -> PyErr {
    let kind = match error {
        PostError::PeerLost(_) => "peer_lost",
        _ => "transfer",
    };
    CoreFault::new_err((kind, error.to_string(), true))
}

/// What an error when connecting is.
pub(super) fn connect(error: &ConnectError) -> PyErr {
    CoreFault::new_err(("connect", error.to_string(), true))
}
