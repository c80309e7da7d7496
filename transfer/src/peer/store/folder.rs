//! A store in a folder, perhaps on a shared file system: one file per key.
//!
//! The name of a file is its key with all bytes but letters, digits, `-` and `_` as `%xx`, and
//! `.entry`. Its content: `"BPKV"`, the end of its time in milliseconds since 1970 (u64, 0 without
//! end), the value.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{MetadataStore, StoreError};
use crate::peer::codec::{Reader, Writer};
use crate::peer::file::{read_bounded, write_atomically};

const MAGIC: &[u8; 4] = b"BPKV";
const SUFFIX: &str = ".entry";
/// Longest file name that every file system takes, less room for the name of a draft.
const NAME_BYTES_MAX: usize = 200;

/// A folder with one file per key. Processes and hosts that share the folder share the store;
/// times to live compare clocks of hosts.
#[derive(Clone, Debug)]
pub struct FolderStore {
    folder: PathBuf,
}

impl FolderStore {
    /// A store in `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(folder: impl AsRef<Path>) -> io::Result<Self> {
        let folder = folder.as_ref().to_owned();
        std::fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    fn path(&self, what: &'static str, key: &str) -> Result<PathBuf, StoreError> {
        let mut name = String::with_capacity(key.len() + SUFFIX.len());
        for byte in key.bytes() {
            if byte.is_ascii_alphanumeric() || b"-_".contains(&byte) {
                name.push(char::from(byte));
            } else {
                name.push_str(&format!("%{byte:02x}"));
            }
        }
        if name.len() > NAME_BYTES_MAX || name.is_empty() {
            let reason = format!("a file name of {} bytes; accepted: 1 to 200", name.len());
            return Err(StoreError::new(what, key, reason));
        }
        name.push_str(SUFFIX);
        Ok(self.folder.join(name))
    }

    /// The value in a file; `None` when there is no file or its time is over.
    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        let bytes = match read_bounded(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut reader = Reader::new(&bytes);
        let damaged = |_| io::Error::new(io::ErrorKind::InvalidData, "not an entry of a store");
        let magic = reader.take(4).map_err(damaged)?;
        let until = reader.u64().map_err(damaged)?;
        if magic != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not an entry of a store",
            ));
        }
        if until != 0 && until <= millis_now() {
            return Ok(None);
        }
        let rest = reader.remaining();
        Ok(reader.take(rest).ok().map(<[u8]>::to_vec))
    }
}

fn millis_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// The key of a file name, `None` for files that are not entries.
fn key_of(name: &str) -> Option<String> {
    let mut rest = name.strip_suffix(SUFFIX)?.as_bytes();
    let mut key = Vec::with_capacity(rest.len());
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            let digits = std::str::from_utf8(digits).ok()?;
            key.push(u8::from_str_radix(digits, 16).ok()?);
            rest = after;
        } else {
            key.push(first);
        }
    }
    String::from_utf8(key).ok()
}

impl MetadataStore for FolderStore {
    fn put(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<(), StoreError> {
        let path = self.path("write", key)?;
        let until = ttl.map_or(0, |ttl| {
            let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
            millis_now().saturating_add(ttl).max(1)
        });
        let mut entry = Writer::default();
        entry.bytes.extend_from_slice(MAGIC);
        entry.u64(until);
        entry.bytes.extend_from_slice(value);
        write_atomically(&path, &entry.bytes).map_err(|e| StoreError::new("write", key, e))
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path("read", key)?;
        self.read(&path)
            .map_err(|e| StoreError::new("read", key, e))
    }

    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let path = self.path("delete", key)?;
        // What is damaged is there and goes.
        let there = self.read(&path).map_or(true, |value| value.is_some());
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(there),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StoreError::new("delete", key, error)),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let cannot = |error| StoreError::new("list", prefix, error);
        let mut keys = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(cannot)? {
            let name = entry.map_err(cannot)?.file_name();
            let key = name.to_str().and_then(key_of);
            let Some(key) = key.filter(|key| key.starts_with(prefix)) else {
                continue;
            };
            // Damaged entries are listed: reading them says what is wrong.
            if self
                .read(&self.folder.join(&name))
                .map_or(true, |value| value.is_some())
            {
                keys.push(key);
            }
        }
        keys.sort_unstable();
        Ok(keys)
    }
}
