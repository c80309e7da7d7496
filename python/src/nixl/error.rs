//! NIXL's exception classes, and which of them an error of ours is.

#![expect(
    non_camel_case_types,
    reason = "these are the names that callers catch"
)]

use blockplane_transfer::{
    ConnectError, LossCause, PostError, PrepareError, RegisterError, Rejection, TransferError,
};
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

macro_rules! exceptions {
    ($($name:ident $code:literal $doc:literal)*) => {
        $(create_exception!(nixl._bindings, $name, PyException, $doc);)*

        /// Adds all classes, each with the number of its status as `code`.
        pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
            let py = module.py();
            $(
                let class = py.get_type::<$name>();
                class.setattr("code", $code)?;
                module.add(stringify!($name), class)?;
            )*
            Ok(())
        }
    };
}

exceptions! {
    nixlNotPostedError -1 "The request was not posted yet."
    nixlInvalidParamError -2 "An argument makes no sense."
    nixlBackendError -3 "Memory, a device, a file or a connection refuses."
    nixlNotFoundError -4 "Nothing of that name or address is known."
    nixlMismatchError -5 "Metadata that cannot be read, or that is of another agent."
    nixlNotAllowedError -6 "Not in this state."
    nixlRepostActiveError -7 "The request is in flight."
    nixlUnknownError -8 "Everything else."
    nixlNotSupportedError -9 "This build does not do that."
    nixlRemoteDisconnectError -10 "The peer is lost: it ended, or it is silent."
    nixlCancelledError -11 "The request was released while it was in flight."
    nixlNoTelemetryError -12 "The agent does not keep telemetry of requests."
}

/// What went wrong in this layer or below it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("{0}")]
    NotPosted(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Backend(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Mismatch(String),
    #[error("{0}")]
    NotAllowed(String),
    #[error("the request is in flight: wait for its end, or release it, before it is posted again")]
    RepostActive,
    #[error("{0}")]
    NotSupported(String),
    #[error("{0}")]
    Disconnected(String),
    #[error("{0}")]
    Cancelled(String),
    #[error(
        "the agent keeps no telemetry of requests: create it with capture_telemetry=True, and do \
         not turn it off by NIXL_TELEMETRY_ENABLE"
    )]
    NoTelemetry,
}

impl From<Fault> for PyErr {
    fn from(fault: Fault) -> Self {
        let text = fault.to_string();
        match fault {
            Fault::NotPosted(_) => nixlNotPostedError::new_err(text),
            Fault::Invalid(_) => nixlInvalidParamError::new_err(text),
            Fault::Backend(_) => nixlBackendError::new_err(text),
            Fault::NotFound(_) => nixlNotFoundError::new_err(text),
            Fault::Mismatch(_) => nixlMismatchError::new_err(text),
            Fault::NotAllowed(_) => nixlNotAllowedError::new_err(text),
            Fault::RepostActive => nixlRepostActiveError::new_err(text),
            Fault::NotSupported(_) => nixlNotSupportedError::new_err(text),
            Fault::Disconnected(_) => nixlRemoteDisconnectError::new_err(text),
            Fault::Cancelled(_) => nixlCancelledError::new_err(text),
            Fault::NoTelemetry => nixlNoTelemetryError::new_err(text),
        }
    }
}

impl From<ConnectError> for Fault {
    fn from(error: ConnectError) -> Self {
        let text = error.to_string();
        match error {
            ConnectError::NoLane { .. } | ConnectError::Stale { .. } => Self::Disconnected(text),
            ConnectError::Unknown { .. } => Self::NotFound(text),
            _ => Self::Backend(text),
        }
    }
}

impl From<PrepareError> for Fault {
    fn from(error: PrepareError) -> Self {
        let text = error.to_string();
        match error {
            PrepareError::Connect(error) => error.into(),
            PrepareError::PeerLost(_) | PrepareError::TimedOut { .. } => Self::Disconnected(text),
            PrepareError::UnknownRegion { .. } => Self::NotFound(format!(
                "{text}: the memory was deregistered; exchange metadata again"
            )),
            PrepareError::Empty
            | PrepareError::Layout { .. }
            | PrepareError::Mismatch { .. }
            | PrepareError::Overlap { .. }
            | PrepareError::TooLarge { .. } => Self::Invalid(text),
            _ => Self::Backend(text),
        }
    }
}

impl From<PostError> for Fault {
    fn from(error: PostError) -> Self {
        let text = error.to_string();
        match error {
            PostError::Connect(error) => error.into(),
            PostError::PeerLost(_) => Self::Disconnected(text),
            PostError::RegionReleased { .. } => Self::NotFound(text),
            PostError::NotificationTooLarge { .. } => Self::Invalid(text),
            _ => Self::Backend(text),
        }
    }
}

impl From<TransferError> for Fault {
    fn from(error: TransferError) -> Self {
        let text = error.to_string();
        match error {
            // The connection was ended here: by remove_remote_agent.
            TransferError::PeerLost(lost) if lost.cause == LossCause::Disconnected => {
                Self::Cancelled(text)
            }
            TransferError::PeerLost(_) => Self::Disconnected(text),
            TransferError::Cancelled => Self::Cancelled(text),
            TransferError::Rejected(Rejection::UnknownRegion) => Self::NotFound(text),
            _ => Self::Backend(text),
        }
    }
}

impl From<RegisterError> for Fault {
    fn from(error: RegisterError) -> Self {
        let text = error.to_string();
        match error {
            RegisterError::Empty { .. } => Self::Invalid(text),
            _ => Self::Backend(text),
        }
    }
}
