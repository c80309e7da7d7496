//! Least recently used, in four classes by how often.

use blockplane_protocol::{BlockId, SequenceHash};

use super::{EvictionPolicy, Released, lists::Lists, sketch::Sketch};

/// Four lists, each least recently used first, by how often a block's name was used lately: fewer
/// than 3, 8 and 15 times, or 15 times and more. The coldest list goes first.
///
/// Uses are counted by name in a TinyLFU sketch, so a block that comes back after an eviction is as
/// hot as it was. In its list a block never goes before one that continues its sequence, and a block
/// is never in a hotter list than the inactive one before it. 13 to 17 bytes a block, at most 9 in
/// pools beyond two million.
#[derive(Debug, Default)]
pub struct MultiLru {
    lists: Lists,
    /// Which list each block is in.
    list_of: Vec<u8>,
    sketch: Sketch,
}

/// The least uses of the second, third and fourth list, as in Dynamo's block manager.
const THRESHOLDS: [u8; 3] = [3, 8, 15];
const LISTS: u8 = 4;

impl EvictionPolicy for MultiLru {
    fn resize(&mut self, blocks: u32) {
        self.lists = Lists::new(blocks, LISTS);
        self.list_of = vec![0; blocks as usize];
        // Twice the names that are here: those that were evicted are remembered for a while.
        self.sketch = Sketch::new(2 * blocks as usize);
    }

    fn used(&mut self, _block: BlockId, name: SequenceHash) {
        self.sketch.used(name);
    }

    fn insert(&mut self, released: Released) {
        let Released { block, name, .. } = released;
        let count = self.sketch.count(name);
        let own = (0..).zip(THRESHOLDS).filter(|(_, least)| count >= *least);
        let own = own.map(|(below, _)| below + 1).last().unwrap_or(0);
        let parent = released.parent.map(|parent| parent.0);
        let parent = parent.filter(|parent| self.lists.contains(*parent));
        let parent = parent.map(|parent| (parent, self.list_of[parent as usize]));
        self.list_of[block.index()] = match parent {
            Some((parent, list)) if list <= own => {
                self.lists.push_before(list, block.0, parent);
                list
            }
            _ => {
                self.lists.push_newest(own, block.0);
                own
            }
        };
    }

    fn remove(&mut self, block: BlockId) {
        self.lists.unlink(self.list_of[block.index()], block.0);
    }

    fn evict(&mut self) -> Option<BlockId> {
        let oldest = (0..LISTS).find_map(|list| self.lists.pop_oldest(list));
        oldest.map(BlockId)
    }

    /// Names are forgotten with the contents, uses are not.
    fn clear(&mut self) {
        self.lists = Lists::new(self.lists.blocks(), LISTS);
    }

    fn len(&self) -> usize {
        (0..LISTS).map(|list| self.lists.len(list)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};

    #[test]
    fn what_was_used_often_outlives_what_was_used_lately() {
        let mut policy = sized::<MultiLru>(5);
        for (block, uses) in [(0, 15), (1, 8), (2, 3), (3, 2), (4, 1)] {
            (0..uses).for_each(|_| policy.used(BlockId(block), name(block)));
            insert(&mut policy, block, None);
        }
        assert_eq!(drain(&mut policy), [3, 4, 2, 1, 0]);
        insert(&mut policy, 4, None);
        insert(&mut policy, 0, None);
        assert_eq!(drain(&mut policy), [4, 0], "uses are remembered");
    }

    #[test]
    fn a_hot_block_does_not_outlive_its_cold_parent() {
        let mut policy = sized::<MultiLru>(3);
        (0..9).for_each(|_| policy.used(BlockId(1), name(1)));
        insert(&mut policy, 0, None);
        insert(&mut policy, 2, None);
        insert(&mut policy, 1, Some(0));
        assert_eq!(drain(&mut policy), [1, 0, 2]);
        insert(&mut policy, 1, Some(0));
        assert_eq!((policy.len(), drain(&mut policy)), (1, vec![1]));
    }
}
