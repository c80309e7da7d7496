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
    /// Names removed since the listing that is under way began: what it says of them is old.
    removed: Option<HashSet<SequenceHash>>,
}

impl Names {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            known: HashMap::new(),
            order: VecDeque::new(),
            next: 0,
            removed: None,
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
        if let Some(removed) = &mut self.removed
            && removed.len() < self.limit
        {
            removed.insert(name);
        }
    }

    /// A listing begins; the point in time for [`Names::listed`].
    pub(super) fn begin(&mut self) -> u64 {
        self.removed = Some(HashSet::new());
        self.next
    }

    /// The listing that began at `since` found these. If it is `complete`, other names that were
    /// known then are forgotten.
    pub(super) fn listed(&mut self, listed: &HashSet<SequenceHash>, since: u64, complete: bool) {
        let removed = self.removed.take().unwrap_or_default();
        if complete {
            self.known
                .retain(|name, number| *number >= since || listed.contains(name));
        }
        for name in listed.difference(&removed) {
            self.insert(*name);
        }
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
        for name in [1, 2, 3] {
            known.insert(SequenceHash(name));
        }
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
        for name in [1, 2] {
            known.insert(SequenceHash(name));
        }
        let since = known.begin();
        known.insert(SequenceHash(3));
        known.remove(SequenceHash(6));
        known.listed(&names([2, 5, 6]), since, true);
        assert!(!known.contains(SequenceHash(1)));
        assert!(
            !known.contains(SequenceHash(6)),
            "it went after it was listed"
        );
        let kept = [2, 3, 5];
        assert!(kept.iter().all(|name| known.contains(SequenceHash(*name))));
    }

    #[test]
    fn a_part_of_a_listing_takes_nothing_away() {
        let mut known = Names::new(10);
        known.insert(SequenceHash(1));
        let since = known.begin();
        known.listed(&names([2]), since, false);
        assert!(
            [1, 2]
                .iter()
                .all(|name| known.contains(SequenceHash(*name)))
        );
    }
}
