//! G3: a store of blocks in one file or on one block device that survives crashes and restarts.
//!
//! The store has fixed slots; which block goes into which slot, and which is overwritten, is decided by
//! the books (a [`BlockPool`](crate::BlockPool) whose block ids are slot numbers). The store's own
//! promise is small: [`SlotStore::read`] either puts the bytes into memory that were written under
//! that name, or says that it did not. It keeps it whatever happened to the process, the machine or
//! the disk in between, because every read is checked against a checksum that binds the bytes to
//! their name, generation and [`Fingerprint`](crate::Fingerprint).
//!
//! Writes are not forced out one by one: KV is a cache. After `kill -9` of the process everything that
//! [`SlotStore::write`] reported is there; after a power loss everything before the last
//! [`SlotStore::flush`], and of the rest whatever reached the disk whole.
//!
//! docs/kv-store.md describes the format byte by byte, and the recovery.

mod batch;
mod config;
#[cfg(test)]
mod crash;
mod disk;
mod format;
mod health;
mod hold;
mod locate;
mod read;
mod recover;
mod report;
#[cfg(test)]
mod sim;
mod slots;
mod write;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use blockplane_transfer::{Agent, Op, Registration};
use parking_lot::Mutex;

pub use config::{
    FILES_PER_FOLDER, Holder, Recovery, SlotStoreConfig, StoreError, StoreHealth, StoreLocation,
    WearRecord,
};
pub use format::file_bytes;
pub use report::{
    BlockOutcome, Invalid, Pending, RecoveredSlot, SlotRead, SlotWrite, StoreMemory, StoreReport,
};

use self::{
    disk::{Disk, DiskError, Piece},
    format::{Geometry, PAGE, PAGE_BYTES, Page, Superblock},
    health::Health,
    hold::{Lanes, Pages},
    locate::{Fate, Lock},
    recover::{Contents, Plan, Wanted},
    slots::Slots,
};

/// Slots of one batch.
const BATCH: usize = 32;
/// Batches of writes under way at a time; each has 132 KiB of scratch memory.
const LANES: u32 = 16;

/// An open store. All calls block, and any number of threads may make them.
pub struct SlotStore {
    core: Arc<Core>,
    recovery: Recovery,
}

/// What batches that outlive their call still need.
struct Core {
    disk: Box<dyn Disk>,
    path: PathBuf,
    geometry: Geometry,
    capacity: u32,
    /// Of this store: see [`Superblock::id`].
    id: u64,
    /// Digest.
    fingerprint: u64,
    slots: Slots,
    lanes: Lanes,
    pages: Pages,
    scratch: Registration,
    health: Health,
    /// Slots whose contents are unknown, with the generation that they were to have.
    unsettled: Mutex<BTreeMap<u32, u64>>,
    /// Slots in quarantine that are not written down as such.
    to_mark: Mutex<BTreeSet<u32>>,
    /// The newest on the disk.
    superblock: Mutex<Superblock>,
    generation: AtomicU64,
    bytes_written: AtomicU64,
    invalid: AtomicU64,
    /// Keeps other processes out, also while requests of a closed store hang.
    lock: Option<Lock>,
}

impl SlotStore {
    /// Opens a store, or makes it. Beside it comes what is in it, parents before children and older
    /// blocks before newer ones. Recovery reads 128 bytes a slot and no payload.
    ///
    /// # Errors
    /// The configuration makes no sense, another process has the store open, it is of another kind, or
    /// there is no room for a single block.
    pub fn open(
        agent: &Agent,
        config: &SlotStoreConfig,
    ) -> Result<(Arc<Self>, Vec<RecoveredSlot>), StoreError> {
        let invalid = |field, got, accepted| StoreError::InvalidConfig {
            field,
            got,
            accepted,
        };
        if config.slots == 0 {
            return Err(invalid("number of slots", 0, "at least 1"));
        }
        let geometry = Geometry::new(config.slots, config.block_bytes);
        let accepted = "at least 1, and all slots together less than 2^63 bytes";
        let geometry =
            geometry.ok_or_else(|| invalid("bytes of a block", config.block_bytes, accepted))?;
        let located = locate::locate(config)?;
        let wanted = Wanted {
            fingerprint: config.fingerprint,
            geometry,
            owned: located.owned,
        };
        let time = config.open_time;
        let plan = recover::plan(&located.open(agent, config)?, &located.path, &wanted, time)?;
        let (geometry, slots) = match &plan {
            Plan::Fresh { .. } => (geometry, config.slots),
            Plan::Reopen(superblock) => {
                let found = superblock.geometry;
                (found, config.slots.min(found.slots))
            }
        };
        let disk = located.make_room(agent, config, &geometry, slots)?;
        locate::tell_direct(&located.path, &disk.file, config);
        let how = How {
            plan,
            geometry,
            slots,
            fingerprint: config.fingerprint,
            id: RandomState::new().hash_one(std::process::id()),
            now: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            read_only: located.read_only,
            time,
        };
        let lock = Some(located.lock);
        let (store, recovered) = Self::on(Box::new(disk), lock, &located.path, &how)?;
        Ok((Arc::new(store), recovered))
    }

    /// Opens a store on a disk that is as long as it is going to be.
    fn on(
        disk: Box<dyn Disk>,
        lock: Option<Lock>,
        path: &Path,
        how: &How,
    ) -> Result<(Self, Vec<RecoveredSlot>), StoreError> {
        let failed = |what| move |error: DiskError| recover::failed(what, path, &error);
        let length = disk.length().map_err(failed("look at"))?;
        let capacity = how.geometry.fits(length).min(how.slots);
        if capacity == 0 {
            return Err(StoreError::NoRoom {
                path: path.to_owned(),
                bytes: length,
                needed: how.geometry.length(1),
            });
        }
        let (superblock, contents) = match how.plan {
            Plan::Fresh { sequence } => {
                let superblock = Superblock {
                    sequence,
                    id: how.id,
                    geometry: how.geometry,
                    fingerprint: how.fingerprint,
                    clean: false,
                    generation: 1,
                    bytes_written: 0,
                    opens: 0,
                    since: how.now,
                };
                write_superblock(&*disk, &superblock, how.time).map_err(failed("begin"))?;
                let contents = Contents {
                    slots: Slots::new(capacity),
                    recovered: Vec::new(),
                    recovery: Recovery::default(),
                    unsettled: BTreeMap::new(),
                    generation: 1,
                };
                (superblock, contents)
            }
            Plan::Reopen(superblock) => {
                let contents = recover::contents(&*disk, path, &superblock, capacity, how.time)?;
                (superblock, contents)
            }
        };
        let scratch = LANES as usize * (1 + BATCH) * PAGE;
        let scratch = disk.memory(scratch).map_err(failed("get memory for"))?;
        // What was written since the superblock was, as far as generations tell.
        let since = contents.generation - superblock.generation;
        let bytes_written = superblock.bytes_written + since.saturating_mul(how.geometry.stride);
        let core = Core {
            disk,
            path: path.to_owned(),
            geometry: how.geometry,
            capacity,
            id: superblock.id,
            fingerprint: how.fingerprint.digest(),
            slots: contents.slots,
            lanes: Lanes::new(LANES),
            pages: Pages::default(),
            scratch,
            health: Health::new(path.to_owned()),
            unsettled: Mutex::new(contents.unsettled),
            to_mark: Mutex::default(),
            superblock: Mutex::new(superblock),
            generation: AtomicU64::new(contents.generation),
            bytes_written: AtomicU64::new(bytes_written),
            invalid: AtomicU64::new(0),
            lock,
        };
        if capacity < how.slots {
            let why = format!("there is room for {capacity} of {} slots", how.slots);
            core.health.lose(how.slots - capacity, &why);
        }
        if how.read_only {
            core.health
                .only_reads("it cannot be opened for writing".to_owned());
        } else if let Err(error) = core.remember(true, false, Instant::now() + how.time) {
            core.health.only_reads(error.message);
        }
        let recovery = contents.recovery;
        tracing::info!(store = %path.display(), capacity, ?recovery, "KV store is open");
        let store = Self {
            core: Arc::new(core),
            recovery,
        };
        Ok((store, contents.recovered))
    }

    /// Writes blocks. When it returns without [`pending`](StoreReport::pending), neither memory nor
    /// slots of blocks that failed are in use any more.
    ///
    /// A slot in quarantine is read back after it was written.
    pub fn write(
        &self,
        from: &StoreMemory<'_>,
        blocks: &[SlotWrite],
        deadline: Instant,
    ) -> StoreReport {
        write::write(&self.core, from, blocks, deadline)
    }

    /// Reads blocks and checks them. A slot whose bytes are not what was written goes into quarantine:
    /// the block has to be forgotten, the slot may be written again.
    pub fn read(
        &self,
        into: &StoreMemory<'_>,
        blocks: &[SlotRead],
        deadline: Instant,
    ) -> StoreReport {
        read::read(&self.core, into, blocks, deadline)
    }

    /// Makes everything durable that was written before: power may go now.
    ///
    /// # Errors
    /// The disk refuses, or does not answer in time.
    pub fn flush(&self, deadline: Instant) -> Result<(), StoreError> {
        self.write_down(false, deadline)
    }

    /// Flushes and notes that the store was closed properly. Nothing can be read or written
    /// afterwards.
    ///
    /// # Errors
    /// The disk refuses, or does not answer in time. The store is closed all the same; what was
    /// written is found again.
    pub fn close(&self, deadline: Instant) -> Result<(), StoreError> {
        let result = self.write_down(true, deadline);
        self.core.health.close();
        result
    }

    fn write_down(&self, clean: bool, deadline: Instant) -> Result<(), StoreError> {
        let core = &self.core;
        let what = if clean { "close" } else { "flush" };
        let failed = |error: DiskError| recover::failed(what, &core.path, &error);
        if let Some(reason) = core.health.no_writes() {
            return Err(failed(DiskError::other(reason)));
        }
        drop(read::mark_quarantined(core, deadline));
        let synced = core.disk.sync(deadline);
        synced
            .and_then(|flight| flight.finish(deadline))
            .map_err(failed)?;
        core.remember(false, clean, deadline).map_err(failed)
    }

    /// Slots that can be used: ids are `0..capacity()`. At most what was asked for; fewer when the file
    /// or the device is shorter.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.core.capacity
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.core.geometry.block_bytes
    }

    /// The file or device.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.core.path
    }

    /// What was found when it was opened.
    #[must_use]
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// What it is good for at this moment.
    #[must_use]
    pub fn health(&self) -> StoreHealth {
        self.core.health.now()
    }

    /// What it has done to its disk over all its lives.
    #[must_use]
    pub fn wear(&self) -> WearRecord {
        let superblock = self.core.superblock.lock();
        WearRecord {
            bytes_written: self.core.bytes_written.load(Ordering::Relaxed),
            blocks_written: self.core.generation.load(Ordering::Relaxed) - 1,
            opens: superblock.opens,
            since: superblock.since,
        }
    }

    /// Slots in quarantine. Looks at every slot.
    #[must_use]
    pub fn quarantined(&self) -> u32 {
        self.core.slots.quarantined()
    }

    /// Blocks read with a wrong checksum since it was opened.
    #[must_use]
    pub fn invalid(&self) -> u64 {
        self.core.invalid.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for SlotStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotStore")
            .field("path", &self.core.path)
            .field("capacity", &self.core.capacity)
            .field("block_bytes", &self.core.geometry.block_bytes)
            .field("health", &self.health())
            .finish_non_exhaustive()
    }
}

/// How a store is opened.
struct How {
    plan: Plan,
    geometry: Geometry,
    /// Asked for, at most those of the geometry.
    slots: u32,
    fingerprint: crate::Fingerprint,
    /// Of a new store.
    id: u64,
    /// Seconds since the epoch of Unix.
    now: u64,
    read_only: bool,
    time: Duration,
}

impl Core {
    fn payload_of(&self, slot: u32) -> u64 {
        self.geometry.payload_of(slot)
    }

    /// Looks whether somebody has removed the file or cut it.
    fn look_at_file(&self) {
        let length = self.geometry.length(self.capacity);
        let fate = self.lock.as_ref().map(|lock| lock.fate(length));
        match fate {
            None | Some(Fate::There) => {}
            Some(Fate::Removed) => self.health.only_reads(
                "its file was removed: what is in it is used until this process ends".to_owned(),
            ),
            Some(Fate::Cut(left)) => self
                .health
                .turn_off(format!("its file was cut to {left} of {length} bytes")),
        }
    }

    fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::Relaxed)
    }

    fn count_written(&self, pieces: &[Piece<'_>]) {
        let bytes = pieces.iter().map(|piece| piece.bytes).sum();
        self.bytes_written.fetch_add(bytes, Ordering::Relaxed);
    }

    fn count_invalid(&self) {
        self.invalid.fetch_add(1, Ordering::Relaxed);
    }

    fn scratch_read(&self, offset: u64, page: &mut Page) -> Result<(), DiskError> {
        let read = self.scratch.read_at(offset, page);
        read.map_err(DiskError::other)
    }

    fn scratch_write(&self, offset: u64, page: &Page) -> Result<(), DiskError> {
        let written = self.scratch.write_at(offset, page);
        written.map_err(DiskError::other)
    }

    /// Writes the counters into the older superblock. The newer one is durable, so that one of them is
    /// whole at any time.
    fn remember(&self, opened: bool, clean: bool, until: Instant) -> Result<(), DiskError> {
        let mut newest = self.superblock.lock();
        let superblock = Superblock {
            sequence: newest.sequence + 1,
            clean,
            generation: self.generation.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            opens: newest.opens + u64::from(opened),
            ..*newest
        };
        let time = until.saturating_duration_since(Instant::now());
        write_superblock(&*self.disk, &superblock, time)?;
        *newest = superblock;
        Ok(())
    }
}

/// Writes a superblock to its place and makes it durable.
fn write_superblock(
    disk: &dyn Disk,
    superblock: &Superblock,
    time: Duration,
) -> Result<(), DiskError> {
    let until = Instant::now() + time;
    let memory = disk.memory(PAGE)?;
    memory
        .write_at(0, &superblock.encode())
        .map_err(DiskError::other)?;
    let piece = Piece {
        memory: &memory,
        offset: 0,
        at: superblock.sequence % 2 * PAGE_BYTES,
        bytes: PAGE_BYTES,
    };
    disk.run(Op::Write, &[piece], until)?;
    disk.sync(until)?.finish(until)
}
