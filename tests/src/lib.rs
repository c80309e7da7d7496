//! The harness of the whole-system tests: real processes of the `blockplane` binary, a small OpenAI
//! client, faults by signal, and assertions about what the processes say of themselves.
//!
//! * [`cluster`] starts a deployment (`blockplane up`, or its roles one by one) and takes it apart.
//! * [`process`] is one process: log, signals, exit. [`proc_table`] finds its descendants.
//! * [`client`] speaks HTTP and server-sent events, and sorts every end of a request into an
//!   [`client::Outcome`].
//! * [`health`] is the typed view of `/health`, with the pool counts that show a leak.
//! * [`fixtures`] finds the binary and the checkpoints; [`prompts`] makes repeatable prompts.
//! * [`requests`] makes request bodies; [`traffic`] sends many requests at once.
//! * [`wait`] is the only place that polls, always with a deadline.
//!
//! Nothing but tests may depend on this crate.
#![forbid(unsafe_code)]

pub mod client;
pub mod cluster;
pub mod fixtures;
pub mod health;
pub mod proc_table;
pub mod process;
pub mod prompts;
pub mod requests;
pub mod traffic;
pub mod wait;

pub use client::{Client, Outcome};
pub use cluster::{Cluster, ClusterBuilder, Role};
pub use process::Process;
