//! Keys and headers of objects. docs/kv-object.md describes them byte by byte.

use blockplane_protocol::{BlockHash, SequenceHash, TokenBlock};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{fingerprint::Fingerprint, tier::Invalid};

/// Bytes in front of the payload.
pub(super) const HEADER: usize = 128;
const MAGIC: [u8; 8] = *b"BPKVOBJT";
const VERSION: u32 = 1;
const HAS_PARENT: u32 = 1;
/// Where the checksum of the header itself is.
const SEAL: usize = HEADER - 8;

/// What an object says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) name: TokenBlock,
    pub(super) parent: Option<SequenceHash>,
    pub(super) fingerprint: Fingerprint,
    /// Bytes of the payload.
    pub(super) bytes: u64,
    /// See [`payload_hasher`].
    pub(super) checksum: u64,
}

/// Folder of the objects of one fingerprint.
pub(super) fn folder(fingerprint: &Fingerprint) -> String {
    let digest = fingerprint.digest();
    let (rank, size) = (fingerprint.tp_rank, fingerprint.tp_size);
    format!("{digest:016x}/tp{rank}-{size}")
}

/// Key of a block in that folder.
pub(super) fn key(folder: &str, name: SequenceHash) -> String {
    format!("{folder}/{:016x}", name.0)
}

/// The reverse of [`key`].
pub(super) fn name_of(folder: &str, key: &str) -> Option<SequenceHash> {
    let name = key.strip_prefix(folder)?.strip_prefix('/')?;
    let exact = name.len() == 16
        && name
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let name = u64::from_str_radix(name, 16).ok()?;
    exact.then_some(SequenceHash(name))
}

/// Checksum of a payload: xxh3-64, seeded with what the bytes are stored as, so that the bytes of
/// another block or of another model never pass.
pub(super) fn payload_hasher(name: TokenBlock, fingerprint: &Fingerprint) -> Xxh3 {
    Xxh3::with_seed(payload_seed(name, fingerprint))
}

/// Seed of that checksum.
pub(super) fn payload_seed(name: TokenBlock, fingerprint: &Fingerprint) -> u64 {
    let mut bound = [0; 24];
    bound[..8].copy_from_slice(&name.sequence.0.to_le_bytes());
    bound[8..16].copy_from_slice(&name.block.0.to_le_bytes());
    bound[16..].copy_from_slice(&fingerprint.digest().to_le_bytes());
    xxh3_64(&bound)
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut at = 0;
        let mut put = |value: &[u8]| {
            bytes[at..at + value.len()].copy_from_slice(value);
            at += value.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        let flags = if self.parent.is_some() { HAS_PARENT } else { 0 };
        put(&flags.to_le_bytes());
        put(&self.bytes.to_le_bytes());
        put(&self.name.sequence.0.to_le_bytes());
        put(&self.name.block.0.to_le_bytes());
        put(&self.parent.map_or(0, |parent| parent.0).to_le_bytes());
        put(&self.fingerprint.encode());
        put(&self.checksum.to_le_bytes());
        let seal = xxh3_64(&bytes[..SEAL]);
        bytes[SEAL..].copy_from_slice(&seal.to_le_bytes());
        bytes
    }

    /// Accepts what [`Header::encode`] makes and nothing else.
    pub(super) fn decode(bytes: &[u8; HEADER]) -> Result<Self, Invalid> {
        let long = |at: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(value)
        };
        let short = |at: usize| {
            let mut value = [0; 4];
            value.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(value)
        };
        if long(SEAL) != xxh3_64(&bytes[..SEAL]) {
            return Err(Invalid::Checksum);
        }
        if bytes[..8] != MAGIC || short(8) != VERSION {
            return Err(Invalid::Fingerprint);
        }
        let mut fingerprint = [0; Fingerprint::BYTES];
        fingerprint.copy_from_slice(&bytes[48..80]);
        let header = Self {
            name: TokenBlock {
                sequence: SequenceHash(long(24)),
                block: BlockHash(long(32)),
            },
            parent: (short(12) == HAS_PARENT).then(|| SequenceHash(long(40))),
            fingerprint: Fingerprint::decode(&fingerprint),
            bytes: long(16),
            checksum: long(80),
        };
        if header.encode() == *bytes {
            Ok(header)
        } else {
            Err(Invalid::Checksum)
        }
    }

    /// Whether the object is the one that was asked for.
    pub(super) fn check(
        &self,
        name: TokenBlock,
        fingerprint: &Fingerprint,
        bytes: u64,
    ) -> Result<(), Invalid> {
        if self.fingerprint != *fingerprint || self.bytes != bytes {
            Err(Invalid::Fingerprint)
        } else if self.name != name {
            Err(Invalid::Missing)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::{DType, KvLayout};

    use super::*;

    fn header(parent: Option<SequenceHash>) -> Header {
        let layout = KvLayout::dense(4, 2, 64, 16, DType::Bf16);
        Header {
            name: TokenBlock {
                block: BlockHash(0x1234),
                sequence: SequenceHash(0xabcd_ef01_0203_0405),
            },
            parent,
            fingerprint: Fingerprint::of(9, &layout, 1, 4),
            bytes: 65_536,
            checksum: 77,
        }
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        for parent in [None, Some(SequenceHash(0)), Some(SequenceHash(5))] {
            let header = header(parent);
            let bytes = header.encode();
            assert_eq!(Header::decode(&bytes), Ok(header));
            for bit in 0..HEADER * 8 {
                let mut torn = bytes;
                torn[bit / 8] ^= 1 << (bit % 8);
                assert!(Header::decode(&torn).is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn another_block_is_not_this_one() {
        let header = header(None);
        let right = |name, fingerprint: &Fingerprint, bytes| header.check(name, fingerprint, bytes);
        assert_eq!(right(header.name, &header.fingerprint, 65_536), Ok(()));
        let other = TokenBlock {
            block: BlockHash(1),
            ..header.name
        };
        assert_eq!(
            right(other, &header.fingerprint, 65_536),
            Err(Invalid::Missing)
        );
        let moved = Fingerprint {
            tp_rank: 2,
            ..header.fingerprint
        };
        assert_eq!(
            right(header.name, &moved, 65_536),
            Err(Invalid::Fingerprint)
        );
        assert_eq!(
            right(header.name, &header.fingerprint, 1),
            Err(Invalid::Fingerprint)
        );
    }

    #[test]
    fn keys_name_their_block() {
        let fingerprint = header(None).fingerprint;
        let folder = folder(&fingerprint);
        assert!(folder.ends_with("/tp1-4"), "{folder}");
        let name = SequenceHash(0xab);
        let key = key(&folder, name);
        assert_eq!(name_of(&folder, &key), Some(name));
        for other in [
            "",
            "x",
            "/00000000000000AB",
            "/+0000000000000ab",
            "/0000000000000000ab",
        ] {
            assert_eq!(
                name_of(&folder, &format!("{folder}{other}")),
                None,
                "{other}"
            );
        }
    }

    #[test]
    fn a_checksum_is_that_of_one_block_of_one_model() {
        let header = header(None);
        let sum = |name, fingerprint: &Fingerprint| {
            let mut hasher = payload_hasher(name, fingerprint);
            hasher.update(b"the same bytes");
            hasher.digest()
        };
        let base = sum(header.name, &header.fingerprint);
        let mut name = header.name;
        name.sequence.0 ^= 1;
        assert_ne!(sum(name, &header.fingerprint), base);
        let mut fingerprint = header.fingerprint;
        fingerprint.model ^= 1;
        assert_ne!(sum(header.name, &fingerprint), base);
    }
}
