//! The two `ZeroMQ` sockets that KV events need: SUB, and DEALER for the replay.
//!
//! ZMTP 3.0 (RFC 23) with the NULL mechanism, over TCP or a Unix socket, connecting only. It is written
//! here rather than taken from the crate `zeromq` because a follower has to see each connection begin
//! and end, in order with the messages (that crate connects again by itself, in another task), because a
//! length that a peer claims must have a bound (it has none), and because it brings more crates than
//! these 300 lines are worth.
//!
//! ```text
//! greeting   FF 0*8 7F | 3 0 | "NULL" 0*16 | 0 | 0*31                          both sides, 64 bytes
//! frame      flags (1 more, 2 long, 4 command) | length (u8, or u64 big-endian) | body
//! READY      command: 05 "READY" { name length u8 | name | value length u32 | value }
//! subscribe  message of one frame: 01 topic
//! ```

use std::{fmt, io, path::PathBuf, str::FromStr, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};

/// Longest message. vLLM's largest is one step's blocks with their tokens: some 10 bytes per token.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Frames of one message at most: a replay has four.
const FRAMES_MAX: usize = 8;
/// Longest command.
const COMMAND_BYTES_MAX: usize = 4_096;
/// For connecting and shaking hands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Where a socket of vLLM listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `tcp://HOST:PORT`. The host `*`, with which vLLM binds all interfaces, means this machine.
    Tcp {
        /// Name or address.
        host: String,
        /// Port of rank 0.
        port: u16,
    },
    /// `ipc://PATH`: a Unix socket.
    Ipc(PathBuf),
}

/// Why a text is no [`Endpoint`], or not for a rank.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It has another form.
    #[error("the endpoint of KV events '{text}' is neither tcp://HOST:PORT nor ipc://PATH")]
    Form {
        /// What was given.
        text: String,
    },
    /// The rank's port would be above 65,535.
    #[error("rank {rank} publishes at port {port} + {rank}, which is no port")]
    Port {
        /// The rank.
        rank: u32,
        /// Port of rank 0.
        port: u16,
    },
    /// vLLM gives only TCP endpoints to ranks other than 0.
    #[error("rank {rank} cannot publish at ipc://{path}: only rank 0 can; use tcp://HOST:PORT")]
    Ipc {
        /// The rank.
        rank: u32,
        /// The path.
        path: String,
    },
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The operating system says so.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer does not speak the protocol.
    #[error("the peer does not speak ZMTP 3 with the NULL mechanism: {0}")]
    Protocol(&'static str),
    /// Something is larger than it may be.
    #[error("a {what} of {bytes} bytes is more than {max}")]
    Large {
        /// What it is.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: usize,
    },
    /// Nothing happened in time.
    #[error("nothing came within {0:?}")]
    Late(Duration),
}

/// What a socket is to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Sub,
    Dealer,
}

/// A connection after its handshake.
pub(super) struct Socket {
    stream: Box<dyn Stream>,
    input: BytesMut,
    frames: Vec<Bytes>,
    frames_bytes: usize,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Endpoint {
    /// Where the rank's socket is: vLLM adds the rank to the port.
    ///
    /// # Errors
    /// When there is no such place.
    pub fn of_rank(&self, rank: u32) -> Result<Self, EndpointError> {
        match self {
            _ if rank == 0 => Ok(self.clone()),
            Self::Tcp { host, port } => {
                let offset = u16::try_from(rank).ok();
                let own = offset.and_then(|offset| port.checked_add(offset));
                Ok(Self::Tcp {
                    host: host.clone(),
                    port: own.ok_or(EndpointError::Port { rank, port: *port })?,
                })
            }
            Self::Ipc(path) => Err(EndpointError::Ipc {
                rank,
                path: path.display().to_string(),
            }),
        }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let wrong = || EndpointError::Form {
            text: text.to_owned(),
        };
        if let Some(path) = text.strip_prefix("ipc://").filter(|path| !path.is_empty()) {
            return Ok(Self::Ipc(path.into()));
        }
        let place = text.strip_prefix("tcp://").ok_or_else(wrong)?;
        let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|port| *port != 0);
        let host = match host.trim_start_matches('[').trim_end_matches(']') {
            "" => return Err(wrong()),
            "*" | "0.0.0.0" => "127.0.0.1",
            "::" => "::1",
            host => host,
        };
        Ok(Self::Tcp {
            host: host.to_owned(),
            port: port.ok_or_else(wrong)?,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

impl Socket {
    /// Connects and shakes hands.
    pub(super) async fn connect(endpoint: &Endpoint, kind: Kind) -> Result<Self, SocketError> {
        let ready = async {
            let stream: Box<dyn Stream> = match endpoint {
                Endpoint::Tcp { host, port } => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    Box::new(stream)
                }
                Endpoint::Ipc(path) => Box::new(UnixStream::connect(path).await?),
            };
            let mut socket = Self {
                stream,
                input: BytesMut::new(),
                frames: Vec::new(),
                frames_bytes: 0,
            };
            socket.shake_hands(kind).await?;
            Ok(socket)
        };
        let late = |_| SocketError::Late(CONNECT_TIMEOUT);
        timeout(CONNECT_TIMEOUT, ready).await.map_err(late)?
    }

    /// Asks a publisher for all topics that begin with `topic`.
    pub(super) async fn subscribe(&mut self, topic: &[u8]) -> Result<(), SocketError> {
        let mut body = vec![1];
        body.extend_from_slice(topic);
        self.send(&[&body]).await
    }

    /// Sends one message.
    pub(super) async fn send(&mut self, frames: &[&[u8]]) -> Result<(), SocketError> {
        let mut bytes = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            let more = if index + 1 < frames.len() { MORE } else { 0 };
            put_frame(&mut bytes, more, frame);
        }
        self.write(&bytes).await
    }

    /// The next message. Cancel safe.
    pub(super) async fn receive(&mut self) -> Result<Vec<Bytes>, SocketError> {
        loop {
            let (flags, body) = self.frame().await?;
            if flags & COMMAND != 0 {
                self.command(&body).await?;
                continue;
            }
            self.frames_bytes += body.len();
            self.frames.push(body);
            let frames = self.frames.len();
            if self.frames_bytes > MESSAGE_BYTES_MAX || frames > FRAMES_MAX {
                return Err(SocketError::Large {
                    what: "message",
                    bytes: self.frames_bytes as u64,
                    max: MESSAGE_BYTES_MAX,
                });
            }
            if flags & MORE == 0 {
                self.frames_bytes = 0;
                return Ok(std::mem::take(&mut self.frames));
            }
        }
    }

    async fn shake_hands(&mut self, kind: Kind) -> Result<(), SocketError> {
        let mut hello = [0_u8; 64];
        (hello[0], hello[9], hello[10]) = (0xFF, 0x7F, 3);
        hello[12..16].copy_from_slice(b"NULL");
        self.write(&hello).await?;
        self.fill(64).await?;
        let theirs = self.input.split_to(64);
        if theirs[0] != 0xFF || theirs[9] & 1 == 0 {
            return Err(SocketError::Protocol("its greeting is none"));
        }
        if theirs[10] < 3 {
            return Err(SocketError::Protocol("it is older than version 3"));
        }
        if theirs[12..32] != hello[12..32] {
            return Err(SocketError::Protocol("it wants another security mechanism"));
        }
        let mut ready = b"\x05READY\x0BSocket-Type".to_vec();
        let (name, accepted): (&[u8], [&[u8]; 2]) = match kind {
            Kind::Sub => (b"SUB", [b"PUB", b"XPUB"]),
            Kind::Dealer => (b"DEALER", [b"ROUTER", b"REP"]),
        };
        put_value(&mut ready, name);
        if kind == Kind::Dealer {
            ready.extend_from_slice(b"\x08Identity");
            put_value(&mut ready, b"");
        }
        let mut bytes = Vec::new();
        put_frame(&mut bytes, COMMAND, &ready);
        self.write(&bytes).await?;
        let (flags, body) = self.frame().await?;
        let Some(metadata) = body
            .strip_prefix(b"\x05READY")
            .filter(|_| flags & COMMAND != 0)
        else {
            return Err(SocketError::Protocol("it did not say READY"));
        };
        let theirs = property(metadata, b"socket-type");
        if !theirs.is_some_and(|theirs| accepted.contains(&theirs)) {
            return Err(SocketError::Protocol(
                "its socket is of another type than the one due",
            ));
        }
        Ok(())
    }

    /// A peer's ping is answered; it says nothing else that matters here.
    async fn command(&mut self, body: &[u8]) -> Result<(), SocketError> {
        // PING: name, time to live, context.
        if let Some(rest) = body.strip_prefix(b"\x04PING") {
            let mut pong = b"\x04PONG".to_vec();
            pong.extend_from_slice(rest.get(2..).unwrap_or_default());
            let mut bytes = Vec::new();
            put_frame(&mut bytes, COMMAND, &pong);
            self.write(&bytes).await?;
        }
        if body.starts_with(b"\x05ERROR") {
            return Err(SocketError::Protocol("it says ERROR"));
        }
        Ok(())
    }

    /// Flags and body of the next frame. Cancel safe: nothing is taken before all of it is there.
    async fn frame(&mut self) -> Result<(u8, Bytes), SocketError> {
        self.fill(2).await?;
        let flags = self.input[0];
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(SocketError::Protocol("a frame has unknown flags"));
        }
        let (head, claimed) = if flags & LONG == 0 {
            (2, u64::from(self.input[1]))
        } else {
            self.fill(9).await?;
            (9, (&self.input[1..9]).get_u64())
        };
        let (what, max) = if flags & COMMAND == 0 {
            ("frame", MESSAGE_BYTES_MAX)
        } else {
            ("command", COMMAND_BYTES_MAX)
        };
        let len = usize::try_from(claimed).ok().filter(|len| *len <= max);
        let len = len.ok_or(SocketError::Large {
            what,
            bytes: claimed,
            max,
        })?;
        self.fill(head + len).await?;
        self.input.advance(head);
        Ok((flags, self.input.split_to(len).freeze()))
    }

    /// Reads until `len` bytes are there. Memory grows with what comes, not with what is claimed.
    async fn fill(&mut self, len: usize) -> Result<(), SocketError> {
        while self.input.len() < len {
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(SocketError::Closed);
            }
        }
        Ok(())
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), SocketError> {
        let late = |_| SocketError::Late(SEND_TIMEOUT);
        timeout(SEND_TIMEOUT, self.stream.write_all(bytes))
            .await
            .map_err(late)??;
        Ok(())
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").finish_non_exhaustive()
    }
}

fn put_frame(bytes: &mut Vec<u8>, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(len) => bytes.extend_from_slice(&[flags, len]),
        Err(_) => {
            bytes.push(flags | LONG);
            bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(body);
}

fn put_value(bytes: &mut Vec<u8>, value: &[u8]) {
    let len = u32::try_from(value.len()).expect("values are short");
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(value);
}

/// The value of a property of READY; names are compared without regard to case.
fn property<'a>(mut metadata: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    while let Some((len, rest)) = metadata.split_first() {
        let (name, rest) = rest.split_at_checked(usize::from(*len))?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
        let (value, rest) = rest.split_at_checked(len)?;
        if name.eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        metadata = rest;
    }
    None
}
