//! `blockplane bench gpu`: everything that the GPUs of a node do for block transfers, checked and
//! timed in one go.
//!
//! This process only leads: the agents live in processes of their own, so that a device that hangs
//! or fails costs one row, and the next row begins with fresh processes. Every row has a time limit,
//! and the whole has one.

mod more;
mod rows;
mod sheet;
mod stage;

use std::{fs::OpenOptions, io::Write, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use blockplane_transfer::{CudaReport, KernelConfig, probe_cuda};

use self::{
    rows::{Product, Session},
    sheet::Sheet,
    stage::{Ground, Stage},
};
use super::link::{DeviceSettings, Settings, Sharing};
use crate::report::Report;

/// What belongs together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Group {
    /// Scattered blocks from one GPU to another, between two processes.
    Bandwidth,
    /// The KV of one request, from post to the notification in the other process.
    Tokens,
    /// Scattered blocks between a GPU and pinned host memory.
    Host,
    /// Single small transfers.
    Latency,
    /// Scattered blocks inside one GPU.
    Same,
    /// Copies that change the order of heads and tokens on the way.
    Rearrange,
    /// Transfers beside a matrix product.
    Beside,
    /// Allocating and registering device memory, pinning host memory.
    Setup,
    /// All GPUs to all others (three or more).
    All,
}

impl Group {
    const ALL: [Self; 9] = [
        Self::Bandwidth,
        Self::Tokens,
        Self::Host,
        Self::Latency,
        Self::Same,
        Self::Rearrange,
        Self::Beside,
        Self::Setup,
        Self::All,
    ];
}

/// Options of `blockplane bench gpu`.
#[derive(Clone, Debug, clap::Args)]
pub struct GpuArgs {
    /// Fewer sizes and shorter rows; under a minute.
    #[arg(long)]
    pub quick: bool,
    /// Rows to take [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub rows: Vec<Group>,
    /// Devices to use, by their numbers [default: all].
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub devices: Vec<u32>,
    /// How processes get at each other's device memory.
    #[arg(long, value_enum, default_value = "file-descriptor")]
    pub sharing: Sharing,
    /// How long a thread that waits for a transfer looks for its end without sleeping, up to 10000
    /// [default: the agent's].
    #[arg(long, value_name = "MICROSECONDS")]
    pub spin_us: Option<u64>,
    /// Seed of block places and contents.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Bound on one row; a row that takes longer has failed, and its processes are ended.
    #[arg(long, default_value_t = 40, value_name = "SECONDS")]
    pub row_seconds: u64,
    /// Bound on everything; rows that have not begun by then have failed [default: 300; with
    /// --quick 90].
    #[arg(long, value_name = "SECONDS")]
    pub total_seconds: Option<u64>,
    /// Rows and columns of the matrices of the product that runs beside transfers.
    #[arg(long, default_value_t = 8192, value_name = "N")]
    pub product_size: u32,
    /// Folder of cuBLASLt [default: the loader's path, toolkits and Python packages].
    #[arg(long, value_name = "FOLDER")]
    pub cublas: Option<PathBuf>,
    /// One JSON object a line instead of tables.
    #[arg(long)]
    pub json: bool,
    /// Also add one JSON object a line to this file, as soon as each is known.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Small host memory in place of every device: tries the benchmark itself, without a GPU.
    #[arg(long, hide = true)]
    pub rehearse: bool,
}

/// Runs it. `kernels` says where kernels are compiled and kept.
///
/// # Errors
/// There is no usable GPU, an option makes no sense, or a row failed; every other row ran all the
/// same.
pub fn qualify(args: &GpuArgs, kernels: &KernelConfig) -> anyhow::Result<()> {
    for (option, value) in [
        ("--row-seconds", args.row_seconds),
        ("--total-seconds", args.total_seconds.unwrap_or(1)),
    ] {
        ensure!(
            (1..=3600).contains(&value),
            "{option} is {value}; accepted: 1 to 3600"
        );
    }
    let mut report = Report::stdout(args.json);
    let ground = if args.rehearse {
        report.note("a rehearsal with host memory: no figure of a GPU")?;
        Ground::host()
    } else {
        let found = probe_cuda()?;
        describe(&found, &mut report)?;
        Ground::of(&found, &args.devices)?
    };
    let file = match &args.out {
        None => None,
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let file = file.with_context(|| format!("cannot write {}", path.display()))?;
            Some(Report::new(file, true))
        }
    };
    let settings = Settings {
        device: DeviceSettings {
            sharing: args.sharing,
            spin_us: args.spin_us,
            ..DeviceSettings::default()
        },
        ..Settings::default()
    };
    let total = match (args.total_seconds, args.quick) {
        (Some(seconds), _) => seconds,
        (None, true) => 90,
        (None, false) => 300,
    };
    let row = Duration::from_secs(args.row_seconds);
    let sheet = Sheet::new(report, file, Duration::from_secs(total), row)?;
    let stage = Stage::new(settings, kernels.clone(), args.seed);
    let quick = args.quick || args.rehearse;
    let product = Product {
        size: args.product_size,
        library: args.cublas.clone(),
    };
    let mut session = Session::new(ground, quick, product, sheet, stage);
    let groups: &[Group] = match &args.rows[..] {
        [] => &Group::ALL,
        some => some,
    };
    for &group in groups {
        session.group(group)?;
    }
    session.finish()
}

fn describe<W: Write>(found: &CudaReport, report: &mut Report<W>) -> anyhow::Result<()> {
    report.note(&format!(
        "CUDA {}.{}, {} device(s)",
        found.driver_version / 1000,
        found.driver_version % 1000 / 10,
        found.devices.len()
    ))?;
    for device in &found.devices {
        report.note(&format!(
            "cuda:{} {}, sm_{}{}, {} SMs, {} GiB, {}, NUMA node {}, reaches {:?}",
            device.ordinal,
            device.name,
            device.capability.0,
            device.capability.1,
            device.multiprocessors,
            device.memory_bytes >> 30,
            device.pci,
            device
                .numa_node
                .map_or_else(|| "unknown".to_owned(), |node| node.to_string()),
            device.peers,
        ))?;
    }
    Ok(())
}
