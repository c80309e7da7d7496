//! Random operations on all tiers with a mover that holds real contents, checked after each one:
//! what is found is what a naive search finds, nothing held is overwritten, no name has a wrong
//! byte, queues keep their bounds, everything ends, and no block is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use blockplane_kvbm::{
    AdmissionKind, BlockPool, ImmutableBlock, MutableBlock, PoolConfig, WriteBudgetConfig,
    tier::{
        BlockOutcome, DiskConfig, Invalid, MoveKind, MoveSpec, MovedBlock, OnboardId, QueueConfig,
        RemoteConfig, RemoteIndex, SaveId, TierConfig, TierFault, TierMatch, TierPools, TierState,
        Tiers,
    },
};
use blockplane_protocol::{BlockHash, BlockId, DpRank, SaltHash, SequenceHash, Tier, TokenBlock};
use parking_lot::Mutex;
use proptest::{collection::vec, prelude::*};

const BLOCK_BYTES: u64 = 100;
const GARBAGE: u64 = 0xdead;
/// The tiers know nothing of its pool.
const EXTERNAL: DpRank = DpRank(2);

#[derive(Clone, Debug)]
struct Shape {
    device: u32,
    host: u32,
    disk: u32,
    remote: bool,
    admission: AdmissionKind,
    promote: bool,
    demote_ahead: bool,
    budget: Option<u64>,
    batch: u32,
    concurrent: u32,
    queue: u32,
}

#[derive(Clone, Debug)]
enum Op {
    /// A request: found, onboarded as far as there is room, the rest computed and offloaded.
    Compute {
        rank: u16,
        path: Vec<u8>,
        priority: Option<u32>,
    },
    Find {
        rank: u16,
        path: Vec<u8>,
    },
    /// The rank whose books its engine keeps: it computes blocks and has them saved.
    Save {
        path: Vec<u8>,
        /// So many leading ones it saved before.
        before: usize,
        priority: Option<u32>,
    },
    /// The same rank asks for what comes after the leading blocks that it has.
    FindAfter {
        path: Vec<u8>,
        before: usize,
    },
    Onboard {
        found: usize,
        millis: u64,
    },
    DropMatch(usize),
    Cancel(usize),
    Start,
    Finish {
        running: usize,
        end: End,
    },
    Quiet(usize),
    Corrupt(u32),
    ForgetHost(Vec<u8>),
    ForgetRemote(Vec<u8>),
    TurnOff(bool),
    Pass(u64),
}

#[derive(Clone, Copy, Debug)]
enum End {
    Moved,
    /// Every other block fails.
    Half,
    Failed,
    Bad,
    /// Fails, and bytes land until it is quiet.
    Unquiet,
}

fn op() -> impl Strategy<Value = Op> {
    let path = || vec(0..3u8, 1..7);
    let pick = || 0..64usize;
    let end = prop_oneof![
        12 => Just(End::Moved),
        2 => Just(End::Half),
        1 => Just(End::Failed),
        1 => Just(End::Bad),
        1 => Just(End::Unquiet),
    ];
    prop_oneof![
        6 => (0..2u16, path(), proptest::option::of(0..60u32))
            .prop_map(|(rank, path, priority)| Op::Compute { rank, path, priority }),
        5 => (0..2u16, path()).prop_map(|(rank, path)| Op::Find { rank, path }),
        5 => (path(), 0..3usize, proptest::option::of(0..60u32))
            .prop_map(|(path, before, priority)| Op::Save { path, before, priority }),
        4 => (path(), 0..3usize).prop_map(|(path, before)| Op::FindAfter { path, before }),
        5 => (pick(), prop_oneof![Just(0u64), 1..3000u64])
            .prop_map(|(found, millis)| Op::Onboard { found, millis }),
        2 => pick().prop_map(Op::DropMatch),
        1 => pick().prop_map(Op::Cancel),
        16 => Just(Op::Start),
        14 => (pick(), end).prop_map(|(running, end)| Op::Finish { running, end }),
        2 => pick().prop_map(Op::Quiet),
        1 => (0..16u32).prop_map(Op::Corrupt),
        1 => path().prop_map(Op::ForgetHost),
        1 => path().prop_map(Op::ForgetRemote),
        1 => proptest::bool::weighted(0.02).prop_map(Op::TurnOff),
        3 => prop_oneof![4 => 0..200u64, 1 => 0..20_000u64].prop_map(Op::Pass),
    ]
}

fn shape() -> impl Strategy<Value = Shape> {
    let admission = prop_oneof![
        Just(AdmissionKind::All),
        Just(AdmissionKind::Frequency),
        Just(AdmissionKind::SeenK { k: 2 }),
        Just(AdmissionKind::OnEvict),
    ];
    (
        (
            6..14u32,
            prop_oneof![1 => Just(0u32), 4 => 2..12u32],
            prop_oneof![1 => Just(0u32), 4 => 1..16u32],
            any::<bool>(),
            admission,
        ),
        (
            (any::<bool>(), any::<bool>()),
            proptest::option::of(200..2000u64),
            1..5u32,
            1..5u32,
            1..12u32,
        ),
    )
        .prop_map(
            |(
                (device, host, disk, remote, admission),
                ((promote, demote_ahead), budget, batch, concurrent, queue),
            )| Shape {
                device,
                host: if disk == 0 && !remote {
                    host.max(2)
                } else {
                    host
                },
                disk,
                remote,
                admission,
                promote,
                demote_ahead,
                budget,
                batch,
                concurrent,
                queue,
            },
        )
}

fn names(path: &[u8]) -> Vec<TokenBlock> {
    let mut parent = None;
    let chain = path.iter().map(|&token| {
        let block = BlockHash::of(&[token.into()], SaltHash::default());
        let sequence = SequenceHash::extend(parent, block);
        parent = Some(sequence);
        TokenBlock { block, sequence }
    });
    chain.collect()
}

#[derive(Default)]
struct Objects(Mutex<BTreeMap<SequenceHash, u64>>);

impl RemoteIndex for Objects {
    fn contains(&self, name: SequenceHash) -> bool {
        self.0.lock().contains_key(&name)
    }

    fn len(&self) -> usize {
        self.0.lock().len()
    }
}

/// One request's targets while they are loaded.
struct Loading {
    rank: usize,
    names: Vec<(SequenceHash, Tier)>,
    chain: Vec<TokenBlock>,
    parent: Option<SequenceHash>,
    targets: Vec<MutableBlock>,
}

struct Found {
    found: TierMatch,
    rank: usize,
    chain: Vec<TokenBlock>,
    parent: Option<SequenceHash>,
    held: Vec<(Tier, SequenceHash)>,
}

struct World {
    tiers: Tiers,
    config: TierConfig,
    /// The last one is of a rank that keeps its books itself.
    device: Vec<BlockPool>,
    /// What that rank holds until it is saved.
    saving: BTreeMap<SaveId, Vec<ImmutableBlock>>,
    host: BlockPool,
    disk: Option<BlockPool>,
    remote: Option<Arc<Objects>>,
    /// Contents by slot.
    g1: Vec<Vec<u64>>,
    g2: Vec<u64>,
    g3: Vec<u64>,
    corrupt: BTreeSet<u32>,
    now: Duration,
    found: Vec<Found>,
    loading: BTreeMap<OnboardId, Loading>,
    running: Vec<MoveSpec>,
    unquiet: Vec<(MoveSpec, Vec<MovedBlock>)>,
    /// Names that were taken away by force, or because what was stored was wrong.
    gone: BTreeSet<SequenceHash>,
}

impl World {
    fn new(shape: &Shape) -> Self {
        let queues = QueueConfig {
            offload_blocks_max: shape.queue,
            onboard_requests_max: 3,
            batch_blocks: shape.batch,
            concurrent: shape.concurrent,
            ..QueueConfig::default()
        };
        let disk_config = DiskConfig {
            admission: shape.admission.into(),
            budget: WriteBudgetConfig {
                bytes_per_s: shape.budget,
                ..WriteBudgetConfig::default()
            },
            ..DiskConfig::new(shape.disk)
        };
        let config = TierConfig {
            host_blocks: shape.host,
            bounce_blocks: 4,
            disk: (shape.disk > 0).then_some(disk_config),
            remote: shape.remote.then(RemoteConfig::default),
            queues,
            promote: shape.promote,
            demote_ahead: shape.demote_ahead,
            host_min_priority: 10,
            ..TierConfig::default()
        };
        let host = BlockPool::accounting(
            config.host_memory_blocks(),
            PoolConfig {
                prefix_caching: shape.host > 0,
                ..PoolConfig::default()
            },
        );
        let disk = BlockPool::accounting(shape.disk, PoolConfig::default());
        let disk = (shape.disk > 0).then_some(disk);
        let remote = shape.remote.then(Arc::<Objects>::default);
        let pools = TierPools {
            host: host.clone(),
            disk: disk.clone(),
            remote: remote.clone().map(|index| index as Arc<dyn RemoteIndex>),
        };
        let mut tiers = Tiers::new(&config, pools, BLOCK_BYTES).unwrap();
        let pool = || BlockPool::accounting(shape.device, PoolConfig::default());
        let device = vec![pool(), pool(), pool()];
        for (rank, pool) in (0..).zip(&device[..2]) {
            tiers.attach(DpRank(rank), pool.clone());
        }
        tiers.attach(EXTERNAL, pool());
        Self {
            tiers,
            saving: BTreeMap::new(),
            g1: vec![vec![GARBAGE; shape.device as usize]; 3],
            g2: vec![GARBAGE; config.host_memory_blocks() as usize],
            g3: vec![GARBAGE; shape.disk as usize],
            config,
            device,
            host,
            disk,
            remote,
            corrupt: BTreeSet::new(),
            now: Duration::ZERO,
            found: Vec::new(),
            loading: BTreeMap::new(),
            running: Vec::new(),
            unquiet: Vec::new(),
            gone: BTreeSet::new(),
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Compute {
                rank,
                path,
                priority,
            } => self.compute(*rank, &names(path), *priority),
            Op::Find { rank, path } => self.find(*rank, names(path)),
            Op::Save {
                path,
                before,
                priority,
            } => self.save(&names(path), *before, *priority),
            Op::FindAfter { path, before } => self.find_after(&names(path), *before),
            Op::Onboard { found, millis } => {
                if let Some(found) = take(&mut self.found, *found) {
                    self.onboard(found, Duration::from_millis(*millis));
                }
            }
            Op::DropMatch(at) => drop(take(&mut self.found, *at)),
            Op::Cancel(at) => {
                if let Some(id) = self.loading.keys().nth(*at).copied() {
                    self.tiers.cancel(self.now, id);
                }
            }
            Op::Start => self.start(),
            Op::Finish { running, end } => {
                if let Some(spec) = take(&mut self.running, *running) {
                    self.finish(spec, *end);
                }
            }
            Op::Quiet(at) => {
                if let Some((spec, blocks)) = take(&mut self.unquiet, *at) {
                    self.quiet(&spec, &blocks);
                }
            }
            Op::Corrupt(slot) => {
                if let Some(contents) = self.g3.get_mut(*slot as usize) {
                    *contents ^= 1;
                    self.corrupt.insert(*slot);
                }
            }
            Op::ForgetHost(path) => {
                let name = names(path).pop().unwrap().sequence;
                self.gone.insert(name);
                self.host.forget(name);
            }
            Op::ForgetRemote(path) => {
                let name = names(path).pop().unwrap().sequence;
                if let Some(remote) = &self.remote {
                    remote.0.lock().remove(&name);
                }
            }
            Op::TurnOff(really) => {
                if *really {
                    let fault = TierFault::Off("test".to_owned());
                    self.tiers.fault(self.now, Tier::Disk, fault);
                }
            }
            Op::Pass(millis) => {
                self.now += Duration::from_millis(*millis);
                self.tiers.tick(self.now);
            }
        }
        self.ended();
    }

    fn compute(&mut self, rank: u16, chain: &[TokenBlock], priority: Option<u32>) {
        let at = usize::from(rank);
        self.tiers.referenced(chain);
        let here = self.device[at].match_prefix(chain);
        let Ok(fresh) = self.device[at].allocate(chain.len() - here.len()) else {
            return;
        };
        let missing = &chain[here.len()..];
        let mut parent = here.last().map(ImmutableBlock::hash);
        let mut blocks = Vec::new();
        for (block, name) in fresh.into_iter().zip(missing) {
            self.g1[at][block.id().index()] = name.sequence.0;
            blocks.push(block.complete(*name, parent));
            parent = Some(name.sequence);
        }
        let held = BlockPool::register(blocks);
        self.tiers
            .offload(self.now, DpRank(rank.into()), missing, priority);
        drop((here, held));
    }

    fn find(&mut self, rank: u16, chain: Vec<TokenBlock>) {
        let expected = self.naive_find(rank, &chain);
        let found = self.tiers.find(self.now, DpRank(rank.into()), &chain);
        let got: Vec<_> = found.blocks().collect();
        let held = got.iter().map(|(name, tier)| (*tier, *name)).collect();
        let states = self.tiers.stats().states;
        if [states.disk, states.remote].iter().all(works) {
            assert_eq!(got, expected);
        }
        self.found.push(Found {
            found,
            rank: rank.into(),
            chain,
            parent: None,
            held,
        });
    }

    fn save(&mut self, chain: &[TokenBlock], before: usize, priority: Option<u32>) {
        let at = usize::from(u16::try_from(EXTERNAL.0).unwrap());
        let before = before.min(chain.len() - 1);
        let parents = std::iter::once(None).chain(chain.iter().map(|name| Some(name.sequence)));
        let chain: Vec<_> = chain.iter().zip(parents).skip(before).collect();
        let Ok(fresh) = self.device[at].allocate(chain.len()) else {
            return;
        };
        let mut blocks = Vec::new();
        let mut saved = Vec::new();
        for (block, (name, parent)) in fresh.into_iter().zip(&chain) {
            self.g1[at][block.id().index()] = name.sequence.0;
            saved.push((**name, block.id()));
            blocks.push(block.complete(**name, *parent));
        }
        // An engine that has a block of this name already frees this one when it is saved.
        let held = BlockPool::register(blocks);
        let saved: Vec<_> = saved
            .iter()
            .zip(&held)
            .map(|((name, _), block)| (*name, block.id()))
            .collect();
        let id = self
            .tiers
            .save(self.now, EXTERNAL, chain[0].1, &saved, priority);
        self.saving.insert(id, held);
    }

    fn find_after(&mut self, chain: &[TokenBlock], before: usize) {
        let before = before.min(chain.len() - 1);
        let parent = before.checked_sub(1).map(|at| chain[at].sequence);
        let chain = chain[before..].to_vec();
        let expected = self.naive_find(2, &chain);
        let found = self.tiers.find_after(self.now, EXTERNAL, parent, &chain);
        let got: Vec<_> = found.blocks().collect();
        assert!(got.iter().all(|(_, tier)| *tier != Tier::Device));
        let held = got.iter().map(|(name, tier)| (*tier, *name)).collect();
        let states = self.tiers.stats().states;
        if [states.disk, states.remote].iter().all(works) {
            assert_eq!(got, expected);
        }
        self.found.push(Found {
            found,
            rank: 2,
            chain,
            parent,
            held,
        });
    }

    fn naive_find(&self, rank: u16, chain: &[TokenBlock]) -> Vec<(SequenceHash, Tier)> {
        let tier = |name: SequenceHash| {
            let own = DpRank(rank.into()) != EXTERNAL;
            if own && self.device[usize::from(rank)].contains(name) {
                Some(Tier::Device)
            } else if self.host.contains(name) {
                Some(Tier::Host)
            } else if self.disk.as_ref().is_some_and(|disk| disk.contains(name)) {
                Some(Tier::Disk)
            } else {
                let there = self.remote.as_ref().is_some_and(|r| r.contains(name));
                there.then_some(Tier::Remote)
            }
        };
        let found = chain
            .iter()
            .map_while(|name| Some((name.sequence, tier(name.sequence)?)));
        found.collect()
    }

    fn onboard(&mut self, found: Found, time: Duration) {
        let Ok(targets) = self.device[found.rank].allocate(found.found.missing_targets()) else {
            return;
        };
        let ids = targets.iter().map(MutableBlock::id).collect();
        let loading = Loading {
            rank: found.rank,
            names: found.found.blocks().collect(),
            chain: found.chain,
            parent: found.parent,
            targets,
        };
        let rank = found.found.rank();
        let deadline = self.now + time;
        let id = self
            .tiers
            .onboard(self.now, rank, found.found, ids, deadline);
        self.loading.insert(id, loading);
    }

    fn start(&mut self) {
        if let Some(spec) = self.tiers.next_move(self.now) {
            assert!(!spec.blocks.is_empty());
            assert!(spec.blocks.len() <= self.config.queues.batch_blocks as usize);
            let others = self
                .running
                .iter()
                .chain(self.unquiet.iter().map(|(spec, _)| spec));
            for other in others {
                let both = [(&spec, other), (other, &spec)];
                for (one, other) in both {
                    let written: BTreeSet<Place> = places(one).filter_map(|[_, to]| to).collect();
                    let mut used = places(other).flatten().flatten();
                    let clash = used.find(|place| written.contains(place));
                    assert_eq!(clash, None, "{one:?} overwrites what {other:?} uses");
                }
            }
            self.running.push(spec);
            assert!(self.running.len() <= self.config.queues.concurrent as usize);
        }
    }

    fn finish(&mut self, spec: MoveSpec, end: End) {
        let outcomes: Vec<BlockOutcome> = (0..)
            .zip(&spec.blocks)
            .map(|(i, block)| match end {
                End::Moved => self.copy(&spec, block),
                End::Half if i % 2 == 0 => self.copy(&spec, block),
                End::Bad => BlockOutcome::Bad("bad".to_owned()),
                End::Half | End::Failed | End::Unquiet => BlockOutcome::Failed("no".to_owned()),
            })
            .collect();
        let quiet = !matches!(end, End::Unquiet);
        for (block, outcome) in spec.blocks.iter().zip(&outcomes) {
            if let BlockOutcome::Invalid(_) | BlockOutcome::Bad(_) = outcome {
                self.gone.insert(block.name.sequence);
            }
        }
        self.tiers.moved(self.now, spec.id, outcomes, quiet);
        if !quiet {
            let blocks = spec.blocks.clone();
            self.unquiet.push((spec, blocks));
        }
    }

    /// Copies what is there: a block that was not kept as it was is a wrong copy.
    fn copy(&mut self, spec: &MoveSpec, block: &MovedBlock) -> BlockOutcome {
        let (from, to) = (block.from as usize, block.to as usize);
        let rank = spec.rank.0 as usize;
        let name = block.name.sequence;
        match spec.kind {
            MoveKind::DeviceToHost => self.g2[to] = self.g1[rank][from],
            MoveKind::HostToDevice => self.g1[rank][to] = self.g2[from],
            MoveKind::HostToDisk => {
                self.g3[to] = self.g2[from];
                self.corrupt.remove(&block.to);
            }
            MoveKind::DiskToHost => {
                if self.g3[from] != name.0 {
                    assert!(self.corrupt.contains(&block.from), "a slot was overwritten");
                    return BlockOutcome::Invalid(Invalid::Checksum);
                }
                self.g2[to] = self.g3[from];
            }
            MoveKind::HostToRemote => {
                let remote = self.remote.as_ref().unwrap();
                remote.0.lock().insert(name, self.g2[from]);
            }
            MoveKind::RemoteToHost => {
                let found = self.remote.as_ref().unwrap().0.lock().get(&name).copied();
                let Some(contents) = found else {
                    return BlockOutcome::Invalid(Invalid::Missing);
                };
                self.g2[to] = contents;
            }
        }
        BlockOutcome::Moved
    }

    /// The last bytes of a move that was given up land, then no more.
    fn quiet(&mut self, spec: &MoveSpec, blocks: &[MovedBlock]) {
        for block in blocks {
            let to = block.to as usize;
            match spec.kind {
                MoveKind::HostToDevice => self.g1[spec.rank.0 as usize][to] = GARBAGE,
                MoveKind::HostToDisk => self.g3[to] = GARBAGE,
                MoveKind::DeviceToHost | MoveKind::DiskToHost | MoveKind::RemoteToHost => {
                    self.g2[to] = GARBAGE;
                }
                MoveKind::HostToRemote => {}
            }
        }
        self.tiers.quiet(self.now, spec.id);
    }

    /// Takes the ends of saves and onboards: what is loaded is used, the rest given back.
    fn ended(&mut self) {
        for (id, end) in self.tiers.saved() {
            let held = self.saving.remove(&id).expect("it ends once");
            assert_eq!(end.copied + end.present + end.dropped, held.len());
            for block in held {
                // From now on its owner does with it what it likes.
                self.device[2].forget(block.hash());
                let id = block.id();
                drop(block);
                let mut others = self.saving.values().flatten();
                if others.all(|other| other.id() != id) {
                    self.g1[2][id.index()] = GARBAGE;
                }
            }
        }
        for (id, end) in self.tiers.finished() {
            let loading = self.loading.remove(&id).expect("it ends once");
            assert_eq!(end.reason.is_none(), end.loaded == loading.names.len());
            assert!(end.waited <= self.now);
            let ids: Vec<BlockId> = loading.targets.iter().map(MutableBlock::id).collect();
            let lower = |(_, tier): &&(SequenceHash, Tier)| *tier != Tier::Device;
            let loaded = loading.names[..end.loaded].iter().filter(lower).count();
            assert_eq!(end.not_loaded, ids[loaded..]);
            let mut targets = loading.targets.into_iter();
            let mut parent = loading.parent;
            for ((name, tier), block) in loading.names.iter().zip(&loading.chain).take(end.loaded) {
                if *tier != Tier::Device {
                    let target = targets.next().unwrap();
                    assert_eq!(self.g1[loading.rank][target.id().index()], name.0);
                    drop(target.complete(*block, parent).register());
                }
                parent = Some(*name);
            }
        }
    }

    /// What must hold between any two operations.
    fn check(&self) {
        let stats = self.tiers.stats();
        let queues = &self.config.queues;
        let max = queues.offload_blocks_max as usize;
        // Offloads and saves have a queue each.
        assert!(stats.offload_queue_blocks <= 2 * max);
        assert!(stats.disk_queue_blocks <= max && stats.remote_queue_blocks <= max);
        assert!(stats.onboards <= queues.onboard_requests_max as usize);
        for found in &self.found {
            for (tier, name) in &found.held {
                let pool = match tier {
                    Tier::Device => Some(&self.device[found.rank]),
                    Tier::Host => Some(&self.host),
                    Tier::Disk => self.disk.as_ref(),
                    Tier::Remote => None,
                };
                let there = pool.is_none_or(|pool| pool.contains(*name));
                assert!(there || self.gone.contains(name), "a held block is gone");
            }
        }
        for path in all_paths() {
            let name = names(&path).pop().unwrap();
            for (pool, contents) in self.device.iter().zip(&self.g1) {
                check_contents(pool, contents, name, &BTreeSet::new());
            }
            check_contents(&self.host, &self.g2, name, &BTreeSet::new());
            if let Some(disk) = &self.disk {
                check_contents(disk, &self.g3, name, &self.corrupt);
            }
        }
    }

    /// Lets everything end and looks for blocks that were lost.
    fn drain(&mut self) {
        self.found.clear();
        for (spec, blocks) in std::mem::take(&mut self.unquiet) {
            self.quiet(&spec, &blocks);
        }
        for _ in 0..10_000 {
            self.start();
            self.ended();
            match self.running.pop() {
                Some(spec) => self.finish(spec, End::Moved),
                None if self.tiers.idle() => break,
                None => {
                    self.now += Duration::from_millis(100);
                    self.tiers.tick(self.now);
                }
            }
        }
        self.ended();
        assert!(self.tiers.idle(), "{:?}", self.tiers.stats());
        assert!(self.loading.is_empty() && self.saving.is_empty());
        for pool in self.device.iter().chain([&self.host]) {
            let stats = pool.stats();
            assert_eq!(stats.free + stats.cached, stats.total, "{stats:?}");
        }
        if let Some(disk) = &self.disk {
            let stats = disk.stats();
            let aside = self.tiers.stats().disk_quarantined_blocks;
            assert!(aside <= 1);
            assert_eq!((stats.active, stats.quarantined), (aside, 0), "{stats:?}");
        }
    }
}

fn works(state: &TierState) -> bool {
    matches!(state, TierState::On | TierState::Shrunk { .. })
}

fn check_contents(pool: &BlockPool, contents: &[u64], name: TokenBlock, except: &BTreeSet<u32>) {
    for block in pool.match_prefix(&[name]) {
        let right = contents[block.id().index()] == name.sequence.0;
        assert!(
            right || except.contains(&block.id().0),
            "a wrong byte under a name"
        );
    }
}

/// Where bytes are: the tier, the rank of a device, the block or slot.
type Place = (Tier, u32, u32);

/// Where each block of a move comes from and goes to.
fn places(spec: &MoveSpec) -> impl Iterator<Item = [Option<Place>; 2]> {
    let device = |id: u32| Some((Tier::Device, spec.rank.0, id));
    let below = |tier: Tier| move |id: u32| Some((tier, 0, id));
    let (host, disk) = (below(Tier::Host), below(Tier::Disk));
    spec.blocks.iter().map(move |block| {
        let MovedBlock { from, to, .. } = *block;
        match spec.kind {
            MoveKind::DeviceToHost => [device(from), host(to)],
            MoveKind::HostToDevice => [host(from), device(to)],
            MoveKind::HostToDisk => [host(from), disk(to)],
            MoveKind::DiskToHost => [disk(from), host(to)],
            MoveKind::HostToRemote => [host(from), None],
            MoveKind::RemoteToHost => [None, host(to)],
        }
    })
}

fn take<T>(list: &mut Vec<T>, at: usize) -> Option<T> {
    (!list.is_empty()).then(|| list.remove(at % list.len()))
}

/// A part of all names, enough to meet those that are used most.
fn all_paths() -> impl Iterator<Item = Vec<u8>> {
    let one = (0..3u8).map(|a| vec![a]);
    let two = (0..9u8).map(|i| vec![i / 3, i % 3]);
    let three = (0..27u8).map(|i| vec![i / 9, i / 3 % 3, i % 3]);
    one.chain(two).chain(three)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn all_tiers_agree_with_what_is_true(shape in shape(), ops in vec(op(), 1..160)) {
        let mut world = World::new(&shape);
        for op in &ops {
            world.apply(op);
            world.check();
        }
        world.drain();
    }
}

/// A slot of G3 is held by the copy that reads it, also when nobody waits for the copy any more: all
/// other slots are overwritten meanwhile, several times.
#[test]
fn a_slot_is_not_overwritten_while_it_is_read_for_nobody() {
    let shape = Shape {
        device: 6,
        host: 4,
        disk: 3,
        remote: false,
        admission: AdmissionKind::All,
        promote: true,
        demote_ahead: true,
        budget: None,
        batch: 1,
        concurrent: 4,
        queue: 8,
    };
    let mut world = World::new(&shape);
    let run = |world: &mut World| {
        loop {
            world.start();
            world.ended();
            let other = |spec: &MoveSpec| spec.kind != MoveKind::DiskToHost;
            let Some(at) = world.running.iter().position(other) else {
                break;
            };
            let spec = world.running.remove(at);
            world.finish(spec, End::Moved);
            world.check();
        }
    };
    let first = names(&[0]);
    world.compute(0, &first, None);
    run(&mut world);
    world.apply(&Op::ForgetHost(vec![0]));
    world.find(1, first.clone());
    let found = world.found.remove(0);
    assert_eq!(found.held, [(Tier::Disk, first[0].sequence)]);
    world.onboard(found, Duration::from_secs(60));
    world.start();
    assert_eq!(world.running[0].kind, MoveKind::DiskToHost);
    world.apply(&Op::Cancel(0));
    assert!(world.loading.is_empty());
    let written = |world: &World| world.tiers.stats().disk_bytes_written / BLOCK_BYTES;
    let before = written(&world);
    for path in [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]] {
        world.compute(0, &names(&path), None);
        run(&mut world);
    }
    let stats = world.tiers.stats();
    assert!(written(&world) > before + 3, "{before}: {stats:?}");
    let read = world.running.remove(0);
    assert_eq!(read.kind, MoveKind::DiskToHost);
    // Fails if the slot has another block now.
    world.finish(read, End::Moved);
    world.check();
    world.drain();
}
