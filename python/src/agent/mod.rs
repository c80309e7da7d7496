//! The agent of `blockplane-transfer` for the Python module `blockplane.agent`, which documents it.

mod core;
mod fault;
mod transfer;

pub(crate) use core::{AgentCore, FileCore, PeerCore, RegionCore, WindowCore};
pub(crate) use fault::CoreFault;
pub(crate) use transfer::TransferCore;
