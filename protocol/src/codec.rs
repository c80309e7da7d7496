//! The wire form of every message: one version byte, then `MessagePack` with named fields.
//!
//! Named fields let a newer peer add optional ones. A change that an older peer must not
//! misunderstand raises [`VERSION`]. The byte layout is documented in `docs/protocol.md`.

use std::io::Cursor;

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

/// Version of the encoding; the first byte of every message.
pub const VERSION: u8 = 1;

/// Largest message that is accepted unless a caller says otherwise.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// Why bytes are not a message.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// No byte at all.
    #[error("empty message")]
    Empty,
    /// Another version of the encoding.
    #[error("message has encoding version {found}; this build speaks version {VERSION}")]
    Version {
        /// The first byte.
        found: u8,
    },
    /// Larger than the limit.
    #[error("message of {bytes} bytes is over the limit of {limit} bytes")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// More bytes than one message.
    #[error("{bytes} bytes follow the message")]
    Trailing {
        /// How many.
        bytes: u64,
    },
    /// Not the expected structure.
    #[error("malformed message: {0}")]
    Malformed(#[from] rmp_serde::decode::Error),
}

/// Encodes a message.
///
/// # Panics
/// When the type cannot be expressed in `MessagePack`; none of this crate's types does that.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    rmp_serde::encode::write_named(&mut bytes, message)
        .expect("writing to memory does not fail and protocol types have no unsupported shapes");
    bytes
}

/// Decodes a message of at most [`MESSAGE_BYTES_MAX`].
///
/// # Errors
/// When the bytes are not such a message.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(DecodeError::TooLarge {
            bytes: bytes.len(),
            limit: MESSAGE_BYTES_MAX,
        });
    }
    let (&version, body) = bytes.split_first().ok_or(DecodeError::Empty)?;
    if version != VERSION {
        return Err(DecodeError::Version { found: version });
    }
    let mut rest = Cursor::new(body);
    let message = rmp_serde::from_read(&mut rest)?;
    match (body.len() as u64).saturating_sub(rest.position()) {
        0 => Ok(message),
        bytes => Err(DecodeError::Trailing { bytes }),
    }
}
