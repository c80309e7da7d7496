//! Peers that lie: false initiators and false targets against an honest agent, on raw sockets.
//!
//! What is asked of the honest one: no panic, no hang, no byte where none belongs, no more memory
//! than a limit, and the service of others. `wire` is written from the wire document and shares
//! nothing with the crate.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and sizes here are small"
)]

mod count;
mod initiators;
#[path = "../chaos/random.rs"]
mod random;
mod targets;
mod unix;
mod victim;
mod wire;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longer than anything takes on a busy machine.
const WAIT: Duration = Duration::from_secs(20);

/// Memory is counted for the whole process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
