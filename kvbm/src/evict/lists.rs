//! Queues of blocks, threaded through one array.

/// Doubly linked lists of blocks, each block in one list at most. Every operation takes constant
/// time and allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// One link per block and, after them, one sentinel per list, whose `next` is the oldest.
    links: Vec<Link>,
    blocks: u32,
    lens: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
}

/// `next` of a block that is in no list.
const ABSENT: u32 = u32::MAX;

impl Lists {
    pub(super) fn new(blocks: u32, lists: u8) -> Self {
        let end = blocks.checked_add(u32::from(lists));
        let end = end
            .filter(|end| *end < ABSENT)
            .expect("a pool has fewer than 2^32 - 8 blocks");
        let absent = Link {
            previous: ABSENT,
            next: ABSENT,
        };
        let mut links = vec![absent; blocks as usize];
        links.extend((blocks..end).map(|sentinel| Link {
            previous: sentinel,
            next: sentinel,
        }));
        Self {
            links,
            blocks,
            lens: vec![0; usize::from(lists)],
        }
    }

    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    pub(super) fn contains(&self, block: u32) -> bool {
        self.links[block as usize].next != ABSENT
    }

    pub(super) fn len(&self, list: u8) -> usize {
        self.lens[usize::from(list)] as usize
    }

    pub(super) fn push_newest(&mut self, list: u8, block: u32) {
        self.link_before(list, block, self.sentinel(list));
    }

    /// Puts `block` where it is reached just before `next`, which is in the same list.
    pub(super) fn push_before(&mut self, list: u8, block: u32, next: u32) {
        assert!(self.contains(next), "block {next} is in no list");
        self.link_before(list, block, next);
    }

    pub(super) fn unlink(&mut self, list: u8, block: u32) {
        let Link { previous, next } = self.links[block as usize];
        assert!(next != ABSENT, "block {block} is in no list");
        self.links[previous as usize].next = next;
        self.links[next as usize].previous = previous;
        self.links[block as usize].next = ABSENT;
        self.lens[usize::from(list)] -= 1;
    }

    pub(super) fn pop_oldest(&mut self, list: u8) -> Option<u32> {
        let oldest = self.links[self.sentinel(list) as usize].next;
        (oldest < self.blocks).then(|| {
            self.unlink(list, oldest);
            oldest
        })
    }

    fn link_before(&mut self, list: u8, block: u32, next: u32) {
        assert!(!self.contains(block), "block {block} is in a list already");
        let previous = self.links[next as usize].previous;
        self.links[block as usize] = Link { previous, next };
        self.links[previous as usize].next = block;
        self.links[next as usize].previous = block;
        self.lens[usize::from(list)] += 1;
    }

    fn sentinel(&self, list: u8) -> u32 {
        self.blocks + u32::from(list)
    }
}
