//! What an operation on a file does, and what follows from the result of one of its requests.

use std::io;
use std::sync::Arc;

use super::super::error::{StorageAction, StorageError, StorageErrorKind};
use super::open::StoredFile;
use super::plan::{Request, Requests, Via};
use crate::op::Op;

/// The requests of a prepared operation. Its parts are the requests and, if it is durable, one sync
/// that starts when all of them are done.
#[derive(Debug)]
pub(crate) struct FileWork {
    pub(crate) file: Arc<StoredFile>,
    pub(crate) requests: Requests,
    pub(crate) durable: bool,
}

/// What follows from a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// All bytes of the request have moved.
    Done,
    /// So many bytes of the request have moved now; the rest has to be asked for again.
    Again { moved: u32 },
    /// The kernel stopped it without reason: ask again.
    Interrupted,
    /// It cannot be done.
    Failed(StorageError),
}

impl FileWork {
    /// Number of requests.
    pub(crate) fn requests(&self) -> u32 {
        // The plan has at most 2^22.
        u32::try_from(self.requests.len()).unwrap_or(u32::MAX)
    }

    /// What follows from the result of request `part`, of which `moved` bytes had moved before.
    pub(crate) fn after(&self, op: Op, part: u32, moved: u32, result: Result<u32, i32>) -> Step {
        match self.requests.get(part) {
            Some(request) => self.after_request(op, request, moved, result),
            None => match result {
                Ok(_) => Step::Done,
                Err(errno) if interrupted(errno) => Step::Interrupted,
                Err(errno) => Step::Failed(StorageError {
                    action: StorageAction::Sync,
                    store: self.file.name().to_owned(),
                    offset: 0,
                    kind: StorageErrorKind::of_errno(errno),
                }),
            },
        }
    }

    fn after_request(
        &self,
        op: Op,
        request: &Request,
        moved: u32,
        result: Result<u32, i32>,
    ) -> Step {
        let now = match result {
            Err(errno) if interrupted(errno) => return Step::Interrupted,
            Err(errno) => {
                let kind = match errno {
                    libc::EINVAL if request.via == Via::Buffered => StorageErrorKind::Other {
                        errno: Some(errno),
                        message: io::Error::from_raw_os_error(errno).to_string(),
                    },
                    errno => StorageErrorKind::of_errno(errno),
                };
                return Step::Failed(self.error(op, request, moved, kind));
            }
            Ok(bytes) => bytes,
        };
        let all = moved.saturating_add(now);
        if all >= request.bytes {
            return Step::Done;
        }
        // Direct requests go on only where the device can: a read that ends elsewhere has met the
        // end of the file.
        let continues = now > 0
            && match request.via {
                Via::Direct => all.is_multiple_of(self.file.offset_align()),
                Via::Buffered => true,
            };
        if continues {
            return Step::Again { moved: all };
        }
        let missing = u64::from(request.bytes - all);
        let kind = match op {
            Op::Read => StorageErrorKind::EndOfFile { missing },
            Op::Write => StorageErrorKind::Other {
                errno: None,
                message: format!("the kernel wrote {now} bytes and {missing} are left"),
            },
        };
        Step::Failed(self.error(op, request, all, kind))
    }

    /// The kernel stops the request again and again.
    pub(crate) fn gave_up(&self, op: Op, part: u32, moved: u32, errno: i32) -> StorageError {
        let kind = StorageErrorKind::Other {
            errno: Some(errno),
            message: format!(
                "interrupted again and again: {}",
                io::Error::from_raw_os_error(errno)
            ),
        };
        match self.requests.get(part) {
            Some(request) => self.error(op, request, moved, kind),
            None => StorageError {
                action: StorageAction::Sync,
                store: self.file.name().to_owned(),
                offset: 0,
                kind,
            },
        }
    }

    fn error(&self, op: Op, request: &Request, moved: u32, kind: StorageErrorKind) -> StorageError {
        StorageError {
            action: match op {
                Op::Read => StorageAction::Read,
                Op::Write => StorageAction::Write,
            },
            store: self.file.name().to_owned(),
            offset: request.offset + u64::from(moved),
            kind,
        }
    }
}

const fn interrupted(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::EAGAIN | libc::ECANCELED)
}
