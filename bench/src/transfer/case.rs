//! What is measured: lanes, operations, memory kinds, and which blocks move where.

use std::{borrow::Cow, ops::Range, path::PathBuf, str::FromStr, sync::Arc};

use anyhow::bail;
use blockplane_transfer::{BlockIds, BlockLayout, Lane, Op};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

/// A lane to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LaneName {
    /// Both agents in one process (with --in-process).
    Loopback,
    /// Memory of the other process: mapped where it is an arena.
    Shm,
    /// Sockets.
    Tcp,
}

/// A direction to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OpName {
    /// From the initiator's memory into the target's.
    Write,
    /// From the target's memory into the initiator's.
    Read,
}

/// Where the blocks of a transfer lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// At random places on both sides, so that hardly any can be merged.
    Scattered,
    /// One after the other on both sides.
    Contiguous,
}

/// What one side of a transfer is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    /// An arena of the agent: a memory file that peers on this host can map.
    Arena,
    /// Ordinary memory of the process, registered with the agent.
    Host,
    /// An arena that is pinned for this device, which is what `host` means when the other side is a
    /// device.
    Pinned(u32),
    /// Memory of this device.
    Device(u32),
    /// A file at this path (the target's side only).
    File(PathBuf),
}

/// A number of bytes: `4096`, `4k`, `1m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u32);

/// How the blocks of one side's memory lie; the transfer crate's layout, without an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) blocks: u32,
    pub(super) block_stride: u64,
    pub(super) layers: u32,
    pub(super) layer_stride: u64,
    pub(super) run_bytes: u64,
}

/// Some blocks of one side: the i-th of one side pairs with the i-th of the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Side {
    pub(super) shape: Shape,
    pub(super) ids: Arc<[u32]>,
    /// Consecutive ids are given as a range, which is how a caller has them that allocates so.
    pub(super) range: bool,
}

/// What one transfer moves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Lot {
    /// Which of the initiator's targets.
    pub(super) peer: usize,
    /// Which posting thread of the initiator.
    pub(super) thread: usize,
    pub(super) local: Side,
    pub(super) remote: Side,
    /// As in [`Case::turn`].
    pub(super) turn: Option<Turn>,
}

/// One part of `of` equal parts of a side's memory, so that transfers that run at the same time
/// touch different blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) index: usize,
    pub(super) of: usize,
}

/// The parts of a run, which the other side has in another order: `outer` x `inner` of them here,
/// `inner` x `outer` there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Turn {
    pub(super) outer: u32,
    pub(super) inner: u32,
    /// Contiguous bytes of each.
    pub(super) bytes: u64,
}

/// Blocks of a size, a number and a pattern.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) pattern: Pattern,
    pub(super) shape: Shape,
    pub(super) count: u32,
    /// Give consecutive ids one by one all the same.
    pub(super) listed: bool,
    /// The initiator has the heads of a token together, the target the tokens of a head: how many
    /// tokens, how many heads.
    pub(super) turn: Option<Turn>,
}

impl Shape {
    /// Blocks of one run each, one after the other, as many as fit.
    pub(super) fn plain(block_bytes: u32, arena_bytes: u64) -> Self {
        let block_bytes = u64::from(block_bytes);
        Self {
            blocks: u32::try_from(arena_bytes / block_bytes).unwrap_or(u32::MAX),
            block_stride: block_bytes,
            layers: 1,
            layer_stride: block_bytes,
            run_bytes: block_bytes,
        }
    }

    pub(super) const fn layout(&self) -> BlockLayout {
        BlockLayout {
            offset: 0,
            blocks: self.blocks,
            block_stride: self.block_stride,
            layers: self.layers,
            layer_stride: self.layer_stride,
            run_bytes: self.run_bytes,
        }
    }

    /// Bytes of one block over all layers.
    pub(super) const fn block_bytes(&self) -> u64 {
        self.run_bytes * self.layers as u64
    }
}

impl Side {
    /// The ids as the transfer crate takes them.
    pub(super) fn block_ids(&self) -> BlockIds {
        match (self.range, &self.ids[..]) {
            (true, &[first, .., last]) => (first..last + 1).into(),
            _ => self.ids.clone().into(),
        }
    }

    /// Offsets of the runs of these blocks, block after block; each is `shape.run_bytes` long.
    pub(super) fn runs(&self) -> impl Iterator<Item = u64> + '_ {
        let shape = self.shape;
        self.ids.iter().flat_map(move |&id| {
            (0..u64::from(shape.layers))
                .map(move |layer| u64::from(id) * shape.block_stride + layer * shape.layer_stride)
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.ids.len() as u64 * self.shape.block_bytes()
    }
}

impl Turn {
    /// The same as the other side sees it.
    pub(super) const fn back(self) -> Self {
        Self {
            outer: self.inner,
            inner: self.outer,
            bytes: self.bytes,
        }
    }

    /// Puts the parts of a run into the order of the other side.
    pub(super) fn apply(self, run: &[u8], turned: &mut [u8]) {
        let part = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        let (outer, inner) = (self.outer as usize, self.inner as usize);
        for o in 0..outer {
            for i in 0..inner {
                let (from, to) = ((o * inner + i) * part, (i * outer + o) * part);
                turned[to..to + part].copy_from_slice(&run[from..from + part]);
            }
        }
    }
}

impl Case {
    /// Blocks for one transfer, in its parts of both memories.
    pub(super) fn lot(
        &self,
        peer: usize,
        thread: usize,
        local: Slice,
        remote: Slice,
        seed: u64,
    ) -> anyhow::Result<Lot> {
        // Different seeds put the blocks of the two sides at different places.
        Ok(Lot {
            peer,
            thread,
            local: self.side(local, seed)?,
            remote: self.side(remote, seed ^ 1)?,
            turn: self.turn,
        })
    }

    fn side(&self, slice: Slice, seed: u64) -> anyhow::Result<Side> {
        let places = slice.places(self.shape.blocks);
        let fit = places.end - places.start;
        if self.count > fit {
            bail!(
                "{} blocks of {} bytes do not fit a part of {fit} blocks ({} transfers share this \
                 memory); raise --arena-mib",
                self.count,
                self.shape.block_bytes(),
                slice.of
            );
        }
        let ids = match self.pattern {
            Pattern::Contiguous => (places.start..places.start + self.count).collect(),
            Pattern::Scattered => distinct(places, self.count, seed),
        };
        Ok(Side {
            shape: self.shape,
            ids,
            range: self.pattern == Pattern::Contiguous && !self.listed,
        })
    }
}

impl Slice {
    fn places(self, blocks: u32) -> Range<u32> {
        let parts = u32::try_from(self.of).unwrap_or(u32::MAX).max(1);
        let index = u32::try_from(self.index).unwrap_or(u32::MAX);
        let each = blocks / parts;
        let start = each.saturating_mul(index);
        start..start.saturating_add(each)
    }
}

/// `count` different numbers of `places`, in random order.
fn distinct(places: Range<u32>, count: u32, seed: u64) -> Arc<[u32]> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut ids: Vec<u32> = places.collect();
    // The first steps of a Fisher-Yates shuffle.
    let places = ids.len();
    for i in 0..count as usize {
        ids.swap(i, rng.random_range(i..places));
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

impl FromStr for Memory {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "arena" => Ok(Self::Arena),
            "host" => Ok(Self::Host),
            _ => match text.split_once(':') {
                Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
                Some(("cuda", number)) => match number.parse() {
                    Ok(device) => Ok(Self::Device(device)),
                    Err(_) => bail!("'{text}': devices are numbered cuda:0, cuda:1, ..."),
                },
                _ => {
                    bail!("'{text}' is no kind of memory; accepted: arena, host, cuda:N, file:PATH")
                }
            },
        }
    }
}

impl Memory {
    pub(super) fn name(&self) -> Cow<'static, str> {
        match self {
            Self::Arena => "arena".into(),
            Self::Host => "host".into(),
            Self::Pinned(_) => "pinned".into(),
            Self::Device(device) => format!("cuda:{device}").into(),
            Self::File(_) => "file".into(),
        }
    }

    pub(super) const fn device(&self) -> Option<u32> {
        match self {
            Self::Device(device) => Some(*device),
            Self::Arena | Self::Host | Self::Pinned(_) | Self::File(_) => None,
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
    pub(crate) const fn op(self) -> Op {
        match self {
            Self::Write => Op::Write,
            Self::Read => Op::Read,
        }
    }

    pub(crate) const fn as_str(self) -> &'static str {
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

    const CASE: Case = Case {
        pattern: Pattern::Scattered,
        shape: Shape {
            blocks: 256,
            block_stride: 4096,
            layers: 1,
            layer_stride: 4096,
            run_bytes: 4096,
        },
        count: 60,
        listed: false,
        turn: None,
    };

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
    fn kinds_of_memory_are_read() {
        assert_eq!("arena".parse::<Memory>().unwrap(), Memory::Arena);
        assert_eq!("host".parse::<Memory>().unwrap(), Memory::Host);
        let file = "file:/data/kv".parse::<Memory>().unwrap();
        assert_eq!(file, Memory::File("/data/kv".into()));
        assert_eq!("cuda:1".parse::<Memory>().unwrap(), Memory::Device(1));
        for bad in ["", "file:", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(bad.parse::<Memory>().is_err(), "{bad}");
        }
    }

    #[test]
    fn transfers_at_the_same_time_have_different_blocks_on_both_sides() {
        let mut seen = [BTreeSet::new(), BTreeSet::new()];
        for index in 0..4 {
            let slice = Slice { index, of: 4 };
            let lot = CASE.lot(0, 0, slice, slice, 5).unwrap();
            assert_ne!(lot.local.ids, lot.remote.ids);
            for (side, seen) in [&lot.local, &lot.remote].into_iter().zip(&mut seen) {
                assert!(side.ids.iter().all(|&id| id < 256 && seen.insert(id)));
            }
        }
        assert!(seen.iter().all(|seen| seen.len() == 240));
        let fifth = Slice { index: 0, of: 5 };
        let whole = Slice { index: 0, of: 1 };
        assert!(CASE.lot(0, 0, fifth, whole, 5).is_err());
    }

    #[test]
    fn a_turned_run_has_its_parts_the_other_way_round() {
        let turn = Turn {
            outer: 2,
            inner: 3,
            bytes: 2,
        };
        let (mut turned, mut back) = ([0; 12], [0; 12]);
        turn.apply(b"a0a1a2b0b1b2", &mut turned);
        assert_eq!(&turned, b"a0b0a1b1a2b2");
        turn.back().apply(&turned, &mut back);
        assert_eq!(&back, b"a0a1a2b0b1b2");
    }

    #[test]
    fn runs_follow_the_strides_of_a_layer_first_pool() {
        let shape = Shape {
            blocks: 8,
            block_stride: 16,
            layers: 2,
            layer_stride: 128,
            run_bytes: 16,
        };
        let ids = [3, 0].as_slice().into();
        let side = Side {
            shape,
            ids,
            range: false,
        };
        assert_eq!(side.runs().collect::<Vec<_>>(), [48, 176, 0, 128]);
        assert_eq!(side.bytes(), 64);
    }
}
