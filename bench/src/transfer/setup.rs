//! What happens once: metadata, connecting, registering memory.

use std::time::Instant;

use blockplane_transfer::{ArenaConfig, KernelConfig, RemoteAccess};

use super::{
    case::LaneName,
    cluster::Cluster,
    link::{PATIENCE, Settings},
    memory, node,
};
use crate::report::Samples;

/// Memory that is registered to see how long that takes.
const REGISTERED_BYTES: usize = 1 << 30;
/// How often each thing is done.
const TIMES: usize = 20;

/// Microseconds of each step.
pub(super) struct Setup {
    /// From asking the target for its metadata, in band, to having read it; over the pipe where the
    /// target does not listen.
    pub(super) metadata: Samples,
    /// Connecting a new agent.
    pub(super) connect: Samples,
    /// Registering 1 GiB of memory of the process, with its pages in place.
    pub(super) register: Samples,
    /// Allocating an arena of 1 GiB.
    pub(super) allocate: Samples,
}

pub(super) fn measure(
    cluster: &Cluster,
    lane: LaneName,
    settings: &Settings,
    kernels: &KernelConfig,
) -> anyhow::Result<Setup> {
    let mut setup = Setup {
        metadata: Samples::default(),
        connect: Samples::default(),
        register: Samples::default(),
        allocate: Samples::default(),
    };
    let known = cluster.describe()?.metadata()?;
    let place = known.unix_socket().or_else(|| known.tcp_address());
    for i in 0..TIMES {
        let agent = node::agent(&format!("bench-setup-{i}"), lane, settings, kernels)?;
        let start = Instant::now();
        let metadata = match place {
            Some(place) => agent.fetch_metadata(place, PATIENCE)?,
            None => cluster.describe()?.metadata()?,
        };
        setup.metadata.push(micros(start));
        let start = Instant::now();
        let peer = agent.connect(&metadata, PATIENCE)?;
        setup.connect.push(micros(start));
        peer.disconnect();
    }
    let agent = node::agent("bench-setup", lane, settings, kernels)?;
    for _ in 0..3 {
        let memory = memory::host(REGISTERED_BYTES)?;
        let start = Instant::now();
        let registration = agent.register(memory, RemoteAccess::Open)?;
        setup.register.push(micros(start));
        drop(registration);
        let start = Instant::now();
        let registration = agent.allocate(ArenaConfig::new(REGISTERED_BYTES, "bench-setup"))?;
        setup.allocate.push(micros(start));
        drop(registration);
    }
    Ok(setup)
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}
