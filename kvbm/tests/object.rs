//! The object tier over folders and memory: bytes, faults, deadlines.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: a panic is the report, and numbers are small"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    Fingerprint, KvArena, MoveKind, MoveSpec, Mover, ObjectTier, ObjectTierConfig, RemoteIndex,
    tier::{BlockOutcome, Invalid, MoveId, MovedBlock},
};
use blockplane_protocol::{
    BlockHash, DType, DpRank, KvLayout, SaltHash, SequenceHash, TokenBlock, TokenSequence,
};
use blockplane_transfer::{Agent, AgentConfig, FaultConfig, Lane, ObjectConfig, ObjectLocation};

const BLOCKS: u32 = 24;
const TIME: Duration = Duration::from_secs(5);

struct World {
    agent: Agent,
    arena: Arc<KvArena>,
    location: ObjectLocation,
}

impl World {
    fn new(location: ObjectLocation, faults: Option<FaultConfig>) -> Self {
        let mut config = AgentConfig::new("kvbm").with_lanes([Lane::Loopback]);
        config.faults = faults;
        let agent = Agent::new(config).unwrap();
        let layout = KvLayout::dense(3, 2, 8, 4, DType::F16);
        let arena = KvArena::allocate(&agent, layout, BLOCKS, "g2").unwrap();
        Self {
            agent,
            arena,
            location,
        }
    }

    fn folder(path: &Path) -> Self {
        Self::new(ObjectLocation::Folder(path.to_owned()), None)
    }

    fn tier(&self, model: u64, config: ObjectTierConfig) -> Arc<ObjectTier> {
        let store = ObjectConfig::new(self.location.clone()).with_prefix("kv");
        let store = self.agent.open_objects(&store).unwrap();
        let fingerprint = Fingerprint::of(model, self.arena.layout(), 1, 2);
        ObjectTier::open(
            &self.agent,
            store,
            Arc::clone(&self.arena),
            fingerprint,
            config,
        )
        .unwrap()
    }

    fn block_bytes(&self) -> usize {
        let layout = self.arena.transfer_layout();
        layout.layers as usize * layout.run_bytes as usize
    }

    /// Contents of a block, layer by layer.
    fn bytes(&self, block: u32) -> Vec<u8> {
        let layout = self.arena.transfer_layout();
        let mut all = Vec::new();
        for layer in 0..layout.layers {
            let mut run = vec![0; layout.run_bytes as usize];
            let at = layout.run_offset(block, layer).unwrap();
            self.arena.registration().read_at(at, &mut run).unwrap();
            all.extend(run);
        }
        all
    }

    fn fill(&self, block: u32, seed: u8) {
        let layout = self.arena.transfer_layout();
        for layer in 0..layout.layers {
            let byte = |at: u64| (at * 7 + u64::from(layer) * 31) as u8 ^ seed;
            let run: Vec<u8> = (0..layout.run_bytes).map(byte).collect();
            let at = layout.run_offset(block, layer).unwrap();
            self.arena.registration().write_at(at, &run).unwrap();
        }
    }
}

fn config() -> ObjectTierConfig {
    ObjectTierConfig {
        bounce_blocks: 3,
        list_every: None,
        ..ObjectTierConfig::default()
    }
}

fn names(count: usize) -> Vec<TokenBlock> {
    let tokens: Vec<u32> = (0..count as u32 * 4).collect();
    TokenSequence::from_tokens(&tokens, 4, SaltHash::default())
        .blocks()
        .to_vec()
}

/// A move of consecutive blocks of one sequence, from or to blocks `first..` of G2.
fn spec(kind: MoveKind, names: &[TokenBlock], first: u32, time: Duration) -> MoveSpec {
    let parents = std::iter::once(None).chain(names.iter().map(|name| Some(name.sequence)));
    let blocks = names.iter().zip(parents).zip(first..);
    MoveSpec {
        id: MoveId(1),
        kind,
        rank: DpRank(0),
        blocks: blocks
            .map(|((name, parent), id)| MovedBlock {
                from: id,
                to: id,
                name: *name,
                parent,
            })
            .collect(),
        time,
    }
}

fn write(tier: &ObjectTier, names: &[TokenBlock]) -> Vec<BlockOutcome> {
    tier.run(&spec(MoveKind::HostToRemote, names, 0, TIME))
        .outcomes
}

fn read(tier: &ObjectTier, names: &[TokenBlock]) -> Vec<BlockOutcome> {
    tier.run(&spec(MoveKind::RemoteToHost, names, 12, TIME))
        .outcomes
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + TIME;
    while !done() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// What happens to the bytes of an object.
type Damage = Box<dyn Fn(&mut Vec<u8>)>;

/// Files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn blocks_come_back_in_another_process_life() {
    let folder = tempfile::tempdir().unwrap();
    let names = names(10);
    let mut written = Vec::new();
    {
        let world = World::folder(folder.path());
        let tier = world.tier(7, config());
        for block in 0..10 {
            world.fill(block, block as u8);
            written.push(world.bytes(block));
        }
        let report = tier.run(&spec(MoveKind::HostToRemote, &names, 0, TIME));
        assert!(report.outcomes.iter().all(|o| *o == BlockOutcome::Moved));
        assert_eq!(report.bytes, 10 * world.block_bytes() as u64);
        assert_eq!((tier.stats().written, tier.len()), (10, 10));
        // What is there is not written again.
        assert_eq!(write(&tier, &names), vec![BlockOutcome::Moved; 10]);
        assert_eq!((tier.stats().written, tier.stats().existed), (10, 10));
    }
    assert_eq!(files(folder.path()).len(), 10);

    let world = World::folder(folder.path());
    let tier = world.tier(7, config());
    eventually("the names are listed", || tier.len() == 10);
    assert!(names.iter().all(|name| tier.contains(name.sequence)));
    assert_eq!(read(&tier, &names), vec![BlockOutcome::Moved; 10]);
    for (block, bytes) in (12..).zip(&written) {
        assert!(world.bytes(block) == *bytes, "block {block}");
    }
    // Another model finds nothing, and reads nothing by the same names.
    let other = world.tier(8, config());
    eventually("it has listed", || other.stats().listings == 1);
    assert_eq!(other.len(), 0);
    assert_eq!(
        read(&other, &names[..1]),
        [BlockOutcome::Invalid(Invalid::Missing)]
    );
}

#[test]
fn somebody_else_wrote_it_first() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::folder(folder.path());
    let (a, b) = (world.tier(7, config()), world.tier(7, config()));
    for tier in [&a, &b] {
        eventually("it has listed", || tier.stats().listings == 1);
    }
    world.fill(0, 1);
    let names = names(1);
    assert_eq!(write(&a, &names), [BlockOutcome::Moved]);
    let before = fs::read(&files(folder.path())[0]).unwrap();
    assert!(!b.contains(names[0].sequence));
    world.fill(0, 2);
    assert_eq!(write(&b, &names), [BlockOutcome::Moved]);
    assert_eq!((b.stats().written, b.stats().existed), (0, 1));
    assert_eq!(fs::read(&files(folder.path())[0]).unwrap(), before);
    assert!(b.contains(names[0].sequence));
}

#[test]
fn a_bad_object_is_a_miss_and_is_written_anew() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::folder(folder.path());
    let names = names(2);
    let whole = 128 + world.block_bytes();
    // A bit of each part of the header, and of the payload; cut short, too long, empty.
    let mut faults: Vec<(&str, Damage)> = vec![
        ("short", Box::new(|bytes| bytes.truncate(bytes.len() - 1))),
        ("long", Box::new(|bytes| bytes.push(0))),
        ("empty", Box::new(Vec::clear)),
        ("zeros", Box::new(|bytes| bytes.fill(0))),
    ];
    for at in (0..128).step_by(8).chain([128, 128 + 500, whole - 1]) {
        faults.push(("bit", Box::new(move |bytes| bytes[at] ^= 0x10)));
    }
    for (what, fault) in faults {
        let tier = world.tier(7, config());
        world.fill(0, 5);
        world.fill(1, 6);
        let expected = world.bytes(1);
        assert_eq!(write(&tier, &names), vec![BlockOutcome::Moved; 2]);
        let first = format!("{:016x}", names[0].sequence.0);
        let path = files(folder.path())
            .into_iter()
            .find(|path| path.ends_with(&first))
            .unwrap();
        let mut bytes = fs::read(&path).unwrap();
        fault(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let outcomes = read(&tier, &names);
        assert!(
            matches!(outcomes[0], BlockOutcome::Invalid(Invalid::Checksum)),
            "{what}: {:?}",
            outcomes[0]
        );
        assert_eq!(outcomes[1], BlockOutcome::Moved, "its neighbour is not hit");
        assert!(world.bytes(13) == expected);
        assert!(!path.exists(), "{what}");
        assert!(!tier.contains(names[0].sequence));
        assert_eq!(tier.stats().invalid, 1);
    }
    // The bytes of another block under this name.
    let tier = world.tier(7, config());
    assert_eq!(write(&tier, &names), vec![BlockOutcome::Moved; 2]);
    let find = |name: SequenceHash| {
        let name = format!("{:016x}", name.0);
        let all = files(folder.path());
        all.into_iter().find(|path| path.ends_with(&name)).unwrap()
    };
    fs::copy(find(names[1].sequence), find(names[0].sequence)).unwrap();
    assert_eq!(
        read(&tier, &names[..1]),
        [BlockOutcome::Invalid(Invalid::Missing)]
    );
    // A block of the same sequence hash with other tokens.
    let twin = TokenBlock {
        block: BlockHash(names[1].block.0 ^ 1),
        ..names[1]
    };
    assert_eq!(
        read(&tier, &[twin]),
        [BlockOutcome::Invalid(Invalid::Missing)]
    );
}

#[test]
fn a_store_that_does_not_answer_costs_the_time_of_the_move() {
    let faults = FaultConfig {
        loss: 1.0,
        ..FaultConfig::seeded(3)
    };
    let world = World::new(ObjectLocation::Memory, Some(faults));
    let tier = world.tier(7, config());
    let names = names(10);
    let time = Duration::from_millis(200);
    for kind in [MoveKind::HostToRemote, MoveKind::RemoteToHost] {
        let started = Instant::now();
        let report = tier.run(&spec(kind, &names, 0, time));
        let took = started.elapsed();
        assert!(took >= time && took < time * 5, "{took:?}");
        assert_eq!(report.outcomes.len(), 10);
        assert!(
            report
                .outcomes
                .iter()
                .all(|outcome| matches!(outcome, BlockOutcome::Failed(_)))
        );
        assert!(report.pending.is_none(), "blocks of G2 are never at stake");
    }
    assert_eq!(tier.stats().failed, 20);
    assert!(tier.is_empty());
}

#[test]
fn torn_and_late_transfers_never_give_wrong_bytes() {
    for seed in 0..40 {
        let mut faults = FaultConfig::seeded(seed);
        faults.torn = 0.3;
        faults.loss = 0.1;
        faults.delay = 0.3;
        let world = World::new(ObjectLocation::Memory, Some(faults));
        let tier = world.tier(7, config());
        let names = names(10);
        let mut written = Vec::new();
        for block in 0..10 {
            world.fill(block, block as u8 ^ seed as u8);
            written.push(world.bytes(block));
        }
        let time = Duration::from_millis(60);
        tier.run(&spec(MoveKind::HostToRemote, &names, 0, time));
        let mut moved = 0;
        for _ in 0..3 {
            let report = tier.run(&spec(MoveKind::RemoteToHost, &names, 12, time));
            for (index, outcome) in report.outcomes.iter().enumerate() {
                if *outcome == BlockOutcome::Moved {
                    moved += 1;
                    assert!(
                        world.bytes(12 + index as u32) == written[index],
                        "seed {seed}"
                    );
                }
                let told = matches!(outcome, BlockOutcome::Invalid(Invalid::Checksum));
                assert!(!told, "seed {seed}: nothing of it is damaged");
            }
        }
        assert!(moved > 0, "seed {seed}: the faults leave some");
    }
}

#[test]
fn names_are_bounded_and_kept_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::folder(folder.path());
    let small = ObjectTierConfig {
        names_max: 4,
        list_every: Some(Duration::from_millis(5)),
        ..config()
    };
    let names = names(10);
    let bounded = world.tier(7, small);
    assert_eq!(write(&bounded, &names), vec![BlockOutcome::Moved; 10]);
    eventually("listed twice", || bounded.stats().listings > 2);
    assert!(bounded.len() <= 4);

    let tier = world.tier(
        7,
        ObjectTierConfig {
            names_max: 100,
            ..small
        },
    );
    eventually("all are known", || tier.len() == 10);
    for path in files(folder.path()).iter().take(4) {
        fs::remove_file(path).unwrap();
    }
    eventually("what is deleted is forgotten", || tier.len() == 6);
}

#[test]
fn bad_settings_are_named() {
    let world = World::new(ObjectLocation::Memory, None);
    let store = ObjectConfig::new(ObjectLocation::Memory);
    let fingerprint = Fingerprint::of(7, world.arena.layout(), 0, 1);
    for (change, field) in [
        (
            (|c: &mut ObjectTierConfig| c.bounce_blocks = 0) as fn(&mut ObjectTierConfig),
            "bounce_blocks is 0",
        ),
        (|c| c.list_every = Some(Duration::ZERO), "list_every is 0"),
        (|c| c.list_time = Duration::ZERO, "list_time is 0"),
    ] {
        let mut config = config();
        change(&mut config);
        let store = world.agent.open_objects(&store).unwrap();
        let arena = Arc::clone(&world.arena);
        let refused = ObjectTier::open(&world.agent, store, arena, fingerprint, config);
        let message = refused.unwrap_err().to_string();
        assert!(message.starts_with(field), "{message}");
    }
    let tier = world.tier(7, config());
    let report = tier.run(&spec(MoveKind::HostToDisk, &names(2), 0, TIME));
    assert!(
        matches!(&report.outcomes[0], BlockOutcome::Failed(why) if why.contains("host-to-disk"))
    );
}
