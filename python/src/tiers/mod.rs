//! The tiers of `blockplane-kvbm` below an engine written in Python.

mod lookups;
mod names;
mod worker;

pub(crate) use lookups::{Lookups, seconds};
pub(crate) use names::Names;
pub(crate) use worker::TierWorker;

/// Tier names as Python gets them, from G1 down.
const TIERS: [&str; 4] = ["device", "host", "disk", "remote"];

/// The name of a tier.
fn tier_name(tier: blockplane_protocol::Tier) -> &'static str {
    use blockplane_protocol::Tier;
    match tier {
        Tier::Device => TIERS[0],
        Tier::Host => TIERS[1],
        Tier::Disk => TIERS[2],
        Tier::Remote => TIERS[3],
    }
}
