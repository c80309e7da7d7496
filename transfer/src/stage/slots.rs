//! Who gets the next slot: operations in turn, none more than its share. Pure.

use std::collections::{HashMap, VecDeque};

/// The slots of an agent and the operations that wait for one.
#[derive(Debug)]
pub(super) struct Slots {
    free: Vec<u32>,
    line: VecDeque<u64>,
    held: HashMap<u64, u32>,
    /// Most slots of one operation.
    each: u32,
}

impl Slots {
    pub(super) fn new(slots: u32) -> Self {
        Self {
            free: (0..slots).rev().collect(),
            line: VecDeque::new(),
            held: HashMap::new(),
            each: (slots / 2).max(1),
        }
    }

    /// An operation wants slots, until it leaves.
    pub(super) fn enter(&mut self, operation: u64) {
        self.line.push_back(operation);
    }

    /// The operation whose turn it is, and its slot. It stays in line, behind all others.
    pub(super) fn next(&mut self) -> Option<(u64, u32)> {
        let slot = *self.free.last()?;
        let (held, each) = (&self.held, self.each);
        let may = |operation: &u64| held.get(operation).is_none_or(|&held| held < each);
        let place = self.line.iter().position(may)?;
        let operation = self.line.remove(place)?;
        self.line.push_back(operation);
        self.free.pop();
        *self.held.entry(operation).or_default() += 1;
        Some((operation, slot))
    }

    /// The operation is done with a slot.
    pub(super) fn back(&mut self, operation: u64, slot: u32) {
        self.free.push(slot);
        if let Some(held) = self.held.get_mut(&operation) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&operation);
            }
        }
    }

    /// The operation wants no more slots.
    pub(super) fn leave(&mut self, operation: u64) {
        // Most that leave have just had their turn.
        if self.line.back() == Some(&operation) {
            self.line.pop_back();
        } else {
            self.line.retain(|waiting| *waiting != operation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_operation_gets_half_and_others_get_their_turn() {
        let mut slots = Slots::new(4);
        slots.enter(1);
        let first = slots.next().unwrap();
        assert_eq!((first.0, slots.next().map(|next| next.0)), (1, Some(1)));
        assert_eq!(slots.next(), None, "half of them is its share");
        slots.enter(2);
        slots.enter(3);
        let turns: Vec<u64> = std::iter::from_fn(|| slots.next().map(|next| next.0)).collect();
        assert_eq!(turns, [2, 3]);
        // Longest without a turn first; the slot is the one that came back.
        slots.back(1, first.1);
        assert_eq!(slots.next(), Some((1, first.1)));
        slots.back(1, first.1);
        slots.leave(1);
        assert_eq!(slots.next(), Some((2, first.1)));
        slots.leave(2);
        slots.leave(3);
        assert_eq!(slots.next(), None);
    }

    #[test]
    fn no_slot_is_given_twice_and_none_is_lost() {
        let mut slots = Slots::new(8);
        (0..5).for_each(|operation| slots.enter(operation));
        let mut out: Vec<(u64, u32)> = Vec::new();
        let mut turns = [0; 5];
        for step in 0..1000usize {
            while let Some((operation, slot)) = slots.next() {
                assert!(out.iter().all(|&(_, taken)| taken != slot));
                out.push((operation, slot));
                turns[usize::try_from(operation).unwrap()] += 1;
            }
            assert_eq!(out.len(), 8);
            let (operation, slot) = out.swap_remove(step * 7 % 8);
            slots.back(operation, slot);
        }
        let (least, most) = (turns.iter().min().unwrap(), turns.iter().max().unwrap());
        assert!(most - least <= 4, "{turns:?}");
    }
}
