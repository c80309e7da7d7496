//! The bounded set of names that are known to be in a store.

use std::collections::{HashMap, HashSet, VecDeque};

use blockplane_protocol::SequenceHash;

/// Names with their age. Beyond the limit the oldest is forgotten: its block is a miss until a
/// listing names it again.
#[derive(Debug)]
pub(super) struct Names {
    limit: usize,
    /// Number of the insertion that is in force.
    known: HashMap<SequenceHash, u64>,
    /// Insertions, oldest first; those that are not in force any more are skipped.
    order: VecDeque<(SequenceHash, u64)>,
    next: u64,
}

impl Names {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            known: HashMap::new(),
            order: VecDeque::new(),
            next: 0,
        }
    }

    pub(super) fn contains(&self, name: SequenceHash) -> bool {
        self.known.contains_key(&name)
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    pub(super) fn insert(&mut self, name: SequenceHash) {
        if self.limit == 0 || self.known.contains_key(&name) {
            return;
        }
        while self.known.len() >= self.limit {
            let Some((oldest, number)) = self.order.pop_front() else {
                break;
            };
            if self.known.get(&oldest) == Some(&number) {
                self.known.remove(&oldest);
            }
        }
        if self.order.len() >= self.limit.saturating_mul(2) {
            let known = &self.known;
            self.order
                .retain(|(name, number)| known.get(name) == Some(number));
        }
        self.known.insert(name, self.next);
        self.order.push_back((name, self.next));
        self.next += 1;
    }

    pub(super) fn remove(&mut self, name: SequenceHash) {
        self.known.remove(&name);
    }

    /// A point in time for [`Names::replace`].
    pub(super) const fn now(&self) -> u64 {
        self.next
    }

    /// Everything that the store had at `since`: other names that were known then are forgotten.
    pub(super) fn replace(&mut self, listed: &HashSet<SequenceHash>, since: u64) {
        self.known
            .retain(|name, number| *number >= since || listed.contains(name));
        self.extend(listed.iter().copied());
    }

    pub(super) fn extend(&mut self, listed: impl IntoIterator<Item = SequenceHash>) {
        listed.into_iter().for_each(|name| self.insert(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(numbers: impl IntoIterator<Item = u64>) -> HashSet<SequenceHash> {
        numbers.into_iter().map(SequenceHash).collect()
    }

    #[test]
    fn the_oldest_is_forgotten() {
        let mut known = Names::new(3);
        known.extend([1, 2, 3].map(SequenceHash));
        known.remove(SequenceHash(1));
        known.insert(SequenceHash(1));
        known.insert(SequenceHash(4));
        assert!(!known.contains(SequenceHash(2)));
        assert!(
            [1, 3, 4]
                .iter()
                .all(|name| known.contains(SequenceHash(*name)))
        );
    }

    #[test]
    fn memory_is_bounded() {
        let mut known = Names::new(10);
        for turn in 0..10_000 {
            known.insert(SequenceHash(turn % 7));
            known.remove(SequenceHash(turn % 7));
            known.insert(SequenceHash(turn));
        }
        assert!(known.len() <= 10);
        assert!(known.order.len() <= 20);
    }

    #[test]
    fn a_listing_does_not_undo_what_came_after_it() {
        let mut known = Names::new(10);
        known.extend([1, 2].map(SequenceHash));
        let since = known.now();
        known.insert(SequenceHash(3));
        known.replace(&names([2, 5]), since);
        assert!(!known.contains(SequenceHash(1)));
        assert!(
            [2, 3, 5]
                .iter()
                .all(|name| known.contains(SequenceHash(*name)))
        );
    }
}
