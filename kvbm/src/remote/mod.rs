//! G4: blocks that other machines keep, in an object store.
//!
//! [`ObjectTier`] is the [`Mover`](crate::Mover) and the [`RemoteIndex`](crate::RemoteIndex) of such a
//! store. docs/kv-object.md describes keys and bytes.

mod format;
mod names;
mod object;
mod slots;

pub use object::{ObjectStats, ObjectTier, ObjectTierConfig, ObjectTierError};
