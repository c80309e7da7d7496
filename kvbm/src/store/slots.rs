//! What is known of each slot in memory: 24 bytes, enough to check what is read.

use parking_lot::Mutex;

use super::format::SlotState;

/// A slot as a reader needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) sequence: u64,
    pub(super) checksum: u64,
    pub(super) generation: u64,
}

impl Known {
    /// Nothing but a generation.
    pub(super) const fn at(generation: u64) -> Self {
        Self {
            sequence: 0,
            checksum: 0,
            generation,
        }
    }
}

/// All slots.
pub(super) struct Slots {
    table: Mutex<Vec<Entry>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    sequence: u64,
    checksum: u64,
    /// State in the two highest bits, generation below.
    tag: u64,
}

const SHIFT: u32 = 62;
const EMPTY: u64 = 0;
const VALID: u64 = 1;
const QUARANTINED: u64 = 2;
const BUSY: u64 = 3;

impl Entry {
    const fn state(self) -> u64 {
        self.tag >> SHIFT
    }

    const fn generation(self) -> u64 {
        self.tag & ((1 << SHIFT) - 1)
    }

    const fn set(&mut self, state: u64, generation: u64) {
        self.tag = state << SHIFT | generation;
    }
}

impl Slots {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            table: Mutex::new(vec![Entry::default(); capacity as usize]),
        }
    }

    /// Takes a slot in order to overwrite it: nobody can read it from now on. Whether it was in
    /// quarantine; none when there is no such slot or it is being written.
    pub(super) fn claim(&self, slot: u32) -> Option<bool> {
        let mut table = self.table.lock();
        let entry = table.get_mut(slot as usize)?;
        let state = entry.state();
        if state == BUSY {
            return None;
        }
        let generation = entry.generation();
        entry.set(BUSY, generation);
        Some(state == QUARANTINED)
    }

    /// Says what a claimed slot, or one at recovery, is now.
    pub(super) fn set(&self, slot: u32, state: SlotState, known: Known) {
        let mut table = self.table.lock();
        let Some(entry) = table.get_mut(slot as usize) else {
            return;
        };
        entry.sequence = known.sequence;
        entry.checksum = known.checksum;
        let state = match state {
            SlotState::Empty => EMPTY,
            SlotState::Valid => VALID,
            SlotState::Quarantined => QUARANTINED,
        };
        entry.set(state, known.generation);
    }

    /// What lies in the slot, if it can be read.
    pub(super) fn valid(&self, slot: u32) -> Option<Known> {
        let table = self.table.lock();
        let entry = table.get(slot as usize)?;
        (entry.state() == VALID).then(|| Known {
            sequence: entry.sequence,
            checksum: entry.checksum,
            generation: entry.generation(),
        })
    }

    /// Puts a slot into quarantine unless it was overwritten since. False when it was.
    pub(super) fn quarantine(&self, slot: u32, generation: u64) -> bool {
        let mut table = self.table.lock();
        let Some(entry) = table.get_mut(slot as usize) else {
            return false;
        };
        let same = entry.state() == VALID && entry.generation() == generation;
        if same {
            entry.set(QUARANTINED, generation);
        }
        same
    }

    pub(super) fn is_quarantined(&self, slot: u32) -> bool {
        let table = self.table.lock();
        let entry = table.get(slot as usize);
        entry.is_some_and(|entry| entry.state() == QUARANTINED)
    }

    /// Slots in quarantine.
    pub(super) fn quarantined(&self) -> u32 {
        let table = self.table.lock();
        let count = table
            .iter()
            .filter(|entry| entry.state() == QUARANTINED)
            .count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}
