//! Descriptor lists into block sets.
//!
//! Neighbours that touch on both sides become one piece. Pieces of equal length between the same
//! two regions then become one pair of block sets: the step of each side is the greatest common
//! divisor of its offsets, so that any list of equally long pieces fits as long as the ids fit 32
//! bits.

use std::ops::Range;
use std::sync::Arc;

use super::layout::BlockLayout;
use super::set::{BlockSet, IDS_MAX};

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

/// Merges and compresses. Offsets plus lengths must not overflow 64 bits.
pub(crate) fn compress(list: &[DescriptorPair]) -> Vec<SetPairSpec> {
    let mut merged: Vec<DescriptorPair> = Vec::with_capacity(list.len());
    for pair in list {
        match merged.last_mut() {
            Some(last) if last.touches(pair) => last.bytes += pair.bytes,
            _ => merged.push(*pair),
        }
    }
    let mut sets = Vec::new();
    let mut rest = merged.as_slice();
    while let Some(first) = rest.first() {
        let alike = rest
            .iter()
            .take(IDS_MAX)
            .take_while(|pair| first.alike(pair))
            .count();
        let (group, after) = rest.split_at(alike);
        rest = after;
        match set_pair(group) {
            Some(set) => sets.push(set),
            None => sets.extend(group.iter().filter_map(|pair| set_pair(&[*pair]))),
        }
    }
    sets
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

fn strided(offsets: impl Iterator<Item = u64> + Clone, run_bytes: u64) -> Option<BlockSet> {
    let base = offsets.clone().min()?;
    let step = offsets
        .clone()
        .fold(0, |acc, offset| gcd(acc, offset - base))
        .max(1);
    let ids: Arc<[u32]> = offsets
        .map(|offset| u32::try_from((offset - base) / step).ok())
        .collect::<Option<_>>()?;
    let blocks = ids.iter().max()?.checked_add(1)?;
    let layout = BlockLayout {
        offset: base,
        blocks,
        block_stride: step,
        layers: 1,
        layer_stride: run_bytes,
        run_bytes,
    };
    Some(BlockSet {
        layout,
        ids,
        layers: Range { start: 0, end: 1 },
    })
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

    proptest! {
        #[test]
        fn compression_keeps_every_byte(
            list in proptest::collection::vec((0u64..500, 0u64..500, 1u64..4), 1..40)
        ) {
            let list: Vec<_> = list.into_iter().map(|(l, r, b)| pair(l, r, b)).collect();
            let mut expected: Vec<_> = list
                .iter()
                .flat_map(|p| (0..p.bytes).map(move |i| (p.local_offset + i, p.remote_offset + i)))
                .collect();
            let mut got = Vec::new();
            for set in compress(&list) {
                prop_assert_eq!(set.local.validate(1000), Ok(()));
                for_each_segment(
                    &set.local,
                    &set.remote,
                    Order::BlockMajor,
                    0..set.local.bytes(),
                    |a, b, len| got.extend((0..len).map(|i| (a + i, b + i))),
                );
            }
            expected.sort_unstable();
            got.sort_unstable();
            prop_assert_eq!(got, expected);
        }
    }
}
