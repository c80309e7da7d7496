//! What a store is made of, and why it cannot be opened.

use std::{fmt, path::PathBuf, time::Duration};

use blockplane_transfer::{DirectIo, OpenError};
use thiserror::Error;

use crate::fingerprint::Fingerprint;

/// Where the bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreLocation {
    /// A file in this folder, which is made if it is missing. Its name comes from the fingerprint and a
    /// number; the first whose owner does not live is taken, up to [`FILES_PER_FOLDER`] of them. This is how
    /// the workers of one node share a disk: each has a file, and after a restart one of those again.
    Folder(PathBuf),
    /// This file; made if it is missing. One store at a time: a second one is refused.
    File(PathBuf),
    /// This block device. It is used as far as it is long.
    Device(PathBuf),
}

/// Stores of one fingerprint that processes sharing a folder can have open.
pub const FILES_PER_FOLDER: u32 = 64;

/// A store to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotStoreConfig {
    /// Where the bytes are.
    pub location: StoreLocation,
    /// Blocks that it has room for, at least 1. A store that was made with more is cut to this many;
    /// one that was made with fewer begins anew.
    pub slots: u32,
    /// Bytes of a block, at least 1. Slots are whole pages of 4096 bytes.
    pub block_bytes: u64,
    /// Of the blocks.
    pub fingerprint: Fingerprint,
    /// Whether requests go around the page cache. Default [`DirectIo::Auto`].
    pub direct: DirectIo,
    /// The file is opened with `O_DIRECT` from the start, or opening fails: for file systems that do not
    /// allow to switch to it later. Default false.
    pub open_direct: bool,
    /// Where the file system cannot allocate without writing, the file is filled with zeros; otherwise
    /// it is left sparse, and writes may find the disk full later. Costs one write of the whole file,
    /// once. Default false.
    pub zero_fill: bool,
    /// Bound on each request while opening. Default 30 s.
    pub open_time: Duration,
    /// How long an owner of the file is waited for that has not let go of it yet: in a folder only one that
    /// was killed or is ending, otherwise any. Default 3 s.
    pub lock_time: Duration,
}

impl SlotStoreConfig {
    /// A store with all defaults.
    #[must_use]
    pub const fn new(
        location: StoreLocation,
        slots: u32,
        block_bytes: u64,
        fingerprint: Fingerprint,
    ) -> Self {
        Self {
            location,
            slots,
            block_bytes,
            fingerprint,
            direct: DirectIo::Auto,
            open_direct: false,
            zero_fill: false,
            open_time: Duration::from_secs(30),
            lock_time: Duration::from_secs(3),
        }
    }
}

/// Why a store could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A value is out of range.
    #[error("{field} of a KV store is {got}; accepted: {accepted}")]
    InvalidConfig {
        /// The field.
        field: &'static str,
        /// The value given.
        got: u64,
        /// The values accepted.
        accepted: &'static str,
    },
    /// Another process, or another store of this process, has it open.
    #[error("KV store {path} is in use by {holder}")]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who has it, as far as the kernel says.
        holder: Holder,
    },
    /// All files of the folder are in use.
    #[error("all {FILES_PER_FOLDER} KV stores of this model and layout in {folder} are in use")]
    FolderInUse {
        /// The folder.
        folder: PathBuf,
    },
    /// There is a file, and it is no store.
    #[error(
        "{path} is not a KV store and is left as it is; accepted: a new or empty file, a store, or a \
         device that begins with 8192 zeros"
    )]
    NotAStore {
        /// The file.
        path: PathBuf,
    },
    /// It is a store with another format.
    #[error(
        "KV store {path} has format version {got}, this program reads version {accepted}; delete it \
         to begin anew"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        got: u32,
        /// Ours.
        accepted: u32,
    },
    /// It is a store of other blocks.
    #[error("KV store {path} holds blocks of {got}, wanted are {wanted}; delete it to begin anew")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it holds.
        got: String,
        /// What was asked for.
        wanted: String,
    },
    /// There is no room for a single block.
    #[error("no room for a KV store at {path}: {bytes} bytes, at least {needed} are needed")]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// What there is.
        bytes: u64,
        /// Bytes of a store with one slot.
        needed: u64,
    },
    /// The system refused.
    #[error("cannot {what} KV store {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file could not be opened for transfers.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The first reads or writes failed.
    #[error("cannot {what} KV store {path}: {reason}")]
    Disk {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

/// Who holds the lock of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The process with this id.
    Process(u32),
    /// A process that cannot be seen from here.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(id) => write!(f, "process {id}"),
            Self::Unknown => f.write_str("another process"),
        }
    }
}

/// What a store is good for at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreHealth {
    /// Everything.
    On,
    /// It has fewer slots than asked for: so many are missing, or were lost to a full disk or bad
    /// media.
    Shrunk {
        /// Slots that are missing.
        lost: u32,
        /// Why the last of them was lost.
        reason: String,
    },
    /// Blocks are read, none is written any more.
    ReadOnly {
        /// Why.
        reason: String,
    },
    /// Nothing any more.
    Off {
        /// Why.
        reason: String,
    },
}

/// What a store has done to its disk. Kept in the store: it counts over all its lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WearRecord {
    /// Bytes given to the device, headers included. After a crash those of the last minutes are
    /// computed from the number of blocks written.
    pub bytes_written: u64,
    /// Blocks written.
    pub blocks_written: u64,
    /// How often it was opened.
    pub opens: u64,
    /// When it was made, seconds since the epoch of Unix.
    pub since: u64,
}

/// What was found when a store was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// It had been there before.
    pub existed: bool,
    /// It had been closed, not killed.
    pub clean: bool,
    /// Slots with a block.
    pub blocks: u32,
    /// Slots that were being overwritten when the last life ended: empty now.
    pub interrupted: u32,
    /// Slots with a block that a newer one has as well.
    pub duplicates: u32,
    /// Slots in quarantine.
    pub quarantined: u32,
    /// Slots whose header is damaged or unreadable: empty now.
    pub damaged: u32,
}
