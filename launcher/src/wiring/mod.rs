//! Where the parts meet: engines behind RPC, RPC behind the router, the router behind HTTP.

pub(crate) mod descriptor;
pub(crate) mod engines;
pub(crate) mod fleet;
pub(crate) mod handlers;
pub(crate) mod network;
pub(crate) mod peers;
pub(crate) mod prefill;
pub(crate) mod service;
#[cfg(test)]
mod tests;
pub(crate) mod tiers;
