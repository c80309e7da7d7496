//! Waiting for another process, always with a deadline.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition of another process is looked at.
const INTERVAL: Duration = Duration::from_millis(20);

/// Calls `probe` until it gives a value. `probe` returns `Err(why not yet)` meanwhile; the last
/// reason is part of the error when `limit` passes.
///
/// # Errors
/// `limit` passed.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<T, String>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(reason) if Instant::now() >= end => {
                bail!("waited {limit:?} for {what}; last seen: {reason}")
            }
            Err(_) => pause(INTERVAL),
        }
    }
}

/// Lets `time` pass, where a fault is that something lasts.
pub fn pass(time: Duration) {
    pause(time);
}

#[expect(
    clippy::disallowed_methods,
    reason = "the state of another process, seen over HTTP or /proc, gives no event to wait for; \
              and the length of a fault is a length of time"
)]
fn pause(interval: Duration) {
    std::thread::sleep(interval);
}
