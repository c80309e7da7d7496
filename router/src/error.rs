//! Why no worker was chosen.

use std::time::Duration;

use blockplane_protocol::{ErrorKind, GenerateError};
use thiserror::Error;

/// Why a request cannot be routed now.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RouteError {
    /// No worker of the role is registered.
    #[error("no worker is registered that can generate tokens")]
    NoWorkers,
    /// Workers are there, but the request's own constraints leave none.
    #[error("none of {ranks} ranks is eligible: {excluded} excluded, {not_allowed} not allowed")]
    NoneEligible {
        /// Ranks registered.
        ranks: usize,
        /// Ranks the request excluded.
        excluded: usize,
        /// Ranks outside of the request's allow-list.
        not_allowed: usize,
    },
    /// As many requests as allowed are in flight.
    #[error("{in_flight} requests are in flight, the limit; retry in {retry_after:?}")]
    TooManyRequests {
        /// Requests in flight.
        in_flight: usize,
        /// When a place is likely to be free.
        retry_after: Duration,
    },
    /// Every eligible rank is busy.
    #[error("all {busy} eligible ranks are busy; retry in {retry_after:?}")]
    AllBusy {
        /// Ranks over a busy threshold.
        busy: usize,
        /// When a rank is likely to have room.
        retry_after: Duration,
    },
}

impl RouteError {
    /// Whether the same request may be routed later.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        match self {
            Self::NoWorkers | Self::TooManyRequests { .. } | Self::AllBusy { .. } => true,
            Self::NoneEligible { .. } => false,
        }
    }

    /// When to try again, where that can be told.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::TooManyRequests { retry_after, .. } | Self::AllBusy { retry_after, .. } => {
                Some(*retry_after)
            }
            Self::NoWorkers | Self::NoneEligible { .. } => None,
        }
    }
}

impl From<RouteError> for GenerateError {
    fn from(error: RouteError) -> Self {
        let kind = match error {
            RouteError::NoWorkers | RouteError::NoneEligible { .. } => ErrorKind::Unavailable,
            RouteError::TooManyRequests { .. } | RouteError::AllBusy { .. } => {
                ErrorKind::Overloaded
            }
        };
        Self::new(kind, error.to_string())
    }
}
