//! Leaves only, the one used longest ago first.

use blockplane_protocol::{BlockId, SequenceHash};

use super::{EvictionPolicy, Released};

/// Evicts only blocks that no inactive block continues, the least recently used of them first.
///
/// [`Lru`](super::Lru) keeps that order too, by making a block as old as the one it continues; here
/// each block keeps the time of its own last use. A heap of the leaves: an operation takes time
/// logarithmic in their number. 36 bytes a block.
#[derive(Debug, Default)]
pub struct Lineage {
    nodes: Vec<Node>,
    /// Leaves, the oldest on top.
    heap: Vec<u32>,
    inactive: usize,
    clock: u64,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    /// When it became inactive.
    since: u64,
    /// The slot of the block before it, and that slot's epoch: a link into an earlier one is void.
    parent: u32,
    parent_epoch: u32,
    /// Changes with the contents of the slot.
    epoch: u32,
    /// Inactive blocks that continue the contents of this slot.
    children: u32,
    /// Its place in the heap, or one of the marks.
    place: u32,
}

/// `place` of a block that is not inactive.
const ABSENT: u32 = u32::MAX;
/// `place` of an inactive block that others continue.
const INNER: u32 = u32::MAX - 1;
/// `parent` of a block whose parent is not in the pool.
const NO_PARENT: u32 = u32::MAX;

impl Lineage {
    fn is_older(&self, a: u32, b: u32) -> bool {
        self.nodes[a as usize].since < self.nodes[b as usize].since
    }

    fn put(&mut self, place: usize, block: u32) {
        self.heap[place] = block;
        let place = u32::try_from(place).expect("a pool has fewer than 2^32 blocks");
        self.nodes[block as usize].place = place;
    }

    fn push_leaf(&mut self, block: u32) {
        self.heap.push(block);
        self.sift_up(self.heap.len() - 1, block);
    }

    fn remove_leaf(&mut self, block: u32) {
        let place = self.nodes[block as usize].place as usize;
        let last = self.heap.pop().expect("the leaf is in it");
        if last != block {
            // Where it goes is one of the two directions; the other one does nothing.
            self.sift_up(place, last);
            self.sift_down(self.nodes[last as usize].place as usize, last);
        }
    }

    fn sift_up(&mut self, mut place: usize, block: u32) {
        while place > 0 {
            let above = (place - 1) / 2;
            if !self.is_older(block, self.heap[above]) {
                break;
            }
            self.put(place, self.heap[above]);
            place = above;
        }
        self.put(place, block);
    }

    fn sift_down(&mut self, mut place: usize, block: u32) {
        loop {
            let below = 2 * place + 1;
            let Some(&left) = self.heap.get(below) else {
                break;
            };
            let right = self.heap.get(below + 1).copied();
            let (next, older) = match right.filter(|right| self.is_older(*right, left)) {
                Some(right) => (below + 1, right),
                None => (below, left),
            };
            if !self.is_older(older, block) {
                break;
            }
            self.put(place, older);
            place = next;
        }
        self.put(place, block);
    }

    /// The slot of the block before `block`, if its contents are still that.
    fn parent_of(&self, block: u32) -> Option<u32> {
        let node = &self.nodes[block as usize];
        let parent = Some(node.parent).filter(|parent| *parent != NO_PARENT)?;
        (self.nodes[parent as usize].epoch == node.parent_epoch).then_some(parent)
    }

    fn take(&mut self, block: u32) {
        if self.nodes[block as usize].place != INNER {
            self.remove_leaf(block);
        }
        self.nodes[block as usize].place = ABSENT;
        self.inactive -= 1;
        if let Some(parent) = self.parent_of(block) {
            let node = &mut self.nodes[parent as usize];
            node.children -= 1;
            if node.children == 0 && node.place == INNER {
                self.push_leaf(parent);
            }
        }
    }

    /// The inactive block used longest ago. There is always a leaf, unless names collide so that
    /// blocks continue each other in a circle.
    fn oldest_of_a_circle(&self) -> Option<u32> {
        let inner = (0..)
            .zip(&self.nodes)
            .filter(|(_, node)| node.place == INNER);
        inner
            .min_by_key(|(_, node)| node.since)
            .map(|(block, _)| block)
    }
}

impl EvictionPolicy for Lineage {
    fn resize(&mut self, blocks: u32) {
        assert!(blocks < INNER, "a pool has fewer than 2^32 - 2 blocks");
        let node = Node {
            since: 0,
            parent: NO_PARENT,
            parent_epoch: 0,
            epoch: 0,
            children: 0,
            place: ABSENT,
        };
        self.nodes = vec![node; blocks as usize];
        self.heap = Vec::with_capacity(blocks as usize);
        self.inactive = 0;
    }

    fn insert(&mut self, Released { block, parent, .. }: Released) {
        let node = &self.nodes[block.index()];
        assert!(
            node.place == ABSENT,
            "block {} is inactive already",
            block.0
        );
        self.clock += 1;
        self.inactive += 1;
        if let Some(parent) = parent {
            self.nodes[parent.index()].children += 1;
            if self.nodes[parent.index()].place < INNER {
                self.remove_leaf(parent.0);
                self.nodes[parent.index()].place = INNER;
            }
        }
        let parent_epoch = parent.map_or(0, |parent| self.nodes[parent.index()].epoch);
        let node = &mut self.nodes[block.index()];
        node.since = self.clock;
        node.parent = parent.map_or(NO_PARENT, |parent| parent.0);
        node.parent_epoch = parent_epoch;
        if node.children > 0 {
            node.place = INNER;
        } else {
            self.push_leaf(block.0);
        }
    }

    fn remove(&mut self, block: BlockId) {
        let absent = self.nodes[block.index()].place == ABSENT;
        assert!(!absent, "block {} is not inactive", block.0);
        self.take(block.0);
    }

    fn evict(&mut self) -> Option<BlockId> {
        let oldest = self.heap.first().copied();
        let oldest = oldest.or_else(|| self.oldest_of_a_circle())?;
        self.take(oldest);
        Some(BlockId(oldest))
    }

    fn forget(&mut self, block: BlockId, _name: SequenceHash) {
        let node = &mut self.nodes[block.index()];
        node.epoch = node.epoch.wrapping_add(1);
        node.children = 0;
        if node.place == INNER {
            self.push_leaf(block.0);
        }
    }

    fn clear(&mut self) {
        self.heap.clear();
        self.inactive = 0;
        for node in &mut self.nodes {
            node.epoch = node.epoch.wrapping_add(1);
            node.children = 0;
            node.place = ABSENT;
        }
    }

    fn len(&self) -> usize {
        self.inactive
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};

    #[test]
    fn leaves_go_in_the_order_of_their_own_last_use() {
        let mut policy = sized::<Lineage>(6);
        insert(&mut policy, 0, None);
        insert(&mut policy, 1, Some(0));
        insert(&mut policy, 4, None);
        insert(&mut policy, 2, Some(1));
        insert(&mut policy, 5, None);
        assert_eq!(drain(&mut policy), [4, 2, 1, 0, 5]);
        assert!(policy.is_empty());
    }

    #[test]
    fn a_parent_released_between_its_descendants_goes_after_them() {
        let mut policy = sized::<Lineage>(3);
        insert(&mut policy, 1, Some(0));
        insert(&mut policy, 0, None);
        insert(&mut policy, 2, Some(1));
        assert_eq!(drain(&mut policy), [2, 1, 0]);
    }

    #[test]
    fn another_block_in_the_parents_slot_is_no_parent() {
        let mut policy = sized::<Lineage>(3);
        insert(&mut policy, 1, Some(0));
        policy.forget(BlockId(0), name(0));
        // What is in slot 0 now continues the block in slot 1, which continued what was there.
        insert(&mut policy, 0, Some(1));
        insert(&mut policy, 2, None);
        assert_eq!(drain(&mut policy), [0, 1, 2]);
    }

    #[test]
    fn a_circle_of_colliding_names_is_evicted_all_the_same() {
        let mut policy = sized::<Lineage>(3);
        insert(&mut policy, 0, Some(1));
        insert(&mut policy, 1, Some(0));
        insert(&mut policy, 2, Some(2));
        assert_eq!(drain(&mut policy).len(), 3);
        insert(&mut policy, 2, None);
        policy.clear();
        assert_eq!(policy.evict(), None);
    }
}
