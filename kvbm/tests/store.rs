//! The store on a real file: what is written is found, by this process and the next one.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    Fingerprint,
    store::{
        BlockOutcome, Holder, Invalid, RecoveredSlot, SlotRead, SlotStore, SlotStoreConfig,
        SlotWrite, StoreError, StoreHealth, StoreLocation, StoreMemory,
    },
};
use blockplane_protocol::{DType, KvLayout, SaltHash, TokenBlock, TokenSequence};
use blockplane_transfer::{Agent, AgentConfig, ArenaConfig, BlockLayout, FileEngine, Registration};

const BLOCK: u64 = 3 * 4096;
const MOVED: BlockOutcome = BlockOutcome::Moved;

fn agent() -> Agent {
    Agent::new(AgentConfig::new("store-test")).expect("an agent")
}

fn fingerprint() -> Fingerprint {
    Fingerprint::of(7, &KvLayout::dense(3, 2, 64, 16, DType::Bf16), 0, 1)
}

fn config(location: StoreLocation, slots: u32) -> SlotStoreConfig {
    SlotStoreConfig::new(location, slots, BLOCK, fingerprint())
}

fn file(folder: &Path) -> StoreLocation {
    StoreLocation::File(folder.join("store"))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Names of `count` blocks of one sequence.
fn names(count: u32) -> Vec<TokenBlock> {
    let tokens: Vec<u32> = (0..count * 4).collect();
    let sequence = TokenSequence::from_tokens(&tokens, 4, SaltHash::default());
    sequence.blocks().to_vec()
}

struct Memory {
    registration: Registration,
    layout: BlockLayout,
}

impl Memory {
    /// Layer by layer when `layers` is more than one: blocks are not contiguous then.
    fn new(agent: &Agent, blocks: u32, layers: u32) -> Self {
        let run_bytes = BLOCK / u64::from(layers);
        let bytes = usize::try_from(BLOCK * u64::from(blocks)).expect("in range");
        Self {
            registration: agent
                .allocate(ArenaConfig::new(bytes, "memory"))
                .expect("memory"),
            layout: BlockLayout {
                offset: 0,
                blocks,
                block_stride: run_bytes,
                layers,
                layer_stride: run_bytes * u64::from(blocks),
                run_bytes,
            },
        }
    }

    fn store(&self) -> StoreMemory<'_> {
        StoreMemory {
            registration: &self.registration,
            layout: self.layout,
        }
    }

    fn fill(&self, block: u32, seed: u32) {
        for layer in 0..self.layout.layers {
            let at = self.layout.run_offset(block, layer).expect("in range");
            self.registration
                .write_at(at, &contents(seed, layer, self.layout.run_bytes))
                .expect("in range");
        }
    }

    fn holds(&self, block: u32, seed: u32) -> bool {
        (0..self.layout.layers).all(|layer| {
            let at = self.layout.run_offset(block, layer).expect("in range");
            let mut bytes = vec![0; usize::try_from(self.layout.run_bytes).expect("in range")];
            self.registration.read_at(at, &mut bytes).expect("in range");
            bytes == contents(seed, layer, self.layout.run_bytes)
        })
    }
}

fn contents(seed: u32, layer: u32, bytes: u64) -> Vec<u8> {
    let bytes = usize::try_from(bytes).expect("in range");
    let words = (0u32..).flat_map(|i| (i ^ seed.wrapping_mul(0x9e37_79b9) ^ layer).to_le_bytes());
    words.take(bytes).collect()
}

/// Block `i` into slot `slot_of(i)`.
fn writes(names: &[TokenBlock], slot_of: impl Fn(u32) -> u32) -> Vec<SlotWrite> {
    (0u32..)
        .zip(names)
        .map(|(block, &name)| SlotWrite {
            slot: slot_of(block),
            block,
            name,
            parent: (block > 0).then(|| names[block as usize - 1].sequence),
        })
        .collect()
}

fn reads(writes: &[SlotWrite]) -> Vec<SlotRead> {
    writes
        .iter()
        .map(|write| SlotRead {
            slot: write.slot,
            block: write.block,
            name: write.name,
        })
        .collect()
}

#[test]
fn blocks_come_back_and_are_found_again() {
    for (engine, layers) in [(FileEngine::Auto, 1), (FileEngine::Threads, 3)] {
        let folder = tempfile::tempdir().unwrap();
        let mut agent = AgentConfig::new("store-test");
        agent.storage.file_engine = engine;
        let agent = Agent::new(agent).unwrap();
        let (from, into) = (Memory::new(&agent, 50, layers), Memory::new(&agent, 50, 1));
        let names = names(50);
        let writes = writes(&names, |block| 99 - block);
        let config = config(file(folder.path()), 100);
        {
            let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
            assert_eq!((recovered.len(), store.capacity()), (0, 100));
            for block in 0..50 {
                from.fill(block, block);
            }
            let report = store.write(&from.store(), &writes, soon());
            assert_eq!(report.outcomes, vec![MOVED; 50]);
            assert!(report.pending.is_none());
            let report = store.read(&into.store(), &reads(&writes), soon());
            assert_eq!(report.outcomes, vec![MOVED; 50]);
            // No farewell: as if killed.
        }
        let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
        let expected: Vec<RecoveredSlot> = writes
            .iter()
            .map(
                |&SlotWrite {
                     slot, name, parent, ..
                 }| RecoveredSlot { slot, name, parent },
            )
            .collect();
        assert_eq!(recovered, expected);
        let recovery = store.recovery();
        assert!(recovery.existed && !recovery.clean, "{recovery:?}");
        assert_eq!((recovery.blocks, recovery.damaged), (50, 0));
        let wear = store.wear();
        assert_eq!((wear.blocks_written, wear.opens), (50, 2));
        assert!(
            wear.bytes_written >= 50 * BLOCK && wear.since > 1_600_000_000,
            "{wear:?}"
        );
        let into = Memory::new(&agent, 50, layers);
        let report = store.read(&into.store(), &reads(&writes), soon());
        assert_eq!(report.outcomes, vec![MOVED; 50]);
        assert!((0..50).all(|block| into.holds(block, block)));
        store.close(soon()).unwrap();
        assert!(matches!(store.health(), StoreHealth::Off { .. }));
        drop(store);
        let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
        assert_eq!(recovered, expected);
        assert!(store.recovery().clean);
    }
}

#[test]
fn names_that_are_not_there_are_missing() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent();
    let memory = Memory::new(&agent, 2, 1);
    let names = names(2);
    let (store, _) = SlotStore::open(&agent, &config(file(folder.path()), 4)).unwrap();
    let writes = writes(&names[..1], |_| 2);
    assert_eq!(
        store.write(&memory.store(), &writes, soon()).outcomes,
        [MOVED]
    );
    let wanted = [(2, names[0]), (2, names[1]), (1, names[0]), (4, names[0])];
    let reads = wanted.map(|(slot, name)| SlotRead {
        slot,
        block: 1,
        name,
    });
    let missing = BlockOutcome::Invalid(Invalid::Missing);
    assert_eq!(
        store.read(&memory.store(), &reads, soon()).outcomes,
        [MOVED, missing.clone(), missing.clone(), missing]
    );
}

#[test]
fn a_spoilt_block_is_not_delivered_and_its_slot_is_remembered() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent();
    let memory = Memory::new(&agent, 8, 1);
    let names = names(8);
    let config = config(file(folder.path()), 8);
    let writes = writes(&names, |block| block);
    (0..8).for_each(|block| memory.fill(block, block));
    let (store, _) = SlotStore::open(&agent, &config).unwrap();
    assert_eq!(
        store.write(&memory.store(), &writes, soon()).outcomes,
        vec![MOVED; 8]
    );
    store.close(soon()).unwrap();
    drop(store);
    // One bit of slot 5.
    let raw = fs::File::options()
        .read(true)
        .write(true)
        .open(folder.path().join("store"))
        .unwrap();
    let at = raw.metadata().unwrap().len() - 3 * BLOCK + 777;
    let mut byte = [0];
    raw.read_exact_at(&mut byte, at).unwrap();
    raw.write_all_at(&[byte[0] ^ 4], at).unwrap();
    raw.sync_all().unwrap();

    let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
    assert_eq!(recovered.len(), 8);
    let report = store.read(&memory.store(), &reads(&writes), soon());
    let mut expected = vec![MOVED; 8];
    expected[5] = BlockOutcome::Invalid(Invalid::Checksum);
    assert_eq!(report.outcomes, expected);
    assert_eq!((store.quarantined(), store.invalid()), (1, 1));
    expected[5] = BlockOutcome::Invalid(Invalid::Missing);
    assert_eq!(
        store
            .read(&memory.store(), &reads(&writes), soon())
            .outcomes,
        expected
    );
    drop(store);

    let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
    assert_eq!((recovered.len(), store.quarantined()), (7, 1));
    // Written again, it is read back and then believed.
    memory.fill(5, 5);
    assert_eq!(
        store.write(&memory.store(), &writes[5..6], soon()).outcomes,
        [MOVED]
    );
    assert_eq!(store.quarantined(), 0);
    assert_eq!(
        store
            .read(&memory.store(), &reads(&writes), soon())
            .outcomes,
        vec![MOVED; 8]
    );
    drop(store);
    let (_, recovered) = SlotStore::open(&agent, &config).unwrap();
    assert_eq!(recovered.len(), 8);
}

/// What was written is still read from a file without a name, and nothing more is put there.
#[test]
fn a_file_that_was_removed_is_only_read() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent();
    let memory = Memory::new(&agent, 2, 1);
    let names = names(2);
    let config = config(file(folder.path()), 4);
    let (store, _) = SlotStore::open(&agent, &config).unwrap();
    let writes = writes(&names, |block| block);
    memory.fill(0, 7);
    let report = store.write(&memory.store(), &writes[..1], soon());
    assert_eq!(report.outcomes, [MOVED]);
    fs::remove_file(folder.path().join("store")).unwrap();
    let mut report = store.write(&memory.store(), &writes[1..], soon());
    let outcome = report.outcomes.remove(0);
    assert!(
        matches!(&outcome, BlockOutcome::Failed(why) if why.contains("removed")),
        "{outcome:?}"
    );
    assert!(matches!(store.health(), StoreHealth::ReadOnly { .. }));
    memory.fill(0, 8);
    let report = store.read(&memory.store(), &reads(&writes[..1]), soon());
    assert_eq!(report.outcomes, [MOVED]);
    assert!(memory.holds(0, 7));
    drop(store);
    let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
    assert_eq!((store.health(), recovered.len()), (StoreHealth::On, 0));
}

/// Whether a read or a write finds it.
#[test]
fn a_file_that_was_cut_is_not_used_any_more() {
    for by_reading in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let agent = agent();
        let memory = Memory::new(&agent, 2, 1);
        let names = names(2);
        let config = config(file(folder.path()), 4);
        let (store, _) = SlotStore::open(&agent, &config).unwrap();
        let writes = writes(&names, |block| block);
        (0..2).for_each(|block| memory.fill(block, block));
        let report = store.write(&memory.store(), &writes, soon());
        assert_eq!(report.outcomes, [MOVED, MOVED]);
        let path = folder.path().join("store");
        let raw = fs::File::options().write(true).open(&path).unwrap();
        let left = raw.metadata().unwrap().len() - 3 * BLOCK;
        raw.set_len(left).unwrap();
        let report = if by_reading {
            store.read(&memory.store(), &reads(&writes[1..]), soon())
        } else {
            store.write(&memory.store(), &writes[1..], soon())
        };
        assert!(matches!(report.outcomes[..], [BlockOutcome::Failed(_)]));
        let health = store.health();
        assert!(
            matches!(&health, StoreHealth::Off { reason } if reason.contains(&left.to_string())),
            "{health:?}"
        );
        drop(store);
        // The next one gives it its length back, and has what was not cut off.
        let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
        assert_eq!(store.capacity(), 4);
        let found: Vec<u32> = recovered.iter().map(|slot| slot.slot).collect();
        let report = store.read(&memory.store(), &reads(&writes), soon());
        assert_eq!(report.outcomes[0], MOVED, "{found:?}");
        assert!(matches!(report.outcomes[1], BlockOutcome::Invalid(_)));
    }
}

#[test]
fn one_process_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent();
    let mut config = config(file(folder.path()), 4);
    config.lock_time = Duration::from_millis(50);
    let (store, _) = SlotStore::open(&agent, &config).unwrap();
    let error = SlotStore::open(&agent, &config).unwrap_err();
    let StoreError::InUse { holder, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*holder, Holder::Process(std::process::id()), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&format!("process {}", std::process::id())),
        "{text}"
    );
    drop(store);
    SlotStore::open(&agent, &config).unwrap();
}

#[test]
fn an_owner_that_lets_go_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent();
    let mut config = config(file(folder.path()), 4);
    config.lock_time = Duration::from_secs(20);
    let (store, _) = SlotStore::open(&agent, &config).unwrap();
    let owner = thread::spawn(move || {
        thread::park_timeout(Duration::from_millis(200));
        drop(store);
    });
    let started = Instant::now();
    SlotStore::open(&agent, &config).unwrap();
    assert!(started.elapsed() < Duration::from_secs(10));
    owner.join().unwrap();
}

#[test]
fn a_folder_is_shared_file_by_file() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent();
    let config = config(StoreLocation::Folder(folder.path().join("kv")), 4);
    let (first, _) = SlotStore::open(&agent, &config).unwrap();
    let (second, _) = SlotStore::open(&agent, &config).unwrap();
    assert_ne!(first.path(), second.path());
    let path = first.path().to_owned();
    drop(first);
    let (third, _) = SlotStore::open(&agent, &config).unwrap();
    assert_eq!(third.path(), path);
    let mut other = config;
    other.fingerprint.tp_rank = 1;
    let (fourth, _) = SlotStore::open(&agent, &other).unwrap();
    assert_ne!(fourth.path(), path);
}

#[test]
fn stores_of_other_blocks_and_files_of_others_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent();
    let config = config(file(folder.path()), 4);
    drop(SlotStore::open(&agent, &config).unwrap());
    let path = folder.path().join("store");
    let before = fs::read(&path).unwrap();
    let mut other = config.clone();
    other.fingerprint.model = 8;
    let error = SlotStore::open(&agent, &other).unwrap_err();
    assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
    let mut other = config.clone();
    other.block_bytes += 1;
    let error = SlotStore::open(&agent, &other).unwrap_err();
    assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
    for text in ["a diary", &"x".repeat(10_000)] {
        fs::write(&path, text).unwrap();
        let error = SlotStore::open(&agent, &config).unwrap_err();
        assert!(matches!(error, StoreError::NotAStore { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), text.as_bytes());
    }
}

#[test]
fn the_number_of_slots_may_change() {
    let folder = tempfile::tempdir().unwrap();
    let agent = agent();
    let memory = Memory::new(&agent, 8, 1);
    let names = names(8);
    (0..8).for_each(|block| memory.fill(block, block));
    let writes = writes(&names, |block| block);
    let location = file(folder.path());
    let (store, _) = SlotStore::open(&agent, &config(location.clone(), 8)).unwrap();
    assert_eq!(
        store.write(&memory.store(), &writes, soon()).outcomes,
        vec![MOVED; 8]
    );
    drop(store);
    let length = || fs::metadata(folder.path().join("store")).unwrap().len();
    let full = length();
    // Fewer: those that fit stay, and the space is given back.
    let (store, recovered) = SlotStore::open(&agent, &config(location.clone(), 5)).unwrap();
    assert_eq!((store.capacity(), recovered.len()), (5, 5));
    assert_eq!(length(), full - 3 * BLOCK);
    drop(store);
    // More again: the table of headers still has room for them.
    let (store, recovered) = SlotStore::open(&agent, &config(location.clone(), 8)).unwrap();
    assert_eq!((store.capacity(), length()), (8, full));
    assert_eq!(
        recovered.len(),
        8,
        "headers of the cut slots are still there"
    );
    // Their payload is not, and that is noticed.
    let report = store.read(&memory.store(), &reads(&writes), soon());
    let moved = report
        .outcomes
        .iter()
        .filter(|&outcome| *outcome == MOVED)
        .count();
    assert_eq!(moved, 5);
    drop(store);
    // More than it was made for: it begins anew.
    let (store, recovered) = SlotStore::open(&agent, &config(location, 9)).unwrap();
    assert_eq!((store.capacity(), recovered.len()), (9, 0));
}
