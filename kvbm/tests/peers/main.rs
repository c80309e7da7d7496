//! Blocks from the G2 of other workers: bytes, stale names, strangers, and lenders that die.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod process;

use std::{
    sync::{Arc, mpsc::channel},
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    BlockPool, Fingerprint, KvArena, MoveKind, MoveReport, MoveSpec, Mover, MutableBlock,
    ObjectTier, ObjectTierConfig, PeerParts, PeerTier, PeerTierConfig, PoolConfig, RankTiers,
    RemoteIndex, Remotes, TierConfig, TierManager, TierParts,
    arena::ArenaPlace,
    host_arena,
    tier::{BlockOutcome, Invalid, MoveId, MovedBlock, RemoteConfig},
};
use blockplane_protocol::{
    DType, DpRank, KvLayout, LayoutOrder, SaltHash, TokenBlock, TokenSequence,
};
use blockplane_transfer::{Agent, AgentConfig, FaultConfig, ObjectConfig, ObjectLocation};

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

/// Contents of one layer of a block, different for each.
fn contents(name: TokenBlock, layer: u32, bytes: usize) -> Vec<u8> {
    let seed = name.sequence.0 ^ u64::from(layer);
    (0..bytes as u64)
        .map(|i| seed.wrapping_mul(i + 3).to_le_bytes()[2])
        .collect()
}

fn fill(arena: &KvArena, block: u32, name: TokenBlock) {
    for layer in 0..arena.layout().layers {
        let bytes = contents(name, layer, arena.layout().layer_bytes());
        let at = arena.transfer_layout().run_offset(block, layer).unwrap();
        arena.registration().write_at(at, &bytes).unwrap();
    }
}

fn holds(arena: &KvArena, block: u32, name: TokenBlock) -> bool {
    (0..arena.layout().layers).all(|layer| {
        let expected = contents(name, layer, arena.layout().layer_bytes());
        let at = arena.transfer_layout().run_offset(block, layer).unwrap();
        let mut found = vec![0; expected.len()];
        arena.registration().read_at(at, &mut found).unwrap();
        found == expected
    })
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A worker: an engine's G1 on its own agent, G2, and its peers.
struct Worker {
    peers: Arc<PeerTier>,
    manager: TierManager,
    tiers: RankTiers,
    pool: BlockPool,
    arena: Arc<KvArena>,
    host: Arc<KvArena>,
    control: Agent,
    agents: [Agent; 2],
}

impl Worker {
    fn start(name: &str, model: u64, config: PeerTierConfig) -> Self {
        Self::start_with(name, model, config, None)
    }

    /// On links that lose, delay and break what is sent.
    fn start_with(
        name: &str,
        model: u64,
        config: PeerTierConfig,
        faults: Option<&FaultConfig>,
    ) -> Self {
        let agent = |kind: &str| {
            let mut config = AgentConfig::new(format!("{name}-{kind}"));
            config.faults = faults.filter(|_| kind != "engine").cloned();
            Agent::new(config).unwrap()
        };
        let (engine, own, control) = (agent("engine"), agent("kvbm"), agent("control"));
        let layout = layout(LayoutOrder::LayerFirst);
        let arena = KvArena::allocate(&engine, layout.clone(), 16, "kv").unwrap();
        let pool = BlockPool::new(Arc::clone(&arena), PoolConfig::default());
        let tiers = TierConfig {
            host_blocks: 32,
            remote: Some(RemoteConfig {
                write_through: false,
            }),
            ..TierConfig::default()
        };
        let host = host_arena(&own, &layout, &tiers, ArenaPlace::Host).unwrap();
        let parts = PeerParts {
            control: control.clone(),
            agent: own.clone(),
            host: Arc::clone(&host),
            fingerprint: Fingerprint::of(model, &layout, 0, 1),
        };
        let peers = PeerTier::start(parts, config).unwrap();
        let parts = TierParts {
            host: Arc::clone(&host),
            agent: own.clone(),
            store: None,
            remote: Some((Arc::clone(&peers) as _, Arc::clone(&peers) as _)),
            hubs: Vec::new(),
        };
        let manager = TierManager::start(&tiers, parts).unwrap();
        peers.lend(manager.host()).unwrap();
        let tiers = manager.attach(RANK, &engine, &pool).unwrap();
        Self {
            peers,
            manager,
            tiers,
            pool,
            arena,
            host,
            control,
            agents: [engine, own],
        }
    }

    fn meets(&self, other: &Self) {
        self.peers.add_peer(&other.control.metadata()).unwrap();
        other.peers.add_peer(&self.control.metadata()).unwrap();
    }

    /// What an engine does with a prompt: fills blocks, makes them readable, offers them.
    fn compute(&self, prompt: &TokenSequence) {
        let blocks = self.pool.allocate(prompt.blocks().len()).unwrap();
        let mut parent = None;
        let mut complete = Vec::new();
        for (block, name) in blocks.into_iter().zip(prompt.blocks()) {
            fill(&self.arena, block.id().0, *name);
            complete.push(block.complete(*name, parent));
            parent = Some(name.sequence);
        }
        let held = BlockPool::register(complete);
        assert!(self.tiers.offload(prompt.blocks(), None));
        drop(held);
        assert!(self.manager.flush(SOON));
    }

    fn knows(&self, prompt: &TokenSequence) -> bool {
        let mut names = prompt.blocks().iter();
        names.all(|name| self.peers.contains(name.sequence))
    }

    /// Loads a prompt into G1: how many of its blocks came.
    fn load(&self, prompt: &TokenSequence) -> usize {
        let found = self.tiers.find(prompt.blocks());
        let targets: Vec<MutableBlock> = self.pool.allocate(found.missing_targets()).unwrap();
        let ids = targets.iter().map(|block| block.id()).collect();
        let (to, done) = channel();
        let ticket = self.tiers.onboard(
            found,
            ids,
            Duration::from_secs(5),
            Box::new(move |onboarded| drop(to.send(onboarded))),
        );
        let onboarded = done.recv_timeout(SOON).unwrap();
        drop(ticket);
        for (block, name) in targets.iter().zip(&prompt.blocks()[..onboarded.loaded]) {
            assert!(holds(&self.arena, block.id().0, *name), "wrong bytes");
        }
        onboarded.loaded
    }
}

/// A read of `names` into blocks `first..` of G2.
fn spec(names: &[TokenBlock], first: u32, time: Duration) -> MoveSpec {
    let blocks = names.iter().zip(first..);
    MoveSpec {
        id: MoveId(1),
        kind: MoveKind::RemoteToHost,
        rank: RANK,
        blocks: blocks
            .map(|(name, id)| MovedBlock {
                from: id,
                to: id,
                name: *name,
                parent: None,
            })
            .collect(),
        time,
    }
}

#[test]
fn blocks_of_two_peers_become_one_prompt() {
    let start = |name: &str| Worker::start(name, 7, PeerTierConfig::default());
    let (a, b, c) = (start("two-a"), start("two-b"), start("two-c"));
    let prompt = prompt(1, 10);
    a.compute(&prompt);
    c.meets(&a);
    c.meets(&b);
    eventually("C knows what A has", || c.knows(&prompt));
    assert_eq!(c.load(&prompt), 10);
    assert_eq!((c.peers.stats().read, a.peers.stats().lent), (10, 10));
    eventually("all is given back", || a.peers.stats().held == 0);

    // What C read is in its G2 now, and B reads it from there: A is not among its peers.
    eventually("B knows what C has", || b.knows(&prompt));
    assert_eq!(b.load(&prompt), 10);
    assert_eq!(c.peers.stats().lent, 10);

    // What goes from A's G2 is not found there any more.
    a.manager.host().clear();
    c.manager.host().clear();
    eventually("B forgets it", || b.peers.is_empty());
    assert!(c.peers.remove_peer("two-a-control"));
    assert_eq!(c.peers.stats().peers, 1);
}

#[test]
fn a_block_that_is_gone_meanwhile_is_computed() {
    let slow = PeerTierConfig {
        announce_every: Duration::from_secs(60),
        ..PeerTierConfig::default()
    };
    let a = Worker::start("stale-a", 7, slow);
    let b = Worker::start("stale-b", 7, PeerTierConfig::default());
    let prompt = prompt(2, 8);
    a.compute(&prompt);
    b.meets(&a);
    eventually("B knows what A has", || b.knows(&prompt));
    for name in &prompt.blocks()[5..] {
        assert!(a.manager.host().forget(name.sequence));
    }
    assert!(b.knows(&prompt), "it was not told yet");
    assert_eq!(b.load(&prompt), 5);
    assert_eq!(b.peers.stats().missing, 3);
    assert!(!b.knows(&prompt), "it is not asked for again");
}

#[test]
fn strangers_exchange_nothing() {
    let a = Worker::start("strange-a", 7, PeerTierConfig::default());
    let b = Worker::start("strange-b", 8, PeerTierConfig::default());
    let prompt = prompt(3, 4);
    a.compute(&prompt);
    b.meets(&a);
    eventually("each refuses the other", || {
        a.peers.stats().refused_peers == 1 && b.peers.stats().refused_peers == 1
    });
    assert_eq!((b.peers.len(), b.peers.stats().usable), (0, 0));
    assert_eq!(b.load(&prompt), 0);
}

#[test]
fn wrong_bytes_are_noticed() {
    let a = Worker::start("wrong-a", 7, PeerTierConfig::default());
    let b = Worker::start("wrong-b", 7, PeerTierConfig::default());
    let prompt = prompt(4, 6);
    a.compute(&prompt);
    b.meets(&a);
    eventually("B knows what A has", || b.knows(&prompt));
    // A twin of another name: the lender has no such block.
    let mut names = prompt.blocks().to_vec();
    names[2].block.0 ^= 1;
    let report: MoveReport = b.peers.run(&spec(&names, 0, SOON));
    let expected = |at| match at {
        2 => BlockOutcome::Invalid(Invalid::Missing),
        _ => BlockOutcome::Moved,
    };
    assert_eq!(report.outcomes, (0..6).map(expected).collect::<Vec<_>>());
    assert!(holds(&b.host, 5, names[5]));
    // Other directions are not for peers.
    let report = b.peers.run(&MoveSpec {
        kind: MoveKind::HostToRemote,
        ..spec(&names, 0, SOON)
    });
    assert!(
        matches!(&report.outcomes[0], BlockOutcome::Failed(why) if why.contains("host-to-remote"))
    );
}

#[test]
fn what_is_lent_is_bounded_and_ends() {
    let few = PeerTierConfig {
        lent_blocks_max: 8,
        ..PeerTierConfig::default()
    };
    let a = Worker::start("bound-a", 7, few);
    let b = Worker::start("bound-b", 7, PeerTierConfig::default());
    let prompt = prompt(5, 6);
    a.compute(&prompt);
    b.meets(&a);
    eventually("B knows what A has", || b.knows(&prompt));
    let names = prompt.blocks();
    let report = b.peers.run(&spec(names, 0, SOON));
    assert!(
        matches!(&report.outcomes[0], BlockOutcome::Failed(why) if why.contains("8 that can be lent"))
    );
    assert_eq!(a.peers.stats().refused, 1);
    let report = b.peers.run(&spec(&names[..4], 0, SOON));
    assert_eq!(report.outcomes, vec![BlockOutcome::Moved; 4]);
    eventually("all is given back", || a.peers.stats().held == 0);
}

#[test]
fn a_worker_that_comes_back_is_found_again() {
    let b = Worker::start("back-b", 7, PeerTierConfig::default());
    let prompt = prompt(6, 4);
    for _ in 0..2 {
        let a = Worker::start("back-a", 7, PeerTierConfig::default());
        a.compute(&prompt);
        b.meets(&a);
        eventually("B knows what A has", || b.knows(&prompt));
        let report = b.peers.run(&spec(prompt.blocks(), 0, SOON));
        assert_eq!(report.outcomes, vec![BlockOutcome::Moved; 4]);
        drop(a);
        eventually("its names go with it", || b.peers.is_empty());
    }
}

#[test]
fn what_peers_do_not_have_comes_from_objects() {
    let slow = PeerTierConfig {
        announce_every: Duration::from_secs(60),
        ..PeerTierConfig::default()
    };
    let a = Worker::start("both-a", 7, slow);
    let b = Worker::start("both-b", 7, PeerTierConfig::default());
    let prompt = prompt(8, 8);
    let names = prompt.blocks();
    a.compute(&prompt);
    b.meets(&a);
    eventually("B knows what A has", || b.knows(&prompt));

    let own = &b.agents[1];
    let store = ObjectConfig::new(ObjectLocation::Memory);
    let objects = ObjectTier::open(
        own,
        own.open_objects(&store).unwrap(),
        Arc::clone(&b.host),
        Fingerprint::of(7, b.host.layout(), 0, 1),
        ObjectTierConfig::default(),
    )
    .unwrap();
    for (block, name) in (20..).zip(&names[4..]) {
        fill(&b.host, block, *name);
    }
    let remotes = Remotes::new(Arc::clone(&b.peers), Arc::clone(&objects));
    let write = MoveSpec {
        kind: MoveKind::HostToRemote,
        ..spec(&names[4..], 20, SOON)
    };
    assert!(!remotes.keeps(names[4].sequence), "a peer may lose it");
    let written = remotes.run(&write);
    assert_eq!(written.outcomes, vec![BlockOutcome::Moved; 4]);
    assert!(remotes.keeps(names[4].sequence));
    assert!(remotes.contains(names[0].sequence) && !remotes.keeps(names[0].sequence));

    // Two blocks are gone at A, which has not said so.
    for name in &names[6..] {
        assert!(a.manager.host().forget(name.sequence));
    }
    let report = remotes.run(&spec(names, 0, SOON));
    assert_eq!(report.outcomes, vec![BlockOutcome::Moved; 8]);
    for (block, name) in (0..).zip(names) {
        assert!(holds(&b.host, block, *name), "wrong bytes");
    }
    assert_eq!((b.peers.stats().read, objects.stats().read), (6, 2));
}

#[test]
fn bad_settings_are_named() {
    let worker = Worker::start("settings", 7, PeerTierConfig::default());
    let start = |config| {
        let parts = PeerParts {
            control: worker.control.clone(),
            agent: worker.agents[1].clone(),
            host: Arc::clone(&worker.host),
            fingerprint: Fingerprint::of(7, worker.host.layout(), 0, 1),
        };
        PeerTier::start(parts, config)
            .map(drop)
            .unwrap_err()
            .to_string()
    };
    let config = PeerTierConfig {
        lease_wait: Duration::ZERO,
        ..PeerTierConfig::default()
    };
    assert_eq!(start(config), "lease_wait is 0; accepted: more than 0");
    let foreign = worker.peers.lend(worker.pool.clone()).unwrap_err();
    assert!(foreign.to_string().contains("not that of this tier"));
    let none = PeerTierConfig {
        peers_max: 0,
        ..PeerTierConfig::default()
    };
    let lonely = Worker::start("lonely", 7, none);
    let refused = lonely
        .peers
        .add_peer(&worker.control.metadata())
        .unwrap_err();
    assert!(refused.to_string().contains("at most 0"), "{refused}");
}

#[test]
fn bad_links_cost_blocks_and_never_bytes() {
    let quick = PeerTierConfig {
        lease_time: Duration::from_secs(1),
        ..PeerTierConfig::default()
    };
    let time = Duration::from_millis(300);
    let (mut moved, mut lost) = (0, 0);
    for seed in 0..12 {
        let mut faults = FaultConfig::seeded(seed);
        faults.loss = 0.15;
        faults.delay = 0.4;
        faults.delay_max = Duration::from_millis(20);
        faults.torn = 0.1;
        faults.disconnect = 0.01;
        let start =
            |name: &str| Worker::start_with(&format!("{name}-{seed}"), 7, quick, Some(&faults));
        let (a, b) = (start("bad-a"), start("bad-b"));
        let prompt = prompt(10, 8);
        let names = prompt.blocks();
        // Offloading needs a good link inside the worker: G2 is filled here.
        let pool = a.manager.host();
        let blocks = pool.allocate(names.len()).unwrap().into_iter().zip(names);
        let mut parent = None;
        for (block, name) in blocks {
            fill(&a.host, block.id().0, *name);
            drop(block.complete(*name, parent).register());
            parent = Some(name.sequence);
        }
        b.meets(&a);
        for turn in 0..8 {
            if turn % 3 == 0 {
                eventually("B knows what A has", || b.knows(&prompt));
            }
            let started = Instant::now();
            let report = b.peers.run(&spec(names, 0, time));
            assert!(started.elapsed() < time + Duration::from_millis(800));
            for ((block, name), outcome) in (0..).zip(names).zip(&report.outcomes) {
                match outcome {
                    BlockOutcome::Moved => {
                        moved += 1;
                        assert!(holds(&b.host, block, *name), "seed {seed}: wrong bytes");
                    }
                    BlockOutcome::Invalid(Invalid::Missing) | BlockOutcome::Failed(_) => lost += 1,
                    other => panic!("seed {seed}: {other:?}"),
                }
            }
            if let Some(pending) = report.pending {
                pending.wait();
            }
        }
        eventually("all is given back", || a.peers.stats().held == 0);
    }
    assert!(moved > 100 && lost > 10, "{moved} moved, {lost} lost");
}
