//! Tensor parallelism: one leader keeps the books, every rank copies its share of each block.
//!
//! Block ids and slots are the same on all ranks. A [`RankedMover`] is a [`Mover`](crate::Mover) that
//! sends each move to all ranks and reports a block as moved only if all of them moved it: a block
//! that failed on one rank is known on none. A [`RankWorker`] does the moves of one rank with a mover
//! of its own.
//!
//! A lost or stopped rank fails the moves that it has a part in, within their time, and no others
//! until it is back. As long as nobody knows that it has stopped copying, the blocks of such a move
//! stay out of use ([`Pending`](crate::tier::Pending)).
//!
//! A rank that died comes back with an empty G1 and G2, while the leader's books still have what was
//! there. Of G2 a rank gives only what came into it since it started; the rest is
//! [`Invalid::Missing`](crate::tier::Invalid), which takes the block out of the books. What is in G1
//! nobody but the engine knows: nothing is offloaded from it until the engine has emptied the pool of
//! G1 and said so ([`RankedMover::device_emptied`]).
//!
//! Messages travel over any [`RankLink`]; [`serve_ranks`] and [`join_leader`] take the notifications
//! of a transfer agent. They may be lost, repeated, late and out of order.

mod codec;
mod held;
mod leader;
mod net;
mod worker;

pub use codec::RankShape;
pub use leader::{RankError, RankStats, RankedMover};
pub use net::{LeaderLink, NetError, RankHost, join_leader, serve_ranks};
pub use worker::RankWorker;

use std::time::Duration;

/// Carries messages one way, from the leader to a rank or back.
pub trait RankLink: Send + Sync {
    /// Sends a message; it is of no use after `time`. Does not wait for its arrival.
    ///
    /// # Errors
    /// It was certainly not sent; the error says why.
    fn send(&self, message: Vec<u8>, time: Duration) -> Result<(), String>;
}
