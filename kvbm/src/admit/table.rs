//! A bounded map from block names to numbers, that forgets without ever being swept as a whole.

use hashbrown::{HashTable, hash_table::Entry};

/// Buckets that one insertion looks at for entries to forget. More than one, so that entries leave
/// faster than they can come.
const SWEPT: usize = 2;
const ENTRIES_MIN: usize = 56;

/// Names and what is known of them, in 17 bytes a bucket. There is room for half as many more as
/// were left when it was last full, so there are at most 24/7 buckets for each of those.
///
/// Values are never 0. Which of them are out of date is the caller's rule; an entry that is out of
/// date is removed some time later, so callers check what they get.
#[derive(Clone, Debug)]
pub(super) struct Table {
    known: HashTable<Known>,
    /// The bucket to look at next.
    cursor: usize,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    name: u64,
    value: u64,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            known: HashTable::with_capacity(ENTRIES_MIN),
            cursor: 0,
        }
    }

    /// Bytes of the buckets.
    pub(super) fn bytes(&self) -> usize {
        self.known.allocation_size()
    }

    /// Entries, with those that are out of date and not yet removed.
    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.known.len()
    }

    /// What was set for `name`, or 0.
    pub(super) fn get(&self, name: u64) -> u64 {
        let known = self.known.find(hash(name), |known| known.name == name);
        known.map_or(0, |known| known.value)
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
        if self.known.len() == self.known.capacity() {
            self.make_room(&old);
        }
        let same = |known: &Known| known.name == name;
        match self.known.entry(hash(name), same, |known| hash(known.name)) {
            Entry::Occupied(mut known) => {
                let before = known.get().value;
                known.get_mut().value = to(before);
                before
            }
            Entry::Vacant(vacant) => {
                let value = to(0);
                debug_assert_ne!(value, 0, "0 stands for none");
                vacant.insert(Known { name, value });
                0
            }
        }
    }

    fn sweep(&mut self, old: &impl Fn(u64) -> bool) {
        for _ in 0..SWEPT {
            if let Ok(known) = self.known.get_bucket_entry(self.cursor)
                && old(known.get().value)
            {
                known.remove();
            }
            // The number of buckets is a power of two.
            self.cursor = (self.cursor + 1) & (self.known.num_buckets() - 1);
        }
    }

    /// Drops all that is out of date, and makes room for half as many entries as are left.
    fn make_room(&mut self, old: &impl Fn(u64) -> bool) {
        let live = || self.known.iter().filter(|known| !old(known.value));
        let count = live().count();
        let mut roomy = HashTable::with_capacity((count + count / 2 + 1).max(ENTRIES_MIN));
        for known in live() {
            roomy.insert_unique(hash(known.name), *known, |known| hash(known.name));
        }
        self.known = roomy;
        self.cursor = 0;
    }
}

/// Names are hashes, but some of their bits may have chosen a shard already.
const fn hash(name: u64) -> u64 {
    let mixed = name.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
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
        assert!(table.bytes() <= 4_096 * 17 + 64, "{}", table.bytes());
    }
}
