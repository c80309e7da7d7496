//! Deadlines as instants.

use std::time::{Duration, Instant};

/// Longer than any agent lives; also what an endless wait is cut to.
const FAR: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The instant `duration` from now; durations without end are cut to ten years.
pub(crate) fn after(duration: Duration) -> Instant {
    after_instant(Instant::now(), duration)
}

/// The instant `duration` after `start`, cut like [`after`].
pub(crate) fn after_instant(start: Instant, duration: Duration) -> Instant {
    start + duration.min(FAR)
}
