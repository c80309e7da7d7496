//! What a worker tells the router about the blocks it holds.

use serde::{Deserialize, Serialize};

use crate::{
    hash::{BlockHash, SequenceHash},
    id::DpRank,
};

/// Where a block is kept.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// G1: where the engine computes.
    #[default]
    Device,
    /// G2: (pinned) host memory.
    Host,
    /// G3: local disk.
    Disk,
    /// G4: object store or a remote peer.
    Remote,
}

/// One change of a worker's cache. Ids of one rank ascend by exactly 1; a gap means a loss.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvEvent {
    /// Sequence number, per rank, from 1.
    pub event_id: u64,
    /// The rank whose cache changed.
    pub rank: DpRank,
    /// What changed.
    pub data: KvEventData,
}

/// The change itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum KvEventData {
    /// Consecutive blocks of one sequence became readable.
    Stored {
        /// Block before the first one; `None` at the start of a sequence.
        parent: Option<SequenceHash>,
        /// The blocks in order.
        blocks: Vec<StoredBlock>,
        /// Where they are.
        tier: Tier,
    },
    /// Blocks are gone from a tier.
    Removed {
        /// Their names.
        hashes: Vec<SequenceHash>,
        /// The tier they left.
        tier: Tier,
    },
    /// Everything of this rank is gone.
    Cleared,
}

/// A block named in [`KvEventData::Stored`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredBlock {
    /// Hash of its own tokens.
    pub block: BlockHash,
    /// Hash of the sequence that ends with it.
    pub sequence: SequenceHash,
}
