//! The feed by which a worker keeps a router informed: snapshots, KV events and load reports.
//!
//! A subscriber sends one [`FeedRequest`] and receives [`FeedItem`]s until either side leaves. For each
//! rank the worker continues at the position asked for; where it cannot (the subscriber is new, or the
//! events it wants are gone), a snapshot of that rank comes first.

use serde::{Deserialize, Serialize};

use crate::{
    hash::SequenceHash,
    id::{DpRank, WorkerId},
    kv_event::{KvEvent, StoredBlock, Tier},
    load::LoadReport,
};

/// Blocks in one [`FeedItem::Snapshot`] at most; more are split over several.
pub const SNAPSHOT_BLOCKS_MAX: usize = 65_536;

/// Where a subscriber wants to go on. A rank that is not named starts with a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FeedRequest {
    /// The worker that is meant. Another one, which has taken over the address, refuses with
    /// [`ErrorKind::WorkerLost`](crate::ErrorKind::WorkerLost): its event ids mean something else.
    pub worker: Option<WorkerId>,
    /// For each known rank, the id of the last event that was applied; 0 if none was. The feed goes on
    /// with the one after it.
    pub from: Vec<(DpRank, u64)>,
}

/// One message of the feed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedItem {
    /// Everything that a rank holds; replaces what was known of it.
    Snapshot {
        /// The rank.
        rank: DpRank,
        /// The last event that the snapshot contains; 0 when there was none.
        last_event_id: u64,
        /// The blocks, each after its parent.
        blocks: Vec<SnapshotBlock>,
        /// More parts of the same snapshot follow at once.
        #[serde(default)]
        more: bool,
    },
    /// Changes, in order.
    Events(Vec<KvEvent>),
    /// The load of some or all ranks; also the sign of life of an idle worker.
    Load(Vec<LoadReport>),
}

/// One block of a [`FeedItem::Snapshot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotBlock {
    /// Block before it; `None` at the start of a sequence.
    pub parent: Option<SequenceHash>,
    /// The block.
    pub block: StoredBlock,
    /// Where it is.
    #[serde(default)]
    pub tier: Tier,
}

impl FeedItem {
    /// A snapshot as the messages that carry it, at least one, each of at most
    /// [`SNAPSHOT_BLOCKS_MAX`] blocks.
    #[must_use]
    pub fn snapshot(rank: DpRank, last_event_id: u64, blocks: &[SnapshotBlock]) -> Vec<Self> {
        let part = |blocks: &[SnapshotBlock], more| Self::Snapshot {
            rank,
            last_event_id,
            blocks: blocks.to_vec(),
            more,
        };
        if blocks.is_empty() {
            return vec![part(&[], false)];
        }
        let parts = blocks.len().div_ceil(SNAPSHOT_BLOCKS_MAX);
        blocks
            .chunks(SNAPSHOT_BLOCKS_MAX)
            .enumerate()
            .map(|(index, chunk)| part(chunk, index + 1 < parts))
            .collect()
    }
}
