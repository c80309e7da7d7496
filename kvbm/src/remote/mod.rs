//! G4: blocks that other machines keep, in an object store or in the G2 of other workers.
//!
//! [`ObjectTier`] is the [`Mover`](crate::Mover) and the [`RemoteIndex`](crate::RemoteIndex) of an
//! object store (docs/kv-object.md), [`PeerTier`] of other workers (docs/kv-peers.md), and [`Remotes`]
//! of both.

mod both;
mod format;
mod names;
mod object;
mod peers;
mod slots;

pub use both::Remotes;
pub use object::{ObjectStats, ObjectTier, ObjectTierConfig, ObjectTierError};
pub use peers::{PeerParts, PeerStats, PeerTier, PeerTierConfig, PeerTierError};
