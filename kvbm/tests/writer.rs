//! Events of blocks that no pool holds.

use std::collections::BTreeSet;

use blockplane_kvbm::{EventSubscription, EventWriter, KvBatch};
use blockplane_protocol::{BlockHash, DpRank, KvEventData, SequenceHash, StoredBlock, Tier};
use proptest::{collection::vec, prelude::*};

const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];

fn chain(names: &[u64]) -> Vec<StoredBlock> {
    let block = |&name: &u64| StoredBlock {
        block: BlockHash(name + 1_000),
        sequence: SequenceHash(name),
    };
    names.iter().map(block).collect()
}

/// What a subscriber knows.
#[derive(Debug, Default, PartialEq)]
struct Known {
    blocks: BTreeSet<(u64, Tier)>,
    last: u64,
}

impl Known {
    /// Follows to the end of what there is; returns how many snapshots that took.
    fn follow(&mut self, subscription: &mut EventSubscription) -> usize {
        let mut snapshots = 0;
        while let Ok(Some(batch)) = subscription.try_recv() {
            match batch {
                KvBatch::Snapshot(snapshot) => {
                    snapshots += 1;
                    let entries = snapshot.blocks.iter();
                    self.blocks = entries
                        .map(|entry| (entry.block.sequence.0, entry.tier))
                        .collect();
                    assert_eq!(self.blocks.len(), snapshot.blocks.len(), "told once");
                    self.last = snapshot.last_event_id;
                }
                KvBatch::Events(events) => {
                    for event in events {
                        self.last += 1;
                        assert_eq!(event.event_id, self.last, "numbers have no gap");
                        self.apply(event.data);
                    }
                }
            }
        }
        snapshots
    }

    fn apply(&mut self, data: KvEventData) {
        match data {
            KvEventData::Stored { blocks, tier, .. } => {
                for block in blocks {
                    let new = self.blocks.insert((block.sequence.0, tier));
                    assert!(new, "stored once");
                }
            }
            KvEventData::Removed { hashes, tier } => {
                for hash in hashes {
                    let was = self.blocks.remove(&(hash.0, tier));
                    assert!(was, "removed from the tier it was announced in");
                }
            }
            KvEventData::Cleared => self.blocks.clear(),
        }
    }
}

#[test]
fn known_blocks_are_not_told_again_and_runs_keep_their_parents() {
    let mut writer = EventWriter::new(DpRank(2), 100);
    let mut subscription = writer.feed().subscribe(Some(0));
    writer.stored(None, &chain(&[1, 2]), Tier::Device);
    writer.stored(None, &chain(&[1, 2, 3, 4]), Tier::Device);
    writer.removed(&[SequenceHash(9), SequenceHash(2)], Tier::Device);
    writer.removed(&[SequenceHash(1)], Tier::Host);
    let Ok(Some(KvBatch::Events(events))) = subscription.try_recv() else {
        panic!("events from the first on are kept");
    };
    let stored = |parent: Option<u64>, names: &[u64]| KvEventData::Stored {
        parent: parent.map(SequenceHash),
        blocks: chain(names),
        tier: Tier::Device,
    };
    let removed = KvEventData::Removed {
        hashes: vec![SequenceHash(2)],
        tier: Tier::Device,
    };
    let told: Vec<KvEventData> = events.into_iter().map(|event| event.data).collect();
    assert_eq!(
        told,
        [stored(None, &[1, 2]), stored(Some(2), &[3, 4]), removed]
    );
    assert_eq!(writer.blocks(), 3);
}

#[test]
fn a_snapshot_has_parents_first_and_the_end_of_the_writer_is_the_end_of_the_feed() {
    let mut writer = EventWriter::new(DpRank(0), 100);
    let feed = writer.feed();
    writer.stored(None, &chain(&[7, 3, 9]), Tier::Device);
    writer.stored(Some(SequenceHash(7)), &chain(&[3]), Tier::Host);
    let mut subscription = feed.subscribe(None);
    let Ok(Some(KvBatch::Snapshot(snapshot))) = subscription.try_recv() else {
        panic!("whoever names no event gets a snapshot");
    };
    let place = |name: u64| {
        let mut entries = snapshot.blocks.iter();
        entries
            .position(|entry| entry.block.sequence.0 == name)
            .unwrap()
    };
    assert!(place(7) < place(3) && place(3) < place(9), "{snapshot:?}");
    assert_eq!(snapshot.blocks.len(), 4);
    assert_eq!(snapshot.blocks[place(3)].parent, Some(SequenceHash(7)));
    assert_eq!(snapshot.blocks[place(7)].parent, None);
    drop(writer);
    assert_eq!(subscription.try_recv(), Ok(None));
}

#[test]
fn more_blocks_than_one_event_may_name_are_several_events() {
    let mut writer = EventWriter::new(DpRank(0), 100_000);
    let mut subscription = writer.feed().subscribe(Some(0));
    let names: Vec<u64> = (1..=10_000).collect();
    writer.stored(None, &chain(&names), Tier::Device);
    let mut known = Known::default();
    assert_eq!(known.follow(&mut subscription), 0);
    assert_eq!((known.blocks.len(), known.last), (10_000, 3));
    let names: Vec<SequenceHash> = names.into_iter().map(SequenceHash).collect();
    writer.removed(&names, Tier::Device);
    known.follow(&mut subscription);
    assert_eq!((known.blocks.len(), known.last), (0, 6));
}

#[derive(Clone, Debug)]
enum Step {
    Stored(Vec<u64>, Tier),
    Removed(Vec<u64>, Tier),
    Cleared,
    Follow,
}

fn step() -> impl Strategy<Value = Step> {
    let tier = || proptest::sample::select(&TIERS);
    let names = || vec(0..12_u64, 0..6);
    prop_oneof![
        4 => (names(), tier()).prop_map(|(names, tier)| Step::Stored(names, tier)),
        3 => (names(), tier()).prop_map(|(names, tier)| Step::Removed(names, tier)),
        1 => Just(Step::Cleared),
        2 => Just(Step::Follow),
    ]
}

proptest! {
    /// Against a plain set, for a subscriber that is quick, one that sometimes comes too late for
    /// the ring, and one that comes at the end.
    #[test]
    fn all_subscribers_know_what_was_told(steps in vec(step(), 0..60), events_max in 0..12_usize) {
        let mut writer = EventWriter::new(DpRank(0), events_max);
        let (mut quick, mut slow) = (Known::default(), Known::default());
        let mut quick_feed = writer.feed().subscribe(Some(0));
        let mut slow_feed = writer.feed().subscribe(Some(0));
        let mut truth = BTreeSet::new();
        for step in steps {
            match step {
                Step::Stored(names, tier) => {
                    writer.stored(None, &chain(&names), tier);
                    truth.extend(names.into_iter().map(|name| (name, tier)));
                }
                Step::Removed(names, tier) => {
                    let hashes: Vec<SequenceHash> = names.iter().copied().map(SequenceHash).collect();
                    writer.removed(&hashes, tier);
                    truth.retain(|(name, held)| *held != tier || !names.contains(name));
                }
                Step::Cleared => {
                    writer.cleared();
                    truth.clear();
                }
                Step::Follow => {
                    slow.follow(&mut slow_feed);
                    prop_assert_eq!(&slow.blocks, &truth);
                }
            }
            quick.follow(&mut quick_feed);
            prop_assert_eq!(&quick.blocks, &truth);
        }
        let mut late = Known::default();
        late.follow(&mut writer.feed().subscribe(None));
        prop_assert_eq!(&late, &quick);
        let distinct: BTreeSet<u64> = truth.iter().map(|(name, _)| *name).collect();
        prop_assert_eq!(writer.blocks(), distinct.len());
    }
}
