//! The options, checked and completed.

use std::{path::PathBuf, time::Duration};

use anyhow::{bail, ensure};
use blockplane_transfer::{CudaReport, CudaUnavailable, KernelConfig, probe_cuda};

use super::{
    case::{Case, LaneName, Memory, OpName, Pattern, Shape, Size},
    cluster::Places,
    job::Rounds,
    link::{DeviceSettings, Settings, Sharing},
    model::{Cut, DTypeName, Model, Order},
    plot::Drawing,
    scheme::{Scheme, Topology},
};

/// A group of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Section {
    /// Bandwidth and latency of block transfers.
    Blocks,
    /// One-way latency of notifications, alone and behind a 4 KiB write.
    Notify,
    /// Preparing and posting a transfer of 10,000 blocks.
    Make,
    /// Metadata, connecting, registering memory.
    Setup,
    /// Processor time of connected agents without work.
    Idle,
}

/// What runs beside transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Companion {
    /// A large product of bf16 matrices, again and again.
    Matmul,
}

/// Whether a transfer is prepared once or each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Prepared {
    /// Prepared once, posted many times.
    Yes,
    /// Prepared again for every posting; counts as part of the transfer.
    No,
}

/// Block sizes that are measured when none are named.
const BLOCK_BYTES: [u32; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// Blocks of a transfer, likewise.
const COUNTS: [u32; 3] = [1, 16, 128];
/// Block sizes for files.
const FILE_BLOCK_BYTES: [u32; 3] = [4 << 10, 64 << 10, 1 << 20];

/// What `--help` ends with.
const EXAMPLES: &str = "\
Examples:
  Everything between two processes, in under 30 seconds:
      blockplane bench transfer --quick
  How fast is this lane with these blocks, and what would a plain copy do?
      blockplane bench transfer --measure blocks --lanes shm --block-bytes 16k --counts 128
  Three processes write into one, each with two threads and four transfers in flight:
      blockplane bench transfer --scheme many-to-one --initiators 3 --threads 2 --depth 4
  A curve over block sizes as a picture:
      blockplane bench transfer --measure blocks --start-block-bytes 4k --max-block-bytes 4m \\
          --counts 1,32 --patterns scattered --plot transfer.svg
  The KV of one request of 8192 tokens, layer by layer:
      blockplane bench transfer --model-config MODEL/config.json --tokens 8192 --per-layer
  Files beside fio:
      blockplane bench transfer --to file:/data
  Scattered blocks from one GPU to another with 4, 16 and 64 multiprocessors:
      blockplane bench transfer --from cuda:0 --to cuda:1 --block-bytes 4k,32k --counts 16384 \
          --patterns scattered --arena-mib 1024 --sms 4,16,64

Every figure stands beside a limit of the same run; docs/benchmarks.md says what the columns mean.";

/// Options of `blockplane bench transfer`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct TransferArgs {
    /// Figures to take [default: all of them between two agents, blocks between more].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub measure: Vec<Section>,
    /// Fewer, smaller and shorter cases; under 30 seconds.
    #[arg(long)]
    pub quick: bool,
    /// Seed of block places and contents.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// Who transfers to whom; each initiator and each target is a process with its own agent.
    #[arg(
        long,
        value_enum,
        default_value = "pairwise",
        help_heading = "Processes"
    )]
    pub scheme: Scheme,
    /// Processes that post [default: 1; 2 for many-to-one and all-to-all].
    #[arg(long, value_name = "N", help_heading = "Processes")]
    pub initiators: Option<usize>,
    /// Processes that are posted to [default: 1; 2 for one-to-many and all-to-all].
    #[arg(long, value_name = "N", help_heading = "Processes")]
    pub targets: Option<usize>,
    /// All agents in this process instead of one process each.
    #[arg(long, help_heading = "Processes")]
    pub in_process: bool,
    /// Lanes to measure [default: shm,tcp; with --in-process loopback,tcp].
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "Processes")]
    pub lanes: Vec<LaneName>,
    /// TCP connections for data [default: the agent's].
    #[arg(long, value_name = "N", help_heading = "Processes")]
    pub tcp_streams: Option<usize>,
    /// Threads that copy [default: the agent's].
    #[arg(long, value_name = "N", help_heading = "Processes")]
    pub copy_threads: Option<usize>,

    /// Operations to measure.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "write,read",
        help_heading = "Blocks"
    )]
    pub ops: Vec<OpName>,
    /// Block sizes [default: 4k,16k,64k,256k,1m; to a file 4k,64k,1m].
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SIZES",
        help_heading = "Blocks"
    )]
    pub block_bytes: Vec<Size>,
    /// Smallest of a range of block sizes, each twice the one before, instead of a list.
    #[arg(
        long,
        value_name = "SIZE",
        requires = "max_block_bytes",
        conflicts_with = "block_bytes",
        help_heading = "Blocks"
    )]
    pub start_block_bytes: Option<Size>,
    /// Largest of the range.
    #[arg(
        long,
        value_name = "SIZE",
        requires = "start_block_bytes",
        help_heading = "Blocks"
    )]
    pub max_block_bytes: Option<Size>,
    /// Blocks of one transfer [default: 1,16,128; to a file 64, and 16 of 1m].
    #[arg(long, value_delimiter = ',', value_name = "N", help_heading = "Blocks")]
    pub counts: Vec<u32>,
    /// Smallest of a range of counts, each twice the one before, instead of a list.
    #[arg(
        long,
        value_name = "N",
        requires = "max_count",
        conflicts_with = "counts",
        help_heading = "Blocks"
    )]
    pub start_count: Option<u32>,
    /// Largest of the range.
    #[arg(
        long,
        value_name = "N",
        requires = "start_count",
        help_heading = "Blocks"
    )]
    pub max_count: Option<u32>,
    /// Where the blocks lie.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "scattered,contiguous",
        help_heading = "Blocks"
    )]
    pub patterns: Vec<Pattern>,
    /// Memory of the initiators: arena, host, cuda:N (a GPU; host is then a pinned arena).
    #[arg(
        long,
        value_name = "KIND",
        default_value = "arena",
        help_heading = "Blocks"
    )]
    pub from: Memory,
    /// Memory of the targets: arena, host, cuda:N, file:PATH.
    #[arg(
        long,
        value_name = "KIND",
        default_value = "arena",
        help_heading = "Blocks"
    )]
    pub to: Memory,
    /// Memory of each process, in MiB; twice as much again is taken for the limits.
    #[arg(long, default_value_t = 256, help_heading = "Blocks")]
    pub arena_mib: usize,

    /// Multiprocessors that a transfer may occupy; each number is measured [default: the agent's].
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LIST",
        help_heading = "GPUs"
    )]
    pub sms: Vec<u32>,
    /// The device that is written to does the work of a write, pulling instead of being pushed to.
    #[arg(long, help_heading = "GPUs")]
    pub pull_writes: bool,
    /// How processes get at each other's device memory.
    #[arg(
        long,
        value_enum,
        default_value = "file-descriptor",
        help_heading = "GPUs"
    )]
    pub sharing: Sharing,
    /// How long a thread that waits for a transfer looks for its end without sleeping, up to 10000
    /// [default: the agent's].
    #[arg(long, value_name = "MICROSECONDS", help_heading = "GPUs")]
    pub spin_us: Option<u64>,
    /// Run this beside the transfers, and report how much each slows the other. The transfers move
    /// blocks of 32 KiB, up to 128 MiB at a time, two at a time.
    #[arg(long, value_enum, help_heading = "GPUs")]
    pub beside: Option<Companion>,
    /// Device of the matrix product [default: the first that takes part in the transfers].
    #[arg(long, value_name = "N", requires = "beside", help_heading = "GPUs")]
    pub beside_device: Option<u32>,
    /// Rows and columns of its matrices.
    #[arg(long, value_name = "N", default_value_t = 8192, help_heading = "GPUs")]
    pub product_size: u32,
    /// Post no faster than this, for transfers at a moderate rate beside the product.
    #[arg(long, value_name = "RATE", requires = "beside", help_heading = "GPUs")]
    pub pace_gb_per_s: Option<f64>,
    /// Folder of cuBLASLt [default: the loader's path, toolkits and Python packages].
    #[arg(long, value_name = "FOLDER", help_heading = "GPUs")]
    pub cublas: Option<PathBuf>,

    /// Posting threads of each initiator.
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Posting")]
    pub threads: usize,
    /// Transfers that each thread keeps in flight to each target, each on its own blocks.
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Posting")]
    pub depth: usize,
    /// Prepare once and post many times, or prepare for each posting.
    #[arg(long, value_enum, default_value = "yes", help_heading = "Posting")]
    pub prepared: Prepared,
    /// Do not compare contents before and after each case.
    #[arg(long, help_heading = "Posting")]
    pub no_check: bool,
    /// Unmeasured transfers before the measured ones.
    #[arg(long, default_value_t = 3, value_name = "N", help_heading = "Posting")]
    pub warmup: u32,
    /// Measured transfers of each case, instead of as many as fit --case-ms.
    #[arg(long, value_name = "N", help_heading = "Posting")]
    pub iterations: Option<u32>,
    /// Time for each case, in milliseconds.
    #[arg(long, default_value_t = 200, help_heading = "Posting")]
    pub case_ms: u64,
    /// Time to watch idle agents [default: 10; with --quick 1].
    #[arg(long, value_name = "SECONDS", help_heading = "Posting")]
    pub idle_seconds: Option<u64>,

    /// A Hugging Face config.json (or its folder): move the KV of one request of this model
    /// instead of blocks of given sizes.
    #[arg(long, value_name = "FILE", help_heading = "Model-shaped traffic")]
    pub model_config: Option<PathBuf>,
    /// Tokens of the request.
    #[arg(
        long,
        default_value_t = 4096,
        value_name = "N",
        help_heading = "Model-shaped traffic"
    )]
    pub tokens: u32,
    /// Tensor-parallel ranks; each pair of processes moves the share of one.
    #[arg(
        long,
        default_value_t = 1,
        value_name = "N",
        help_heading = "Model-shaped traffic"
    )]
    pub tp: u32,
    /// Element type of the cache [default: the configuration's, else bf16].
    #[arg(long, value_enum, help_heading = "Model-shaped traffic")]
    pub dtype: Option<DTypeName>,
    /// Tokens of a block.
    #[arg(
        long,
        default_value_t = 16,
        value_name = "N",
        help_heading = "Model-shaped traffic"
    )]
    pub block_tokens: u32,
    /// How the cache lies in memory.
    #[arg(
        long,
        value_enum,
        default_value = "layer-first",
        help_heading = "Model-shaped traffic"
    )]
    pub layout: Order,
    /// One transfer and one notification for each layer, all posted at once.
    #[arg(long, help_heading = "Model-shaped traffic")]
    pub per_layer: bool,

    /// One JSON object a line instead of tables.
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Also write all figures to this file as comma-separated values.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub csv: Option<PathBuf>,
    /// Also draw bandwidth over block size; the name ends in .svg or .png.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub plot: Option<PathBuf>,
}

/// The options as they are used.
#[derive(Clone, Debug)]
pub(super) struct Effective {
    pub(super) args: TransferArgs,
    pub(super) topology: Topology,
    pub(super) sections: Vec<Section>,
    pub(super) model: Option<Model>,
    pub(super) settings: Settings,
    /// Block sizes and blocks of a transfer, for files.
    pub(super) file_cases: Vec<(u32, u32)>,
    /// Where kernels are compiled and kept.
    pub(super) kernels: KernelConfig,
}

impl TransferArgs {
    /// Checks the options and applies `--quick` and the defaults that depend on others.
    pub(super) fn effective(&self, kernels: &KernelConfig) -> anyhow::Result<Effective> {
        let mut args = self.clone();
        let topology = Topology::new(args.scheme, args.initiators, args.targets)?;
        let single = topology.pairs() == 1;
        let model = args.model()?;
        let report = args.devices()?;
        if args.lanes.is_empty() {
            args.lanes = if report.is_some() {
                let lane = if args.in_process {
                    LaneName::Loopback
                } else {
                    LaneName::Shm
                };
                vec![lane]
            } else if args.in_process {
                vec![LaneName::Loopback, LaneName::Tcp]
            } else {
                vec![LaneName::Shm, LaneName::Tcp]
            };
        }
        if let (Some(start), Some(max)) = (args.start_block_bytes, args.max_block_bytes) {
            ensure!(
                start <= max,
                "--start-block-bytes is above --max-block-bytes"
            );
            args.block_bytes = doublings(start.0, max.0).map(Size).collect();
        }
        if let (Some(start), Some(max)) = (args.start_count, args.max_count) {
            ensure!(
                1 <= start && start <= max,
                "--start-count is 0 or above --max-count"
            );
            args.counts = doublings(start, max).collect();
        }
        let file_cases = args.file_cases();
        if args.block_bytes.is_empty() {
            args.block_bytes = BLOCK_BYTES.map(Size).to_vec();
        }
        if args.counts.is_empty() {
            args.counts = COUNTS.to_vec();
        }
        if args.quick {
            args.quicken();
        }
        args.check()?;
        args.check_devices(report.as_ref())?;
        let sections = match &args.measure[..] {
            [] if single && model.is_none() && report.is_none() => vec![
                Section::Blocks,
                Section::Notify,
                Section::Make,
                Section::Setup,
                Section::Idle,
            ],
            [] => vec![Section::Blocks],
            some => some.to_vec(),
        };
        ensure!(
            single || sections == [Section::Blocks],
            "--measure: between more than two agents only blocks are measured"
        );
        Ok(Effective {
            kernels: kernels.clone(),
            settings: Settings {
                tcp_streams: args.tcp_streams,
                copy_threads: args.copy_threads,
                device: DeviceSettings {
                    engine: false,
                    pull_writes: args.pull_writes,
                    sharing: args.sharing,
                    spin_us: args.spin_us,
                },
            },
            file_cases,
            args,
            topology,
            sections,
            model,
        })
    }

    /// What is measured with a file: what the options say, and fio's usual cases where they say nothing.
    fn file_cases(&self) -> Vec<(u32, u32)> {
        let usual = |bytes: u32| if bytes < 1 << 20 { 64 } else { 16 };
        let sizes = match &self.block_bytes[..] {
            [] => FILE_BLOCK_BYTES.to_vec(),
            some => some.iter().map(|&Size(bytes)| bytes).collect(),
        };
        let mut cases = Vec::new();
        for bytes in sizes {
            match &self.counts[..] {
                [] => cases.push((bytes, usual(bytes))),
                some => cases.extend(some.iter().map(|&count| (bytes, count))),
            }
        }
        cases
    }

    fn model(&self) -> anyhow::Result<Option<Model>> {
        let Some(path) = &self.model_config else {
            ensure!(
                !self.per_layer,
                "--per-layer needs a model with layers; add --model-config"
            );
            return Ok(None);
        };
        for (option, value) in [
            ("--tokens", self.tokens),
            ("--tp", self.tp),
            ("--block-tokens", self.block_tokens),
        ] {
            ensure!(
                (1..=1 << 24).contains(&value),
                "{option} is {value}; accepted: 1 to {}",
                1 << 24
            );
        }
        let cut = Cut {
            tokens: self.tokens,
            ranks: self.tp,
            dtype: self.dtype,
            block_tokens: self.block_tokens,
            order: self.layout,
        };
        Model::read(path, cut).map(Some)
    }

    /// The devices of this machine, if the transfers need any; `host` then means pinned memory.
    fn devices(&mut self) -> anyhow::Result<Option<CudaReport>> {
        let devices = [self.from.device(), self.to.device()];
        let Some(near) = devices.into_iter().flatten().next() else {
            for (option, given) in [
                ("--sms", !self.sms.is_empty()),
                ("--pull-writes", self.pull_writes),
                ("--beside", self.beside.is_some()),
                ("--spin-us", self.spin_us.is_some()),
                ("--sharing handle", self.sharing == Sharing::Handle),
            ] {
                ensure!(
                    !given,
                    "{option} is about device memory; add --from cuda:N or --to cuda:N"
                );
            }
            return Ok(None);
        };
        let report = probe_cuda()?;
        for device in devices.into_iter().chain([self.beside_device]).flatten() {
            if report.devices.iter().all(|one| one.ordinal != device) {
                let devices = u32::try_from(report.devices.len()).unwrap_or(u32::MAX);
                return Err(CudaUnavailable::UnknownDevice { device, devices }.into());
            }
        }
        for side in [&mut self.from, &mut self.to] {
            if matches!(side, Memory::Arena | Memory::Host) {
                *side = Memory::Pinned(near);
            }
        }
        Ok(Some(report))
    }

    fn check_devices(&self, report: Option<&CudaReport>) -> anyhow::Result<()> {
        let Some(report) = report else {
            return Ok(());
        };
        ensure!(
            !self.lanes.contains(&LaneName::Tcp),
            "the tcp lane does not reach device memory; accepted for --lanes: shm, or loopback with \
             --in-process"
        );
        ensure!(
            !self.measure.contains(&Section::Setup),
            "--measure setup is about host memory; `blockplane bench gpu` times the registration of \
             device memory"
        );
        ensure!(
            self.beside.is_none() || (self.scheme == Scheme::Pairwise && self.initiators.is_none()),
            "--beside runs between two agents; leave out --scheme and --initiators"
        );
        if let Some(rate) = self.pace_gb_per_s {
            ensure!(
                rate.is_finite() && rate >= 0.001,
                "--pace-gb-per-s {rate}: accepted: 0.001 or more"
            );
        }
        let most = report
            .devices
            .iter()
            .map(|device| device.multiprocessors)
            .max()
            .unwrap_or(0);
        for &sms in &self.sms {
            ensure!(
                (1..=most).contains(&sms),
                "--sms {sms}: accepted: 1 to {most}"
            );
        }
        Ok(())
    }

    fn quicken(&mut self) {
        self.case_ms = self.case_ms.min(60);
        self.arena_mib = self.arena_mib.min(64);
        self.patterns.truncate(1);
        self.block_bytes
            .retain(|size| ![16 << 10, 256 << 10].contains(&size.0));
        self.idle_seconds = self.idle_seconds.or(Some(1));
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.in_process || !self.lanes.contains(&LaneName::Loopback),
            "the loopback lane joins agents of one process; add --in-process"
        );
        if let Memory::File(path) = &self.from {
            bail!(
                "--from file:{}: initiators have memory; accepted: arena, host, cuda:N",
                path.display()
            );
        }
        if let Some(plot) = &self.plot {
            Drawing::of(plot)?;
        }
        ensure!(
            !self.counts.is_empty() && self.counts.iter().all(|&count| count > 0),
            "--counts needs numbers of at least 1"
        );
        for (option, value, max) in [
            ("--arena-mib", self.arena_mib as u64, 64 << 10),
            ("--case-ms", self.case_ms, 60_000),
            ("--threads", self.threads as u64, 64),
            ("--depth", self.depth as u64, 256),
            ("--iterations", self.iterations.unwrap_or(1).into(), 1 << 20),
            ("--idle-seconds", self.idle_seconds.unwrap_or(1), 600),
        ] {
            ensure!(
                (1..=max).contains(&value),
                "{option} is {value}; accepted: 1 to {max}"
            );
        }
        Ok(())
    }
}

/// `start`, twice as much, and so on up to `max`.
fn doublings(start: u32, max: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(start), |&at| at.checked_mul(2)).take_while(move |&at| at <= max)
}

impl Effective {
    /// What is measured, in order.
    pub(super) fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for &pattern in &self.args.patterns {
            if let Some(model) = &self.model {
                cases.push(Case {
                    pattern,
                    shape: model.shape(self.pool_blocks(model)),
                    count: model.blocks(),
                    listed: false,
                    turn: None,
                });
                continue;
            }
            for &Size(block_bytes) in &self.args.block_bytes {
                for count in self.counts_of(block_bytes) {
                    let shape = Shape::plain(block_bytes, self.bytes() as u64);
                    cases.push(Case {
                        pattern,
                        shape,
                        count,
                        listed: false,
                        turn: None,
                    });
                }
            }
        }
        cases
    }

    /// Counts for one block size: all, or with `--quick` the smallest and the largest that moves no
    /// more than 16 MiB.
    fn counts_of(&self, block_bytes: u32) -> Vec<u32> {
        const QUICK_BYTES_MAX: u64 = 16 << 20;
        let mut counts = self.args.counts.clone();
        if self.args.quick {
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

    /// Bytes of each process's memory.
    pub(super) fn bytes(&self) -> usize {
        match &self.model {
            None => self.args.arena_mib << 20,
            Some(model) => model.layout.pool_bytes(self.pool_blocks(model)),
        }
    }

    /// Blocks of a pool in which all requests in flight lie scattered, with a quarter to spare.
    fn pool_blocks(&self, model: &Model) -> u32 {
        let shares = self.topology.initiators.max(self.topology.targets);
        let lots = shares * self.args.threads * self.args.depth;
        let lots = u32::try_from(lots).unwrap_or(u32::MAX);
        let each = model.blocks().saturating_add(model.blocks().div_ceil(4));
        each.saturating_mul(lots)
    }

    /// The first device that takes part.
    pub(super) fn device(&self) -> Option<u32> {
        let args = &self.args;
        args.from.device().or_else(|| args.to.device())
    }

    /// Multiprocessors to measure with; none is the agent's default.
    pub(super) fn budgets(&self) -> Vec<Option<u32>> {
        match &self.args.sms[..] {
            [] => vec![None],
            some => some.iter().copied().map(Some).collect(),
        }
    }

    pub(super) fn places(&self, lane: LaneName) -> Places {
        Places {
            lane,
            from: vec![self.args.from.clone()],
            to: vec![self.args.to.clone()],
            bytes: self.bytes(),
            settings: self.settings.clone(),
        }
    }

    pub(super) fn rounds(&self) -> Rounds {
        match self.args.iterations {
            Some(rounds) => Rounds::Exactly(rounds),
            None => Rounds::Within(self.args.case_ms * 1000),
        }
    }

    pub(super) const fn budget(&self) -> Duration {
        Duration::from_millis(self.args.case_ms)
    }

    pub(super) const fn idle(&self) -> Duration {
        Duration::from_secs(match self.args.idle_seconds {
            Some(seconds) => seconds,
            None => 10,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_double_up_to_their_end() {
        assert_eq!(doublings(4, 40).collect::<Vec<_>>(), [4, 8, 16, 32]);
        assert_eq!(doublings(1, 1).collect::<Vec<_>>(), [1]);
        let top = doublings(1 << 30, u32::MAX).collect::<Vec<_>>();
        assert_eq!(top, [1 << 30, 1 << 31]);
    }

    #[test]
    fn files_are_measured_with_what_the_options_say() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: TransferArgs,
        }
        let cases = |options: &[&str]| {
            let line = ["bench"].iter().chain(options);
            <Line as clap::Parser>::try_parse_from(line)
                .unwrap()
                .args
                .file_cases()
        };
        assert_eq!(cases(&[]), [(4096, 64), (65536, 64), (1 << 20, 16)]);
        assert_eq!(
            cases(&["--block-bytes", "64k,2m"]),
            [(65536, 64), (2 << 20, 16)]
        );
        let both = ["--block-bytes", "8k,1m", "--counts", "3,32"];
        let all = [(8192, 3), (8192, 32), (1 << 20, 3), (1 << 20, 32)];
        assert_eq!(cases(&both), all);
    }
}
