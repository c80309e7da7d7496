//! Operations on the directory. They block; only the store's thread calls them.

use std::{
    fs, io,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::record::{RECORD_BYTES_MAX, Record, temporary_name};

/// A directory with more files is not a discovery store.
const FILES_MAX: usize = 65_536;

/// An I/O error in a form that can be handed to several callers.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) action: &'static str,
    pub(super) kind: io::ErrorKind,
    pub(super) text: String,
}

impl Fault {
    fn new(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self {
            action,
            kind: error.kind(),
            text: error.to_string(),
        }
    }
}

/// What tells versions of a file apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) modified: SystemTime,
    inode: u64,
    len: u64,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) stamp: Stamp,
}

#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(super) const fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode; `None` when it is not there.
    pub(super) fn identity(&self) -> Option<(u64, u64)> {
        let metadata = fs::metadata(&self.path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    pub(super) fn list(&self) -> Result<Vec<Entry>, Fault> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(Fault::new("list"))? {
            let entry = entry.map_err(Fault::new("list"))?;
            // Names of the store's own files are ASCII, and a file may go while we look.
            let (Ok(name), Ok(metadata)) = (entry.file_name().into_string(), entry.metadata())
            else {
                continue;
            };
            let Ok(modified) = metadata.modified() else {
                continue;
            };
            if !metadata.is_file() {
                continue;
            }
            if entries.len() == FILES_MAX {
                let error = io::Error::other(format!("it has more than {FILES_MAX} files"));
                return Err(Fault::new("list")(error));
            }
            entries.push(Entry {
                name,
                stamp: Stamp {
                    modified,
                    inode: metadata.ino(),
                    len: metadata.len(),
                },
            });
        }
        Ok(entries)
    }

    /// The content of a file; `None` when it has gone.
    pub(super) fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match fs::File::open(self.path.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(RECORD_BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(io::Error::other(format!(
                "it has more than {RECORD_BYTES_MAX} bytes"
            )));
        }
        Ok(Some(bytes))
    }

    /// Writes the file of a registration; readers see all of it or nothing.
    pub(super) fn write(&self, record: &Record) -> Result<(), Fault> {
        self.write_atomically(&record.alive_name(), &record.to_bytes())
    }

    /// Renews the lease of a registration; writes its file again if it is not as it should be.
    pub(super) fn keep_alive(&self, record: &Record) -> Result<(), Fault> {
        let name = record.alive_name();
        let path = self.path.join(&name);
        let touched = fs::OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|file| {
                let whole = file.metadata()?.len() == record.to_bytes().len() as u64;
                if whole {
                    file.set_modified(SystemTime::now())?;
                }
                Ok(whole)
            });
        match touched {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => self.write(record),
        }
    }

    /// Tells watchers that the worker took the registration back. A file that a later registration
    /// wrote stays.
    pub(super) fn leave(&self, record: &Record) -> Result<(), Fault> {
        let name = record.alive_name();
        let current = self.read(&name).map_err(Fault::new("read a file of"))?;
        let Some(bytes) = current else {
            return self.write_atomically(&record.left_name(), &record.to_bytes());
        };
        let ours = serde_json::from_slice::<Record>(&bytes)
            .is_ok_and(|current| current.nonce == record.nonce);
        if !ours {
            return Ok(());
        }
        fs::rename(self.path.join(name), self.path.join(record.left_name()))
            .map_err(Fault::new("revoke a lease in"))
    }

    /// Removes a file that nobody needs. Failing to do so harms nobody.
    pub(super) fn clean(&self, name: &str) {
        match fs::remove_file(self.path.join(name)) {
            Ok(()) => tracing::debug!(file = name, "removed a stale file of the discovery store"),
            Err(error) => {
                tracing::debug!(file = name, %error, "cannot remove a stale file of the discovery store");
            }
        }
    }

    /// Whether files can be written here now.
    pub(super) fn probe(&self) -> io::Result<()> {
        fs::create_dir_all(&self.path)?;
        let path = self.path.join(temporary_name());
        fs::File::create_new(&path)?;
        fs::remove_file(&path)
    }

    /// The same, as a fault.
    pub(super) fn check_writable(&self) -> Result<(), Fault> {
        self.probe().map_err(Fault::new("write"))
    }

    fn write_atomically(&self, name: &str, bytes: &[u8]) -> Result<(), Fault> {
        let temporary = self.path.join(temporary_name());
        let written = fs::create_dir_all(&self.path)
            .and_then(|()| fs::write(&temporary, bytes))
            .and_then(|()| fs::rename(&temporary, self.path.join(name)));
        written.map_err(|error| {
            // Not there when the write failed before it; the janitor gets it otherwise.
            let _absent = fs::remove_file(&temporary);
            Fault::new("write")(error)
        })
    }
}
