//! How a process starts to serve and how it stops: readiness, tracked tasks, shutdown in phases.
//!
//! Signals are the launcher's business; it calls [`ShutdownGate::begin`].

mod readiness;
mod shutdown;
mod tasks;

pub use readiness::{Condition, Readiness, ReadinessState};
pub use shutdown::{Phase, ShutdownGate, ShutdownPlan, ShutdownReport, WorkGuard};
pub use tasks::{TaskFailure, Tasks};
