//! What rows run on: which memory stands for which device, and the processes, kept from row to row
//! while they are well.

use std::time::Instant;

use anyhow::{Context, ensure};
use blockplane_transfer::{CudaReport, CudaUnavailable, KernelConfig};

use crate::transfer::{
    case::{LaneName, Memory},
    cluster::{Cluster, Hosts, Places},
    link::Settings,
    scheme::{Scheme, Topology},
};

/// The memory of a node.
#[derive(Clone, Debug)]
pub(super) struct Ground {
    /// One for each device.
    pub(super) devices: Vec<Memory>,
    /// Memory of the host that the first device reaches.
    pub(super) host: Memory,
    /// Multiprocessors of the smallest device; none without devices.
    pub(super) sms: Option<u32>,
    /// Bytes of a large transfer.
    pub(super) large: u64,
}

impl Ground {
    /// The devices of a node, all or those named.
    pub(super) fn of(found: &CudaReport, named: &[u32]) -> anyhow::Result<Self> {
        let devices = u32::try_from(found.devices.len()).unwrap_or(u32::MAX);
        let mut used = Vec::new();
        for device in &found.devices {
            if named.is_empty() || named.contains(&device.ordinal) {
                used.push(device);
            }
        }
        for &device in named {
            if found.devices.iter().all(|one| one.ordinal != device) {
                return Err(CudaUnavailable::UnknownDevice { device, devices }.into());
            }
        }
        let sms = used.iter().map(|device| device.multiprocessors).min();
        let first = used.first().context("no device to use")?.ordinal;
        Ok(Self {
            devices: used
                .iter()
                .map(|device| Memory::Device(device.ordinal))
                .collect(),
            host: Memory::Pinned(first),
            sms,
            large: 512 << 20,
        })
    }

    /// Host memory in place of two devices.
    pub(super) fn host() -> Self {
        Self {
            devices: vec![Memory::Arena; 2],
            host: Memory::Arena,
            sms: None,
            large: 4 << 20,
        }
    }

    /// The first device, and the second where there is one.
    pub(super) fn pair(&self) -> anyhow::Result<[Memory; 2]> {
        match &self.devices[..] {
            [first, second, ..] => Ok([first.clone(), second.clone()]),
            _ => anyhow::bail!("needs two GPUs"),
        }
    }

    pub(super) fn first(&self) -> Memory {
        self.devices[0].clone()
    }

    /// Memory that holds `bytes` and a quarter more, so that blocks lie scattered.
    pub(super) fn room(bytes: u64) -> anyhow::Result<usize> {
        Ok(usize::try_from(bytes + bytes / 4)?)
    }
}

/// The two agents of a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pair {
    /// In one process, or in one each.
    pub(super) hosts: Hosts,
    pub(super) from: Memory,
    pub(super) to: Memory,
    pub(super) bytes: usize,
    /// Everything goes to the copy engines.
    pub(super) engine: bool,
    /// Writes are pulled by the side that is written to.
    pub(super) pull_writes: bool,
}

/// Processes.
#[derive(Debug)]
pub(super) struct Stage {
    settings: Settings,
    kernels: KernelConfig,
    seed: u64,
    running: Vec<(Hosts, Cluster, Option<Pair>)>,
}

impl Stage {
    pub(super) const fn new(settings: Settings, kernels: KernelConfig, seed: u64) -> Self {
        Self {
            settings,
            kernels,
            seed,
            running: Vec::new(),
        }
    }

    /// The processes with these agents, started if they are not yet.
    pub(super) fn pair(&mut self, pair: &Pair, until: Instant) -> anyhow::Result<&mut Cluster> {
        let at = match self
            .running
            .iter()
            .position(|(hosts, ..)| *hosts == pair.hosts)
        {
            Some(at) => at,
            None => {
                let topology = Topology::new(Scheme::Pairwise, None, None)?;
                let cluster = Cluster::start(topology, pair.hosts, self.seed, &self.kernels)?;
                self.running.push((pair.hosts, cluster, None));
                self.running.len() - 1
            }
        };
        let (_, cluster, open) = &mut self.running[at];
        cluster.set_deadline(Some(until));
        if open.as_ref() != Some(pair) {
            // Before new agents take their memory.
            if open.take().is_some() {
                cluster.close()?;
            }
            let mut settings = self.settings.clone();
            settings.device.engine = pair.engine;
            settings.device.pull_writes = pair.pull_writes;
            let lane = match pair.hosts {
                Hosts::Threads | Hosts::Together => LaneName::Loopback,
                Hosts::Processes | Hosts::Apart => LaneName::Shm,
            };
            cluster.open(&Places {
                lane,
                from: vec![pair.from.clone()],
                to: vec![pair.to.clone()],
                bytes: pair.bytes,
                settings,
            })?;
            *open = Some(pair.clone());
        }
        ensure!(Instant::now() < until, "the time of the row is over");
        Ok(cluster)
    }

    /// A process in which nothing was done yet, one agent's or more.
    pub(super) fn fresh(&self, topology: Topology, until: Instant) -> anyhow::Result<Cluster> {
        let mut cluster = Cluster::start(topology, Hosts::Apart, self.seed, &self.kernels)?;
        cluster.set_deadline(Some(until));
        Ok(cluster)
    }

    pub(super) const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Ends all processes: after a failure, or when their memory is not needed any more.
    pub(super) fn clear(&mut self) {
        self.running.clear();
    }
}
