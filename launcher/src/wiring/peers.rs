//! G4 at other workers: discovery says who they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    sync::Arc,
};

use anyhow::{Context, ensure};
use blockplane_kvbm::{Fingerprint, KvArena, PeerParts, PeerTier, PeerTierConfig, settings::Sizes};
use blockplane_protocol::WorkerId;
use blockplane_runtime::discovery::{InstanceWatch, Instances};
use blockplane_transfer::{Agent, Metadata};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::descriptor::WorkerDescriptor;

/// How other workers reach the blocks of a worker: a part of its descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KvPeer {
    /// What the blocks mean, in hexadecimal. Only workers of the same one exchange blocks.
    fingerprint: String,
    /// Metadata of its agent, in hexadecimal.
    agent: String,
}

/// The exchange of blocks with other workers.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    pub(crate) tier: Arc<PeerTier>,
    /// What others have to know.
    pub(crate) own: KvPeer,
}

/// Follows discovery until it is dropped.
#[derive(Debug)]
pub(crate) struct Follower(JoinHandle<()>);

/// Starts the exchange of the blocks of `host`, the memory of `agent`. Nobody is known yet, and nothing is
/// lent.
pub(crate) fn start(
    agent: &Agent,
    host: &Arc<KvArena>,
    fingerprint: Fingerprint,
    sizes: &Sizes,
) -> anyhow::Result<Peers> {
    let parts = PeerParts {
        control: agent.clone(),
        agent: agent.clone(),
        host: Arc::clone(host),
        fingerprint,
    };
    let config = PeerTierConfig {
        lent_blocks_max: sizes.lend_blocks as usize,
        ..PeerTierConfig::default()
    };
    let tier = PeerTier::start(parts, config)
        .context("the exchange of KV blocks with other workers (G4) cannot be started")?;
    let own = KvPeer {
        fingerprint: hex(&fingerprint.encode()),
        agent: hex(&agent.metadata().to_bytes()),
    };
    Ok(Peers { tier, own })
}

/// Adds the workers that `watch` shows, and removes those that it does not show any more. `own` is this
/// worker.
pub(crate) fn follow(peers: Peers, mut watch: InstanceWatch, own: WorkerId) -> Follower {
    Follower(tokio::spawn(async move {
        let mut known = Known::default();
        let mut instances = watch.current();
        loop {
            known.reconcile(&peers, &instances, own);
            match watch.changed().await {
                Ok(now) => instances = now,
                Err(error) => {
                    // Those that are known go on exchanging blocks.
                    tracing::warn!(%error, "KV tiers: workers that start from now on are no peers");
                    return;
                }
            }
        }
    }))
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The peers of this moment, with the metadata by which they were added and their agents' names.
#[derive(Default)]
struct Known {
    peers: BTreeMap<WorkerId, (KvPeer, String)>,
    /// Those that it was said of why they are no peers.
    reported: BTreeSet<WorkerId>,
}

impl Known {
    fn reconcile(&mut self, peers: &Peers, instances: &Instances, own: WorkerId) {
        let wanted = wanted(instances, &peers.own, own);
        self.peers.retain(|id, (peer, name)| {
            let stays = wanted.get(id) == Some(peer);
            if !stays {
                peers.tier.remove_peer(name);
            }
            stays
        });
        self.reported.retain(|id| wanted.contains_key(id));
        for (id, peer) in wanted {
            if self.peers.contains_key(&id) {
                continue;
            }
            match add(&peers.tier, &peer) {
                Ok(name) => {
                    self.peers.insert(id, (peer, name));
                }
                Err(error) if self.reported.insert(id) => {
                    tracing::warn!(worker = %id, "KV tiers: no blocks of this worker: {error:#}");
                }
                Err(_) => {}
            }
        }
    }
}

/// The workers whose blocks are like those of `like`.
fn wanted(instances: &Instances, like: &KvPeer, own: WorkerId) -> BTreeMap<WorkerId, KvPeer> {
    let others = instances.values().filter(|instance| instance.id != own);
    let described = others.filter_map(|instance| {
        // A worker that does not describe itself is reported by the frontend.
        let peer = WorkerDescriptor::of(instance).ok()?.kv_peer?;
        Some((instance.id, peer))
    });
    described
        .filter(|(_, peer)| peer.fingerprint == like.fingerprint)
        .collect()
}

/// Adds a peer; the name of its agent.
fn add(tier: &PeerTier, peer: &KvPeer) -> anyhow::Result<String> {
    let bytes = unhex(&peer.agent).context("the address of its blocks cannot be read")?;
    let metadata =
        Metadata::from_bytes(&bytes).context("the address of its blocks cannot be read")?;
    tier.add_peer(&metadata)?;
    Ok(metadata.name().to_owned())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> anyhow::Result<Vec<u8>> {
    let digits = text.as_bytes();
    ensure!(
        digits.len().is_multiple_of(2) && digits.is_ascii(),
        "'{text}' is not hexadecimal"
    );
    let byte = |pair: &[u8]| {
        let text = std::str::from_utf8(pair)?;
        u8::from_str_radix(text, 16).with_context(|| format!("'{text}' is not hexadecimal"))
    };
    digits.chunks_exact(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::{DType, KvLayout};
    use blockplane_runtime::discovery::Instance;
    use blockplane_transfer::AgentConfig;

    use super::*;
    use crate::wiring::tests::card;

    fn peers(name: &str, model: u64) -> Peers {
        let agent = Agent::new(AgentConfig::new(name)).unwrap();
        let layout = KvLayout::dense(1, 1, 8, 16, DType::F32);
        let host = KvArena::allocate(&agent, layout.clone(), 4, "g2").unwrap();
        let settings = blockplane_kvbm::KvbmSettings::default();
        let fingerprint = Fingerprint::of(model, &layout, 0, 1);
        start(&agent, &host, fingerprint, &settings.sizes(64, 1)).unwrap()
    }

    fn instance(id: u64, kv_peer: Option<&KvPeer>) -> Instance {
        let descriptor = WorkerDescriptor {
            name: format!("w{id}"),
            pid: 1,
            card: card(),
            kv_peer: kv_peer.cloned(),
        };
        Instance {
            id: WorkerId(id),
            endpoint: "dyn://test.aggregated.generate".parse().unwrap(),
            address: "127.0.0.1:1".to_owned(),
            metadata: serde_json::to_value(descriptor).unwrap(),
        }
    }

    fn instances(all: Vec<Instance>) -> Instances {
        let keyed = all.into_iter().map(|instance| (instance.key(), instance));
        keyed.collect()
    }

    #[test]
    fn those_with_the_same_blocks_are_peers_for_as_long_as_they_are_there() {
        let (a, b, again, other) = (peers("a", 7), peers("b", 7), peers("b", 7), peers("c", 8));
        let mut known = Known::default();
        let own = WorkerId(1);
        let mut see = |all: Vec<Instance>| {
            known.reconcile(&a, &instances(all), own);
            a.tier.stats().peers
        };
        let me = || instance(1, Some(&a.own));
        assert_eq!(see(vec![me(), instance(2, None)]), 0);
        let with = |peer: &Peers| vec![me(), instance(3, Some(&peer.own))];
        assert_eq!(see(with(&other)), 0, "another model");
        assert_eq!(see(with(&b)), 1);
        assert_eq!(see(with(&b)), 1);
        // The same place in discovery, and another process.
        assert_eq!(see(with(&again)), 1);
        assert_eq!(see(vec![me()]), 0);
    }

    #[test]
    fn an_address_that_cannot_be_read_is_an_error_and_not_a_peer() {
        let peers = peers("lonely", 7);
        for agent in ["", "0", "zz", "é", "00ff"] {
            let peer = KvPeer {
                agent: agent.to_owned(),
                ..peers.own.clone()
            };
            let error = add(&peers.tier, &peer).unwrap_err();
            assert!(format!("{error:#}").contains("cannot be read"), "{error:#}");
        }
        assert_eq!(
            unhex(&hex(&[0, 1, 0xab, 0xff])).unwrap(),
            [0, 1, 0xab, 0xff]
        );
    }
}
