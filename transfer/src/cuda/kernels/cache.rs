//! Images of kernels on disk, so that only the first start compiles.
//!
//! One file per image, named by everything that it was made from. A file that is torn, foreign or
//! made from something else is not used but replaced. Processes may share a folder: files appear
//! whole, by renaming, and whoever comes last wins with the same bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::nvrtc::IMAGE_BYTES_MAX;

const MAGIC: [u8; 8] = *b"BPKERNEL";
const VERSION: u32 = 1;
/// Magic, version, checksum of the image, its length, and what it was made from.
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + 16;
/// What a process that was killed while it wrote has left is removed when it is this old.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);
/// Files kept in a folder; the oldest go.
const FILES_MAX: usize = 32;
const EXTENSION: &str = "bpkernel";

/// Stands for everything that an image was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key(u128);

impl Key {
    /// Of the parts in this order.
    pub(super) fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for part in parts {
            // The length first, so that no two lists of parts look the same.
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self(hasher.digest128())
    }
}

/// Where the image of `key` is in `folder`; `label` is for the reader of the listing.
pub(super) fn path(folder: &Path, label: &str, key: Key) -> PathBuf {
    folder.join(format!("{label}-{:032x}.{EXTENSION}", key.0))
}

/// The image in a file; none when there is no file, and an error that says what is wrong with one
/// that cannot be used.
pub(super) fn load(path: &Path, key: Key) -> io::Result<Option<Vec<u8>>> {
    let whole = HEADER_BYTES + IMAGE_BYTES_MAX;
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => return Err(wrong("not a file")),
        Ok(found) if found.len() > whole as u64 => return Err(wrong("too long")),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut bytes = Vec::new();
    File::open(path)?
        .take(whole as u64)
        .read_to_end(&mut bytes)?;
    let Some((header, image)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(wrong("cut off in the header"));
    };
    if header[..8] != MAGIC {
        return Err(wrong("of another format"));
    }
    if header[8..12] != VERSION.to_le_bytes() {
        return Err(wrong("of another version"));
    }
    if header[24..] != key.0.to_le_bytes() {
        return Err(wrong("made from something else"));
    }
    if header[16..24] != (image.len() as u64).to_le_bytes() {
        return Err(wrong("of another length than it says"));
    }
    if header[12..16] != crc32c::crc32c(image).to_le_bytes() {
        return Err(wrong("damaged"));
    }
    let image = image.to_vec();
    Ok(Some(image))
}

/// Writes the image of `key`, in place of whatever is there.
pub(super) fn store(path: &Path, key: Key, image: &[u8]) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(folder)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.{number}.new", std::process::id()));
    let new = folder.join(name);

    let mut file = OpenOptions::new().write(true).create_new(true).open(&new)?;
    let written = (|| {
        file.write_all(&MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        file.write_all(&crc32c::crc32c(image).to_le_bytes())?;
        file.write_all(&(image.len() as u64).to_le_bytes())?;
        file.write_all(&key.0.to_le_bytes())?;
        file.write_all(image)?;
        fs::rename(&new, path)
    })();
    if written.is_err() {
        // Best effort: the first error is the one to report.
        drop(fs::remove_file(&new));
    }
    written?;
    prune(folder, path)
}

/// Removes the oldest images beyond the limit, never `keep`, and what was left behind.
fn prune(folder: &Path, keep: &Path) -> io::Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if is_unfinished(&path) {
            let age = entry.metadata().and_then(|found| found.modified());
            if age.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > LEFT_BEHIND)) {
                remove(&path)?;
            }
        }
        if path
            .extension()
            .is_some_and(|extension| extension == EXTENSION)
            && path != keep
        {
            // Another process may have removed it by now.
            if let Ok(found) = entry.metadata() {
                files.push((found.modified()?, path));
            }
        }
    }
    files.sort();
    let beyond = (files.len() + 1).saturating_sub(FILES_MAX);
    for (_, path) in &files[..beyond] {
        remove(path)?;
    }
    Ok(())
}

fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.ends_with(".new") && name.contains(&format!(".{EXTENSION}.")))
}

/// Another process may have removed it by now.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn wrong(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Key {
        Key::of([text.as_bytes()])
    }

    #[test]
    fn what_was_stored_is_found() {
        let folder = tempfile::tempdir().unwrap();
        // The folder is made when it is missing.
        let below = folder.path().join("a/b");
        let at = path(&below, "sm_90", key("one"));
        assert!(load(&at, key("one")).unwrap().is_none());
        store(&at, key("one"), b"image").unwrap();
        assert_eq!(load(&at, key("one")).unwrap().unwrap(), b"image");
        store(&at, key("one"), b"other").unwrap();
        assert_eq!(load(&at, key("one")).unwrap().unwrap(), b"other");
        assert_eq!(
            fs::read_dir(&below).unwrap().count(),
            1,
            "nothing left over"
        );
    }

    #[test]
    fn another_source_has_another_name_and_its_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (key("one"), key("two"));
        let at = path(folder.path(), "sm_90", one);
        assert_ne!(at, path(folder.path(), "sm_90", two));
        store(&at, one, b"image").unwrap();
        fs::rename(&at, path(folder.path(), "sm_90", two)).unwrap();
        let error = load(&path(folder.path(), "sm_90", two), two).unwrap_err();
        assert_eq!(error.to_string(), "made from something else");
        // Where one part ends and the next begins counts.
        assert_ne!(Key::of([&b"ab"[..], b"c"]), Key::of([&b"a"[..], b"bc"]));
    }

    #[test]
    fn no_damaged_byte_and_no_torn_file_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let at = path(folder.path(), "sm_90", key("one"));
        let image: Vec<u8> = (0..200).collect();
        store(&at, key("one"), &image).unwrap();
        let whole = fs::read(&at).unwrap();
        for length in 0..whole.len() {
            fs::write(&at, &whole[..length]).unwrap();
            assert!(load(&at, key("one")).is_err(), "{length} bytes");
        }
        for byte in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[byte] ^= 0x10;
            fs::write(&at, &damaged).unwrap();
            assert!(load(&at, key("one")).is_err(), "byte {byte}");
        }
        let mut longer = whole;
        longer.push(0);
        fs::write(&at, &longer).unwrap();
        assert!(load(&at, key("one")).is_err());
        fs::remove_file(&at).unwrap();
        fs::create_dir(&at).unwrap();
        assert_eq!(load(&at, key("one")).unwrap_err().to_string(), "not a file");
    }

    #[test]
    fn readers_among_writers_see_whole_files() {
        let folder = tempfile::tempdir().unwrap();
        let at = path(folder.path(), "sm_90", key("one"));
        let image = vec![7; 300_000];
        store(&at, key("one"), &image).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        store(&at, key("one"), &image).unwrap();
                        assert_eq!(load(&at, key("one")).unwrap().unwrap(), image);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_keeps_the_newest_images() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("notes.txt"), "not ours").unwrap();
        let fresh = folder.path().join("sm_90-00.bpkernel.77.0.new");
        fs::write(&fresh, "somebody is writing this").unwrap();
        let left = folder.path().join("sm_90-00.bpkernel.78.0.new");
        fs::write(&left, "nobody is writing this").unwrap();
        let long_ago = SystemTime::now() - 2 * LEFT_BEHIND;
        File::options()
            .write(true)
            .open(&left)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        for number in 0..FILES_MAX + 3 {
            let key = key(&number.to_string());
            let at = path(folder.path(), "sm_90", key);
            store(&at, key, b"image").unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(number as u64);
            File::options()
                .write(true)
                .open(&at)
                .unwrap()
                .set_modified(time)
                .unwrap();
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), FILES_MAX + 2);
        assert!(fresh.exists() && !left.exists());
        let there = |number: usize| {
            let key = key(&number.to_string());
            load(&path(folder.path(), "sm_90", key), key)
                .unwrap()
                .is_some()
        };
        assert!(!there(0) && !there(2));
        assert!(there(3) && there(FILES_MAX + 2));
    }
}
