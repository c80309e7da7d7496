//! The runtime as its users see it: over loopback, in files, and between processes.

#![expect(
    clippy::unwrap_used,
    reason = "in a test a failed expectation is a failed test"
)]

mod discovery;
mod feed;
mod processes;
mod role;
mod rpc;

use std::time::Duration;

/// Longer than anything that is expected to happen takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
