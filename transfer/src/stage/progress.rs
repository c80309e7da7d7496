//! Where a staged operation stands: which parts are under way, in which half and slot. Pure.
//!
//! A part is done when both of its halves are; an operation that is to be durable has one more part
//! that begins when all others are done.

use std::collections::HashMap;

/// One half of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    /// Into the slot.
    Fill(u32),
    /// Out of the slot.
    Drain(u32),
    /// What follows all parts; needs no slot.
    Seal,
}

/// What follows the end of a half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The part goes on with this half.
    Go(Half),
    /// The part is over, well or not; its slot is free.
    Over { slot: Option<u32> },
}

#[derive(Debug)]
pub(super) struct Progress {
    /// Parts that move bytes.
    chunks: u32,
    sealed: bool,
    begun: u32,
    done: u32,
    open: HashMap<u32, Half>,
}

impl Progress {
    /// Of an operation that moves bytes in `chunks` parts, with a seal behind them or without.
    pub(super) fn new(chunks: u32, seal: bool) -> Self {
        Self {
            chunks,
            sealed: !seal,
            begun: 0,
            done: 0,
            open: HashMap::new(),
        }
    }

    /// Whether there are parts left that need a slot.
    pub(super) const fn wants_slot(&self) -> bool {
        self.begun < self.chunks
    }

    /// A part begins; says with which half.
    pub(super) fn begin(&mut self, part: u32, slot: u32) -> Half {
        self.begun += 1;
        self.open.insert(part, Half::Fill(slot));
        Half::Fill(slot)
    }

    /// Whether all parts are done and what follows them has not begun.
    pub(super) const fn wants_seal(&self) -> bool {
        !self.sealed && self.done == self.chunks
    }

    pub(super) fn seal(&mut self, part: u32) -> Half {
        self.sealed = true;
        self.open.insert(part, Half::Seal);
        Half::Seal
    }

    /// A half has ended. `on` says whether the operation goes on: the half ended well and nothing
    /// was called off.
    pub(super) fn ended(&mut self, part: u32, on: bool) -> Next {
        match self.open.remove(&part) {
            Some(Half::Fill(slot)) if on => {
                self.open.insert(part, Half::Drain(slot));
                Next::Go(Half::Drain(slot))
            }
            Some(Half::Drain(slot)) => {
                self.done += u32::from(on);
                Next::Over { slot: Some(slot) }
            }
            Some(Half::Fill(slot)) => Next::Over { slot: Some(slot) },
            Some(Half::Seal) | None => Next::Over { slot: None },
        }
    }

    /// Whether no part is under way.
    pub(super) fn is_quiet(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_filled_then_drained_and_the_seal_comes_last() {
        let mut progress = Progress::new(2, true);
        assert_eq!(progress.begin(0, 7), Half::Fill(7));
        assert!(progress.wants_slot());
        assert_eq!(progress.begin(1, 3), Half::Fill(3));
        assert!(!progress.wants_slot() && !progress.wants_seal());
        // Later parts may be faster.
        assert_eq!(progress.ended(1, true), Next::Go(Half::Drain(3)));
        assert_eq!(progress.ended(1, true), Next::Over { slot: Some(3) });
        assert_eq!(progress.ended(0, true), Next::Go(Half::Drain(7)));
        assert!(!progress.wants_seal());
        assert_eq!(progress.ended(0, true), Next::Over { slot: Some(7) });
        assert!(progress.wants_seal() && progress.is_quiet());
        assert_eq!(progress.seal(2), Half::Seal);
        assert!(!progress.wants_seal() && !progress.is_quiet());
        assert_eq!(progress.ended(2, true), Next::Over { slot: None });
        assert!(progress.is_quiet());
    }

    #[test]
    fn nothing_follows_a_half_that_failed() {
        for drained in [false, true] {
            let mut progress = Progress::new(1, true);
            progress.begin(0, 5);
            if drained {
                progress.ended(0, true);
            }
            assert_eq!(progress.ended(0, false), Next::Over { slot: Some(5) });
            assert!(progress.is_quiet() && !progress.wants_seal());
        }
    }
}
