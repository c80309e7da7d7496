//! The data plane of blockplane: moves blocks of memory between agents.

mod agent;
mod backend;
mod config;
mod error;
mod memory;
mod op;
mod peer;
mod plan;
mod stats;
mod sync;
mod window;
mod wire;

pub use agent::{Agent, LaneInfo, Peer};
pub use config::{AgentConfig, ArenaConfig, FaultConfig, HugePages, Lane, RemoteAccess};
pub use error::{
    AgentError, AgentStopped, ConnectError, LossCause, MetadataError, PeerLost, PostError,
    PrepareError, RegisterError, Rejection, Side, TransferError, WindowError,
};
pub use memory::{HostMemory, HugePageUse, RegionId, RegionKind, Registration};
pub use op::{
    CancelOutcome, Descriptor, LocalBlocks, Notification, Notifications, Op, Plan, PostOptions,
    Prepared, Recv, RecvError, RemoteBlocks, RemoteDescriptor, Transfer, TransferStatus,
};
pub use peer::{Metadata, RegionInfo};
pub use plan::{BlockLayout, LayoutError};
pub use stats::AgentStats;
pub use window::{Closed, Window, WindowAccess, WindowBusy, WindowId, WindowScope};
