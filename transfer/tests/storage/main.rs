//! Files and object stores behind an agent, with every engine.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a failed unwrap is a failed test, sizes here are small, and skipped tests say so"
)]

mod durable;
mod faults;
mod files;
mod model;
#[cfg(feature = "object")]
mod objects;
mod refused;
#[cfg(feature = "object")]
mod server;
mod support;
