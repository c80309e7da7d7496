//! Everything a pool can find, in an order in which an index can be built.

use blockplane_protocol::SnapshotBlock;
use hashbrown::HashTable;

/// The registered blocks of a pool at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvSnapshot {
    /// Number of the last event whose effect is included; 0 before the first.
    pub last_event_id: u64,
    /// The blocks. A block comes after its parent, if the parent is here.
    pub blocks: Vec<SnapshotBlock>,
}

impl KvSnapshot {
    pub(crate) fn sorted(last_event_id: u64, blocks: &[SnapshotBlock]) -> Self {
        Self {
            last_event_id,
            blocks: parents_first(blocks),
        }
    }
}

/// The same blocks, each after its parent: a path from a block up to the first one that is placed is
/// placed from its end.
fn parents_first(blocks: &[SnapshotBlock]) -> Vec<SnapshotBlock> {
    let name = |i: &usize| blocks[*i].block.sequence;
    let mut index = HashTable::with_capacity(blocks.len());
    for i in 0..blocks.len() {
        index.insert_unique(name(&i).0, i, |i| name(i).0);
    }
    let mut placed = vec![false; blocks.len()];
    let mut ordered = Vec::with_capacity(blocks.len());
    let mut path = Vec::new();
    for start in 0..blocks.len() {
        let mut next = Some(start);
        // What is placed ends the path, also if colliding hashes make a block its own ancestor.
        while let Some(i) = next.filter(|i| !placed[*i]) {
            placed[i] = true;
            path.push(i);
            let parent = blocks[i].parent;
            next = parent.and_then(|parent| index.find(parent.0, |i| name(i) == parent).copied());
        }
        ordered.extend(path.drain(..).rev().map(|i| blocks[i]));
    }
    ordered
}
