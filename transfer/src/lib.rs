//! The data plane of blockplane: moves blocks of memory between agents, in one process, on one host
//! or over a network.
//!
//! Depend on this crate to place bytes into a peer's memory and to know when they are there. It
//! knows bytes, strides and peers. It does not know what a model's blocks mean or who should talk to
//! whom: `kvbm` turns KV layouts into [`BlockLayout`]s and [`KvBlockLayout`]s, and metadata travels by
//! whatever means the caller has.
//!
//! # The path of a transfer
//!
//! An [`Agent`] owns memory as [`Registration`]s and gives out [`Metadata`]. Another agent
//! [connects](Agent::connect) with it, [prepares](Agent::prepare) an operation on *block sets* (a
//! layout, block ids, a range of layers; they stay that small up to the wire), and
//! [posts](Prepared::post) it as often as it likes. The [`Transfer`] can be polled, waited for,
//! awaited, cancelled, and has a deadline; a notification bound to it reaches the peer after its
//! bytes.
//!
//! ```
//! use std::time::Duration;
//!
//! use blockplane_transfer::{
//!     Agent, AgentConfig, ArenaConfig, BlockLayout, LocalBlocks, Op, PostOptions, RemoteBlocks,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let timeout = Duration::from_secs(5);
//! let prefill = Agent::new(AgentConfig::new("prefill"))?;
//! let decode = Agent::new(AgentConfig::new("decode"))?;
//!
//! // Eight blocks of 4 KiB on each side.
//! let layout = BlockLayout::contiguous(8, 4096);
//! let source = prefill.allocate(ArenaConfig::new(8 * 4096, "source"))?;
//! let target = decode.allocate(ArenaConfig::new(8 * 4096, "target"))?;
//! source.write_at(2 * 4096, b"block two")?;
//!
//! // The metadata travels as bytes, by any means.
//! let blob = decode.metadata().to_bytes();
//! let metadata = blockplane_transfer::Metadata::from_bytes(&blob)?;
//! let peer = prefill.connect(&metadata, timeout)?;
//!
//! // Blocks 2 and 5 here become blocks 7 and 0 there.
//! let local = LocalBlocks { registration: &source, layout, ids: [2, 5].into(), layers: 0..1 };
//! let remote = RemoteBlocks {
//!     peer: &peer,
//!     region: target.id(),
//!     layout,
//!     ids: [7, 0].into(),
//!     layers: 0..1,
//!     window: None,
//! };
//! let prepared = prefill.prepare(Op::Write, local, remote)?;
//! let transfer = prepared.post(PostOptions::within(timeout).notify("blocks are there"))?;
//! transfer.wait(timeout)?;
//!
//! let note = decode.notifications().recv_timeout(timeout)?;
//! assert_eq!((&*note.from, &note.payload[..]), ("prefill", &b"blocks are there"[..]));
//! let mut bytes = [0; 9];
//! target.read_at(7 * 4096, &mut bytes)?;
//! assert_eq!(&bytes, b"block two");
//! # Ok(())
//! # }
//! ```
//!
//! # Two processes
//!
//! The same between processes (`examples/two_processes.rs`): they meet through a folder, and the
//! owner of the memory says by a window which blocks may be written.
//!
//! ```standalone_crate
#![doc = include_str!("../examples/two_processes.rs")]
//! ```
//!
//! # Finding peers
//!
//! Metadata is a small versioned, checksummed blob. It travels as bytes by any means
//! ([`Metadata::to_bytes`]), through a file ([`Metadata::write_to`]), from the agent itself
//! ([`Agent::fetch_metadata`]), or through a key-value store behind the trait [`MetadataStore`]
//! ([`Agent::publish`], [`Agent::connect_by_name`]; a [`FolderStore`] and a [`MemoryStore`] are
//! here). It can be partial ([`Agent::metadata_of`]) and brought up to date
//! ([`Agent::metadata_delta`]). [`Agent::connect`] connects at once, [`Agent::remember`] when the
//! peer is first used, and again after a loss.
//!
//! # Seeing what happens
//!
//! * The end of a transfer: [`Transfer::wait`], await, or for many transfers a [`CompletionQueue`]
//!   with a descriptor for any poll or epoll loop. None of them needs a thread that spins.
//! * One transfer: [`Transfer::telemetry`]. One connection: [`Peer::stats`]. All of them:
//!   [`Agent::stats`]. Bytes, operations and latency histograms by lane and direction, outcomes,
//!   and how much is and was in flight. Always on.
//! * Traces: `tracing` spans named `transfer` with the target `blockplane_transfer`, at debug level,
//!   carry the request ([`PostOptions::request_id`]), peer, lane, direction and bytes. They cost
//!   nothing when nobody listens.
//!
//! # What can be relied on
//!
//! * Memory that a transfer names stays registered and mapped until no byte of it moves, whatever
//!   is dropped before.
//! * Once a transfer reports an error, it neither reads nor writes local memory any more.
//! * A notification is delivered after all bytes of its transfer, and notifications to one peer are
//!   delivered in the order in which they were posted.
//! * [`Window::close`] returns `Ok` only when no further byte can land through the window.
//! * A lost peer is noticed at once when its connection or process ends, and after
//!   [`AgentConfig::peer_loss_timeout`] when it is silent: stopped, cut off, or starved. Everything
//!   in flight then fails with [`TransferError::PeerLost`], and so does everything later, until the
//!   next [`Agent::connect`].
//! * Every wait has a deadline and every queue a bound; what comes from the network is checked
//!   before it is believed and allocates nothing beyond a limit.
//! * An agent without work uses no CPU beside its heartbeats: its threads are parked.
//!
//! # Lanes
//!
//! [`Peer::lane`] says which lane a connection uses and why, [`Prepared::plan`] how one operation is
//! going to run. [`Lane::Loopback`] reaches agents of this process and [`Lane::Shm`] processes of
//! this host, both by one memcpy between mappings (memory of another process that is not an arena
//! is copied by the kernel); [`Lane::Tcp`] reaches the rest. [`Agent::map`] does without the copy. On the shm lane
//! everybody with access to the socket (the same user) is trusted to stay within the windows it was
//! given: a mapping cannot be revoked block by block. Over tcp the owner of the memory checks.
//!
//! [`Lane::Verbs`], where it is listed in [`AgentConfig::lanes`], reaches peers by RDMA: the device of the
//! initiator moves the bytes ([`RdmaConfig`], [`probe_rdma`]). Peers are trusted to stay within their windows as
//! on shm, but the owner shuts out a peer that is lost, so that closing a window never waits longer than
//! [`AgentConfig::peer_loss_timeout`] for one. Host memory only; registered memory is locked
//! (`ulimit -l`).
//!
//! Device memory of this agent goes to and comes from places that no device reaches (files, objects,
//! host memory of peers over tcp) through a few slots of pinned memory ([`StagingConfig`]): it
//! remains one transfer, and the plan says so.
//!
//! # Rearranging on the way
//!
//! Two workers rarely have the same KV cache. [`Agent::prepare_tensors`] moves blocks between caches
//! that are arranged differently (layers or blocks first, tokens or heads first, keys and values
//! apart or together) or that hold different heads, in one pass and on every lane. A
//! [`KvBlockLayout`] says where each head of each token lies, a [`KvSlice`] which part of each block
//! is meant.
//!
//! Here two prefill ranks with half of the heads each, tokens first, fill the blocks of one decode
//! worker, heads first:
//!
//! ```
//! use std::time::Duration;
//!
//! use blockplane_transfer::{
//!     Agent, AgentConfig, ArenaConfig, KvBlockLayout, KvOrder, KvShape, KvSlice, LocalTensor, Op,
//!     PostOptions, RemoteTensor,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let timeout = Duration::from_secs(5);
//! let half = KvShape { blocks: 8, layers: 2, planes: 2, tokens: 16, heads: 4, head_bytes: 256 };
//! let whole = KvShape { heads: 8, ..half };
//! let narrow = KvBlockLayout::dense(half, KvOrder::LAYER_FIRST_NHD)?;
//! let wide = KvBlockLayout::dense(whole, KvOrder::BLOCK_FIRST_HND)?;
//!
//! let decode = Agent::new(AgentConfig::new("decode"))?;
//! let bytes = usize::try_from(wide.end().ok_or("too large")?)?;
//! let target = decode.allocate(ArenaConfig::new(bytes, "target"))?;
//! for (name, heads) in [("rank 0", 0..4), ("rank 1", 4..8)] {
//!     let rank = Agent::new(AgentConfig::new(name))?;
//!     let bytes = usize::try_from(narrow.end().ok_or("too large")?)?;
//!     let source = rank.allocate(ArenaConfig::new(bytes, "source"))?;
//!     let last = narrow.head_offset(5, 1, 0, 15, 3).ok_or("no such head")?;
//!     source.write_at(last, name.as_bytes())?;
//!
//!     let peer = rank.connect(&decode.metadata(), timeout)?;
//!     let local = LocalTensor {
//!         registration: &source,
//!         layout: narrow,
//!         ids: [2, 5].into(),
//!         slice: KvSlice::ALL,
//!     };
//!     let remote = RemoteTensor {
//!         peer: &peer,
//!         region: target.id(),
//!         layout: wide,
//!         ids: [7, 0].into(),
//!         slice: KvSlice::ALL.heads(heads),
//!         window: None,
//!     };
//!     let prepared = rank.prepare_tensors(Op::Write, local, remote)?;
//!     prepared.post(PostOptions::within(timeout))?.wait(timeout)?;
//! }
//! // The last head of each rank, in layer 1, for the last token of block 5, which is block 0 here.
//! for (head, name) in [(3, b"rank 0"), (7, b"rank 1")] {
//!     let mut found = [0; 6];
//!     target.read_at(wide.head_offset(0, 1, 0, 15, head).ok_or("no such head")?, &mut found)?;
//!     assert_eq!(&found, name);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # GPUs
//!
//! [`Agent::allocate_device`] makes a region of device memory, [`Agent::register_device`] names memory
//! that a framework allocated. They are used like every other region: blocks, windows, notifications and
//! deadlines are the same, and peers of this host reach them over the connection that they have.
//! [`Lane::Cuda`] in the plan says that a device moves the bytes: one kernel on a few multiprocessors
//! ([`CudaConfig::sms`], [`PostOptions::sms`]) finds all blocks by itself, large contiguous pieces go to
//! the copy engines. Host memory on the other side is pinned when it is first used, or from the start
//! ([`ArenaConfig::pinned`]). CUDA is looked for when the first such region is made; [`probe_cuda`] tells
//! what is there, and its absence is an error that says what to install.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use blockplane_transfer::{
//!     Agent, AgentConfig, ArenaConfig, BlockLayout, DeviceArenaConfig, LocalBlocks, Op, PinConfig,
//!     PostOptions, RemoteBlocks,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let timeout = Duration::from_secs(5);
//! let agent = Agent::new(AgentConfig::new("worker"))?;
//! let layout = BlockLayout::contiguous(1024, 32 << 10);
//! let cache = agent.allocate_device(DeviceArenaConfig::new(0, 1024 * (32 << 10), "kv"))?;
//! let host = agent.allocate(ArenaConfig::new(1024 * (32 << 10), "g2").pinned(PinConfig::near(0)))?;
//!
//! // Blocks 7 and 300 of the GPU become blocks 0 and 1 of host memory.
//! let peer = agent.connect(&agent.metadata(), timeout)?;
//! let local = LocalBlocks { registration: &cache, layout, ids: [7, 300].into(), layers: 0..1 };
//! let remote = RemoteBlocks {
//!     peer: &peer,
//!     region: host.id(),
//!     layout,
//!     ids: [0, 1].into(),
//!     layers: 0..1,
//!     window: None,
//! };
//! let offload = agent.prepare(Op::Write, local, remote)?;
//! println!("{}", offload.plan().reason);
//! offload.post(PostOptions::within(timeout).sms(4))?.wait(timeout)?;
//! # Ok(())
//! # }
//! ```
//!
//! A transfer can wait for work of the caller's on the device ([`PostOptions::after`]): the KV of a layer
//! leaves as soon as that layer has run. An error of the device ends the transfers that it hits with
//! [`TransferError::Device`], which says whether the device is lost for the process.
//!
//! # Files
//!
//! [`Agent::open_file`] opens a file as a place for blocks: a region of bytes with a
//! [`BlockLayout`]. [`Agent::prepare_file`] makes an operation between it and registered memory,
//! which is posted, awaited and cancelled like every other one. io_uring moves the bytes around the
//! page cache where the file system allows it; [`FileStore::lane`] and the plan say what is done
//! instead elsewhere.
//!
//! ```
//! use std::time::Duration;
//!
//! use blockplane_transfer::{
//!     Agent, AgentConfig, ArenaConfig, BlockLayout, FileBlocks, FileConfig, LocalBlocks, Op,
//!     PostOptions,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("blocks");
//! let timeout = Duration::from_secs(5);
//! let agent = Agent::new(AgentConfig::new("cache"))?;
//! let memory = agent.allocate(ArenaConfig::new(8 * 4096, "memory"))?;
//! memory.write_at(2 * 4096, b"block two")?;
//!
//! // Blocks 2 and 5 of the memory become blocks 100 and 0 of the file, durably.
//! let file = agent.open_file(FileConfig::new(path).create(128 * 4096))?;
//! let local = LocalBlocks {
//!     registration: &memory,
//!     layout: BlockLayout::contiguous(8, 4096),
//!     ids: [2, 5].into(),
//!     layers: 0..1,
//! };
//! let stored = FileBlocks {
//!     file: &file,
//!     layout: BlockLayout::contiguous(128, 4096),
//!     ids: [100, 0].into(),
//!     layers: 0..1,
//!     durable: true,
//! };
//! let write = agent.prepare_file(Op::Write, local.clone(), stored.clone())?;
//! write.post(PostOptions::within(timeout))?.wait(timeout)?;
//!
//! memory.write_at(2 * 4096, b"forgotten")?;
//! let read = agent.prepare_file(Op::Read, local, stored)?;
//! read.post(PostOptions::within(timeout))?.wait(timeout)?;
//! let mut bytes = [0; 9];
//! memory.read_at(2 * 4096, &mut bytes)?;
//! assert_eq!(&bytes, b"block two");
//! # Ok(())
//! # }
//! ```
//!
//! # Objects
//!
//! `Agent::open_objects` opens S3, Google Cloud Storage, Azure or a folder (feature `object`, on by
//! default). One object holds one block, its layers one after another.
//!
//! ```
//! # #[cfg(feature = "object")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//!
//! use blockplane_transfer::{
//!     Agent, AgentConfig, ArenaConfig, BlockLayout, LocalBlocks, ObjectBlocks, ObjectConfig,
//!     ObjectLocation, Op, PostOptions,
//! };
//!
//! let timeout = Duration::from_secs(5);
//! let agent = Agent::new(AgentConfig::new("archive"))?;
//! let memory = agent.allocate(ArenaConfig::new(2 * 4096, "memory"))?;
//! memory.write_at(0, b"block zero")?;
//!
//! let store = agent.open_objects(&ObjectConfig::new(ObjectLocation::Memory))?;
//! let keys = ["kv/first".to_owned(), "kv/second".to_owned()];
//! let local = LocalBlocks {
//!     registration: &memory,
//!     layout: BlockLayout::contiguous(2, 4096),
//!     ids: [0, 1].into(),
//!     layers: 0..1,
//! };
//! let objects = ObjectBlocks { store: &store, keys: &keys, range: None, create_only: false };
//! let write = agent.prepare_objects(Op::Write, local, objects)?;
//! write.post(PostOptions::within(timeout))?.wait(timeout)?;
//!
//! let found = store.query(&keys, timeout)?;
//! assert_eq!(found[0].as_ref().map(|info| info.length), Some(4096));
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "object"))]
//! # fn main() {}
//! ```
//!
//! # Threads and cancellation
//!
//! There is no async runtime here, except on the thread for objects: an agent runs one timer thread,
//! a few copy workers and a few socket threads, and one for files when it has some. Futures of this
//! crate work in any executor and lose nothing when dropped, except that dropping a [`Transfer`]
//! cancels it ([`Transfer::detach`] does not).
//!
//! # Lab
//!
//! * `RUSTFLAGS="--cfg loom" cargo test -p blockplane-transfer --lib --release loom` checks the
//!   lock-free part of a transfer.
//! * `RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --release -p blockplane-transfer
//!   --no-default-features --target x86_64-unknown-linux-gnu --test transfer -- shm memory` runs the
//!   shm lane and copies through the kernel under AddressSanitizer; `tests/run` does both of these.
//! * `cargo +nightly fuzz run metadata` (or `frames`) in this folder runs the fuzz targets, with
//!   cargo-fuzz installed.
//! * `cargo run --release -p blockplane-transfer --example lanes` measures every lane, `cargo bench -p
//!   blockplane-transfer` what preparing, posting and connecting cost.

mod agent;
mod backend;
mod clock;
mod config;
mod cuda;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod memory;
mod op;
mod peer;
mod plan;
mod rdma;
mod ring;
mod stage;
mod stats;
mod storage;
mod sync;
mod window;
mod wire;

pub use blockplane_rdma_sys::{
    GidKind, LibraryError, LinkLayer, PortState, RdmaDevice, RdmaGid, RdmaLibrary, RdmaPort,
    RdmaReport, probe_rdma,
};

pub use agent::{Agent, LaneInfo, Peer};
pub use config::{
    AgentConfig, ArenaConfig, ConnectOptions, CudaConfig, DeviceArenaConfig, FaultConfig,
    HugePages, Lane, Pem, RdmaConfig, RemoteAccess, StagingConfig, TlsConfig, TlsPeerName,
};
pub use cuda::{
    CudaDevice, CudaError, CudaReport, CudaUnavailable, DeviceEvent, DeviceMemory, DeviceSharing,
    ImageOrigin, KernelConfig, KernelError, KernelImage, NvrtcInfo, PinConfig, PinProgress,
    compile_kernels, find_nvrtc, probe_cuda,
};
pub use error::{
    AccessError, AgentError, AgentStopped, ConnectError, DeviceFailure, FetchError, LookupError,
    LossCause, MapError, MetadataError, PeerLost, PostError, PrepareError, RdmaError,
    RegisterError, Rejection, Side, TransferError, WindowError,
};
pub use memory::{
    Checksum, HostMemory, HugePageUse, RegionBusy, RegionId, RegionKind, Registration,
};
pub use op::{
    CancelOutcome, Completion, CompletionQueue, Descriptor, LocalBlocks, LocalTensor, MappedBlocks,
    Notification, Notifications, Op, Plan, PostOptions, Prepared, Recv, RecvError, RemoteBlocks,
    RemoteDescriptor, RemoteTensor, Transfer, TransferStatus, TransferTelemetry,
};
pub use peer::{
    FolderStore, MemoryStore, Metadata, MetadataContent, MetadataFileError, MetadataStore,
    RegionInfo, StoreError,
};
pub use plan::{
    Axis, BlockIds, BlockLayout, KvAxis, KvBlockLayout, KvOrder, KvShape, KvSlice, LayoutError,
};
pub use stats::{AgentStats, CostBasis, CostEstimate, FlowStats, LatencyHistogram, PeerStats};
#[cfg(feature = "object")]
pub use storage::{
    AzureConfig, AzureCredentials, GcsConfig, GcsCredentials, ObjectBlocks, ObjectConfig,
    ObjectInfo, ObjectList, ObjectLocation, ObjectStore, S3Config, S3Credentials, Secret,
};
pub use storage::{
    DirectIo, DirectUse, FileAccess, FileBlocks, FileConfig, FileCreation, FileEngine, FileInfo,
    FileRanges, FileSource, FileStore, OpenError, StorageAction, StorageConfig, StorageError,
    StorageErrorKind,
};
pub use window::{Closed, Window, WindowAccess, WindowBusy, WindowId, WindowScope};
