//! The tiers of a KV cache whose G1 is on a device: to pinned memory, to a file, and back, also after a
//! restart.

use std::{path::Path, sync::mpsc, time::Duration};

use anyhow::{Context, ensure};
use blockplane_kvbm::{
    AdmissionConfig, ArenaPlace, BlockPool, Fingerprint, KvArena, PoolConfig, SlotStore,
    SlotStoreConfig,
    store::StoreLocation,
    tier::{DiskConfig, PerTier, RankTiers, TierConfig, TierManager, TierParts, host_arena},
};
use blockplane_protocol::{
    BlockId, DType, DpRank, KvLayout, LayoutOrder, SaltHash, TokenBlock, TokenSequence,
};
use blockplane_transfer::{Agent, AgentConfig, KernelConfig, Lane};

use super::{
    random::{Random, contents},
    world::{Outcome, WAIT, World},
};

const BLOCKS: u32 = 24;
const BLOCK_TOKENS: u32 = 16;
const MODEL: u64 = 0x6b76;

/// The manager of one life of a worker.
struct Life {
    manager: TierManager,
    tiers: RankTiers,
    _agent: Agent,
}

/// Blocks of G1 are offloaded, overwritten, and onboarded again: from G2, and in a second life from G3.
/// `device`: none for host memory.
pub(super) fn check(world: &World, name: &str, device: Option<u32>) -> anyhow::Result<Outcome> {
    let mut random = Random::new(world.seed, name);
    // Layer-first, as engines on devices have it: each block is in as many pieces as there are layers.
    let layout = KvLayout {
        order: LayoutOrder::LayerFirst,
        ..KvLayout::dense(6, 4, 64, BLOCK_TOKENS, DType::Bf16)
    };
    let folder = tempfile::tempdir()?;
    let place = device.map_or(ArenaPlace::Host, ArenaPlace::Device);
    let engine = agent(&world.kernels, "engine")?;
    let arena = KvArena::allocate_in(&engine, layout.clone(), BLOCKS, "g1", place)?;
    let device_pool = BlockPool::new(arena.clone(), PoolConfig::default());
    let tokens: Vec<u32> = (0..BLOCKS * BLOCK_TOKENS).collect();
    let prompt =
        TokenSequence::from_tokens(&tokens, BLOCK_TOKENS as usize, SaltHash(random.next()));
    let names = prompt.blocks();
    let seed = random.next();

    world.teller.doing("start the tiers");
    let life = start(world, &layout, device, folder.path(), &engine, &device_pool)?;
    fill(&arena, &device_pool, names, seed)?;
    world.teller.doing("offload");
    life.tiers.offload(names, None);
    ensure!(life.manager.flush(WAIT), "offloading does not end");
    let stats = life.manager.stats();
    world.teller.doing("onboard from G2");
    overwrite(&arena, &device_pool)?;
    let from =
        onboard(&life.tiers, &device_pool, names).with_context(|| format!("after {stats:?}"))?;
    ensure!(from.host == BLOCKS, "loaded from {from:?}");
    compare(&arena, &device_pool, names, seed).context("from G2")?;
    world.teller.doing("stop");
    ensure!(life.manager.stop(WAIT), "the tiers do not stop");
    drop(life);

    world.teller.doing("start again");
    let life = start(world, &layout, device, folder.path(), &engine, &device_pool)?;
    overwrite(&arena, &device_pool)?;
    world.teller.doing("onboard from G3");
    let from = onboard(&life.tiers, &device_pool, names)?;
    ensure!(from.disk == BLOCKS, "loaded from {from:?}");
    compare(&arena, &device_pool, names, seed).context("from G3")?;
    ensure!(life.manager.stop(WAIT), "the tiers do not stop");
    Ok(Outcome::Passed(format!(
        "{BLOCKS} blocks of {} bytes through G2 and, after a restart, G3",
        layout.block_bytes()
    )))
}

fn agent(kernels: &KernelConfig, what: &str) -> anyhow::Result<Agent> {
    let name = format!("selftest-tiers-{what}-{}", std::process::id());
    let mut config = AgentConfig::new(name).with_lanes([Lane::Loopback]);
    config.cuda.kernels = kernels.clone();
    Ok(Agent::new(config)?)
}

fn start(
    world: &World,
    layout: &KvLayout,
    device: Option<u32>,
    folder: &Path,
    engine: &Agent,
    pool: &BlockPool,
) -> anyhow::Result<Life> {
    let agent = agent(&world.kernels, "kvbm")?;
    let config = TierConfig {
        host_blocks: BLOCKS,
        disk: Some(DiskConfig {
            admission: AdmissionConfig {
                kind: "all".parse()?,
                ..AdmissionConfig::default()
            },
            ..DiskConfig::new(BLOCKS)
        }),
        ..TierConfig::default()
    };
    let place = device.map_or(ArenaPlace::Host, |near| ArenaPlace::Pinned { near });
    let host = host_arena(&agent, layout, &config, place)?;
    let store = SlotStore::open(
        &agent,
        &SlotStoreConfig::new(
            StoreLocation::Folder(folder.to_owned()),
            BLOCKS,
            layout.block_bytes() as u64,
            Fingerprint::of(MODEL, host.layout(), 0, 1),
        ),
    )?;
    let parts = TierParts {
        agent: agent.clone(),
        host,
        store: Some(store),
        remote: None,
        hubs: Vec::new(),
    };
    let manager = TierManager::start(&config, parts)?;
    let tiers = manager.attach(DpRank(0), engine, pool)?;
    Ok(Life {
        manager,
        tiers,
        _agent: agent,
    })
}

/// Computes the prompt, as far as the tiers can tell.
fn fill(arena: &KvArena, pool: &BlockPool, names: &[TokenBlock], seed: u64) -> anyhow::Result<()> {
    let mut parent = None;
    let mut complete = Vec::new();
    for (block, name) in pool.allocate(names.len())?.into_iter().zip(names) {
        for (offset, bytes) in pieces(arena, block.id(), *name, seed) {
            arena.registration().write_at(offset, &bytes)?;
        }
        complete.push(block.complete(*name, parent));
        parent = Some(name.sequence);
    }
    drop(BlockPool::register(complete));
    Ok(())
}

/// Everything that was in G1 is gone.
fn overwrite(arena: &KvArena, pool: &BlockPool) -> anyhow::Result<()> {
    pool.clear();
    let zeros = vec![0; arena.registration().len()];
    Ok(arena.registration().write_at(0, &zeros)?)
}

/// Brings all blocks into G1. Returns where they were.
fn onboard(
    tiers: &RankTiers,
    pool: &BlockPool,
    names: &[TokenBlock],
) -> anyhow::Result<PerTier<u32>> {
    let found = tiers.find(names);
    ensure!(
        found.lower() == names.len(),
        "{} of {} blocks are found",
        found.lower(),
        names.len()
    );
    // Any block may go anywhere.
    let mut targets = pool.allocate(names.len())?;
    targets.reverse();
    let ids = targets.iter().map(|block| block.id()).collect();
    let (done, ended) = mpsc::channel();
    let tell = Box::new(move |onboarded| {
        // Whoever waited may have given up.
        let _ = done.send(onboarded);
    });
    let ticket = tiers.onboard(found, ids, WAIT, tell);
    let onboarded = ended.recv_timeout(WAIT + Duration::from_secs(5))?;
    drop(ticket);
    ensure!(onboarded.loaded == names.len(), "loaded: {onboarded:?}");
    let mut parent = None;
    for (block, name) in targets.into_iter().zip(names) {
        drop(block.complete(*name, parent).register());
        parent = Some(name.sequence);
    }
    Ok(onboarded.from)
}

fn compare(
    arena: &KvArena,
    pool: &BlockPool,
    names: &[TokenBlock],
    seed: u64,
) -> anyhow::Result<()> {
    let held = pool.match_prefix(names);
    ensure!(held.len() == names.len(), "{} blocks are in G1", held.len());
    for (block, name) in held.iter().zip(names) {
        for (offset, expected) in pieces(arena, block.id(), *name, seed) {
            let mut found = vec![0; expected.len()];
            arena.registration().read_at(offset, &mut found)?;
            ensure!(
                found == expected,
                "block {} of G1 has other bytes at {offset} of its region than were computed",
                block.id().0
            );
        }
    }
    Ok(())
}

/// Where the layers of a block are, and what they contain.
fn pieces(
    arena: &KvArena,
    block: BlockId,
    name: TokenBlock,
    seed: u64,
) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let layout = arena.transfer_layout();
    let bytes = arena.layout().layer_bytes();
    (0..layout.layers).map(move |layer| {
        let at = layout.offset
            + u64::from(block.0) * layout.block_stride
            + u64::from(layer) * layout.layer_stride;
        let inner = u64::from(layer) * bytes as u64;
        (at, contents(seed ^ name.sequence.0, inner, bytes))
    })
}
