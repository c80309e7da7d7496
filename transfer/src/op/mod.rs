//! Operations: prepared, posted, finished; and the notifications that follow them.

mod check;
mod completion;
mod gate;
mod notify;
mod overlap;
mod prepare;
mod request;
mod state;
mod telemetry;
mod transfer;
mod work;

pub use completion::{Completion, CompletionQueue};
pub use notify::{Notification, Notifications, Recv, RecvError};
pub use prepare::Prepared;
pub use request::{Descriptor, LocalBlocks, Op, Plan, PostOptions, RemoteBlocks, RemoteDescriptor};
pub use telemetry::TransferTelemetry;
pub use transfer::{CancelOutcome, Transfer, TransferStatus};

pub(crate) use notify::NotificationQueue;
pub(crate) use prepare::{post, prepare_blocks, prepare_descriptors};
pub(crate) use state::{TransferState, Turn};
pub(crate) use work::Path;
