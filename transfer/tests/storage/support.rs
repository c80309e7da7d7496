//! What the tests share: agents, files, patterns and an oracle.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockIds, BlockLayout, DirectIo, FileBlocks, FileConfig,
    FileEngine, FileStore, LocalBlocks, Op, PostOptions, PrepareError, Prepared, Registration,
    TransferError,
};
use tempfile::TempDir;

/// Longer than anything takes on a busy machine; a test that gets here has failed.
pub(crate) const WAIT: Duration = Duration::from_secs(20);

/// Both ways to move the bytes of files.
pub(crate) const ENGINES: [FileEngine; 2] = [FileEngine::Uring, FileEngine::Threads];

/// Around the page cache and through it.
pub(crate) const CACHES: [DirectIo; 2] = [DirectIo::On, DirectIo::Off];

/// An agent that only uses stores.
pub(crate) fn agent(engine: FileEngine) -> Agent {
    agent_with(engine, |_| {})
}

pub(crate) fn agent_with(engine: FileEngine, change: impl Fn(&mut AgentConfig)) -> Agent {
    let mut config = AgentConfig::new("store").with_lanes([blockplane_transfer::Lane::Loopback]);
    config.storage.file_engine = engine;
    // Small requests: many of them even in small transfers.
    config.storage.file_request_bytes = 32 << 10;
    config.storage.file_queue_depth = 16;
    change(&mut config);
    Agent::new(config).unwrap()
}

/// A folder on the file system of the build, which does direct requests.
pub(crate) fn disk() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A folder in memory, if this machine has one.
pub(crate) fn memory_folder() -> Option<TempDir> {
    let folder = tempfile::tempdir_in("/dev/shm").ok();
    if folder.is_none() {
        println!("skipped: there is no file system in memory at /dev/shm");
    }
    folder
}

/// A file with a pattern.
pub(crate) fn patterned(folder: &Path, name: &str, bytes: usize, salt: u64) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, pattern(bytes, salt)).unwrap();
    path
}

pub(crate) fn open(agent: &Agent, path: &Path, direct: DirectIo) -> FileStore {
    agent
        .open_file(FileConfig::new(path).with_direct(direct))
        .unwrap()
}

pub(crate) fn arena(agent: &Agent, bytes: usize) -> Registration {
    agent.allocate(ArenaConfig::new(bytes, "test")).unwrap()
}

/// Bytes in which every position and salt differs from its neighbours.
pub(crate) fn pattern(bytes: usize, salt: u64) -> Vec<u8> {
    (0..bytes as u64)
        .map(|i| (i.wrapping_add(salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

pub(crate) fn fill(region: &Registration, salt: u64) -> Vec<u8> {
    let bytes = pattern(region.len(), salt);
    region.write_at(0, &bytes).unwrap();
    bytes
}

pub(crate) fn bytes(region: &Registration) -> Vec<u8> {
    let mut all = vec![0; region.len()];
    region.read_at(0, &mut all).unwrap();
    all
}

pub(crate) fn file_bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// One side of an operation.
#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    pub(crate) layout: BlockLayout,
    pub(crate) ids: BlockIds,
    pub(crate) layers: Range<u32>,
}

impl Blocks {
    pub(crate) fn flat(blocks: u32, block_bytes: u64, ids: &[u32]) -> Self {
        Self {
            layout: BlockLayout::contiguous(blocks, block_bytes),
            ids: ids.into(),
            layers: 0..1,
        }
    }

    pub(crate) fn local<'a>(&self, registration: &'a Registration) -> LocalBlocks<'a> {
        LocalBlocks {
            registration,
            layout: self.layout,
            ids: self.ids.clone(),
            layers: self.layers.clone(),
        }
    }

    pub(crate) fn file<'a>(&self, file: &'a FileStore) -> FileBlocks<'a> {
        FileBlocks {
            file,
            layout: self.layout,
            ids: self.ids.clone(),
            layers: self.layers.clone(),
            durable: false,
        }
    }
}

pub(crate) fn prepare(
    agent: &Agent,
    op: Op,
    (memory, local): (&Registration, &Blocks),
    (file, stored): (&FileStore, &Blocks),
) -> Result<Prepared, PrepareError> {
    agent.prepare_file(op, local.local(memory), stored.file(file))
}

pub(crate) fn run(prepared: &Prepared) -> Result<(), TransferError> {
    prepared.post(PostOptions::within(WAIT)).unwrap().wait(WAIT)
}

/// Runs a write and a read and compares every byte of memory and file with the oracle.
pub(crate) fn check(
    agent: &Agent,
    local: (&Registration, &Blocks),
    (path, file, stored): (&Path, &FileStore, &Blocks),
) {
    for (op, salt) in [(Op::Write, 10), (Op::Read, 20)] {
        let mut memory = fill(local.0, salt);
        let mut content = pattern(file_bytes(path).len(), salt + 1);
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .write_all_at(&content, 0)
            .unwrap();
        run(&prepare(agent, op, local, (file, stored)).unwrap()).unwrap();
        match op {
            Op::Write => oracle(&memory, local.1, &mut content, stored),
            Op::Read => oracle(&content, stored, &mut memory, local.1),
        }
        assert!(
            bytes(local.0) == memory,
            "memory differs after {op:?}: {local:?} {stored:?}"
        );
        assert!(
            file_bytes(path) == content,
            "the file differs after {op:?}: {local:?} {stored:?}"
        );
    }
}

/// Copies as naively as possible.
pub(crate) fn oracle(from: &[u8], a: &Blocks, to: &mut [u8], b: &Blocks) {
    for (x, y) in a.ids.iter().zip(b.ids.iter()) {
        for (i, k) in a.layers.clone().zip(b.layers.clone()) {
            let x = a.layout.run_offset(x, i).unwrap() as usize;
            let y = b.layout.run_offset(y, k).unwrap() as usize;
            let run = a.layout.run_bytes as usize;
            to[y..y + run].copy_from_slice(&from[x..x + run]);
        }
    }
}

/// `count` of the ids `0..of` in an order that has no runs, the same for the same seed.
pub(crate) fn scattered(of: u32, count: u32, seed: u64) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..of).collect();
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    for i in (1..ids.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ids.swap(i, (state >> 33) as usize % (i + 1));
    }
    ids.truncate(count as usize);
    ids
}

/// Descriptors that this process has open.
pub(crate) fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until `done` holds, giving other threads the processor in between.
pub(crate) fn eventually(what: &str, done: impl Fn() -> bool) {
    let until = std::time::Instant::now() + WAIT;
    while !done() {
        assert!(std::time::Instant::now() < until, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}
