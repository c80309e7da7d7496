//! Names that came up lately, each with a small number: a bounded list of names without blocks.

use super::table::Table;

const NOTE_BITS: u32 = 16;

/// Remembers at least the last `entries_max / 2` different names and at most `entries_max`.
///
/// Names belong to the generation in which they were last noted; a generation ends after
/// `entries_max / 2` names, and only it and the one before count.
#[derive(Clone, Debug)]
pub(super) struct Recent {
    /// Values are a generation and a note.
    known: Table,
    generation: u64,
    generation_max: usize,
    /// Names of the current generation and of the one before.
    names: [usize; 2],
}

impl Recent {
    pub(super) fn new(entries_max: usize) -> Self {
        Self {
            known: Table::new(),
            // Names that are not known look like generation 0.
            generation: 2,
            generation_max: (entries_max / 2).max(1),
            names: [0; 2],
        }
    }

    /// What was noted for `name`, if that is remembered.
    pub(super) fn get(&self, name: u64) -> Option<u16> {
        let value = self.known.get(name);
        (self.generation - (value >> NOTE_BITS) <= 1).then(|| note(value))
    }

    /// Notes something for `name` in place of what was noted before.
    pub(super) fn set(&mut self, name: u64, note: u16) {
        self.update(name, |_| note);
    }

    /// Notes what `to` makes of what was noted before, which it returns.
    pub(super) fn update(&mut self, name: u64, to: impl FnOnce(Option<u16>) -> u16) -> Option<u16> {
        let current = self.generation;
        let mut before = None;
        let value = self.known.set(
            name,
            |value| {
                before = (current - (value >> NOTE_BITS) <= 1).then(|| note(value));
                current << NOTE_BITS | u64::from(to(before))
            },
            |value| current - (value >> NOTE_BITS) > 1,
        );
        let age = current - (value >> NOTE_BITS);
        if age == 1 {
            self.names[1] -= 1;
        }
        if age > 0 {
            self.names[0] += 1;
        }
        if self.names[0] >= self.generation_max {
            self.generation += 1;
            self.names = [0, self.names[0]];
        }
        before
    }

    /// Names that are remembered.
    pub(super) const fn len(&self) -> usize {
        self.names[0] + self.names[1]
    }

    pub(super) fn bytes(&self) -> usize {
        self.known.bytes()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low bits are the note")]
const fn note(value: u64) -> u16 {
    value as u16
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_are_right_and_bounded(
            max in 2usize..60,
            names in prop::collection::vec(0u64..100, 1..2_000),
        ) {
            let mut recent = Recent::new(max);
            let mut naive: [HashMap<u64, u16>; 2] = Default::default();
            for (at, &name) in names.iter().enumerate() {
                let known = naive[0].get(&name).copied();
                let before = known.or_else(|| naive[1].remove(&name));
                let next = before.unwrap_or(0) + 1;
                naive[0].insert(name, next);
                prop_assert_eq!(recent.update(name, |count| count.unwrap_or(0) + 1), before);
                if naive[0].len() >= max / 2 {
                    naive = [HashMap::new(), std::mem::take(&mut naive[0])];
                }
                prop_assert_eq!(recent.len(), naive[0].len() + naive[1].len());
                prop_assert!(recent.len() <= max);
                // The last different names are remembered.
                let mut last = HashSet::new();
                for name in names[..=at].iter().rev() {
                    last.insert(*name);
                    if last.len() > max / 2 {
                        break;
                    }
                    prop_assert!(recent.get(*name).is_some());
                }
            }
        }
    }
}
