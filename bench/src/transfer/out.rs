//! Figures as records and as rows.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use super::{
    args::{Effective, Prepared},
    beside::Shared,
    case::{Case, LaneName, OpName},
    cluster::Measured,
    limits::Limit,
};
use crate::{
    gpu::matmul::tflops,
    report::{Record, Report, Samples, Table, case},
};

/// Name in every record.
pub(super) const BENCH: &str = "transfer";

impl Effective {
    /// What all figures of a lane have in common.
    pub(super) fn place(&self, lane: LaneName) -> Map<String, Value> {
        let args = &self.args;
        let processes = if args.in_process {
            1
        } else {
            self.topology.initiators + self.topology.targets
        };
        let mut place = case([
            (
                "lane",
                json!(if self.device().is_some() {
                    "cuda"
                } else {
                    lane.as_str()
                }),
            ),
            ("processes", json!(processes)),
            ("from", json!(args.from.name())),
            ("to", json!(args.to.name())),
        ]);
        if self.topology.pairs() > 1 {
            place.insert("scheme".to_owned(), json!(args.scheme.as_str()));
            place.insert("initiators".to_owned(), json!(self.topology.initiators));
            place.insert("targets".to_owned(), json!(self.topology.targets));
        }
        for (name, value) in [("threads", args.threads), ("depth", args.depth)] {
            if value > 1 {
                place.insert(name.to_owned(), json!(value));
            }
        }
        if args.prepared == Prepared::No {
            place.insert("prepared".to_owned(), json!(false));
        }
        place
    }

    /// The case of a record.
    pub(super) fn describe(&self, lane: LaneName, op: OpName, blocks: &Case) -> Map<String, Value> {
        let mut place = self.place(lane);
        for (name, value) in [
            ("op", json!(op.as_str())),
            ("block_bytes", json!(blocks.shape.block_bytes())),
            ("count", json!(blocks.count)),
            ("pattern", json!(blocks.pattern.as_str())),
        ] {
            place.insert(name.to_owned(), value);
        }
        if let Some(model) = &self.model {
            for (name, value) in [
                ("model", json!(model.name)),
                ("layers", json!(model.layout.layers)),
                ("tokens", json!(model.tokens)),
                ("tp", json!(model.ranks)),
                ("layout", json!(model.layout.order)),
                ("per_layer", json!(self.args.per_layer)),
                ("bytes", json!(model.bytes())),
                ("descriptors", json!(model.descriptors())),
            ] {
                place.insert(name.to_owned(), value);
            }
        }
        place
    }
}

/// Writes the records of one case.
pub(super) fn records<W: Write>(
    report: &mut Report<W>,
    place: &Map<String, Value>,
    measured: &Measured,
    limits: &[Limit],
    smallest_us: Option<f64>,
) -> io::Result<()> {
    for limit in limits {
        report.record(&Record::new(
            BENCH,
            place.clone(),
            limit.metric,
            "GB/s",
            limit.rate,
            1,
        ))?;
    }
    let mut bandwidth = Record::new(
        BENCH,
        place.clone(),
        "bandwidth_gb_per_s",
        "GB/s",
        measured.bandwidth,
        measured.transfers,
    )
    .limit(best(limits));
    if let Some(each) = &measured.each {
        // The slow end of a bandwidth is its first percentile.
        bandwidth = bandwidth.percentiles(each.median(), each.percentile(1));
    }
    report.record(&bandwidth)?;
    if measured.pairs.len() > 1 {
        for &(initiator, target, rate) in &measured.pairs {
            let mut place = place.clone();
            place.insert("initiator".to_owned(), json!(initiator));
            place.insert("target".to_owned(), json!(target));
            let n = measured.transfers;
            report.record(&Record::new(BENCH, place, "pair_gb_per_s", "GB/s", rate, n))?;
        }
    }
    let latency = Record::of_samples(BENCH, place.clone(), "latency_us", "us", &measured.latency)
        .limit(smallest_us);
    report.record(&latency)?;
    if !measured.post_cpu_us.is_empty() {
        let post = Record::of_samples(
            BENCH,
            place.clone(),
            "post_cpu_us",
            "us",
            &measured.post_cpu_us,
        );
        report.record(&post)?;
    }
    making(report, place, measured)
}

/// Writes what one case costs its caller.
pub(super) fn making<W: Write>(
    report: &mut Report<W>,
    place: &Map<String, Value>,
    measured: &Measured,
) -> io::Result<()> {
    for (metric, samples) in [
        ("make_ns_per_block", &measured.make),
        ("post_ns_per_block", &measured.post),
        ("post_cpu_ns_per_block", &measured.post_cpu),
    ] {
        if !samples.is_empty() {
            let place = place.clone();
            report.record(&Record::of_samples(BENCH, place, metric, "ns", samples))?;
        }
    }
    Ok(())
}

/// Writes the records of transfers beside a matrix product, and makes a row of them.
pub(super) fn beside<W: Write>(
    report: &mut Report<W>,
    place: &Map<String, Value>,
    op: OpName,
    sms: Option<u32>,
    size: u32,
    shared: &Shared,
) -> io::Result<Vec<String>> {
    let samples = |times: &[f64]| -> Samples { times.iter().copied().collect() };
    let (alone, beside) = (
        samples(&shared.product_alone),
        samples(&shared.product_beside),
    );
    for (metric, times) in [("product_alone_us", &alone), ("product_beside_us", &beside)] {
        report.record(&Record::of_samples(
            BENCH,
            place.clone(),
            metric,
            "us",
            times,
        ))?;
    }
    let (slower, less) = (shared.product_slowdown(), shared.transfer_slowdown());
    for (metric, unit, value) in [
        ("product_slowdown_percent", "%", slower),
        ("transfer_alone_gb_per_s", "GB/s", shared.transfer_alone),
        ("transfer_beside_gb_per_s", "GB/s", shared.transfer_beside),
        ("transfer_slowdown_percent", "%", less),
    ] {
        report.record(&Record::new(BENCH, place.clone(), metric, unit, value, 1))?;
    }
    let tflops = |times: &Samples| format!("{:.0}", tflops(size, times.median()));
    Ok(vec![
        op.as_str().to_owned(),
        sms.map_or_else(|| "own".to_owned(), |sms| sms.to_string()),
        format!("{:.1}", alone.median()),
        tflops(&alone),
        format!("{:.1}", beside.median()),
        tflops(&beside),
        format!("{slower:.1}"),
        format!("{:.1}", shared.transfer_alone),
        format!("{:.1}", shared.transfer_beside),
        format!("{less:.1}"),
    ])
}

/// The highest bound.
fn best(limits: &[Limit]) -> Option<f64> {
    limits
        .iter()
        .map(|limit| limit.rate)
        .filter(|rate| rate.is_finite())
        .max_by(f64::total_cmp)
}

/// A table for the cases of a lane.
pub(super) fn table(limits: &[&str], pairs: usize, device: bool) -> Table {
    let mut titles = vec!["case"];
    if device {
        titles.push("SMs");
    }
    titles.push("GB/s");
    titles.push(if pairs == 1 { "p99" } else { "per pair" });
    titles.extend(limits);
    titles.extend([
        "ratio",
        "us p50",
        "p90",
        "p99",
        "p99.9",
        "max",
        "make ns/blk",
        "p99",
        "post ns/blk",
        "p99",
        "runs",
    ]);
    if device {
        titles.push("post cpu us");
    }
    Table::new(&titles)
}

/// `sms` where a device takes part: a budget, or the agent's own.
pub(super) fn row(
    op: OpName,
    case: &Case,
    measured: &Measured,
    limits: &[Limit],
    sms: Option<Option<u32>>,
) -> Vec<String> {
    let mut row = vec![format!(
        "{} {} x{} {}",
        op.as_str(),
        human_bytes(case.shape.block_bytes()),
        case.count,
        case.pattern.as_str()
    )];
    if let Some(sms) = sms {
        row.push(sms.map_or_else(|| "own".to_owned(), |sms| sms.to_string()));
    }
    row.push(format!("{:.2}", measured.bandwidth));
    row.push(match &measured.each {
        Some(each) => format!("{:.2}", each.percentile(1)),
        None => {
            let rates = measured.pairs.iter().map(|&(_, _, rate)| rate);
            let slowest = rates.clone().min_by(f64::total_cmp).unwrap_or(f64::NAN);
            let fastest = rates.max_by(f64::total_cmp).unwrap_or(f64::NAN);
            format!("{slowest:.2}..{fastest:.2}")
        }
    });
    row.extend(limits.iter().map(|limit| format!("{:.2}", limit.rate)));
    row.push(best(limits).map_or_else(String::new, |best| {
        format!("{:.2}", measured.bandwidth / best)
    }));
    for per_mille in [500, 900, 990, 999, 1000] {
        row.push(format!("{:.1}", measured.latency.per_mille(per_mille)));
    }
    for samples in [&measured.make, &measured.post] {
        row.push(format!("{:.1}", samples.median()));
        row.push(format!("{:.1}", samples.percentile(99)));
    }
    row.push(measured.transfers.to_string());
    if sms.is_some() {
        row.push(format!("{:.1}", measured.post_cpu_us.median()));
    }
    row
}

fn human_bytes(bytes: u64) -> String {
    match bytes {
        bytes if bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        bytes if bytes.is_multiple_of(1 << 10) => format!("{}K", bytes >> 10),
        bytes => bytes.to_string(),
    }
}
