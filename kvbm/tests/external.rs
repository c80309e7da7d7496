//! The tiers below an engine that keeps the books of its G1: real bytes from memory in several
//! regions, lookups through a socket, a restart, damage on the disk, and loads that fail.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::{path::Path, time::Duration};

use blockplane_kvbm::{
    AdmissionKind, ExternalConfig, ExternalRank, Fingerprint, LookupClient, LookupRequest,
    LookupServer, SlotStore, SlotStoreConfig,
    arena::ArenaPlace,
    external::{Ended, Lookup},
    host_arena,
    store::StoreLocation,
    tier::{
        AttachError, DiskConfig, ExternalMemory, ExternalSegment, NotLoaded, Onboarded, Saved,
        TierConfig, TierManager, TierParts,
    },
};
use blockplane_protocol::{BlockId, DType, DpRank, KvLayout, SaltHash, TokenBlock, TokenSequence};
use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockLayout, Registration, RemoteAccess,
};

const SOON: Duration = Duration::from_secs(20);
const BLOCKS: u32 = 12;
/// Bytes of the keys (or values) of one layer of a block.
const RUN: u64 = 96;

/// Two layers: keys and values of all blocks apart in the first region, together in the second.
fn layouts() -> [BlockLayout; 2] {
    let apart = BlockLayout {
        offset: 64,
        blocks: BLOCKS,
        block_stride: RUN,
        layers: 2,
        layer_stride: RUN * u64::from(BLOCKS),
        run_bytes: RUN,
    };
    let together = BlockLayout {
        offset: 0,
        blocks: BLOCKS,
        block_stride: 3 * RUN,
        layers: 1,
        layer_stride: 2 * RUN,
        run_bytes: 2 * RUN,
    };
    [apart, together]
}

/// Blocks as long as those of [`layouts`].
fn layout() -> KvLayout {
    KvLayout {
        planes: 1,
        ..KvLayout::dense(2, 1, 24, 4, DType::F16)
    }
}

struct Engine {
    regions: Vec<Registration>,
    rank: ExternalRank,
    manager: TierManager,
    _agents: [Agent; 2],
}

fn memory(agent: &Agent) -> ExternalMemory {
    let segments = layouts().map(|layout| {
        let bytes = usize::try_from(3 * RUN * u64::from(BLOCKS)).unwrap();
        let arena = ArenaConfig::new(bytes, "kv").with_access(RemoteAccess::WindowOnly);
        ExternalSegment {
            registration: agent.allocate(arena).unwrap(),
            layout,
        }
    });
    ExternalMemory {
        segments: segments.into(),
    }
}

fn engine(folder: &Path, external: ExternalConfig) -> Engine {
    let config = TierConfig {
        host_blocks: 6,
        disk: Some(DiskConfig {
            admission: AdmissionKind::All.into(),
            ..DiskConfig::new(32)
        }),
        ..TierConfig::default()
    };
    let own = Agent::new(AgentConfig::new("engine")).unwrap();
    let tiers = Agent::new(AgentConfig::new("kvbm")).unwrap();
    let bytes = layout().block_bytes() as u64;
    assert_eq!(bytes, 4 * RUN);
    let location = StoreLocation::Folder(folder.to_owned());
    let fingerprint = Fingerprint::of(7, &layout(), 0, 1);
    let store = SlotStoreConfig::new(location, 32, bytes, fingerprint);
    let parts = TierParts {
        host: host_arena(&tiers, &layout(), &config, ArenaPlace::Host).unwrap(),
        store: Some(SlotStore::open(&tiers, &store).unwrap()),
        agent: tiers.clone(),
        remote: None,
        hubs: Vec::new(),
    };
    let manager = TierManager::start(&config, parts).unwrap();
    let memory = memory(&own);
    let attached = manager.attach_external(DpRank(0), &own, &memory).unwrap();
    Engine {
        regions: memory
            .segments
            .into_iter()
            .map(|segment| segment.registration)
            .collect(),
        rank: ExternalRank::new(attached, external),
        manager,
        _agents: [own, tiers],
    }
}

fn prompt(seed: u32, blocks: u32) -> Vec<TokenBlock> {
    let tokens: Vec<u32> = (0..blocks * 4).map(|i| seed * 1000 + i).collect();
    let sequence = TokenSequence::from_tokens(&tokens, 4, SaltHash::default());
    sequence.blocks().to_vec()
}

fn request(names: &[TokenBlock], from: usize) -> LookupRequest {
    LookupRequest {
        parent: from.checked_sub(1).map(|before| names[before].sequence),
        names: names[from..].to_vec(),
        ..LookupRequest::default()
    }
}

fn byte(name: TokenBlock, place: usize) -> u8 {
    name.sequence.0.to_le_bytes()[place % 8] ^ u8::try_from(place).unwrap()
}

impl Engine {
    /// Each run of a block: its region, and where it begins.
    fn runs(id: u32) -> impl Iterator<Item = (usize, u64, usize)> {
        layouts()
            .into_iter()
            .enumerate()
            .flat_map(move |(region, layout)| {
                let run = move |layer| {
                    let bytes = usize::try_from(layout.run_bytes).unwrap();
                    (region, layout.run_offset(id, layer).unwrap(), bytes)
                };
                (0..layout.layers).map(run)
            })
    }

    fn compute(&self, name: TokenBlock, id: u32) {
        for (place, (region, at, bytes)) in Self::runs(id).enumerate() {
            let bytes = vec![byte(name, place); bytes];
            self.regions[region].write_at(at, &bytes).unwrap();
        }
    }

    fn check(&self, name: TokenBlock, id: u32) {
        for (place, (region, at, bytes)) in Self::runs(id).enumerate() {
            let mut found = vec![0; bytes];
            self.regions[region].read_at(at, &mut found).unwrap();
            assert!(found.iter().all(|b| *b == byte(name, place)), "{place}");
        }
    }

    /// Computes names from `from` on in the first blocks, and waits until they are saved.
    fn save(&self, names: &[TokenBlock], from: usize) -> Saved {
        let blocks: Vec<_> = names[from..]
            .iter()
            .zip(0..)
            .map(|(name, id)| {
                self.compute(*name, id);
                (*name, BlockId(id))
            })
            .collect();
        let parent = from.checked_sub(1).map(|before| names[before].sequence);
        self.rank.save(5, parent, &blocks, None);
        match &self.rank.wait_ended(SOON)[..] {
            [Ended::Save { key: 5, end }] => *end,
            other => panic!("{other:?}"),
        }
    }

    fn load(&self, hold: u64, request: &LookupRequest, first: u32) -> Onboarded {
        let count = u32::try_from(request.names.len()).unwrap();
        let targets: Vec<BlockId> = (first..first + count).map(BlockId).collect();
        self.rank.load(9, hold, request, &targets);
        match &self.rank.wait_ended(SOON)[..] {
            [Ended::Load { key: 9, end }] => end.clone(),
            other => panic!("{other:?}"),
        }
    }
}

fn found(lookup: Lookup) -> (u32, u32) {
    (lookup.from.host, lookup.from.disk)
}

#[test]
fn bytes_of_several_regions_come_back_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let names = prompt(1, 9);
    {
        let engine = engine(folder.path(), ExternalConfig::default());
        assert_eq!(engine.save(&names[..5], 0).copied, 5);
        // Of what is there nothing is copied again.
        let again = engine.save(&names[..5], 0);
        assert_eq!((again.copied, again.present), (0, 5));
        assert_eq!(engine.save(&names, 5).copied, 4);
        assert!(engine.manager.flush(SOON));
        // The engine has two blocks already.
        let request = request(&names, 2);
        let lookup = engine.rank.lookup(&request);
        assert_eq!(lookup.blocks(), 7);
        let end = engine.load(lookup.hold, &request, 4);
        assert_eq!((end.loaded, end.reason), (7, None));
        for (name, id) in names[2..].iter().zip(4..) {
            engine.check(*name, id);
        }
        assert_eq!(engine.rank.open(), 0);
        assert!(engine.manager.stop(SOON));
    }
    let engine = engine(folder.path(), ExternalConfig::default());
    let path = sockets.path().join("lookup");
    let server = LookupServer::start(&path, engine.rank.clone()).unwrap();
    let client = LookupClient::new(server.path());
    let request = request(&names, 0);
    let lookup = client.lookup(&request, SOON).unwrap();
    assert_eq!(found(lookup), (0, 9));
    let end = engine.load(lookup.hold, &request, 1);
    assert_eq!((end.loaded, end.from.disk), (9, 9));
    for (name, id) in names.iter().zip(1..) {
        engine.check(*name, id);
    }
    drop(server);
    client.lookup(&request, SOON).unwrap_err();
    assert!(!path.exists());
}

#[test]
fn damage_on_the_disk_ends_the_run_and_names_the_blocks_to_compute() {
    let folder = tempfile::tempdir().unwrap();
    let names = prompt(2, 6);
    let path = {
        let engine = engine(folder.path(), ExternalConfig::default());
        assert_eq!(engine.save(&names, 0).copied, 6);
        assert!(engine.manager.flush(SOON));
        let path = engine.manager.store().unwrap().path().to_owned();
        assert!(engine.manager.stop(SOON));
        path
    };
    let mut bytes = std::fs::read(&path).unwrap();
    let needle = vec![byte(names[3], 1); usize::try_from(RUN).unwrap()];
    let at = bytes.windows(needle.len()).position(|w| w == needle);
    bytes[at.unwrap() + 7] ^= 1;
    std::fs::write(&path, bytes).unwrap();

    let engine = engine(folder.path(), ExternalConfig::default());
    let request = request(&names, 0);
    let lookup = engine.rank.lookup(&request);
    assert_eq!(found(lookup), (0, 6));
    let end = engine.load(lookup.hold, &request, 2);
    assert_eq!((end.loaded, end.reason), (3, Some(NotLoaded::Invalid)));
    assert_eq!(end.not_loaded, [5, 6, 7].map(BlockId));
    for (name, id) in names[..3].iter().zip(2..) {
        engine.check(*name, id);
    }
    assert_eq!(engine.rank.lookup(&request).blocks(), 3);
}

#[test]
fn what_is_held_for_too_long_is_looked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let external = ExternalConfig {
        hold_time: Duration::ZERO,
        holds_max: 1,
        ..ExternalConfig::default()
    };
    let engine = engine(folder.path(), external);
    let names = prompt(3, 4);
    assert_eq!(engine.save(&names, 0).copied, 4);
    let request = request(&names, 0);
    let first = engine.rank.lookup(&request);
    let second = engine.rank.lookup(&request);
    assert_ne!(first.hold, second.hold);
    let end = engine.load(first.hold, &request, 6);
    assert_eq!(end.loaded, 4, "found again");
    let other = LookupRequest {
        names: prompt(4, 3),
        ..LookupRequest::default()
    };
    assert_eq!(engine.rank.lookup(&other), Lookup::default());
    let end = engine.load(0, &other, 6);
    assert_eq!(end.loaded, 0);
    assert_eq!(end.not_loaded, [6, 7, 8].map(BlockId), "to be computed");
}

#[test]
fn after_a_stop_everything_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), ExternalConfig::default());
    let names = prompt(5, 4);
    assert_eq!(engine.save(&names, 0).copied, 4);
    let request = request(&names, 0);
    let lookup = engine.rank.lookup(&request);
    assert!(engine.manager.stop(SOON));
    let end = engine.load(lookup.hold, &request, 6);
    assert_eq!((end.loaded, end.reason), (0, Some(NotLoaded::Cancelled)));
    assert_eq!(engine.save(&prompt(6, 3), 0).dropped, 3);
    assert_eq!(engine.rank.open(), 0);
}

#[test]
fn memory_that_does_not_make_up_blocks_of_g2_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let engine = engine(folder.path(), ExternalConfig::default());
    let own = Agent::new(AgentConfig::new("other")).unwrap();
    let good = memory(&own);
    let attach = |memory: &ExternalMemory| engine.manager.attach_external(DpRank(1), &own, memory);
    let refused = |memory: &ExternalMemory| match attach(memory) {
        Err(AttachError::Memory { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    let mut short = good.clone();
    short.segments.pop();
    assert!(refused(&short).contains("192 bytes, those of G2 384"));
    let mut fewer = good.clone();
    fewer.segments[1].layout.blocks -= 1;
    assert!(refused(&fewer).contains("region 1 has 11 blocks"));
    let mut beyond = good.clone();
    beyond.segments[0].layout.offset = 1 << 20;
    assert!(refused(&beyond).contains("region 0"));
    let none = ExternalMemory {
        segments: Vec::new(),
    };
    assert!(refused(&none).contains("no region"));
    attach(&good).unwrap();
}
