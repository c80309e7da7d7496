//! Where a worker's transfer agents listen.

use std::net::SocketAddr;

use anyhow::Context;
use blockplane_transfer::{AgentConfig, Lane};

use crate::cli::{LaneArg, WorkerArgs};

/// An agent that other processes reach.
pub(crate) fn agent_config(args: &WorkerArgs, name: String) -> anyhow::Result<AgentConfig> {
    let mut lanes = vec![Lane::Loopback];
    lanes.extend(args.lanes.iter().map(|lane| match lane {
        LaneArg::Shm => Lane::Shm,
        LaneArg::Tcp => Lane::Tcp,
    }));
    let mut config = AgentConfig::new(name).with_lanes(lanes);
    config.tcp_bind = bind_address(&args.host)?;
    config.cuda.kernels = crate::kernels::config();
    Ok(config)
}

/// The address to listen on for `host`, with a port that the system picks.
pub(crate) fn bind_address(host: &str) -> anyhow::Result<SocketAddr> {
    use std::net::ToSocketAddrs;
    (host, 0)
        .to_socket_addrs()
        .ok()
        .and_then(|mut addresses| addresses.next())
        .with_context(|| format!("--host {host} is not an address of this machine"))
}
