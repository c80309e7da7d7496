//! A replay with bytes: blocks of real memory, copied by the mover of a worker, in a store on a real disk.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use blockplane_kvbm::{
    Fingerprint, KvArena, SlotStore, SlotStoreConfig,
    store::StoreLocation,
    tier::{LocalMover, MoveReport, MoveSpec, Mover, TierConfig, TierPools, Tiers, host_arena},
};
use blockplane_protocol::{BlockId, DType, DpRank, KvLayout, TokenBlock};
use blockplane_transfer::{Agent, AgentConfig, Lane};

use super::{
    driver::Driver,
    outcome::Outcome,
    simulate::{Simulation, pool},
    trace::Trace,
    world::World,
};

/// Layers of the blocks: G1 and G2 hold them as engines do, in several pieces.
const LAYERS: u32 = 4;
/// What a length must be a multiple of: whole pages on disk, and whole words in each layer.
const UNIT: u32 = 4096;

/// Bytes behind the books of a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredConfig {
    /// Folder of the store; made if it is missing. What an earlier replay with blocks of the same
    /// length left there is found again.
    pub folder: PathBuf,
    /// Bytes of a block, a multiple of 4096.
    pub block_bytes: u32,
}

/// What a replay with bytes came to, besides what one without says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredOutcome {
    /// Blocks of G1 whose every byte was compared with what was computed under their name.
    pub blocks_compared: u64,
    /// Blocks that the store had from earlier.
    pub blocks_recovered: u64,
    /// Bytes given to the disk, headers included.
    pub bytes_written: u64,
    /// Copies between two tiers: bytes, and the time that they took together.
    pub moved_bytes: u64,
    /// See `moved_bytes`.
    pub moving: Duration,
    /// Time of the whole replay.
    pub took: Duration,
}

/// Plays a trace with real bytes, and compares each block that is loaded with what was computed.
///
/// # Errors
/// When the configuration cannot work, memory or disk are not there, or a byte is wrong.
pub fn simulate_stored(
    trace: &Trace,
    simulation: &Simulation,
    stored: &StoredConfig,
) -> anyhow::Result<(Outcome, StoredOutcome)> {
    ensure!(
        stored.block_bytes > 0 && stored.block_bytes.is_multiple_of(UNIT),
        "blocks of {} bytes cannot be stored; accepted: a multiple of {UNIT}",
        stored.block_bytes
    );
    let config = simulation
        .tier_config(trace.block_tokens())
        .filter(|config| config.disk.is_some())
        .context("a replay with a store needs a G3: give --g3-blocks")?;
    let began = Instant::now();
    let mut scene = Scene::new(simulation, &config, stored)?;
    let device = pool(simulation.evictions[0], true).over(Arc::clone(&scene.world.device));
    let tiers = Tiers::new(&config, scene.pools, u64::from(stored.block_bytes))?;
    let onboard_time = simulation.queues.onboard_time;
    let outcome = Driver::new(trace, device, Some(tiers), &mut scene.world, onboard_time).run()?;
    let deadline = Instant::now() + config.queues.offload_time;
    scene.store.close(deadline).context("close the store")?;
    let wear = scene.store.wear();
    let world = scene.world;
    let stored = StoredOutcome {
        blocks_compared: world.compared,
        blocks_recovered: scene.recovered,
        bytes_written: wear.bytes_written - scene.written_before,
        moved_bytes: world.moved_bytes,
        moving: world.moving,
        took: began.elapsed(),
    };
    Ok((outcome, stored))
}

/// Everything that a replay with bytes needs.
struct Scene {
    world: Stored,
    pools: TierPools,
    store: Arc<SlotStore>,
    recovered: u64,
    written_before: u64,
}

/// Real memory and a real store.
struct Stored {
    mover: LocalMover,
    device: Arc<KvArena>,
    expected: Vec<u8>,
    found: Vec<u8>,
    compared: u64,
    moved_bytes: u64,
    moving: Duration,
    /// Kept: the memory is theirs.
    _agents: [Agent; 2],
}

impl Scene {
    fn new(
        simulation: &Simulation,
        config: &TierConfig,
        stored: &StoredConfig,
    ) -> anyhow::Result<Self> {
        // One token, one head: only the length matters here. 2 planes of 2-byte elements.
        let elements = stored.block_bytes / LAYERS / 4;
        let layout = KvLayout::dense(LAYERS, 1, elements, 1, DType::Bf16);
        let engine = agent("replay-engine")?;
        let below = agent("replay-kvbm")?;
        let device = KvArena::allocate(&engine, layout.clone(), simulation.g1_blocks, "g1")?;
        let host = host_arena(&below, &layout, config, Default::default())?;
        let (store, slots) = open(&below, &stored.folder, simulation.g3_blocks, host.layout())?;
        let (recovered, written_before) = (slots.len() as u64, store.wear().bytes_written);
        let host_pool = pool(config.host_eviction, config.host_blocks > 0);
        let disk_pool = pool(simulation.evictions[2], true).accounting(store.capacity());
        let slots = slots.into_iter();
        disk_pool.restore(slots.map(|slot| (BlockId(slot.slot), slot.name, slot.parent)));
        let pools = TierPools {
            host: host_pool.over(Arc::clone(&host)),
            disk: Some(disk_pool),
            remote: None,
        };
        let mover = LocalMover::new(below.clone(), host, Some(Arc::clone(&store)));
        mover.attach(DpRank(0), &engine, &device)?;
        let world = Stored {
            mover,
            device,
            expected: Vec::new(),
            found: Vec::new(),
            compared: 0,
            moved_bytes: 0,
            moving: Duration::ZERO,
            _agents: [engine, below],
        };
        Ok(Self {
            world,
            pools,
            store,
            recovered,
            written_before,
        })
    }
}

fn agent(what: &str) -> anyhow::Result<Agent> {
    let name = format!("{what}-{}", std::process::id());
    Ok(Agent::new(
        AgentConfig::new(name).with_lanes([Lane::Loopback]),
    )?)
}

fn open(
    agent: &Agent,
    folder: &Path,
    slots: u32,
    layout: &KvLayout,
) -> anyhow::Result<(Arc<SlotStore>, Vec<blockplane_kvbm::store::RecoveredSlot>)> {
    let config = SlotStoreConfig::new(
        StoreLocation::Folder(folder.to_owned()),
        slots,
        layout.block_bytes() as u64,
        Fingerprint::of(0, layout, 0, 1),
    );
    let opened = SlotStore::open(agent, &config);
    opened.with_context(|| format!("a store in {}", folder.display()))
}

impl World for &mut Stored {
    fn end(&mut self, now: Duration, _: &MoveSpec) -> Duration {
        now
    }

    fn carry(&mut self, spec: &MoveSpec) -> MoveReport {
        let began = Instant::now();
        let report = self.mover.run(spec);
        self.moving += began.elapsed();
        self.moved_bytes += report.bytes;
        report
    }

    fn computed(&mut self, block: BlockId, name: TokenBlock) -> anyhow::Result<()> {
        self.expect(name);
        self.device
            .registration()
            .write_at(self.offset(block), &self.expected)?;
        Ok(())
    }

    fn loaded(&mut self, block: BlockId, name: TokenBlock) -> anyhow::Result<()> {
        self.expect(name);
        self.found.resize(self.expected.len(), 0);
        let at = self.offset(block);
        self.device.registration().read_at(at, &mut self.found)?;
        self.compared += 1;
        if self.found != self.expected {
            bail!(
                "block {} of G1 does not have the bytes of {}",
                block.0,
                name.sequence
            );
        }
        Ok(())
    }
}

impl Stored {
    /// What a block of this name contains: its layers are next to each other in G1.
    fn expect(&mut self, name: TokenBlock) {
        let words = self.device.layout().block_bytes() as u64 / 8;
        self.expected.clear();
        // Weyl's sequence, so that every word depends on the name and on its place.
        let word = |at: u64| name.sequence.0.wrapping_add(at.wrapping_mul(WEYL));
        self.expected
            .extend((1..=words).flat_map(|at| word(at).to_le_bytes()));
    }

    fn offset(&self, block: BlockId) -> u64 {
        let layout = self.device.transfer_layout();
        layout.offset + u64::from(block.0) * layout.block_stride
    }
}

/// 2^64 divided by the golden ratio.
const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;
