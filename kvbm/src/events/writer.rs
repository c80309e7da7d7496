//! The events of blocks that no pool of ours holds: an engine beside us has them and says so.

use std::{fmt, sync::Arc};

use blockplane_protocol::{BlockHash, DpRank, SequenceHash, SnapshotBlock, StoredBlock, Tier};
use hashbrown::{HashTable, hash_table::Entry};

use super::{EventFeed, hub::EventHub, ring::Ring};

/// Blocks in one event, so that a batch stays far below the size limit of a message.
const EVENT_BLOCKS_MAX: usize = 4_096;
const TIERS: [Tier; 4] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote];
/// Above the bits of the tiers.
const HAS_PARENT: u8 = 1 << TIERS.len();

/// Tells what an engine outside of this process holds, as one numbered stream.
///
/// It is the only writer of its feed and keeps what it told, so that a new or slow subscriber gets a
/// snapshot as from a pool: 33 to 66 bytes for each block. The feed ends when the writer is dropped.
pub struct EventWriter {
    hub: Arc<EventHub>,
}

/// Every block that was told and is not gone, with the tiers that it is in.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    blocks: HashTable<Held>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    sequence: SequenceHash,
    block: BlockHash,
    /// Means something only with [`HAS_PARENT`].
    parent: SequenceHash,
    /// One bit for each tier, and [`HAS_PARENT`].
    flags: u8,
}

impl EventWriter {
    /// A writer that has told nothing. `events_max` is as in
    /// [`PoolConfig`](crate::PoolConfig::events_max).
    #[must_use]
    pub fn new(rank: DpRank, events_max: usize) -> Self {
        Self {
            hub: EventHub::told(rank, events_max),
        }
    }

    /// The events. A feed does not keep the writer alive.
    #[must_use]
    pub fn feed(&self) -> EventFeed {
        EventFeed::new(Arc::clone(&self.hub))
    }

    /// The blocks that follow `parent` are in `tier` now. Those that were told before are not told
    /// again.
    pub fn stored(&mut self, parent: Option<SequenceHash>, blocks: &[StoredBlock], tier: Tier) {
        self.hub.tell(|ring, told| {
            let mut before = parent;
            let mut run = Run::default();
            for block in blocks {
                if told.store(before, *block, tier) {
                    run.push(ring, before, *block, tier);
                } else {
                    run.end(ring, tier);
                }
                before = Some(block.sequence);
            }
            run.end(ring, tier);
        });
    }

    /// The blocks are no longer in `tier`. Those that are not known there are left out.
    pub fn removed(&mut self, names: &[SequenceHash], tier: Tier) {
        self.hub.tell(|ring, told| {
            let known = |name: &SequenceHash| told.remove(*name, tier);
            let gone: Vec<SequenceHash> = names.iter().copied().filter(known).collect();
            for gone in gone.chunks(EVENT_BLOCKS_MAX) {
                ring.push_removed(gone.iter().copied(), tier);
            }
        });
    }

    /// Nothing that was told is there any more.
    pub fn cleared(&mut self) {
        self.hub.tell(|ring, told| {
            if !told.blocks.is_empty() {
                told.blocks.clear();
                ring.push_cleared();
            }
        });
    }

    /// How many blocks are told, each counted once.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.hub.with_told(|told| told.blocks.len())
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        self.hub.close();
    }
}

impl fmt::Debug for EventWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventWriter")
            .field("hub", &self.hub)
            .field("blocks", &self.blocks())
            .finish()
    }
}

impl Told {
    /// In no particular order.
    pub(super) fn published(&self) -> Vec<SnapshotBlock> {
        let blocks = self.blocks.iter().flat_map(|held| {
            let tiers = TIERS.iter().copied().filter(|tier| held.is_in(*tier));
            tiers.map(|tier| SnapshotBlock {
                parent: (held.flags & HAS_PARENT != 0).then_some(held.parent),
                block: StoredBlock {
                    block: held.block,
                    sequence: held.sequence,
                },
                tier,
            })
        });
        blocks.collect()
    }

    /// True when the block was not in `tier`.
    fn store(&mut self, parent: Option<SequenceHash>, block: StoredBlock, tier: Tier) -> bool {
        let name = block.sequence;
        let same = |held: &Held| held.sequence == name;
        match self.blocks.entry(name.0, same, |held| held.sequence.0) {
            Entry::Occupied(mut held) => {
                let new = !held.get().is_in(tier);
                held.get_mut().flags |= bit(tier);
                new
            }
            Entry::Vacant(free) => {
                let has_parent = if parent.is_some() { HAS_PARENT } else { 0 };
                free.insert(Held {
                    sequence: name,
                    block: block.block,
                    parent: parent.unwrap_or(name),
                    flags: bit(tier) | has_parent,
                });
                true
            }
        }
    }

    /// True when the block was in `tier`.
    fn remove(&mut self, name: SequenceHash, tier: Tier) -> bool {
        let same = |held: &Held| held.sequence == name;
        let Ok(mut entry) = self.blocks.find_entry(name.0, same) else {
            return false;
        };
        let was = entry.get().is_in(tier);
        entry.get_mut().flags &= !bit(tier);
        if entry.get().flags & !HAS_PARENT == 0 {
            entry.remove();
        }
        was
    }
}

impl Held {
    fn is_in(&self, tier: Tier) -> bool {
        self.flags & bit(tier) != 0
    }
}

/// New blocks that follow one another: one event.
#[derive(Default)]
struct Run {
    parent: Option<SequenceHash>,
    blocks: Vec<StoredBlock>,
}

impl Run {
    fn push(
        &mut self,
        ring: &mut Ring,
        before: Option<SequenceHash>,
        block: StoredBlock,
        tier: Tier,
    ) {
        if self.blocks.len() == EVENT_BLOCKS_MAX {
            self.end(ring, tier);
        }
        if self.blocks.is_empty() {
            self.parent = before;
        }
        self.blocks.push(block);
    }

    fn end(&mut self, ring: &mut Ring, tier: Tier) {
        if !self.blocks.is_empty() {
            ring.push_stored(self.parent, self.blocks.drain(..), tier);
        }
    }
}

fn bit(tier: Tier) -> u8 {
    match tier {
        Tier::Device => 1,
        Tier::Host => 2,
        Tier::Disk => 4,
        Tier::Remote => 8,
    }
}
