//! TLS between agents: a layer inside [`Socket`](super::Socket), so that what is above sees the
//! same calls with the same meaning.
//!
//! Payload is copied into and out of records of 16 KiB; the memory of regions is never referenced.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig};

use super::ask::{Timed, ask_metadata};
use super::handshake::{HandshakeFailure, Hello, Welcome, greet};
use super::socket::Pieces;
use crate::config::{Pem, TlsConfig, TlsPeerName};
use crate::error::AgentError;
use crate::memory::copy_bytes;

/// First byte of a TLS connection: a handshake record.
pub(crate) const TLS_FIRST_BYTE: u8 = 22;
const RECORD_BYTES: usize = 16 << 10;
/// Payload that is encrypted before it is given to the kernel.
const BATCH_BYTES: usize = 8 * RECORD_BYTES;
const RECEIVE_BYTES: usize = 256 << 10;

/// What an agent needs to speak TLS as initiator and as target.
pub(crate) struct TlsContext {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    peer_name: TlsPeerName,
}

impl fmt::Debug for TlsContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsContext").finish_non_exhaustive()
    }
}

impl TlsContext {
    pub(crate) fn new(config: &TlsConfig) -> Result<Self, AgentError> {
        let chain = certificates(&config.certificate_chain, "tls.certificate_chain")?;
        let roots_given = certificates(&config.roots, "tls.roots")?;
        let key = private_key(&config.private_key)?;
        let mut roots = RootCertStore::empty();
        for root in roots_given {
            let added = roots.add(root);
            added.map_err(|error| invalid("tls.roots", error, "certificates of authorities"))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let unfit = |error: rustls::Error| {
            let accepted = "a chain and the private key of its first certificate";
            invalid("tls.private_key", error, accepted)
        };
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unfit)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unfit)?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unfit)?;
        let server = if config.require_client_certificate {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            let accepted = "at least one certificate of an authority";
            server.with_client_cert_verifier(
                verifier.map_err(|error| invalid("tls.roots", error, accepted))?,
            )
        } else {
            server.with_no_client_auth()
        };
        let mut server = server.with_single_cert(chain, key).map_err(unfit)?;
        // Connections are few and long: nothing is resumed.
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            peer_name: config.peer_name.clone(),
        })
    }

    /// Shakes hands and says hello on a blocking socket with timeouts.
    pub(crate) fn greet(
        &self,
        socket: &mut (impl Read + Write),
        address: &str,
        hello: &Hello,
    ) -> Result<(Welcome, TlsSession), HandshakeFailure> {
        let mut session = self.client_session(address, Some(&hello.to))?;
        let greeted = greet(&mut rustls::Stream::new(&mut session, socket), hello);
        match greeted {
            Ok(welcome) => Ok((welcome, TlsSession::new(session.into()))),
            Err(HandshakeFailure::Io(error)) => Err(failure(error)),
            Err(other) => Err(other),
        }
    }

    /// Shakes hands and asks for metadata on a blocking socket.
    pub(crate) fn ask(
        &self,
        socket: &mut TcpStream,
        address: &str,
        until: Instant,
    ) -> Result<Vec<u8>, HandshakeFailure> {
        let mut session = self.client_session(address, None)?;
        let mut secure = SecureStream(rustls::Stream::new(&mut session, socket));
        ask_metadata(&mut secure, until).map_err(|error| match error {
            HandshakeFailure::Io(error) => failure(error),
            other => other,
        })
    }

    /// The initiator's session with an agent, whose name may not be known yet.
    fn client_session(
        &self,
        address: &str,
        agent: Option<&str>,
    ) -> Result<ClientConnection, HandshakeFailure> {
        let expected = match (&self.peer_name, agent) {
            (TlsPeerName::Host, _) => address.rsplit_once(':').map_or(address, |(host, _)| host),
            (TlsPeerName::Agent, Some(name)) => name,
            (TlsPeerName::Agent, None) => {
                return Err(HandshakeFailure::Tls(
                    "the name that its certificate must have is that of the agent, which is not \
                     known before its metadata: get that by other means"
                        .to_owned(),
                ));
            }
            (TlsPeerName::Fixed(name), _) => name,
        };
        let expected = expected.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(expected.to_owned()).map_err(|_| {
            HandshakeFailure::Tls(format!(
                "{expected:?} is no host name or address that a certificate can have"
            ))
        })?;
        ClientConnection::new(self.client.clone(), name)
            .map_err(|error| HandshakeFailure::Tls(error.to_string()))
    }

    /// A session for a connection that a peer has made.
    pub(crate) fn accept(&self) -> io::Result<TlsSession> {
        let session = rustls::ServerConnection::new(self.server.clone());
        Ok(TlsSession::new(session.map_err(io::Error::other)?.into()))
    }
}

/// A blocking socket behind TLS.
struct SecureStream<'a>(rustls::Stream<'a, ClientConnection, TcpStream>);

impl Read for SecureStream<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for SecureStream<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Timed for SecureStream<'_> {
    fn bound(&self, left: Duration) -> io::Result<()> {
        self.0.sock.bound(left)
    }
}

/// An error of a handshake, or of the first exchange behind it.
fn failure(error: io::Error) -> HandshakeFailure {
    let tls = error
        .get_ref()
        .and_then(|e| e.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidMessage(_)) => HandshakeFailure::PlaintextPeer,
        Some(error) => HandshakeFailure::Tls(error.to_string()),
        None => HandshakeFailure::Io(error),
    }
}

fn invalid(field: &'static str, got: impl fmt::Display, accepted: &'static str) -> AgentError {
    AgentError::InvalidConfig {
        field,
        got: got.to_string(),
        accepted,
    }
}

fn read(pem: &Pem, field: &'static str) -> Result<Vec<u8>, AgentError> {
    match pem {
        Pem::Bytes(bytes) => Ok(bytes.clone()),
        Pem::File(path) => std::fs::read(path).map_err(|source| AgentError::Io {
            what: format!("read {field} from {}", path.display()),
            source,
        }),
    }
}

fn certificates(
    pem: &Pem,
    field: &'static str,
) -> Result<Vec<CertificateDer<'static>>, AgentError> {
    let bytes = read(pem, field)?;
    let accepted = "PEM with at least one CERTIFICATE";
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let list = list.map_err(|error| invalid(field, error, accepted))?;
    if list.is_empty() {
        return Err(invalid(field, "PEM without a certificate", accepted));
    }
    Ok(list)
}

fn private_key(pem: &Pem) -> Result<PrivateKeyDer<'static>, AgentError> {
    let field = "tls.private_key";
    let bytes = read(pem, field)?;
    let accepted = "PEM with a PRIVATE KEY (PKCS 8, PKCS 1 or SEC 1)";
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| invalid(field, error, accepted))
}

/// The TLS side of one connection.
pub(crate) struct TlsSession {
    session: Connection,
    /// One record of plaintext on its way between a region and the session.
    record: Box<[u8]>,
    /// Ciphertext that was received and not yet given to the session.
    received: Box<[u8]>,
    start: usize,
    end: usize,
}

impl fmt::Debug for TlsSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsSession").finish_non_exhaustive()
    }
}

impl TlsSession {
    pub(crate) fn new(mut session: Connection) -> Self {
        // What is encrypted at a time is bounded here.
        session.set_buffer_limit(None);
        Self {
            session,
            record: vec![0; RECORD_BYTES].into(),
            received: vec![0; RECEIVE_BYTES].into(),
            start: 0,
            end: 0,
        }
    }

    /// Ciphertext waits for the socket to take it.
    pub(crate) fn unsent(&self) -> bool {
        self.session.wants_write()
    }

    /// Sends waiting ciphertext; false when the socket is full.
    pub(crate) fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut Raw(socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Encrypts and sends. What it returns as taken may in part wait here ([`Self::unsent`]).
    ///
    /// # Safety
    /// Every piece is mapped readable during the call.
    pub(crate) unsafe fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        pieces: &Pieces,
    ) -> io::Result<usize> {
        if !self.flush(socket)? || self.session.is_handshaking() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let (mut taken, mut filled) = (0, 0);
        let mut batch = 0;
        for (base, bytes) in pieces.iter() {
            let mut at = 0;
            while at < bytes {
                let now = (bytes - at).min(self.record.len() - filled);
                // SAFETY: `at` lies inside the piece.
                let from = unsafe { base.add(at) };
                let to = self.record[filled..].as_mut_ptr();
                // SAFETY: the piece is readable (caller), and `now` bytes fit both sides.
                unsafe { copy_bytes(from, to, now) };
                (at, filled) = (at + now, filled + now);
                if filled == self.record.len() {
                    self.session.writer().write_all(&self.record)?;
                    (taken, batch, filled) = (taken + filled, batch + filled, 0);
                    if batch >= BATCH_BYTES {
                        if !self.flush(socket)? {
                            return Ok(taken);
                        }
                        batch = 0;
                    }
                }
            }
        }
        self.session.writer().write_all(&self.record[..filled])?;
        self.flush(socket)?;
        Ok(taken + filled)
    }

    /// Receives and decrypts until the pieces are full or the socket is empty. Zero bytes mean that
    /// the peer closed the connection.
    ///
    /// # Safety
    /// Every piece is mapped writable during the call, and nothing holds a reference into it.
    pub(crate) unsafe fn recv(
        &mut self,
        socket: BorrowedFd<'_>,
        pieces: &Pieces,
    ) -> io::Result<usize> {
        let mut got = 0;
        for (base, bytes) in pieces.iter() {
            let mut at = 0;
            while at < bytes {
                let want = (bytes - at).min(self.record.len());
                let count = match self.session.reader().read(&mut self.record[..want]) {
                    Ok(count) => count,
                    // The connection ended without a farewell.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        match self.fetch(socket) {
                            Ok(()) => continue,
                            Err(error) if got == 0 => return Err(error),
                            // Shown again by the next call.
                            Err(_) => return Ok(got),
                        }
                    }
                    Err(error) => return Err(error),
                };
                if count == 0 {
                    return Ok(got);
                }
                // SAFETY: `at` lies inside the piece.
                let to = unsafe { base.add(at) };
                // SAFETY: the piece is writable (caller), and `count` bytes fit both sides.
                unsafe { copy_bytes(self.record.as_ptr(), to, count) };
                (at, got) = (at + count, got + count);
            }
        }
        Ok(got)
    }

    /// Gives the session more ciphertext.
    fn fetch(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            let flags = RecvFlags::DONTWAIT;
            let (received, _) = rustix::net::recv(socket, &mut self.received[..], flags)?;
            self.end = received;
            if received == 0 {
                self.session.read_tls(&mut io::empty())?;
            }
        }
        let mut rest = &self.received[self.start..self.end];
        let before = rest.len();
        if before > 0 {
            self.session.read_tls(&mut rest)?;
            self.start += before - rest.len();
        }
        let processed = self.session.process_new_packets();
        // Answers of the handshake, or why it fails.
        self.flush(socket)?;
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(())
    }
}

/// The socket under a session.
struct Raw<'a>(BorrowedFd<'a>);

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[io::IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut ancillary = rustix::net::SendAncillaryBuffer::default();
        Ok(rustix::net::sendmsg(self.0, pieces, &mut ancillary, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
