//! The eviction policies by name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{EvictionPolicy, Lru};

/// Which block of a tier is overwritten first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EvictionKind {
    /// `lru`: the least recently used.
    #[default]
    Lru,
}

/// A word that is no eviction policy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("'{word}' is no eviction policy: lru")]
pub struct UnknownEviction {
    /// The word.
    pub word: String,
}

impl EvictionKind {
    /// All of them.
    pub const ALL: [Self; 1] = [Self::Lru];

    /// The word that stands for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Lru => "lru",
        }
    }

    /// A policy of this kind, for a pool of any size.
    #[must_use]
    pub fn build(self) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Lru => Box::<Lru>::default(),
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
