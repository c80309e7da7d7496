//! Typed configuration: every field says what it does, its unit, its default and what it can cost.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::cuda::{DeviceSharing, PinConfig};
use crate::error::AgentError;
use crate::storage::StorageConfig;

mod cuda;
mod rdma;
mod tls;

pub use cuda::{CudaConfig, StagingConfig};
pub use rdma::RdmaConfig;
pub use tls::{Pem, TlsConfig, TlsPeerName};

/// A way to move bytes to a peer. `AgentConfig::lanes` lists the allowed ones, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Lane {
    /// The peer lives in this process: one memcpy by this agent's copy workers.
    Loopback,
    /// The peer is on this host: its arenas are mapped and a transfer is one memcpy.
    Shm,
    /// Any peer that a TCP connection reaches.
    Tcp,
    /// Any peer whose RDMA device this agent's device reaches: the device moves the bytes into and out of
    /// registered memory, a TCP connection carries the rest. Not offered by default.
    Verbs,
    /// A file of this host. Names the way of an operation in its plan; never connects agents.
    File,
    /// An object store. Names the way of an operation in its plan; never connects agents.
    Object,
    /// A device moves the bytes: between GPUs, or between a GPU and pinned host memory. Names the way of
    /// an operation in its plan; the peer is reached over loopback or shm.
    Cuda,
}

impl std::fmt::Display for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
            Self::File => "file",
            Self::Object => "object",
            Self::Cuda => "cuda",
        })
    }
}

/// Configuration of one [`Agent`](crate::Agent). Start from [`AgentConfig::new`].
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Name under which peers know this agent; 1 to 255 bytes. Unique among agents that talk to
    /// each other: connecting to a second agent of one name replaces the first.
    pub name: String,
    /// Lanes this agent offers and uses, best first. Default: loopback, shm, tcp.
    pub lanes: Vec<Lane>,
    /// Where the TCP lane listens. Default 127.0.0.1, a port chosen by the kernel.
    pub tcp_bind: SocketAddr,
    /// Host name or address written into the metadata instead of the bound address; needed when
    /// `tcp_bind` is a wildcard address. Default none.
    pub advertise_host: Option<String>,
    /// Folder for the Unix socket of the shm lane. Default `/tmp`. The socket is readable by this
    /// user only and goes away with the agent; what killed agents left behind is removed by the
    /// next agent that starts there.
    pub socket_dir: PathBuf,
    /// A peer that has been silent this long is lost. Heartbeats go out eight times per interval.
    /// Default 2 s.
    pub peer_loss_timeout: Duration,
    /// Whether whoever reaches a listening socket may ask for this agent's metadata
    /// ([`Agent::fetch_metadata`](crate::Agent::fetch_metadata)): names of the agent and its regions,
    /// and what it takes to connect. Default true; off where only those who got the metadata by
    /// other means are to connect.
    pub serve_metadata: bool,
    /// Bound on each handshake and on each question to a peer while preparing. Default 2 s.
    pub connect_timeout: Duration,
    /// Notifications waiting to be received; beyond it senders get
    /// [`Rejection::NotificationQueueFull`](crate::Rejection::NotificationQueueFull). Default 4096.
    /// Worst-case memory: this times `notification_bytes_max`.
    pub notifications_max: usize,
    /// Largest notification payload sent or accepted, in bytes. Default 256 KiB.
    pub notification_bytes_max: usize,
    /// Operations in flight per peer; beyond it posting fails with
    /// [`PostError::TooManyInFlight`](crate::PostError::TooManyInFlight). Default 16384.
    pub posts_max: usize,
    /// READs that a peer may have open at this agent on each of its data connections. The peer is
    /// told and queues the rest, as far as its `posts_max` allows. Default 1024. Worst-case memory:
    /// this times the ids of one operation, per connection.
    pub peer_reads_max: u32,
    /// Regions registered at one time. Default 65536.
    pub regions_max: usize,
    /// Windows open at one time. Default 65536.
    pub windows_max: usize,
    /// Connections kept, in each direction. Default 1024.
    pub peers_max: usize,
    /// Threads that copy for the loopback and shm lanes; parked while there is nothing to copy.
    /// Default: half of the cores, 1 to 4.
    pub copy_threads: usize,
    /// A copy is cut into parts of this many bytes, the unit of parallelism and of cancellation.
    /// Default 256 KiB, a multiple of 64.
    pub copy_part_bytes: u64,
    /// A copy wakes one more thread for every so many bytes. Default 1 MiB.
    pub copy_bytes_per_thread: u64,
    /// Transfers up to this size on the loopback and shm lanes are copied by the thread that posts
    /// them: up to about here that costs it less than waking a worker. Default 128 KiB; 0 leaves
    /// all copies to the workers.
    pub copy_inline_bytes: u64,
    /// How long a copy worker that has run out of work looks for more before it parks. The next
    /// transfer within that time starts 15 to 25 us earlier. Default 50 us, at most 10 ms.
    pub copy_spin: Duration,
    /// Threads that serve sockets. Default: a quarter of the cores, 1 to 4.
    pub io_threads: usize,
    /// How long a thread that serves sockets looks for the next event before it parks. It does so
    /// only while events come at least that often, and lets others run in between. The next event
    /// within that time is handled 15 to 25 us earlier. Default 50 us, at most 10 ms; never on one
    /// core.
    pub io_spin: Duration,
    /// TCP data connections per peer, beside the control connection. Default 2, at most 16.
    pub tcp_streams: usize,
    /// Kernel buffer for sending, per TCP stream, in bytes; at most what the kernel allows
    /// (`net.core.wmem_max`). Default none: 256 KiB to peers on this host, and the kernel's own
    /// tuning (`net.ipv4.tcp_wmem`) over a network.
    pub tcp_send_buffer_bytes: Option<usize>,
    /// Kernel buffer for receiving, likewise (`net.core.rmem_max`). Default none: 1 MiB from peers
    /// on this host, the kernel's own tuning (`net.ipv4.tcp_rmem`) over a network.
    pub tcp_receive_buffer_bytes: Option<usize>,
    /// Most bytes per second that the kernel sends on each TCP stream, both as initiator and as
    /// target (`SO_MAX_PACING_RATE`). Spreads packets out where several senders share a link;
    /// control connections are not paced. Default none.
    pub tcp_pacing_bytes_per_s: Option<u64>,
    /// TLS on all TCP connections of this agent, as initiator and as target; peers must have it too.
    /// Default none: plaintext. Costs an encryption and two more copies of every byte, about a
    /// core on each side for 3 GB/s.
    pub tls: Option<TlsConfig>,
    /// Largest frame of payload on a stream, the unit of cancellation there. Default 1 MiB.
    pub stream_chunk_bytes: u32,
    /// Files and object stores.
    pub storage: StorageConfig,
    /// GPUs.
    pub cuda: CudaConfig,
    /// RDMA, where `lanes` has [`Lane::Verbs`].
    pub rdma: RdmaConfig,
    /// Faults injected around every lane, for tests. Default none.
    pub faults: Option<FaultConfig>,
}

impl AgentConfig {
    /// The defaults, under `name`.
    pub fn new(name: impl Into<String>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            name: name.into(),
            lanes: vec![Lane::Loopback, Lane::Shm, Lane::Tcp],
            tcp_bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise_host: None,
            socket_dir: PathBuf::from("/tmp"),
            peer_loss_timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(2),
            serve_metadata: true,
            notifications_max: 4096,
            notification_bytes_max: 256 << 10,
            posts_max: 16384,
            peer_reads_max: 1024,
            regions_max: 65536,
            windows_max: 65536,
            peers_max: 1024,
            copy_threads: (cores / 2).clamp(1, 4),
            copy_part_bytes: 256 << 10,
            copy_bytes_per_thread: 1 << 20,
            copy_inline_bytes: 128 << 10,
            copy_spin: Duration::from_micros(50),
            io_threads: (cores / 4).clamp(1, 4),
            io_spin: Duration::from_micros(50),
            tcp_streams: 2,
            tcp_send_buffer_bytes: None,
            tcp_receive_buffer_bytes: None,
            tcp_pacing_bytes_per_s: None,
            tls: None,
            stream_chunk_bytes: 1 << 20,
            storage: StorageConfig::default(),
            cuda: CudaConfig::default(),
            rdma: RdmaConfig::default(),
            faults: None,
        }
    }

    /// The same configuration with only `lanes` allowed.
    #[must_use]
    pub fn with_lanes(mut self, lanes: impl Into<Vec<Lane>>) -> Self {
        self.lanes = lanes.into();
        self
    }

    pub(crate) fn validate(&self) -> Result<(), AgentError> {
        let check = |ok: bool, field: &'static str, got: String, accepted: &'static str| {
            if ok {
                Ok(())
            } else {
                Err(AgentError::InvalidConfig {
                    field,
                    got,
                    accepted,
                })
            }
        };
        let name = self.name.len();
        check(
            (1..=255).contains(&name),
            "name",
            format!("{name} bytes"),
            "1 to 255 bytes",
        )?;
        check(
            !self.lanes.is_empty(),
            "lanes",
            "none".into(),
            "at least one lane",
        )?;
        check(
            !self
                .lanes
                .iter()
                .any(|lane| matches!(lane, Lane::File | Lane::Object | Lane::Cuda)),
            "lanes",
            "file, object or cuda".into(),
            "loopback, shm, tcp, verbs; files and object stores are opened, and device memory is reached over loopback and shm",
        )?;
        let loss = self.peer_loss_timeout;
        check(
            loss >= Duration::from_millis(20) && loss <= Duration::from_secs(600),
            "peer_loss_timeout",
            format!("{loss:?}"),
            "20 ms to 600 s",
        )?;
        let connect = self.connect_timeout;
        check(
            connect >= Duration::from_millis(1) && connect <= Duration::from_secs(600),
            "connect_timeout",
            format!("{connect:?}"),
            "1 ms to 600 s",
        )?;
        for (field, got, max) in [
            ("notifications_max", self.notifications_max, 1 << 24),
            (
                "notification_bytes_max",
                self.notification_bytes_max,
                1 << 24,
            ),
            ("posts_max", self.posts_max, 1 << 24),
            ("regions_max", self.regions_max, 1 << 24),
            ("windows_max", self.windows_max, 1 << 24),
            ("peers_max", self.peers_max, 1 << 16),
        ] {
            check(
                (1..=max).contains(&got),
                field,
                got.to_string(),
                "1 to 2^24 (peers: 2^16)",
            )?;
        }
        check(
            (1..=1 << 24).contains(&self.peer_reads_max),
            "peer_reads_max",
            self.peer_reads_max.to_string(),
            "1 to 2^24",
        )?;
        for (field, got, max, accepted) in [
            ("copy_threads", self.copy_threads, 256, "1 to 256"),
            ("io_threads", self.io_threads, 64, "1 to 64"),
            ("tcp_streams", self.tcp_streams, 16, "1 to 16"),
        ] {
            check((1..=max).contains(&got), field, got.to_string(), accepted)?;
        }
        check(
            self.copy_part_bytes >= 4096 && self.copy_part_bytes.is_multiple_of(64),
            "copy_part_bytes",
            self.copy_part_bytes.to_string(),
            "at least 4096, a multiple of 64",
        )?;
        check(
            self.copy_bytes_per_thread >= 4096,
            "copy_bytes_per_thread",
            self.copy_bytes_per_thread.to_string(),
            "at least 4096",
        )?;
        for (field, spin) in [("copy_spin", self.copy_spin), ("io_spin", self.io_spin)] {
            let short = spin <= Duration::from_millis(10);
            check(short, field, format!("{spin:?}"), "0 to 10 ms")?;
        }
        check(
            (4096..=1 << 26).contains(&self.stream_chunk_bytes),
            "stream_chunk_bytes",
            self.stream_chunk_bytes.to_string(),
            "4 KiB to 64 MiB",
        )?;
        let (send, receive) = (self.tcp_send_buffer_bytes, self.tcp_receive_buffer_bytes);
        check(
            send.is_none_or(|bytes| (4096..=1 << 30).contains(&bytes)),
            "tcp_send_buffer_bytes",
            format!("{send:?}"),
            "none, or 4 KiB to 1 GiB",
        )?;
        check(
            receive.is_none_or(|bytes| (1 << 16..=1 << 30).contains(&bytes)),
            "tcp_receive_buffer_bytes",
            format!("{receive:?}"),
            "none, or 64 KiB (a segment within a host) to 1 GiB",
        )?;
        check(
            self.tcp_pacing_bytes_per_s.is_none_or(|rate| rate >= 65536),
            "tcp_pacing_bytes_per_s",
            format!("{:?}", self.tcp_pacing_bytes_per_s),
            "none, or at least 65536",
        )?;
        check(
            self.tls.is_none() || !self.lanes.contains(&Lane::Verbs),
            "lanes",
            "verbs, with TLS".into(),
            "verbs without TLS: RDMA carries payload in plaintext",
        )?;
        self.rdma.validate()?;
        self.storage.validate()?;
        self.cuda.validate()?;
        if let Some(faults) = &self.faults {
            faults.validate()?;
        }
        Ok(())
    }
}

/// How to connect to one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectOptions {
    /// Lanes for this connection, best first, in place of [`AgentConfig::lanes`]. Default: those of
    /// the agent.
    pub lanes: Option<Vec<Lane>>,
    /// Bound on connecting, all lanes together. Default 2 s.
    pub timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self::within(Duration::from_secs(2))
    }
}

impl ConnectOptions {
    /// The lanes of the agent, within `timeout`.
    #[must_use]
    pub const fn within(timeout: Duration) -> Self {
        Self {
            lanes: None,
            timeout,
        }
    }

    /// The same with only `lanes` allowed, best first.
    #[must_use]
    pub fn with_lanes(mut self, lanes: impl Into<Vec<Lane>>) -> Self {
        self.lanes = Some(lanes.into());
        self
    }
}

/// An arena: shared memory that peers on this host can map.
#[derive(Clone, Debug)]
pub struct ArenaConfig {
    /// Size; rounded up to whole pages by the kernel, the registration keeps this length.
    pub bytes: usize,
    /// Name in logs, at most 255 bytes.
    pub label: String,
    /// Whether to ask for huge pages. Default [`HugePages::Try`].
    pub huge_pages: HugePages,
    /// What peers may do. Default [`RemoteAccess::Open`].
    pub access: RemoteAccess,
    /// Whether the memory is pinned for GPUs at once, and near which. Default none: it is pinned when a
    /// transfer with device memory first names it, which then takes about 0.3 s per GiB.
    pub pin: Option<PinConfig>,
}

impl ArenaConfig {
    /// An arena of `bytes`, open to peers, huge pages tried.
    pub fn new(bytes: usize, label: impl Into<String>) -> Self {
        Self {
            bytes,
            label: label.into(),
            huge_pages: HugePages::Try,
            access: RemoteAccess::Open,
            pin: None,
        }
    }

    /// The same arena, pinned for GPUs from the start. [`Registration::pinned`](crate::Registration::pinned)
    /// tells how far that has come; transfers need only the part that they name.
    #[must_use]
    pub const fn pinned(mut self, pin: PinConfig) -> Self {
        self.pin = Some(pin);
        self
    }

    /// The same arena with other rights for peers.
    #[must_use]
    pub fn with_access(mut self, access: RemoteAccess) -> Self {
        self.access = access;
        self
    }
}

/// An arena of device memory: other devices and processes of this host can map it.
#[derive(Clone, Debug)]
pub struct DeviceArenaConfig {
    /// The device, as this process numbers it (`cuda:0` is 0).
    pub device: u32,
    /// Size; the driver rounds it up to its unit (2 MiB), the registration keeps this length.
    pub bytes: usize,
    /// Name in logs, at most 255 bytes.
    pub label: String,
    /// What peers may do. Default [`RemoteAccess::Open`].
    pub access: RemoteAccess,
    /// How other processes get at it. Default [`DeviceSharing::FileDescriptor`].
    pub sharing: DeviceSharing,
}

impl DeviceArenaConfig {
    /// An arena of `bytes` on `device`, open to peers, filled with zeros.
    pub fn new(device: u32, bytes: usize, label: impl Into<String>) -> Self {
        Self {
            device,
            bytes,
            label: label.into(),
            access: RemoteAccess::Open,
            sharing: DeviceSharing::default(),
        }
    }

    /// The same arena with other rights for peers.
    #[must_use]
    pub const fn with_access(mut self, access: RemoteAccess) -> Self {
        self.access = access;
        self
    }

    /// The same arena, shared another way.
    #[must_use]
    pub const fn shared_by(mut self, sharing: DeviceSharing) -> Self {
        self.sharing = sharing;
        self
    }
}

/// How much an arena wants huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Ordinary pages.
    Never,
    /// Transparent huge pages where the kernel grants them; the result is in
    /// [`RegionKind::Arena`](crate::RegionKind::Arena).
    #[default]
    Try,
    /// 2 MiB pages of the kernel's reserved pool (hugetlbfs), or an error.
    Require,
}

/// What peers may do with a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RemoteAccess {
    /// Any connected peer reads and writes any part of it at any time.
    #[default]
    Open,
    /// Only inside a [`Window`](crate::Window), and only what the window covers.
    WindowOnly,
    /// Nothing: the region is a local buffer for this agent's own operations.
    None,
}

/// Seeded faults, injected into operations of this agent around whatever lane is used.
///
/// Faults hit operations that move bytes; standalone notifications pass. Probabilities are in
/// `0.0..=1.0` and drawn once per operation, in this order: disconnect, loss, delay. The same seed and the same order of posts give the same faults.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultConfig {
    /// Seed of the generator.
    pub seed: u64,
    /// An operation starts late by a random time up to `delay_max`. Operations that are delayed
    /// overtake each other: this is also how reordering is injected.
    pub delay: f64,
    /// Longest delay.
    pub delay_max: Duration,
    /// An operation never starts; its deadline ends it.
    pub loss: f64,
    /// The connection breaks instead of starting the operation.
    pub disconnect: f64,
    /// Some parts of an operation never move, the others do, and it fails with
    /// [`TransferError::Injected`](crate::TransferError::Injected) after `delay_max`. Hits copies,
    /// files and objects; one without parts beside the first moves nothing.
    pub torn: f64,
}

impl FaultConfig {
    /// No faults yet, with a seed: set the probabilities that the test wants.
    #[must_use]
    pub const fn seeded(seed: u64) -> Self {
        Self {
            seed,
            delay: 0.0,
            delay_max: Duration::from_millis(2),
            loss: 0.0,
            disconnect: 0.0,
            torn: 0.0,
        }
    }

    fn validate(&self) -> Result<(), AgentError> {
        for (field, p) in [
            ("faults.delay", self.delay),
            ("faults.loss", self.loss),
            ("faults.disconnect", self.disconnect),
            ("faults.torn", self.torn),
        ] {
            if !(0.0..=1.0).contains(&p) {
                return Err(AgentError::InvalidConfig {
                    field,
                    got: p.to_string(),
                    accepted: "0.0 to 1.0",
                });
            }
        }
        Ok(())
    }
}
