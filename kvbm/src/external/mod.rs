//! The tiers below an engine that keeps the books of its own G1.
//!
//! Such an engine (vLLM) has a scheduler, which decides what is computed where, and a worker, which
//! owns the memory; they may be two processes. The tiers live with the memory:
//!
//! ```text
//!   scheduler                                  worker
//!   LookupClient --- what is there? --------> LookupServer
//!                <-- so much, held -----------      |
//!        |                                    ExternalRank -- RankTiers -- G2, G3, G4
//!        +--- engine's own messages: load, save ----^  |
//!                                     what ended <-----+
//! ```
//!
//! [`LookupClient::lookup`] finds the longest run of blocks below G1 and holds it for a while. The
//! engine picks blocks of its G1, and its worker has the run brought into them
//! ([`ExternalRank::load`]) and computed blocks copied away ([`ExternalRank::save`]). Nothing here
//! waits for a copy: [`ExternalRank::ended`] says which loads and saves are over. Until then the
//! engine keeps those blocks for nothing else.

mod codec;
mod lookup;
mod rank;

pub use lookup::{LookupClient, LookupError, LookupServer};
pub use rank::{Ended, ExternalConfig, ExternalRank, Lookup, LookupRequest};
