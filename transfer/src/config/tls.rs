//! Configuration of TLS.

use std::path::PathBuf;

/// TLS 1.3 between agents. One certificate serves both ends of an agent: as the server of
/// connections that peers make, and as the client of its own.
///
/// Whoever has a certificate of the authorities in `roots` may connect under any agent name.
#[derive(Clone)]
pub struct TlsConfig {
    /// Certificate of this agent, followed by intermediate ones.
    pub certificate_chain: Pem,
    /// Private key of the first certificate.
    pub private_key: Pem,
    /// Authorities whose certificates peers may have. Those of the system are not consulted.
    pub roots: Pem,
    /// Peers that connect to this agent must have a certificate (mutual TLS). Default true.
    pub require_client_certificate: bool,
    /// The name that the certificate of a peer must be valid for when this agent connects to it.
    pub peer_name: TlsPeerName,
}

impl TlsConfig {
    /// Mutual TLS; peers are known by the host in their address.
    #[must_use]
    pub const fn new(certificate_chain: Pem, private_key: Pem, roots: Pem) -> Self {
        Self {
            certificate_chain,
            private_key,
            roots,
            require_client_certificate: true,
            peer_name: TlsPeerName::Host,
        }
    }
}

impl std::fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys do not belong into logs.
        f.debug_struct("TlsConfig")
            .field(
                "require_client_certificate",
                &self.require_client_certificate,
            )
            .field("peer_name", &self.peer_name)
            .finish_non_exhaustive()
    }
}

/// Certificates or a key in PEM.
#[derive(Clone)]
pub enum Pem {
    /// Read when the agent starts.
    File(PathBuf),
    /// As it is.
    Bytes(Vec<u8>),
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}

/// What the certificate of a peer must be valid for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TlsPeerName {
    /// The host name or address in the peer's metadata
    /// ([`AgentConfig::advertise_host`](crate::AgentConfig::advertise_host), or the address it listens on).
    #[default]
    Host,
    /// The name of the peer's agent, as a DNS name.
    Agent,
    /// This DNS name or address, whichever peer it is.
    Fixed(String),
}
