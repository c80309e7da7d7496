//! Crash tests: lives of a store on a disk that misbehaves, each ended at a bad moment.
//!
//! What is checked: a store always opens; a read either delivers the bytes of that name or says that
//! it does not; what was acknowledged and flushed is found. The long mode plays 10,000 seeds:
//! `cargo test --release -p blockplane-kvbm --lib crash -- --ignored`.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    time::{Duration, Instant},
};

use blockplane_protocol::{BlockHash, SequenceHash, TokenBlock};
use blockplane_transfer::{ArenaConfig, BlockLayout, Registration};

use super::{
    BlockOutcome, How, Invalid, RecoveredSlot, SlotRead, SlotStore, SlotWrite, StoreHealth,
    StoreMemory,
    disk::{Disk, DiskErrorKind},
    format::Geometry,
    recover::{self, Plan, Wanted},
    sim::{AGENT, End, Failure, Random, SECTOR, SimDisk},
};
use crate::fingerprint::Fingerprint;

const FINGERPRINT: Fingerprint = Fingerprint {
    model: 1,
    layout: 2,
    block_tokens: 16,
    tp_rank: 0,
    tp_size: 1,
    encoding: 1,
};
const TIME: Duration = Duration::from_secs(10);
/// Blocks of the memory.
const BLOCKS: u32 = 40;

fn soon() -> Instant {
    Instant::now() + TIME
}

fn name(key: u64) -> TokenBlock {
    TokenBlock {
        block: BlockHash(key ^ 0xffff),
        sequence: SequenceHash(key),
    }
}

/// Opens what is on a disk.
fn open(disk: &SimDisk, geometry: Geometry, id: u64) -> (SlotStore, Vec<RecoveredSlot>) {
    let path = Path::new("sim");
    let wanted = Wanted {
        fingerprint: FINGERPRINT,
        geometry,
        owned: true,
    };
    let plan = recover::plan(disk, path, &wanted, TIME).unwrap();
    let how = How {
        plan,
        geometry: match plan {
            Plan::Fresh { .. } => geometry,
            Plan::Reopen(superblock) => superblock.geometry,
        },
        slots: geometry.slots,
        fingerprint: FINGERPRINT,
        id,
        now: 1,
        read_only: false,
        time: TIME,
    };
    SlotStore::on(Box::new(disk.clone()), None, path, &how).unwrap()
}

struct Memory {
    registration: Registration,
    layout: BlockLayout,
}

impl Memory {
    fn new(block_bytes: u64) -> Self {
        let bytes = usize::try_from(block_bytes * u64::from(BLOCKS)).unwrap();
        Self {
            registration: AGENT.allocate(ArenaConfig::new(bytes, "blocks")).unwrap(),
            layout: BlockLayout::contiguous(BLOCKS, block_bytes),
        }
    }

    fn store(&self) -> StoreMemory<'_> {
        StoreMemory {
            registration: &self.registration,
            layout: self.layout,
        }
    }

    fn put(&self, block: u32, bytes: &[u8]) {
        let at = self.layout.run_offset(block, 0).unwrap();
        self.registration.write_at(at, bytes).unwrap();
    }

    fn get(&self, block: u32) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.layout.run_bytes).unwrap()];
        let at = self.layout.run_offset(block, 0).unwrap();
        self.registration.read_at(at, &mut bytes).unwrap();
        bytes
    }

    fn contents(&self, key: u64) -> Vec<u8> {
        let mut random = Random(key);
        let words = self.layout.run_bytes.div_ceil(8);
        let mut bytes: Vec<u8> = (0..words)
            .flat_map(|_| random.next().to_le_bytes())
            .collect();
        bytes.truncate(usize::try_from(self.layout.run_bytes).unwrap());
        bytes
    }
}

/// What the disk does to one life of the store.
#[derive(Clone, Copy, Debug, Default)]
struct Trouble {
    failure: Option<Failure>,
    crash: Option<u64>,
}

/// What must be there.
#[derive(Clone, Debug, Default)]
struct Ledger {
    /// Acknowledged and not touched since: key and age of each slot.
    acknowledged: BTreeMap<u32, (u64, u64)>,
    /// Those of them that a flush has followed.
    flushed: BTreeMap<u32, (u64, u64)>,
    age: u64,
}

/// One scene: a disk, and what is known of it.
struct Scene {
    geometry: Geometry,
    memory: Memory,
    random: Random,
    image: Vec<u8>,
    ledger: Ledger,
    seed: u64,
    /// Bits of it were turned.
    spoilt: bool,
    /// Writes were forgotten: the intents of what is half written may be.
    lost_power: bool,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let block_bytes = [4096, 1000, 12_288, 8192 + 512][random.index(4)];
        let slots = u32::try_from(1 + random.below(80)).unwrap();
        let geometry = Geometry::new(slots, block_bytes).unwrap();
        let length = usize::try_from(geometry.length(slots)).unwrap();
        Self {
            geometry,
            memory: Memory::new(block_bytes),
            random,
            image: vec![0; length],
            ledger: Ledger::default(),
            seed,
            spoilt: false,
            lost_power: false,
        }
    }

    /// One life: opens, works, and ends as `end` says. Writes done by the disk.
    fn live(&mut self, trouble: Trouble, end: End, operations: usize) -> u64 {
        let disk = SimDisk::new(std::mem::take(&mut self.image), self.random.next());
        let (store, recovered) = open(&disk, self.geometry, self.seed);
        self.check(&store, &recovered);
        // Counted from here: opening is tried by lives that begin again at once.
        disk.change(|state| {
            state.failure = trouble.failure.map(|failure| Failure {
                write: failure.write + state.writes,
                ..failure
            });
            state.crash = trouble.crash.map(|crash| crash + state.writes);
        });
        let before = disk.change(|state| state.writes);
        for _ in 0..operations {
            match self.random.below(10) {
                0 => self.flush(&store),
                1..4 => self.read(&store),
                _ => self.write(&store),
            }
        }
        if self.random.chance(4) && store.close(soon()).is_ok() {
            self.ledger.flushed = self.ledger.acknowledged.clone();
        }
        drop(store);
        self.image = disk.after(end);
        if end == End::PowerLoss {
            self.lost_power = true;
            self.ledger.acknowledged = self.ledger.flushed.clone();
        } else {
            self.ledger.flushed = self.ledger.acknowledged.clone();
        }
        disk.change(|state| state.writes) - before
    }

    fn write(&mut self, store: &SlotStore) {
        let count = 1 + self.random.index(6);
        let mut batch: Vec<SlotWrite> = Vec::new();
        for block in 0..u32::try_from(count).unwrap() {
            let slot = u32::try_from(self.random.below(self.geometry.slots.into())).unwrap();
            if batch.iter().any(|other| other.slot == slot) {
                continue;
            }
            let key = 1 + self.random.below(60);
            self.memory.put(block, &self.memory.contents(key));
            batch.push(SlotWrite {
                slot,
                block,
                name: name(key),
                parent: (key > 1).then(|| SequenceHash(key - 1)),
            });
            self.ledger.acknowledged.remove(&slot);
            self.ledger.flushed.remove(&slot);
        }
        let report = store.write(&self.memory.store(), &batch, soon());
        assert!(report.pending.is_none());
        for (write, outcome) in batch.iter().zip(report.outcomes) {
            self.ledger.age += 1;
            if outcome == BlockOutcome::Moved {
                let entry = (write.name.sequence.0, self.ledger.age);
                self.ledger.acknowledged.insert(write.slot, entry);
            }
        }
    }

    fn read(&mut self, store: &SlotStore) {
        let known: Vec<(u32, u64)> = self
            .ledger
            .acknowledged
            .iter()
            .map(|(&slot, &(key, _))| (slot, key))
            .collect();
        if known.is_empty() {
            return;
        }
        let (slot, key) = known[self.random.index(known.len())];
        let outcome = self.read_one(store, slot, key);
        if matches!(store.health(), StoreHealth::On | StoreHealth::Shrunk { .. }) && !self.spoilt {
            // A crashed disk answers nothing any more.
            let fine = matches!(outcome, BlockOutcome::Moved | BlockOutcome::Failed(_));
            assert!(fine, "seed {}: slot {slot}: {outcome:?}", self.seed);
        }
    }

    /// Reads, and compares every byte of what is delivered.
    fn read_one(&self, store: &SlotStore, slot: u32, key: u64) -> BlockOutcome {
        let block = BLOCKS - 1;
        self.memory
            .put(block, &vec![0xa5; self.memory.get(block).len()]);
        let wanted = SlotRead {
            slot,
            block,
            name: name(key),
        };
        let mut report = store.read(&self.memory.store(), &[wanted], soon());
        let outcome = report.outcomes.remove(0);
        if outcome == BlockOutcome::Moved {
            let same = self.memory.get(block) == self.memory.contents(key);
            assert!(same, "seed {}: wrong bytes from slot {slot}", self.seed);
        }
        outcome
    }

    fn flush(&mut self, store: &SlotStore) {
        if store.flush(soon()).is_ok() {
            self.ledger.flushed = self.ledger.acknowledged.clone();
        }
    }

    /// Everything that must be there is there, and everything that is there is right.
    fn check(&mut self, store: &SlotStore, recovered: &[RecoveredSlot]) {
        let seed = self.seed;
        let mut places = HashMap::new();
        for (order, found) in recovered.iter().enumerate() {
            let twice = places.insert(found.name.sequence.0, (order, found.slot));
            assert_eq!(twice, None, "seed {seed}: one name in two slots");
        }
        for (order, found) in recovered.iter().enumerate() {
            if let Some((parent, _)) = found.parent.and_then(|parent| places.get(&parent.0)) {
                assert!(*parent < order, "seed {seed}: a child before its parent");
            }
        }
        if !self.spoilt {
            let mut newest: HashMap<u64, (u64, u32)> = HashMap::new();
            for (&slot, &(key, age)) in &self.ledger.acknowledged {
                let entry = newest.entry(key).or_insert((age, slot));
                *entry = (*entry).max((age, slot));
            }
            for (key, (_, slot)) in newest {
                let Some((_, found)) = places.get(&key) else {
                    panic!("seed {seed}: key {key} of slot {slot} is lost");
                };
                // One whose write was reported as failed may be newer still.
                let owed = self.ledger.acknowledged.get(found);
                let older = owed.is_some_and(|&(other, _)| other == key) && *found != slot;
                assert!(
                    !older,
                    "seed {seed}: slot {found} instead of the newer {slot}"
                );
            }
        }
        for found in recovered {
            let key = found.name.sequence.0;
            let outcome = self.read_one(store, found.slot, key);
            let owed = self
                .ledger
                .acknowledged
                .get(&found.slot)
                .map(|&(key, _)| key)
                == Some(key);
            match outcome {
                BlockOutcome::Moved => {}
                BlockOutcome::Invalid(Invalid::Checksum)
                    if self.spoilt || self.lost_power && !owed =>
                {
                    let again = self.read_one(store, found.slot, key);
                    assert_eq!(
                        again,
                        BlockOutcome::Invalid(Invalid::Missing),
                        "seed {seed}"
                    );
                }
                outcome => panic!("seed {seed}: slot {} owed {owed}: {outcome:?}", found.slot),
            }
        }
        // A slot may have got an older block of another name back, but never one that is owed.
        self.ledger.acknowledged.retain(|slot, (key, _)| {
            recovered
                .iter()
                .any(|found| found.slot == *slot && found.name.sequence.0 == *key)
        });
        self.ledger.flushed = self.ledger.acknowledged.clone();
    }

    fn spoil(&mut self) {
        self.spoilt = true;
        for _ in 0..=self.random.index(40) {
            // Where there is something: superblocks, headers, payload.
            let region = match self.random.below(4) {
                0 => 0..2 * 4096,
                1 => {
                    usize::try_from(Geometry::HEADERS).unwrap()
                        ..usize::try_from(Geometry::HEADERS).unwrap() + 3 * 4096
                }
                2 => usize::try_from(self.geometry.payload).unwrap()..self.image.len(),
                _ => 0..self.image.len(),
            };
            let at = region.start + self.random.index(region.len());
            if self.random.chance(4) {
                let sector = at / SECTOR * SECTOR;
                let end = (sector + SECTOR).min(self.image.len());
                let fill = if self.random.chance(2) { 0 } else { 0xff };
                self.image[sector..end].fill(fill);
            } else {
                self.image[at] ^= 1 << self.random.below(8);
            }
        }
    }
}

/// Some lives of one store, each with trouble of its own.
fn play(seed: u64) {
    let mut scene = Scene::new(seed);
    for _ in 0..3 + scene.random.index(3) {
        let kinds = [
            DiskErrorKind::Full,
            DiskErrorKind::Media,
            DiskErrorKind::ReadOnly,
            DiskErrorKind::TimedOut,
            DiskErrorKind::Other,
        ];
        let mut trouble = Trouble::default();
        if scene.random.chance(2) {
            trouble.crash = Some(scene.random.below(120));
        }
        if scene.random.chance(3) {
            trouble.failure = Some(Failure {
                write: scene.random.below(60),
                kind: kinds[scene.random.index(kinds.len())],
                for_good: scene.random.chance(3),
            });
        }
        let end = match scene.random.chance(2) {
            true => End::PowerLoss,
            false => End::Kill,
        };
        let operations = 2 + scene.random.index(20);
        scene.live(trouble, end, operations);
        if scene.random.chance(6) {
            scene.spoil();
        }
    }
    scene.live(Trouble::default(), End::Kill, 0);
}

#[test]
fn a_few_hundred_lives_full_of_trouble() {
    (0..400).for_each(play);
}

#[test]
#[ignore = "the long mode: 10,000 seeds"]
fn ten_thousand_lives_full_of_trouble() {
    (0..10_000).for_each(play);
}

/// The same short life, stopped in each of its writes in turn.
#[test]
fn every_write_is_a_good_moment_to_die() {
    for end in [End::Kill, End::PowerLoss] {
        for seed in 0..4 {
            let writes = Scene::new(seed).live(Trouble::default(), End::Kill, 12);
            assert!(writes > 10, "{writes}");
            for crash in 0..writes {
                let mut scene = Scene::new(seed);
                let trouble = Trouble {
                    crash: Some(crash),
                    failure: None,
                };
                scene.live(trouble, end, 12);
                scene.live(Trouble::default(), End::Kill, 4);
                scene.live(Trouble::default(), End::Kill, 0);
            }
        }
    }
}

/// The same short life, one of its writes failing, or all from there on.
#[test]
fn every_write_may_fail() {
    for kind in [
        DiskErrorKind::Full,
        DiskErrorKind::Media,
        DiskErrorKind::ReadOnly,
    ] {
        for for_good in [false, true] {
            let seed = 11;
            let writes = Scene::new(seed).live(Trouble::default(), End::Kill, 12);
            for write in 0..writes {
                let mut scene = Scene::new(seed);
                let failure = Some(Failure {
                    write,
                    kind,
                    for_good,
                });
                let trouble = Trouble {
                    failure,
                    crash: None,
                };
                scene.live(trouble, End::Kill, 12);
                scene.live(Trouble::default(), End::Kill, 0);
            }
        }
    }
}

#[test]
fn failures_show_in_health_and_reading_goes_on() {
    let geometry = Geometry::new(64, 4096).unwrap();
    let memory = Memory::new(4096);
    let length = usize::try_from(geometry.length(64)).unwrap();
    let write = |store: &SlotStore, slot: u32| {
        memory.put(0, &memory.contents(slot.into()));
        let write = SlotWrite {
            slot,
            block: 0,
            name: name(slot.into()),
            parent: None,
        };
        let mut report = store.write(&memory.store(), &[write], soon());
        report.outcomes.remove(0)
    };
    let read = |store: &SlotStore, slot: u32| {
        let read = SlotRead {
            slot,
            block: 1,
            name: name(slot.into()),
        };
        store
            .read(&memory.store(), &[read], soon())
            .outcomes
            .remove(0)
    };
    let fail = |disk: &SimDisk, kind| {
        disk.change(|state| {
            state.failure = Some(Failure {
                write: state.writes,
                kind,
                for_good: true,
            });
        });
    };
    for (kind, writes_until_off) in [
        (DiskErrorKind::ReadOnly, Some(1)),
        (DiskErrorKind::Media, Some(8)),
        (DiskErrorKind::Full, None),
    ] {
        let disk = SimDisk::new(vec![0; length], 1);
        let (store, _) = open(&disk, geometry, 1);
        assert_eq!(write(&store, 1), BlockOutcome::Moved);
        assert_eq!(store.health(), StoreHealth::On);
        fail(&disk, kind);
        for slot in 2..2 + writes_until_off.unwrap_or(10) {
            let outcome = write(&store, slot);
            let gone = matches!(outcome, BlockOutcome::Bad(_));
            assert_eq!(
                gone,
                kind != DiskErrorKind::ReadOnly,
                "{kind:?}: {outcome:?}"
            );
        }
        match (store.health(), writes_until_off) {
            (StoreHealth::ReadOnly { .. }, Some(_)) => {}
            (StoreHealth::Shrunk { lost: 10, .. }, None) => {}
            (health, _) => panic!("{kind:?}: {health:?}"),
        }
        assert_eq!(read(&store, 1), BlockOutcome::Moved, "{kind:?}");
        if writes_until_off.is_some() {
            let before = disk.change(|state| state.writes);
            assert!(matches!(write(&store, 50), BlockOutcome::Failed(_)));
            assert_eq!(
                disk.change(|state| state.writes),
                before,
                "nothing is tried any more"
            );
        }
    }
}

#[test]
fn what_hangs_is_left_alone_until_it_does_not() {
    let geometry = Geometry::new(8, 4096).unwrap();
    let memory = Memory::new(4096);
    let disk = SimDisk::new(vec![0; usize::try_from(geometry.length(8)).unwrap()], 1);
    let (store, _) = open(&disk, geometry, 1);
    let batch = |slot: u32| SlotWrite {
        slot,
        block: slot,
        name: name(slot.into()),
        parent: None,
    };
    for slot in 0..8 {
        memory.put(slot, &memory.contents(slot.into()));
    }
    let (first, second) = (batch(0), batch(1));
    let report = store.write(&memory.store(), &[first, second], soon());
    assert_eq!(report.outcomes, [BlockOutcome::Moved, BlockOutcome::Moved]);

    disk.change(|state| state.hangs = true);
    let short = || Instant::now() + Duration::from_millis(30);
    let started = Instant::now();
    let hung_write = store.write(&memory.store(), &[batch(0)], short());
    let wanted = SlotRead {
        slot: 1,
        block: 9,
        name: name(1),
    };
    let hung_read = store.read(&memory.store(), &[wanted], short());
    assert!(started.elapsed() < Duration::from_secs(2));
    for report in [&hung_write, &hung_read] {
        assert!(matches!(report.outcomes[..], [BlockOutcome::Failed(_)]));
        assert!(report.pending.is_some());
    }
    disk.change(|state| state.hangs = false);
    // The slot and its page of headers stay reserved until somebody has waited.
    let taken = store.write(&memory.store(), &[batch(0)], short());
    assert!(matches!(taken.outcomes[..], [BlockOutcome::Failed(_)]) && taken.pending.is_none());
    hung_write.pending.unwrap().wait();
    hung_read.pending.unwrap().wait();
    let report = store.write(&memory.store(), &[batch(0)], soon());
    assert_eq!(report.outcomes, [BlockOutcome::Moved]);
    let report = store.read(&memory.store(), &[wanted], soon());
    assert_eq!(report.outcomes, [BlockOutcome::Moved]);
}

#[test]
fn a_shorter_disk_has_the_slots_that_fit() {
    let geometry = Geometry::new(8, 4096).unwrap();
    let memory = Memory::new(4096);
    let disk = SimDisk::new(vec![0; usize::try_from(geometry.length(8)).unwrap()], 1);
    let (store, _) = open(&disk, geometry, 1);
    let batch: Vec<SlotWrite> = (0..8)
        .map(|slot| SlotWrite {
            slot,
            block: slot,
            name: name(slot.into()),
            parent: None,
        })
        .collect();
    let report = store.write(&memory.store(), &batch, soon());
    assert_eq!(report.outcomes, vec![BlockOutcome::Moved; 8]);
    drop(store);
    let mut image = disk.after(End::Kill);
    image.truncate(usize::try_from(geometry.length(5)).unwrap() + 100);
    let disk = SimDisk::new(image, 2);
    assert!(disk.length().unwrap() > 0);
    let (store, recovered) = open(&disk, geometry, 1);
    assert_eq!((store.capacity(), recovered.len()), (5, 5));
    assert!(matches!(
        store.health(),
        StoreHealth::Shrunk { lost: 3, .. }
    ));
}
