//! What a peer tier is made of, and why there is none.

use std::{io, sync::Arc, time::Duration};

use blockplane_transfer::{Agent, MetadataError};
use thiserror::Error;

use crate::{arena::KvArena, events::JoinError, fingerprint::Fingerprint};

/// How a worker exchanges blocks with its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerTierConfig {
    /// Peers, at most. Default 64.
    pub peers_max: usize,
    /// Names kept of each peer, at most; what it has beyond is not found. Default 1,000,000. Cost:
    /// about 16 bytes each.
    pub names_max: usize,
    /// Blocks of the own G2 that are lent at a time, to all peers together. They cannot be evicted
    /// meanwhile. Default 1024. One peer has at most as many as are left then: the first one half, the
    /// next one half of the rest. What stopped readers keep beyond their time counts apart, up to as
    /// many again.
    pub lent_blocks_max: usize,
    /// Longest time for which blocks are lent. Default 10 s. A reader asks for less: what is left of
    /// its move.
    pub lease_time: Duration,
    /// Longest wait for a lease. A peer that does not answer in this time is not asked again before
    /// it has said something. Default 500 ms.
    pub lease_wait: Duration,
    /// Least time between two announcements to one peer. Default 20 ms.
    pub announce_every: Duration,
}

impl Default for PeerTierConfig {
    fn default() -> Self {
        Self {
            peers_max: 64,
            names_max: 1_000_000,
            lent_blocks_max: 1024,
            lease_time: Duration::from_secs(10),
            lease_wait: Duration::from_millis(500),
            announce_every: Duration::from_millis(20),
        }
    }
}

impl PeerTierConfig {
    pub(super) fn validate(&self) -> Result<(), PeerTierError> {
        let waits = [
            ("lease_time", self.lease_time),
            ("lease_wait", self.lease_wait),
        ];
        match waits.into_iter().find(|(_, time)| time.is_zero()) {
            None => Ok(()),
            Some((field, _)) => Err(PeerTierError::InvalidConfig {
                field,
                got: "0".to_owned(),
                accepted: "more than 0",
            }),
        }
    }
}

/// What a peer tier works with.
#[derive(Debug)]
pub struct PeerParts {
    /// Carries the messages. Its notifications are used for nothing else. It may be `agent` if nobody
    /// else takes that one's notifications.
    pub control: Agent,
    /// The agent whose memory G2 is.
    pub agent: Agent,
    /// G2.
    pub host: Arc<KvArena>,
    /// What the bytes of its blocks mean. Blocks are exchanged with peers of the same only.
    pub fingerprint: Fingerprint,
}

/// Why there is no peer tier, or no such peer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PeerTierError {
    /// A setting is out of range.
    #[error("{field} is {got}; accepted: {accepted}")]
    InvalidConfig {
        /// The setting.
        field: &'static str,
        /// Its value.
        got: String,
        /// What is accepted.
        accepted: &'static str,
    },
    /// G2 is not memory of that agent.
    #[error("the memory of G2 cannot be told to peers: {0}")]
    Memory(#[from] MetadataError),
    /// A thread cannot be had.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
    /// There are as many peers as there may be.
    #[error("peer '{peer}' is one too many; at most {limit} are accepted (peers_max)")]
    TooMany {
        /// Who was to be added.
        peer: String,
        /// The bound.
        limit: usize,
    },
    /// The blocks of the pool are elsewhere.
    #[error("the pool that is to be lent from has no memory, or not that of this tier")]
    ForeignPool,
    /// The pool is gone.
    #[error(transparent)]
    Hub(#[from] JoinError),
}
