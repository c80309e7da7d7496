//! What goes wrong with stored blocks: opening, preparing, moving.

use std::fmt;
use std::io;

/// Why a file or an object store could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A configuration value is out of range.
    #[error("{field} is {got}; accepted: {accepted}")]
    InvalidConfig {
        /// The field.
        field: &'static str,
        /// The value given.
        got: String,
        /// The values accepted.
        accepted: &'static str,
    },
    /// Neither a regular file nor a block device.
    #[error("{name} is a {kind}; accepted: a regular file or a block device")]
    NotAFile {
        /// Path or descriptor.
        name: String,
        /// What it is.
        kind: &'static str,
    },
    /// The descriptor allows less than the configuration asks for.
    #[error("{name} was opened for reading only, the store asks for writing")]
    DescriptorIsReadOnly {
        /// The descriptor.
        name: String,
    },
    /// The file system refused something.
    #[error("cannot {what} {name}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Path or descriptor.
        name: String,
        /// The system's error.
        source: io::Error,
    },
    /// The object store refused its configuration.
    #[error("object store {name}: {message}")]
    ObjectStore {
        /// The store.
        name: String,
        /// What the store's client says.
        message: String,
    },
    /// The agent is shut down.
    #[error("the agent is shut down")]
    AgentStopped,
}

/// Why stored bytes did not move.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{action} {store} at byte {offset}: {kind}")]
pub struct StorageError {
    /// What was being done.
    pub action: StorageAction,
    /// The file (its path) or the object (store and key).
    pub store: String,
    /// First byte of the file or object that the failed request still had to move.
    pub offset: u64,
    /// What went wrong.
    pub kind: StorageErrorKind,
}

impl StorageError {
    /// Whether posting again may succeed without anybody doing something about the cause.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        matches!(
            self.kind,
            StorageErrorKind::Throttled | StorageErrorKind::TimedOut
        )
    }
}

/// What was being done with stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StorageAction {
    /// Reading into memory.
    Read,
    /// Writing from memory.
    Write,
    /// Making written bytes durable.
    Sync,
    /// Asking for length, times and the like.
    Query,
    /// Asking which objects there are.
    List,
    /// Deleting objects.
    Delete,
}

impl fmt::Display for StorageAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "cannot read",
            Self::Write => "cannot write",
            Self::Sync => "cannot sync",
            Self::Query => "cannot query",
            Self::List => "cannot list",
            Self::Delete => "cannot delete",
        })
    }
}

/// What went wrong with a file or an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StorageErrorKind {
    /// The file ends before the bytes asked for. What was there may have been read.
    #[error("the file ends here, {missing} bytes are missing")]
    EndOfFile {
        /// Bytes of the request that lie behind the end.
        missing: u64,
    },
    /// The file system is full.
    #[error("no space left on the device")]
    NoSpace,
    /// The user's quota is used up.
    #[error("the quota is used up")]
    QuotaExceeded,
    /// The file may not grow that far (file system or process limit).
    #[error("the file may not become that large")]
    FileTooLarge,
    /// The file system or the device is read-only.
    #[error("it is read-only")]
    ReadOnly,
    /// The device failed.
    #[error("the device reports an input/output error")]
    Io,
    /// The descriptor is closed or was opened for the other direction.
    #[error("the descriptor does not allow it")]
    BadDescriptor,
    /// Permission is missing, or credentials are.
    #[error("permission denied")]
    Denied,
    /// Length, offset or memory do not fit what the device demands of direct requests.
    #[error("the request does not fit the device's alignment")]
    Misaligned,
    /// There is no such object.
    #[error("it does not exist")]
    NotFound,
    /// The object exists already, or is not the one that was expected.
    #[error("the precondition does not hold: {0}")]
    Precondition(String),
    /// The store asks to slow down, also after all retries.
    #[error("the store is throttling")]
    Throttled,
    /// No answer within the time of a request, also after all retries.
    #[error("no answer in time")]
    TimedOut,
    /// An object is not as long as the block it stands for.
    #[error("its length is {got}, the block has {expected} bytes")]
    Length {
        /// Bytes of the block.
        expected: u64,
        /// Bytes of the object.
        got: u64,
    },
    /// Something else; `errno` when a system call said so.
    #[error("{message}")]
    Other {
        /// Error number of the system.
        errno: Option<i32>,
        /// What the system or the store's client says.
        message: String,
    },
}

impl StorageErrorKind {
    /// Sorts an error number of the system.
    pub(crate) fn of_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC => Self::NoSpace,
            libc::EDQUOT => Self::QuotaExceeded,
            libc::EFBIG => Self::FileTooLarge,
            libc::EROFS => Self::ReadOnly,
            libc::EIO => Self::Io,
            libc::EBADF => Self::BadDescriptor,
            libc::EPERM | libc::EACCES => Self::Denied,
            libc::EINVAL => Self::Misaligned,
            libc::ENOENT => Self::NotFound,
            libc::ETIMEDOUT => Self::TimedOut,
            errno => Self::Other {
                errno: Some(errno),
                message: io::Error::from_raw_os_error(errno).to_string(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_keep_their_meaning() {
        for (errno, kind) in [
            (libc::ENOSPC, StorageErrorKind::NoSpace),
            (libc::EDQUOT, StorageErrorKind::QuotaExceeded),
            (libc::EFBIG, StorageErrorKind::FileTooLarge),
            (libc::EROFS, StorageErrorKind::ReadOnly),
            (libc::EIO, StorageErrorKind::Io),
            (libc::EBADF, StorageErrorKind::BadDescriptor),
            (libc::EACCES, StorageErrorKind::Denied),
        ] {
            assert_eq!(StorageErrorKind::of_errno(errno), kind);
        }
        let other = StorageError {
            action: StorageAction::Write,
            store: "/data/blocks".to_owned(),
            offset: 4096,
            kind: StorageErrorKind::of_errno(libc::ESTALE),
        };
        let text = other.to_string();
        assert!(
            text.starts_with("cannot write /data/blocks at byte 4096: "),
            "{text}"
        );
        assert!(!other.retryable());
    }
}
