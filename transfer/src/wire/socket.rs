//! Non-blocking stream sockets with scatter/gather over raw memory and passing of file descriptors.
//!
//! `std` and `rustix` take `IoSliceMut`, which is a reference to the bytes; region memory must not
//! be referenced (see `memory`), so `sendmsg` and `recvmsg` are called with raw `iovec`s.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use parking_lot::Mutex;
use rustix::net::RecvFlags;

use super::tls::TlsSession;
use crate::memory::copy_bytes;

/// Pieces per system call.
pub(crate) const IOVECS_MAX: usize = 512;
/// Room for copies of short pieces, per data connection that has met some. Fits the second-level cache
/// of a core together with what is around it.
const STAGE_BYTES: usize = 128 << 10;
/// Received descriptors that no frame has claimed yet; more are closed at once.
const FILES_MAX: usize = 16;

#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    /// Set before anything else is done with the socket, or never.
    tls: OnceLock<Mutex<TlsSession>>,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A list of raw pieces of memory for one system call, and a place where short ones lie side by
/// side: the kernel takes longer for each piece than it takes to copy a short one.
pub(crate) struct Pieces {
    list: Vec<libc::iovec>,
    bytes: usize,
    /// Empty until it is first needed.
    stage: Box<[u8]>,
    staged: usize,
}

// SAFETY: a list of addresses; it is emptied before each use and only read by system calls.
unsafe impl Send for Pieces {}

impl Pieces {
    pub(crate) fn new() -> Self {
        Self {
            list: Vec::new(),
            bytes: 0,
            stage: Box::default(),
            staged: 0,
        }
    }

    pub(crate) fn clear(&mut self) {
        self.list.clear();
        self.bytes = 0;
        self.staged = 0;
    }

    pub(crate) fn full(&self) -> bool {
        self.list.len() >= IOVECS_MAX
    }

    pub(crate) fn push(&mut self, base: *mut u8, bytes: usize) {
        self.list.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: bytes,
        });
        self.bytes += bytes;
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a copy of a piece; false when there is no room for it.
    ///
    /// # Safety
    /// The piece is mapped readable during the call, and nobody holds a reference into it.
    pub(crate) unsafe fn push_copy(&mut self, base: *const u8, bytes: usize) -> bool {
        let at = self.staged;
        let Some(room) = self.stage().get_mut(at..at + bytes) else {
            return false;
        };
        let to = room.as_mut_ptr();
        // SAFETY: readable by the contract of this function; `room` is memory of this list.
        unsafe { copy_bytes(base, to, bytes) };
        self.staged += bytes;
        match self.list.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == to && at > 0 => {
                last.iov_len += bytes;
                self.bytes += bytes;
            }
            _ => self.push(to, bytes),
        }
        true
    }

    /// Adds room for up to `bytes` that are to be copied on, as the only piece.
    pub(crate) fn push_room(&mut self, bytes: usize) {
        self.clear();
        let room = self.stage();
        let bytes = bytes.min(room.len());
        let base = room.as_mut_ptr();
        self.push(base, bytes);
    }

    /// What was received into that room.
    pub(crate) fn room(&self, received: usize) -> &[u8] {
        &self.stage[..received.min(self.stage.len())]
    }

    fn stage(&mut self) -> &mut [u8] {
        if self.stage.is_empty() {
            self.stage = vec![0; STAGE_BYTES].into();
        }
        &mut self.stage
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (*mut u8, usize)> {
        let piece = |piece: &libc::iovec| (piece.iov_base.cast::<u8>(), piece.iov_len);
        self.list.iter().map(piece)
    }
}

impl Socket {
    /// Takes a connected socket and makes it non-blocking.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self {
            fd,
            tls: OnceLock::new(),
        })
    }

    /// From now on everything goes through `session`.
    pub(crate) fn secure(&self, session: TlsSession) {
        let set = self.tls.set(Mutex::new(session));
        debug_assert!(set.is_ok(), "a socket is secured once");
    }

    pub(crate) fn is_secure(&self) -> bool {
        self.tls.get().is_some()
    }

    /// The first byte that the peer has sent, left where it is; `None` when there is none yet.
    pub(crate) fn first_byte(&self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.fd, &mut byte, flags) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(Some(byte[0])),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends what a secure socket has taken and kept; false when the kernel's buffer is full.
    pub(crate) fn flush(&self) -> io::Result<bool> {
        match self.tls.get() {
            None => Ok(true),
            Some(tls) => tls.lock().flush(self.fd.as_fd()),
        }
    }

    /// A secure socket has taken bytes that it could not send yet.
    pub(crate) fn unsent(&self) -> bool {
        self.tls.get().is_some_and(|tls| tls.lock().unsent())
    }

    /// Sends from raw memory.
    ///
    /// # Safety
    /// Every piece is mapped readable during the call.
    pub(crate) unsafe fn send(&self, pieces: &mut Pieces) -> io::Result<usize> {
        if let Some(tls) = self.tls.get() {
            // SAFETY: by the contract of this function.
            return unsafe { tls.lock().send(self.fd.as_fd(), pieces) };
        }
        let mut message = message(&mut pieces.list);
        // SAFETY: `message` points at the list, which points at readable memory (caller).
        unsafe { send_message(self.fd.as_raw_fd(), &mut message) }
    }

    /// Receives into raw memory. Zero bytes mean that the peer closed the connection.
    ///
    /// # Safety
    /// Every piece is mapped writable during the call, and nothing holds a reference into it.
    pub(crate) unsafe fn recv(&self, pieces: &mut Pieces) -> io::Result<usize> {
        if let Some(tls) = self.tls.get() {
            // SAFETY: by the contract of this function.
            return unsafe { tls.lock().recv(self.fd.as_fd(), pieces) };
        }
        let mut message = message(&mut pieces.list);
        // SAFETY: `message` points at the list, which points at writable memory (caller).
        unsafe { recv_message(self.fd.as_raw_fd(), &mut message) }
    }

    /// Sends bytes of this process, with a descriptor on the first of them (not on secure sockets,
    /// which are not Unix sockets).
    pub(crate) fn send_bytes(
        &self,
        bytes: &[u8],
        file: Option<BorrowedFd<'_>>,
    ) -> io::Result<usize> {
        if self.is_secure() {
            let mut pieces = Pieces::new();
            pieces.push(bytes.as_ptr().cast_mut(), bytes.len());
            // SAFETY: the piece is `bytes`, borrowed and only read.
            return unsafe { self.send(&mut pieces) };
        }
        let mut list = [libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        }];
        let mut message = message(&mut list);
        let mut space = ControlSpace::new();
        if let Some(file) = file {
            message.msg_control = space.bytes.as_mut_ptr().cast();
            message.msg_controllen = control_space(1);
            // SAFETY: `message` has a control buffer large and aligned enough for one header.
            let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
            // SAFETY: CMSG_FIRSTHDR returned the start of `space`, which is big enough.
            unsafe { fill_rights(header, file.as_raw_fd()) };
        }
        // SAFETY: `list` points at `bytes`, alive and readable; `space` outlives the call.
        unsafe { send_message(self.fd.as_raw_fd(), &mut message) }
    }

    /// Receives bytes into a buffer of this process; descriptors that come along are queued.
    pub(crate) fn recv_bytes(
        &self,
        into: &mut [u8],
        files: &mut VecDeque<OwnedFd>,
    ) -> io::Result<usize> {
        if self.is_secure() {
            let mut pieces = Pieces::new();
            pieces.push(into.as_mut_ptr(), into.len());
            // SAFETY: the piece is `into`, exclusively borrowed.
            return unsafe { self.recv(&mut pieces) };
        }
        let mut list = [libc::iovec {
            iov_base: into.as_mut_ptr().cast(),
            iov_len: into.len(),
        }];
        let mut message = message(&mut list);
        let mut space = ControlSpace::new();
        message.msg_control = space.bytes.as_mut_ptr().cast();
        message.msg_controllen = control_space(4);
        // SAFETY: `list` points at `into`, exclusively borrowed; `space` outlives the call.
        let received = unsafe { recv_message(self.fd.as_raw_fd(), &mut message) }?;
        // SAFETY: the kernel has just filled `message` and its control buffer.
        unsafe { take_rights(&message, files) };
        Ok(received)
    }

    /// Ends the connection for every holder of the socket; both sides see its end.
    pub(crate) fn shutdown(&self) {
        // Fails only when the connection is gone already.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }
}

/// Room for a few descriptors, aligned for `cmsghdr`.
#[repr(align(8))]
struct ControlSpace {
    bytes: [MaybeUninit<u8>; 64],
}

impl ControlSpace {
    const fn new() -> Self {
        Self {
            bytes: [MaybeUninit::zeroed(); 64],
        }
    }
}

/// Bytes of control data for `count` descriptors; fits [`ControlSpace`] for up to 8.
fn control_space(count: u32) -> usize {
    let payload = count * u32::try_from(size_of::<RawFd>()).unwrap_or(4);
    // SAFETY: pure arithmetic.
    let bytes = unsafe { libc::CMSG_SPACE(payload) };
    bytes as usize
}

fn message(list: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr (null pointers, zero lengths).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_mut_ptr();
    message.msg_iovlen = list.len();
    message
}

/// # Safety
/// `message` describes readable memory and, if any, a valid control buffer.
unsafe fn send_message(fd: RawFd, message: &mut libc::msghdr) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: by the contract of this function.
    let sent = unsafe { libc::sendmsg(fd, message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// # Safety
/// `message` describes writable memory and, if any, a valid control buffer.
unsafe fn recv_message(fd: RawFd, message: &mut libc::msghdr) -> io::Result<usize> {
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: by the contract of this function.
    let received = unsafe { libc::recvmsg(fd, message, flags) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// # Safety
/// `header` points at a zeroed, aligned control buffer with room for one descriptor.
unsafe fn fill_rights(header: *mut libc::cmsghdr, fd: RawFd) {
    // SAFETY: pure arithmetic.
    let len = unsafe { libc::CMSG_LEN(4) };
    let filled = libc::cmsghdr {
        cmsg_len: len as usize,
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    // SAFETY: the header is writable and aligned (caller).
    unsafe { header.write(filled) };
    // SAFETY: the data of a header follows it within the buffer.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: four bytes of room; the position need not be aligned.
    unsafe { data.cast::<RawFd>().write_unaligned(fd) };
}

/// # Safety
/// `message` was filled by `recvmsg` and its control buffer is alive.
unsafe fn take_rights(message: &libc::msghdr, files: &mut VecDeque<OwnedFd>) {
    // SAFETY: by the contract of this function.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: a non-null result of the CMSG walk is a whole, aligned header.
        let current = unsafe { header.read() };
        if current.cmsg_level == libc::SOL_SOCKET && current.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: pure arithmetic.
            let skip = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = current.cmsg_len.saturating_sub(skip) / size_of::<RawFd>();
            // SAFETY: the data of a header follows it within the buffer.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            for index in 0..count {
                // SAFETY: the kernel wrote `count` descriptors there.
                let at = unsafe { data.add(index) };
                // SAFETY: as above; unaligned reads are allowed.
                let fd = unsafe { at.read_unaligned() };
                // SAFETY: a descriptor that the kernel has just installed for us alone.
                let file = unsafe { OwnedFd::from_raw_fd(fd) };
                if files.len() < FILES_MAX {
                    files.push_back(file);
                }
            }
        }
        // SAFETY: by the contract of this function; `header` came from the same walk.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_travel_with_their_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (
            Socket::new(a.into()).unwrap(),
            Socket::new(b.into()).unwrap(),
        );
        let mut file = std::fs::File::from(
            rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        );
        file.write_all(b"hello").unwrap();
        file.rewind().unwrap();
        assert_eq!(a.send_bytes(b"ab", Some(file.as_fd())).unwrap(), 2);
        let mut files = VecDeque::new();
        let mut bytes = [0; 8];
        assert_eq!(b.recv_bytes(&mut bytes, &mut files).unwrap(), 2);
        let mut got = String::new();
        std::fs::File::from(files.pop_front().unwrap())
            .read_to_string(&mut got)
            .unwrap();
        assert_eq!(got, "hello");
        assert!(files.is_empty());
    }

    #[test]
    fn pieces_scatter_and_gather() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (
            Socket::new(a.into()).unwrap(),
            Socket::new(b.into()).unwrap(),
        );
        let mut from = *b"abcdef";
        let mut to = [0u8; 6];
        let mut pieces = Pieces::new();
        let base = from.as_mut_ptr();
        pieces.push(base.wrapping_add(3), 3);
        pieces.push(base, 3);
        // SAFETY: both pieces lie in `from`.
        assert_eq!(unsafe { a.send(&mut pieces) }.unwrap(), 6);
        pieces.clear();
        let base = to.as_mut_ptr();
        pieces.push(base.wrapping_add(4), 2);
        pieces.push(base, 4);
        // SAFETY: both pieces lie in `to`, which nothing references during the call.
        assert_eq!(unsafe { b.recv(&mut pieces) }.unwrap(), 6);
        assert_eq!(&to, b"fabcde");
    }
}
