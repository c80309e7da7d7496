//! Least recently released first, leaves before the blocks they follow.

use blockplane_protocol::BlockId;

use super::{EvictionPolicy, Released};

/// Least recently used: the block that was released longest ago goes first, and a block never goes
/// before an inactive block that continues its sequence.
///
/// A doubly linked list threaded through one array, so that every operation takes constant time and
/// allocates nothing. A request releases its blocks front to back; the rule about leaves makes the
/// result the same as if it had released them back to front.
#[derive(Debug, Default)]
pub struct Lru {
    /// One link per block and, last, the sentinel whose `next` is the oldest.
    links: Vec<Link>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
}

/// `next` of a block that is not in the list.
const ABSENT: u32 = u32::MAX;

impl Lru {
    fn sentinel(&self) -> u32 {
        u32::try_from(self.links.len() - 1).expect("a pool has fewer than 2^32 blocks")
    }

    fn link_before(&mut self, block: u32, next: u32) {
        let previous = self.links[next as usize].previous;
        self.links[block as usize] = Link { previous, next };
        self.links[previous as usize].next = block;
        self.links[next as usize].previous = block;
        self.len += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Link { previous, next } = self.links[block as usize];
        assert!(next != ABSENT, "block {block} is not in the list");
        self.links[previous as usize].next = next;
        self.links[next as usize].previous = previous;
        self.links[block as usize].next = ABSENT;
        self.len -= 1;
    }
}

impl EvictionPolicy for Lru {
    fn resize(&mut self, blocks: u32) {
        assert!(blocks < ABSENT, "a pool has fewer than 2^32 - 1 blocks");
        let absent = Link {
            previous: ABSENT,
            next: ABSENT,
        };
        self.links = vec![absent; blocks as usize];
        self.links.push(Link {
            previous: blocks,
            next: blocks,
        });
        self.len = 0;
    }

    fn insert(&mut self, Released { block, parent, .. }: Released) {
        let absent = self.links[block.index()].next == ABSENT;
        assert!(absent, "block {} is in the list already", block.0);
        let inactive = |parent: &BlockId| self.links[parent.index()].next != ABSENT;
        let newest_end = self.sentinel();
        let next = parent
            .filter(inactive)
            .map_or(newest_end, |parent| parent.0);
        self.link_before(block.0, next);
    }

    fn remove(&mut self, block: BlockId) {
        self.unlink(block.0);
    }

    fn evict(&mut self) -> Option<BlockId> {
        let sentinel = self.sentinel();
        let oldest = self.links[sentinel as usize].next;
        (oldest != sentinel).then(|| {
            self.unlink(oldest);
            BlockId(oldest)
        })
    }

    fn clear(&mut self) {
        self.resize(self.sentinel());
    }

    fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::SequenceHash;

    use super::*;

    fn lru(blocks: u32) -> Lru {
        let mut lru = Lru::default();
        lru.resize(blocks);
        lru
    }

    fn insert(lru: &mut Lru, block: u32, parent: Option<u32>) {
        lru.insert(Released {
            block: BlockId(block),
            name: SequenceHash(0),
            parent: parent.map(BlockId),
        });
    }

    fn drain(lru: &mut Lru) -> Vec<u32> {
        std::iter::from_fn(|| lru.evict().map(|block| block.0)).collect()
    }

    #[test]
    fn the_oldest_goes_first_and_removed_blocks_do_not_go() {
        let mut lru = lru(4);
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
        let mut lru = lru(6);
        insert(&mut lru, 5, None);
        insert(&mut lru, 0, None);
        insert(&mut lru, 1, Some(0));
        insert(&mut lru, 2, Some(1));
        insert(&mut lru, 4, None);
        assert_eq!(drain(&mut lru), [5, 2, 1, 0, 4]);
    }

    #[test]
    #[should_panic(expected = "in the list already")]
    fn inserting_twice_is_a_bug() {
        let mut lru = lru(2);
        insert(&mut lru, 1, None);
        insert(&mut lru, 1, None);
    }
}
