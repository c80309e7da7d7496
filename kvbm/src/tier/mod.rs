//! The tiers below G1: what is where, what is moved when, and who does it.
//!
//! ```text
//!            engine rank                       copies by           what is true there
//!   G1   ┌──────────────┐
//!        │ blocks of a  │                                          computed, registered
//!        │ rank's pool  │
//!        └──┬────────▲──┘
//!   offload │        │ onboard                 memory, CUDA        held while it is copied
//!        ┌──▼────────┴──┐
//!   G2   │ host memory, │◀─ find: every tier ──                    found by name once all bytes
//!        │ all ranks    │   continues the run                      are in place; held while a
//!        └──┬────▲───┬──┘                                          request wants it
//!  admitted │    │   │ write-through
//!  or about │    │   └────────┐                file, network       written only if it is not
//!  to be    │    │ read once, │                                    there, read only with its
//!  over-    │    │ verified,  │                                    checksum
//!  written  │    │ promoted   │
//!        ┌──▼────┴──┐   ┌─────▼────┐
//!   G3   │  slots   │   │  objects │  G4
//!        │  on disk │   │  or peers│
//!        └──────────┘   └──────────┘
//! ```
//!
//! [`Tiers`] decides and keeps the books, without threads, clocks or I/O. A [`Mover`] copies. Each
//! tier's books are a [`BlockPool`](crate::BlockPool): a block id of G3 is a slot of its store. G3
//! and G4 are never read into G1 directly.
//!
//! Everything below G1 is a cache. What is late, lost or wrong is reported as not loaded and is
//! computed again; a tier that is late again and again is left alone ([`TierState`]).

mod config;
mod flight;
mod found;
mod health;
mod local;
mod manager;
mod moves;
mod offload;
mod onboard;
mod queue;
mod save;
mod slots;
mod stats;
mod tiers;
mod write;

pub use config::{
    DiskConfig, HealthConfig, QueueConfig, RemoteConfig, TierConfig, TierConfigError,
};
pub use found::{PerTier, TierMatch};
pub use health::{StateChange, TierState};
pub use local::{AttachError, ExternalMemory, ExternalSegment, LocalMover};
pub use manager::{OnboardTicket, RankTiers, TierError, TierManager, TierParts, host_arena};
pub use moves::{
    BlockOutcome, Invalid, MoveId, MoveKind, MoveReport, MoveSpec, MovedBlock, Mover, Pending,
    TierFault,
};
pub use onboard::{NotLoaded, OnboardId, Onboarded};
pub use save::{SaveId, Saved};
pub use stats::{Dropped, Evicted, Histogram, MoveStats, OnboardStats, TierStats};
pub use tiers::{RemoteIndex, TierPools, Tiers};
