//! Memory of another process that is not mapped here: the kernel copies (`process_vm_readv`,
//! `process_vm_writev`), many pieces in one call.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::event::{PollFd, PollFlags, Timespec};

/// Pieces of one call and side; the kernel takes no more.
const PIECES_MAX: usize = 1024;

/// A process on this host.
#[derive(Debug)]
pub(crate) struct PeerProcess {
    id: libc::pid_t,
    /// Becomes readable when the process ends, and keeps its number from being mistaken for the
    /// number of a later process.
    watch: OwnedFd,
}

impl PeerProcess {
    /// The process at the other end of a Unix socket; `None` when it is not visible from here (in
    /// another namespace of process numbers).
    pub(crate) fn of(socket: BorrowedFd<'_>, watch: &OwnedFd) -> Option<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(socket).ok()?;
        let process = Self {
            id: credentials.pid.as_raw_nonzero().get(),
            watch: watch.try_clone().ok()?,
        };
        process.alive().then_some(process)
    }

    fn alive(&self) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let fd = self.watch.as_fd();
        rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)) == Ok(0)
    }

    /// Whether the kernel lets us at `base`: reads one byte.
    pub(crate) fn probe(&self, base: u64) -> io::Result<()> {
        let mut byte = 0u8;
        let mut batch = Batch::default();
        batch.push((&raw mut byte).cast(), base, 1);
        // SAFETY: one byte of this stack frame.
        unsafe { self.copy(&batch, false) }
    }

    /// Copies all pieces of a batch, into the other process or out of it.
    ///
    /// # Safety
    /// The local pieces are mapped, for writing if `write` is false, and nobody holds a reference
    /// into them.
    pub(crate) unsafe fn copy(&self, batch: &Batch, write: bool) -> io::Result<()> {
        if !self.alive() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        let count = batch.local.len() as libc::c_ulong;
        let call = if write {
            libc::process_vm_writev
        } else {
            libc::process_vm_readv
        };
        let (local, remote) = (batch.local.as_ptr(), batch.remote.as_ptr());
        // SAFETY: both lists are alive and `count` long; the local pieces are by the contract of
        // this function, and the kernel checks the remote ones.
        let copied = unsafe { call(self.id, local, count, remote, count, 0) };
        match usize::try_from(copied) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(copied) if copied < batch.bytes => Err(io::Error::other(format!(
                "only {copied} of {} bytes are mapped there",
                batch.bytes
            ))),
            Ok(_) => Ok(()),
        }
    }
}

/// Pieces for one call.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    local: Vec<libc::iovec>,
    remote: Vec<libc::iovec>,
    bytes: usize,
}

impl Batch {
    pub(crate) fn push(&mut self, local: *mut u8, remote: u64, bytes: usize) {
        let piece = |base: *mut u8| libc::iovec {
            iov_base: base.cast(),
            iov_len: bytes,
        };
        self.local.push(piece(local));
        // An address of the other process, never used as one here.
        let remote = usize::try_from(remote).unwrap_or(usize::MAX);
        self.remote
            .push(piece(std::ptr::without_provenance_mut(remote)));
        self.bytes += bytes;
    }

    pub(crate) fn full(&self) -> bool {
        self.local.len() >= PIECES_MAX
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.local.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.local.clear();
        self.remote.clear();
        self.bytes = 0;
    }
}

/// Where memory begins, for a peer that copies through the kernel.
pub(crate) fn address_of(base: NonNull<u8>) -> u64 {
    base.as_ptr().expose_provenance() as u64
}
