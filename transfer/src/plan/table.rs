//! A small hash table that numbers what it has not seen before.

/// Numbers for keys, in the order in which they first appear: a small open-addressed hash table.
#[derive(Debug)]
pub(crate) struct Table<const N: usize> {
    /// Number of the key plus one, 0 where a slot is free.
    slots: Vec<(u32, [u64; N])>,
    used: usize,
    last: ([u64; N], usize),
}

impl<const N: usize> Table<N> {
    /// A table that grows when it holds more than `capacity` keys.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        let slots = (capacity * 2).next_power_of_two().max(16);
        Self {
            slots: vec![(0, [0; N]); slots],
            used: 0,
            last: ([0; N], usize::MAX),
        }
    }

    /// The number of a key. A number that equals the count of keys before the call is new.
    pub(crate) fn number_of(&mut self, key: [u64; N]) -> usize {
        if self.last.0 == key && self.last.1 != usize::MAX {
            return self.last.1;
        }
        if self.used * 2 >= self.slots.len() {
            self.grow();
        }
        let at = self.find(key);
        let slot = &mut self.slots[at];
        if slot.0 == 0 {
            self.used += 1;
            *slot = (u32::try_from(self.used).unwrap_or(u32::MAX), key);
        }
        let number = slot.0 as usize - 1;
        self.last = (key, number);
        number
    }

    /// The slot that has the key, or is to have it.
    fn find(&self, key: [u64; N]) -> usize {
        let mask = self.slots.len() - 1;
        let hash = key.iter().fold(0u64, |hash, part| {
            (hash.rotate_left(26) ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        let mut at = usize::try_from(hash >> 32).unwrap_or(0) & mask;
        while self.slots[at].0 != 0 && self.slots[at].1 != key {
            at = (at + 1) & mask;
        }
        at
    }

    fn grow(&mut self) {
        let slots = vec![(0, [0; N]); self.slots.len() * 2];
        for slot in std::mem::replace(&mut self.slots, slots) {
            if slot.0 != 0 {
                let at = self.find(slot.1);
                self.slots[at] = slot;
            }
        }
    }
}
