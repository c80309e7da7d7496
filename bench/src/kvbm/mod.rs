//! Traffic against the real manager of the KV cache, in virtual time: `blockplane kvbm replay` says
//! what a configuration does for a trace, `blockplane kvbm advise` which one to take.
//!
//! The books are those of a worker ([`blockplane_kvbm::tier::Tiers`]); only the clock is not real, and,
//! unless `replay --store` brings memory and a disk, the copies. `docs/tuning-kvbm.md` explains the figures.

mod advise;
mod args;
mod driver;
mod links;
mod outcome;
mod replay;
mod simulate;
mod stored;
mod trace;
mod world;

pub use advise::{AdviseArgs, Speeds, advise};
pub use args::TrafficArgs;
pub use links::LinkSpeeds;
pub use outcome::{Outcome, Queues};
pub use replay::{Compat, ReplayArgs, replay};
pub use simulate::{Simulation, simulate};
pub use stored::{StoredConfig, StoredOutcome, simulate_stored};
pub use trace::{Asked, MOONCAKE_BLOCK_TOKENS, Trace, TraceConfig};
