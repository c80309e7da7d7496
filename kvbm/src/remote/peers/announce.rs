//! Telling a peer what is in G2, and following what a peer tells: state machines without I/O.
//!
//! One batch of changes is under way at a time and is repeated until the other side says that it has it.
//! So a slow peer costs nothing, and what the event ring has forgotten meanwhile comes as a
//! snapshot.

use std::{
    collections::{BTreeMap, HashSet},
    hash::BuildHasherDefault,
    time::Duration,
};

use blockplane_protocol::{KvEventData, SequenceHash};

use super::codec::{NAMES_MAX, Part, Position};
use crate::{events::KvBatch, pool::HashIsUniform};

/// First and longest time until a part is repeated.
const REPEAT: Duration = Duration::from_millis(200);
const REPEAT_MAX: Duration = Duration::from_secs(5);

/// What one peer has been told.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// The last change that the peer has; none before the first snapshot.
    position: Option<u64>,
    batch: Option<Batch>,
}

#[derive(Debug)]
struct Batch {
    parts: Vec<Part>,
    /// The part that is under way.
    next: usize,
    repeat_at: Duration,
    pause: Duration,
}

impl Outbox {
    /// After which change a new batch has to begin; none while there is one under way.
    pub(super) fn wants(&self) -> Option<Option<u64>> {
        self.batch.is_none().then_some(self.position)
    }

    /// Begins a batch: the part to send. At most `names_max` names of a snapshot are told.
    pub(super) fn begin(
        &mut self,
        now: Duration,
        batch: KvBatch,
        names_max: usize,
    ) -> Option<Part> {
        self.batch = Some(Batch {
            parts: self.parts(batch, names_max)?,
            next: 0,
            repeat_at: now + REPEAT,
            pause: REPEAT,
        });
        self.under_way().cloned()
    }

    /// What the peer has when the batch under way is done.
    pub(super) fn target(&self) -> Option<u64> {
        let last = |batch: &Batch| batch.parts.first().map(|part| part.last);
        self.batch.as_ref().map_or(self.position, last)
    }

    /// The peer says what it has: the part to send now, if any.
    pub(super) fn have(&mut self, now: Duration, position: Position) -> Option<Part> {
        let Some(batch) = &mut self.batch else {
            if position == Position::Unknown {
                self.position = None;
            }
            return None;
        };
        let first = batch.parts.first()?;
        let (before, last) = (first.before, first.last);
        match position {
            Position::At(at) if at == last => {
                self.position = Some(last);
                self.batch = None;
            }
            Position::Within {
                before: its,
                last: of,
                next,
            } if its == before && of == last => {
                let next = next as usize;
                // Backwards if it has lost what it had.
                if next != batch.next && next < batch.parts.len() {
                    batch.next = next;
                    batch.pause = REPEAT;
                    batch.repeat_at = now + REPEAT;
                    return self.under_way().cloned();
                }
            }
            Position::Unknown if before.is_some() || batch.next > 0 => *self = Self::default(),
            // Late, or repeated.
            Position::At(_) | Position::Within { .. } | Position::Unknown => {}
        }
        None
    }

    /// The part to repeat, if it is time.
    pub(super) fn tick(&mut self, now: Duration) -> Option<Part> {
        let batch = self.batch.as_mut()?;
        if now < batch.repeat_at {
            return None;
        }
        batch.pause = (batch.pause * 2).min(REPEAT_MAX);
        batch.repeat_at = now + batch.pause;
        self.under_way().cloned()
    }

    /// When to call [`Outbox::tick`].
    pub(super) fn next_at(&self) -> Option<Duration> {
        self.batch.as_ref().map(|batch| batch.repeat_at)
    }

    fn under_way(&self) -> Option<&Part> {
        let batch = self.batch.as_ref()?;
        batch.parts.get(batch.next)
    }

    /// Cuts a batch; none when it cannot be told as changes: then a snapshot is next.
    fn parts(&mut self, batch: KvBatch, names_max: usize) -> Option<Vec<Part>> {
        let (before, last, stored, removed) = match batch {
            KvBatch::Snapshot(snapshot) => {
                let names = snapshot.blocks.iter().map(|block| block.block.sequence);
                // In an order of their own: two snapshots of one moment have the same parts.
                let mut names: Vec<SequenceHash> = names.collect();
                names.sort_unstable();
                names.dedup();
                names.truncate(names_max);
                (None, snapshot.last_event_id, names, Vec::new())
            }
            KvBatch::Events(events) => {
                let last = events.last()?.event_id;
                let mut here = BTreeMap::new();
                for event in &events {
                    match &event.data {
                        KvEventData::Stored { blocks, .. } => {
                            here.extend(blocks.iter().map(|block| (block.sequence, true)));
                        }
                        KvEventData::Removed { hashes, .. } => {
                            here.extend(hashes.iter().map(|hash| (*hash, false)));
                        }
                        KvEventData::Cleared => {
                            self.position = None;
                            return None;
                        }
                    }
                }
                let of = |wanted: bool| {
                    let all = here.iter().filter(move |(_, here)| **here == wanted);
                    all.map(|(name, _)| *name).collect::<Vec<_>>()
                };
                (self.position, last, of(true), of(false))
            }
        };
        let count = (stored.len() + removed.len()).div_ceil(NAMES_MAX).max(1);
        let parts = u32::try_from(count).ok()?;
        let (mut stored, mut removed) = (stored.into_iter(), removed.into_iter());
        let cut = |part| {
            let here: Vec<SequenceHash> = stored.by_ref().take(NAMES_MAX).collect();
            let gone = removed.by_ref().take(NAMES_MAX - here.len()).collect();
            Part {
                before,
                last,
                part,
                parts,
                stored: here,
                removed: gone,
            }
        };
        Some((0..parts).map(cut).collect())
    }
}

/// What one peer has told.
#[derive(Debug)]
pub(super) struct Inbox {
    position: Position,
    names: HashSet<SequenceHash, BuildHasherDefault<HashIsUniform>>,
    names_max: usize,
}

impl Inbox {
    pub(super) fn new(names_max: usize) -> Self {
        Self {
            position: Position::Unknown,
            names: HashSet::default(),
            names_max,
        }
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn contains(&self, name: SequenceHash) -> bool {
        self.names.contains(&name)
    }

    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = SequenceHash> {
        self.names.iter().copied()
    }

    /// It turned out not to be there.
    pub(super) fn forget(&mut self, name: SequenceHash) {
        self.names.remove(&name);
    }

    /// Takes a part if it is the next one; what to answer.
    pub(super) fn take(&mut self, part: &Part) -> Position {
        if part.part > 0 {
            let next = Position::Within {
                before: part.before,
                last: part.last,
                next: part.part,
            };
            if self.position == next {
                self.apply(part);
            }
            return self.position;
        }
        // The newest change that is here or on its way.
        let (newest, within) = match self.position {
            Position::Unknown => (None, false),
            Position::At(last) => (Some(last), false),
            Position::Within { last, .. } => (Some(last), true),
        };
        match part.before {
            None => {
                let repeated = match self.position {
                    Position::Unknown => false,
                    Position::At(last) => last >= part.last,
                    Position::Within { before, last, .. } => {
                        last > part.last || (last == part.last && before.is_none())
                    }
                };
                if !repeated {
                    self.names = HashSet::default();
                    self.apply(part);
                }
            }
            Some(before) if self.position == Position::At(before) => self.apply(part),
            // Repeated.
            Some(_) if newest.is_some_and(|newest| newest >= part.last) => {}
            // A batch was never finished, or one is missing.
            Some(_) if newest.is_some() || within => self.position = Position::Unknown,
            Some(_) => {}
        }
        self.position
    }

    fn apply(&mut self, part: &Part) {
        for name in &part.removed {
            self.names.remove(name);
        }
        for name in &part.stored {
            if self.names.len() >= self.names_max {
                break;
            }
            self.names.insert(*name);
        }
        let next = part.part + 1;
        self.position = if next == part.parts {
            Position::At(part.last)
        } else {
            Position::Within {
                before: part.before,
                last: part.last,
                next,
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use blockplane_protocol::{BlockHash, DpRank, KvEvent, SnapshotBlock, StoredBlock, Tier};

    use super::*;
    use crate::events::KvSnapshot;

    fn random(state: &mut u64) -> u64 {
        *state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (*state >> 33) ^ (*state >> 17)
    }

    fn stored(name: u64) -> StoredBlock {
        StoredBlock {
            block: BlockHash(name),
            sequence: SequenceHash(name),
        }
    }

    /// A G2 with the events that it keeps.
    #[derive(Default)]
    struct Source {
        names: BTreeSet<u64>,
        events: Vec<KvEvent>,
        forgotten: u64,
    }

    impl Source {
        fn last(&self) -> u64 {
            self.forgotten + self.events.len() as u64
        }

        fn change(&mut self, name: u64, many: u64) {
            let tier = Tier::Host;
            let data = if self.names.contains(&name) {
                self.names.remove(&name);
                KvEventData::Removed {
                    hashes: vec![SequenceHash(name)],
                    tier,
                }
            } else {
                let new: Vec<u64> = (name..=name + many)
                    .filter(|name| self.names.insert(*name))
                    .collect();
                KvEventData::Stored {
                    parent: None,
                    blocks: new.into_iter().map(stored).collect(),
                    tier,
                }
            };
            self.events.push(KvEvent {
                event_id: self.last() + 1,
                rank: DpRank(0),
                data,
            });
        }

        fn batch(&self, after: Option<u64>) -> Option<KvBatch> {
            match after {
                Some(after) if after == self.last() => None,
                Some(after) if after >= self.forgotten && after < self.last() => {
                    let events = self.events.iter();
                    let new = events.filter(|event| event.event_id > after).take(3);
                    Some(KvBatch::Events(new.cloned().collect()))
                }
                _ => Some(KvBatch::Snapshot(KvSnapshot {
                    last_event_id: self.last(),
                    blocks: self
                        .names
                        .iter()
                        .map(|name| SnapshotBlock {
                            parent: None,
                            block: stored(*name),
                            tier: Tier::Host,
                        })
                        .collect(),
                })),
            }
        }
    }

    /// Lost, repeated and late messages both ways; followers that forget everything. In the end both
    /// sides know the same.
    #[test]
    fn followers_catch_up_over_bad_links() {
        for seed in 1..200_u64 {
            let mut state = seed;
            let mut dice = |sides: u64| random(&mut state) % sides;
            let mut source = Source::default();
            let (mut outbox, mut inbox) = (Outbox::default(), Inbox::new(1 << 20));
            let mut there: Vec<Part> = Vec::new();
            let mut back: Vec<Position> = Vec::new();
            let mut now = Duration::ZERO;
            for turn in 0..3000 {
                let calm = turn > 2000;
                now += Duration::from_millis(if calm { 6000 } else { 60 });
                if !calm && dice(3) == 0 {
                    let many = if dice(40) == 0 { 20_000 } else { dice(4) };
                    source.change(dice(30_000), many);
                }
                if !calm && dice(60) == 0 {
                    source.forgotten = source.last();
                    source.events.clear();
                }
                if !calm && dice(200) == 0 {
                    inbox = Inbox::new(1 << 20);
                }
                let mut out = Vec::new();
                if let Some(after) = outbox.wants()
                    && let Some(batch) = source.batch(after)
                {
                    out.extend(outbox.begin(now, batch, 1 << 20));
                }
                out.extend(outbox.tick(now));
                for part in out {
                    for _ in 0..if calm { 1 } else { dice(3) } {
                        there.push(part.clone());
                    }
                }
                if !there.is_empty() {
                    let at = if calm {
                        0
                    } else {
                        usize::try_from(dice(there.len() as u64)).unwrap()
                    };
                    let answer = inbox.take(&there.remove(at));
                    for _ in 0..if calm { 1 } else { dice(3) } {
                        back.push(answer);
                    }
                }
                if !back.is_empty() {
                    let at = if calm {
                        0
                    } else {
                        usize::try_from(dice(back.len() as u64)).unwrap()
                    };
                    there.extend(outbox.have(now, back.remove(at)));
                }
            }
            // Something happens at last, so that a gap at the end is noticed.
            source.change(40_000, 0);
            for _ in 0..1000 {
                now += Duration::from_secs(6);
                let mut out = Vec::from_iter(outbox.tick(now));
                if let Some(after) = outbox.wants()
                    && let Some(batch) = source.batch(after)
                {
                    out.extend(outbox.begin(now, batch, 1 << 20));
                }
                while let Some(part) = out.pop() {
                    out.extend(outbox.have(now, inbox.take(&part)));
                }
            }
            assert_eq!(inbox.position, Position::At(source.last()), "seed {seed}");
            let found: BTreeSet<u64> = inbox.names.iter().map(|name| name.0).collect();
            assert!(found == source.names, "seed {seed}");
            assert_eq!(outbox.next_at(), None, "seed {seed}: nothing is repeated");
        }
    }

    #[test]
    fn what_a_peer_tells_is_bounded() {
        let mut inbox = Inbox::new(3);
        let mut part = Part {
            before: None,
            last: 1,
            part: 0,
            parts: 1,
            stored: (0..10).map(SequenceHash).collect(),
            removed: Vec::new(),
        };
        assert_eq!(inbox.take(&part), Position::At(1));
        assert_eq!(inbox.len(), 3);
        part.before = Some(1);
        part.last = 2;
        part.removed = vec![SequenceHash(0)];
        assert_eq!(inbox.take(&part), Position::At(2));
        assert_eq!(inbox.len(), 3);
        inbox.forget(SequenceHash(1));
        assert!(!inbox.contains(SequenceHash(1)));
    }
}
