//! The verbs lane: RDMA WRITE and READ between registered memory, by libibverbs.
//!
//! An agent opens one device ([`Adapter`]) and registers its regions there ([`Key`]). A connection
//! has one reliable queue pair on each side; what they need to know of each other ([`Endpoint`])
//! travels over the control connection. The initiator does all the work ([`Link`]); the target's
//! queue pair only lets it in, and destroying that one shuts it out: no byte lands afterwards.

mod adapter;
mod link;
mod queue;

pub(crate) use adapter::{Adapter, Key};
pub(crate) use link::Link;
pub(crate) use queue::{Endpoint, QueuePair};
