//! The first frames of a connection.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::ask::Timed;
use super::frame::{Code, HEADER_BYTES, Header, Kind};
use crate::peer::{Reader, Short, Writer};

/// First bytes of a HELLO body.
const MAGIC: &[u8; 4] = b"BPWR";
const VERSION: u16 = 3;
/// Largest body of HELLO and WELCOME.
pub(crate) const HELLO_BYTES_MAX: usize = 1024;

/// What an initiator says about itself and whom it expects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) role: HelloRole,
    pub(crate) loss_timeout: Duration,
    pub(crate) from: String,
    pub(crate) from_epoch: u64,
    pub(crate) to: String,
    pub(crate) to_epoch: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HelloRole {
    Control,
    /// A data connection of the connection that was welcomed with this nonce.
    Data {
        nonce: u64,
    },
}

/// What a target answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Welcome {
    pub(crate) nonce: u64,
    pub(crate) loss_timeout: Duration,
    /// READs that it holds open on one data connection.
    pub(crate) reads_max: u32,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeFailure {
    #[error("another life of the agent answers")]
    Stale,
    #[error(
        "the peer requires TLS and this agent has none: set `AgentConfig::tls` at both or at none"
    )]
    TlsRequired,
    #[error(
        "the peer answers in plaintext and this agent requires TLS: set `AgentConfig::tls` at both \
         or at none"
    )]
    PlaintextPeer,
    #[error("TLS: {0}")]
    Tls(String),
    #[error("the agent refused: {0:?}")]
    Refused(Code),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("what answers is not a blockplane agent of this version")]
    Malformed,
}

/// Magic and version, as every first frame has them.
pub(super) fn preamble() -> Vec<u8> {
    let mut out = Writer::default();
    out.bytes.extend_from_slice(MAGIC);
    out.u16(VERSION);
    out.u16(0);
    out.bytes
}

/// Whether a body that is nothing but magic and version has our version; `None` for noise.
pub(super) fn preamble_version(body: &[u8]) -> Option<bool> {
    let mut reader = Reader::new(body);
    let magic = reader.take(4).ok()?;
    let version = reader.u16().ok()?;
    reader.u16().ok()?;
    (magic == MAGIC && reader.remaining() == 0).then_some(version == VERSION)
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.bytes.extend_from_slice(MAGIC);
        out.u16(VERSION);
        let (role, nonce) = match self.role {
            HelloRole::Control => (0, 0),
            HelloRole::Data { nonce } => (1, nonce),
        };
        out.u8(role);
        out.u8(0);
        out.u32(millis(self.loss_timeout));
        out.u64(nonce);
        out.u64(self.from_epoch);
        out.u64(self.to_epoch);
        out.text(&self.from);
        out.text(&self.to);
        Header::new(Kind::Hello, 0, 0).with_body(&out.bytes)
    }

    /// The body of a HELLO, or what to refuse it with; `None` for noise.
    pub(crate) fn decode(body: &[u8]) -> Option<Result<Self, Code>> {
        let mut reader = Reader::new(body);
        if reader.take(4).ok()? != MAGIC {
            return None;
        }
        if reader.u16().ok()? != VERSION {
            return Some(Err(Code::Unsupported));
        }
        Self::read(&mut reader).ok().flatten().map(Ok)
    }

    fn read(reader: &mut Reader<'_>) -> Result<Option<Self>, Short> {
        let role = reader.u8()?;
        reader.u8()?;
        let loss_timeout = Duration::from_millis(u64::from(reader.u32()?));
        let nonce = reader.u64()?;
        let (from_epoch, to_epoch) = (reader.u64()?, reader.u64()?);
        let (Some(from), Some(to)) = (reader.text()?, reader.text()?) else {
            return Ok(None);
        };
        let role = match role {
            0 => HelloRole::Control,
            1 => HelloRole::Data { nonce },
            _ => return Ok(None),
        };
        let (from, to) = (from.to_owned(), to.to_owned());
        let named = (1..=255).contains(&from.len());
        Ok(named.then_some(Self {
            role,
            loss_timeout,
            from,
            from_epoch,
            to,
            to_epoch,
        }))
    }
}

impl Welcome {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.bytes.extend_from_slice(MAGIC);
        out.u16(VERSION);
        out.u16(0);
        out.u32(millis(self.loss_timeout));
        out.u64(self.nonce);
        out.u32(self.reads_max);
        Header::new(Kind::Welcome, 0, 0).with_body(&out.bytes)
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let magic = reader.take(4).ok()?;
        let version = reader.u16().ok()?;
        reader.u16().ok()?;
        let loss_timeout = Duration::from_millis(u64::from(reader.u32().ok()?));
        let nonce = reader.u64().ok()?;
        let reads_max = reader.u32().ok()?;
        let fits = magic == MAGIC && version == VERSION && reads_max > 0;
        fits.then_some(Self {
            nonce,
            loss_timeout,
            reads_max,
        })
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// A blocking socket on which everything together ends at one deadline: the other side may send a
/// byte now and then.
#[derive(Debug)]
pub(crate) struct Until<S> {
    pub(crate) socket: S,
    until: Instant,
}

impl<S: Timed> Until<S> {
    pub(crate) const fn new(socket: S, until: Instant) -> Self {
        Self { socket, until }
    }

    fn limit(&self) -> io::Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.bound(left)
    }
}

impl<S: Timed> Read for Until<S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.limit()?;
        self.socket.read(into)
    }
}

impl<S: Timed> Write for Until<S> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.limit()?;
        self.socket.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// Says hello on a blocking socket with timeouts and waits for the answer.
pub(crate) fn greet(
    socket: &mut (impl Read + Write),
    hello: &Hello,
) -> Result<Welcome, HandshakeFailure> {
    socket.write_all(&hello.encode())?;
    let mut header = [0; HEADER_BYTES];
    socket.read_exact(&mut header)?;
    let header = Header::decode(&header).ok_or(HandshakeFailure::Malformed)?;
    let len = usize::try_from(header.len).unwrap_or(usize::MAX);
    if len > HELLO_BYTES_MAX {
        return Err(HandshakeFailure::Malformed);
    }
    let mut body = vec![0; len];
    socket.read_exact(&mut body)?;
    match (header.kind, Code::from(header.code)) {
        (Kind::Welcome, _) => Welcome::decode(&body).ok_or(HandshakeFailure::Malformed),
        // To a data connection it says that its control connection is over, which can be tried again.
        (Kind::Refuse, Some(Code::Stale)) if hello.role == HelloRole::Control => {
            Err(HandshakeFailure::Stale)
        }
        (Kind::Refuse, Some(Code::TlsRequired)) => Err(HandshakeFailure::TlsRequired),
        (Kind::Refuse, Some(code)) => Err(HandshakeFailure::Refused(code)),
        _ => Err(HandshakeFailure::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_survives_the_wire_and_noise_does_not_pass() {
        let hello = Hello {
            role: HelloRole::Data { nonce: 7 },
            loss_timeout: Duration::from_secs(2),
            from: "a".into(),
            from_epoch: 1,
            to: "b".into(),
            to_epoch: 2,
        };
        let body = hello.encode().split_off(HEADER_BYTES);
        assert_eq!(Hello::decode(&body), Some(Ok(hello)));
        for len in 0..body.len() {
            assert_eq!(Hello::decode(&body[..len]), None, "{len} bytes");
        }
        let mut other = body;
        other[4] = 9;
        assert_eq!(Hello::decode(&other), Some(Err(Code::Unsupported)));
    }
}
