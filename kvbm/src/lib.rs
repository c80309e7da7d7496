//! The block manager: who holds which KV block, under which name it is found, and when it may be
//! overwritten.
//!
//! KV is kept in up to four tiers, each slower and larger than the one before it:
//!
//! | tier | where | its books | its memory |
//! |---|---|---|---|
//! | G1 | where the engine computes | a [`BlockPool`] per rank | a [`KvArena`] |
//! | G2 | host memory, shared by all ranks | a [`BlockPool`] | a [`KvArena`] |
//! | G3 | local disk, shared by all ranks | a [`BlockPool`]; a block's id is its slot | a [`SlotStore`] |
//! | G4 | an object store, or other workers | a bounded set of names ([`RemoteIndex`]) | |
//!
//! So one set of rules holds on all tiers: who fills a block has it alone, only a complete block is
//! found, what is held is not overwritten, and a name is there once. [`Tiers`] decides
//! what is moved between them and when, without I/O, threads or clock; a [`Mover`]
//! moves the bytes through `blockplane-transfer`; [`admit`] says what is worth a write to disk.
//! Everything below G1 is a cache: what cannot be read in time is computed again. Changes on all
//! tiers of a rank are one numbered stream ([`EventHub`]); what an engine outside of this process holds
//! is told by an [`EventWriter`]. Models whose layers attend differently
//! have a pool for each kind ([`groups`]).
//!
//! A block's life is a typestate, so that a wrong order does not compile:
//!
//! ```text
//! BlockPool::allocate -> MutableBlock --complete--> CompleteBlock --register--> ImmutableBlock
//!        ^                    | drop                    | drop                    | last drop
//!        |                    v                         v                         v
//!        +--------------- free list <-------------------+            inactive, still found by
//!        +------- evicted, oldest first, as soon as room is needed --- its sequence hash
//! ```
//!
//! Depend on this crate to run a model on blocks (engine), to move blocks between tiers, or to
//! publish what a cache holds. A router only needs the events, which are `blockplane-protocol`
//! types.
//!
//! ```
//! use blockplane_kvbm::{BlockPool, PoolConfig};
//! use blockplane_protocol::{SaltHash, TokenSequence};
//!
//! let pool = BlockPool::accounting(8, PoolConfig::default());
//! let prompt = TokenSequence::from_tokens(&[1, 2, 3, 4, 5, 6, 7, 8], 4, SaltHash::default());
//!
//! let mut parent = None;
//! let mut held = Vec::new();
//! for (block, hashes) in pool.allocate(2)?.into_iter().zip(prompt.blocks()) {
//!     // ... compute the block's keys and values ...
//!     held.push(block.complete(*hashes, parent).register());
//!     parent = Some(hashes.sequence);
//! }
//! drop(held);
//!
//! assert_eq!(pool.match_prefix(prompt.blocks()).len(), 2);
//! # Ok::<(), blockplane_kvbm::PoolExhausted>(())
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(
    loom,
    allow(dead_code, reason = "what only the tiers use, which no model has")
)]

pub mod admit;
#[cfg(not(loom))]
pub mod arena;
pub mod block;
pub mod events;
pub mod evict;
#[cfg(not(loom))]
pub mod external;
#[cfg(not(loom))]
pub mod fingerprint;
#[cfg(not(loom))]
pub mod groups;
#[cfg(not(loom))]
pub mod metrics;
#[cfg(not(loom))]
pub mod open;
pub mod pool;
#[cfg(not(loom))]
pub mod ranks;
#[cfg(not(loom))]
pub mod remote;
#[cfg(not(loom))]
pub mod settings;
#[cfg(not(loom))]
pub mod store;
mod sync;
#[cfg(not(loom))]
pub mod tier;
#[cfg(not(loom))]
mod wire;

pub use admit::{
    Admission, AdmissionConfig, AdmissionKind, Offer, Offered, UnknownAdmission, WriteBudget,
    WriteBudgetConfig, WriteBudgetError,
};
#[cfg(not(loom))]
pub use arena::{ArenaError, ArenaPlace, KvArena};
pub use block::{
    CompleteBlock, HeldBlocks, ImmutableBlock, LeasedBlocks, MutableBlock, Quarantine,
};
pub use events::{
    Consolidation, EventFeed, EventHub, EventSubscription, EventWriter, JoinError, KvBatch,
    KvSnapshot,
};
pub use evict::{EvictionKind, EvictionPolicy, Lineage, Lru, MultiLru, S3Fifo};
#[cfg(not(loom))]
pub use external::{ExternalConfig, ExternalRank, LookupClient, LookupRequest, LookupServer};
#[cfg(not(loom))]
pub use fingerprint::Fingerprint;
pub use pool::{BlockPool, PoolActivity, PoolBuilder, PoolConfig, PoolExhausted, PoolStats};
#[cfg(not(loom))]
pub use ranks::{RankShape, RankWorker, RankedMover};
#[cfg(not(loom))]
pub use remote::{ObjectTier, ObjectTierConfig, PeerParts, PeerTier, PeerTierConfig, Remotes};
#[cfg(not(loom))]
pub use settings::{KvbmSettings, resolve};
#[cfg(not(loom))]
pub use store::{SlotStore, SlotStoreConfig};
#[cfg(not(loom))]
pub use tier::{
    DiskConfig, MoveKind, MoveReport, MoveSpec, Mover, OnboardTicket, PerTier, RankTiers,
    RemoteIndex, TierConfig, TierManager, TierMatch, TierParts, TierPools, TierStats, Tiers,
    host_arena,
};
