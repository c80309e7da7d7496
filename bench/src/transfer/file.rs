//! Transfers between memory and a file, beside fio with the same settings.
//!
//! Blocks at random places of the file move around the page cache, several transfers at a time so
//! that the device always has as many requests as it is given. Where fio is installed it does the
//! same (io_uring, registered memory and file) in turn with us: devices drift, so the runs alternate
//! and medians are compared. Processor time is that of the whole process, ours with the thread that
//! posts.

use std::{
    collections::VecDeque,
    fs,
    io::Write,
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{
    Agent, BlockLayout, DirectIo, FileBlocks, FileConfig, FileStore, LocalBlocks, Op, PostOptions,
    Registration, Transfer,
};
use rand::{
    Rng, RngExt, SeedableRng,
    rngs::{SmallRng, StdRng},
};
use serde_json::{Value, json};

use super::{
    args::Effective,
    case::OpName,
    limits::gb_per_s,
    memory,
    node::{self, process_cpu},
    out::BENCH,
};
use crate::report::{Record, Report, Samples, Table, case};

/// Longer than any transfer takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Transfers in flight; each has as many blocks as the device gets requests.
const TRANSFERS: usize = 3;

/// Measures the cases of `args` against a file at `path`: a new one, or one made in that folder.
///
/// # Errors
/// When the file cannot be used, or bytes arrive wrong.
pub(super) fn run<W: Write>(
    effective: &Effective,
    path: &Path,
    report: &mut Report<W>,
) -> anyhow::Result<()> {
    let args = &effective.args;
    let file = Scratch::new(path)?;
    let (bytes, rounds, time) = if args.quick {
        (256u64 << 20, 1, Duration::from_millis(300))
    } else {
        (1 << 30, 5, Duration::from_millis(args.case_ms.max(500)))
    };
    let fio = Fio::find();
    if fio.is_none() {
        report.note("fio is not installed: no comparison")?;
    }
    let mut table = Table::new(&[
        "case",
        "GB/s",
        "slowest",
        "fio GB/s",
        "ratio",
        "cores",
        "fio cores",
        "runs",
    ]);
    let mut described = false;
    for &(block_bytes, in_flight) in &effective.file_cases {
        let mut ours = Ours::open(&file.path, bytes, block_bytes, in_flight, effective)?;
        if !described {
            report.note(&format!(
                "\nfile {}: {}",
                file.path.display(),
                ours.reason()
            ))?;
            described = true;
        }
        ours.check()?;
        for &op in &args.ops {
            let (mut rates, mut cores) = (Samples::default(), Samples::default());
            let (mut fio_rates, mut fio_cores) = (Samples::default(), Samples::default());
            for _ in 0..rounds {
                let (rate, used) = ours.measure(op.op(), time)?;
                rates.push(rate);
                cores.push(used);
                if let Some(fio) = &fio {
                    let (rate, used) =
                        fio.measure(&file.path, 0..bytes, op, block_bytes, in_flight, time)?;
                    fio_rates.push(rate);
                    fio_cores.push(used);
                }
            }
            let place = [
                ("lane", json!("file")),
                ("from", json!(args.from.name())),
                ("op", json!(op.as_str())),
                ("block_bytes", json!(block_bytes)),
                ("in_flight", json!(in_flight)),
            ];
            for (metric, unit, samples, peer) in [
                ("bandwidth_gb_per_s", "GB/s", &rates, &fio_rates),
                ("cpu_cores", "cores", &cores, &fio_cores),
            ] {
                let mut record =
                    Record::of_samples(BENCH, case(place.clone()), metric, unit, samples);
                if !peer.is_empty() {
                    record.peer = Some(peer.median());
                    record.ratio = Some(record.value / peer.median());
                }
                report.record(&record)?;
            }
            let beside = |samples: &Samples| match samples.is_empty() {
                true => "-".to_owned(),
                false => format!("{:.3}", samples.median()),
            };
            let ratio = match fio_rates.is_empty() {
                true => "-".to_owned(),
                false => format!("{:.2}", rates.median() / fio_rates.median()),
            };
            table.row(vec![
                format!("{} {} KiB x {in_flight}", op.as_str(), block_bytes >> 10),
                format!("{:.3}", rates.median()),
                format!("{:.3}", rates.percentile(0)),
                beside(&fio_rates),
                ratio,
                format!("{:.3}", cores.median()),
                beside(&fio_cores),
                rates.len().to_string(),
            ]);
        }
    }
    report.table(&table)?;
    Ok(())
}

/// A file that goes away with the benchmark.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(path: &Path) -> anyhow::Result<Self> {
        let path = if path.is_dir() {
            path.join(format!("blockplane-bench-{}", std::process::id()))
        } else {
            path.to_owned()
        };
        ensure!(
            !path.exists(),
            "{} exists and would be overwritten; accepted: a folder, or a new file",
            path.display()
        );
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // It may not have been made.
        let _ = fs::remove_file(&self.path);
    }
}

/// Our side.
struct Ours {
    agent: Agent,
    arena: Registration,
    file: FileStore,
    blocks: u32,
    block_bytes: u32,
    count: u32,
    rng: StdRng,
    places: SmallRng,
}

impl Ours {
    fn open(
        path: &Path,
        bytes: u64,
        block_bytes: u32,
        count: u32,
        effective: &Effective,
    ) -> anyhow::Result<Self> {
        let seed = effective.args.seed;
        let in_flight = u64::from(block_bytes) * u64::from(count) * TRANSFERS as u64;
        ensure!(
            in_flight <= bytes,
            "{TRANSFERS} transfers of {count} blocks of {block_bytes} bytes at a time do not fit a file of {bytes} bytes; accepted: smaller --block-bytes or --counts"
        );
        let mut config = node::config("bench-file", &effective.settings, &effective.kernels);
        config.storage.file_queue_depth = count;
        let agent = Agent::new(config)?;
        let arena = block_bytes as usize * count as usize * TRANSFERS;
        let from = &effective.args.from;
        let arena = memory::register(&agent, from, arena, effective.settings.device.sharing)?;
        let config = FileConfig::new(path)
            .create(bytes)
            .with_direct(DirectIo::Auto);
        let file = agent.open_file(config)?;
        let ours = Self {
            blocks: u32::try_from(bytes / u64::from(block_bytes))?,
            block_bytes,
            count,
            rng: StdRng::seed_from_u64(seed),
            places: SmallRng::seed_from_u64(seed),
            agent,
            arena,
            file,
        };
        // Every block is written once: reading holes measures nothing.
        if ours.file.query()?.allocated < bytes {
            ours.fill()?;
        }
        Ok(ours)
    }

    fn reason(&self) -> String {
        self.file.lane().reason
    }

    fn fill(&self) -> anyhow::Result<()> {
        let lot = self.count;
        for first in (0..self.blocks).step_by(lot as usize) {
            let count = lot.min(self.blocks - first);
            let local: Vec<u32> = (0..count).collect();
            self.pattern(&local, u64::from(first))?;
            let file = (first..first + count).collect();
            self.post(Op::Write, local, file)?.wait(PATIENCE)?;
        }
        self.file
            .sync(PostOptions::within(PATIENCE))?
            .wait(PATIENCE)?;
        Ok(())
    }

    /// Starts one transfer.
    fn post(&self, op: Op, local: Vec<u32>, file: Vec<u32>) -> anyhow::Result<Transfer> {
        let block_bytes = u64::from(self.block_bytes);
        let places = self.count * u32::try_from(TRANSFERS)?;
        let prepared = self.agent.prepare_file(
            op,
            LocalBlocks {
                registration: &self.arena,
                layout: BlockLayout::contiguous(places, block_bytes),
                ids: local.into(),
                layers: 0..1,
            },
            FileBlocks {
                file: &self.file,
                layout: BlockLayout::contiguous(self.blocks, block_bytes),
                ids: file.into(),
                layers: 0..1,
                durable: false,
            },
        )?;
        Ok(prepared.post(PostOptions::within(PATIENCE))?)
    }

    /// Gives each block contents of its own.
    fn pattern(&self, blocks: &[u32], seed: u64) -> anyhow::Result<()> {
        for &block in blocks {
            let contents = self.block(seed.wrapping_add(u64::from(block)));
            self.arena.write_at(self.at(block), &contents)?;
        }
        Ok(())
    }

    /// Where a block lies in the arena.
    fn at(&self, block: u32) -> u64 {
        u64::from(block) * u64::from(self.block_bytes)
    }

    fn block(&self, seed: u64) -> Vec<u8> {
        let mut contents = vec![0; self.block_bytes as usize];
        StdRng::seed_from_u64(seed).fill(&mut contents[..]);
        contents
    }

    /// Different blocks of the file at random places: one in each of `count` equal stretches. A
    /// cheap generator: its processor time is counted as ours.
    fn random(&mut self) -> Vec<u32> {
        let stretch = self.blocks / self.count;
        (0..self.count)
            .map(|i| i * stretch + self.places.next_u32() % stretch)
            .collect()
    }

    /// Writes a fresh pattern, reads it back elsewhere and compares.
    fn check(&mut self) -> anyhow::Result<()> {
        let seed = self.rng.random();
        let file = self.random();
        let from: Vec<u32> = (0..self.count).collect();
        let to: Vec<u32> = (self.count..2 * self.count).collect();
        self.pattern(&from, seed)?;
        self.pattern(&to, !seed)?;
        self.post(Op::Write, from.clone(), file.clone())?
            .wait(PATIENCE)?;
        self.post(Op::Read, to.clone(), file)?.wait(PATIENCE)?;
        let (mut sent, mut found) = (self.block(0), self.block(0));
        let mut wrong = 0;
        for (from, to) in from.into_iter().zip(to) {
            self.arena.read_at(self.at(from), &mut sent)?;
            self.arena.read_at(self.at(to), &mut found)?;
            wrong += usize::from(sent != found);
        }
        ensure!(
            wrong == 0,
            "{wrong} of {} blocks came back wrong",
            self.count
        );
        Ok(())
    }

    /// GB/s and cores used.
    fn measure(&mut self, op: Op, time: Duration) -> anyhow::Result<(f64, f64)> {
        let mut lots: VecDeque<Vec<u32>> = (0..u32::try_from(TRANSFERS)?)
            .map(|lot| (lot * self.count..(lot + 1) * self.count).collect())
            .collect();
        let mut flying: VecDeque<(Transfer, Vec<u32>)> = VecDeque::new();
        let lot_bytes = u64::from(self.count) * u64::from(self.block_bytes);
        let mut bytes = 0u64;
        let (start, cpu) = (Instant::now(), process_cpu());
        loop {
            while start.elapsed() < time
                && let Some(lot) = lots.pop_front()
            {
                let file = self.random();
                flying.push_back((self.post(op, lot.clone(), file)?, lot));
            }
            let Some((transfer, lot)) = flying.pop_front() else {
                break;
            };
            transfer.wait(PATIENCE)?;
            bytes += lot_bytes;
            lots.push_back(lot);
        }
        let took = start.elapsed().as_secs_f64();
        let used = process_cpu().saturating_sub(cpu);
        Ok((gb_per_s(bytes, took), used.as_secs_f64() / took))
    }
}

/// The flexible I/O tester.
pub(crate) struct Fio;

impl Fio {
    /// Present where it is installed.
    pub(crate) fn find() -> Option<Self> {
        let version = Command::new("fio").arg("--version").output().ok()?;
        version.status.success().then_some(Self)
    }

    /// GB/s and cores used, with requests in this range of a file.
    ///
    /// # Errors
    /// It fails, or says nothing that can be read.
    pub(crate) fn measure(
        &self,
        path: &Path,
        range: Range<u64>,
        op: OpName,
        block_bytes: u32,
        in_flight: u32,
        time: Duration,
    ) -> anyhow::Result<(f64, f64)> {
        let output = Command::new("fio")
            .args([
                "--name=blockplane",
                "--ioengine=io_uring",
                "--direct=1",
                "--fixedbufs=1",
                "--registerfiles=1",
                "--time_based",
                "--norandommap",
                "--randrepeat=0",
                "--output-format=json",
            ])
            .arg(format!("--filename={}", path.display()))
            .arg(format!("--rw=rand{}", op.as_str()))
            .arg(format!("--offset={}", range.start))
            .arg(format!("--size={}", range.end - range.start))
            .arg(format!("--bs={block_bytes}"))
            .arg(format!("--iodepth={in_flight}"))
            .arg(format!("--runtime={}ms", time.as_millis()))
            .output()
            .context("cannot start fio")?;
        if !output.status.success() {
            bail!("fio: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        // Notes may come before the object.
        let text = String::from_utf8_lossy(&output.stdout);
        let start = text.find('{').context("fio printed no result")?;
        let result: Value = serde_json::from_str(&text[start..]).context("fio's result")?;
        let job = &result["jobs"][0];
        let number = |value: &Value| value.as_f64().context("fio's result lacks a figure");
        let rate = number(&job[op.as_str()]["bw_bytes"])? / 1e9;
        let percent = number(&job["usr_cpu"])? + number(&job["sys_cpu"])?;
        Ok((rate, percent / 100.0))
    }
}
