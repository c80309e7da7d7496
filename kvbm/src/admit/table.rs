//! A bounded map from block names to numbers, that forgets without ever being swept as a whole.

/// Slots that one insertion looks at for entries to forget. More than one, so that entries leave
/// faster than they can come.
const SWEPT: usize = 2;
const SLOTS_MIN: usize = 64;

/// Names and what is known of them: open addressing, 16 bytes a slot, at most three quarters full.
///
/// Values are never 0. Which of them are out of date is the caller's rule; an entry that is out of
/// date is removed some time later, so callers check what they get.
#[derive(Clone, Debug)]
pub(super) struct Table {
    slots: Box<[Slot]>,
    used: usize,
    cursor: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    name: u64,
    /// 0 where the slot is empty.
    value: u64,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            slots: vec![Slot::default(); SLOTS_MIN].into(),
            used: 0,
            cursor: 0,
        }
    }

    /// Bytes of the slots.
    pub(super) fn bytes(&self) -> usize {
        self.slots.len() * size_of::<Slot>()
    }

    /// Entries, with those that are out of date and not yet removed.
    #[cfg(test)]
    pub(super) const fn used(&self) -> usize {
        self.used
    }

    /// What was set for `name`, or 0.
    pub(super) fn get(&self, name: u64) -> u64 {
        let mut at = self.home(name);
        loop {
            let slot = self.slots[at];
            if slot.value == 0 || slot.name == name {
                return slot.value;
            }
            at = self.after(at);
        }
    }

    /// Sets the value of `name` to what `to` makes of the one before (0 for none), which it returns,
    /// and forgets a few entries for which `old` holds.
    pub(super) fn set(
        &mut self,
        name: u64,
        to: impl FnOnce(u64) -> u64,
        old: impl Fn(u64) -> bool,
    ) -> u64 {
        self.sweep(&old);
        let mut at = self.home(name);
        while self.slots[at].value != 0 {
            if self.slots[at].name == name {
                let before = self.slots[at].value;
                self.slots[at].value = to(before);
                return before;
            }
            at = self.after(at);
        }
        let value = to(0);
        debug_assert_ne!(value, 0, "0 marks an empty slot");
        self.slots[at] = Slot { name, value };
        self.used += 1;
        if self.used * 4 > self.slots.len() * 3 {
            self.rebuild(&old);
        }
        0
    }

    fn sweep(&mut self, old: &impl Fn(u64) -> bool) {
        for _ in 0..SWEPT {
            let value = self.slots[self.cursor].value;
            if value != 0 && old(value) {
                // What moves into the gap is looked at by the next step.
                self.remove(self.cursor);
            } else {
                self.cursor = self.after(self.cursor);
            }
        }
    }

    /// Empties a slot and moves later entries of its run, so that no search ends too early.
    fn remove(&mut self, mut gap: usize) {
        let mask = self.slots.len() - 1;
        let mut at = self.after(gap);
        while self.slots[at].value != 0 {
            let home = self.home(self.slots[at].name);
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(gap) & mask {
                self.slots[gap] = self.slots[at];
                gap = at;
            }
            at = self.after(at);
        }
        self.slots[gap] = Slot::default();
        self.used -= 1;
    }

    /// Makes room: as many slots as what is not out of date needs, half of them empty.
    fn rebuild(&mut self, old: &impl Fn(u64) -> bool) {
        let kept = |slot: &&Slot| slot.value != 0 && !old(slot.value);
        let live = self.slots.iter().filter(kept).count();
        let slots = (live * 2).next_power_of_two().max(SLOTS_MIN);
        let before = std::mem::replace(&mut self.slots, vec![Slot::default(); slots].into());
        self.cursor = 0;
        self.used = live;
        for slot in before.iter().filter(kept) {
            let mut at = self.home(slot.name);
            while self.slots[at].value != 0 {
                at = self.after(at);
            }
            self.slots[at] = *slot;
        }
    }

    fn home(&self, name: u64) -> usize {
        // Names are hashes, but their low bits may have chosen a shard already.
        let mixed = name.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        mixed as usize & (self.slots.len() - 1)
    }

    fn after(&self, at: usize) -> usize {
        (at + 1) & (self.slots.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_not_old_is_found(steps in prop::collection::vec((0u64..400, 0u64..3), 1..3_000)) {
            let mut table = Table::new();
            let mut naive: HashMap<u64, u64> = HashMap::new();
            let mut now = 1;
            for (name, advance) in steps {
                now += advance;
                // Values are times; what was set more than 300 ago is old.
                let old = |value: u64| value + 300 < now;
                table.set(name, |_| now, old);
                naive.insert(name, now);
                for (&name, &value) in &naive {
                    let got = table.get(name);
                    prop_assert!(got == value || (old(value) && got == 0));
                }
            }
        }
    }

    #[test]
    fn old_entries_leave_and_memory_stays() {
        let mut table = Table::new();
        for now in 1..200_000u64 {
            table.set(now, |_| now, |value| value + 1_000 < now);
        }
        assert!(table.used() < 3_000, "{}", table.used());
        assert!(table.bytes() <= 4_096 * 16, "{}", table.bytes());
    }
}
