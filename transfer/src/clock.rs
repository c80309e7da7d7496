//! Deadlines as instants.

use std::time::{Duration, Instant};

/// Longer than any agent lives; also what an endless wait is cut to.
const FAR: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The instant `duration` from now; durations without end are cut to ten years.
pub(crate) fn after(duration: Duration) -> Instant {
    Instant::now() + duration.min(FAR)
}
