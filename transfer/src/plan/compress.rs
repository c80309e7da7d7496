//! Descriptor lists into block sets.
//!
//! Neighbours that touch on both sides become one piece. Pieces of equal length between the same
//! two regions then become one pair of block sets: the step of each side is the greatest common
//! divisor of its offsets (or a power of two that divides them), so that any list of equally long
//! pieces fits as long as the ids fit 32 bits. Pieces of the same two regions and of one length are
//! brought together first.

use std::ops::Range;
use std::sync::Arc;

use super::ids::BlockIds;
use super::layout::BlockLayout;
use super::set::{BlockSet, IDS_MAX};
use super::table::Table;

/// One descriptor of each side, with the regions as indices chosen by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DescriptorPair {
    pub(crate) local_region: usize,
    pub(crate) local_offset: u64,
    pub(crate) remote_region: usize,
    pub(crate) remote_offset: u64,
    pub(crate) bytes: u64,
}

impl DescriptorPair {
    fn touches(&self, next: &Self) -> bool {
        self.local_region == next.local_region
            && self.remote_region == next.remote_region
            && self.local_offset.checked_add(self.bytes) == Some(next.local_offset)
            && self.remote_offset.checked_add(self.bytes) == Some(next.remote_offset)
    }

    fn alike(&self, other: &Self) -> bool {
        self.local_region == other.local_region
            && self.remote_region == other.remote_region
            && self.bytes == other.bytes
    }
}

/// A pair of block sets and the regions they lie in.
#[derive(Clone, Debug)]
pub(crate) struct SetPairSpec {
    pub(crate) local_region: usize,
    pub(crate) local: BlockSet,
    pub(crate) remote_region: usize,
    pub(crate) remote: BlockSet,
}

/// Pieces of an operation; neighbours that touch on both sides are merged as they come.
#[derive(Debug)]
pub(crate) struct DescriptorList {
    merged: Vec<DescriptorPair>,
}

impl DescriptorList {
    pub(crate) fn with_capacity(pieces: usize) -> Self {
        Self {
            merged: Vec::with_capacity(pieces),
        }
    }

    /// Offsets plus lengths must not overflow 64 bits.
    #[inline]
    pub(crate) fn push(&mut self, pair: DescriptorPair) {
        match self.merged.last_mut() {
            Some(last) if last.touches(&pair) => last.bytes += pair.bytes,
            _ => self.merged.push(pair),
        }
    }

    /// The block sets, as `make` wants them.
    pub(crate) fn compress<T>(self, make: impl FnMut(SetPairSpec) -> T) -> Vec<T> {
        compress(self.merged, make)
    }
}

/// Block sets of merged pieces.
fn compress<T>(merged: Vec<DescriptorPair>, mut make: impl FnMut(SetPairSpec) -> T) -> Vec<T> {
    let (sorted, kinds) = by_kind(merged);
    let mut sets = Vec::with_capacity(kinds);
    let mut rest = sorted.as_slice();
    while let Some(first) = rest.first() {
        let alike = rest
            .iter()
            .take(IDS_MAX)
            .take_while(|pair| first.alike(pair))
            .count();
        let (group, after) = rest.split_at(alike);
        rest = after;
        match set_pair(group) {
            Some(set) => sets.push(make(set)),
            None => {
                let single = group.iter().filter_map(|pair| set_pair(&[*pair]));
                sets.extend(single.map(&mut make));
            }
        }
    }
    sets
}

/// The same pieces with those that are alike next to each other, and the number of kinds. Their
/// order means nothing: none of them overlap.
fn by_kind(list: Vec<DescriptorPair>) -> (Vec<DescriptorPair>, usize) {
    if list.windows(2).all(|pair| pair[0].alike(&pair[1])) {
        return (list, 1);
    }
    // A counting sort by kind: numbers are given in the order of appearance.
    let mut kinds = Table::with_capacity(list.len().min(1024));
    let mut ends: Vec<usize> = Vec::new();
    let mut kind_of = Vec::with_capacity(list.len());
    for pair in &list {
        let key = [
            (pair.local_region as u64) << 32 | pair.remote_region as u64,
            pair.bytes,
        ];
        let kind = kinds.number_of(key);
        if kind == ends.len() {
            ends.push(0);
        }
        ends[kind] += 1;
        kind_of.push(kind);
    }
    let mut start = 0;
    for end in &mut ends {
        start += std::mem::replace(end, start);
    }
    let mut sorted = list.clone();
    for (pair, kind) in list.iter().zip(kind_of) {
        sorted[ends[kind]] = *pair;
        ends[kind] += 1;
    }
    (sorted, ends.len())
}

/// One pair of sets for pieces that are alike, or `None` when ids do not fit 32 bits.
fn set_pair(group: &[DescriptorPair]) -> Option<SetPairSpec> {
    let first = group.first()?;
    Some(SetPairSpec {
        local_region: first.local_region,
        local: strided(group.iter().map(|pair| pair.local_offset), first.bytes)?,
        remote_region: first.remote_region,
        remote: strided(group.iter().map(|pair| pair.remote_offset), first.bytes)?,
    })
}

fn strided(
    offsets: impl ExactSizeIterator<Item = u64> + Clone,
    run_bytes: u64,
) -> Option<BlockSet> {
    let set = |base, blocks, step, ids| BlockSet {
        layout: BlockLayout {
            offset: base,
            blocks,
            block_stride: step,
            layers: 1,
            layer_stride: run_bytes,
            run_bytes,
        },
        ids,
        layers: Range { start: 0, end: 1 },
        inner: Vec::new(),
    };
    let (base, last) = offsets
        .clone()
        .fold((u64::MAX, 0), |(min, max), at| (min.min(at), max.max(at)));
    if offsets.len() == 1 {
        return Some(set(base, 1, run_bytes, BlockIds::span(0, 1)?));
    }
    // The greatest power of two that divides all distances needs no division. It is not enough
    // where it is shorter than a run (runs would have to be checked for overlap one by one) or ids
    // grow too large; then the greatest common divisor is.
    let bits = offsets.clone().fold(0, |bits, at| bits | (at - base));
    let shift = bits.trailing_zeros().min(63);
    let (step, ids): (u64, Arc<[u32]>) = if 1 << shift >= run_bytes
        && u32::try_from((last - base) >> shift).is_ok_and(|id| id < u32::MAX)
    {
        let ids = offsets.map(|at| u32::try_from((at - base) >> shift).unwrap_or(u32::MAX));
        (1 << shift, ids.collect())
    } else {
        let step = offsets
            .clone()
            .fold(0, |step, at| gcd(step, at - base))
            .max(1);
        u32::try_from((last - base) / step).ok()?.checked_add(1)?;
        let ids = offsets.map(|at| u32::try_from((at - base) / step).unwrap_or(u32::MAX));
        (step, ids.collect())
    };
    let blocks = u32::try_from((last - base) / step).ok()?.checked_add(1)?;
    Some(set(base, blocks, step, ids.into()))
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::{Order, for_each_segment};

    fn compress(list: &[DescriptorPair]) -> Vec<SetPairSpec> {
        let mut pieces = DescriptorList::with_capacity(list.len());
        list.iter().for_each(|pair| pieces.push(*pair));
        pieces.compress(|set| set)
    }

    fn pair(local_offset: u64, remote_offset: u64, bytes: u64) -> DescriptorPair {
        DescriptorPair {
            local_region: 0,
            local_offset,
            remote_region: 0,
            remote_offset,
            bytes,
        }
    }

    #[test]
    fn a_regular_list_is_one_set_and_a_contiguous_one_is_one_run() {
        let scattered: Vec<_> = (0..100)
            .map(|i| pair(i * 4096, (99 - i) * 4096, 4096))
            .collect();
        let sets = compress(&scattered);
        assert_eq!(sets.len(), 1);
        assert_eq!(sets[0].local.ids.len(), 100);
        let contiguous: Vec<_> = (0..100)
            .map(|i| pair(i * 4096, i * 4096 + 64, 4096))
            .collect();
        let sets = compress(&contiguous);
        assert_eq!((sets.len(), sets[0].local.ids.len()), (1, 1));
        assert_eq!(sets[0].local.bytes(), 409_600);
    }

    #[test]
    fn pieces_of_several_regions_become_one_pair_of_sets_for_each_two() {
        let list: Vec<_> = (0..200)
            .map(|i| DescriptorPair {
                local_region: i % 2,
                remote_region: i % 3,
                ..pair(
                    ((i * 37) % 200) as u64 * 300,
                    ((i * 73) % 200) as u64 * 300,
                    300,
                )
            })
            .collect();
        let sets = compress(&list);
        assert_eq!(sets.len(), 6);
        assert_eq!(
            sets.iter().map(|set| set.local.ids.len()).sum::<usize>(),
            200
        );
        assert!(sets.iter().all(|set| set.local.layout.block_stride >= 300));
    }

    proptest! {
        #[test]
        fn compression_keeps_every_byte(
            list in proptest::collection::vec((0u64..500, 0u64..500, 1u64..4, 0usize..3, 0usize..3), 1..40),
            scale in 1u64..9,
        ) {
            let list: Vec<_> = list
                .into_iter()
                .map(|(l, r, b, x, y)| DescriptorPair {
                    local_region: x,
                    remote_region: y,
                    ..pair(l * scale, r * scale, b * scale)
                })
                .collect();
            let mut expected: Vec<_> = list
                .iter()
                .flat_map(|p| {
                    (0..p.bytes).map(move |i| {
                        let (here, there) = (p.local_offset + i, p.remote_offset + i);
                        (p.local_region, here, p.remote_region, there)
                    })
                })
                .collect();
            let mut got = Vec::new();
            for set in compress(&list) {
                prop_assert_eq!(set.local.validate(5000), Ok(()));
                let (x, y) = (set.local_region, set.remote_region);
                for_each_segment(
                    &set.local,
                    &set.remote,
                    Order::BlockMajor,
                    0..set.local.bytes(),
                    |a, b, len| got.extend((0..len).map(|i| (x, a + i, y, b + i))),
                );
            }
            expected.sort_unstable();
            got.sort_unstable();
            prop_assert_eq!(got, expected);
        }
    }
}
