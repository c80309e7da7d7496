//! The tiers below an engine's pool: from settings to a running manager.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail};
use blockplane_engine::TierHandle;
use blockplane_kvbm::{
    ArenaPlace, Consolidation, EventHub, Fingerprint, KvbmSettings, ObjectTier, Remotes, SlotStore,
    SlotStoreConfig, TierConfig,
    settings::{ConsolidatorMode, DiskAllocator, Severity, Sizes},
    store::{RecoveredSlot, StoreError, StoreLocation},
    tier::{Mover, RemoteIndex, TierManager, TierParts, host_arena},
};
use blockplane_protocol::{DpRank, KvLayout};
use blockplane_transfer::{Agent, AgentConfig, DirectIo, Lane};

use super::{
    objects,
    peers::{self, Peers},
};
use crate::kvbm::facts;

/// What the tiers must know of the engine above them.
#[derive(Clone, Debug)]
pub(crate) struct Above {
    /// Name of the worker's transfer agent.
    pub(crate) agent: String,
    /// Shape of the engine's blocks.
    pub(crate) layout: KvLayout,
    /// Fingerprint of their contents.
    pub(crate) fingerprint: u64,
    /// Data-parallel ranks.
    pub(crate) ranks: u32,
    /// Blocks of all their pools, where that is known before they are allocated.
    pub(crate) blocks: Option<u32>,
    /// KV events kept for each rank.
    pub(crate) events_max: usize,
    /// How other workers reach an agent of that name.
    pub(crate) network: AgentConfig,
}

/// The tiers below an engine.
#[derive(Clone, Debug)]
pub(crate) struct Below {
    pub(crate) handle: TierHandle,
    /// The exchange of blocks with other workers, if it is asked for.
    pub(crate) peers: Option<Peers>,
}

/// Starts what the settings ask for; nothing where they ask for no tier.
pub(crate) fn start(settings: &KvbmSettings, above: &Above) -> anyhow::Result<Option<Below>> {
    // Data-parallel ranks share the tiers: each block is one rank's alone.
    let sizes = settings.sizes(above.layout.block_bytes() as u64, 1);
    check(settings, &sizes, above)?;
    let Some(mut config) = settings.tier_config(&sizes) else {
        return Ok(None);
    };
    let name = format!("{}-tiers", above.agent);
    let network = if sizes.peers {
        AgentConfig {
            name,
            ..above.network.clone()
        }
    } else {
        AgentConfig::new(name).with_lanes([Lane::Loopback])
    };
    let agent =
        Agent::new(network).context("the transfer agent of the KV tiers cannot be started")?;
    let store = open_store(settings, &mut config, &agent, above)?;
    if config.host_blocks == 0 && config.disk.is_none() && config.remote.is_none() {
        return Ok(None);
    }
    let host = host_arena(&agent, &above.layout, &config, ArenaPlace::Host)
        .context("the host memory of the KV tiers (G2)")?;
    let mode = match settings.kv_events_consolidator_mode.value {
        ConsolidatorMode::Dedup => Consolidation::Dedup,
        ConsolidatorMode::Passthrough => Consolidation::Passthrough,
    };
    let hubs: Vec<_> = (0..above.ranks)
        .map(|rank| EventHub::new(DpRank(rank), above.events_max, mode))
        .collect();
    let told = settings.kv_events_enable_consolidator.value;
    let summary = summary(&sizes, &config, store.as_ref());
    let objects = if sizes.object_blocks > 0 {
        let opened = objects::open(settings, &above.agent, &agent, &host, fingerprint(above))?;
        Some(opened)
    } else {
        None
    };
    let peers = if sizes.peers {
        let started = peers::start(&agent, &host, fingerprint(above), &sizes)?;
        Some(started)
    } else {
        None
    };
    let manager = TierManager::start(
        &config,
        TierParts {
            agent,
            host,
            store,
            remote: remote(peers.as_ref(), objects),
            hubs: if told { hubs.clone() } else { Vec::new() },
        },
    )
    .context("the KV tiers cannot be started")?;
    if let Some(peers) = peers.as_ref().filter(|_| sizes.lend_blocks > 0) {
        let lent = peers.tier.lend(manager.host());
        lent.context("G2 cannot be lent to other workers")?;
    }
    tracing::info!("KV tiers: {summary}");
    Ok(Some(Below {
        handle: TierHandle {
            manager: Arc::new(manager),
            hubs,
        },
        peers,
    }))
}

/// G4: other workers, an object store, or both.
fn remote(
    peers: Option<&Peers>,
    objects: Option<Arc<ObjectTier>>,
) -> Option<(Arc<dyn RemoteIndex>, Arc<dyn Mover>)> {
    let peers = peers.map(|peers| Arc::clone(&peers.tier));
    Some(match (peers, objects) {
        (None, None) => return None,
        (Some(peers), None) => (peers.clone(), peers),
        (None, Some(objects)) => (objects.clone(), objects),
        (Some(peers), Some(objects)) => {
            let both = Arc::new(Remotes::new(peers, objects));
            (both.clone(), both)
        }
    })
}

/// Lets copies end and closes the store, within `time`.
pub(crate) fn stop(manager: &TierManager, time: Duration) {
    let half = time / 2;
    if !manager.flush(half) {
        tracing::warn!(?half, "KV tiers: not everything was copied in time");
    }
    if !manager.stop(half) {
        tracing::warn!(?half, "KV tiers: a copy hangs, or G3 was not closed");
    }
}

/// Says what is odd about the settings; fails for what cannot work.
fn check(settings: &KvbmSettings, sizes: &Sizes, above: &Above) -> anyhow::Result<()> {
    // G2 is not pinned: the engine has no device.
    let facts = facts(settings, false, above.blocks);
    let mut errors = Vec::new();
    for finding in settings.check(sizes, &facts) {
        match finding.severity {
            Severity::Error => errors.push(finding.text),
            Severity::Warning => tracing::warn!("KV tiers: {}", finding.text),
        }
    }
    if errors.is_empty() {
        return Ok(());
    }
    bail!("settings of the KV tiers:\n  {}", errors.join("\n  "));
}

fn fingerprint(above: &Above) -> Fingerprint {
    Fingerprint::of(above.fingerprint, &above.layout, 0, 1)
}

type Store = (Arc<SlotStore>, Vec<RecoveredSlot>);

/// Opens G3. A disk that does not work turns it off, with a warning; a store that is not ours to use
/// is an error.
fn open_store(
    settings: &KvbmSettings,
    config: &mut TierConfig,
    agent: &Agent,
    above: &Above,
) -> anyhow::Result<Option<Store>> {
    let Some(disk) = &config.disk else {
        return Ok(None);
    };
    let location = match &settings.disk_device.value {
        Some(device) => StoreLocation::Device(device.clone()),
        None => StoreLocation::Folder(settings.disk_cache_dir.value.clone()),
    };
    let bytes = above.layout.block_bytes() as u64;
    let mut store = SlotStoreConfig::new(location, disk.blocks, bytes, fingerprint(above));
    if settings.disk_disable_o_direct.value {
        store.direct = DirectIo::Off;
    }
    store.open_direct = settings.disk_allocator_type.value == DiskAllocator::OpenDirect;
    store.zero_fill = settings.disk_zerofill_fallback.value;
    match SlotStore::open(agent, &store) {
        Ok((opened, slots)) => {
            // What the disk had no room for is no slot.
            if let Some(disk) = &mut config.disk {
                disk.blocks = opened.capacity();
            }
            Ok(Some((opened, slots)))
        }
        Err(
            error @ (StoreError::NoRoom { .. }
            | StoreError::Io { .. }
            | StoreError::Disk { .. }
            | StoreError::Open(_)),
        ) => {
            tracing::warn!(%error, "KV tiers: G3 is off");
            config.disk = None;
            Ok(None)
        }
        Err(error) => Err(error).context("the disk of the KV tiers (G3)"),
    }
}

/// One line for people.
fn summary(sizes: &Sizes, config: &TierConfig, store: Option<&Store>) -> String {
    let gb = |blocks: u32| u64::from(blocks) as f64 * sizes.block_bytes as f64 / 1e9;
    let mut parts = Vec::new();
    if config.host_blocks > 0 {
        let blocks = config.host_blocks;
        parts.push(format!(
            "G2 {blocks} blocks, {:.3} GB of memory",
            gb(blocks)
        ));
    }
    if let (Some(disk), Some((store, _))) = (&config.disk, store) {
        let recovery = store.recovery();
        let state = match (recovery.existed, recovery.clean) {
            (false, _) => "new".to_owned(),
            (true, true) => format!("{} of them filled by earlier runs", recovery.blocks),
            (true, false) => format!(
                "{} of them filled by earlier runs, the last of which ended at once",
                recovery.blocks
            ),
        };
        parts.push(format!(
            "G3 {} blocks, {:.3} GB in {}, {state}",
            disk.blocks,
            gb(disk.blocks),
            store.path().display()
        ));
    }
    if sizes.object_blocks > 0 {
        let blocks = sizes.object_blocks;
        parts.push(format!("G4 up to {blocks} objects"));
    }
    if sizes.peers {
        let blocks = sizes.lend_blocks;
        parts.push(format!(
            "G4 at other workers, {blocks} blocks of G2 for them"
        ));
    }
    parts.join("; ")
}
