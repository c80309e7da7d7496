//! The agent: registers memory, knows peers, posts operations.

mod copy;
mod core;
mod directory;
mod peer;
mod remote;
mod session;
mod timers;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::config::{AgentConfig, ArenaConfig, ConnectOptions, DeviceArenaConfig, RemoteAccess};
use crate::cuda::DeviceMemory;
use crate::error::{
    AgentError, ConnectError, MapError, PostError, PrepareError, RegisterError, WindowError,
};
use crate::memory::{HostMemory, Registration};
use crate::op::{
    CompletionQueue, Descriptor, LocalBlocks, LocalTensor, MappedBlocks, Notifications, Op,
    PostOptions, Prepared, RemoteBlocks, RemoteDescriptor, RemoteTensor, Transfer,
};
use crate::peer::Metadata;
use crate::stats::AgentStats;
use crate::storage::{FileBlocks, FileConfig, FileRanges, FileStore, OpenError};
#[cfg(feature = "object")]
use crate::storage::{ObjectBlocks, ObjectConfig, ObjectStore};
use crate::window::{Window, WindowAccess, WindowScope};

pub use peer::{LaneInfo, Peer};

pub(crate) use copy::CopyPool;
pub(crate) use core::{Core, find_in_process, random_u64};
pub(crate) use peer::NoSession;
pub(crate) use remote::{
    DeviceOfPeer, ForeignMemory, MappedMemory, PeerDeviceMemory, RdmaMemory, RemoteMemory,
    RemoteRegion,
};
pub(crate) use session::{LaneChoice, Session, next_session_key};
pub(crate) use timers::{TimerKey, Timers};

/// One participant of the block plane. Clones share it; dropping the last one ends its threads,
/// fails what is in flight with [`PeerLost`](crate::PeerLost) and closes its connections.
#[derive(Clone)]
pub struct Agent {
    handle: Arc<Handle>,
}

struct Handle {
    core: Arc<Core>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.stop();
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("name", &self.name())
            .field("epoch", &self.epoch())
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// Starts an agent: its listeners and its threads, all parked until there is work.
    ///
    /// # Errors
    /// A configuration value is out of range, or a listener or thread cannot be had.
    pub fn new(config: AgentConfig) -> Result<Self, AgentError> {
        Ok(Self {
            handle: Arc::new(Handle {
                core: Core::start(config)?,
            }),
        })
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.handle.core
    }

    /// Name under which peers know this agent.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.core().name
    }

    /// This life of the agent: a random number that no other life of it shares.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.core().epoch
    }

    /// Allocates an arena: zeroed memory that peers on this host can map.
    ///
    /// # Errors
    /// The kernel refuses the memory, or a limit is reached.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "a configuration is written in the call"
    )]
    pub fn allocate(&self, config: ArenaConfig) -> Result<Registration, RegisterError> {
        self.core().allocate(&config)
    }

    /// Allocates an arena of device memory, filled with zeros: other devices of this process and peers
    /// on this host reach it at the speed of the link between devices. The first region on a device
    /// opens the device: its context takes memory there until the process ends, unless
    /// something else in the process has one already.
    ///
    /// # Errors
    /// There is no CUDA or no such device, the device has no memory left, or a limit is reached.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "a configuration is written in the call"
    )]
    pub fn allocate_device(
        &self,
        config: DeviceArenaConfig,
    ) -> Result<Registration, RegisterError> {
        self.core().allocate_device(&config)
    }

    /// Registers device memory that somebody else allocated, such as a tensor. Peers on this host open it
    /// by a handle of the driver, which it has if it was allocated by `cuMemAlloc` or `cudaMalloc`.
    ///
    /// # Errors
    /// There is no CUDA or no such device, the memory is not what `memory` says, or a limit is reached.
    pub fn register_device(
        &self,
        memory: DeviceMemory,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        self.core().register_device(memory, access)
    }

    /// Opens a device and gets its kernels ready, which are compiled when no compiled ones are kept: one
    /// or two seconds that otherwise the first transfer takes.
    ///
    /// # Errors
    /// There is no CUDA or no such device, or the kernels cannot be compiled.
    pub fn warm_device(&self, device: u32) -> Result<(), PrepareError> {
        self.core().warm_device(device)
    }

    /// Registers memory of this process. Peers reach it through a socket, also on this host:
    /// memory that peers are to reach at the speed of memory comes from [`Agent::allocate`].
    ///
    /// # Errors
    /// The memory is empty, or a limit is reached.
    pub fn register(
        &self,
        memory: impl Into<HostMemory>,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        self.core().register(memory.into(), access)
    }

    /// Connects to a peer over the best lane that works. Idempotent while the connection lives; a
    /// new epoch of a known name replaces the old one, whose operations fail
    /// with [`PeerLost`](crate::PeerLost).
    ///
    /// # Errors
    /// No lane works within `timeout`, or the metadata is of an earlier life of the peer.
    pub fn connect(&self, metadata: &Metadata, timeout: Duration) -> Result<Peer, ConnectError> {
        self.connect_with(metadata, &ConnectOptions::within(timeout))
    }

    /// [`Agent::connect`] with lanes for this connection alone. A living connection over a lane
    /// that `options` leave out is replaced.
    ///
    /// # Errors
    /// As for [`Agent::connect`].
    pub fn connect_with(
        &self,
        metadata: &Metadata,
        options: &ConnectOptions,
    ) -> Result<Peer, ConnectError> {
        let session = self.core().connect(metadata, options)?;
        Ok(Peer::connected(self.core(), session))
    }

    /// Remembers how to reach a peer and returns a handle that connects when it is first used: by
    /// the first prepare or notify, which then may take as long as `options` allow. After the loss
    /// of the peer the next use connects again. New metadata of a remembered name takes the place
    /// of the old.
    ///
    /// # Errors
    /// `peers_max` peers are remembered.
    pub fn remember(
        &self,
        metadata: &Metadata,
        options: ConnectOptions,
    ) -> Result<Peer, ConnectError> {
        self.core().remember(metadata, options)
    }

    /// Forgets a remembered peer; its connection stays. False when it was not remembered.
    pub fn forget(&self, name: &str) -> bool {
        self.core().book.lock().remove(name).is_some()
    }

    /// A handle of a remembered peer, or of the connection with that name.
    #[must_use]
    pub fn peer(&self, name: &str) -> Option<Peer> {
        self.core().peer(name)
    }

    /// All peers: remembered ones and connections, each name once, sorted by name. A connection
    /// that was lost is listed until it is replaced or [disconnected](Peer::disconnect).
    #[must_use]
    pub fn peers(&self) -> Vec<Peer> {
        self.core().peers()
    }

    /// Checks and plans an operation on block sets. Regions and windows that this connection has
    /// not met yet are asked for, which waits for the peer once, at most `connect_timeout`.
    ///
    /// # Errors
    /// Says which side and what does not fit.
    pub fn prepare(
        &self,
        op: Op,
        local: LocalBlocks<'_>,
        remote: RemoteBlocks<'_>,
    ) -> Result<Prepared, PrepareError> {
        crate::op::prepare_blocks(self.core(), op, local, remote)
    }

    /// Checks and plans several pairs of block sets as one operation, such as the caches of all layers
    /// of a model that are regions of their own. All have the same peer and the same window. A set costs
    /// what it would cost alone; on a device all of them are one launch.
    ///
    /// # Errors
    /// Says which side and what does not fit.
    pub fn prepare_sets<'a>(
        &self,
        op: Op,
        sets: impl IntoIterator<Item = (LocalBlocks<'a>, RemoteBlocks<'a>)>,
    ) -> Result<Prepared, PrepareError> {
        crate::op::prepare_sets(self.core(), op, sets)
    }

    /// Checks and plans an operation on parts of the blocks of two KV caches that may be arranged
    /// differently: layers or blocks first, tokens or heads first, keys and values apart or together,
    /// other heads on each side. The bytes are rearranged while they are moved, on every lane; they
    /// are not converted.
    ///
    /// The i-th id, layer, plane, token and head of one side pair with the i-th of the other, so
    /// both sides name equally many. One exception: blocks of `n` times as many tokens. When both
    /// sides name all tokens of their blocks, `n` blocks of the finer side in a row pair with one
    /// of the coarser side, the last one of which may stay partly filled.
    ///
    /// The crate documentation has an example.
    ///
    /// # Errors
    /// Says which side, which axis, and what does not fit.
    pub fn prepare_tensors(
        &self,
        op: Op,
        local: LocalTensor<'_>,
        remote: RemoteTensor<'_>,
    ) -> Result<Prepared, PrepareError> {
        crate::op::prepare_tensors(self.core(), op, local, remote)
    }

    /// Checks and plans an operation on plain descriptors; the i-th local one pairs with the i-th
    /// remote one. Neighbours are merged and equally long ones compressed into block sets.
    ///
    /// # Errors
    /// Says which side and what does not fit.
    pub fn prepare_descriptors(
        &self,
        op: Op,
        local: &[Descriptor<'_>],
        peer: &Peer,
        remote: &[RemoteDescriptor],
    ) -> Result<Prepared, PrepareError> {
        crate::op::prepare_descriptors(self.core(), op, local, peer, remote)
    }

    /// Opens a file. Blocks move between it and this agent's memory with
    /// [`Agent::prepare_file`]. The first one starts what moves them: an io_uring thread, or a few
    /// ordinary ones where io_uring is forbidden.
    ///
    /// # Errors
    /// The file system refuses, or the configuration makes no sense.
    pub fn open_file(&self, config: FileConfig) -> Result<FileStore, OpenError> {
        FileStore::open(self.core(), config)
    }

    /// Checks and plans an operation between memory and a file. A write moves local blocks into the
    /// file, a read the other way. A notification bound to it goes to this agent itself.
    ///
    /// # Errors
    /// Says which side and what does not fit.
    pub fn prepare_file(
        &self,
        op: Op,
        local: LocalBlocks<'_>,
        blocks: FileBlocks<'_>,
    ) -> Result<Prepared, PrepareError> {
        crate::storage::prepare_file_blocks(self.core(), op, local, blocks)
    }

    /// The same for plain descriptors: the i-th one pairs with the i-th offset in the file.
    ///
    /// # Errors
    /// Says which side and what does not fit.
    pub fn prepare_file_descriptors(
        &self,
        op: Op,
        local: &[Descriptor<'_>],
        ranges: FileRanges<'_>,
    ) -> Result<Prepared, PrepareError> {
        crate::storage::prepare_file_descriptors(self.core(), op, local, ranges)
    }

    /// Blocks of a peer where they lie, without a copy: possible where the peer's arena is mapped
    /// here (loopback and shm).
    ///
    /// # Errors
    /// The memory is not mapped here, or the blocks do not fit or are not accessible for reading.
    pub fn map(&self, remote: RemoteBlocks<'_>) -> Result<MappedBlocks, MapError> {
        crate::op::map_blocks(self.core(), remote)
    }

    /// Opens an object store. Blocks move between it and this agent's memory with
    /// [`Agent::prepare_objects`]. The first one starts a thread with a small runtime.
    ///
    /// # Errors
    /// The configuration makes no sense, or a folder cannot be made. Stores behind a network are
    /// not asked yet.
    #[cfg(feature = "object")]
    pub fn open_objects(&self, config: &ObjectConfig) -> Result<ObjectStore, OpenError> {
        ObjectStore::open(self.core(), config)
    }

    /// Checks and plans an operation between memory and objects: the i-th local block pairs with
    /// the i-th key. A notification bound to it goes to this agent itself.
    ///
    /// A write that is called off, or fails, leaves each object as it was or whole. One that was
    /// called off may still appear if its request had reached a store behind a network.
    ///
    /// # Errors
    /// Says which side and what does not fit.
    #[cfg(feature = "object")]
    pub fn prepare_objects(
        &self,
        op: Op,
        local: LocalBlocks<'_>,
        blocks: ObjectBlocks<'_>,
    ) -> Result<Prepared, PrepareError> {
        crate::storage::prepare_objects(self.core(), op, local, blocks)
    }

    /// Sends a notification on its own. It keeps its place among the notifications that are bound
    /// to transfers to the same peer: first posted, first delivered.
    ///
    /// # Errors
    /// Nothing was sent; the error says why.
    pub fn notify(
        &self,
        peer: &Peer,
        payload: impl Into<Bytes>,
        deadline: Duration,
    ) -> Result<Transfer, PostError> {
        self.notify_with(peer, payload, PostOptions::within(deadline))
    }

    /// [`Agent::notify`] with more to say than a deadline. The payload takes the place of the
    /// notification in `options`.
    ///
    /// # Errors
    /// Nothing was sent; the error says why.
    pub fn notify_with(
        &self,
        peer: &Peer,
        payload: impl Into<Bytes>,
        options: PostOptions,
    ) -> Result<Transfer, PostError> {
        let session = self
            .core()
            .session_of(peer)
            .map_err(|trouble| match trouble {
                NoSession::Foreign(peer) => PostError::ForeignPeer { peer },
                NoSession::Connect(error) => PostError::Connect(error),
            })?;
        let options = options.notify(payload);
        crate::op::post(self.core(), &session, None, options)
    }

    /// A queue for the ends of up to `capacity` transfers, 1 to 2^24; one for each thread or loop
    /// that wants its own.
    ///
    /// # Errors
    /// The capacity is out of range, or the system has no descriptor left.
    pub fn completion_queue(&self, capacity: usize) -> Result<CompletionQueue, AgentError> {
        if !(1..=1 << 24).contains(&capacity) {
            return Err(AgentError::InvalidConfig {
                field: "capacity of a completion queue",
                got: capacity.to_string(),
                accepted: "1 to 2^24",
            });
        }
        CompletionQueue::new(capacity, self.core().config.copy_spin).map_err(|source| {
            AgentError::Io {
                what: "make an eventfd".to_owned(),
                source,
            }
        })
    }

    /// The queue of received notifications.
    #[must_use]
    pub fn notifications(&self) -> Notifications {
        Notifications {
            queue: self.core().notifications.clone(),
            reactors: self.core().reactors.clone(),
        }
    }

    /// Opens a window over a part of a region: peers that name it may access that part until it is
    /// closed.
    ///
    /// # Errors
    /// The scope does not fit the region, or a limit is reached.
    pub fn open_window(
        &self,
        registration: &Registration,
        scope: WindowScope,
        access: WindowAccess,
    ) -> Result<Window, WindowError> {
        self.core().open_window(registration, scope, access)
    }

    /// Counters since the start.
    #[must_use]
    pub fn stats(&self) -> AgentStats {
        self.core().stats()
    }
}
