//! Two queues and a memory of what left the first one too early.

use blockplane_protocol::{BlockId, SequenceHash};
use hashbrown::HashTable;

use super::{EvictionPolicy, Released, lists::Lists};

/// S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: *FIFO queues are all you need for cache eviction*, SOSP
/// 2023): new blocks enter a small queue of a tenth of the pool; those used more than once before
/// they reach its end go to the main queue, the others are evicted and their names remembered.
/// A name that comes back while it is remembered enters the main queue, where a block that was used
/// goes round again.
///
/// Beside the paper: a block that is held when it reaches the end of a queue leaves it, and joins
/// the main queue when it is released. Blocks of one sequence that are released one after another
/// enter a queue in the order back to front, because the first is of use without the last. About 32
/// bytes a block.
#[derive(Debug, Default)]
pub struct S3Fifo {
    queues: Lists,
    entries: Vec<Entry>,
    ghost: Ghost,
    /// The block that entered a queue last.
    newest: Option<BlockId>,
    inactive: usize,
    small_max: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    place: Place,
    /// Since it entered its queue; at most [`USES_MAX`].
    uses: u8,
    held: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Not in the cache.
    #[default]
    Absent,
    Small,
    Main,
    /// It reached the end of a queue while it was held.
    Passed,
    /// Evicted from the small queue; its name is not known yet.
    Leaving,
}

/// Names in the order in which they came, as many as there are places.
#[derive(Debug, Default)]
struct Ghost {
    names: Vec<Option<SequenceHash>>,
    /// Places in `names`.
    index: HashTable<u32>,
    next: usize,
}

const SMALL: u8 = 0;
const MAIN: u8 = 1;
const USES_MAX: u8 = 3;

impl S3Fifo {
    fn enter(&mut self, block: BlockId, place: Place, parent: Option<BlockId>) {
        let (queue, uses) = match place {
            Place::Small => (SMALL, 0),
            _ => (MAIN, 0),
        };
        let entry = Entry {
            place,
            uses,
            held: false,
        };
        self.entries[block.index()] = entry;
        let before = parent.filter(|parent| {
            self.newest == Some(*parent) && self.entries[parent.index()].place == place
        });
        match before {
            Some(parent) => self.queues.push_before(queue, block.0, parent.0),
            None => self.queues.push_newest(queue, block.0),
        }
        self.newest = Some(block);
    }

    /// Takes the oldest of the small queue; returns it if that evicts it.
    fn pass_small(&mut self) -> Option<u32> {
        let block = self.queues.pop_oldest(SMALL)?;
        let entry = &mut self.entries[block as usize];
        if entry.held {
            entry.place = Place::Passed;
        } else if entry.uses > 1 {
            entry.place = Place::Main;
            entry.uses = 0;
            self.queues.push_newest(MAIN, block);
        } else {
            entry.place = Place::Leaving;
            return Some(block);
        }
        None
    }

    /// Takes the oldest of the main queue; returns it if that evicts it.
    fn pass_main(&mut self) -> Option<u32> {
        let block = self.queues.pop_oldest(MAIN)?;
        let entry = &mut self.entries[block as usize];
        if entry.held {
            entry.place = Place::Passed;
        } else if entry.uses > 0 {
            entry.uses -= 1;
            self.queues.push_newest(MAIN, block);
        } else {
            entry.place = Place::Absent;
            return Some(block);
        }
        None
    }
}

impl EvictionPolicy for S3Fifo {
    fn resize(&mut self, blocks: u32) {
        self.queues = Lists::new(blocks, 2);
        self.entries = vec![Entry::default(); blocks as usize];
        self.small_max = (blocks as usize / 10).max(1);
        self.ghost = Ghost::new(blocks as usize - self.small_max.min(blocks as usize));
        self.newest = None;
        self.inactive = 0;
    }

    fn used(&mut self, block: BlockId, _name: SequenceHash) {
        let entry = &mut self.entries[block.index()];
        entry.uses = USES_MAX.min(entry.uses + 1);
    }

    fn insert(&mut self, released: Released) {
        let Released {
            block,
            name,
            parent,
        } = released;
        match self.entries[block.index()].place {
            Place::Small | Place::Main => self.entries[block.index()].held = false,
            Place::Passed | Place::Leaving => self.enter(block, Place::Main, parent),
            Place::Absent if self.ghost.take(name) => self.enter(block, Place::Main, parent),
            Place::Absent => self.enter(block, Place::Small, parent),
        }
        self.inactive += 1;
    }

    fn remove(&mut self, block: BlockId) {
        self.entries[block.index()].held = true;
        self.inactive -= 1;
    }

    fn evict(&mut self) -> Option<BlockId> {
        if self.inactive == 0 {
            return None;
        }
        loop {
            let small = self.queues.len(SMALL) > self.small_max || self.queues.len(MAIN) == 0;
            let evicted = if small {
                self.pass_small()
            } else {
                self.pass_main()
            };
            if let Some(block) = evicted {
                self.inactive -= 1;
                return Some(BlockId(block));
            }
        }
    }

    fn forget(&mut self, block: BlockId, name: SequenceHash) {
        match self.entries[block.index()].place {
            Place::Small => self.queues.unlink(SMALL, block.0),
            Place::Main => self.queues.unlink(MAIN, block.0),
            Place::Leaving => self.ghost.add(name),
            Place::Passed | Place::Absent => {}
        }
        self.entries[block.index()] = Entry::default();
    }

    /// Evicted names are remembered.
    fn clear(&mut self) {
        self.queues = Lists::new(self.queues.blocks(), 2);
        self.entries.fill(Entry::default());
        self.newest = None;
        self.inactive = 0;
    }

    fn len(&self) -> usize {
        self.inactive
    }
}

impl Ghost {
    fn new(names: usize) -> Self {
        Self {
            names: vec![None; names],
            index: HashTable::with_capacity(names),
            next: 0,
        }
    }

    fn add(&mut self, name: SequenceHash) {
        if self.names.is_empty() || self.find(name).is_some() {
            return;
        }
        if let Some(oldest) = self.names[self.next] {
            self.take(oldest);
        }
        self.names[self.next] = Some(name);
        let names = &self.names;
        let place = u32::try_from(self.next).expect("a pool has fewer than 2^32 blocks");
        let hash = |place: &u32| names[*place as usize].map_or(0, |name| name.0);
        self.index.insert_unique(name.0, place, hash);
        self.next = (self.next + 1) % self.names.len();
    }

    /// Whether the name is remembered; it is not any more.
    fn take(&mut self, name: SequenceHash) -> bool {
        let Some(place) = self.find(name) else {
            return false;
        };
        let entry = self.index.find_entry(name.0, |other| *other == place);
        entry.expect("it was found").remove();
        self.names[place as usize] = None;
        true
    }

    fn find(&self, name: SequenceHash) -> Option<u32> {
        let same = |place: &u32| self.names[*place as usize] == Some(name);
        self.index.find(name.0, same).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};

    fn evict(policy: &mut S3Fifo) -> u32 {
        let block = policy.evict().expect("something is inactive").0;
        policy.forget(BlockId(block), name(block));
        block
    }

    fn use_again(policy: &mut S3Fifo, block: u32) {
        policy.remove(BlockId(block));
        policy.used(BlockId(block), name(block));
        insert(policy, block, None);
    }

    #[test]
    fn blocks_used_twice_go_to_the_main_queue_and_round_again() {
        let mut policy = sized::<S3Fifo>(20);
        (0..6).for_each(|block| insert(&mut policy, block, None));
        for _ in 0..2 {
            use_again(&mut policy, 0);
            use_again(&mut policy, 2);
        }
        use_again(&mut policy, 1);
        assert_eq!(
            [evict(&mut policy), evict(&mut policy)],
            [1, 3],
            "once is not enough"
        );
        assert_eq!(policy.len(), 4);
        // Two are left in the small queue, which may have two; the main queue gives next.
        use_again(&mut policy, 0);
        assert_eq!(evict(&mut policy), 2);
        assert_eq!(evict(&mut policy), 0, "its uses are spent");
        assert_eq!([evict(&mut policy), evict(&mut policy)], [4, 5]);
        assert_eq!(policy.evict(), None);
    }

    #[test]
    fn a_name_that_comes_back_soon_enters_the_main_queue() {
        let mut policy = sized::<S3Fifo>(20);
        (0..4).for_each(|block| insert(&mut policy, block, None));
        assert_eq!(evict(&mut policy), 0);
        insert(&mut policy, 0, None);
        assert_eq!(policy.queues.len(MAIN), 1);
        assert_eq!(evict(&mut policy), 1, "the small queue is over its share");
        assert_eq!(evict(&mut policy), 0);
        insert(&mut policy, 0, None);
        assert_eq!(policy.queues.len(SMALL), 3, "a name is remembered once");
    }

    #[test]
    fn a_held_block_passes_and_comes_back_to_the_main_queue() {
        let mut policy = sized::<S3Fifo>(10);
        (0..3).for_each(|block| insert(&mut policy, block, None));
        policy.remove(BlockId(0));
        assert_eq!(evict(&mut policy), 1);
        insert(&mut policy, 0, None);
        assert_eq!((policy.queues.len(MAIN), policy.len()), (1, 2));
        policy.forget(BlockId(0), name(0));
        policy.remove(BlockId(0));
        assert_eq!((policy.len(), evict(&mut policy)), (1, 2));
    }

    #[test]
    fn a_sequence_goes_back_to_front() {
        let mut policy = sized::<S3Fifo>(30);
        insert(&mut policy, 9, None);
        insert(&mut policy, 0, None);
        insert(&mut policy, 1, Some(0));
        insert(&mut policy, 2, Some(1));
        insert(&mut policy, 3, Some(9));
        let order: Vec<u32> = (0..5).map(|_| evict(&mut policy)).collect();
        assert_eq!(order, [9, 2, 1, 0, 3]);
    }

    #[test]
    fn the_ghost_forgets_the_oldest() {
        let mut ghost = Ghost::new(3);
        (0..3).for_each(|n| ghost.add(name(n)));
        assert!(ghost.take(name(1)) && !ghost.take(name(1)));
        ghost.add(name(3));
        ghost.add(name(4));
        let left: Vec<u32> = (0..5).filter(|&n| ghost.find(name(n)).is_some()).collect();
        assert_eq!(left, [2, 3, 4]);
        let mut none = Ghost::new(0);
        none.add(name(0));
        assert!(!none.take(name(0)));
    }
}
