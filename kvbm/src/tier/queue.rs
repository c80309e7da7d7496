//! Runs of blocks that wait, highest priority first, then oldest; bounded by blocks.

use std::{collections::VecDeque, time::Duration};

/// Priority of blocks that come without one; KVBM's range is 0 to 100.
pub(super) const PRIORITY_DEFAULT: u32 = 50;

/// A bounded queue of runs of `T`.
#[derive(Debug)]
pub(super) struct RunQueue<T> {
    /// In the order of their turns; hardly ever of more than one priority.
    runs: VecDeque<Run<T>>,
    len: usize,
    max: usize,
}

/// Blocks of one rank that were queued together, in the order of their sequence.
#[derive(Debug)]
struct Run<T> {
    rank: usize,
    priority: u32,
    since: Duration,
    items: std::vec::IntoIter<T>,
}

/// Blocks whose turn it is, of one run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Next<T> {
    pub(super) rank: usize,
    pub(super) priority: u32,
    /// When they were queued.
    pub(super) since: Duration,
    pub(super) items: Vec<T>,
}

impl<T> RunQueue<T> {
    pub(super) const fn new(max: usize) -> Self {
        Self {
            runs: VecDeque::new(),
            len: 0,
            max,
        }
    }

    /// Queues a run. Returns how many blocks had to go for it, lowest priority and youngest first,
    /// and within a run from its end.
    pub(super) fn push(
        &mut self,
        now: Duration,
        rank: usize,
        priority: u32,
        items: Vec<T>,
    ) -> usize {
        if items.is_empty() {
            return 0;
        }
        self.len += items.len();
        let run = Run {
            rank,
            priority,
            since: now,
            items: items.into_iter(),
        };
        let place = self.runs.partition_point(|run| run.priority >= priority);
        self.runs.insert(place, run);
        let over = self.len.saturating_sub(self.max);
        let mut left = over;
        while left > 0 {
            let last = self.runs.back_mut().expect("it is over its bound");
            let gone = last.items.by_ref().rev().take(left).count();
            left -= gone;
            self.len -= gone;
            if last.items.len() == 0 {
                self.runs.pop_back();
            }
        }
        over
    }

    /// Takes up to `max` blocks, at least 1, of the first run whose rank and priority are accepted.
    pub(super) fn take(
        &mut self,
        max: usize,
        accept: impl Fn(usize, u32) -> bool,
    ) -> Option<Next<T>> {
        let max = max.max(1);
        let accepted = |run: &Run<T>| accept(run.rank, run.priority);
        let at = self.runs.iter().position(accepted)?;
        let run = &mut self.runs[at];
        let (rank, priority, since) = (run.rank, run.priority, run.since);
        let items: Vec<T> = if run.items.len() <= max {
            self.runs.remove(at)?.items.collect()
        } else {
            run.items.by_ref().take(max).collect()
        };
        self.len -= items.len();
        Some(Next {
            rank,
            priority,
            since,
            items,
        })
    }

    /// Empties the queue; returns how many blocks it had.
    pub(super) fn clear(&mut self) -> usize {
        self.runs.clear();
        std::mem::take(&mut self.len)
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn drain(queue: &mut RunQueue<char>) -> String {
        std::iter::from_fn(|| queue.take(2, |_, _| true))
            .flat_map(|next| next.items)
            .collect()
    }

    #[test]
    fn priority_then_age_and_the_tail_of_the_last_goes_first() {
        let mut queue = RunQueue::new(8);
        assert_eq!(queue.push(NOW, 0, 50, vec!['a', 'b', 'c']), 0);
        assert_eq!(queue.push(NOW, 0, 50, vec!['d', 'e', 'f']), 0);
        assert_eq!(queue.push(NOW, 0, 80, vec!['x', 'y', 'z']), 1);
        assert_eq!(queue.push(NOW, 0, 10, vec!['l', 'm']), 2, "it goes itself");
        assert_eq!(queue.len(), 8);
        assert_eq!(drain(&mut queue), "xyzabcde");
        assert!(queue.is_empty());
        assert_eq!(queue.push(NOW, 0, 1, Vec::new()), 0);
        assert_eq!(queue.push(NOW, 0, 1, "0123456789".chars().collect()), 2);
        assert_eq!((queue.clear(), queue.len()), (8, 0));
    }

    #[test]
    fn ranks_that_cannot_are_passed_over() {
        let mut queue = RunQueue::new(8);
        queue.push(NOW, 0, 50, vec!['a']);
        queue.push(NOW, 1, 40, vec!['b']);
        let second = |rank: usize, _| rank == 1;
        let next = queue.take(9, second).unwrap();
        assert_eq!((next.rank, next.priority, next.items), (1, 40, vec!['b']));
        assert_eq!(queue.take(9, second), None);
        assert_eq!(queue.len(), 1);
    }
}
