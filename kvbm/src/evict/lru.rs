//! Least recently released first, leaves before the blocks they follow.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use blockplane_protocol::BlockId;

use super::{EvictionPolicy, Released, lists::Lists};

/// Least recently used: the block that was released longest ago goes first, and a block never goes
/// before an inactive block that continues its sequence.
///
/// A request releases its blocks front to back; the rule about leaves makes the result the same as
/// if it had released them back to front. 8 bytes a block.
#[derive(Debug, Default)]
pub struct Lru {
    list: Lists,
    steps: Option<Steps>,
}

/// In which step each block was released last.
#[derive(Debug)]
struct Steps {
    current: Arc<AtomicU32>,
    last: Vec<u32>,
}

impl Lru {
    /// For comparisons with simulators that know no sequences: a block goes before one that it
    /// continues only if both were released in the same step, that is, while `current` had the same
    /// value. 12 bytes a block.
    #[must_use]
    pub fn stepped(current: Arc<AtomicU32>) -> Self {
        Self {
            list: Lists::default(),
            steps: Some(Steps {
                current,
                last: Vec::new(),
            }),
        }
    }
}

impl Steps {
    /// Notes that `block` is released; whether `parent` was in the same step.
    fn same(&mut self, block: BlockId, parent: Option<BlockId>) -> bool {
        let now = self.current.load(Ordering::Relaxed);
        self.last[block.index()] = now;
        parent.is_some_and(|parent| self.last[parent.index()] == now)
    }
}

impl EvictionPolicy for Lru {
    fn resize(&mut self, blocks: u32) {
        self.list = Lists::new(blocks, 1);
        if let Some(steps) = &mut self.steps {
            steps.last = vec![0; blocks as usize];
        }
    }

    fn insert(&mut self, Released { block, parent, .. }: Released) {
        let steps = self.steps.as_mut();
        let near = steps.is_none_or(|steps| steps.same(block, parent));
        match parent.filter(|parent| near && self.list.contains(parent.0)) {
            Some(parent) => self.list.push_before(0, block.0, parent.0),
            None => self.list.push_newest(0, block.0),
        }
    }

    fn remove(&mut self, block: BlockId) {
        self.list.unlink(0, block.0);
    }

    fn evict(&mut self) -> Option<BlockId> {
        self.list.pop_oldest(0).map(BlockId)
    }

    fn clear(&mut self) {
        self.resize(self.list.blocks());
    }

    fn len(&self) -> usize {
        self.list.len(0)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};

    #[test]
    fn the_oldest_goes_first_and_removed_blocks_do_not_go() {
        let mut lru = sized::<Lru>(4);
        for block in [2, 0, 3, 1] {
            insert(&mut lru, block, None);
        }
        lru.remove(BlockId(3));
        assert_eq!(lru.len(), 3);
        assert_eq!(drain(&mut lru), [2, 0, 1]);
        assert!(lru.is_empty());
    }

    #[test]
    fn a_sequence_released_front_to_back_goes_back_to_front() {
        let mut lru = sized::<Lru>(6);
        insert(&mut lru, 5, None);
        insert(&mut lru, 0, None);
        insert(&mut lru, 1, Some(0));
        insert(&mut lru, 2, Some(1));
        insert(&mut lru, 4, None);
        assert_eq!(drain(&mut lru), [5, 2, 1, 0, 4]);
    }

    #[test]
    fn in_steps_only_blocks_of_one_step_are_a_sequence() {
        let step = Arc::new(AtomicU32::new(0));
        let mut lru = Lru::stepped(Arc::clone(&step));
        lru.resize(5);
        insert(&mut lru, 0, None);
        insert(&mut lru, 1, Some(0));
        step.store(1, Ordering::Relaxed);
        insert(&mut lru, 2, Some(1));
        insert(&mut lru, 3, Some(2));
        assert_eq!(drain(&mut lru), [1, 0, 3, 2]);
    }

    #[test]
    #[should_panic(expected = "in a list already")]
    fn inserting_twice_is_a_bug() {
        let mut lru = sized::<Lru>(2);
        insert(&mut lru, 1, None);
        insert(&mut lru, 1, None);
    }
}
