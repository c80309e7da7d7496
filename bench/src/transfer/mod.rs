//! `blockplane bench transfer`: how fast blocks move between two agents.
//!
//! Two processes by default: this one and a copy of it that is told what to do over a pipe. The
//! limits beside the figures are a memcpy by one thread over the same blocks (loopback, shm) and a
//! raw loopback socket with vectored calls (tcp), both measured in the same run. Contents are
//! checked before and after every case.

mod case;
mod limits;
mod measure;
mod memory;
mod peer;

use std::{
    io::{self, Write},
    time::Duration,
};

use anyhow::ensure;
use blockplane_transfer::{Agent, AgentConfig, ArenaConfig, Registration};
use serde_json::{Map, Value, json};

use self::{
    case::Blocks,
    limits::RawTcp,
    measure::{Connection, Measured},
    peer::{Link, Settings},
};
pub use self::{
    case::{LaneName, OpName, Pattern, Size},
    peer::run_peer,
};
use crate::report::{Record, Report, Samples, Table, case};

/// Options of `blockplane bench transfer`.
#[derive(Clone, Debug, clap::Args)]
pub struct TransferArgs {
    /// Both agents in this process instead of two processes.
    #[arg(long)]
    pub in_process: bool,
    /// Lanes to measure [default: shm,tcp; with --in-process loopback,tcp].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub lanes: Vec<LaneName>,
    /// Operations to measure.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "write,read")]
    pub ops: Vec<OpName>,
    /// Block sizes.
    #[arg(long, value_delimiter = ',', default_value = "4k,16k,64k,256k,1m")]
    pub block_bytes: Vec<Size>,
    /// Blocks of one transfer.
    #[arg(long, value_delimiter = ',', default_value = "1,16,128")]
    pub counts: Vec<u32>,
    /// Where the blocks lie.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "scattered,contiguous"
    )]
    pub patterns: Vec<Pattern>,
    /// Memory of each side, in MiB; one more of it is taken for each limit.
    #[arg(long, default_value_t = 256)]
    pub arena_mib: usize,
    /// Time for each case, in milliseconds.
    #[arg(long, default_value_t = 200)]
    pub case_ms: u64,
    /// TCP connections for data [default: the agent's].
    #[arg(long)]
    pub tcp_streams: Option<usize>,
    /// Threads that copy [default: the agent's].
    #[arg(long)]
    pub copy_threads: Option<usize>,
    /// Seed of block places and contents.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Fewer, smaller and shorter cases; under 30 seconds.
    #[arg(long)]
    pub quick: bool,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Runs it.
///
/// # Errors
/// When an option makes no sense, a process or connection fails, bytes arrive wrong, or the output
/// is closed.
pub fn run(args: &TransferArgs) -> anyhow::Result<()> {
    run_to(args, &mut Report::stdout(args.json))
}

/// Runs it with its output going to `report`.
///
/// # Errors
/// As for [`run`].
pub fn run_to<W: Write>(args: &TransferArgs, report: &mut Report<W>) -> anyhow::Result<()> {
    let args = args.effective()?;
    let arena_bytes = args.arena_mib << 20;
    let budget = Duration::from_millis(args.case_ms);
    let mut link = if args.in_process {
        Link::thread()?
    } else {
        Link::process()?
    };
    let settings = Settings {
        tcp_streams: args.tcp_streams,
        copy_threads: args.copy_threads,
    };
    let cases = args.cases()?;
    let mut limits = Limits::new(arena_bytes)?;
    for &lane in &args.lanes {
        let mut connection = Connection::open(&mut link, lane, arena_bytes, settings, args.seed)?;
        report.note(&format!(
            "\n{} ({}), {}",
            lane.as_str(),
            args.processes(),
            connection.reason()
        ))?;
        let mut table = Table::new(&[
            "case",
            "GB/s",
            "p99",
            limit_title(lane),
            "ratio",
            "us",
            "p99",
            "make ns/blk",
            "post ns/blk",
            "runs",
        ]);
        for blocks in &cases {
            let limit = limits.rate(lane, blocks, budget / 2)?;
            for &op in &args.ops {
                let measured = connection.measure(&mut link, op, blocks, budget)?;
                let place = args.describe(lane, op, blocks);
                record(report, &place, &measured, limit)?;
                table.row(row(op, blocks, &measured, limit));
            }
        }
        report.table(&table)?;
        notifications(&args, lane, &connection, &mut link, report)?;
        idle(&args, lane, &connection, &mut link, report)?;
        drop(connection);
        link.tell(peer::Command::Stop)?;
    }
    Ok(())
}

/// Limits, measured when they are needed.
struct Limits {
    arena_bytes: usize,
    // Keeps the memory's owner alive.
    _agent: Agent,
    memory: [Registration; 2],
    tcp: Option<RawTcp>,
}

impl Limits {
    fn new(arena_bytes: usize) -> anyhow::Result<Self> {
        let agent = Agent::new(AgentConfig::new("bench-limits"))?;
        let arena = || agent.allocate(ArenaConfig::new(arena_bytes, "bench-limits"));
        Ok(Self {
            arena_bytes,
            memory: [arena()?, arena()?],
            _agent: agent,
            tcp: None,
        })
    }

    fn rate(&mut self, lane: LaneName, blocks: &Blocks, budget: Duration) -> anyhow::Result<f64> {
        match lane {
            LaneName::Loopback | LaneName::Shm => {
                let [from, to] = &self.memory;
                Ok(limits::memcpy(from, to, blocks, budget))
            }
            LaneName::Tcp => {
                let tcp = match self.tcp.take() {
                    Some(tcp) => tcp,
                    None => RawTcp::new(self.arena_bytes)?,
                };
                self.tcp.insert(tcp).rate(blocks, budget)
            }
        }
    }
}

fn notifications<W: Write>(
    args: &TransferArgs,
    lane: LaneName,
    connection: &Connection,
    link: &mut Link,
    report: &mut Report<W>,
) -> anyhow::Result<()> {
    let count = if args.quick { 200 } else { 2_000 };
    let one = Blocks::new(Pattern::Scattered, 4096, 1, args.arena_bytes(), args.seed)?;
    for (metric, title, blocks) in [
        ("notify_us", "notification", None),
        ("write_notify_us", "4 KiB write + notification", Some(&one)),
    ] {
        let samples = connection.notifications(link, blocks, count)?;
        let (p50, p99) = (samples.median(), samples.percentile(99));
        let place = args.place(lane);
        report.record(
            &Record::new("transfer", place, metric, "us", p50, samples.len() as u64)
                .percentiles(p50, p99),
        )?;
        report.note(&format!("{title}, one way: {p50:.1} us, p99 {p99:.1}"))?;
    }
    Ok(())
}

fn idle<W: Write>(
    args: &TransferArgs,
    lane: LaneName,
    connection: &Connection,
    link: &mut Link,
    report: &mut Report<W>,
) -> anyhow::Result<()> {
    let time = Duration::from_millis(if args.quick { 1_000 } else { 5_000 });
    let used = connection.idle_cpu(link, time)?;
    let sides: &[&str] = if args.in_process {
        &["both"]
    } else {
        &["initiator", "target"]
    };
    for (side, used) in sides.iter().zip(used) {
        let mut place = args.place(lane);
        place.insert("side".to_owned(), json!(side));
        report.record(&Record::new(
            "transfer",
            place,
            "idle_cpu_percent",
            "percent of a core",
            used,
            1,
        ))?;
        report.note(&format!(
            "idle and connected, {side}: {used:.2} % of a core"
        ))?;
    }
    Ok(())
}

fn record<W: Write>(
    report: &mut Report<W>,
    place: &Map<String, Value>,
    measured: &Measured,
    limit: f64,
) -> io::Result<()> {
    let limit = limit.is_finite().then_some(limit);
    let figure = |metric, unit, samples: &Samples, p99| {
        let p50 = samples.median();
        Record::new(
            "transfer",
            place.clone(),
            metric,
            unit,
            p50,
            samples.len() as u64,
        )
        .percentiles(p50, p99)
    };
    // The slow end of a bandwidth is its first percentile.
    let slow = measured.bandwidth.percentile(1);
    report.record(&figure("bandwidth_gb_per_s", "GB/s", &measured.bandwidth, slow).limit(limit))?;
    for (metric, unit, samples) in [
        ("latency_us", "us", &measured.latency),
        ("make_ns_per_block", "ns", &measured.make),
        ("post_ns_per_block", "ns", &measured.post),
    ] {
        report.record(&figure(metric, unit, samples, samples.percentile(99)))?;
    }
    Ok(())
}

fn row(op: OpName, blocks: &Blocks, measured: &Measured, limit: f64) -> Vec<String> {
    let bandwidth = measured.bandwidth.median();
    vec![
        format!(
            "{} {} x{} {}",
            op.as_str(),
            human_bytes(blocks.block_bytes),
            blocks.count(),
            blocks.pattern.as_str()
        ),
        format!("{bandwidth:.2}"),
        format!("{:.2}", measured.bandwidth.percentile(1)),
        format!("{limit:.2}"),
        format!("{:.2}", bandwidth / limit),
        format!("{:.1}", measured.latency.median()),
        format!("{:.1}", measured.latency.percentile(99)),
        format!("{:.0}", measured.make.median()),
        format!("{:.0}", measured.post.median()),
        measured.latency.len().to_string(),
    ]
}

const fn limit_title(lane: LaneName) -> &'static str {
    match lane {
        LaneName::Loopback | LaneName::Shm => "memcpy x1",
        LaneName::Tcp => "raw tcp",
    }
}

fn human_bytes(bytes: u32) -> String {
    match bytes {
        bytes if bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        bytes if bytes.is_multiple_of(1 << 10) => format!("{}K", bytes >> 10),
        bytes => bytes.to_string(),
    }
}

impl TransferArgs {
    /// Checks the options and applies `--quick` and the defaults that depend on others.
    fn effective(&self) -> anyhow::Result<Self> {
        let mut args = self.clone();
        if args.lanes.is_empty() {
            args.lanes = if args.in_process {
                vec![LaneName::Loopback, LaneName::Tcp]
            } else {
                vec![LaneName::Shm, LaneName::Tcp]
            };
        }
        if args.quick {
            args.case_ms = args.case_ms.min(100);
            args.arena_mib = args.arena_mib.min(64);
            args.patterns.truncate(1);
            args.block_bytes
                .retain(|size| ![16 << 10, 256 << 10].contains(&size.0));
        }
        ensure!(
            args.in_process || !args.lanes.contains(&LaneName::Loopback),
            "the loopback lane joins agents of one process; add --in-process"
        );
        ensure!(
            (1..=64 << 10).contains(&args.arena_mib),
            "--arena-mib is {}; accepted: 1 to 65536",
            args.arena_mib
        );
        ensure!(
            !args.counts.is_empty() && args.counts.iter().all(|&count| count > 0),
            "--counts needs numbers of at least 1"
        );
        ensure!(
            (1..=60_000).contains(&args.case_ms),
            "--case-ms is {}; accepted: 1 to 60000",
            args.case_ms
        );
        Ok(args)
    }

    fn cases(&self) -> anyhow::Result<Vec<Blocks>> {
        let mut cases = Vec::new();
        for &pattern in &self.patterns {
            for &Size(block_bytes) in &self.block_bytes {
                for count in self.counts_of(block_bytes) {
                    let arena = self.arena_bytes();
                    cases.push(Blocks::new(pattern, block_bytes, count, arena, self.seed)?);
                }
            }
        }
        Ok(cases)
    }

    /// Counts for one block size: all, or with `--quick` the smallest and the largest that moves no
    /// more than 16 MiB.
    fn counts_of(&self, block_bytes: u32) -> Vec<u32> {
        const QUICK_BYTES_MAX: u64 = 16 << 20;
        let mut counts = self.counts.clone();
        if self.quick {
            counts.sort_unstable();
            counts.dedup();
            let small =
                |&&count: &&u32| u64::from(count) * u64::from(block_bytes) <= QUICK_BYTES_MAX;
            let largest = counts.iter().rfind(small).copied();
            counts.truncate(1);
            counts.extend(largest.filter(|largest| !counts.contains(largest)));
        }
        counts
    }

    const fn arena_bytes(&self) -> u64 {
        (self.arena_mib as u64) << 20
    }

    const fn processes(&self) -> &'static str {
        if self.in_process {
            "one process"
        } else {
            "two processes"
        }
    }

    fn place(&self, lane: LaneName) -> Map<String, Value> {
        case([
            ("lane", json!(lane.as_str())),
            ("processes", json!(if self.in_process { 1 } else { 2 })),
            ("from", json!("host")),
            ("to", json!("host")),
        ])
    }

    fn describe(&self, lane: LaneName, op: OpName, blocks: &Blocks) -> Map<String, Value> {
        let mut place = self.place(lane);
        for (name, value) in [
            ("op", json!(op.as_str())),
            ("block_bytes", json!(blocks.block_bytes)),
            ("count", json!(blocks.count())),
            ("pattern", json!(blocks.pattern.as_str())),
        ] {
            place.insert(name.to_owned(), value);
        }
        place
    }
}
