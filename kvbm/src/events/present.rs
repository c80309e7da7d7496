//! Which pools of a hub hold a block, in nine bytes each.

use blockplane_protocol::{SequenceHash, Tier};
use hashbrown::{HashTable, hash_table::Entry};

use super::hub::HUB_POOLS_MAX;

/// The blocks that any pool of a hub holds.
#[derive(Clone, Debug, Default)]
pub(super) struct Present {
    blocks: HashTable<Presence>,
}

/// Packed, because there is one for each block of the pools.
#[derive(Clone, Copy, Debug)]
#[repr(C, packed)]
struct Presence {
    name: SequenceHash,
    /// One bit for each pool that holds it, and above them the tier it was announced with.
    held: u8,
}

const TIER_SHIFT: usize = HUB_POOLS_MAX;
const POOLS: u8 = (1 << HUB_POOLS_MAX) - 1;
const TIERS: [Tier; 4] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote];

impl Present {
    /// `source` holds the block now; true when it is the first.
    pub(super) fn store(&mut self, source: u8, tier: Tier, name: SequenceHash) -> bool {
        let same = |presence: &Presence| presence.name() == name;
        let hash = |presence: &Presence| presence.name().0;
        match self.blocks.entry(name.0, same, hash) {
            Entry::Occupied(mut held) => {
                held.get_mut().held |= 1 << source;
                false
            }
            Entry::Vacant(free) => {
                free.insert(Presence::new(name, source, tier));
                true
            }
        }
    }

    pub(super) fn store_all(
        &mut self,
        source: u8,
        tier: Tier,
        names: impl Iterator<Item = SequenceHash>,
    ) {
        self.blocks
            .reserve(names.size_hint().0, |presence| presence.name().0);
        names.for_each(|name| {
            self.store(source, tier, name);
        });
    }

    /// `source` has lost the block; the tier it was announced with when it was the last.
    pub(super) fn remove(&mut self, source: u8, name: SequenceHash) -> Option<Tier> {
        let same = |presence: &Presence| presence.name() == name;
        let mut entry = self.blocks.find_entry(name.0, same).ok()?;
        entry.get_mut().held &= !(1 << source);
        let left = *entry.get();
        (left.held & POOLS == 0).then(|| {
            entry.remove();
            left.tier()
        })
    }

    /// The tier that the block was announced with, if `source` is the first pool that holds it.
    pub(super) fn first_of(&self, name: SequenceHash, source: u32) -> Option<Tier> {
        let presence = self.blocks.find(name.0, |other| other.name() == name)?;
        let first = (presence.held & POOLS).trailing_zeros();
        (first == source).then(|| presence.tier())
    }
}

impl Presence {
    fn new(name: SequenceHash, source: u8, tier: Tier) -> Self {
        let tier = TIERS.iter().position(|other| *other == tier);
        let tier = tier.expect("all tiers are listed") << TIER_SHIFT;
        Self {
            name,
            held: u8::try_from(tier).expect("two bits of tier") | 1 << source,
        }
    }

    fn name(&self) -> SequenceHash {
        self.name
    }

    fn tier(&self) -> Tier {
        TIERS[usize::from(self.held >> TIER_SHIFT)]
    }
}
