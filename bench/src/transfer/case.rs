//! What is measured: lanes, operations, block sizes, counts, patterns.

use std::{str::FromStr, sync::Arc};

use anyhow::bail;
use blockplane_transfer::{BlockLayout, Lane, Op};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

/// A lane to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LaneName {
    /// Both agents in one process (with --in-process).
    Loopback,
    /// Memory mapped from the other process.
    Shm,
    /// Sockets.
    Tcp,
}

/// A direction to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OpName {
    /// Into the peer's memory.
    Write,
    /// Out of the peer's memory.
    Read,
}

/// Where the blocks of a transfer lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// At random places on both sides, so that none can be merged.
    Scattered,
    /// One after the other on both sides.
    Contiguous,
}

/// A number of bytes: `4096`, `4k`, `1m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u32);

/// Block ids of one case: the i-th of one side pairs with the i-th of the other.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    pub(super) pattern: Pattern,
    pub(super) block_bytes: u32,
    pub(super) local: Arc<[u32]>,
    pub(super) remote: Arc<[u32]>,
    /// Blocks that fit one side's memory.
    places: u32,
}

impl Blocks {
    pub(super) fn new(
        pattern: Pattern,
        block_bytes: u32,
        count: u32,
        arena_bytes: u64,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let places = u32::try_from(arena_bytes / u64::from(block_bytes)).unwrap_or(u32::MAX);
        if count > places {
            bail!(
                "{count} blocks of {block_bytes} bytes do not fit {arena_bytes} bytes; raise \
                 --arena-mib"
            );
        }
        let (local, remote) = match pattern {
            Pattern::Contiguous => ((0..count).collect(), (0..count).collect()),
            Pattern::Scattered => (
                distinct(places, count, seed),
                distinct(places, count, seed ^ 1),
            ),
        };
        Ok(Self {
            pattern,
            block_bytes,
            local,
            remote,
            places,
        })
    }

    pub(super) fn layout(&self) -> BlockLayout {
        BlockLayout::contiguous(self.places, u64::from(self.block_bytes))
    }

    pub(super) fn count(&self) -> usize {
        self.local.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.count() * self.block_bytes as usize
    }
}

/// `count` different numbers below `places`, in random order.
fn distinct(places: u32, count: u32, seed: u64) -> Arc<[u32]> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut ids: Vec<u32> = (0..places).collect();
    // The first steps of a Fisher-Yates shuffle.
    for i in 0..count as usize {
        ids.swap(i, rng.random_range(i..places as usize));
    }
    ids.truncate(count as usize);
    ids.into()
}

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let lower = text.to_ascii_lowercase();
        let (digits, factor) = if let Some(digits) = lower.strip_suffix('k') {
            (digits, 1 << 10)
        } else if let Some(digits) = lower.strip_suffix('m') {
            (digits, 1 << 20)
        } else {
            (lower.as_str(), 1)
        };
        let bytes = digits
            .parse::<u32>()
            .ok()
            .and_then(|count| count.checked_mul(factor))
            .filter(|bytes| (8..=1 << 30).contains(bytes));
        match bytes {
            Some(bytes) => Ok(Self(bytes)),
            None => bail!("'{text}' is no block size; accepted: 8 to 1024m, such as 4096, 64k, 1m"),
        }
    }
}

impl LaneName {
    pub(super) const fn lane(self) -> Lane {
        match self {
            Self::Loopback => Lane::Loopback,
            Self::Shm => Lane::Shm,
            Self::Tcp => Lane::Tcp,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
        }
    }
}

impl OpName {
    pub(super) const fn op(self) -> Op {
        match self {
            Self::Write => Op::Write,
            Self::Read => Op::Read,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

impl Pattern {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Scattered => "scattered",
            Self::Contiguous => "contiguous",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn sizes_are_read_with_their_unit() {
        assert_eq!("4096".parse::<Size>().unwrap(), Size(4096));
        assert_eq!("64K".parse::<Size>().unwrap(), Size(65536));
        assert_eq!("1m".parse::<Size>().unwrap(), Size(1 << 20));
        for bad in ["", "4g", "0", "-1", "5000m", "k"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }

    #[test]
    fn scattered_blocks_are_distinct_in_range_and_different_on_both_sides() {
        let blocks = Blocks::new(Pattern::Scattered, 4096, 100, 1 << 20, 5).unwrap();
        for ids in [&blocks.local, &blocks.remote] {
            let distinct: BTreeSet<_> = ids.iter().collect();
            assert_eq!(distinct.len(), 100);
            assert!(ids.iter().all(|&id| id < 256));
        }
        assert_ne!(blocks.local, blocks.remote);
        assert!(Blocks::new(Pattern::Scattered, 4096, 257, 1 << 20, 5).is_err());
    }
}
