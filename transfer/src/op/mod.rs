//! Operations: prepared, posted, finished; and the notifications that follow them.

mod check;
mod completion;
mod gate;
mod map;
mod notify;
mod overlap;
mod prepare;
mod request;
mod state;
mod telemetry;
mod tensor;
mod transfer;
mod work;

pub use completion::{Completion, CompletionQueue};
pub use map::MappedBlocks;
pub use notify::{Notification, Notifications, Recv, RecvError};
pub use prepare::Prepared;
pub use request::{
    Descriptor, LocalBlocks, LocalTensor, Op, Plan, PostOptions, RemoteBlocks, RemoteDescriptor,
    RemoteTensor,
};
pub use telemetry::TransferTelemetry;
pub use transfer::{CancelOutcome, Transfer, TransferStatus};

pub(crate) use check::{check_range, check_set};
pub(crate) use map::map_blocks;
pub(crate) use notify::NotificationQueue;
pub(crate) use overlap::check_overlap;
pub(crate) use prepare::{
    SETS_MAX, own as own_region, pair_blocks, post, prepare_blocks, prepare_descriptors,
    prepare_sets, route,
};
pub(crate) use state::{TransferState, Turn};
pub(crate) use tensor::prepare_tensors;
pub(crate) use work::{Path, SetPair, Stripe, TensorCopy, Work};
