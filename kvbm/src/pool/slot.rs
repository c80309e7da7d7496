//! One slot of a pool in 32 bytes.

use blockplane_protocol::{BlockHash, BlockId, SequenceHash, TokenBlock};

/// What a slot holds and who holds the slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    /// Of the last block registered here; meaningful while the state [has a name](State::is_block).
    hashes: TokenBlock,
    /// Meaningless when `parent_slot` is [`NO_PARENT`].
    parent: SequenceHash,
    /// Where the parent was when this block was registered; checked against `parent` on use.
    parent_slot: u32,
    /// The state in the lowest [`STATE_BITS`], holders above.
    holding: u32,
}

/// Where a slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// In the free list.
    Free,
    /// Owned by one handle that may write.
    Leased,
    /// Owned by one handle; a peer may write.
    Quarantined,
    /// Never used again.
    Retired,
    /// Registered and held; the registry names it.
    Named,
    /// Registered and held; nobody finds it (any more).
    Unnamed,
    /// Registered and held; nobody finds it, and it is retired when the last holder is gone.
    Condemned,
    /// Registered and held by nobody; the registry names it and the policy orders it.
    Inactive,
}

const STATE_BITS: u32 = 3;
const STATE_MASK: u32 = (1 << STATE_BITS) - 1;
const HOLDERS_MAX: u32 = u32::MAX >> STATE_BITS;
/// `parent_slot` of the first block of a sequence.
const NO_PARENT: u32 = u32::MAX;
/// `parent_slot` of a block whose parent was not here.
const ELSEWHERE: u32 = u32::MAX - 1;
/// Ids are below this, so that they are none of the marks.
pub(super) const BLOCKS_END: u32 = ELSEWHERE;

impl Slot {
    pub(super) const FREE: Self = Self {
        hashes: TokenBlock {
            block: BlockHash(0),
            sequence: SequenceHash(0),
        },
        parent: SequenceHash(0),
        parent_slot: NO_PARENT,
        holding: State::Free as u32,
    };

    pub(super) fn state(&self) -> State {
        match self.holding & STATE_MASK {
            0 => State::Free,
            1 => State::Leased,
            2 => State::Quarantined,
            3 => State::Retired,
            4 => State::Named,
            5 => State::Unnamed,
            6 => State::Condemned,
            _ => State::Inactive,
        }
    }

    /// Changes the state and keeps the holders.
    pub(super) fn set_state(&mut self, state: State) {
        self.holding = self.holding & !STATE_MASK | state as u32;
    }

    pub(super) fn holders(&self) -> u32 {
        self.holding >> STATE_BITS
    }

    pub(super) fn hold(&mut self) {
        assert!(self.holders() < HOLDERS_MAX, "a block has 2^29 holders");
        self.holding += 1 << STATE_BITS;
    }

    /// One holder less; says how many are left.
    pub(super) fn release(&mut self) -> u32 {
        assert!(self.holders() > 0, "a block has a holder to release");
        self.holding -= 1 << STATE_BITS;
        self.holders()
    }

    /// Puts a block here, held by nobody yet.
    pub(super) fn fill(
        &mut self,
        state: State,
        hashes: TokenBlock,
        parent: Option<SequenceHash>,
        parent_slot: Option<BlockId>,
    ) {
        *self = Self {
            hashes,
            parent: parent.unwrap_or(SequenceHash(0)),
            parent_slot: match (parent, parent_slot) {
                (None, _) => NO_PARENT,
                (Some(_), None) => ELSEWHERE,
                (Some(_), Some(slot)) => slot.0,
            },
            holding: state as u32,
        };
    }

    pub(super) fn hashes(&self) -> TokenBlock {
        self.hashes
    }

    pub(super) fn name(&self) -> SequenceHash {
        self.hashes.sequence
    }

    pub(super) fn parent(&self) -> Option<SequenceHash> {
        (self.parent_slot != NO_PARENT).then_some(self.parent)
    }

    /// Where the parent was; something else may be there now.
    pub(super) fn parent_slot(&self) -> Option<BlockId> {
        (self.parent_slot < BLOCKS_END).then_some(BlockId(self.parent_slot))
    }

    /// Whether the registry finds it under `name`.
    pub(super) fn is(&self, name: SequenceHash) -> bool {
        self.name() == name && self.published()
    }

    /// Whether the registry names it.
    pub(super) fn published(&self) -> bool {
        matches!(self.state(), State::Named | State::Inactive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_32_bytes_and_gives_back_what_it_was_given() {
        assert_eq!(size_of::<Slot>(), 32);
        let hashes = TokenBlock {
            block: BlockHash(1),
            sequence: SequenceHash(2),
        };
        let mut slot = Slot::FREE;
        let parents = [
            (None, None),
            (Some(SequenceHash(0)), None),
            (Some(SequenceHash(7)), Some(BlockId(BLOCKS_END - 1))),
        ];
        for (parent, parent_slot) in parents {
            for state in [
                State::Named,
                State::Unnamed,
                State::Condemned,
                State::Inactive,
            ] {
                slot.fill(State::Named, hashes, parent, parent_slot);
                slot.hold();
                slot.hold();
                slot.set_state(state);
                assert_eq!((slot.state(), slot.holders()), (state, 2));
                assert_eq!((slot.parent(), slot.parent_slot()), (parent, parent_slot));
                assert_eq!(slot.hashes(), hashes);
                assert_eq!((slot.release(), slot.state()), (1, state));
            }
        }
        for state in [
            State::Free,
            State::Leased,
            State::Quarantined,
            State::Retired,
        ] {
            slot.set_state(state);
            assert_eq!(slot.state(), state);
            assert!(!slot.published());
        }
    }
}
