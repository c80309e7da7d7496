//! Why a call failed, seen from the caller.

use std::time::Duration;

use blockplane_protocol::{ErrorKind, GenerateError};
use thiserror::Error;

/// A failed call. Responses that came before it are valid.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RpcError {
    /// No connection could be made; the handler did not run.
    #[error("cannot connect to {address}: {reason}")]
    CannotConnect {
        /// Where.
        address: String,
        /// What the attempt ended with.
        reason: String,
    },
    /// The connection broke or the peer stopped answering; the handler may have run.
    #[error("lost the connection to {address}: {reason}")]
    PeerLost {
        /// Where.
        address: String,
        /// How it was noticed.
        reason: String,
    },
    /// The call did not end in time.
    #[error("'{endpoint}' at {address} did not finish within its deadline of {limit:?}")]
    DeadlineExceeded {
        /// Where.
        address: String,
        /// Which endpoint.
        endpoint: String,
        /// The deadline that was given.
        limit: Duration,
    },
    /// A request or response message is over the limit.
    #[error("message of {bytes} bytes is over the limit of {limit} bytes")]
    MessageTooLarge {
        /// Its size as far as it was seen.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// As many calls are open on this connection as are allowed.
    #[error("{limit} calls to {address} are open, which is the limit")]
    TooManyCalls {
        /// Where.
        address: String,
        /// The limit.
        limit: usize,
    },
    /// The peer sent something that makes no sense.
    #[error("protocol violation by {address}: {reason}")]
    Protocol {
        /// Where.
        address: String,
        /// What it was.
        reason: String,
    },
    /// The handler answered with an error.
    #[error("{0}")]
    Remote(GenerateError),
}

impl RpcError {
    /// Whether the same call may succeed later or at another peer.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        match self {
            Self::CannotConnect { .. } | Self::PeerLost { .. } | Self::TooManyCalls { .. } => true,
            Self::Remote(error) => error.kind.retryable(),
            Self::DeadlineExceeded { .. }
            | Self::MessageTooLarge { .. }
            | Self::Protocol { .. } => false,
        }
    }
}

impl From<RpcError> for GenerateError {
    fn from(error: RpcError) -> Self {
        let kind = match error {
            RpcError::Remote(error) => return error,
            RpcError::CannotConnect { .. } | RpcError::PeerLost { .. } => ErrorKind::WorkerLost,
            RpcError::DeadlineExceeded { .. } => ErrorKind::DeadlineExceeded,
            RpcError::MessageTooLarge { .. } => ErrorKind::InvalidRequest,
            RpcError::TooManyCalls { .. } => ErrorKind::Overloaded,
            RpcError::Protocol { .. } => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}
