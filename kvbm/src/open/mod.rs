//! From settings to running tiers: memory, store and object store of one worker, or of one rank of it.

mod facts;
mod objects;

use std::sync::Arc;

use blockplane_protocol::{DpRank, KvLayout};
use blockplane_transfer::{
    Agent, AgentConfig, AgentError, DirectIo, Lane, OpenError as PlaceError,
};
use thiserror::Error;

pub use facts::facts;

use crate::{
    arena::{ArenaError, ArenaPlace, KvArena},
    events::{Consolidation, EventHub},
    fingerprint::Fingerprint,
    remote::{ObjectTier, ObjectTierError, PeerTier, Remotes},
    settings::{ConsolidatorMode, DiskAllocator, HostFacts, KvbmSettings, Severity, Sizes},
    store::{RecoveredSlot, SlotStore, SlotStoreConfig, StoreError, StoreLocation},
    tier::{Mover, RemoteIndex, TierConfig, TierError, TierManager, TierParts, host_arena},
};

/// What the tiers must know of the engine above them.
#[derive(Clone, Debug)]
pub struct TierPlan {
    /// Name of the worker's transfer agent; that of the tiers is `NAME-tiers`.
    pub worker: String,
    /// Shape of the engine's blocks, on this rank.
    pub layout: KvLayout,
    /// Which contents.
    pub fingerprint: Fingerprint,
    /// Ranks that each hold a part of every block. Settings are for all of them.
    pub sharing: u32,
    /// Data-parallel ranks, whose blocks are theirs alone, and which share the tiers.
    pub ranks: u32,
    /// KV events kept for each rank.
    pub events_max: usize,
    /// What G2 is made of.
    pub place: ArenaPlace,
    /// How other workers reach the agent of the tiers, if they may.
    pub network: Option<AgentConfig>,
}

/// Why the tiers cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The settings cannot work here.
    #[error("settings of the KV tiers:\n  {}", .0.join("\n  "))]
    Settings(Vec<String>),
    /// An object store without a bucket.
    #[error("DYN_KVBM_OBJECT_ENABLED needs DYN_KVBM_OBJECT_BUCKET")]
    NoBucket,
    /// The agent of the tiers.
    #[error("the transfer agent of the KV tiers cannot be started: {0}")]
    Agent(#[from] AgentError),
    /// The memory of G2.
    #[error("the host memory of the KV tiers (G2): {0}")]
    Memory(#[from] ArenaError),
    /// A store on the disk that is not ours to use.
    #[error("the disk of the KV tiers (G3): {0}")]
    Disk(#[from] StoreError),
    /// The object store.
    #[error("the object store of the KV tiers (G4): {0}")]
    Store(#[from] PlaceError),
    /// The objects in it.
    #[error("the objects of the KV tiers (G4): {0}")]
    Objects(#[from] ObjectTierError),
    /// The manager.
    #[error("the KV tiers cannot be started: {0}")]
    Tiers(#[from] TierError),
}

/// Tiers that are open and not running yet.
#[derive(Debug)]
pub struct OpenTiers {
    /// What the settings come to.
    pub sizes: Sizes,
    /// The agent whose memory G2 is.
    pub agent: Agent,
    /// G2, or what stands in for it.
    pub host: Arc<KvArena>,
    /// A hub for each data-parallel rank.
    pub hubs: Vec<Arc<EventHub>>,
    config: TierConfig,
    /// The hubs are told of the tiers.
    told: bool,
    store: Option<Store>,
    objects: Option<Arc<ObjectTier>>,
}

type Store = (Arc<SlotStore>, Vec<RecoveredSlot>);

impl OpenTiers {
    /// Opens what the settings ask for; nothing where they ask for no tier. `facts` says what is odd
    /// about them on this machine, which is logged, or cannot work.
    ///
    /// # Errors
    /// What cannot work. A disk that does not is no error: G3 is off, with a warning.
    pub fn open(
        settings: &KvbmSettings,
        facts: &HostFacts,
        plan: &TierPlan,
    ) -> Result<Option<Self>, OpenError> {
        let sizes = settings.sizes(plan.layout.block_bytes() as u64, plan.sharing);
        check(settings, &sizes, facts)?;
        let Some(mut config) = settings.tier_config(&sizes) else {
            return Ok(None);
        };
        let name = format!("{}-tiers", plan.worker);
        let network = match plan.network.as_ref().filter(|_| sizes.peers) {
            Some(network) => AgentConfig {
                name,
                ..network.clone()
            },
            None => AgentConfig::new(name).with_lanes([Lane::Loopback]),
        };
        let agent = Agent::new(network)?;
        let store = open_store(settings, &mut config, &agent, plan)?;
        if config.host_blocks == 0 && config.disk.is_none() && config.remote.is_none() {
            return Ok(None);
        }
        let host = host_arena(&agent, &plan.layout, &config, plan.place)?;
        let mode = match settings.kv_events_consolidator_mode.value {
            ConsolidatorMode::Dedup => Consolidation::Dedup,
            ConsolidatorMode::Passthrough => Consolidation::Passthrough,
        };
        let hub = |rank| EventHub::new(DpRank(rank), plan.events_max, mode);
        let objects = if sizes.object_blocks > 0 {
            let (worker, print) = (&plan.worker, plan.fingerprint);
            Some(objects::open(settings, worker, &agent, &host, print)?)
        } else {
            None
        };
        Ok(Some(Self {
            sizes,
            agent,
            host,
            hubs: (0..plan.ranks).map(hub).collect(),
            config,
            told: settings.kv_events_enable_consolidator.value,
            store,
            objects,
        }))
    }

    /// Starts them, with what other workers have as one more tier.
    ///
    /// # Errors
    /// A thread cannot be had, or a hub has other tiers.
    pub fn start(self, peers: Option<Arc<PeerTier>>) -> Result<TierManager, OpenError> {
        let summary = self.summary();
        let hubs = if self.told { self.hubs } else { Vec::new() };
        let parts = TierParts {
            agent: self.agent,
            host: self.host,
            store: self.store,
            remote: remote(peers, self.objects),
            hubs,
        };
        let manager = TierManager::start(&self.config, parts)?;
        tracing::info!("KV tiers: {summary}");
        Ok(manager)
    }

    /// One line for people.
    fn summary(&self) -> String {
        let (sizes, config, store) = (&self.sizes, &self.config, self.store.as_ref());
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
}

/// G4: other workers, an object store, or both.
fn remote(
    peers: Option<Arc<PeerTier>>,
    objects: Option<Arc<ObjectTier>>,
) -> Option<(Arc<dyn RemoteIndex>, Arc<dyn Mover>)> {
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

/// Says what is odd about the settings; fails for what cannot work.
fn check(settings: &KvbmSettings, sizes: &Sizes, facts: &HostFacts) -> Result<(), OpenError> {
    let mut errors = Vec::new();
    for finding in settings.check(sizes, facts) {
        match finding.severity {
            Severity::Error => errors.push(finding.text),
            Severity::Warning => tracing::warn!("KV tiers: {}", finding.text),
        }
    }
    if errors.is_empty() {
        return Ok(());
    }
    Err(OpenError::Settings(errors))
}

/// Opens G3. A disk that does not work turns it off, with a warning; a store that is not ours to use
/// is an error.
fn open_store(
    settings: &KvbmSettings,
    config: &mut TierConfig,
    agent: &Agent,
    plan: &TierPlan,
) -> Result<Option<Store>, OpenError> {
    let Some(disk) = &config.disk else {
        return Ok(None);
    };
    let location = match &settings.disk_device.value {
        Some(device) => StoreLocation::Device(device.clone()),
        None => StoreLocation::Folder(settings.disk_cache_dir.value.clone()),
    };
    let bytes = plan.layout.block_bytes() as u64;
    let mut store = SlotStoreConfig::new(location, disk.blocks, bytes, plan.fingerprint);
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
        Err(error) => Err(error.into()),
    }
}
