//! Which ranks hold one block and in which tiers, in four bytes each.

use blockplane_protocol::Tier;
use smallvec::SmallVec;

/// Number of a rank inside one index.
pub(super) type Slot = u32;

/// Ranks that one index can tell apart: a slot and four tier bits share 32 bits.
pub(super) const SLOTS_MAX: usize = 1 << 28;

const TIER_BITS: u32 = 4;
const TIER_MASK: u32 = (1 << TIER_BITS) - 1;

/// Holders of one block, ascending by slot; up to four without an allocation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Holders(SmallVec<[u32; 4]>);

/// One rank that holds a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) slot: Slot,
    /// One bit per tier, the fastest one lowest.
    tiers: u32,
}

impl Holders {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Holder> + '_ {
        self.0.iter().map(|&packed| Holder::unpack(packed))
    }

    pub(super) fn get(&self, slot: Slot) -> Option<Holder> {
        let at = self.position(slot).ok()?;
        Some(Holder::unpack(self.0[at]))
    }

    pub(super) fn insert(&mut self, slot: Slot, tier: Tier) {
        match self.position(slot) {
            Ok(at) => self.0[at] |= bit(tier),
            Err(at) => self.0.insert(at, slot << TIER_BITS | bit(tier)),
        }
    }

    /// Forgets one tier of one rank; true when it was there.
    pub(super) fn remove(&mut self, slot: Slot, tier: Tier) -> bool {
        let Ok(at) = self.position(slot) else {
            return false;
        };
        if self.0[at] & bit(tier) == 0 {
            return false;
        }
        self.0[at] &= !bit(tier);
        if self.0[at] & TIER_MASK == 0 {
            self.take(at);
        }
        true
    }

    /// Forgets all tiers of one rank; true when it was there.
    pub(super) fn remove_slot(&mut self, slot: Slot) -> bool {
        let Ok(at) = self.position(slot) else {
            return false;
        };
        self.take(at);
        true
    }

    /// Bytes outside the value itself.
    pub(super) fn heap_bytes(&self) -> usize {
        if self.0.spilled() {
            self.0.capacity() * size_of::<u32>()
        } else {
            0
        }
    }

    fn take(&mut self, at: usize) {
        self.0.remove(at);
        if self.0.spilled() && self.0.len() <= self.0.inline_size() {
            self.0.shrink_to_fit();
        }
    }

    fn position(&self, slot: Slot) -> Result<usize, usize> {
        self.0
            .binary_search_by_key(&slot, |packed| packed >> TIER_BITS)
    }
}

impl Holder {
    fn unpack(packed: u32) -> Self {
        Self {
            slot: packed >> TIER_BITS,
            tiers: packed & TIER_MASK,
        }
    }

    /// The fastest tier that has the block.
    pub(super) fn tier(self) -> Tier {
        match self.tiers.trailing_zeros() {
            0 => Tier::Device,
            1 => Tier::Host,
            2 => Tier::Disk,
            _ => Tier::Remote,
        }
    }
}

const fn bit(tier: Tier) -> u32 {
    match tier {
        Tier::Device => 1,
        Tier::Host => 2,
        Tier::Disk => 4,
        Tier::Remote => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_counts_at_its_fastest_tier_and_leaves_with_its_last_one() {
        let mut holders = Holders::default();
        holders.insert(9, Tier::Disk);
        holders.insert(9, Tier::Host);
        holders.insert(2, Tier::Remote);
        assert_eq!(holders.iter().map(|h| h.slot).collect::<Vec<_>>(), [2, 9]);
        assert_eq!(holders.get(9).unwrap().tier(), Tier::Host);
        assert!(!holders.remove(9, Tier::Device));
        assert!(holders.remove(9, Tier::Host));
        assert_eq!(holders.get(9).unwrap().tier(), Tier::Disk);
        assert!(holders.remove(9, Tier::Disk));
        assert_eq!(holders.get(9), None);
        assert!(holders.remove_slot(2));
        assert!(holders.is_empty());
    }

    #[test]
    fn the_list_goes_back_inline_when_it_shrinks() {
        let mut holders = Holders::default();
        for slot in 0..64 {
            holders.insert(slot, Tier::Device);
        }
        assert!(holders.heap_bytes() > 0);
        for slot in 4..64 {
            holders.remove_slot(slot);
        }
        assert_eq!((holders.iter().count(), holders.heap_bytes()), (4, 0));
    }
}
