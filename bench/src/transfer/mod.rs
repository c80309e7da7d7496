//! `blockplane bench transfer`: how fast blocks move between agents.
//!
//! Two processes by default, more with `--scheme`: this one and copies of it that are told what to
//! do over a pipe. The limits beside the figures are measured in the same run, over the same
//! blocks: copies by one and by two threads (loopback, shm), `process_vm_writev` into the other
//! process (shm to memory that is not an arena), and raw loopback sockets with vectored calls
//! (tcp). Contents are checked before and after every case.

mod args;
mod beside;
mod case;
mod cluster;
mod file;
mod job;
mod limits;
mod link;
mod memory;
mod model;
mod node;
mod out;
mod ping;
mod plot;
mod qualify;
mod scheme;
mod setup;

use std::{fs, io::Write, time::Duration};

use anyhow::Context;
use blockplane_transfer::KernelConfig;
use serde_json::json;

pub(crate) use self::model::{Cut, Model};
use self::{
    args::Effective,
    case::{Case, Shape},
    cluster::{Check, Cluster, Hosts, ProductOf, Way},
    job::Rounds,
    limits::Limits,
    link::Address,
    out::BENCH,
    ping::{Pings, Receiver},
};
pub use self::{
    args::{Companion, Prepared, Section, TransferArgs},
    case::{LaneName, Memory, OpName, Pattern, Size},
    link::{Sharing, run_peer},
    model::{DTypeName, Order},
    qualify::{GpuArgs, Group, qualify},
    scheme::Scheme,
};
pub(crate) use self::{file::Fio, limits::gb_per_s, node::process_cpu};
use crate::report::{Record, Report, Table};

/// Runs it. `kernels` says where kernels for GPUs are compiled and kept.
///
/// # Errors
/// When an option makes no sense, a process or connection fails, bytes arrive wrong, or the output
/// is closed.
pub fn run(args: &TransferArgs, kernels: &KernelConfig) -> anyhow::Result<()> {
    run_to(args, kernels, &mut Report::stdout(args.json))
}

/// Runs it with its output going to `report`.
///
/// # Errors
/// As for [`run`].
pub fn run_to<W: Write>(
    args: &TransferArgs,
    kernels: &KernelConfig,
    report: &mut Report<W>,
) -> anyhow::Result<()> {
    let effective = args.effective(kernels)?;
    if args.csv.is_some() || args.plot.is_some() {
        report.keep();
    }
    if let Memory::File(path) = &effective.args.to {
        file::run(&effective, path, report)?;
    } else {
        let hosts = if effective.args.in_process {
            Hosts::Threads
        } else {
            Hosts::Processes
        };
        let mut run = Run {
            cluster: Cluster::start(effective.topology, hosts, effective.args.seed, kernels)?,
            effective: &effective,
            report,
        };
        run.all()?;
    }
    if let Some(path) = &args.csv {
        fs::write(path, report.csv())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        plot::write(path, report.kept())?;
    }
    Ok(())
}

/// A side, for people.
fn place(memory: &Memory) -> String {
    match memory {
        Memory::Pinned(device) => format!("a pinned arena near cuda:{device}"),
        other => other.name().into_owned(),
    }
}

/// One run of the benchmark.
struct Run<'a, W> {
    effective: &'a Effective,
    cluster: Cluster,
    report: &'a mut Report<W>,
}

impl<W: Write> Run<'_, W> {
    fn all(&mut self) -> anyhow::Result<()> {
        let effective = self.effective;
        let args = &effective.args;
        if let Some(model) = &effective.model {
            self.report.note(&model.describe())?;
        }
        if effective.device().is_some() {
            self.report.note(&format!(
                "from {} to {}, checked byte by byte; device memory of other processes by {}",
                place(&args.from),
                place(&args.to),
                match args.sharing {
                    Sharing::FileDescriptor => "file descriptor",
                    Sharing::Handle => "handle",
                }
            ))?;
        }
        let mut limits = Limits::new(effective)?;
        for &lane in &args.lanes {
            let (target, reason) = self.cluster.open(&effective.places(lane))?;
            self.report.note(&format!(
                "\n{}, {} initiator(s) to {} target(s) {}, {reason}",
                lane.as_str(),
                effective.topology.initiators,
                effective.topology.targets,
                if args.in_process {
                    "in one process"
                } else {
                    "in processes"
                },
            ))?;
            if args.beside.is_some() {
                self.beside(lane)?;
                self.cluster.close()?;
                continue;
            }
            for section in &effective.sections {
                match section {
                    Section::Blocks => self.blocks(lane, &target, &mut limits)?,
                    Section::Notify => self.notify(lane)?,
                    Section::Make => self.make(lane)?,
                    Section::Setup => self.setup(lane)?,
                    Section::Idle => self.idle(lane)?,
                }
            }
            self.cluster.close()?;
        }
        Ok(())
    }

    fn blocks(
        &mut self,
        lane: LaneName,
        target: &Address,
        limits: &mut Limits,
    ) -> anyhow::Result<()> {
        let effective = self.effective;
        let way = Way::new(effective);
        let device = effective.device().is_some();
        let titles = limits.titles(lane);
        let mut table = out::table(titles, effective.topology.pairs(), device);
        let mut plans: Vec<String> = Vec::new();
        let mut smallest = Vec::new();
        for case in effective.cases() {
            for &op in &effective.args.ops {
                let lots = self.cluster.lots(&case, way)?;
                let limits = match lots.first().and_then(|lots| lots.first()) {
                    Some(lot) => limits.measure(lane, op, lot, target, effective.budget() / 2)?,
                    None => Vec::new(),
                };
                for sms in effective.budgets() {
                    let way = Way { sms, ..way };
                    let mut place = effective.describe(lane, op, &case);
                    let mut floor = None;
                    if device {
                        place.insert("sms".to_owned(), json!(sms));
                        floor = Some(self.smallest(op, way, &mut smallest)?);
                    }
                    let measured = self.cluster.measure(op, &case, way)?;
                    out::records(self.report, &place, &measured, &limits, floor)?;
                    let sms = device.then_some(sms);
                    table.row(out::row(op, &case, &measured, &limits, sms));
                    if !plans.contains(&measured.reason) {
                        plans.push(measured.reason);
                    }
                }
            }
        }
        self.report.table(&table)?;
        if device {
            let shown = smallest.iter().map(|&(op, sms, micros)| {
                let sms = sms.map_or_else(String::new, |sms| format!(" with {sms} SMs"));
                format!("{}{sms} {micros:.1} us", op.as_str())
            });
            let shown: Vec<String> = shown.collect();
            self.report.note(&format!(
                "the smallest transfer, one block of 16 bytes: {}",
                shown.join(", ")
            ))?;
        }
        for plan in plans {
            self.report.note(&format!("planned as: {plan}"))?;
        }
        Ok(())
    }

    /// Transfers and a matrix product, each alone and then both, for each budget.
    fn beside(&mut self, lane: LaneName) -> anyhow::Result<()> {
        const BLOCK: u32 = 32 << 10;
        const DEPTH: usize = 2;
        const BYTES_MAX: u64 = 128 << 20;
        let effective = self.effective;
        let args = &effective.args;
        let device = args.beside_device.or_else(|| effective.device());
        let product = ProductOf {
            device: device.context("no device takes part")?,
            size: args.product_size,
            alone_millis: args.case_ms.max(200),
            library: args.cublas.clone(),
        };
        let bytes = effective.bytes() as u64;
        let each = (bytes / 5 * 4 / DEPTH as u64).min(BYTES_MAX);
        let case = Case {
            pattern: Pattern::Scattered,
            shape: Shape::plain(BLOCK, bytes),
            count: u32::try_from(each / u64::from(BLOCK))?.max(1),
            listed: true,
            turn: None,
        };
        self.report.note(&format!(
            "matrix product of {0} x {0} bf16 on cuda:{1}",
            product.size, product.device
        ))?;
        let mut table = Table::new(&[
            "transfers",
            "SMs",
            "product us alone",
            "TFLOPS",
            "us beside",
            "TFLOPS",
            "slower %",
            "GB/s alone",
            "beside",
            "slower %",
        ]);
        for &op in &args.ops {
            for sms in effective.budgets() {
                let way = Way {
                    depth: DEPTH,
                    sms,
                    pace: args.pace_gb_per_s,
                    rounds: Rounds::Within(product.alone_millis * 1000),
                    ..Way::new(effective)
                };
                let shared = self.cluster.beside(op, &case, way, &product)?;
                let mut place = effective.describe(lane, op, &case);
                place.insert("sms".to_owned(), json!(sms));
                place.insert("product".to_owned(), json!(product.size));
                place.insert("product_device".to_owned(), json!(product.device));
                place.insert("pace_gb_per_s".to_owned(), json!(args.pace_gb_per_s));
                table.row(out::beside(
                    self.report,
                    &place,
                    op,
                    sms,
                    product.size,
                    &shared,
                )?);
            }
        }
        self.report.table(&table)?;
        Ok(())
    }

    /// Microseconds of the smallest transfer of a direction and a budget: one block of 16 bytes,
    /// alone. Measured when it is first asked for.
    fn smallest(
        &mut self,
        op: OpName,
        way: Way,
        known: &mut Vec<(OpName, Option<u32>, f64)>,
    ) -> anyhow::Result<f64> {
        let found = known.iter().find(|&&(o, sms, _)| (o, sms) == (op, way.sms));
        if let Some(&(_, _, micros)) = found {
            return Ok(micros);
        }
        let case = Case {
            pattern: Pattern::Contiguous,
            shape: Shape::plain(16, 1 << 20),
            count: 1,
            listed: false,
            turn: None,
        };
        let way = Way {
            sms: way.sms,
            ..Way::alone(Check::Never, Rounds::Within(20_000))
        };
        let micros = self.cluster.measure(op, &case, way)?.latency.median();
        known.push((op, way.sms, micros));
        Ok(micros)
    }

    fn notify(&mut self, lane: LaneName) -> anyhow::Result<()> {
        let count = if self.effective.args.quick {
            300
        } else {
            3_000
        };
        let way = Way::new(self.effective);
        let shape = Shape::plain(4096, self.effective.bytes() as u64);
        let case = Case {
            pattern: Pattern::Scattered,
            shape,
            count: 1,
            listed: false,
            turn: None,
        };
        let one = self.cluster.lots(&case, way)?.swap_remove(0).swap_remove(0);
        let mut table = Table::new(&["one way", "us p50", "p90", "p99", "p99.9", "max"]);
        for (metric, title, write) in [
            ("notify_us", "notification", None),
            ("write_notify_us", "4 KiB write + notification", Some(&one)),
        ] {
            for receiver in Receiver::ALL {
                let count = if receiver == Receiver::Asleep {
                    count / 10
                } else {
                    count
                };
                let samples = self.cluster.ping(&Pings {
                    count,
                    warmup: count / 10,
                    receiver,
                    write: write.cloned(),
                })?;
                let mut place = self.effective.place(lane);
                place.insert("receiver".to_owned(), json!(receiver.name()));
                self.report
                    .record(&Record::of_samples(BENCH, place, metric, "us", &samples))?;
                let mut row = vec![format!("{title}, receiver {}", receiver.name())];
                for per_mille in [500, 900, 990, 999, 1000] {
                    row.push(format!("{:.2}", samples.per_mille(per_mille)));
                }
                table.row(row);
            }
        }
        self.report.table(&table)?;
        Ok(())
    }

    fn make(&mut self, lane: LaneName) -> anyhow::Result<()> {
        const BLOCKS: u32 = 10_000;
        let effective = self.effective;
        // The largest block of which so many fit with some to spare.
        let block_bytes = [16384, 4096, 1024, 256, 64]
            .into_iter()
            .find(|&bytes| effective.bytes() >= bytes as usize * BLOCKS as usize * 5 / 4);
        let Some(block_bytes) = block_bytes else {
            self.report.note(&format!(
                "{BLOCKS} blocks do not fit this memory: making them is not measured"
            ))?;
            return Ok(());
        };
        let mut table = Table::new(&[
            "10,000 blocks",
            "make ns/blk",
            "p99",
            "post ns/blk",
            "p99",
            "post cpu ns/blk",
        ]);
        for (title, pattern, listed) in [
            ("scattered", Pattern::Scattered, true),
            ("contiguous, a range of ids", Pattern::Contiguous, false),
            ("contiguous, a list of ids", Pattern::Contiguous, true),
        ] {
            let case = Case {
                pattern,
                shape: Shape::plain(block_bytes, effective.bytes() as u64),
                count: BLOCKS,
                listed,
                turn: None,
            };
            let way = Way {
                threads: 1,
                depth: 1,
                post_cpu: true,
                rounds: Rounds::Within(effective.args.case_ms * 1000),
                ..Way::new(effective)
            };
            let measured = self.cluster.measure(OpName::Write, &case, way)?;
            let mut place = effective.describe(lane, OpName::Write, &case);
            place.insert(
                "ids".to_owned(),
                json!(if listed { "list" } else { "range" }),
            );
            out::making(self.report, &place, &measured)?;
            table.row(vec![
                title.to_owned(),
                format!("{:.2}", measured.make.median()),
                format!("{:.2}", measured.make.percentile(99)),
                format!("{:.2}", measured.post.median()),
                format!("{:.2}", measured.post.percentile(99)),
                format!("{:.2}", measured.post_cpu.median()),
            ]);
        }
        self.report.table(&table)?;
        Ok(())
    }

    fn setup(&mut self, lane: LaneName) -> anyhow::Result<()> {
        let setup = setup::measure(
            &self.cluster,
            lane,
            &self.effective.settings,
            &self.effective.kernels,
        )?;
        let mut table = Table::new(&["once", "us p50", "max"]);
        for (metric, title, samples) in [
            (
                "metadata_us",
                "ask the target for its metadata",
                &setup.metadata,
            ),
            ("connect_us", "connect a new agent", &setup.connect),
            (
                "register_gib_us",
                "register 1 GiB of host memory",
                &setup.register,
            ),
            (
                "allocate_gib_us",
                "allocate an arena of 1 GiB",
                &setup.allocate,
            ),
        ] {
            let place = self.effective.place(lane);
            self.report
                .record(&Record::of_samples(BENCH, place, metric, "us", samples))?;
            table.row(vec![
                title.to_owned(),
                format!("{:.1}", samples.median()),
                format!("{:.1}", samples.percentile(100)),
            ]);
        }
        self.report.table(&table)?;
        Ok(())
    }

    fn idle(&mut self, lane: LaneName) -> anyhow::Result<()> {
        let time: Duration = self.effective.idle();
        let used = self.cluster.idle_cpu(time)?;
        let sides: &[&str] = if self.effective.args.in_process {
            &["both"]
        } else {
            &["initiator", "target"]
        };
        for (side, used) in sides.iter().zip(used) {
            let mut place = self.effective.place(lane);
            place.insert("side".to_owned(), json!(side));
            place.insert("seconds".to_owned(), json!(time.as_secs()));
            self.report.record(&Record::new(
                BENCH,
                place,
                "idle_cpu_percent",
                "percent of a core",
                used,
                1,
            ))?;
            self.report.note(&format!(
                "idle and connected for {} s, {side}: {used:.2} % of a core",
                time.as_secs()
            ))?;
        }
        Ok(())
    }
}
