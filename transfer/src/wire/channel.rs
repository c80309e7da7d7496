//! The first frames of a target on this host: the ring into which the initiator's notifications go,
//! and the bell that tells of them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::frame::{Code, HEADER_BYTES, Header, Kind};
use super::handshake::HandshakeFailure;
use super::socket::Socket;
use crate::ring::{RemoteBell, SendError, Writer};

/// The way of notifications to a peer on this host.
#[derive(Debug)]
pub(crate) struct NotificationChannel {
    ring: Writer,
    bell: RemoteBell,
}

/// What became of a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// It waits at the peer.
    Queued,
    /// Likewise, and a RANG frame has to follow.
    QueuedForTask,
}

impl NotificationChannel {
    /// Reads RING and BELL, and nothing behind them. `None` when the peer has no ring for us: its
    /// notifications travel as frames then.
    pub(crate) fn receive(
        socket: &Socket,
        until: Instant,
    ) -> Result<Option<Self>, HandshakeFailure> {
        let (header, _, file) = receive_frame(socket, until)?;
        if header.kind != Kind::Ring {
            return Err(HandshakeFailure::Malformed);
        }
        if header.code != Code::Ok as u8 {
            return Ok(None);
        }
        let ring = Writer::map(&file.ok_or(HandshakeFailure::Malformed)?)?;
        let (header, body, file) = receive_frame(socket, until)?;
        let index = body
            .first_chunk::<8>()
            .map(|index| u64::from_le_bytes(*index));
        let index = index.and_then(|index| u32::try_from(index).ok());
        let (Kind::Bell, Some(index), Some(file)) = (header.kind, index, file) else {
            return Err(HandshakeFailure::Malformed);
        };
        let bell = RemoteBell::map(&file, index as usize)?;
        Ok(Some(Self { ring, bell }))
    }

    pub(crate) fn send(&self, payload: &[u8]) -> Result<Sent, SendError> {
        self.ring.send(payload)?;
        Ok(if self.bell.ring() {
            Sent::QueuedForTask
        } else {
            Sent::Queued
        })
    }
}

type Received = (Header, Vec<u8>, Option<OwnedFd>);

/// Reads one small frame and not a byte more.
pub(super) fn receive_frame(socket: &Socket, until: Instant) -> Result<Received, HandshakeFailure> {
    const BODY_MAX: usize = 64;
    let mut files = VecDeque::new();
    let mut frame = vec![0; HEADER_BYTES];
    let mut got = 0;
    loop {
        if got == HEADER_BYTES && frame.len() == HEADER_BYTES {
            let header = frame.first_chunk::<HEADER_BYTES>().and_then(Header::decode);
            let header = header.ok_or(HandshakeFailure::Malformed)?;
            let len = usize::try_from(header.len).unwrap_or(usize::MAX);
            if len > BODY_MAX {
                return Err(HandshakeFailure::Malformed);
            }
            frame.resize(HEADER_BYTES + len, 0);
        }
        if got == frame.len() {
            break;
        }
        match socket.recv_bytes(&mut frame[got..], &mut files) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(received) => got += received,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => readable(socket, until)?,
            Err(error) => return Err(error.into()),
        }
    }
    let body = frame.split_off(HEADER_BYTES);
    let header = frame.first_chunk::<HEADER_BYTES>().and_then(Header::decode);
    let header = header.ok_or(HandshakeFailure::Malformed)?;
    Ok((header, body, files.pop_front()))
}

fn readable(socket: &Socket, until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    };
    let fd = socket.as_fd();
    match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
