//! Typed configuration of stored blocks.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::AgentError;

/// How an agent moves stored blocks; a part of [`AgentConfig`](crate::AgentConfig).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StorageConfig {
    /// What moves the bytes of files. Default [`FileEngine::Auto`].
    pub file_engine: FileEngine,
    /// Requests of one agent that the kernel has at a time, over all files. Default 128, 1 to 4096.
    /// Cost: 1 KiB each.
    pub file_queue_depth: u32,
    /// Longer runs are cut into requests of this many bytes, the unit of cancellation. Default
    /// 1 MiB, a multiple of 4096 up to 64 MiB.
    pub file_request_bytes: u64,
    /// Threads that read and write files where io_uring is not used. Default 4, 1 to 64.
    pub file_threads: usize,
    /// Memory that is registered with io_uring at its first use, in bytes: its pages are pinned
    /// until the registration ends, which saves looking them up for each request. Beyond it, and
    /// where the kernel's limit of locked memory refuses, requests name plain memory. Default
    /// 64 GiB; 0 turns it off. The memory must not be mapped anew or punched meanwhile.
    pub file_registered_bytes_max: u64,
    /// Requests to object stores at a time, over all stores. Default 32, 1 to 1024. Each holds up
    /// to `object_part_bytes` of memory.
    pub object_concurrency: usize,
    /// An object larger than this is written in parts of this many bytes, several at a time.
    /// Default 16 MiB, 5 MiB to 1 GiB (S3 accepts no smaller parts).
    pub object_part_bytes: u64,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            file_engine: FileEngine::Auto,
            file_queue_depth: 128,
            file_request_bytes: 1 << 20,
            file_threads: 4,
            file_registered_bytes_max: 64 << 30,
            object_concurrency: 32,
            object_part_bytes: 16 << 20,
        }
    }
}

impl StorageConfig {
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
        check(
            (1..=4096).contains(&self.file_queue_depth),
            "storage.file_queue_depth",
            self.file_queue_depth.to_string(),
            "1 to 4096",
        )?;
        check(
            (4096..=64 << 20).contains(&self.file_request_bytes)
                && self.file_request_bytes.is_multiple_of(4096),
            "storage.file_request_bytes",
            self.file_request_bytes.to_string(),
            "4 KiB to 64 MiB, a multiple of 4096",
        )?;
        check(
            (1..=64).contains(&self.file_threads),
            "storage.file_threads",
            self.file_threads.to_string(),
            "1 to 64",
        )?;
        check(
            (1..=1024).contains(&self.object_concurrency),
            "storage.object_concurrency",
            self.object_concurrency.to_string(),
            "1 to 1024",
        )?;
        check(
            (5 << 20..=1 << 30).contains(&self.object_part_bytes),
            "storage.object_part_bytes",
            self.object_part_bytes.to_string(),
            "5 MiB to 1 GiB",
        )
    }
}

/// What moves the bytes of files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileEngine {
    /// io_uring, or threads where the kernel or a sandbox forbids it; which one and why is in
    /// [`FileStore::lane`](crate::FileStore::lane), in plans, and in one line of the log.
    #[default]
    Auto,
    /// io_uring, or opening a file fails.
    Uring,
    /// Threads that call `preadv` and `pwritev`.
    Threads,
}

/// A file to open with [`Agent::open_file`](crate::Agent::open_file).
#[derive(Debug)]
#[non_exhaustive]
pub struct FileConfig {
    /// Which file.
    pub source: FileSource,
    /// What is done with it. Default [`FileAccess::ReadWrite`].
    pub access: FileAccess,
    /// Whether it has to exist. Default [`FileCreation::Existing`]; meaningless for a descriptor.
    pub creation: FileCreation,
    /// The file has at least this many bytes after opening; a shorter one is extended. Default
    /// none: the file grows as it is written.
    pub length: Option<u64>,
    /// Allocates the blocks of `0..length` when the file is opened, so that writes into them
    /// cannot run out of space later. Default false.
    pub preallocate: bool,
    /// Whether requests go around the page cache. Default [`DirectIo::Auto`].
    pub direct: DirectIo,
}

/// Which file.
#[derive(Debug)]
pub enum FileSource {
    /// By its path.
    Path(PathBuf),
    /// By a descriptor, which the store takes over. It is opened again through `/proc/self/fd`, so
    /// that its flags (append, direct) do not matter; what it does not allow stays forbidden.
    Descriptor(OwnedFd),
}

impl FileConfig {
    /// An existing file, for reading and writing.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::from_source(FileSource::Path(path.into()))
    }

    /// The file behind a descriptor, for reading and writing.
    #[must_use]
    pub const fn descriptor(fd: OwnedFd) -> Self {
        Self::from_source(FileSource::Descriptor(fd))
    }

    const fn from_source(source: FileSource) -> Self {
        Self {
            source,
            access: FileAccess::ReadWrite,
            creation: FileCreation::Existing,
            length: None,
            preallocate: false,
            direct: DirectIo::Auto,
        }
    }

    /// The same, made if it does not exist, and at least `length` bytes long.
    #[must_use]
    pub const fn create(mut self, length: u64) -> Self {
        self.creation = FileCreation::IfMissing;
        self.length = Some(length);
        self
    }

    /// The same, for reading only.
    #[must_use]
    pub const fn read_only(mut self) -> Self {
        self.access = FileAccess::ReadOnly;
        self
    }

    /// The same, with this choice about the page cache.
    #[must_use]
    pub const fn with_direct(mut self, direct: DirectIo) -> Self {
        self.direct = direct;
        self
    }
}

/// What is done with a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileAccess {
    /// Blocks are read from it; nothing else can be prepared.
    ReadOnly,
    /// Blocks are read and written.
    #[default]
    ReadWrite,
}

/// Whether a file has to exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileCreation {
    /// It exists.
    #[default]
    Existing,
    /// It is made if it does not, readable and writable by this user.
    IfMissing,
    /// It is made and must not exist before.
    New,
}

/// Whether requests go around the page cache (`O_DIRECT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectIo {
    /// Where the file system offers it; [`FileStore::direct`](crate::FileStore::direct) says what
    /// became of it and why.
    #[default]
    Auto,
    /// Yes, or opening fails. Parts of an operation that are not aligned go through a second,
    /// buffered descriptor; the plan counts them.
    On,
    /// No.
    Off,
}

/// What became of the wish to go around the page cache.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirectUse {
    /// Aligned requests go around the page cache.
    Direct {
        /// Bytes to which memory has to be aligned.
        memory_align: u32,
        /// Bytes to which file offsets and lengths have to be aligned. Parts that are not whole
        /// pages, or whole units of this, go through the page cache.
        offset_align: u32,
    },
    /// Everything goes through the page cache, and why.
    Buffered(String),
}

impl fmt::Display for DirectUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct {
                memory_align,
                offset_align,
            } => write!(
                f,
                "O_DIRECT (memory aligned to {memory_align}, offsets to {offset_align})"
            ),
            Self::Buffered(why) => write!(f, "through the page cache: {why}"),
        }
    }
}

/// What is known of an open file at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileInfo {
    /// Length in bytes.
    pub length: u64,
    /// Bytes of storage that it takes.
    pub allocated: u64,
    /// Whether this store only reads.
    pub read_only: bool,
    /// Whether requests go around the page cache, and their alignment.
    pub direct: DirectUse,
    /// Number of the device that holds it: major and minor.
    pub device: (u32, u32),
    /// Number of the file on its device.
    pub inode: u64,
    /// Last change of its contents, since the epoch of Unix.
    pub modified: Duration,
}
