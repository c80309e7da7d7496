//! The eviction policies by name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{EvictionPolicy, Lineage, Lru, MultiLru, S3Fifo};

/// Which block of a tier is overwritten first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EvictionKind {
    /// `lru`: the least recently used.
    #[default]
    Lru,
    /// `multi-lru`: the least recently used of those used least often.
    MultiLru,
    /// `s3-fifo`: what was not used again soon after it came.
    S3Fifo,
    /// `lineage`: the least recently used that no other block continues.
    Lineage,
}

/// A word that is no eviction policy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("'{word}' is no eviction policy: lru, multi-lru, s3-fifo or lineage")]
pub struct UnknownEviction {
    /// The word.
    pub word: String,
}

impl EvictionKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lru, Self::MultiLru, Self::S3Fifo, Self::Lineage];

    /// The word that stands for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::MultiLru => "multi-lru",
            Self::S3Fifo => "s3-fifo",
            Self::Lineage => "lineage",
        }
    }

    /// A policy of this kind, for a pool of any size.
    #[must_use]
    pub fn build(self) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Lru => Box::<Lru>::default(),
            Self::MultiLru => Box::<MultiLru>::default(),
            Self::S3Fifo => Box::<S3Fifo>::default(),
            Self::Lineage => Box::<Lineage>::default(),
        }
    }
}

impl FromStr for EvictionKind {
    type Err = UnknownEviction;

    fn from_str(word: &str) -> Result<Self, UnknownEviction> {
        let known = Self::ALL.into_iter().find(|kind| kind.word() == word);
        known.ok_or_else(|| UnknownEviction {
            word: word.to_owned(),
        })
    }
}

impl TryFrom<String> for EvictionKind {
    type Error = UnknownEviction;

    fn try_from(word: String) -> Result<Self, UnknownEviction> {
        word.parse()
    }
}

impl From<EvictionKind> for String {
    fn from(kind: EvictionKind) -> Self {
        kind.word().to_owned()
    }
}

impl fmt::Display for EvictionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_has_its_word() {
        for kind in EvictionKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "LRU".parse::<EvictionKind>().unwrap_err().to_string();
        let words = EvictionKind::ALL.map(EvictionKind::word);
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(error.contains("'LRU'"));
    }
}
