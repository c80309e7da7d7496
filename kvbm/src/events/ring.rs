//! The most recent events, packed: appending allocates nothing once the ring has its size.

use std::collections::VecDeque;

use blockplane_protocol::{DpRank, KvEvent, KvEventData, SequenceHash, StoredBlock, Tier};

/// Events numbered without gaps, from 1; the newest are kept.
#[derive(Debug)]
pub(crate) struct Ring {
    weight_max: usize,
    last_id: u64,
    /// Of the newest events, in order.
    heads: VecDeque<Head>,
    /// What the kept `Stored` events name.
    stored: Stream<StoredBlock>,
    /// What the kept `Removed` events name.
    removed: Stream<SequenceHash>,
    /// Sum of the weights of the kept events; at most `weight_max`.
    weight: usize,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    kind: Kind,
    /// Where its names start in the stream of its kind.
    start: u64,
    count: usize,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Stored {
        parent: Option<SequenceHash>,
        tier: Tier,
    },
    Removed {
        tier: Tier,
    },
    Cleared,
}

/// A queue whose items keep their place number while older ones go.
#[derive(Debug)]
struct Stream<T> {
    items: VecDeque<T>,
    first: u64,
}

impl Ring {
    pub(crate) fn new(weight_max: usize) -> Self {
        Self {
            weight_max,
            last_id: 0,
            heads: VecDeque::new(),
            stored: Stream::default(),
            removed: Stream::default(),
            weight: 0,
        }
    }

    /// Number of the newest event; 0 before the first.
    pub(crate) fn last_id(&self) -> u64 {
        self.last_id
    }

    pub(crate) fn push_stored(
        &mut self,
        parent: Option<SequenceHash>,
        blocks: impl Iterator<Item = StoredBlock>,
        tier: Tier,
    ) {
        let (start, count) = self.stored.extend(blocks);
        self.push(Kind::Stored { parent, tier }, start, count);
    }

    pub(crate) fn push_removed(&mut self, hashes: impl Iterator<Item = SequenceHash>, tier: Tier) {
        let (start, count) = self.removed.extend(hashes);
        self.push(Kind::Removed { tier }, start, count);
    }

    pub(crate) fn push_cleared(&mut self) {
        self.push(Kind::Cleared, 0, 0);
    }

    /// Takes a number that stands for more changes than are told: whoever has not seen it needs a
    /// snapshot.
    pub(crate) fn skip(&mut self) {
        self.last_id += 1;
        self.heads.clear();
        self.stored.clear();
        self.removed.clear();
        self.weight = 0;
    }

    /// Events from number `first` on, at least one and then as many as stay within `weight_max`
    /// names; `None` when that event is not kept (any more, or yet).
    pub(crate) fn batch(
        &self,
        first: u64,
        rank: DpRank,
        weight_max: usize,
    ) -> Option<Vec<KvEvent>> {
        let oldest = self.last_id + 1 - self.heads.len() as u64;
        let skip = usize::try_from(first.checked_sub(oldest)?).ok()?;
        if skip >= self.heads.len() {
            return None;
        }
        let mut weight = 0;
        let batch = (first..)
            .zip(self.heads.range(skip..))
            .take_while(|(id, head)| {
                weight += head.weight();
                *id == first || weight <= weight_max
            })
            .map(|(event_id, head)| KvEvent {
                event_id,
                rank,
                data: self.unpack(head),
            })
            .collect();
        Some(batch)
    }

    fn push(&mut self, kind: Kind, start: u64, count: usize) {
        let head = Head { kind, start, count };
        self.last_id += 1;
        self.heads.push_back(head);
        self.weight += head.weight();
        while self.weight > self.weight_max {
            let oldest = self.heads.pop_front().expect("weight is of kept events");
            self.weight -= oldest.weight();
            match oldest.kind {
                Kind::Stored { .. } => self.stored.forget(oldest.count),
                Kind::Removed { .. } => self.removed.forget(oldest.count),
                Kind::Cleared => {}
            }
        }
    }

    fn unpack(&self, head: &Head) -> KvEventData {
        match head.kind {
            Kind::Stored { parent, tier } => KvEventData::Stored {
                parent,
                blocks: self.stored.get(head.start, head.count),
                tier,
            },
            Kind::Removed { tier } => KvEventData::Removed {
                hashes: self.removed.get(head.start, head.count),
                tier,
            },
            Kind::Cleared => KvEventData::Cleared,
        }
    }
}

impl Head {
    fn weight(&self) -> usize {
        self.count.max(1)
    }
}

impl<T: Copy> Stream<T> {
    /// Where the new items start, and how many they are.
    fn extend(&mut self, items: impl Iterator<Item = T>) -> (u64, usize) {
        let before = self.items.len();
        self.items.extend(items);
        (self.first + before as u64, self.items.len() - before)
    }

    fn clear(&mut self) {
        self.forget(self.items.len());
    }

    fn forget(&mut self, count: usize) {
        self.items.drain(..count);
        self.first += count as u64;
    }

    fn get(&self, start: u64, count: usize) -> Vec<T> {
        let start = usize::try_from(start - self.first).expect("places are within the ring");
        self.items.range(start..start + count).copied().collect()
    }
}

impl<T> Default for Stream<T> {
    fn default() -> Self {
        Self {
            items: VecDeque::new(),
            first: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use blockplane_protocol::BlockHash;

    fn data() -> impl Strategy<Value = KvEventData> {
        let hash = || any::<u64>().prop_map(SequenceHash);
        let block = (any::<u64>(), hash()).prop_map(|(block, sequence)| StoredBlock {
            block: BlockHash(block),
            sequence,
        });
        let tier = Tier::Device;
        prop_oneof![
            (proptest::option::of(hash()), vec(block, 0..6)).prop_map(move |(parent, blocks)| {
                KvEventData::Stored {
                    parent,
                    blocks,
                    tier,
                }
            }),
            vec(hash(), 0..6).prop_map(move |hashes| KvEventData::Removed { hashes, tier }),
            Just(KvEventData::Cleared),
        ]
    }

    fn weight(data: &KvEventData) -> usize {
        match data {
            KvEventData::Stored { blocks, .. } => blocks.len().max(1),
            KvEventData::Removed { hashes, .. } => hashes.len().max(1),
            KvEventData::Cleared => 1,
        }
    }

    proptest! {
        /// Against a plain list of events from which the oldest go while it is too heavy.
        #[test]
        fn it_keeps_the_newest_events_as_they_were(
            events in vec(data(), 0..40), weight_max in 0..20usize, batch_max in 0..9usize,
        ) {
            let rank = DpRank(3);
            let mut ring = Ring::new(weight_max);
            let mut kept: Vec<KvEvent> = Vec::new();
            for (event_id, data) in (1..).zip(events) {
                match &data {
                    KvEventData::Stored { parent, blocks, tier } => {
                        ring.push_stored(*parent, blocks.iter().copied(), *tier);
                    }
                    KvEventData::Removed { hashes, tier } => ring.push_removed(hashes.iter().copied(), *tier),
                    KvEventData::Cleared => ring.push_cleared(),
                }
                kept.push(KvEvent { event_id, rank, data });
                while kept.iter().map(|event| weight(&event.data)).sum::<usize>() > weight_max {
                    kept.remove(0);
                }
                prop_assert_eq!(ring.last_id(), event_id);
                for first in 0..event_id + 2 {
                    let at = kept.iter().position(|event| event.event_id == first);
                    let expected = at.map(|at| {
                        let mut sum = 0;
                        let within = |event: &&KvEvent| {
                            sum += weight(&event.data);
                            event.event_id == first || sum <= batch_max
                        };
                        kept[at..].iter().take_while(within).cloned().collect::<Vec<_>>()
                    });
                    prop_assert_eq!(ring.batch(first, rank, batch_max), expected);
                }
            }
        }
    }
}
