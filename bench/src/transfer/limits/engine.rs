//! What the copy engines of a device do with one contiguous copy of the same bytes between the same
//! places.

use std::{collections::HashMap, time::Duration};

use anyhow::Context;
use blockplane_transfer::KernelConfig;

use crate::transfer::{
    args::Effective,
    case::{Case, LaneName, Lot, OpName, Pattern, Shape},
    cluster::{Check, Cluster, Hosts, Places, Way},
    job::Rounds,
    scheme::{Scheme, Topology},
};

/// Two agents of this process that give everything to the copy engines.
#[derive(Debug)]
pub(super) struct Engine {
    places: Places,
    kernels: KernelConfig,
    seed: u64,
    open: Option<Cluster>,
    /// GB/s by direction and bytes.
    known: HashMap<(OpName, u64), f64>,
}

impl Engine {
    pub(super) fn new(effective: &Effective) -> Self {
        let mut places = effective.places(LaneName::Loopback);
        places.settings.device.engine = true;
        Self {
            kernels: effective.kernels.clone(),
            places,
            seed: effective.args.seed,
            open: None,
            known: HashMap::new(),
        }
    }

    pub(super) fn rate(&mut self, op: OpName, lot: &Lot, budget: Duration) -> anyhow::Result<f64> {
        let bytes = lot.local.bytes();
        if let Some(&rate) = self.known.get(&(op, bytes)) {
            return Ok(rate);
        }
        let mut cluster = match self.open.take() {
            Some(cluster) => cluster,
            None => {
                let topology = Topology::new(Scheme::Pairwise, None, None)?;
                let mut cluster =
                    Cluster::start(topology, Hosts::Threads, self.seed, &self.kernels)?;
                cluster.open(&self.places)?;
                cluster
            }
        };
        let budget = u64::try_from(budget.as_micros()).unwrap_or(u64::MAX);
        let way = Way::alone(Check::Never, Rounds::Within(budget));
        let measured = cluster.measure(op, &whole(bytes, self.places.bytes)?, way)?;
        self.open = Some(cluster);
        self.known.insert((op, bytes), measured.bandwidth);
        Ok(measured.bandwidth)
    }
}

/// One contiguous copy of so many bytes.
pub(in crate::transfer) fn whole(bytes: u64, arena_bytes: usize) -> anyhow::Result<Case> {
    let block = u32::try_from(bytes)
        .context("one copy of 4 GiB or more is not measured: take fewer blocks")?;
    Ok(Case {
        pattern: Pattern::Contiguous,
        shape: Shape::plain(block, arena_bytes as u64),
        count: 1,
        listed: false,
        turn: None,
    })
}
