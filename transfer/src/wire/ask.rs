//! Connections that ask an agent for its metadata, and get nothing else.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frame::{Code, HEADER_BYTES, Header, Kind};
use super::handshake::{HandshakeFailure, preamble, preamble_version};
use super::reactor::{Event, Flow, Source};
use super::socket::Socket;
use crate::peer::METADATA_BYTES_MAX;

/// The question.
fn question() -> Vec<u8> {
    Header::new(Kind::AskMetadata, 0, 0).with_body(&preamble())
}

/// Whether the body of a question is one that this build answers, or what to refuse it with.
pub(super) fn check_question(body: &[u8]) -> Option<Result<(), Code>> {
    preamble_version(body).map(|known| {
        if known {
            Ok(())
        } else {
            Err(Code::Unsupported)
        }
    })
}

/// Sends an answer, then ends the connection.
pub(super) struct Answer<T> {
    socket: Arc<Socket>,
    bytes: Vec<u8>,
    sent: usize,
    /// What counts the connection as one that waits.
    _slot: T,
}

impl<T> Answer<T> {
    pub(super) fn new(socket: Arc<Socket>, metadata: &[u8], slot: T) -> Self {
        Self {
            socket,
            bytes: Header::new(Kind::Metadata, 0, 0).with_body(metadata),
            sent: 0,
            _slot: slot,
        }
    }
}

impl<T: Send> Source for Answer<T> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn ready(&mut self, _event: Event) -> Flow {
        while self.sent < self.bytes.len() {
            match self.socket.send_bytes(&self.bytes[self.sent..], None) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Flow::Keep,
                Err(_) => return Flow::Drop,
            }
        }
        match self.socket.flush() {
            Ok(false) => Flow::Keep,
            Ok(true) | Err(_) => Flow::Drop,
        }
    }
}

/// A blocking socket whose reads and writes can be bounded.
pub(crate) trait Timed: Read + Write {
    /// Bounds the reads and writes that follow.
    fn bound(&self, left: Duration) -> io::Result<()>;
}

impl Timed for TcpStream {
    fn bound(&self, left: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(left))?;
        self.set_write_timeout(Some(left))
    }
}

impl Timed for UnixStream {
    fn bound(&self, left: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(left))?;
        self.set_write_timeout(Some(left))
    }
}

/// Asks for metadata: the blob as it came. Allocates as bytes arrive, never ahead of them.
pub(crate) fn ask_metadata(
    socket: &mut impl Timed,
    until: Instant,
) -> Result<Vec<u8>, HandshakeFailure> {
    socket.bound(left(until)?)?;
    socket.write_all(&question())?;
    let header = read(socket, HEADER_BYTES, until)?;
    let header = header.first_chunk().and_then(Header::decode);
    let header = header.ok_or(HandshakeFailure::Malformed)?;
    let len = usize::try_from(header.len).unwrap_or(usize::MAX);
    match (header.kind, Code::from(header.code)) {
        (Kind::Metadata, _) if len <= METADATA_BYTES_MAX => Ok(read(socket, len, until)?),
        (Kind::Refuse, Some(Code::TlsRequired)) => Err(HandshakeFailure::TlsRequired),
        (Kind::Refuse, Some(code)) => Err(HandshakeFailure::Refused(code)),
        _ => Err(HandshakeFailure::Malformed),
    }
}

fn read(socket: &mut impl Timed, len: usize, until: Instant) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 16 << 10];
    while bytes.len() < len {
        socket.bound(left(until)?)?;
        let room = chunk.len().min(len - bytes.len());
        match socket.read(&mut chunk[..room]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}
