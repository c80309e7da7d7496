//! Errors, one type per operation. Whether trying again can help is a method, not a guess.

use std::fmt;
use std::io;
use std::time::Duration;

use blockplane_rdma_sys::LibraryError;

use crate::config::Lane;
use crate::cuda::{CudaError, CudaUnavailable};
use crate::memory::RegionId;
use crate::peer::StoreError;
use crate::plan::LayoutError;
use crate::storage::StorageError;
use crate::window::WindowId;

/// Why an agent could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// A configuration value is out of range.
    #[error("{field} is {got}; accepted: {accepted}")]
    InvalidConfig {
        /// Field of [`AgentConfig`](crate::AgentConfig).
        field: &'static str,
        /// The value given.
        got: String,
        /// The values accepted.
        accepted: &'static str,
    },
    /// The operating system refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// The lane verbs is wanted and there is no device for it.
    #[error("lane verbs: {0}")]
    Rdma(#[from] RdmaError),
}

/// Why there is no RDMA device to use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RdmaError {
    /// libibverbs cannot be used.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// No device, or none that is up.
    #[error("no active port on device {wanted}; found: {found}")]
    NoDevice {
        /// Device that was asked for, or `any`.
        wanted: String,
        /// What is there, and why it does not do.
        found: String,
    },
    /// The device refused something.
    #[error("{device}: cannot {what}: {reason}")]
    Device {
        /// The device.
        device: String,
        /// What was tried.
        what: &'static str,
        /// The system's error.
        reason: String,
    },
}

impl RdmaError {
    pub(crate) fn device(device: &str, what: &'static str, error: &io::Error) -> Self {
        Self::Device {
            device: device.to_owned(),
            what,
            reason: error.to_string(),
        }
    }
}

/// Why memory could not be registered or allocated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// A region needs at least one byte.
    #[error("region {label:?} has no bytes")]
    Empty {
        /// Label of the region.
        label: String,
    },
    /// The label is too long.
    #[error("label of {bytes} bytes; accepted: up to 255")]
    LabelTooLong {
        /// Length given.
        bytes: usize,
    },
    /// The agent's limit of regions is reached.
    #[error("{limit} regions are registered, the limit `regions_max`")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The operating system refused the memory.
    #[error("cannot {what} for region {label:?} of {bytes} bytes: {source}")]
    Memory {
        /// What was tried.
        what: &'static str,
        /// Label of the region.
        label: String,
        /// Bytes asked for.
        bytes: usize,
        /// The system's error.
        source: io::Error,
    },
    /// The RDMA device does not take the memory.
    #[error(
        "cannot register region {label:?} of {bytes} bytes at {device}: {source}{}",
        locked_memory(*.limit, *.bytes)
    )]
    Rdma {
        /// Label of the region.
        label: String,
        /// Bytes of it.
        bytes: usize,
        /// The device.
        device: String,
        /// Bytes that this process may lock (`ulimit -l`); none where there is no limit.
        limit: Option<u64>,
        /// The system's error.
        source: io::Error,
    },
    /// There is no CUDA for a region that needs it.
    #[error("region {label:?} needs a GPU: {source}")]
    Cuda {
        /// Label of the region.
        label: String,
        /// What is missing.
        source: CudaUnavailable,
    },
    /// The device refused the memory.
    #[error("region {label:?} of {bytes} bytes: {source}")]
    Device {
        /// Label of the region.
        label: String,
        /// Bytes asked for.
        bytes: usize,
        /// The driver's error; [`CudaError::is_out_of_memory`] tells the usual one.
        source: CudaError,
    },
    /// The agent is shut down.
    #[error("the agent is shut down")]
    AgentStopped,
}

impl RegisterError {
    pub(crate) fn cuda(label: &str, source: CudaUnavailable) -> Self {
        Self::Cuda {
            label: label.to_owned(),
            source,
        }
    }
}

/// Why bytes of a region could not be read or written by hand.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The range is not in the region.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] CudaError),
}

/// Why no connection to a peer came about.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No lane worked; each one tried or skipped is listed with its reason.
    #[error("no lane to agent {peer:?}: {}", reasons(tried))]
    NoLane {
        /// Name of the peer.
        peer: String,
        /// Lane and reason.
        tried: Vec<(Lane, String)>,
    },
    /// The address answers, but it is a later life of that agent: fetch its metadata again.
    #[error("metadata of agent {peer:?} is stale: epoch {epoch:#x} is over")]
    Stale {
        /// Name of the peer.
        peer: String,
        /// Epoch in the metadata.
        epoch: u64,
    },
    /// The handle names a peer that is not remembered any more.
    #[error("agent {peer:?} was forgotten; accepted: remembered peers")]
    Unknown {
        /// Name of the peer.
        peer: String,
    },
    /// The limit of peers is reached.
    #[error("{limit} peers are connected or remembered, the limit `peers_max`")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// This agent is shut down.
    #[error("the agent is shut down")]
    AgentStopped,
}

impl ConnectError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        matches!(self, Self::NoLane { .. } | Self::TooMany { .. })
    }
}

fn reasons(tried: &[(Lane, String)]) -> String {
    if tried.is_empty() {
        return "both sides have no lane in common".to_owned();
    }
    let mut text = String::new();
    for (i, (lane, reason)) in tried.iter().enumerate() {
        if i > 0 {
            text.push_str("; ");
        }
        text.push_str(&lane.to_string());
        text.push_str(": ");
        text.push_str(reason);
    }
    text
}

/// Which side of an operation an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// This agent's memory.
    Local,
    /// The peer's memory.
    Remote,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Remote => "remote",
        })
    }
}

/// Why an operation could not be prepared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// Nothing to move.
    #[error("the operation names no blocks")]
    Empty,
    /// The registration belongs to another agent.
    #[error("region {region} is not registered with this agent")]
    ForeignRegistration {
        /// The region.
        region: RegionId,
    },
    /// The peer handle belongs to another agent.
    #[error("the connection to {peer:?} belongs to another agent")]
    ForeignPeer {
        /// Name of the peer.
        peer: String,
    },
    /// The peer is connected when it is first used, and that failed.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A device is needed and cannot be used.
    #[error(transparent)]
    Cuda(#[from] CudaUnavailable),
    /// A device is needed and refuses.
    #[error("cuda:{device}: {error}")]
    Device {
        /// The device.
        device: u32,
        /// What the driver says.
        error: CudaError,
    },
    /// The kernels for a device cannot be had.
    #[error("no kernels for cuda:{device}: {reason}")]
    Kernels {
        /// The device.
        device: u32,
        /// What is missing, and where it was looked for.
        reason: String,
    },
    /// One operation names memory of several devices on one side, or of a device and of the host.
    #[error(
        "the {side} blocks lie on more than one device, or on a device and the host; accepted: one of them in one operation"
    )]
    MixedMemory {
        /// Which side.
        side: Side,
    },
    /// A device cannot reach the memory of the other side.
    #[error(
        "no device reaches region {region}: {reason}; accepted: device memory and arenas of this host"
    )]
    Unreachable {
        /// The region.
        region: RegionId,
        /// Why.
        reason: String,
    },
    /// Host memory was not pinned in time.
    #[error("the first {bytes} bytes of the {side} region were not pinned within {timeout:?}")]
    Unpinned {
        /// Which side.
        side: Side,
        /// Bytes that the operation needs.
        bytes: u64,
        /// `AgentConfig::connect_timeout`.
        timeout: Duration,
    },
    /// An object that goes to or comes from device memory is larger than a slot of staging memory, and
    /// objects move whole.
    #[error(
        "an object of {bytes} bytes; device memory takes objects of up to {slot_bytes} (`cuda.staging.slot_bytes`)"
    )]
    LargerThanSlot {
        /// Bytes of the object.
        bytes: u64,
        /// Bytes of a slot.
        slot_bytes: u64,
    },
    /// Staging memory cannot be had.
    #[error("no {bytes} bytes of staging memory (`cuda.staging`): {reason}")]
    Staging {
        /// Its size.
        bytes: u64,
        /// What is missing.
        reason: String,
    },
    /// The peer has no such region, or has released it.
    #[error("agent {peer:?} has no region {region}")]
    UnknownRegion {
        /// Name of the peer.
        peer: String,
        /// The region.
        region: RegionId,
    },
    /// The region is not for peers.
    #[error("region {region} of agent {peer:?} is closed to peers")]
    AccessDenied {
        /// Name of the peer.
        peer: String,
        /// The region.
        region: RegionId,
    },
    /// The region is accessible through a window only and none was named.
    #[error("region {region} of agent {peer:?} needs a window")]
    WindowRequired {
        /// Name of the peer.
        peer: String,
        /// The region.
        region: RegionId,
    },
    /// The peer has no such window, or has closed it.
    #[error("window {window} of agent {peer:?} is closed or unknown")]
    WindowClosed {
        /// Name of the peer.
        peer: String,
        /// The window.
        window: WindowId,
    },
    /// The operation reaches outside of the window, or does what the window does not allow.
    #[error("outside window {window}: {reason}")]
    OutsideWindow {
        /// The window.
        window: WindowId,
        /// What reaches outside.
        reason: String,
    },
    /// A layout, id or layer is invalid for its region.
    #[error("{side} blocks: {source}")]
    Layout {
        /// Which side.
        side: Side,
        /// What is wrong.
        source: LayoutError,
    },
    /// Both sides must name equally many blocks, layers and bytes.
    #[error("local and remote differ in {what}: {local} and {remote}")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// Local value.
        local: u64,
        /// Remote value.
        remote: u64,
    },
    /// Source and destination share bytes, or the destination names bytes twice.
    #[error("the destination is named twice or overlaps the source at byte {offset}")]
    Overlap {
        /// Offset in the destination region.
        offset: u64,
    },
    /// More blocks, sets or bytes than one operation takes.
    #[error("{what} is {got}; one operation takes up to {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The value.
        got: u64,
        /// The limit.
        limit: u64,
    },
    /// The peer is lost.
    #[error(transparent)]
    PeerLost(#[from] PeerLost),
    /// The peer did not answer a question about its region or window in time.
    #[error("agent {peer:?} did not answer within {timeout:?}")]
    TimedOut {
        /// Name of the peer.
        peer: String,
        /// `connect_timeout`.
        timeout: Duration,
    },
    /// The store was opened by another agent.
    #[error("store {store:?} was opened by another agent")]
    ForeignStore {
        /// Its name.
        store: String,
    },
    /// A key of an object is invalid or named twice by a write.
    #[error("key {key:?}: {reason}")]
    InvalidKey {
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A write names a range of objects.
    #[error("a write names a range of objects; accepted: whole objects")]
    RangeOfWrite,
    /// The store is open for reading only.
    #[error("store {store:?} is open for reading only")]
    ReadOnlyStore {
        /// Its name.
        store: String,
    },
    /// The agent is shut down.
    #[error("the agent is shut down")]
    AgentStopped,
}

impl PrepareError {
    /// Whether the same call may succeed after reconnecting or later.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        match self {
            Self::PeerLost(_) | Self::TimedOut { .. } => true,
            Self::Connect(error) => error.retryable(),
            _ => false,
        }
    }
}

/// Why blocks of a peer could not be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The memory is not mapped in this process; READ copies it.
    #[error("region {region} cannot be looked at in place over {lane}: {reason}")]
    NotMapped {
        /// The region.
        region: RegionId,
        /// The lane of the connection.
        lane: Lane,
        /// Why it is not mapped.
        reason: String,
    },
    /// The blocks do not fit, or are not accessible.
    #[error(transparent)]
    Blocks(#[from] PrepareError),
}

/// Why an operation could not be posted; nothing was sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PostError {
    /// The peer is connected when it is first used, and that failed.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The peer is lost.
    #[error(transparent)]
    PeerLost(#[from] PeerLost),
    /// The peer has closed the window.
    #[error("window {window} is closed")]
    WindowClosed {
        /// The window.
        window: WindowId,
    },
    /// The peer has released a region that the operation names.
    #[error("region {region} was released by the peer")]
    RegionReleased {
        /// The region.
        region: RegionId,
    },
    /// Too many operations are in flight to this peer.
    #[error("{limit} operations are in flight to this peer, the limit `posts_max`")]
    TooManyInFlight {
        /// The limit.
        limit: usize,
    },
    /// The completion queue is full: take completions out first.
    #[error(
        "{limit} transfers are in flight or waiting to be taken out, the capacity of the completion queue"
    )]
    CompletionQueueFull {
        /// The capacity.
        limit: usize,
    },
    /// The notification is too large.
    #[error("notification of {bytes} bytes; accepted: up to {limit} (`notification_bytes_max`)")]
    NotificationTooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// An event or a budget of multiprocessors for an operation that no device does.
    #[error(
        "{option} makes sense for operations with device memory only; this one is on lane {lane}"
    )]
    NotOnDevice {
        /// The option.
        option: &'static str,
        /// The lane of the operation.
        lane: Lane,
    },
    /// The peer handle belongs to another agent.
    #[error("the connection to {peer:?} belongs to another agent")]
    ForeignPeer {
        /// Name of the peer.
        peer: String,
    },
    /// The agent is shut down.
    #[error("the agent is shut down")]
    AgentStopped,
}

impl PostError {
    /// Whether the same call may succeed later (for a lost peer: after reconnecting).
    #[must_use]
    pub const fn retryable(&self) -> bool {
        match self {
            Self::PeerLost(_) | Self::TooManyInFlight { .. } | Self::CompletionQueueFull { .. } => {
                true
            }
            Self::Connect(error) => error.retryable(),
            _ => false,
        }
    }
}

/// A peer is gone, and how it was noticed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("agent {peer:?} (epoch {epoch:#x}) is lost: {cause}")]
pub struct PeerLost {
    /// Name of the peer.
    pub peer: String,
    /// Epoch of the peer.
    pub epoch: u64,
    /// How it was noticed.
    pub cause: LossCause,
}

/// What to do where memory cannot be locked.
fn locked_memory(limit: Option<u64>, bytes: usize) -> String {
    limit.map_or_else(String::new, |limit| {
        format!(
            "; registered memory is locked, this process may lock {limit} bytes (ulimit -l), and this \
             region needs {bytes} beside what is registered already"
        )
    })
}

/// How the loss of a peer was noticed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LossCause {
    /// The peer closed the connection.
    #[error("it closed the connection")]
    Closed,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// Its process ended.
    #[error("its process ended")]
    ProcessExited,
    /// Nothing was heard from it for `peer_loss_timeout`.
    #[error("nothing was heard from it for {0:?}")]
    Silent(Duration),
    /// A later life of the agent took its place.
    #[error("epoch {0:#x} took its place")]
    Replaced(u64),
    /// RDMA to it failed: the transport gave up, or the peer refused.
    #[error("RDMA over {device}: {reason}")]
    Rdma {
        /// Device of this agent.
        device: String,
        /// What the device says.
        reason: String,
    },
    /// It sent something that the protocol does not allow.
    #[error("it broke the protocol: {0}")]
    Protocol(String),
    /// This agent disconnected or shut down.
    #[error("this agent disconnected")]
    Disconnected,
    /// An injected fault.
    #[error("injected fault")]
    Injected,
}

/// Why a transfer did not succeed. Once it is reported, the transfer neither reads nor writes
/// local memory any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The peer is lost.
    #[error(transparent)]
    PeerLost(#[from] PeerLost),
    /// The deadline given to `post` passed.
    #[error("not done within {deadline:?}")]
    DeadlineExceeded {
        /// The deadline given.
        deadline: Duration,
    },
    /// Cancelled, or its handle was dropped.
    #[error("cancelled")]
    Cancelled,
    /// The peer closed the window while bytes were moving.
    #[error("window {window} was closed")]
    WindowClosed {
        /// The window.
        window: WindowId,
    },
    /// The peer refused.
    #[error("the peer refused: {0}")]
    Rejected(Rejection),
    /// A file or an object store failed. Bytes of the operation may have moved.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A device failed. Bytes of the operation may have moved.
    #[error(transparent)]
    Device(#[from] DeviceFailure),
    /// A part of an operation could not go through staging memory, for a reason that was not there
    /// when the operation was prepared. Bytes of the operation may have moved.
    #[error("a part cannot be staged: {reason}")]
    Staging {
        /// What stands in the way.
        reason: String,
    },
    /// The kernel does not copy into or out of the peer's memory any more.
    #[error("the memory of the peer cannot be accessed: {reason}")]
    Inaccessible {
        /// The system's error.
        reason: String,
    },
    /// A fault that was asked for (`AgentConfig::faults`). Bytes of the operation may have moved.
    #[error("injected fault")]
    Injected,
    /// `wait` gave up; the transfer itself goes on.
    #[error("still in flight after waiting {waited:?}")]
    StillInFlight {
        /// How long was waited.
        waited: Duration,
    },
}

impl TransferError {
    /// Whether posting again may succeed (for a lost peer: after reconnecting).
    #[must_use]
    pub const fn retryable(&self) -> bool {
        match self {
            Self::PeerLost(_) | Self::DeadlineExceeded { .. } | Self::StillInFlight { .. } => true,
            Self::Rejected(rejection) => rejection.retryable(),
            Self::Storage(error) => error.retryable(),
            Self::Cancelled
            | Self::WindowClosed { .. }
            | Self::Inaccessible { .. }
            | Self::Device(_)
            | Self::Staging { .. }
            | Self::Injected => false,
        }
    }
}

/// A device failed under a transfer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cuda:{device} failed: {error}{}", if *poisoned { "; the device is lost for this process, start it again" } else { "" })]
#[non_exhaustive]
pub struct DeviceFailure {
    /// The device.
    pub device: u32,
    /// What the driver says.
    pub error: CudaError,
    /// The context of the device is beyond use: everything on the device fails until the process starts
    /// again.
    pub poisoned: bool,
}

/// What a peer refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// Its queue of notifications is full; the bytes of the transfer are in place.
    #[error("its notification queue is full")]
    NotificationQueueFull,
    /// The notification is larger than it accepts; the bytes of the transfer are in place.
    #[error("the notification is larger than it accepts")]
    NotificationTooLarge,
    /// It has no such region, or has released it.
    #[error("it has no such region")]
    UnknownRegion,
    /// The region is closed to peers or needs a window.
    #[error("the region is not accessible that way")]
    AccessDenied,
    /// Blocks, layers or layout do not fit the region or the window.
    #[error("the blocks do not fit its region or window")]
    OutOfBounds,
    /// Too many operations wait at its side.
    #[error("it has too many operations waiting")]
    Busy,
    /// It is shutting down.
    #[error("it is shutting down")]
    Stopping,
}

impl Rejection {
    /// Whether trying again can help.
    #[must_use]
    pub const fn retryable(self) -> bool {
        matches!(self, Self::NotificationQueueFull | Self::Busy)
    }
}

/// Why a window could not be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// The registration belongs to another agent.
    #[error("region {region} is not registered with this agent")]
    ForeignRegistration {
        /// The region.
        region: RegionId,
    },
    /// The region allows nothing to peers.
    #[error("region {region} is closed to peers")]
    AccessDenied {
        /// The region.
        region: RegionId,
    },
    /// The scope does not fit the region.
    #[error("window scope: {0}")]
    Layout(#[from] LayoutError),
    /// The limit of windows is reached.
    #[error("{limit} windows are open, the limit `windows_max`")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The agent is shut down.
    #[error("the agent is shut down")]
    AgentStopped,
}

/// Why metadata cannot be read, made or brought up to date.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// Shorter than its own lengths say.
    #[error("truncated at byte {at}")]
    Truncated {
        /// Where the bytes ended.
        at: usize,
    },
    /// Does not begin like metadata.
    #[error("not agent metadata")]
    Magic,
    /// A version that this build does not read.
    #[error("version {got}; this build reads {accepted}")]
    Version {
        /// Version found.
        got: u16,
        /// Version accepted.
        accepted: u16,
    },
    /// Damaged.
    #[error("checksum mismatch")]
    Checksum,
    /// A field is out of its bounds.
    #[error("field {field} is invalid")]
    Field {
        /// Name of the field.
        field: &'static str,
    },
    /// A delta that belongs to another revision.
    #[error("a delta to revision {got}; accepted: complete metadata, or a delta to {accepted}")]
    Base {
        /// Revision that the delta belongs to.
        got: u64,
        /// Revision that is there.
        accepted: u64,
    },
    /// Metadata of another agent, or of another life of it.
    #[error("of another life or agent: {got:?}; accepted: {accepted:?} in the same life")]
    OtherAgent {
        /// Name found.
        got: String,
        /// Name wanted.
        accepted: String,
    },
    /// The registration belongs to another agent, or peers may not use it.
    #[error("region {region} is not of this agent, or closed to peers")]
    NotOpen {
        /// The region.
        region: RegionId,
    },
}

/// Why the metadata of an agent could not be had from the agent itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// No connection.
    #[error("cannot reach {address}: {reason}")]
    Unreachable {
        /// Where an agent was expected.
        address: String,
        /// Why not.
        reason: String,
    },
    /// The agent does not give its metadata to everybody, or is shutting down.
    #[error("the agent at {address} refuses (`serve_metadata`)")]
    Refused {
        /// Where it listens.
        address: String,
    },
    /// The connection broke, or the answer did not come in time.
    #[error("no answer from {address}: {source}")]
    Io {
        /// Where it listens.
        address: String,
        /// The system's error.
        source: io::Error,
    },
    /// What answers is not an agent of this version.
    #[error("what answers at {address} is not a blockplane agent of this version")]
    Malformed {
        /// Where it listens.
        address: String,
    },
    /// The answer is not metadata.
    #[error("{address}: {source}")]
    Metadata {
        /// Where it listens.
        address: String,
        /// What is wrong.
        source: MetadataError,
    },
    /// This agent is shut down.
    #[error("the agent is shut down")]
    AgentStopped,
}

/// Why no connection came about to an agent that was looked up by its name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LookupError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody has published itself under that name.
    #[error("agent {name:?} is not in the store")]
    NotFound {
        /// The name.
        name: String,
    },
    /// What is in the store is not metadata of that agent.
    #[error("entry of agent {name:?}: {source}")]
    Metadata {
        /// The name.
        name: String,
        /// What is wrong.
        source: MetadataError,
    },
    /// The agent could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// The agent is shut down and nothing is left to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the agent is shut down")]
pub struct AgentStopped;
