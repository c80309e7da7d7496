//! The manager with its threads: real bytes through all local tiers and a restart, and movers that
//! are slow, hang, or find what they did not store.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::disallowed_methods, reason = "a mover that takes its time")]

use std::{
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    AdmissionKind, BlockPool, Fingerprint, KvArena, MutableBlock, PoolConfig, SlotStore,
    SlotStoreConfig,
    arena::ArenaPlace,
    host_arena,
    store::StoreLocation,
    tier::{
        BlockOutcome, DiskConfig, HealthConfig, Invalid, MoveKind, MoveReport, MoveSpec, Mover,
        NotLoaded, Onboarded, Pending, QueueConfig, RankTiers, TierConfig, TierManager, TierParts,
        TierPools, TierState,
    },
};
use blockplane_protocol::{
    BlockId, DType, DpRank, KvLayout, LayoutOrder, SaltHash, TokenBlock, TokenSequence,
};
use blockplane_transfer::{Agent, AgentConfig};
use parking_lot::Mutex;

const RANK: DpRank = DpRank(0);
const SOON: Duration = Duration::from_secs(20);

fn prompt(seed: u32, blocks: u32) -> TokenSequence {
    let tokens: Vec<u32> = (0..blocks * 4).map(|i| seed * 1000 + i).collect();
    TokenSequence::from_tokens(&tokens, 4, SaltHash::default())
}

fn layout(order: LayoutOrder) -> KvLayout {
    KvLayout {
        order,
        ..KvLayout::dense(3, 2, 16, 4, DType::F32)
    }
}

/// A worker: an engine's G1 on its own agent, and the tiers below.
struct Worker {
    manager: TierManager,
    tiers: RankTiers,
    pool: BlockPool,
    arena: Arc<KvArena>,
    _agents: [Agent; 2],
}

fn config(host_blocks: u32) -> TierConfig {
    TierConfig {
        host_blocks,
        bounce_blocks: 8,
        disk: Some(DiskConfig {
            admission: AdmissionKind::All.into(),
            ..DiskConfig::new(32)
        }),
        queues: QueueConfig {
            batch_blocks: 3,
            ..QueueConfig::default()
        },
        ..TierConfig::default()
    }
}

fn worker(folder: &Path, config: &TierConfig, order: LayoutOrder) -> Worker {
    worker_on(folder, config, order, |_| {})
}

/// With a store to which something happened before.
fn worker_on(
    folder: &Path,
    config: &TierConfig,
    order: LayoutOrder,
    happens: impl FnOnce(&SlotStore),
) -> Worker {
    let engine = Agent::new(AgentConfig::new("engine")).unwrap();
    let own = Agent::new(AgentConfig::new("kvbm")).unwrap();
    let layout = layout(order);
    let arena = KvArena::allocate(&engine, layout.clone(), 10, "kv").unwrap();
    let pool = BlockPool::new(arena.clone(), PoolConfig::default());
    let fingerprint = Fingerprint::of(7, &layout, 0, 1);
    let location = StoreLocation::Folder(folder.to_owned());
    let store = SlotStoreConfig::new(location, 32, layout.block_bytes() as u64, fingerprint);
    let (store, recovered) = SlotStore::open(&own, &store).unwrap();
    happens(&store);
    let parts = TierParts {
        host: host_arena(&own, &layout, config, ArenaPlace::Host).unwrap(),
        agent: own.clone(),
        store: Some((store, recovered)),
        remote: None,
        hubs: Vec::new(),
    };
    let manager = TierManager::start(config, parts).unwrap();
    let tiers = manager.attach(RANK, &engine, &pool).unwrap();
    Worker {
        manager,
        tiers,
        pool,
        arena,
        _agents: [engine, own],
    }
}

/// Contents of one layer of a block, different for each.
fn contents(name: TokenBlock, layer: u32, bytes: usize) -> Vec<u8> {
    let seed = name.sequence.0 ^ u64::from(layer);
    (0..bytes as u64)
        .map(|i| seed.wrapping_mul(i + 3).to_le_bytes()[2])
        .collect()
}

impl Worker {
    /// What an engine does with a prompt: fills blocks, makes them readable, offers them.
    fn compute(&self, prompt: &TokenSequence) {
        let blocks = self.pool.allocate(prompt.blocks().len()).unwrap();
        let mut parent = None;
        let mut complete = Vec::new();
        for (block, name) in blocks.into_iter().zip(prompt.blocks()) {
            for layer in 0..self.arena.layout().layers {
                let bytes = contents(*name, layer, self.arena.layout().layer_bytes());
                let at = self
                    .arena
                    .transfer_layout()
                    .run_offset(block.id().0, layer)
                    .unwrap();
                self.arena.registration().write_at(at, &bytes).unwrap();
            }
            complete.push(block.complete(*name, parent));
            parent = Some(name.sequence);
        }
        let held = BlockPool::register(complete);
        assert!(self.tiers.offload(prompt.blocks(), None));
        drop(held);
    }

    fn check(&self, prompt: &TokenSequence, targets: &[MutableBlock]) {
        for (block, name) in targets.iter().zip(prompt.blocks()) {
            for layer in 0..self.arena.layout().layers {
                let expected = contents(*name, layer, self.arena.layout().layer_bytes());
                let at = self
                    .arena
                    .transfer_layout()
                    .run_offset(block.id().0, layer)
                    .unwrap();
                let mut bytes = vec![0; expected.len()];
                self.arena.registration().read_at(at, &mut bytes).unwrap();
                assert!(bytes == expected, "block {} layer {layer}", block.id().0);
            }
        }
    }

    /// Loads a prompt into new blocks of G1 and compares every byte.
    fn load(&self, prompt: &TokenSequence) -> Onboarded {
        let found = self.tiers.find(prompt.blocks());
        assert_eq!(found.len(), prompt.blocks().len(), "{found:?}");
        let targets = self.pool.allocate(found.missing_targets()).unwrap();
        let end = onboard(&self.tiers, found, &targets, SOON);
        assert_eq!(end.loaded, prompt.blocks().len(), "{end:?}");
        self.check(prompt, &targets);
        end
    }
}

fn onboard(
    tiers: &RankTiers,
    found: blockplane_kvbm::TierMatch,
    targets: &[MutableBlock],
    within: Duration,
) -> Onboarded {
    let (tell, told) = channel();
    let ids = targets.iter().map(MutableBlock::id).collect();
    let done = Box::new(move |end| tell.send(end).unwrap());
    let ticket = tiers.onboard(found, ids, within, done);
    let end = told.recv_timeout(SOON).unwrap();
    drop(ticket);
    end
}

#[test]
fn bytes_come_back_from_every_tier_and_after_a_restart() {
    for order in [LayoutOrder::BlockFirst, LayoutOrder::LayerFirst] {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (prompt(1, 8), prompt(2, 7));
        {
            let worker = worker(folder.path(), &config(8), order);
            worker.compute(&one);
            assert!(worker.manager.flush(SOON));
            let end = worker.load_after_clear(&one);
            assert_eq!((end.from.host, end.from.disk), (8, 0));
            // G2 is overwritten by another prompt: most of the first one is on disk alone.
            worker.pool.clear();
            worker.compute(&two);
            assert!(worker.manager.flush(SOON));
            let end = worker.load_after_clear(&one);
            assert_eq!((end.from.host, end.from.disk), (1, 7));
            assert_eq!(worker.manager.stats().disk.cached, 15);
            assert!(worker.manager.stop(SOON));
        }
        let worker = worker(folder.path(), &config(8), order);
        for prompt in [&two, &one] {
            let end = worker.load_after_clear(prompt);
            assert!(end.from.disk > 0 && end.reason.is_none(), "{end:?}");
        }
        let stats = worker.manager.stats();
        assert_eq!(
            stats.of(MoveKind::HostToDisk).blocks,
            0,
            "no block is written twice"
        );
    }
}

impl Worker {
    fn load_after_clear(&self, prompt: &TokenSequence) -> Onboarded {
        self.pool.clear();
        self.load(prompt)
    }
}

#[test]
fn without_a_g2_blocks_pass_through_a_few_bounce_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let worker = worker(folder.path(), &config(0), LayoutOrder::LayerFirst);
    let prompt = prompt(3, 9);
    worker.compute(&prompt);
    assert!(worker.manager.flush(SOON));
    let end = worker.load_after_clear(&prompt);
    assert_eq!((end.from.host, end.from.disk), (0, 9));
    let bounce = worker.manager.host().stats();
    assert_eq!(bounce.free, bounce.total);
}

/// Blocks on a disk that was written to behind the store's back are computed, not used.
#[test]
fn a_wrong_byte_on_disk_is_not_loaded_and_not_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = prompt(4, 6);
    let path = {
        let worker = worker(folder.path(), &config(8), LayoutOrder::BlockFirst);
        worker.compute(&prompt);
        assert!(worker.manager.flush(SOON));
        let path = worker.manager.store().unwrap().path().to_owned();
        assert!(worker.manager.stop(SOON));
        path
    };
    let mut bytes = std::fs::read(&path).unwrap();
    let needle = contents(
        prompt.blocks()[2],
        1,
        layout(LayoutOrder::BlockFirst).layer_bytes(),
    );
    let at = bytes
        .windows(needle.len())
        .position(|part| part == needle)
        .unwrap();
    bytes[at + 5] ^= 0x10;
    std::fs::write(&path, bytes).unwrap();

    let worker = worker(folder.path(), &config(8), LayoutOrder::BlockFirst);
    let found = worker.tiers.find(prompt.blocks());
    let targets = worker.pool.allocate(found.missing_targets()).unwrap();
    let end = onboard(&worker.tiers, found, &targets, SOON);
    assert_eq!((end.loaded, end.reason), (2, Some(NotLoaded::Invalid)));
    let ids: Vec<BlockId> = targets.iter().map(MutableBlock::id).collect();
    assert_eq!(end.not_loaded, ids[2..]);
    worker.check(&prompt, &targets[..2]);
    assert_eq!(worker.tiers.find(prompt.blocks()).len(), 2);
    let stats = worker.manager.stats();
    assert_eq!((stats.invalid.disk, stats.disk_quarantined_blocks), (1, 1));

    // All from there on is computed. What lies behind the gap has stayed where it was: only the gap is
    // written, and then all is found on the disk again.
    drop(targets);
    worker.pool.clear();
    worker.compute(&prompt);
    assert!(worker.manager.flush(SOON));
    let block = layout(LayoutOrder::BlockFirst).block_bytes() as u64;
    assert_eq!(worker.manager.stats().disk_bytes_written, block);
    worker.manager.host().clear();
    let end = worker.load_after_clear(&prompt);
    assert_eq!((end.from.disk, end.reason), (6, None));
}

#[test]
fn a_store_that_does_not_work_is_known_from_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let close = |store: &SlotStore| store.close(Instant::now() + SOON).unwrap();
    let worker = worker_on(folder.path(), &config(8), LayoutOrder::BlockFirst, close);
    let stats = worker.manager.stats();
    assert!(
        matches!(&stats.states.disk, TierState::Off(why) if why.contains("closed")),
        "{:?}",
        stats.states.disk
    );
    worker.compute(&prompt(5, 6));
    assert!(!worker.manager.flush(SOON), "nothing can be made durable");
    let end = worker.load_after_clear(&prompt(5, 6));
    assert_eq!((end.from.host, end.reason), (6, None));
}

/// A mover without memory that waits, for the kinds that it is told to, until it is let go.
struct Slow {
    kinds: Mutex<Vec<MoveKind>>,
    /// Hangs beyond its time: what it leaves is pending until this ends.
    hold: Mutex<Vec<Receiver<()>>>,
}

impl Mover for Slow {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        if !self.kinds.lock().contains(&spec.kind) {
            return MoveReport::moved(spec.blocks.len(), 0);
        }
        std::thread::sleep(spec.time);
        let mut report = MoveReport::failed(spec.blocks.len(), "late");
        let hold = self.hold.lock().pop();
        report.pending = hold.map(|hold| {
            Pending::new(move || {
                let _ = hold.recv();
            })
        });
        report
    }
}

struct Slowed {
    manager: TierManager,
    tiers: RankTiers,
    device: BlockPool,
    mover: Arc<Slow>,
    held: Vec<Sender<()>>,
}

/// Tiers with one prompt of 4 blocks on disk alone and one of 4 in G2.
fn slowed() -> (Slowed, TokenSequence, TokenSequence) {
    let mut config = config(24);
    config.queues.onboard_time = Duration::from_millis(40);
    config.health = HealthConfig {
        late_max: 4,
        probe_every: Duration::from_millis(150),
        ..HealthConfig::default()
    };
    let host = BlockPool::accounting(24, PoolConfig::default());
    let disk = BlockPool::accounting(32, PoolConfig::default());
    let (cold, warm) = (prompt(5, 4), prompt(6, 4));
    for (pool, prompt) in [(&disk, &cold), (&host, &warm)] {
        let mut parent = None;
        for (slot, name) in (0..).zip(prompt.blocks()) {
            pool.restore([(BlockId(slot), *name, parent)]);
            parent = Some(name.sequence);
        }
    }
    let pools = TierPools {
        host,
        disk: Some(disk),
        remote: None,
    };
    let (hold, held): (Vec<_>, Vec<_>) = (0..8)
        .map(|_| {
            let (send, receive) = channel();
            (receive, send)
        })
        .unzip();
    let mover = Arc::new(Slow {
        kinds: Mutex::default(),
        hold: Mutex::new(hold),
    });
    let manager = TierManager::start_with(&config, pools, 1, mover.clone()).unwrap();
    let device = BlockPool::accounting(16, PoolConfig::default());
    let tiers = manager.attach_books(RANK, device.clone());
    let slowed = Slowed {
        manager,
        tiers,
        device,
        mover,
        held,
    };
    (slowed, cold, warm)
}

#[test]
fn a_disk_that_hangs_is_answered_in_time_left_alone_and_tried_again() {
    let (mut slowed, cold, warm) = slowed();
    slowed.mover.kinds.lock().push(MoveKind::DiskToHost);
    // How many moves of a request begin before its deadline is a matter of the machine.
    let mut requests = 0;
    while slowed.manager.stats().states.disk != TierState::Slow {
        requests += 1;
        assert!(requests <= 20, "{:?}", slowed.manager.stats());
        let found = slowed.tiers.find(cold.blocks());
        if found.is_empty() {
            continue;
        }
        assert_eq!(found.tiers().disk, 4);
        let targets = slowed.device.allocate(4).unwrap();
        let began = Instant::now();
        let end = onboard(&slowed.tiers, found, &targets, Duration::from_millis(60));
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{:?}",
            began.elapsed()
        );
        assert_eq!(end.loaded, 0);
        assert!(matches!(
            end.reason,
            Some(NotLoaded::Deadline | NotLoaded::Failed)
        ));
        // What is in G2 is loaded meanwhile.
        let found = slowed.tiers.find(warm.blocks());
        assert_eq!(onboard(&slowed.tiers, found, &targets, SOON).loaded, 4);
        wait_for(|| slowed.manager.stats().of(MoveKind::DiskToHost).running == 0);
    }
    assert_eq!(slowed.tiers.find(cold.blocks()).len(), 0);
    let stats = slowed.manager.stats();
    assert!(
        stats.unquiet_moves > 0 && stats.host.quarantined > 0,
        "{stats:?}"
    );
    // It answers again: what was kept out of use is free, and a probe turns it on.
    slowed.held.clear();
    slowed.mover.kinds.lock().clear();
    wait_for(|| slowed.manager.stats().unquiet_moves == 0);
    wait_for(|| slowed.tiers.find(cold.blocks()).len() == 4);
    let targets = slowed.device.allocate(4).unwrap();
    let found = slowed.tiers.find(cold.blocks());
    assert_eq!(onboard(&slowed.tiers, found, &targets, SOON).loaded, 4);
    assert_eq!(slowed.manager.stats().states.disk, TierState::On);
    assert_eq!(slowed.manager.stats().host.quarantined, 0);
}

#[test]
fn blocks_given_up_are_kept_until_no_byte_can_land() {
    let (mut slowed, _, warm) = slowed();
    slowed.mover.kinds.lock().push(MoveKind::HostToDevice);
    let found = slowed.tiers.find(warm.blocks());
    let targets = slowed.device.allocate(4).unwrap();
    let ids = targets.iter().map(MutableBlock::id).collect();
    let done = Box::new(|_| panic!("nobody is told after giving up"));
    let ticket = slowed.tiers.onboard(found, ids, SOON, done);
    wait_for(|| slowed.manager.stats().of(MoveKind::HostToDevice).running > 0);
    ticket.give_up(Box::new(targets));
    wait_for(|| slowed.manager.stats().unquiet_moves > 0);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(slowed.device.stats().active, 4);
    slowed.held.clear();
    wait_for(|| slowed.device.stats().active == 0);
}

#[test]
fn tickets_that_are_dropped_are_told_and_a_stop_tells_all() {
    let (slowed, cold, warm) = slowed();
    slowed.mover.kinds.lock().push(MoveKind::DiskToHost);
    let (tell, told) = channel();
    let targets = slowed.device.allocate(8).unwrap();
    let ids: Vec<BlockId> = targets.iter().map(MutableBlock::id).collect();
    let start = |prompt: &TokenSequence, ids: &[BlockId]| {
        let tell = tell.clone();
        let found = slowed.tiers.find(prompt.blocks());
        let done = Box::new(move |end: Onboarded| tell.send(end.reason).unwrap());
        slowed.tiers.onboard(found, ids.to_vec(), SOON, done)
    };
    drop(start(&cold, &ids[..4]));
    assert_eq!(told.recv_timeout(SOON).unwrap(), Some(NotLoaded::Cancelled));
    let ticket = start(&cold, &ids[..4]);
    assert!(slowed.manager.stop(SOON));
    assert_eq!(told.recv_timeout(SOON).unwrap(), Some(NotLoaded::Cancelled));
    let after = start(&warm, &ids[4..]);
    assert_eq!(told.recv_timeout(SOON).unwrap(), Some(NotLoaded::Cancelled));
    drop((ticket, after));
}

fn wait_for(ready: impl Fn() -> bool) {
    let until = Instant::now() + SOON;
    while !ready() {
        assert!(Instant::now() < until, "it takes too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A mover whose G2 lost a block, as that of a rank that started anew.
struct Forgetful(TokenBlock);

impl Mover for Forgetful {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        let mut report = MoveReport::moved(spec.blocks.len(), 0);
        if spec.kind == MoveKind::HostToDevice {
            for (outcome, block) in report.outcomes.iter_mut().zip(&spec.blocks) {
                if block.name == self.0 {
                    *outcome = BlockOutcome::Invalid(Invalid::Missing);
                }
            }
        }
        report
    }
}

#[test]
fn what_g2_turns_out_not_to_have_leaves_the_books() {
    let host = BlockPool::accounting(24, PoolConfig::default());
    let warm = prompt(6, 4);
    let mut parent = None;
    for (slot, name) in (0..).zip(warm.blocks()) {
        host.restore([(BlockId(slot), *name, parent)]);
        parent = Some(name.sequence);
    }
    let pools = TierPools {
        host,
        disk: None,
        remote: None,
    };
    let mover = Arc::new(Forgetful(warm.blocks()[1]));
    let manager = TierManager::start_with(&config(24), pools, 1, mover).unwrap();
    let device = BlockPool::accounting(16, PoolConfig::default());
    let tiers = manager.attach_books(RANK, device.clone());
    let targets = device.allocate(4).unwrap();
    let end = onboard(&tiers, tiers.find(warm.blocks()), &targets, SOON);
    assert_eq!((end.loaded, end.reason), (1, Some(NotLoaded::Invalid)));
    assert_eq!(manager.stats().invalid.host, 1);
    // The next request computes it, and is not promised it again.
    assert_eq!(tiers.find(warm.blocks()).len(), 1);
}
