//! Notifications through shared memory: what a peer on this host sends costs no system call while
//! the receiver is awake, and one futex wake when it is parked.
//!
//! The receiving agent owns all of it. Every connection that a peer makes gets a [`ring`] of its
//! own, a sealed memory file into which only that peer writes. All peers share the receiver's
//! [`bell`]: one bit for each ring that has something, the word on which receivers park, and the
//! wish of an async receiver to be told through the connection. The wire document has the layout.
//!
//! What a peer writes there is checked like anything else that it sends. It is trusted with the
//! bell as it is trusted with the arenas that it maps: by spoiling it, a process of the same user
//! can delay notifications, and no more.

mod bell;
mod positions;
mod records;

pub(crate) use bell::{Bell, RemoteBell};
pub(crate) use records::{Reader, SendError, Writer};
