//! Everything a pool can find, in an order in which an index can be built.

use std::{collections::HashMap, hash::BuildHasherDefault};

use blockplane_protocol::{SequenceHash, SnapshotBlock};

use crate::pool::HashIsUniform;

/// The registered blocks of a pool at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvSnapshot {
    /// Number of the last event whose effect is included; 0 before the first.
    pub last_event_id: u64,
    /// The blocks. A block comes after its parent, if the parent is here.
    pub blocks: Vec<SnapshotBlock>,
}

impl KvSnapshot {
    pub(crate) fn sorted(last_event_id: u64, blocks: Vec<SnapshotBlock>) -> Self {
        let depths = depths(&blocks);
        let mut ranked: Vec<_> = depths.into_iter().zip(blocks).collect();
        ranked.sort_by_key(|(depth, _)| *depth);
        Self {
            last_event_id,
            blocks: ranked.into_iter().map(|(_, block)| block).collect(),
        }
    }
}

/// How many ancestors of each block are here.
fn depths(blocks: &[SnapshotBlock]) -> Vec<usize> {
    let index: HashMap<SequenceHash, usize, BuildHasherDefault<HashIsUniform>> = blocks
        .iter()
        .enumerate()
        .map(|(i, entry)| (entry.block.sequence, i))
        .collect();
    let parent_of = |i: usize| index.get(&blocks[i].parent?).copied();
    let mut depths = vec![None; blocks.len()];
    let mut path = Vec::new();
    for start in 0..blocks.len() {
        let mut next = Some(start);
        let mut depth = 0;
        // The bound matters only if colliding hashes make a block its own ancestor.
        while let Some(i) = next.filter(|_| path.len() < blocks.len()) {
            if let Some(known) = depths[i] {
                depth = known + 1;
                break;
            }
            path.push(i);
            next = parent_of(i);
        }
        while let Some(i) = path.pop() {
            depths[i] = Some(depth);
            depth += 1;
        }
    }
    depths.into_iter().map(|depth| depth.unwrap_or(0)).collect()
}
