//! The frontend over loopback, with a scripted service behind it.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod chat;
mod completions;
mod disconnect;
mod errors;
mod limits;
mod page;
mod status;
mod stop;
mod support;
