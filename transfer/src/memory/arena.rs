//! Arenas: sealed memory files, mapped here and by peers on this host.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::Advice;

use super::mapping::Mapping;
use super::region::HugePageUse;
use crate::config::HugePages;

const HUGE_PAGE_BYTES: usize = 2 << 20;
const SHMEM_POLICY: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// What an arena is made of. A failed step is named in the error.
pub(super) fn create(
    label: &str,
    bytes: usize,
    huge: HugePages,
) -> Result<(OwnedFd, Mapping, HugePageUse), (&'static str, io::Error)> {
    let require = huge == HugePages::Require;
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file_bytes = bytes;
    if require {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        file_bytes = bytes.next_multiple_of(HUGE_PAGE_BYTES);
    }
    let name = format!("blockplane:{label}");
    let fd = rustix::fs::memfd_create(name.as_str(), flags)
        .map_err(|e| ("create a memory file", e.into()))?;
    rustix::fs::ftruncate(&fd, file_bytes as u64)
        .map_err(|e| ("size the memory file", e.into()))?;
    // A peer that maps the file must be able to rely on its length.
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals).map_err(|e| ("seal the memory file", e.into()))?;
    let mapping =
        Mapping::shared(fd.as_fd(), file_bytes).map_err(|e| ("map the memory file", e))?;
    let used = match huge {
        HugePages::Never => HugePageUse::NotAsked,
        HugePages::Require => HugePageUse::Reserved,
        HugePages::Try => advise(&mapping),
    };
    Ok((fd, mapping, used))
}

/// A small sealed memory file in ordinary pages, for what agents of one host tell each other.
pub(crate) fn small_file(label: &str, bytes: usize) -> io::Result<(OwnedFd, Mapping)> {
    let (fd, mapping, _) = create(label, bytes, HugePages::Never)
        .map_err(|(what, error)| io::Error::new(error.kind(), format!("{what}: {error}")))?;
    Ok((fd, mapping))
}

/// Maps a peer's arena. The file comes from another process: it must be long enough and sealed
/// against shrinking, or touching it could kill this process.
pub(crate) fn map_arena(file: &OwnedFd, bytes: u64) -> io::Result<Mapping> {
    let seals = rustix::fs::fcntl_get_seals(file)?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(io::Error::other(
            "the memory file is not sealed against shrinking",
        ));
    }
    let size = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
    if bytes == 0 || size < bytes {
        return Err(io::Error::other(format!(
            "a memory file of {size} bytes for {bytes}"
        )));
    }
    // The whole file: huge pages are mapped as a whole.
    let bytes = usize::try_from(size).map_err(io::Error::other)?;
    let mapping = Mapping::shared(file.as_fd(), bytes)?;
    let _ = advise(&mapping);
    Ok(mapping)
}

/// Asks for transparent huge pages on the whole pages of ordinary memory. Pages that exist stay
/// what they are; a kernel that does not want to is not asked twice.
pub(crate) fn advise_huge_pages(base: NonNull<u8>, bytes: usize) {
    let page = rustix::param::page_size();
    let skip = base.as_ptr().align_offset(page).min(bytes);
    let whole = (bytes - skip) / page * page;
    if whole >= HUGE_PAGE_BYTES {
        let first = base.as_ptr().wrapping_add(skip);
        // SAFETY: whole pages inside memory that the caller owns; advice changes no contents.
        let _ = unsafe { rustix::mm::madvise(first.cast(), whole, Advice::LinuxHugepage) };
    }
}

/// Asks for transparent huge pages on a mapping of a memory file and says what comes of it.
fn advise(mapping: &Mapping) -> HugePageUse {
    let policy = std::fs::read_to_string(SHMEM_POLICY).unwrap_or_default();
    let selected = policy
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    let selected = selected.map_or("unknown", |(word, _)| word);
    // SAFETY: advice on exactly the mapped range; it changes no contents.
    let advised =
        unsafe { rustix::mm::madvise(mapping.as_void(), mapping.bytes(), Advice::LinuxHugepage) };
    match (advised, selected) {
        (Err(error), _) => HugePageUse::Unavailable(format!("madvise: {error}")),
        (Ok(()), "never" | "deny") => {
            HugePageUse::Unavailable(format!("{SHMEM_POLICY} is {selected:?}"))
        }
        (Ok(()), _) => HugePageUse::Advised,
    }
}
