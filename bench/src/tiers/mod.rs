//! `blockplane bench kvbm`: the books of a tier, and blocks between host memory (G2) and the store on
//! disk (G3), and from the host memory of another worker (G4).
//!
//! Blocks at random places of the store are written and read by several threads, each a batch at a
//! time, as the tier manager does it: with intents, headers and checksums. fio does random requests of
//! the same size at the slots of the same file and with as many in flight; the runs alternate,
//! because devices drift, and the ratio is the median of those of the pairs. Reads come first: fio's writes
//! spoil the blocks. Where fio is not installed, plain transfers
//! without a store are the limit. Processor time is that of the whole process.

mod moves;
mod peers;
mod pools;
mod recovery;

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::ensure;
use blockplane_kvbm::{Fingerprint, store::StoreMemory};
use blockplane_transfer::{Agent, AgentConfig, ArenaConfig, BlockLayout, Lane};
use serde_json::json;

use self::moves::{Bench, Raw};
use crate::{
    engine::read_bandwidth,
    report::{Record, Report, Samples, Table, case},
    transfer::{Fio, OpName, gb_per_s, process_cpu},
};

pub(crate) const BENCH: &str = "kvbm";
/// Of the bandwidth of fio.
const GOAL: f64 = 0.9;
const GOAL_CORES: f64 = 0.3;
const GOAL_RECOVERY_S: f64 = 3.0;

/// Options of `blockplane bench kvbm`.
#[derive(Clone, Debug, clap::Args)]
pub struct TiersArgs {
    /// Folder on the disk to be measured; what is written there is removed.
    #[arg(long, default_value = ".")]
    pub path: PathBuf,
    /// Bytes of a block.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "65536,262144,1048576,2097152"
    )]
    pub block_bytes: Vec<u64>,
    /// Bytes of the store, and as many of fio's file.
    #[arg(long, default_value_t = 256 << 20)]
    pub store_bytes: u64,
    /// Batches at a time, each on a thread of its own.
    #[arg(long, default_value_t = 4)]
    pub threads: u32,
    /// Most blocks of a batch; of larger blocks, as many as make 4 MiB.
    #[arg(long, default_value_t = 16)]
    pub batch: u32,
    /// Runs of each case; the median counts.
    #[arg(long, default_value_t = 5)]
    pub runs: u32,
    /// Milliseconds of each run.
    #[arg(long, default_value_t = 400)]
    pub run_ms: u64,
    /// Slots of the store that is recovered; it takes 4 KiB of disk for each.
    #[arg(long, default_value_t = 1_000_000)]
    pub recover_slots: u32,
    /// Seed of places and contents.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Two short runs, 100,000 slots to recover.
    #[arg(long)]
    pub quick: bool,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) block_bytes: u64,
    pub(crate) slots: u32,
    pub(crate) batch: u32,
    pub(crate) threads: u32,
    pub(crate) seed: u64,
}

/// Runs the benchmark.
///
/// # Errors
/// When an option makes no sense, the disk cannot be used, or bytes arrive wrong.
pub fn run(args: &TiersArgs) -> anyhow::Result<()> {
    measure(args, &mut Report::stdout(args.json))
}

fn measure<W: Write>(args: &TiersArgs, report: &mut Report<W>) -> anyhow::Result<()> {
    ensure!(
        args.threads > 0 && args.batch > 0 && args.runs > 0,
        "--threads, --batch and --runs are at least 1"
    );
    let (runs, time) = match args.quick {
        true => (2, Duration::from_millis(150)),
        false => (args.runs, Duration::from_millis(args.run_ms.max(1))),
    };
    pools::measure(args.quick, report)?;
    let folder = tempfile::Builder::new()
        .prefix("blockplane-bench-kvbm-")
        .tempdir_in(&args.path)?;
    let config = AgentConfig::new("bench-kvbm").with_lanes([Lane::Loopback]);
    let agent = Agent::new(config)?;
    let checksum = checksums(&agent, report)?;
    let fio = Fio::find();
    if fio.is_none() {
        report.note("fio is not installed: plain transfers without a store are the limit")?;
    }
    let beside = if fio.is_some() { "fio" } else { "plain" };
    let mut table = Table::new(&[
        "case",
        "GB/s",
        &format!("{beside} GB/s"),
        "ratio",
        "cores",
        &format!("{beside} cores"),
        "of it checksums",
        "runs",
    ]);
    for &block_bytes in &args.block_bytes {
        let case = Case::new(args, block_bytes)?;
        let store = folder.path().join("store");
        let mut bench = Bench::open(&agent, &store, case)?;
        bench.check()?;
        let other = folder.path().join("other");
        let file_bytes = blockplane_kvbm::store::file_bytes(case.slots, block_bytes);
        let slots_bytes = block_bytes.next_multiple_of(4096) * u64::from(case.slots);
        let first = file_bytes.unwrap_or(slots_bytes) - slots_bytes;
        let mut raw = match &fio {
            Some(_) => None,
            None => Some(Raw::open(&agent, &other, case)?),
        };
        for op in [OpName::Read, OpName::Write] {
            let mut figures = Figures::default();
            for _ in 0..runs {
                let ours = bench.measure(op, time)?;
                figures.pair(
                    ours,
                    match (&fio, &mut raw) {
                        (Some(fio), _) => {
                            let block_bytes = u32::try_from(case.block_bytes)?;
                            let in_flight = case.threads * case.batch;
                            let place = first..first + slots_bytes;
                            fio.measure(&store, place, op, block_bytes, in_flight, time)?
                        }
                        (None, Some(raw)) => raw.measure(op, time)?,
                        (None, None) => break,
                    },
                );
            }
            figures.report(op, &case, fio.is_some(), checksum, report)?;
            table.row(figures.row(op, &case, checksum));
        }
        drop(bench);
        for file in [store, other] {
            // One of them may not have been made.
            let _ = std::fs::remove_file(file);
        }
    }
    report.table(&table)?;
    peers::measure(args, runs, time, report)?;
    let slots = match args.quick {
        true => args.recover_slots.min(100_000),
        false => args.recover_slots,
    };
    recovery::measure(&agent, folder.path(), slots, report)
}

impl Case {
    fn new(args: &TiersArgs, block_bytes: u64) -> anyhow::Result<Self> {
        ensure!(
            block_bytes >= 512 && block_bytes.is_multiple_of(512),
            "--block-bytes {block_bytes}; accepted: multiples of 512"
        );
        let slots = u32::try_from(args.store_bytes / block_bytes)?;
        let batch = u32::try_from((4 << 20) / block_bytes)
            .unwrap_or(args.batch)
            .clamp(1, args.batch);
        ensure!(
            slots >= args.threads * batch,
            "a store of {} bytes has {slots} blocks of {block_bytes} bytes, {} are moved at a time; \
             accepted: a larger --store-bytes",
            args.store_bytes,
            args.threads * batch
        );
        Ok(Self {
            block_bytes,
            slots,
            batch,
            threads: args.threads,
            seed: args.seed,
        })
    }
}

/// Rates and cores of one case, ours and those of who runs beside.
#[derive(Default)]
struct Figures {
    rates: Samples,
    cores: Samples,
    peer_rates: Samples,
    peer_cores: Samples,
    /// Of the rates of each pair.
    ratios: Samples,
}

impl Figures {
    /// Our rate and cores, and those of who ran right after.
    fn pair(&mut self, ours: (f64, f64), theirs: (f64, f64)) {
        self.rates.push(ours.0);
        self.cores.push(ours.1);
        self.peer_rates.push(theirs.0);
        self.peer_cores.push(theirs.1);
        self.ratios.push(ours.0 / theirs.0);
    }

    fn report<W: Write>(
        &self,
        op: OpName,
        place: &Case,
        is_peer: bool,
        checksum: f64,
        report: &mut Report<W>,
    ) -> anyhow::Result<()> {
        let figure = |metric, unit, samples: &Samples, beside: &Samples, goal: f64| {
            let place = case([
                ("from", json!("g2")),
                ("to", json!("g3")),
                ("op", json!(op.as_str())),
                ("block_bytes", json!(place.block_bytes)),
                ("batch", json!(place.batch)),
                ("threads", json!(place.threads)),
            ]);
            let mut record = Record::of_samples(BENCH, place, metric, unit, samples);
            let beside = beside.median();
            if is_peer {
                record.peer = Some(beside);
            } else {
                record.limit = Some(beside);
            }
            record.ratio = Some(record.value / beside);
            record.goal = Some(goal);
            record
        };
        let rate_goal = GOAL * self.peer_rates.median();
        for mut record in [
            figure(
                "bandwidth_gb_per_s",
                "GB/s",
                &self.rates,
                &self.peer_rates,
                rate_goal,
            ),
            figure(
                "cpu_cores",
                "cores",
                &self.cores,
                &self.peer_cores,
                GOAL_CORES,
            ),
        ] {
            if record.metric == "bandwidth_gb_per_s" {
                record.ratio = Some(self.ratios.median());
            }
            report.record(&record)?;
            if record.metric == "bandwidth_gb_per_s" {
                // What one core spends on checksums at this bandwidth.
                record.metric = "checksum_cores";
                record.unit = "cores";
                let share = record.value / checksum;
                (record.value, record.p50) = (share, Some(share));
                (record.p90, record.p99, record.p999, record.max) = (None, None, None, None);
                (record.peer, record.limit, record.ratio) = (None, None, None);
                record.goal = Some(0.1);
                report.record(&record)?;
            }
        }
        Ok(())
    }

    fn row(&self, op: OpName, case: &Case, checksum: f64) -> Vec<String> {
        vec![
            format!(
                "{} {} KiB, {} x {}",
                op.as_str(),
                case.block_bytes >> 10,
                case.threads,
                case.batch
            ),
            format!("{:.3}", self.rates.median()),
            format!("{:.3}", self.peer_rates.median()),
            format!("{:.2}", self.ratios.median()),
            format!("{:.3}", self.cores.median()),
            format!("{:.3}", self.peer_cores.median()),
            format!("{:.3}", self.rates.median() / checksum),
            self.rates.len().to_string(),
        ]
    }
}

/// GB/s of one core that computes checksums of blocks that are not in its caches.
fn checksums<W: Write>(agent: &Agent, report: &mut Report<W>) -> anyhow::Result<f64> {
    const BYTES: usize = 128 << 20;
    const BLOCK: u64 = 1 << 20;
    let registration = agent.allocate(ArenaConfig::new(BYTES, "checksums"))?;
    let blocks = u32::try_from(BYTES as u64 / BLOCK)?;
    let page: Vec<u8> = (0..BLOCK)
        .map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
        .collect();
    for block in 0..blocks {
        registration.write_at(u64::from(block) * BLOCK, &page)?;
    }
    let memory = StoreMemory {
        registration: &registration,
        layout: BlockLayout::contiguous(blocks, BLOCK),
    };
    let mut rates = Samples::default();
    for seed in 0..5 {
        // Its own time: this thread is the only one that works, and neighbours do not count.
        let start = process_cpu();
        let mut sums = 0;
        for block in 0..blocks {
            sums ^= memory.checksum(block, seed)?;
        }
        let took = process_cpu().saturating_sub(start).as_secs_f64();
        // An even number of equal blocks.
        ensure!(sums == 0, "equal blocks have different checksums");
        rates.push(gb_per_s(BYTES as u64, took));
    }
    let place = case([("block_bytes", json!(BLOCK))]);
    let mut record = Record::of_samples(BENCH, place, "checksum_gb_per_s", "GB/s", &rates);
    let limit = read_bandwidth(1) / 1e9;
    (record.limit, record.ratio) = (Some(limit), Some(record.value / limit));
    report.record(&record)?;
    report.note(&format!(
        "checksums: {:.1} GB/s on one core, which can read {limit:.1} GB/s",
        record.value
    ))?;
    Ok(record.value)
}

/// What the stores of the benchmark say that they hold.
pub(crate) const fn fingerprint() -> Fingerprint {
    Fingerprint {
        model: 0,
        layout: 0,
        block_tokens: 16,
        tp_rank: 0,
        tp_size: 1,
        encoding: blockplane_kvbm::fingerprint::ENCODING,
    }
}

/// A name for the block of a slot.
pub(crate) fn name(slot: u32, salt: u64) -> blockplane_protocol::TokenBlock {
    let key = (u64::from(slot) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt;
    blockplane_protocol::TokenBlock {
        block: blockplane_protocol::BlockHash(!key),
        sequence: blockplane_protocol::SequenceHash(key),
    }
}

/// The configuration of a store in a file.
pub(crate) fn store_config(
    path: &Path,
    slots: u32,
    block_bytes: u64,
) -> blockplane_kvbm::SlotStoreConfig {
    let location = blockplane_kvbm::store::StoreLocation::File(path.to_owned());
    blockplane_kvbm::SlotStoreConfig::new(location, slots, block_bytes, fingerprint())
}
