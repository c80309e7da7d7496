//! Operations: prepared, posted, finished; and the notifications that follow them.

mod gate;
mod notify;
mod prepare;
mod state;
mod transfer;

pub use notify::{Notification, Notifications, Recv, RecvError};
pub use prepare::{
    Descriptor, LocalBlocks, Op, Plan, PostOptions, Prepared, RemoteBlocks, RemoteDescriptor,
};
pub use transfer::{CancelOutcome, Transfer, TransferStatus};

pub(crate) use notify::NotificationQueue;
pub(crate) use prepare::{Path, post, prepare_blocks, prepare_descriptors};
pub(crate) use state::{TransferState, Turn};
