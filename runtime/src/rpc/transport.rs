//! HTTP/2 settings that both ends share.

use std::time::Duration;

/// HTTP/2 window of a connection and of its one stream. It can be generous because both ends always
/// read: what bounds memory are the credits of the calls and the size of the outboxes.
pub(crate) const HTTP2_WINDOW_BYTES: u32 = 4 << 20;

/// Largest HTTP/2 frame: one fragment and what surrounds it.
pub(crate) const HTTP2_FRAME_BYTES: u32 = 256 << 10;

/// When to ping, and how long to wait for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PingTimes {
    pub(crate) interval: Duration,
    pub(crate) timeout: Duration,
}

impl PingTimes {
    /// Times that notice a silent peer within `bound`. Most of the bound goes to the wait, so that a
    /// peer on a busy machine is not given up too early.
    pub(crate) fn within(bound: Duration) -> Self {
        let interval = bound / 5;
        Self {
            interval,
            timeout: bound.saturating_sub(interval),
        }
    }
}
