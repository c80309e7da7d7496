//! How often names were asked for lately: a ghost list, names without blocks.

use super::table::Table;

const COUNT_MAX: u64 = 0xffff;
const COUNT_BITS: u32 = 16;

/// Counts references to names. Remembers at least the last `entries_max / 2` different names and
/// at most `entries_max`.
///
/// Names belong to the generation in which they were last referenced; a generation ends after
/// `entries_max / 2` names, and only it and the one before count.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Values are a generation and a count.
    known: Table,
    generation: u64,
    generation_max: usize,
    /// Names of the current generation and of the one before.
    names: [usize; 2],
}

impl Seen {
    pub(super) fn new(entries_max: usize) -> Self {
        Self {
            known: Table::new(),
            // Names that are not known look like generation 0.
            generation: 2,
            generation_max: (entries_max / 2).max(1),
            names: [0; 2],
        }
    }

    /// Counts one reference, and returns how many there were before.
    pub(super) fn refer(&mut self, name: u64) -> u32 {
        let value = self.known.get(name);
        let (generation, count) = (value >> COUNT_BITS, value & COUNT_MAX);
        let before = match self.generation - generation {
            0 => count,
            1 => {
                self.names[1] -= 1;
                self.names[0] += 1;
                count
            }
            _ => {
                self.names[0] += 1;
                0
            }
        };
        let value = self.generation << COUNT_BITS | (before + 1).min(COUNT_MAX);
        let current = self.generation;
        self.known
            .set(name, value, |value| current - (value >> COUNT_BITS) > 1);
        if self.names[0] >= self.generation_max {
            self.generation += 1;
            self.names = [0, self.names[0]];
        }
        narrow(before)
    }

    /// References to `name` that are remembered.
    pub(super) fn count(&self, name: u64) -> u32 {
        let value = self.known.get(name);
        if self.generation - (value >> COUNT_BITS) > 1 {
            return 0;
        }
        narrow(value & COUNT_MAX)
    }

    /// Names that are remembered.
    pub(super) const fn len(&self) -> usize {
        self.names[0] + self.names[1]
    }

    pub(super) fn bytes(&self) -> usize {
        self.known.bytes()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "counts have 16 bits")]
const fn narrow(count: u64) -> u32 {
    count as u32
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
            let mut seen = Seen::new(max);
            let mut naive: [HashMap<u64, u32>; 2] = Default::default();
            for (at, &name) in names.iter().enumerate() {
                let before = naive[0].get(&name).copied().or_else(|| naive[1].remove(&name)).unwrap_or(0);
                naive[0].insert(name, before + 1);
                prop_assert_eq!(seen.refer(name), before);
                if naive[0].len() >= max / 2 {
                    naive = [HashMap::new(), std::mem::take(&mut naive[0])];
                }
                prop_assert_eq!(seen.len(), naive[0].len() + naive[1].len());
                prop_assert!(seen.len() <= max);
                // The last different names are remembered.
                let mut last = HashSet::new();
                for name in names[..=at].iter().rev() {
                    last.insert(*name);
                    if last.len() > max / 2 {
                        break;
                    }
                    prop_assert!(seen.count(*name) > 0);
                }
            }
        }
    }
}
