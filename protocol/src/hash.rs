//! Block and sequence hashes, compatible with Dynamo's router and block manager.
//!
//! ```text
//! salt      = 1337 + xxh3_64(lora_name) (if named) + xxh3_64(cache_salt, seed 1) (if given), wrapping
//! block     = xxh3_64(tokens as u32 little-endian, seed = salt)
//! seq[0]    = block[0]
//! seq[i]    = xxh3_64(seq[i-1] as u64 LE || block[i] as u64 LE, seed = 1337)
//! positional (128 bits, high to low) = mode 2 | position P | seq 64 | parent fragment R
//!             mode 0: P 8, R 54; mode 1: P 16, R 46; mode 2: P 24, R 38
//! ```
//!
//! Source of the definition: the public crates `dynamo-tokens` and `dynamo-kv-hashing` 1.6.1. The
//! golden vectors in `protocol/tests` were taken from them.

use std::fmt;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::token::TokenId;

const SEED: u64 = 1337;
const CACHE_SALT_SEED: u64 = 1;

/// Identity of the tokens of one block under a salt, without what came before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockHash(pub u64);

/// Identity of a block together with everything before it: the name under which KV is found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SequenceHash(pub u64);

/// Seed of the block hashes of a request; differs by `LoRA` adapter and by cache salt (tenant).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SaltHash(pub u64);

/// 128-bit sequence identity that also carries the position and a fragment of the parent's hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PositionalHash(pub u128);

impl SaltHash {
    /// The seed for a request with this cache salt and `LoRA` name; empty strings count as absent.
    #[must_use]
    pub fn new(cache_salt: Option<&str>, lora_name: Option<&str>) -> Self {
        let lora = lora_name.filter(|name| !name.is_empty());
        let salt = cache_salt.filter(|salt| !salt.is_empty());
        let mut seed = SEED;
        if let Some(name) = lora {
            seed = seed.wrapping_add(xxh3_64_with_seed(name.as_bytes(), 0));
        }
        if let Some(salt) = salt {
            seed = seed.wrapping_add(xxh3_64_with_seed(salt.as_bytes(), CACHE_SALT_SEED));
        }
        Self(seed)
    }
}

impl Default for SaltHash {
    fn default() -> Self {
        Self(SEED)
    }
}

impl BlockHash {
    /// Hash of one full block of tokens.
    #[must_use]
    pub fn of(tokens: &[TokenId], salt: SaltHash) -> Self {
        let mut bytes = Vec::with_capacity(tokens.len() * 4);
        for token in tokens {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        Self(xxh3_64_with_seed(&bytes, salt.0))
    }
}

impl SequenceHash {
    /// Hash of the first block of a sequence.
    #[must_use]
    pub const fn root(block: BlockHash) -> Self {
        Self(block.0)
    }

    /// Hash of the block that follows the one named by `self`.
    #[must_use]
    pub fn child(self, block: BlockHash) -> Self {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.0.to_le_bytes());
        bytes[8..].copy_from_slice(&block.0.to_le_bytes());
        Self(xxh3_64_with_seed(&bytes, SEED))
    }

    /// Chains `block` after `parent`, or starts a sequence where there is none.
    #[must_use]
    pub fn extend(parent: Option<Self>, block: BlockHash) -> Self {
        parent.map_or_else(|| Self::root(block), |parent| parent.child(block))
    }
}

impl PositionalHash {
    /// First position that cannot be expressed.
    pub const POSITION_END: u32 = 1 << 24;

    /// The positional hash of block `position`, or `None` at [`Self::POSITION_END`] and beyond.
    #[must_use]
    pub fn new(
        position: u32,
        sequence: SequenceHash,
        parent: Option<SequenceHash>,
    ) -> Option<Self> {
        let (mode, parent_bits) = match position {
            0..0x100 => (0u128, 54),
            0x100..0x1_0000 => (1, 46),
            0x1_0000..Self::POSITION_END => (2, 38),
            _ => return None,
        };
        let fragment = parent.map_or(0, |parent| parent.0 & ((1 << parent_bits) - 1));
        Some(Self(
            mode << 126
                | u128::from(position) << (64 + parent_bits)
                | u128::from(sequence.0) << parent_bits
                | u128::from(fragment),
        ))
    }
}

macro_rules! hex_fmt {
    ($($name:ident $width:literal),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{:0", $width, "x}"), self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:0", $width, "x})"), self.0)
            }
        }
    )*};
}
hex_fmt!(BlockHash "16", SequenceHash "16", SaltHash "16", PositionalHash "32");
