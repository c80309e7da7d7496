//! Real processes killed, stopped and cut off while requests run.
//!
//! What holds each time: every request ends within its deadline, in its tokens or in an error that
//! its client can read; no block is leaked; who was not hit goes on serving.

mod client_gone;
mod frontend;
mod scene;
mod vllm;
mod worker_killed;
mod worker_stopped;
