//! The file or device of a store: found, locked, and as long as it has to be.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use blockplane_transfer::{Agent, DirectIo, DirectUse, FileConfig, FileStore, Op, OpenError};

use super::{
    config::{FILES_PER_FOLDER, Holder, SlotStoreConfig, StoreError, StoreLocation},
    disk::{Disk, FileDisk, Piece},
    format::{Geometry, VERSION},
    recover::failed,
};

/// How often a lock is tried again.
const LOOK: Duration = Duration::from_millis(20);
/// A process that is being killed may look alive for a moment.
const SURE: Duration = Duration::from_millis(200);
/// In the flags of a process (`PF_EXITING`): it ends.
const EXITING: u32 = 4;
/// In a mask of signals.
const SIGKILL: u64 = 1 << 8;

/// Zeros are written this many bytes at a time.
const ZEROS: u64 = 16 << 20;

/// A lock on a file, as long as this lives.
pub(super) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing would do, were there not for a moment a second descriptor in every process that is
        // being started.
        let _ = self.0.unlock();
    }
}

impl Lock {
    /// What became of a file that is at least `length` bytes long as long as nobody touches it.
    pub(super) fn fate(&self, length: u64) -> Fate {
        match self.0.metadata() {
            Ok(metadata) if !metadata.is_file() => Fate::There,
            Ok(metadata) if metadata.nlink() == 0 => Fate::Removed,
            Ok(metadata) if metadata.len() < length => Fate::Cut(metadata.len()),
            // Reading and writing say more.
            Ok(_) | Err(_) => Fate::There,
        }
    }
}

/// See [`Lock::fate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    There,
    /// It has no name any more.
    Removed,
    /// It has only so many bytes.
    Cut(u64),
}

/// A locked file.
pub(super) struct Located {
    pub(super) lock: Lock,
    pub(super) path: PathBuf,
    /// It is ours by its name.
    pub(super) owned: bool,
    pub(super) read_only: bool,
    device: bool,
}

/// Finds the file and locks it. An owner that is about to end is waited for.
pub(super) fn locate(config: &SlotStoreConfig) -> Result<Located, StoreError> {
    let until = Instant::now() + config.lock_time;
    match &config.location {
        StoreLocation::File(path) => open(path, Kind::Given, until),
        StoreLocation::Device(path) => open(path, Kind::Device, until),
        StoreLocation::Folder(folder) => {
            fs::create_dir_all(folder).map_err(|source| StoreError::Io {
                what: "make the folder of",
                path: folder.clone(),
                source,
            })?;
            let digest = config.fingerprint.digest();
            for number in 0..FILES_PER_FOLDER {
                let name = format!("kv-v{VERSION}-{digest:016x}-{number}.g3");
                match open(&folder.join(name), Kind::Numbered, until) {
                    Err(StoreError::InUse { path, holder }) => {
                        tracing::info!(store = %path.display(), %holder, "KV store is in use: the next number is tried");
                    }
                    result => return result,
                }
            }
            Err(StoreError::FolderInUse {
                folder: folder.clone(),
            })
        }
    }
}

/// How a file was named.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// By whoever configured it: nobody else has any business there.
    Given,
    /// The same, a block device.
    Device,
    /// By the fingerprint and a number: others that live have numbers of their own.
    Numbered,
}

fn open(path: &Path, kind: Kind, until: Instant) -> Result<Located, StoreError> {
    let device = kind == Kind::Device;
    let io = |what: &'static str| {
        let path = path.to_owned();
        move |source: io::Error| StoreError::Io { what, path, source }
    };
    let writable = OpenOptions::new()
        .read(true)
        .write(true)
        .create(!device)
        .truncate(false)
        .mode(0o600)
        .open(path);
    let (lock, read_only) = match writable {
        Ok(file) => (file, false),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
            ) && path.exists() =>
        {
            (File::open(path).map_err(io("open"))?, true)
        }
        Err(error) => return Err(io("open")(error)),
    };
    let begun = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) => {
                let holder = holder(&lock);
                // In a folder there are other numbers, so that only a dying owner is worth waiting for.
                let worth = kind != Kind::Numbered || ends(holder) || begun.elapsed() < SURE;
                if worth && Instant::now() < until {
                    thread::park_timeout(LOOK);
                    continue;
                }
                return Err(StoreError::InUse {
                    path: path.to_owned(),
                    holder,
                });
            }
            Err(TryLockError::Error(error)) => return Err(io("lock")(error)),
        }
    }
    Ok(Located {
        lock: Lock(lock),
        path: path.to_owned(),
        owned: kind == Kind::Numbered,
        read_only,
        device,
    })
}

/// Whether the holder has been killed, or ends for another reason, and has only not let go yet: its requests
/// to the device may take a moment.
fn ends(holder: Holder) -> bool {
    let Holder::Process(process) = holder else {
        return false;
    };
    let Ok(stat) = fs::read_to_string(format!("/proc/{process}/stat")) else {
        return true;
    };
    // "4711 (name) S ...": the state, and six words later the flags.
    let mut words = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace();
    let state = words.next().unwrap_or_default();
    let flags: u32 = words.nth(5).and_then(|word| word.parse().ok()).unwrap_or(0);
    let killed = || {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let pending = status.lines().filter_map(|line| {
            line.strip_prefix("ShdPnd:")
                .or_else(|| line.strip_prefix("SigPnd:"))
        });
        let mut masks = pending.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        masks.any(|mask| mask & SIGKILL != 0)
    };
    matches!(state, "Z" | "X") || flags & EXITING != 0 || killed()
}

/// Who has the lock, by the kernel's list.
fn holder(file: &File) -> Holder {
    let found = || {
        let inode = file.metadata().ok()?.ino().to_string();
        let locks = fs::read_to_string("/proc/locks").ok()?;
        locks.lines().find_map(|line| {
            // "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF"
            let mut words = line.split_whitespace().skip(1);
            let (kind, _, _) = (words.next()?, words.next()?, words.next()?);
            let (process, place) = (words.next()?, words.next()?);
            let here = kind == "FLOCK" && place.rsplit(':').next() == Some(&inode);
            // The kernel says 0 or -1 for a process that cannot be seen from here.
            let process = process.parse().ok().filter(|&process| process > 0);
            here.then_some(process)?
        })
    };
    found().map_or(Holder::Unknown, Holder::Process)
}

impl Located {
    /// The file as `transfer` opens it: as long as it is.
    pub(super) fn open(
        &self,
        agent: &Agent,
        config: &SlotStoreConfig,
    ) -> Result<FileDisk, StoreError> {
        let file = agent.open_file(self.config(config))?;
        Ok(self.disk(agent, file))
    }

    /// The file as `transfer` opens it, with room for `slots` slots of this geometry, or as many as
    /// there is room for.
    pub(super) fn make_room(
        &self,
        agent: &Agent,
        config: &SlotStoreConfig,
        geometry: &Geometry,
        slots: u32,
    ) -> Result<FileDisk, StoreError> {
        if self.device || self.read_only {
            return self.open(agent, config);
        }
        let had = self.length()?;
        let mut slots = slots;
        let file = loop {
            let length = geometry.length(slots);
            if had > length {
                self.cut(length)?;
            }
            let mut wanted = self.config(config);
            (wanted.length, wanted.preallocate) = (Some(length), true);
            let error = match agent.open_file(wanted) {
                Ok(file) => break file,
                Err(error) => error,
            };
            let OpenError::Io { source, .. } = &error else {
                return Err(error.into());
            };
            match source.kind() {
                io::ErrorKind::Unsupported => {
                    let mut wanted = self.config(config);
                    wanted.length = Some(length);
                    let disk = self.disk(agent, agent.open_file(wanted)?);
                    return self.fill(disk, config, geometry, had, length);
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded if slots > 1 => {
                    // What could not be had is given back before less is asked for.
                    self.cut(had.min(length))?;
                    slots -= slots.div_ceil(16);
                }
                _ => {
                    let _ = self.cut(had.min(length));
                    return Err(error.into());
                }
            }
        };
        Ok(self.disk(agent, file))
    }

    fn length(&self) -> Result<u64, StoreError> {
        let length = self.lock.0.metadata().map(|metadata| metadata.len());
        length.map_err(|source| self.io("look at", source))
    }

    fn cut(&self, length: u64) -> Result<(), StoreError> {
        let cut = self.lock.0.set_len(length);
        cut.map_err(|source| self.io("cut", source))
    }

    fn io(&self, what: &'static str, source: io::Error) -> StoreError {
        StoreError::Io {
            what,
            path: self.path.clone(),
            source,
        }
    }

    fn config(&self, config: &SlotStoreConfig) -> FileConfig {
        let direct = if config.open_direct {
            DirectIo::On
        } else {
            config.direct
        };
        let file = FileConfig::new(&self.path).with_direct(direct);
        if self.read_only {
            file.read_only()
        } else {
            file
        }
    }

    fn disk(&self, agent: &Agent, file: FileStore) -> FileDisk {
        FileDisk {
            agent: agent.clone(),
            file,
        }
    }

    /// The file system cannot allocate: zeros, or holes for the payloads. What all slots share is
    /// never a hole, so that a full disk costs the slots that have not been written yet and no others.
    fn fill(
        &self,
        disk: FileDisk,
        config: &SlotStoreConfig,
        geometry: &Geometry,
        had: u64,
        length: u64,
    ) -> Result<FileDisk, StoreError> {
        let end = if config.zero_fill {
            length
        } else {
            tracing::warn!(
                store = %self.path.display(),
                "the file system cannot allocate space: the KV store is sparse, and writes may find the \
                 disk full"
            );
            length.min(geometry.payload_of(0))
        };
        zeros(&disk, had, end, config.open_time)
            .map_err(|error| failed("fill", &self.path, &error))?;
        Ok(disk)
    }
}

/// Writes zeros from `from` to `to`.
fn zeros(
    disk: &dyn Disk,
    from: u64,
    to: u64,
    time: Duration,
) -> Result<(), super::disk::DiskError> {
    // New memory is all zeros.
    let memory = disk.memory(usize::try_from(ZEROS).unwrap_or(1 << 20))?;
    let mut at = from;
    while at < to {
        let bytes = (to - at).min(memory.len() as u64);
        let piece = Piece {
            memory: &memory,
            offset: 0,
            at,
            bytes,
        };
        disk.run(Op::Write, &[piece], Instant::now() + time)?;
        at += bytes;
    }
    Ok(())
}

/// One event when requests go through the page cache though they were not asked to.
pub(super) fn tell_direct(path: &Path, file: &FileStore, config: &SlotStoreConfig) {
    if let DirectUse::Buffered(reason) = file.direct()
        && config.direct != DirectIo::Off
    {
        tracing::warn!(store = %path.display(), %reason, "KV store goes through the page cache");
    }
}
