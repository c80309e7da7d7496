//! Whole deployments of real processes, from the command line to streamed tokens.

mod bad_checkpoint;
mod bad_request;
mod bench;
mod by_hand;
mod doctor;
mod equality;
mod launch;
mod limits;
mod modes;
mod objects;
mod peers;
mod scale;
mod store;
mod tiers;
mod tiny;
mod up;
mod vllm;

/// What the stand-in for S3 asks of the crate that it is part of.
mod support {
    /// A connection that is kept waiting is let go after this.
    pub(crate) const WAIT: std::time::Duration = std::time::Duration::from_secs(20);
}
