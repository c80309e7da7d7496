//! Predict on route: what was just sent to a rank counts as present there for a while.

use std::{collections::VecDeque, time::Duration};

use blockplane_protocol::{SequenceHash, WorkerId, WorkerRank};
use hashbrown::HashTable;
use smallvec::SmallVec;

/// What [`Predictions::find`] is asked about one rank.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The rank.
    pub rank: WorkerRank,
    /// Leading blocks that it is known to have.
    pub known: u32,
    /// Predictions of this age and older do not count.
    pub ttl: Duration,
}

/// Blocks that ranks are expected to hold because a request with them was routed there.
///
/// Entries are kept for the longest time that any reader asks for, and the oldest ones go first
/// when there are too many.
#[derive(Debug)]
pub struct Predictions {
    blocks: HashTable<Predicted>,
    /// Every recording, oldest first; one that was refreshed since is skipped when it comes up.
    queue: VecDeque<Recording>,
    ttl: Duration,
    entries_max: usize,
}

#[derive(Debug)]
struct Predicted {
    hash: SequenceHash,
    ranks: SmallVec<[(WorkerRank, Duration); 1]>,
}

#[derive(Clone, Copy, Debug)]
struct Recording {
    at: Duration,
    hash: SequenceHash,
    rank: WorkerRank,
}

impl Predictions {
    /// Keeps a prediction for `ttl`, and at most `entries_max` pairs of block and rank (at least
    /// 1). A pair takes about 100 bytes.
    #[must_use]
    pub fn new(ttl: Duration, entries_max: usize) -> Self {
        Self {
            blocks: HashTable::new(),
            queue: VecDeque::new(),
            ttl,
            entries_max: entries_max.max(1),
        }
    }

    /// Notes that a request with these blocks was routed to `rank`.
    pub fn record(&mut self, rank: WorkerRank, prompt: &[SequenceHash], now: Duration) {
        self.expire(now);
        // A recording that is still fresh is not renewed: hot prefixes would flood the queue.
        let fresh = self.ttl / 8;
        // Deepest first, so that the cap trims a prefix from its end.
        for &hash in prompt.iter().rev() {
            let predicted = self
                .blocks
                .entry(hash.0, |p| p.hash == hash, |p| p.hash.0)
                .or_insert_with(|| Predicted {
                    hash,
                    ranks: SmallVec::new(),
                })
                .into_mut();
            match predicted.ranks.iter_mut().find(|(held, _)| *held == rank) {
                Some((_, at)) if now.saturating_sub(*at) < fresh => continue,
                Some((_, at)) => *at = now,
                None => predicted.ranks.push((rank, now)),
            }
            self.queue.push_back(Recording {
                at: now,
                hash,
                rank,
            });
            if self.queue.len() > self.entries_max {
                self.drop_oldest();
            }
        }
    }

    /// Leading blocks of each rank, continuing after the blocks that it is known to have with those
    /// it is predicted to have.
    #[must_use]
    pub fn find(&self, prompt: &[SequenceHash], asked: &[Asked], now: Duration) -> Vec<u32> {
        let mut leading: Vec<u32> = asked.iter().map(|asked| asked.known).collect();
        if self.blocks.is_empty() {
            return leading;
        }
        // Ranks by where they continue, so that each block is looked up once for all of them.
        let mut waiting: Vec<usize> = (0..asked.len()).collect();
        waiting.sort_unstable_by_key(|&i| std::cmp::Reverse(asked[i].known));
        let mut going: Vec<usize> = Vec::new();
        let mut position = 0;
        loop {
            if going.is_empty() {
                let Some(&next) = waiting.last() else {
                    break;
                };
                position = asked[next].known;
            }
            while let Some(i) = waiting.pop_if(|i| asked[*i].known <= position) {
                going.push(i);
            }
            let Some(&hash) = prompt.get(position as usize) else {
                break;
            };
            let predicted = self.blocks.find(hash.0, |p| p.hash == hash);
            going.retain(|&i| {
                let Asked { rank, ttl, .. } = asked[i];
                let present = predicted.is_some_and(|predicted| {
                    predicted
                        .ranks
                        .iter()
                        .any(|&(held, at)| held == rank && now.saturating_sub(at) < ttl)
                });
                leading[i] += u32::from(present);
                present
            });
            position += 1;
        }
        leading
    }

    /// Forgets a worker.
    pub fn remove_worker(&mut self, worker: WorkerId) {
        self.blocks.retain(|predicted| {
            predicted.ranks.retain(|(rank, _)| rank.worker != worker);
            !predicted.ranks.is_empty()
        });
        self.queue
            .retain(|recording| recording.rank.worker != worker);
    }

    /// Pairs of block and rank, refreshed ones counted once more until their first recording goes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether nothing is predicted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    fn expire(&mut self, now: Duration) {
        while let Some(oldest) = self.queue.front()
            && now.saturating_sub(oldest.at) >= self.ttl
        {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        let Some(Recording { at, hash, rank }) = self.queue.pop_front() else {
            return;
        };
        if let Ok(mut entry) = self.blocks.find_entry(hash.0, |p| p.hash == hash) {
            let ranks = &mut entry.get_mut().ranks;
            ranks.retain(|&mut (held, recorded)| held != rank || recorded != at);
            if ranks.is_empty() {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(120);

    fn rank(worker: u64) -> WorkerRank {
        WorkerRank::new(WorkerId(worker), 0)
    }

    fn prompt(blocks: u64) -> Vec<SequenceHash> {
        (1..=blocks).map(SequenceHash).collect()
    }

    fn leading(predictions: &Predictions, worker: u64, limit: Duration, now: Duration) -> u32 {
        let asked = Asked {
            rank: rank(worker),
            known: 0,
            ttl: limit,
        };
        predictions.find(&prompt(8), &[asked], now)[0]
    }

    #[test]
    fn predictions_continue_where_knowledge_ends() {
        let mut predictions = Predictions::new(TTL, 1000);
        predictions.record(rank(1), &prompt(6)[2..], Duration::ZERO);
        predictions.record(rank(2), &prompt(3), Duration::ZERO);
        let asked =
            [(1, 0), (1, 2), (1, 4), (2, 5), (2, 1), (3, 8), (3, 9)].map(|(worker, known)| Asked {
                rank: rank(worker),
                known,
                ttl: TTL,
            });
        assert_eq!(
            predictions.find(&prompt(8), &asked, Duration::ZERO),
            [0, 6, 6, 5, 3, 8, 9]
        );
    }

    #[test]
    fn a_prediction_lives_for_the_readers_limit_and_no_longer_than_the_ttl() {
        let mut predictions = Predictions::new(TTL, 1000);
        predictions.record(rank(1), &prompt(4), Duration::ZERO);
        let at = |seconds| Duration::from_secs(seconds);
        assert_eq!(leading(&predictions, 1, TTL, at(119)), 4);
        assert_eq!(leading(&predictions, 1, at(5), at(6)), 0);
        assert_eq!(leading(&predictions, 2, TTL, at(1)), 0);
        assert_eq!(leading(&predictions, 1, TTL, at(120)), 0);
        predictions.record(rank(2), &[], at(120));
        assert!(predictions.is_empty());
    }

    #[test]
    fn a_refreshed_prefix_outlives_its_first_recording() {
        let mut predictions = Predictions::new(TTL, 1000);
        predictions.record(rank(1), &prompt(4), Duration::ZERO);
        predictions.record(rank(1), &prompt(2), Duration::from_secs(60));
        predictions.record(rank(2), &[], Duration::from_secs(121));
        assert_eq!(leading(&predictions, 1, TTL, Duration::from_secs(121)), 2);
    }

    #[test]
    fn the_oldest_pairs_make_room() {
        let mut predictions = Predictions::new(TTL, 6);
        predictions.record(rank(1), &prompt(4), Duration::ZERO);
        predictions.record(rank(2), &prompt(4), Duration::from_secs(1));
        assert_eq!(predictions.len(), 6);
        assert_eq!(leading(&predictions, 1, TTL, Duration::from_secs(1)), 2);
        assert_eq!(leading(&predictions, 2, TTL, Duration::from_secs(1)), 4);
    }

    #[test]
    fn a_removed_worker_is_forgotten() {
        let mut predictions = Predictions::new(TTL, 100);
        predictions.record(rank(1), &prompt(4), Duration::ZERO);
        predictions.record(rank(2), &prompt(3), Duration::ZERO);
        predictions.remove_worker(WorkerId(1));
        assert_eq!(leading(&predictions, 1, TTL, Duration::ZERO), 0);
        assert_eq!(leading(&predictions, 2, TTL, Duration::ZERO), 3);
        assert_eq!(predictions.len(), 3);
    }
}
