//! Metadata through a file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::metadata::{METADATA_BYTES_MAX, Metadata};
use crate::agent::random_u64;
use crate::error::MetadataError;

/// Why metadata could not be written to a file or read from one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataFileError {
    /// The system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file holds something else, or is damaged.
    #[error("{}: {source}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// What is wrong with its bytes.
        source: MetadataError,
    },
}

impl Metadata {
    /// Writes the blob to a file. Readers see the old file or the whole new one, never a part.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_to(&self, path: impl AsRef<Path>) -> Result<(), MetadataFileError> {
        let path = path.as_ref();
        write_atomically(path, &self.to_bytes()).map_err(|source| MetadataFileError::Io {
            what: "write",
            path: path.to_owned(),
            source,
        })
    }

    /// Reads a blob from a file.
    ///
    /// # Errors
    /// The file cannot be read, or does not hold metadata that this build understands.
    pub fn read_from(path: impl AsRef<Path>) -> Result<Self, MetadataFileError> {
        let path = path.as_ref();
        let bytes = read_bounded(path).map_err(|source| MetadataFileError::Io {
            what: "read",
            path: path.to_owned(),
            source,
        })?;
        Self::from_bytes(&bytes).map_err(|source| MetadataFileError::Metadata {
            path: path.to_owned(),
            source,
        })
    }
}

/// Reads a file, one byte more than metadata may have at most.
pub(super) fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = METADATA_BYTES_MAX as u64 + 1;
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a file beside `path` and gives it that name. It is not forced to the disk: after a crash
/// of the machine nobody needs it.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut draft = std::ffi::OsString::from(".");
    draft.push(name);
    // Not a process id: those repeat in containers, and hosts share folders.
    draft.push(format!(".{:016x}.draft", random_u64()?));
    let draft = path.with_file_name(draft);
    let written = File::create_new(&draft)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| std::fs::rename(&draft, path));
    if written.is_err() {
        // Nothing else can be done about the draft.
        let _ = std::fs::remove_file(&draft);
    }
    written
}
