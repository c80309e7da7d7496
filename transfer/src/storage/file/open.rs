//! Opening files: descriptors around and through the page cache, and what the device demands.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};

use super::super::config::{
    DirectIo, DirectUse, FileAccess, FileConfig, FileCreation, FileInfo, FileSource,
};
use super::super::error::{OpenError, StorageAction, StorageError, StorageErrorKind};
use super::engine::Engine;
use super::plan::Via;

/// Used where the file system does not say what direct requests have to be aligned to; no device
/// demands more than a page.
const SAFE_ALIGN: u32 = 4096;

/// File systems in memory: a page cache is all they have.
const MEMORY_FILE_SYSTEMS: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Tells open files of this process apart.
static FILES: AtomicU64 = AtomicU64::new(1);

/// An open file. Operations on it share it.
#[derive(Debug)]
pub(crate) struct StoredFile {
    pub(crate) id: u64,
    name: String,
    /// Through the page cache.
    buffered: OwnedFd,
    /// Around it.
    direct: Option<OwnedFd>,
    direct_use: DirectUse,
    read_only: bool,
    engine: Arc<Engine>,
}

impl Drop for StoredFile {
    fn drop(&mut self) {
        self.engine.forget_file(self.id);
    }
}

impl StoredFile {
    pub(super) fn open(config: FileConfig, engine: Arc<Engine>) -> Result<Self, OpenError> {
        let name = match &config.source {
            FileSource::Path(path) => path.display().to_string(),
            FileSource::Descriptor(fd) => descriptor_name(fd),
        };
        let io = |what: &'static str, name: &str| {
            let name = name.to_owned();
            move |error: rustix::io::Errno| OpenError::Io {
                what,
                name,
                source: error.into(),
            }
        };
        if config.preallocate && config.length.is_none() {
            return Err(OpenError::InvalidConfig {
                field: "preallocate",
                got: "true without a length".to_owned(),
                accepted: "true together with `length`",
            });
        }
        let read_only = config.access == FileAccess::ReadOnly;
        let access = if read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        } | OFlags::CLOEXEC;
        let buffered = match config.source {
            FileSource::Path(path) => {
                let creation = match config.creation {
                    FileCreation::Existing => OFlags::empty(),
                    FileCreation::IfMissing => OFlags::CREATE,
                    FileCreation::New => OFlags::CREATE | OFlags::EXCL,
                };
                // Not waiting: the other end of a pipe could be missing.
                let flags = access | creation | OFlags::NONBLOCK;
                open(&path, flags).map_err(io("open", &name))?
            }
            FileSource::Descriptor(fd) => {
                let flags = rustix::fs::fcntl_getfl(&fd).map_err(io("use", &name))?;
                if !read_only && flags & OFlags::RWMODE == OFlags::RDONLY {
                    return Err(OpenError::DescriptorIsReadOnly { name });
                }
                reopen(fd.as_fd(), access).map_err(io("open again", &name))?
            }
        };
        check_type(&buffered, &name)?;
        if let Some(length) = config.length {
            extend(&buffered, length, config.preallocate).map_err(io("extend", &name))?;
        }
        let (direct, direct_use) = match config.direct {
            DirectIo::Off => (None, DirectUse::Buffered("asked for".to_owned())),
            DirectIo::On => {
                let direct = reopen(buffered.as_fd(), access | OFlags::DIRECT)
                    .map_err(io("open with O_DIRECT", &name))?;
                let align = alignment(&direct).unwrap_or((SAFE_ALIGN, SAFE_ALIGN));
                (Some(direct), direct_with(align))
            }
            DirectIo::Auto => try_direct(&buffered, access),
        };
        Ok(Self {
            id: FILES.fetch_add(1, Ordering::Relaxed),
            name,
            buffered,
            direct,
            direct_use,
            read_only,
            engine,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) const fn direct_use(&self) -> &DirectUse {
        &self.direct_use
    }

    pub(crate) const fn read_only(&self) -> bool {
        self.read_only
    }

    /// Alignment of direct requests in the file.
    pub(crate) const fn offset_align(&self) -> u32 {
        match self.direct_use {
            DirectUse::Direct { offset_align, .. } => offset_align,
            DirectUse::Buffered(_) => 1,
        }
    }

    pub(crate) fn fd(&self, via: Via) -> RawFd {
        match (via, &self.direct) {
            (Via::Direct, Some(direct)) => direct.as_raw_fd(),
            (Via::Direct, None) | (Via::Buffered, _) => self.buffered.as_raw_fd(),
        }
    }

    pub(super) fn query(&self) -> Result<FileInfo, StorageError> {
        let failed = |errno: rustix::io::Errno| StorageError {
            action: StorageAction::Query,
            store: self.name.clone(),
            offset: 0,
            kind: StorageErrorKind::of_errno(errno.raw_os_error()),
        };
        let stat = rustix::fs::statx(
            &self.buffered,
            "",
            AtFlags::EMPTY_PATH,
            StatxFlags::BASIC_STATS,
        )
        .map_err(failed)?;
        let length = if FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::BlockDevice {
            rustix::fs::seek(&self.buffered, rustix::fs::SeekFrom::End(0)).map_err(failed)?
        } else {
            stat.stx_size
        };
        let modified = stat.stx_mtime;
        Ok(FileInfo {
            length,
            allocated: stat.stx_blocks * 512,
            read_only: self.read_only,
            direct: self.direct_use.clone(),
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            modified: Duration::new(
                u64::try_from(modified.tv_sec).unwrap_or(0),
                modified.tv_nsec,
            ),
        })
    }
}

fn descriptor_name(fd: &OwnedFd) -> String {
    let number = fd.as_raw_fd();
    match std::fs::read_link(format!("/proc/self/fd/{number}")) {
        Ok(path) => format!("{} (descriptor {number})", path.display()),
        Err(_) => format!("descriptor {number}"),
    }
}

fn open(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
}

/// A second descriptor of the same file, with flags of its own.
fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    open(Path::new(&path), flags)
}

fn check_type(fd: &OwnedFd, name: &str) -> Result<(), OpenError> {
    let stat = rustix::fs::fstat(fd).map_err(|error| OpenError::Io {
        what: "look at",
        name: name.to_owned(),
        source: error.into(),
    })?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => return Ok(()),
        FileType::Directory => "directory",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::Symlink | FileType::Unknown => "thing of another kind",
    };
    Err(OpenError::NotAFile {
        name: name.to_owned(),
        kind,
    })
}

/// Gives the file at least `length` bytes; a device has the length that it has.
fn extend(fd: &OwnedFd, length: u64, allocate: bool) -> rustix::io::Result<()> {
    let stat = rustix::fs::fstat(fd)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        return Ok(());
    }
    if u64::try_from(stat.st_size).unwrap_or(0) < length {
        rustix::fs::ftruncate(fd, length)?;
    }
    if allocate && length > 0 {
        rustix::fs::fallocate(fd, rustix::fs::FallocateFlags::empty(), 0, length)?;
    }
    Ok(())
}

const fn direct_with((memory_align, offset_align): (u32, u32)) -> DirectUse {
    DirectUse::Direct {
        memory_align,
        offset_align,
    }
}

fn try_direct(buffered: &OwnedFd, access: OFlags) -> (Option<OwnedFd>, DirectUse) {
    let in_memory = rustix::fs::fstatfs(buffered).is_ok_and(|fs| {
        u64::try_from(fs.f_type).is_ok_and(|kind| MEMORY_FILE_SYSTEMS.contains(&kind))
    });
    if in_memory {
        let why = "the file system is in memory".to_owned();
        return (None, DirectUse::Buffered(why));
    }
    match reopen(buffered.as_fd(), access | OFlags::DIRECT) {
        Ok(direct) => match alignment(&direct) {
            // The file system says that it would not do direct requests for this file.
            Some((0, _) | (_, 0)) => {
                let why = "the file system does not do direct requests for this file".to_owned();
                (None, DirectUse::Buffered(why))
            }
            Some(align) => (Some(direct), direct_with(align)),
            None => (Some(direct), direct_with((SAFE_ALIGN, SAFE_ALIGN))),
        },
        Err(error) => {
            let error = io::Error::from(error);
            let why = format!("opening with O_DIRECT: {error}");
            (None, DirectUse::Buffered(why))
        }
    }
}

/// What the file system says about direct requests (Linux 6.1 and later).
fn alignment(fd: &OwnedFd) -> Option<(u32, u32)> {
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    (stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}
