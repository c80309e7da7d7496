//! The control connection: frames out from any thread, frames in on the reactor.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;

use super::frame::{BODY_BYTES_MAX, HEADER_BYTES, Header, Kind};
use super::socket::Socket;
use crate::error::LossCause;

/// Unsent control bytes that a connection may pile up before it counts as broken.
const QUEUE_BYTES_MAX: usize = 64 << 20;
const READ_BYTES: usize = 64 << 10;
/// Frames handled before other connections get their turn.
const FRAMES_PER_TURN: usize = 256;

/// Sends control frames from any thread; what the socket does not take at once waits for the
/// reactor.
pub(crate) struct ControlTx {
    state: Mutex<Tx>,
}

impl std::fmt::Debug for ControlTx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlTx").finish_non_exhaustive()
    }
}

struct Tx {
    /// None once closed.
    socket: Option<Arc<Socket>>,
    queue: VecDeque<Out>,
    queued: usize,
}

struct Out {
    bytes: Vec<u8>,
    sent: usize,
    /// A memory file that goes along with the first byte.
    file: Option<Arc<OwnedFd>>,
}

impl ControlTx {
    pub(crate) const fn new(socket: Arc<Socket>) -> Self {
        let state = Tx {
            socket: Some(socket),
            queue: VecDeque::new(),
            queued: 0,
        };
        Self {
            state: Mutex::new(state),
        }
    }

    /// Sends a frame without a body.
    pub(crate) fn header(&self, header: Header) {
        self.send(header.encode().to_vec(), None);
    }

    /// Sends a frame. On a broken connection it goes nowhere: the reader notices the loss.
    pub(crate) fn send(&self, bytes: Vec<u8>, file: Option<Arc<OwnedFd>>) {
        let mut tx = self.state.lock();
        if tx.socket.is_none() {
            return;
        }
        tx.queued += bytes.len();
        tx.queue.push_back(Out {
            bytes,
            sent: 0,
            file,
        });
        if tx.queue.len() == 1 {
            tx.flush();
        }
        if tx.queued > QUEUE_BYTES_MAX {
            tracing::warn!(queued = tx.queued, "peer does not read control frames");
            tx.close();
        }
    }

    /// Sends what is waiting; called when the socket takes bytes again.
    pub(crate) fn flush(&self) {
        self.state.lock().flush();
    }

    /// A heartbeat. None is added to what a stopped peer has not read yet: frames for it must not
    /// pile up until the connection counts as broken, for then its windows would count as quiet.
    pub(crate) fn beat(&self) {
        if self.state.lock().queue.is_empty() {
            self.header(Header::new(Kind::Ping, 0, 0));
        }
    }

    /// Ends the connection.
    pub(crate) fn close(&self) {
        self.state.lock().close();
    }
}

impl Tx {
    fn flush(&mut self) {
        let Some(socket) = self.socket.clone() else {
            return;
        };
        if let Err(error) = socket.flush() {
            tracing::debug!(%error, "cannot send");
            self.close();
            return;
        }
        while let Some(front) = self.queue.front_mut() {
            let file = front.file.as_ref().map(AsFd::as_fd);
            match socket.send_bytes(&front.bytes[front.sent..], file) {
                Ok(sent) => {
                    front.sent += sent;
                    front.file = None;
                    self.queued -= sent;
                    if front.sent == front.bytes.len() {
                        self.queue.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    // The reader sees the same end and says why.
                    self.close();
                    return;
                }
            }
        }
    }

    fn close(&mut self) {
        if let Some(socket) = self.socket.take() {
            socket.shutdown();
        }
        self.queue.clear();
        self.queued = 0;
    }
}

/// Reads frames from a control connection.
pub(crate) struct ControlRx {
    socket: Arc<Socket>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    files: VecDeque<OwnedFd>,
}

/// A received frame.
pub(crate) struct Frame<'a> {
    pub(crate) header: Header,
    pub(crate) body: &'a [u8],
    /// Descriptors received so far and not claimed.
    pub(crate) files: &'a mut VecDeque<OwnedFd>,
}

/// A frame that the protocol does not allow, in words.
pub(crate) struct Violation(pub(crate) &'static str);

impl ControlRx {
    pub(crate) fn new(socket: Arc<Socket>) -> Self {
        let buffer = vec![0; READ_BYTES];
        Self {
            socket,
            buffer,
            start: 0,
            end: 0,
            files: VecDeque::new(),
        }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Reads and hands out frames until the socket is empty (`Ok(false)`) or the turn is over
    /// (`Ok(true)`).
    pub(crate) fn read(
        &mut self,
        mut handle: impl FnMut(Frame<'_>) -> Result<(), Violation>,
    ) -> Result<bool, LossCause> {
        let mut frames = 0;
        loop {
            while let Some((header, body)) = self.next_frame()? {
                let body = &self.buffer[body];
                handle(Frame {
                    header,
                    body,
                    files: &mut self.files,
                })
                .map_err(|Violation(what)| LossCause::Protocol(what.to_owned()))?;
                frames += 1;
            }
            if frames >= FRAMES_PER_TURN {
                return Ok(true);
            }
            self.make_room();
            match self
                .socket
                .recv_bytes(&mut self.buffer[self.end..], &mut self.files)
            {
                Ok(0) => return Err(LossCause::Closed),
                Ok(received) => self.end += received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(LossCause::Broken(error.to_string())),
            }
        }
    }

    /// Reads and throws away until the socket is empty.
    pub(crate) fn drain(&mut self) -> Result<(), LossCause> {
        loop {
            self.files.clear();
            match self.socket.recv_bytes(&mut self.buffer, &mut self.files) {
                Ok(0) => return Err(LossCause::Closed),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(LossCause::Broken(error.to_string())),
            }
        }
    }

    /// The next whole frame in the buffer: header and where its body lies.
    fn next_frame(&mut self) -> Result<Option<(Header, std::ops::Range<usize>)>, LossCause> {
        let unknown = || LossCause::Protocol("unknown frame on the control connection".to_owned());
        let unread = &self.buffer[self.start..self.end];
        let Some(header) = unread.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(header).ok_or_else(unknown)?;
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        if len > BODY_BYTES_MAX {
            return Err(LossCause::Protocol(format!("control frame of {len} bytes")));
        }
        if unread.len() < HEADER_BYTES + len {
            return Ok(None);
        }
        let body = self.start + HEADER_BYTES..self.start + HEADER_BYTES + len;
        self.start = body.end;
        Ok(Some((header, body)))
    }

    /// Makes the rest of the buffer non-empty. It grows only as bytes really arrive.
    fn make_room(&mut self) {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.buffer.len() {
            self.buffer.resize(self.buffer.len() * 2, 0);
        } else if self.end == 0 && self.buffer.len() > READ_BYTES {
            self.buffer = vec![0; READ_BYTES];
        }
    }
}
