//! What the checks of the settings have to know of this machine.

use std::{
    ffi::OsStr,
    fs,
    io::{Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Access, access, statfs, statvfs},
    process::{Resource, getrlimit},
};

use crate::settings::{Folder, HostFacts, KvbmSettings};

/// `tmpfs` and `ramfs` in `statfs`.
const MEMORY_FILE_SYSTEMS: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Looks at this machine. `pinned`: host memory is going to be pinned for a device; `device_blocks`: the
/// blocks of the engine's own pools, if they are known.
#[must_use]
pub fn facts(settings: &KvbmSettings, pinned: bool, device_blocks: Option<u32>) -> HostFacts {
    let folder = &settings.disk_cache_dir.value;
    // What the folder will be on, if it is not there yet.
    let existing = folder.ancestors().find(|path| path.exists());
    let existing = existing.unwrap_or_else(|| Path::new("."));
    // File systems without a size of their own say 0.
    let space = statvfs(existing).ok().filter(|space| space.f_blocks > 0);
    HostFacts {
        memory_available: memory_available(Path::new("/proc")),
        memory_limit_left: memory_limit_left(Path::new("/proc"), Path::new("/sys/fs/cgroup")),
        memlock: getrlimit(Resource::Memlock).current,
        pinned,
        device_blocks,
        folder: folder_state(folder),
        folder_free: space.map(|space| space.f_bavail.saturating_mul(space.f_frsize)),
        folder_reusable: reusable(folder),
        folder_volatile: statfs(existing).is_ok_and(|info| {
            u64::try_from(info.f_type).is_ok_and(|kind| MEMORY_FILE_SYSTEMS.contains(&kind))
        }),
        device: settings.disk_device.value.as_deref().map(device_bytes),
    }
}

fn memory_available(proc: &Path) -> Option<u64> {
    let text = fs::read_to_string(proc.join("meminfo")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// What is left below the lowest limit of this process's control group and those around it. Pages of
/// files that nobody uses count as left.
fn memory_limit_left(proc: &Path, root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(proc.join("self/cgroup")).ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let folder = root.join(group.trim_start_matches('/'));
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let groups = folder.ancestors().take_while(|path| path.starts_with(root));
    let left = groups.filter_map(|group| {
        // "max" is no number: no limit.
        let limit = number(group.join("memory.max"))?;
        let used = number(group.join("memory.current"))?;
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let idle = stat
            .lines()
            .find_map(|line| line.strip_prefix("inactive_file "));
        let idle = idle
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(idle)))
    });
    left.min()
}

fn folder_state(folder: &Path) -> Folder {
    match fs::metadata(folder) {
        Ok(found) if !found.is_dir() => Folder::Unusable("it is not a directory".to_owned()),
        Ok(_) => match access(folder, Access::WRITE_OK | Access::EXEC_OK) {
            Ok(()) => Folder::Writable,
            Err(error) => Folder::Unusable(error.to_string()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let above = folder.ancestors().skip(1).find(|path| path.exists());
            match above.map(folder_state) {
                Some(Folder::Unusable(why)) => {
                    Folder::Unusable(format!("it cannot be made: {why}"))
                }
                Some(Folder::Writable | Folder::Absent) | None => Folder::Absent,
            }
        }
        Err(error) => Folder::Unusable(error.to_string()),
    }
}

/// Bytes that files of earlier runs have.
fn reusable(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    let ours = entries.flatten().filter(|entry| {
        let path = entry.path();
        path.extension() == Some(OsStr::new("g3"))
            && entry.file_name().to_string_lossy().starts_with("kv-v")
    });
    ours.filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512))
        .sum()
}

fn device_bytes(path: &Path) -> Result<u64, String> {
    use std::os::unix::fs::FileTypeExt;
    let kind = fs::metadata(path)
        .map_err(|error| error.to_string())?
        .file_type();
    if !kind.is_block_device() {
        return Err("it is not a block device".to_owned());
    }
    let mut device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| error.to_string())?;
    device
        .seek(SeekFrom::End(0))
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_counts_and_idle_pages_do_not() {
        let root = tempfile::tempdir().unwrap();
        let (proc, groups) = (root.path().join("proc"), root.path().join("cgroup"));
        let leaf = groups.join("a/b");
        fs::create_dir_all(proc.join("self")).unwrap();
        fs::create_dir_all(&leaf).unwrap();
        fs::write(proc.join("self/cgroup"), "0::/a/b\n").unwrap();
        fs::write(
            proc.join("meminfo"),
            "MemTotal: 9 kB\nMemAvailable:       4 kB\n",
        )
        .unwrap();
        fs::write(leaf.join("memory.max"), "max\n").unwrap();
        fs::write(leaf.join("memory.current"), "5\n").unwrap();
        assert_eq!(memory_limit_left(&proc, &groups), None);
        fs::write(groups.join("a/memory.max"), "1000\n").unwrap();
        fs::write(groups.join("a/memory.current"), "600\n").unwrap();
        fs::write(groups.join("a/memory.stat"), "anon 500\ninactive_file 50\n").unwrap();
        assert_eq!(memory_limit_left(&proc, &groups), Some(450));
        assert_eq!(memory_available(&proc), Some(4096));
    }

    #[test]
    fn folders_are_writable_absent_or_of_no_use() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(folder_state(root.path()), Folder::Writable);
        assert_eq!(folder_state(&root.path().join("a/b")), Folder::Absent);
        let file = root.path().join("kv-v1-00-0.g3");
        fs::write(&file, [1; 8192]).unwrap();
        assert!(matches!(folder_state(&file), Folder::Unusable(_)));
        assert!(matches!(folder_state(&file.join("x")), Folder::Unusable(_)));
        fs::write(root.path().join("other"), [1; 8192]).unwrap();
        assert_eq!(
            reusable(root.path()),
            fs::metadata(&file).unwrap().blocks() * 512
        );
        assert!(
            device_bytes(&file)
                .unwrap_err()
                .contains("not a block device")
        );
    }
}
