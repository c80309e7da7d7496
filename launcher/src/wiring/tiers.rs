//! The tiers below an engine's pool: from settings to a running manager.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use blockplane_engine::TierHandle;
use blockplane_kvbm::{
    ArenaPlace, Fingerprint, KvbmSettings,
    open::{OpenTiers, TierPlan, facts},
    tier::TierManager,
};
use blockplane_protocol::KvLayout;
use blockplane_transfer::AgentConfig;

use super::peers::{self, Peers};

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
    let fingerprint = Fingerprint::of(above.fingerprint, &above.layout, 0, 1);
    let plan = TierPlan {
        worker: above.agent.clone(),
        layout: above.layout.clone(),
        fingerprint,
        // Data-parallel ranks share the tiers: each block is one rank's alone.
        sharing: 1,
        ranks: above.ranks,
        events_max: above.events_max,
        place: ArenaPlace::Host,
        network: Some(above.network.clone()),
    };
    // G2 is not pinned: the engine has no device.
    let facts = facts(settings, false, above.blocks);
    let Some(open) = OpenTiers::open(settings, &facts, &plan)? else {
        return Ok(None);
    };
    let sizes = open.sizes;
    let peers = if sizes.peers {
        let started = peers::start(&open.agent, &open.host, fingerprint, &sizes)?;
        Some(started)
    } else {
        None
    };
    let hubs = open.hubs.clone();
    let manager = open.start(peers.as_ref().map(|peers| Arc::clone(&peers.tier)))?;
    if let Some(peers) = peers.as_ref().filter(|_| sizes.lend_blocks > 0) {
        let lent = peers.tier.lend(manager.host());
        lent.context("G2 cannot be lent to other workers")?;
    }
    Ok(Some(Below {
        handle: TierHandle {
            manager: Arc::new(manager),
            hubs,
        },
        peers,
    }))
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
