//! The position in each rank's sequence of events.

use std::collections::BTreeMap;

use blockplane_protocol::{DpRank, FeedItem, FeedRequest, KvEvent, WorkerId, feed::SnapshotBlock};
use thiserror::Error;

/// Blocks of a snapshot that are put together at most.
const SNAPSHOT_BLOCKS_TOTAL_MAX: usize = 4 << 20;

/// Checks that no event is missed or applied twice.
#[derive(Debug, Default)]
pub struct FeedTracker {
    /// Id of the next event of each known rank.
    next: BTreeMap<DpRank, u64>,
    /// Snapshots of which parts have come.
    parts: BTreeMap<DpRank, Vec<SnapshotBlock>>,
}

/// An item after the check. What is in it shall be applied, in the order of the fields, also when
/// there is a fault.
#[derive(Debug, Default, PartialEq)]
pub struct Accepted {
    /// A complete snapshot: rank, last event in it, blocks. Replaces all that is known of the rank.
    pub snapshot: Option<(DpRank, u64, Vec<SnapshotBlock>)>,
    /// New events, in order, without those that were seen before.
    pub events: Vec<KvEvent>,
    /// The rest of the item could not be used; subscribe again with [`FeedTracker::request`].
    pub fault: Option<FeedFault>,
}

/// Why a subscription must start again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FeedFault {
    /// Events are missing.
    #[error("rank {rank}: event {got} came where {expected} was due")]
    Gap {
        /// The rank.
        rank: DpRank,
        /// The event that was due; 1 where nothing is known of the rank.
        expected: u64,
        /// The event that came.
        got: u64,
    },
    /// A snapshot is larger than is accepted.
    #[error("rank {rank}: the snapshot has more than {SNAPSHOT_BLOCKS_TOTAL_MAX} blocks")]
    SnapshotTooLarge {
        /// The rank.
        rank: DpRank,
    },
}

impl FeedTracker {
    /// Knows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A request that goes on where this tracker is. Incomplete snapshots start again.
    pub fn request(&mut self, worker: Option<WorkerId>) -> FeedRequest {
        self.parts.clear();
        FeedRequest {
            worker,
            from: self
                .next
                .iter()
                .map(|(&rank, &next)| (rank, next - 1))
                .collect(),
        }
    }

    /// Forgets the position in a rank, so that the next request brings a snapshot of it: for a
    /// consumer that lost or distrusts what it built from the events.
    pub fn forget(&mut self, rank: DpRank) {
        self.next.remove(&rank);
        self.parts.remove(&rank);
    }

    /// Checks an item. Load reports have no sequence; they pass through unseen.
    pub fn accept(&mut self, item: FeedItem) -> Accepted {
        match item {
            FeedItem::Snapshot {
                rank,
                last_event_id,
                blocks,
                more,
            } => self.snapshot_part(rank, last_event_id, blocks, more),
            FeedItem::Events(events) => self.events(events),
            FeedItem::Load(_) => Accepted::default(),
        }
    }

    fn snapshot_part(
        &mut self,
        rank: DpRank,
        last_event_id: u64,
        blocks: Vec<SnapshotBlock>,
        more: bool,
    ) -> Accepted {
        let parts = self.parts.entry(rank).or_default();
        if parts.len() + blocks.len() > SNAPSHOT_BLOCKS_TOTAL_MAX {
            self.parts.remove(&rank);
            return Accepted {
                fault: Some(FeedFault::SnapshotTooLarge { rank }),
                ..Accepted::default()
            };
        }
        if parts.is_empty() {
            *parts = blocks;
        } else {
            parts.extend(blocks);
        }
        if more {
            return Accepted::default();
        }
        let blocks = self.parts.remove(&rank).unwrap_or_default();
        self.next.insert(rank, last_event_id + 1);
        Accepted {
            snapshot: Some((rank, last_event_id, blocks)),
            ..Accepted::default()
        }
    }

    fn events(&mut self, events: Vec<KvEvent>) -> Accepted {
        let mut accepted = Accepted {
            events: Vec::with_capacity(events.len()),
            ..Accepted::default()
        };
        for event in events {
            let next = self.next.entry(event.rank).or_insert(1);
            if event.event_id < *next {
                continue;
            }
            if event.event_id > *next {
                accepted.fault = Some(FeedFault::Gap {
                    rank: event.rank,
                    expected: *next,
                    got: event.event_id,
                });
                break;
            }
            *next += 1;
            accepted.events.push(event);
        }
        accepted
    }
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::{BlockHash, KvEventData, SequenceHash, StoredBlock, Tier};
    use proptest::prelude::*;

    use super::*;

    fn event(rank: u32, event_id: u64) -> KvEvent {
        KvEvent {
            event_id,
            rank: DpRank(rank),
            data: KvEventData::Cleared,
        }
    }

    fn block(hash: u64) -> SnapshotBlock {
        SnapshotBlock {
            parent: None,
            block: StoredBlock {
                block: BlockHash(hash),
                sequence: SequenceHash(hash),
            },
            tier: Tier::Device,
        }
    }

    #[test]
    fn a_gap_is_noticed_and_what_came_before_it_counts() {
        let mut tracker = FeedTracker::new();
        let accepted = tracker.accept(FeedItem::Events(vec![
            event(0, 1),
            event(1, 1),
            event(0, 2),
            event(0, 4),
        ]));
        assert_eq!(accepted.events, [event(0, 1), event(1, 1), event(0, 2)]);
        let expected = FeedFault::Gap {
            rank: DpRank(0),
            expected: 3,
            got: 4,
        };
        assert_eq!(accepted.fault, Some(expected));
        assert_eq!(tracker.request(None).from, [(DpRank(0), 2), (DpRank(1), 1)]);
    }

    #[test]
    fn an_unknown_rank_must_start_with_its_first_event_or_a_snapshot() {
        let mut tracker = FeedTracker::new();
        let accepted = tracker.accept(FeedItem::Events(vec![event(0, 7)]));
        assert!(matches!(
            accepted.fault,
            Some(FeedFault::Gap {
                expected: 1,
                got: 7,
                ..
            })
        ));
        for part in FeedItem::snapshot(DpRank(0), 9, &[block(1), block(2)]) {
            tracker.accept(part);
        }
        let accepted = tracker.accept(FeedItem::Events(vec![event(0, 9), event(0, 10)]));
        assert_eq!(
            (accepted.events, accepted.fault),
            (vec![event(0, 10)], None)
        );
    }

    #[test]
    fn a_snapshot_in_parts_counts_when_it_is_complete() {
        let mut tracker = FeedTracker::new();
        let part = |hash, more| FeedItem::Snapshot {
            rank: DpRank(3),
            last_event_id: 5,
            blocks: vec![block(hash)],
            more,
        };
        assert_eq!(tracker.accept(part(1, true)), Accepted::default());
        // A new subscription: the old part must not count.
        assert_eq!(tracker.request(None).from, []);
        assert_eq!(tracker.accept(part(1, true)), Accepted::default());
        let accepted = tracker.accept(part(2, false));
        assert_eq!(
            accepted.snapshot,
            Some((DpRank(3), 5, vec![block(1), block(2)]))
        );
        assert_eq!(tracker.request(None).from, [(DpRank(3), 5)]);
        tracker.forget(DpRank(3));
        assert_eq!(tracker.request(None).from, []);
    }

    proptest! {
        /// However items are lost and repeated, each event is applied once, in order, after resyncs.
        #[test]
        fn each_event_is_applied_once_and_in_order(
            total in 1u64..60,
            losses in proptest::collection::vec(any::<bool>(), 60),
            overlap in 0u64..4,
        ) {
            let mut tracker = FeedTracker::new();
            let mut applied = Vec::new();
            let mut losses = losses.into_iter();
            while applied.len() < usize::try_from(total).unwrap() {
                let request = tracker.request(None);
                let last = request.from.first().map_or(0, |&(_, last)| last);
                // A worker may repeat some; the network may lose some.
                for id in (last + 1).saturating_sub(overlap).max(1)..=total {
                    if losses.next().unwrap_or(false) {
                        continue;
                    }
                    let accepted = tracker.accept(FeedItem::Events(vec![event(0, id)]));
                    applied.extend(accepted.events.iter().map(|event| event.event_id));
                    if accepted.fault.is_some() {
                        break;
                    }
                }
            }
            prop_assert_eq!(applied, (1..=total).collect::<Vec<_>>());
        }
    }
}
