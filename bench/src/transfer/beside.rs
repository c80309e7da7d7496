//! A matrix product beside transfers: how much each slows the other.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::{
    job::{self, Job, Ran},
    limits::gb_per_s,
    node::Active,
};
use crate::{gpu::matmul::Product, report::Samples};

/// What an initiator is to run side by side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Beside {
    /// The transfers; for as long as `job.rounds` says.
    pub(super) job: Job,
    /// Where the product runs.
    pub(super) device: u32,
    /// Rows and columns of its matrices.
    pub(super) size: u32,
    /// How long the product runs alone.
    pub(super) alone_millis: u64,
    /// Folder of cuBLASLt, instead of the usual places.
    pub(super) library: Option<PathBuf>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Shared {
    /// Microseconds of each product while nothing else runs, and beside the transfers.
    pub(super) product_alone: Vec<f64>,
    pub(super) product_beside: Vec<f64>,
    /// GB/s of the transfers alone, and beside the product.
    pub(super) transfer_alone: f64,
    pub(super) transfer_beside: f64,
    /// How the transfers were planned.
    pub(super) reason: String,
}

impl Shared {
    /// By how many percent a median product takes longer beside the transfers.
    pub(super) fn product_slowdown(&self) -> f64 {
        let median = |times: &[f64]| times.iter().copied().collect::<Samples>().median();
        (median(&self.product_beside) / median(&self.product_alone) - 1.0) * 100.0
    }

    /// By how many percent fewer bytes flow beside the product.
    pub(super) fn transfer_slowdown(&self) -> f64 {
        (1.0 - self.transfer_beside / self.transfer_alone) * 100.0
    }
}

/// Runs each alone, then both. The product stays in `kept` for the next time.
pub(super) fn run(
    node: &Active,
    kept: &mut Option<(u32, Product)>,
    beside: &Beside,
) -> anyhow::Result<Shared> {
    let product = match kept.take() {
        Some((device, product)) if device == beside.device && product.size() == beside.size => {
            product
        }
        _ => Product::new(beside.device, beside.size, beside.library.as_deref())?,
    };
    let (_, product) = kept.insert((beside.device, product));
    let alone = Duration::from_millis(beside.alone_millis);
    let (product_alone, ()) = during(product, || {
        // A wake-up that the end of an earlier scope has left over ends one park at once.
        let until = Instant::now() + alone;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            thread::park_timeout(left);
        }
        Ok(())
    })?;
    let transfer_alone = job::run(node, &beside.job)?;
    let (product_beside, transfer_beside) = during(product, || job::run(node, &beside.job))?;
    for (what, times) in [("alone", &product_alone), ("beside", &product_beside)] {
        ensure!(
            !times.is_empty(),
            "no product ended while it ran {what}: take smaller matrices or a longer time"
        );
    }
    Ok(Shared {
        product_alone,
        product_beside,
        transfer_alone: rate(&beside.job, &transfer_alone),
        transfer_beside: rate(&beside.job, &transfer_beside),
        reason: transfer_alone.reason,
    })
}

/// Microseconds of the products that run while `work` does.
fn during<T>(
    product: &mut Product,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(Vec<f64>, T)> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = &stop;
        let products = thread::Builder::new()
            .name("bench-product".to_owned())
            .spawn_scoped(scope, move || product.repeat(stop))?;
        let done = work();
        stop.store(true, Ordering::Release);
        let times = products.join().ok().context("the matrix product failed")?;
        Ok((times?, done?))
    })
}

/// GB/s of all transfers of a job.
fn rate(job: &Job, ran: &Ran) -> f64 {
    let bytes = job.lots.first().map_or(0, |lot| lot.local.bytes());
    let rounds: u64 = ran.rounds.iter().sum();
    gb_per_s(bytes * rounds, ran.took().as_secs_f64())
}
