//! The store on disks that are full, read-only, or raw devices. They are made here, which takes root;
//! without it the tests say so and check nothing.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    Fingerprint,
    store::{
        BlockOutcome, SlotRead, SlotStore, SlotStoreConfig, SlotWrite, StoreError, StoreHealth,
        StoreLocation, StoreMemory,
    },
};
use blockplane_protocol::{BlockHash, SequenceHash, TokenBlock};
use blockplane_transfer::{Agent, AgentConfig, ArenaConfig, BlockLayout, Registration};

const BLOCK: u64 = 64 << 10;

/// Undone when it is dropped.
struct Made {
    undo: Vec<String>,
}

impl Drop for Made {
    fn drop(&mut self) {
        let (command, arguments) = self.undo.split_first().expect("a command");
        let done = Command::new(command).args(arguments).status();
        assert!(done.is_ok_and(|status| status.success()), "{:?}", self.undo);
    }
}

/// What the command printed, or none and a line that says why.
fn run(words: &[&str]) -> Option<String> {
    let output = Command::new(words[0]).args(&words[1..]).output();
    let why = match output {
        Ok(output) if output.status.success() => {
            return Some(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    eprintln!("skipped: {}: {why}", words.join(" "));
    None
}

/// A file system in memory.
fn mount(folder: &Path, options: &str) -> Option<Made> {
    let folder = folder.to_str()?;
    run(&["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder])?;
    Some(Made {
        undo: ["umount", folder].map(str::to_owned).to_vec(),
    })
}

fn config(location: StoreLocation, slots: u32) -> SlotStoreConfig {
    let fingerprint = Fingerprint {
        model: 1,
        layout: 2,
        block_tokens: 16,
        tp_rank: 0,
        tp_size: 1,
        encoding: 1,
    };
    SlotStoreConfig::new(location, slots, BLOCK, fingerprint)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn name(slot: u32) -> TokenBlock {
    TokenBlock {
        block: BlockHash(slot.into()),
        sequence: SequenceHash(u64::from(slot) + 1),
    }
}

fn memory(agent: &Agent) -> Registration {
    let bytes = usize::try_from(BLOCK).expect("small");
    let memory = agent.allocate(ArenaConfig::new(bytes, "memory"));
    memory.expect("memory")
}

/// Writes and reads a slot.
fn use_slot(store: &SlotStore, memory: &Registration, slot: u32) -> [BlockOutcome; 2] {
    let memory = StoreMemory {
        registration: memory,
        layout: BlockLayout::contiguous(1, BLOCK),
    };
    let write = SlotWrite {
        slot,
        block: 0,
        name: name(slot),
        parent: None,
    };
    let read = SlotRead {
        slot,
        block: 0,
        name: name(slot),
    };
    [
        store.write(&memory, &[write], soon()).outcomes.remove(0),
        store.read(&memory, &[read], soon()).outcomes.remove(0),
    ]
}

#[test]
fn a_full_disk_gives_the_slots_that_fit_and_a_read_only_one_those_that_were_written() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_mounted) = mount(folder.path(), "size=8m") else {
        return;
    };
    let agent = Agent::new(AgentConfig::new("full")).unwrap();
    let memory = memory(&agent);
    let path = folder.path().join("store");
    let config = config(StoreLocation::File(path), 1000);
    let (store, _) = SlotStore::open(&agent, &config).unwrap();
    let capacity = store.capacity();
    assert!((80..125).contains(&capacity), "{capacity} slots in 8 MiB");
    let health = store.health();
    assert!(
        matches!(health, StoreHealth::Shrunk { lost, .. } if lost == 1000 - capacity),
        "{health:?}"
    );
    for slot in [0, capacity - 1] {
        let outcomes = use_slot(&store, &memory, slot);
        assert_eq!(outcomes, [BlockOutcome::Moved, BlockOutcome::Moved]);
    }
    drop(store);
    let mount = folder.path().to_str().unwrap();
    if run(&["mount", "-o", "remount,ro", mount]).is_none() {
        return;
    }
    let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
    assert_eq!(recovered.len(), 2);
    assert!(matches!(store.health(), StoreHealth::ReadOnly { .. }));
    let [written, read] = use_slot(&store, &memory, 0);
    assert!(matches!(written, BlockOutcome::Failed(_)));
    assert_eq!(read, BlockOutcome::Moved);
}

#[test]
fn no_room_at_all_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_mounted) = mount(folder.path(), "size=256k") else {
        return;
    };
    let agent = Agent::new(AgentConfig::new("none")).unwrap();
    let config = config(StoreLocation::Folder(folder.path().to_owned()), 10);
    let error = SlotStore::open(&agent, &config).unwrap_err();
    assert!(matches!(error, StoreError::Open(_)), "{error}");
}

/// Neither allocates space without writing it; the second one has no way around the page cache.
#[test]
fn file_systems_without_fallocate_or_direct_requests_are_used_as_they_are() {
    for kind in ["ext2", "ramfs"] {
        let folder = tempfile::tempdir().unwrap();
        let (disk, image) = (folder.path().join("disk"), folder.path().join("image"));
        fs::create_dir(&disk).unwrap();
        let (place, image) = (disk.to_str().unwrap(), image.to_str().unwrap());
        let made = if kind == "ramfs" {
            run(&["mount", "-t", "ramfs", "ramfs", place])
        } else {
            fs::File::create(image).unwrap().set_len(16 << 20).unwrap();
            run(&["mkfs.ext2", "-q", image])
                .and_then(|_| run(&["mount", "-o", "loop", image, place]))
        };
        if made.is_none() {
            continue;
        }
        let _mounted = Made {
            undo: ["umount", place].map(str::to_owned).to_vec(),
        };
        let agent = Agent::new(AgentConfig::new(kind)).unwrap();
        let memory = memory(&agent);
        let path = disk.join("store");
        let config = config(StoreLocation::File(path.clone()), 100);
        let (store, _) = SlotStore::open(&agent, &config).unwrap();
        assert_eq!((store.capacity(), store.health()), (100, StoreHealth::On));
        for slot in 0..3 {
            let outcomes = use_slot(&store, &memory, slot);
            assert_eq!(
                outcomes,
                [BlockOutcome::Moved, BlockOutcome::Moved],
                "{kind}"
            );
        }
        let file = fs::metadata(&path).unwrap();
        // Superblocks, intents and headers are there, most payloads are not.
        let allocated = file.blocks() * 512;
        assert!(allocated >= 1 << 20, "{kind}: {allocated} bytes");
        assert!(allocated < file.len() / 2, "{kind}: {allocated} bytes");
        if kind == "ramfs" {
            continue;
        }
        // Somebody else takes the rest: slots that were written go on, those that were not are lost.
        let full = fs::File::create(disk.join("filler"))
            .and_then(|mut file| io::copy(&mut io::repeat(1), &mut file));
        assert!(full.is_err(), "the disk has no end");
        let [outcome, _] = use_slot(&store, &memory, 90);
        assert!(matches!(outcome, BlockOutcome::Bad(_)), "{outcome:?}");
        for slot in 0..3 {
            let outcomes = use_slot(&store, &memory, slot);
            assert_eq!(outcomes, [BlockOutcome::Moved, BlockOutcome::Moved]);
        }
        let health = store.health();
        assert!(
            matches!(health, StoreHealth::Shrunk { lost: 1, .. }),
            "{health:?}"
        );
    }
}

#[test]
fn a_raw_device_is_a_store() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let image = image.to_str().unwrap();
    let Some(device) = run(&["losetup", "--find", "--show", image]) else {
        return;
    };
    let _attached = Made {
        undo: ["losetup", "-d", &device].map(str::to_owned).to_vec(),
    };
    let agent = Agent::new(AgentConfig::new("device")).unwrap();
    let memory = memory(&agent);
    let location = StoreLocation::Device(PathBuf::from(&device));
    let mut config = config(location, 1000);
    config.lock_time = Duration::from_millis(50);
    let (store, _) = SlotStore::open(&agent, &config).unwrap();
    let capacity = store.capacity();
    assert!((230..256).contains(&capacity), "{capacity} slots in 16 MiB");
    let outcomes = use_slot(&store, &memory, capacity - 1);
    assert_eq!(outcomes, [BlockOutcome::Moved, BlockOutcome::Moved]);
    let error = SlotStore::open(&agent, &config).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    store.close(soon()).unwrap();
    drop(store);
    let (store, recovered) = SlotStore::open(&agent, &config).unwrap();
    assert_eq!(recovered.len(), 1);
    assert!(store.recovery().clean);
    // What is not a store is left alone.
    drop(store);
    fs::write(&device, [7; 8192]).unwrap();
    let error = SlotStore::open(&agent, &config).unwrap_err();
    assert!(matches!(error, StoreError::NotAStore { .. }), "{error}");
}
