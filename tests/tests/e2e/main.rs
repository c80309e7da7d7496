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
mod peers;
mod scale;
mod tiers;
mod up;
