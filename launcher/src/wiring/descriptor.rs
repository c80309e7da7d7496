//! What a worker writes into discovery, and what others read from it.

use anyhow::Context;
use blockplane_protocol::ModelCard;
use blockplane_runtime::discovery::Instance;
use serde::{Deserialize, Serialize};

use super::peers::KvPeer;

/// RPC endpoint for [`blockplane_protocol::GenerateRequest`].
pub(crate) const GENERATE: &str = "generate";
/// RPC endpoint for [`blockplane_protocol::PrefillJob`].
pub(crate) const PREFILL: &str = "prefill";
/// RPC endpoint for [`blockplane_protocol::feed::FeedRequest`].
pub(crate) const FEED: &str = "kv_events";

/// The metadata of a worker's discovery entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct WorkerDescriptor {
    /// Name for people.
    pub(crate) name: String,
    /// Process id on its host.
    pub(crate) pid: u32,
    /// What it serves.
    pub(crate) card: ModelCard,
    /// How other workers read KV blocks from it, if it exchanges any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kv_peer: Option<KvPeer>,
}

impl WorkerDescriptor {
    /// Reads the descriptor of a discovery entry.
    pub(crate) fn of(instance: &Instance) -> anyhow::Result<Self> {
        serde_json::from_value(instance.metadata.clone()).with_context(|| {
            format!(
                "worker {} at {} does not describe itself",
                instance.id, instance.address
            )
        })
    }
}
