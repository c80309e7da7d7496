//! `kill -9` of real processes that write, and what the next one finds.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    Fingerprint,
    store::{
        BlockOutcome, SlotRead, SlotStore, SlotStoreConfig, SlotWrite, StoreLocation, StoreMemory,
    },
};
use blockplane_protocol::{BlockHash, SequenceHash, TokenBlock};
use blockplane_transfer::{Agent, AgentConfig, ArenaConfig, BlockLayout, Registration};

const BLOCK: usize = 64 << 10;
const SLOTS: u32 = 96;
const BATCH: u32 = 6;
const ROUNDS: u32 = 6;
/// The child runs in the folder of the store, where it finds its seed.
const SEED: &str = "child.seed";

fn open(agent: &Agent, folder: &Path) -> (std::sync::Arc<SlotStore>, Vec<(u32, u64)>) {
    let fingerprint = Fingerprint {
        model: 1,
        layout: 2,
        block_tokens: 16,
        tp_rank: 0,
        tp_size: 1,
        encoding: 1,
    };
    let location = StoreLocation::Folder(folder.to_owned());
    let config = SlotStoreConfig::new(location, SLOTS, BLOCK as u64, fingerprint);
    let (store, recovered) = SlotStore::open(agent, &config).expect("open");
    let found = recovered.iter().map(|r| (r.slot, r.name.sequence.0));
    (store, found.collect())
}

fn memory(agent: &Agent, blocks: u32) -> (Registration, BlockLayout) {
    let config = ArenaConfig::new(BLOCK * blocks as usize, "memory");
    let layout = BlockLayout::contiguous(blocks, BLOCK as u64);
    (agent.allocate(config).expect("memory"), layout)
}

fn name(key: u64) -> TokenBlock {
    TokenBlock {
        block: BlockHash(!key),
        sequence: SequenceHash(key),
    }
}

fn contents(key: u64) -> Vec<u8> {
    let words = (0..BLOCK as u64 / 8).map(|i| (i ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// The process that is killed: writes batches and says what it is about to overwrite and what was
/// acknowledged. Does nothing unless it was started by the other test.
#[test]
#[ignore = "a part of the other test"]
fn child() {
    let Ok(seed) = fs::read_to_string(SEED) else {
        return;
    };
    let mut seed: u64 = seed.parse().unwrap();
    let mut next = || {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    let agent = Agent::new(AgentConfig::new("killed")).unwrap();
    let (store, _) = open(&agent, Path::new("."));
    let (registration, layout) = memory(&agent, BATCH);
    let memory = StoreMemory {
        registration: &registration,
        layout,
    };
    let mut out = std::io::stdout();
    loop {
        let first = u32::try_from(next()).unwrap() % SLOTS;
        let mut blocks = Vec::new();
        let mut line = String::new();
        for block in 0..BATCH {
            let (slot, key) = ((first + block * 7) % SLOTS, next() << 20 | next() & 0xfffff);
            registration
                .write_at(u64::from(block) * BLOCK as u64, &contents(key))
                .unwrap();
            line += &format!(" {slot} {key}");
            blocks.push(SlotWrite {
                slot,
                block,
                name: name(key),
                parent: None,
            });
        }
        writeln!(out, "begin{line}").unwrap();
        out.flush().unwrap();
        let report = store.write(&memory, &blocks, soon());
        assert!(report.outcomes.iter().all(|o| *o == BlockOutcome::Moved));
        writeln!(out, "done{line}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    // What each slot holds; none for those whose write was cut off.
    let mut slots: Vec<Option<u64>> = vec![None; SLOTS as usize];
    let mut batches = 0;
    for round in 0..ROUNDS {
        fs::write(folder.path().join(SEED), (round + 1).to_string()).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (begun, has_begun) = mpsc::channel();
        let reader = thread::spawn(move || {
            let lines: Vec<String> = out
                .lines()
                .map_while(Result::ok)
                .inspect(|line| {
                    if line.starts_with("done") {
                        let _ = begun.send(());
                    }
                })
                .collect();
            lines
        });
        // It is in the middle of the next one when it hears of it.
        for _ in 0..3 + 17 * round {
            has_begun.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        child.kill().unwrap();
        // At once: a process that is about to end still has its file locked, and is waited for.
        let agent = Agent::new(AgentConfig::new("heir")).unwrap();
        let (store, recovered) = open(&agent, folder.path());
        child.wait().unwrap();
        for line in reader.join().unwrap() {
            let mut words = line.split_whitespace();
            let kind = words.next();
            let words: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
            match kind {
                Some("begin") if words.len() == 2 * BATCH as usize => {
                    for pair in words.chunks(2) {
                        slots[usize::try_from(pair[0]).unwrap()] = None;
                    }
                }
                Some("done") if words.len() == 2 * BATCH as usize => {
                    batches += 1;
                    for pair in words.chunks(2) {
                        slots[usize::try_from(pair[0]).unwrap()] = Some(pair[1]);
                    }
                }
                _ => {}
            }
        }
        assert!(store.recovery().existed && !store.recovery().clean);
        for (slot, key) in (0u32..).zip(&slots) {
            let found = recovered
                .iter()
                .find(|(at, _)| *at == slot)
                .map(|(_, key)| key);
            assert!(
                key.is_none() || found == key.as_ref(),
                "slot {slot}: {found:?} for {key:?}"
            );
        }
        let (registration, layout) = memory(&agent, 1);
        let memory = StoreMemory {
            registration: &registration,
            layout,
        };
        for &(slot, key) in &recovered {
            let wanted = SlotRead {
                slot,
                block: 0,
                name: name(key),
            };
            let report = store.read(&memory, &[wanted], soon());
            // Also those that were being written are empty or whole.
            assert_eq!(report.outcomes, [BlockOutcome::Moved], "slot {slot}");
            let mut bytes = vec![0; BLOCK];
            registration.read_at(0, &mut bytes).unwrap();
            assert!(bytes == contents(key), "wrong bytes from slot {slot}");
        }
        for (slot, key) in recovered {
            slots[slot as usize] = Some(key);
        }
    }
    assert!(batches > ROUNDS, "{batches} batches");
}
