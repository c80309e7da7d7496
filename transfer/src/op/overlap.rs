//! No destination byte may be named twice, nor be a source byte at another place.
//!
//! The common cases cost about a nanosecond per block: ids that are consecutive or grow need a look,
//! others one bit each. Only operations within one memory, or of ragged pieces, are sorted.

use std::cell::RefCell;

use super::request::Op;
use super::work::SetPair;
use crate::agent::{DeviceOfPeer, PeerDeviceMemory, RemoteMemory, RemoteRegion};
use crate::error::PrepareError;
use crate::memory::Region;
use crate::plan::{BlockIds, BlockSet, Order, Segments, Table, TensorSet, for_each_segment};

/// Bits kept per thread between two checks.
const SCRATCH_WORDS_KEPT: usize = 32 << 10;

thread_local! {
    /// All zero between two checks.
    static SCRATCH: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// A region as addresses. Space 0 is this process; every other region of a peer is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Extent {
    space: u64,
    start: u64,
    bytes: u64,
}

impl Extent {
    fn local(region: &Region) -> Self {
        Self {
            space: 0,
            start: region.address(),
            bytes: region.len as u64,
        }
    }

    fn remote(region: &RemoteRegion) -> Self {
        let (space, start) = match &region.memory {
            RemoteMemory::Mapped(mapped) => (0, mapped.base() as u64),
            RemoteMemory::Device(DeviceOfPeer {
                memory: PeerDeviceMemory::InProcess(theirs),
                ..
            }) => (0, theirs.address()),
            RemoteMemory::Device(_)
            | RemoteMemory::Foreign(_)
            | RemoteMemory::Rdma(_)
            | RemoteMemory::Streamed(_)
            | RemoteMemory::Stored
            | RemoteMemory::Unreachable(_) => (region.id.0.wrapping_add(1), 0),
        };
        Self {
            space,
            start,
            bytes: region.len,
        }
    }

    /// The part between two offsets.
    const fn part(self, (start, end): (u64, u64)) -> Self {
        Self {
            space: self.space,
            start: self.start.saturating_add(start),
            bytes: end.saturating_sub(start),
        }
    }

    fn meets(&self, other: &Self) -> bool {
        self.space == other.space
            && self.start < other.start.saturating_add(other.bytes)
            && other.start < self.start.saturating_add(self.bytes)
    }
}

/// Destination and source of a set, and the blocks of the destination.
fn sides(op: Op, set: &SetPair) -> (Extent, Extent, &BlockSet) {
    let local = Extent::local(&set.local_region);
    let remote = Extent::remote(&set.remote_region);
    match op {
        Op::Write => (remote, local, &set.remote),
        Op::Read => (local, remote, &set.local),
    }
}

/// Checks validated sets.
pub(crate) fn check_overlap(op: Op, sets: &[SetPair]) -> Result<(), PrepareError> {
    if let [set] = sets {
        let (to, from, blocks) = sides(op, set);
        return if !to.meets(&from) && disjoint(&[blocks], to.bytes) {
            Ok(())
        } else {
            check_sorted(op, sets)
        };
    }
    // The regions of both sides, each once.
    let mut known = Table::with_capacity(64);
    let mut destinations: Vec<(Extent, Vec<&BlockSet>)> = Vec::new();
    let mut sources = Vec::new();
    let mut known_sources = Table::with_capacity(64);
    for set in sets {
        let (to, from, blocks) = sides(op, set);
        let number = known.number_of([to.space, to.start, to.bytes]);
        if number == destinations.len() {
            destinations.push((to, Vec::new()));
        }
        destinations[number].1.push(blocks);
        if known_sources.number_of([from.space, from.start, from.bytes]) == sources.len() {
            sources.push(from);
        }
    }
    let extents = destinations
        .iter()
        .map(|(extent, _)| (*extent, true))
        .chain(sources.into_iter().map(|extent| (extent, false)));
    let fits = |(extent, blocks): &(Extent, Vec<&BlockSet>)| disjoint(blocks, extent.bytes);
    if apart(extents.collect()) && destinations.iter().all(fits) {
        Ok(())
    } else {
        check_sorted(op, sets)
    }
}

/// Checks the two sides of a copy that rearranges: parts of blocks, valid for their regions.
pub(crate) fn check_tensor_overlap(
    op: Op,
    (local_region, local): (&Region, &TensorSet),
    (remote_region, remote): (&RemoteRegion, &TensorSet),
) -> Result<(), PrepareError> {
    let here = (Extent::local(local_region), local);
    let there = (Extent::remote(remote_region), remote);
    let ((to_extent, to), (from_extent, from)) = match op {
        Op::Write => (there, here),
        Op::Read => (here, there),
    };
    // Within a layout no two runs share a byte: a byte is named twice where a block is.
    if !are_distinct(&to.ids) {
        return Err(PrepareError::Overlap {
            offset: first_named_twice(&to.ids).map_or(to.base, |id| to.block_at(id)),
        });
    }
    if !to_extent
        .part(to.reach())
        .meets(&from_extent.part(from.reach()))
    {
        return Ok(());
    }
    let mut to = stretches(to_extent, to);
    let mut from = stretches(from_extent, from);
    check_pieces(&mut to, &mut from)
}

/// Pieces of one side.
fn stretches(extent: Extent, set: &TensorSet) -> Vec<Piece> {
    let stretches = set.stretches();
    let mut pieces = Vec::new();
    for id in set.ids.iter() {
        let block = set.block_at(id);
        stretches.all(|at| {
            let address = extent.start.wrapping_add(block + at);
            pieces.push((extent.space, address, stretches.bytes, block + at));
            true
        });
    }
    pieces
}

fn first_named_twice(ids: &BlockIds) -> Option<u32> {
    let mut sorted: Vec<u32> = ids.iter().collect();
    sorted.sort_unstable();
    sorted
        .windows(2)
        .find(|pair| pair[0] == pair[1])
        .map(|pair| pair[0])
}

/// Whether no destination (true) shares bytes with another extent. Memory can be registered twice:
/// addresses tell, not regions.
fn apart(mut extents: Vec<(Extent, bool)>) -> bool {
    extents.sort_unstable();
    let (mut space, mut end_of_all, mut end_of_destinations) = (0, 0, 0);
    for (extent, destination) in extents {
        if extent.space != space {
            (space, end_of_all, end_of_destinations) = (extent.space, 0, 0);
        }
        let reached = if destination {
            end_of_all
        } else {
            end_of_destinations
        };
        if extent.start < reached {
            return false;
        }
        let end = extent.start.saturating_add(extent.bytes);
        end_of_all = end.max(end_of_all);
        if destination {
            end_of_destinations = end.max(end_of_destinations);
        }
    }
    true
}

/// Whether no byte of one region is named twice by the sets; false also when that is not found out
/// cheaply.
fn disjoint(sets: &[&BlockSet], region_bytes: u64) -> bool {
    match sets {
        [set] if set.layout.block_stride >= set.layout.run_bytes => are_distinct(&set.ids),
        _ => distinct_granules(sets, region_bytes),
    }
}

/// Whether no block is named twice.
fn are_distinct(block_ids: &BlockIds) -> bool {
    let Some(ids) = block_ids.list() else {
        return true;
    };
    if ids.is_sorted_by(|a, b| a < b) {
        return true;
    }
    let words = block_ids.max().map_or(0, |max| max as usize / 64 + 1);
    if words <= affordable(ids.len()) {
        return with_scratch(words, |bits| {
            ids.iter().fold(0, |twice, &id| {
                let (word, bit) = (&mut bits[id as usize / 64], 1u64 << (id % 64));
                let twice = twice | (*word & bit);
                *word |= bit;
                twice
            }) == 0
        });
    }
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted.is_sorted_by(|a, b| a < b)
}

/// Whether no run shares a byte with another, told by one bit for each unit of the largest power
/// of two that all offsets and lengths are multiples of.
fn distinct_granules(sets: &[&BlockSet], region_bytes: u64) -> bool {
    let bits = sets.iter().fold(0, |bits, set| {
        let layout = &set.layout;
        let layers = if set.layers.end > 1 {
            layout.layer_stride
        } else {
            0
        };
        let blocks = if layout.blocks > 1 {
            layout.block_stride
        } else {
            0
        };
        bits | layout.offset | blocks | layers | layout.run_bytes
    });
    let shift = bits.trailing_zeros().min(63);
    let runs: u64 = sets.iter().map(|set| set.runs()).sum();
    let words = usize::try_from((region_bytes >> shift) / 64 + 1).unwrap_or(usize::MAX);
    if words > affordable(usize::try_from(runs).unwrap_or(usize::MAX)) {
        return false;
    }
    with_scratch(words, |bits| {
        sets.iter().all(|set| {
            // Runs of one set that touch come out as one: no run is missed by that.
            Segments::new(set, Order::BlockMajor, 0..set.bytes())
                .all(|(offset, bytes)| mark(bits, offset >> shift, (offset + bytes) >> shift))
        })
    })
}

/// Sets the bits of a range; false when one is set already.
fn mark(bits: &mut [u64], start: u64, end: u64) -> bool {
    let (mut at, end) = (
        usize::try_from(start).unwrap_or(usize::MAX),
        usize::try_from(end).unwrap_or(usize::MAX),
    );
    let mut twice = 0;
    while at < end {
        let count = (64 - at % 64).min(end - at);
        let mask = (u64::MAX >> (64 - count)) << (at % 64);
        let word = &mut bits[at / 64];
        twice |= *word & mask;
        *word |= mask;
        at += count;
    }
    twice == 0
}

/// Words of bits that are worth it for so many runs.
const fn affordable(runs: usize) -> usize {
    runs.saturating_mul(16).saturating_add(1024)
}

fn with_scratch<T>(words: usize, check: impl FnOnce(&mut [u64]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < words {
            scratch.resize(words, 0);
        }
        let result = check(&mut scratch[..words]);
        scratch[..words].fill(0);
        if scratch.len() > SCRATCH_WORDS_KEPT {
            scratch.truncate(SCRATCH_WORDS_KEPT);
            scratch.shrink_to_fit();
        }
        result
    })
}

/// Address space, address, bytes, and offset in its region.
type Piece = (u64, u64, u64, u64);

/// The general case: sorts the pieces of the destination and of the source.
fn check_sorted(op: Op, sets: &[SetPair]) -> Result<(), PrepareError> {
    let mut to = Vec::new();
    let mut from = Vec::new();
    for set in sets {
        let local = Extent::local(&set.local_region);
        let remote = Extent::remote(&set.remote_region);
        for_each_segment(
            &set.local,
            &set.remote,
            set.order,
            0..set.local.bytes(),
            |l, r, bytes| {
                let l = (local.space, local.start.wrapping_add(l), bytes, l);
                let r = (remote.space, remote.start.wrapping_add(r), bytes, r);
                let (source, destination) = if op == Op::Write { (l, r) } else { (r, l) };
                to.push(destination);
                from.push(source);
            },
        );
    }
    check_pieces(&mut to, &mut from)
}

/// Whether no piece of the destination shares a byte with another one or with the source.
fn check_pieces(to: &mut [Piece], from: &mut [Piece]) -> Result<(), PrepareError> {
    let end = |piece: &Piece| (piece.0, piece.1.saturating_add(piece.2));
    to.sort_unstable();
    for pair in to.windows(2) {
        if end(&pair[0]) > (pair[1].0, pair[1].1) {
            return Err(PrepareError::Overlap { offset: pair[1].3 });
        }
    }
    from.sort_unstable();
    let mut sources = from.iter().peekable();
    for piece in to.iter() {
        while sources
            .next_if(|source| end(source) <= (piece.0, piece.1))
            .is_some()
        {}
        if sources
            .peek()
            .is_some_and(|source| (source.0, source.1) < end(piece))
        {
            return Err(PrepareError::Overlap { offset: piece.3 });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::agent::{MappedMemory, RemoteRegion};
    use crate::config::RemoteAccess;
    use crate::memory::{Region, RegionId};
    use crate::plan::{DescriptorList, DescriptorPair, KvBlockLayout, KvOrder, KvShape, KvSlice};

    const REGION_BYTES: usize = 4096;

    fn region(id: u64) -> Arc<Region> {
        let memory = vec![0; REGION_BYTES].into();
        Arc::new(Region::host(RegionId(id), memory, RemoteAccess::Open).unwrap())
    }

    proptest! {
        /// Every way of checking says what a set of byte addresses says.
        #[test]
        fn overlap_is_found_and_nothing_else(
            list in proptest::collection::vec((0u64..60, 0u64..60, 1u64..4, 0usize..3, 0usize..3), 1..30),
            unit in prop_oneof![Just(1u64), Just(3), Just(16)],
            one_length: bool,
            one_region: bool,
            same_memory: bool,
            write: bool,
        ) {
            let local: Vec<_> = (0..3).map(region).collect();
            let remote: Vec<_> = local
                .iter()
                .map(|mine| {
                    let id = RegionId(mine.id.0 + 10);
                    let theirs = match same_memory {
                        true => mine.clone(),
                        false => region(id.0),
                    };
                    let memory = RemoteMemory::Mapped(MappedMemory::InProcess(theirs));
                    let bytes = REGION_BYTES as u64;
                    Arc::new(RemoteRegion::new(id, bytes, RemoteAccess::Open, memory))
                })
                .collect();
            let mut pieces = DescriptorList::with_capacity(list.len());
            let (mut to, mut from) = (HashSet::new(), HashSet::new());
            let mut twice = false;
            for (x, y, bytes, l, r) in list {
                let (l, r) = if one_region { (0, 0) } else { (l, r) };
                let bytes = if one_length { unit } else { bytes * unit };
                let pair = DescriptorPair {
                    local_region: l,
                    local_offset: x * unit,
                    remote_region: r,
                    remote_offset: y * unit,
                    bytes,
                };
                pieces.push(pair);
                for i in 0..bytes {
                    let here = (true, l, pair.local_offset + i);
                    let there = (same_memory, r, pair.remote_offset + i);
                    let (source, destination) = if write { (here, there) } else { (there, here) };
                    twice |= !to.insert(destination);
                    from.insert(source);
                }
            }
            let sets = pieces.compress(|set| SetPair {
                local_region: local[set.local_region].clone(),
                local: set.local,
                remote_region: remote[set.remote_region].clone(),
                remote: set.remote,
                order: Order::BlockMajor,
            });
            let op = if write { Op::Write } else { Op::Read };
            let expected = !twice && to.is_disjoint(&from);
            prop_assert_eq!(check_overlap(op, &sets).is_ok(), expected);
        }
    }

    /// A part of a small cache somewhere in a region, and its bytes.
    fn part((order, offset, heads): (usize, u64, u32), ids: Vec<u32>) -> (TensorSet, Vec<u64>) {
        let order = [
            KvOrder::LAYER_FIRST_NHD,
            KvOrder::LAYER_FIRST_HND,
            KvOrder::BLOCK_FIRST_NHD,
            KvOrder::BLOCK_FIRST_HND,
        ][order];
        let shape = KvShape {
            blocks: 4,
            layers: 2,
            planes: 2,
            tokens: 3,
            heads: 2,
            head_bytes: 5,
        };
        let layout = KvBlockLayout::dense(shape, order).unwrap().at(offset);
        let mut bytes = Vec::new();
        for &block in &ids {
            for (layer, plane) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                for token in 0..3 {
                    let at = layout.head_offset(block, layer, plane, token, heads);
                    bytes.extend(at.unwrap()..at.unwrap() + 5);
                }
            }
        }
        let slice = KvSlice::ALL.heads(heads..heads + 1);
        (layout.select(&slice, ids.into()).unwrap(), bytes)
    }

    proptest! {
        #[test]
        fn overlap_of_tensors_is_found_and_nothing_else(
            mine in (0usize..4, 0u64..400, 0u32..2),
            theirs in (0usize..4, 0u64..400, 0u32..2),
            same_place: bool,
            ids in proptest::collection::vec((0u32..4, 0u32..4), 1..4),
            same_memory: bool,
            write: bool,
        ) {
            let theirs = if same_place { (theirs.0, mine.1, theirs.2) } else { theirs };
            let (x, y) = ids.into_iter().unzip();
            let ((here, l), (there, r)) = (part(mine, x), part(theirs, y));
            let local = region(1);
            let memory = if same_memory { local.clone() } else { region(2) };
            let memory = RemoteMemory::Mapped(MappedMemory::InProcess(memory));
            let bytes = REGION_BYTES as u64;
            let remote = RemoteRegion::new(RegionId(9), bytes, RemoteAccess::Open, memory);
            let (from, to) = if write { (&l, &r) } else { (&r, &l) };
            let destination: HashSet<_> = to.iter().collect();
            let twice = destination.len() < to.len();
            let meet = same_memory && from.iter().any(|byte| destination.contains(byte));
            let op = if write { Op::Write } else { Op::Read };
            let checked = check_tensor_overlap(op, (&local, &here), (&remote, &there));
            prop_assert_eq!(checked.is_ok(), !twice && !meet);
        }
    }
}
