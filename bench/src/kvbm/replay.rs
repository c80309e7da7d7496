//! `blockplane kvbm replay`.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use anyhow::{Context, ensure};
use blockplane_kvbm::{AdmissionKind, EvictionKind, WriteBudgetConfig};
use serde_json::{Map, Value, json};

use super::{
    args::{TrafficArgs, blocks},
    links::LinkSpeeds,
    outcome::{Outcome, real, rounded},
    simulate::{Simulation, simulate},
    stored::{StoredConfig, StoredOutcome, simulate_stored},
    trace::Trace,
};
use crate::report::{Report, Table};

/// Options of `blockplane kvbm replay`.
#[derive(Clone, Debug, clap::Args)]
pub struct ReplayArgs {
    #[command(flatten)]
    traffic: TrafficArgs,
    /// Blocks of G1, the memory that the engine computes on.
    #[arg(long)]
    g1_blocks: Option<u32>,
    /// The same in GB (1e9 bytes, over all ranks).
    #[arg(long)]
    g1_gb: Option<f64>,
    /// Blocks of G2, host memory. Without it and its GB there is no G2.
    #[arg(long)]
    g2_blocks: Option<u32>,
    /// The same in GB.
    #[arg(long)]
    g2_gb: Option<f64>,
    /// Blocks of G3, disk. Without it and its GB there is no G3.
    #[arg(long)]
    g3_blocks: Option<u32>,
    /// The same in GB.
    #[arg(long)]
    g3_gb: Option<f64>,
    /// Bytes of a block over all ranks, where there is no --model-config.
    #[arg(long, conflicts_with = "model_config", value_parser = clap::value_parser!(u64).range(1..))]
    block_bytes: Option<u64>,
    /// What is written to G3: tail-N (requests with at most N new tokens), frequency (KVBM's
    /// filter), frequency+hits, seen-K (as in seen-2), on-evict, all, none.
    #[arg(long, default_value_t)]
    admission: AdmissionKind,
    /// Which block of G1 is overwritten first: lru, multi-lru, s3-fifo, lineage.
    #[arg(long, default_value_t)]
    g1_eviction: EvictionKind,
    /// The same for G2.
    #[arg(long, default_value_t)]
    g2_eviction: EvictionKind,
    /// The same for G3.
    #[arg(long, default_value_t)]
    g3_eviction: EvictionKind,
    /// Most bytes written to G3 in a second.
    #[arg(long)]
    write_bytes_per_s: Option<u64>,
    /// Most whole writes of the drive in a day.
    #[arg(long)]
    drive_writes_per_day: Option<f64>,
    /// Size of the drive in GB, for wear; that of G3 if not given.
    #[arg(long)]
    drive_gb: Option<f64>,
    /// Keep blocks that are read from G3 in G2.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    promote: bool,
    /// Virtual bandwidth between G1 and G2; without it copies take no time.
    #[arg(long)]
    g2_gb_per_s: Option<f64>,
    /// Virtual bandwidth between G2 and G3; without it copies take no time.
    #[arg(long)]
    g3_gb_per_s: Option<f64>,
    /// Follow the conventions of another program: `kvbm` is no promotion and copies that take no
    /// time.
    #[arg(long)]
    compat: Option<Compat>,
    /// Move real bytes: memory for G1 and G2, a store in this folder for G3; every block that is
    /// loaded is compared with what was computed. What an earlier replay left there is found again.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["g2_gb_per_s", "g3_gb_per_s"])]
    store: Option<PathBuf>,
    /// Bytes of a block with --store, a multiple of 4096: smaller than those of the model, so that
    /// memory and disk suffice.
    #[arg(long, default_value_t = 65_536, requires = "store")]
    store_block_bytes: u32,
    /// One line of JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Conventions of other programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Compat {
    /// NVIDIA's block manager 1.6.1.
    Kvbm,
}

impl ReplayArgs {
    fn simulation(&self, trace: &Trace) -> anyhow::Result<(Simulation, Option<u64>)> {
        let model = self.traffic.block_bytes(trace.block_tokens())?;
        let block_bytes = self.block_bytes.or(model);
        let size = |tier, count, gb| blocks(tier, count, gb, block_bytes);
        let g1_blocks = size("g1", self.g1_blocks, self.g1_gb)?;
        ensure!(
            g1_blocks > 0,
            "how large is G1? Give --g1-blocks or --g1-gb"
        );
        let mut simulation = Simulation {
            evictions: [self.g1_eviction, self.g2_eviction, self.g3_eviction],
            admission: self.admission,
            promote: self.promote,
            ..Simulation::new(
                g1_blocks,
                size("g2", self.g2_blocks, self.g2_gb)?,
                size("g3", self.g3_blocks, self.g3_gb)?,
            )
        };
        let bytes = |speed: Option<f64>, flag: &str| -> anyhow::Result<Option<f64>> {
            let Some(speed) = speed else { return Ok(None) };
            ensure!(speed > 0.0 && speed.is_finite(), "{flag} {speed}: above 0");
            ensure!(
                block_bytes.is_some(),
                "{flag} needs to know the bytes of a block: --model-config or --block-bytes"
            );
            Ok(Some(speed * 1e9))
        };
        simulation.speeds = LinkSpeeds {
            host_bytes_per_s: bytes(self.g2_gb_per_s, "--g2-gb-per-s")?,
            disk_bytes_per_s: bytes(self.g3_gb_per_s, "--g3-gb-per-s")?,
        };
        let limited = self.write_bytes_per_s.is_some() || self.drive_writes_per_day.is_some();
        ensure!(
            !limited || block_bytes.is_some(),
            "a write budget needs to know the bytes of a block: --model-config or --block-bytes"
        );
        simulation.block_bytes = block_bytes.unwrap_or(1);
        simulation.budget = WriteBudgetConfig {
            bytes_per_s: self.write_bytes_per_s,
            drive_writes_per_day: self.drive_writes_per_day,
            drive_bytes: self.drive_bytes(&simulation),
        };
        if self.compat == Some(Compat::Kvbm) {
            simulation.promote = false;
            simulation.plain = true;
            simulation.speeds = LinkSpeeds::default();
        }
        Ok((simulation, block_bytes))
    }

    fn drive_bytes(&self, simulation: &Simulation) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "saturates"
        )]
        self.drive_gb.map_or_else(
            || u64::from(simulation.g3_blocks) * simulation.block_bytes,
            |gb| (gb * 1e9) as u64,
        )
    }
}

/// Plays a trace against the manager and prints what comes of it.
///
/// # Errors
/// When the trace cannot be read, the options make no sense, or a prompt does not fit into G1.
pub fn replay(args: &ReplayArgs) -> anyhow::Result<()> {
    let trace = args.traffic.read()?;
    let (simulation, block_bytes) = args.simulation(&trace)?;
    let mut stored = None;
    let outcome = match &args.store {
        None => simulate(&trace, &simulation).context("replay")?,
        Some(folder) => {
            let config = StoredConfig {
                folder: folder.clone(),
                block_bytes: args.store_block_bytes,
            };
            let (outcome, bytes) =
                simulate_stored(&trace, &simulation, &config).context("replay with a store")?;
            stored = Some(bytes);
            outcome
        }
    };
    let mut figures = figures(&outcome, &simulation, block_bytes);
    if let Some(stored) = &stored {
        figures.extend(stored_figures(stored));
    }
    if args.json {
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, &figures)?;
        writeln!(out)?;
        return Ok(());
    }
    let mut report = Report::stdout(false);
    report.note(&format!(
        "{} requests over {:.0} s, {} tokens; {} blocks of {} tokens asked for, {} different",
        outcome.requests,
        trace.span().as_secs_f64(),
        trace.tokens(),
        trace.block_refs(),
        trace.block_tokens(),
        trace.distinct(),
    ))?;
    report.table(&tier_table(&outcome, &simulation))?;
    report.note("")?;
    report.table(&figure_table(&figures))?;
    Ok(())
}

/// Where blocks were found, tier by tier.
fn tier_table(outcome: &Outcome, simulation: &Simulation) -> Table {
    let mut table = Table::new(&[
        "tier",
        "blocks",
        "hits",
        "% of asked",
        "writes",
        "evictions",
    ]);
    let computed = outcome.block_refs as u64 - outcome.hit_blocks();
    let mut row =
        |tier: &str, blocks: Option<u32>, hits: u64, writes: u64, evictions: Option<u64>| {
            let show = |count: Option<String>| count.unwrap_or_default();
            table.row(vec![
                tier.to_owned(),
                show(blocks.map(|blocks| blocks.to_string())),
                hits.to_string(),
                format!("{:.2}", outcome.percent(hits)),
                writes.to_string(),
                show(evictions.map(|evictions| evictions.to_string())),
            ]);
        };
    let loaded = outcome.hits.host + outcome.hits.disk;
    row(
        "G1",
        Some(simulation.g1_blocks),
        outcome.hits.device,
        computed + loaded,
        None,
    );
    let evictions = outcome.host_evictions();
    row(
        "G2",
        Some(simulation.g2_blocks),
        outcome.hits.host,
        outcome.host_writes(),
        Some(evictions),
    );
    let evictions = outcome.disk_evictions();
    row(
        "G3",
        Some(simulation.g3_blocks),
        outcome.hits.disk,
        outcome.disk_writes(),
        Some(evictions),
    );
    row(
        "all",
        None,
        outcome.hit_blocks(),
        outcome.disk_writes() + outcome.host_writes(),
        None,
    );
    table
}

/// All figures, with those that follow from the bytes of a block.
fn figures(
    outcome: &Outcome,
    simulation: &Simulation,
    block_bytes: Option<u64>,
) -> Map<String, Value> {
    let mut figures = outcome.figures();
    let mut put = |name: &str, value: Value| figures.insert(name.to_owned(), value);
    put("g1_blocks", json!(simulation.g1_blocks));
    put("g2_blocks", json!(simulation.g2_blocks));
    put("g3_blocks", json!(simulation.g3_blocks));
    put("admission", json!(simulation.admission.to_string()));
    put("block_bytes", json!(block_bytes));
    let drive = simulation.budget.drive_bytes;
    let per_day = outcome.drive_writes_per_day(simulation.block_bytes, drive);
    let written = outcome.disk_writes() * simulation.block_bytes;
    put("ssd_bytes_written", json!(block_bytes.map(|_| written)));
    put(
        "drive_writes",
        json!((drive > 0).then(|| rounded(real(written) / real(drive)))),
    );
    put(
        "drive_writes_per_day",
        json!((drive > 0).then(|| rounded(per_day))),
    );
    figures
}

/// What a replay with bytes adds.
fn stored_figures(stored: &StoredOutcome) -> [(String, Value); 5] {
    let seconds = stored.moving.as_secs_f64().max(f64::MIN_POSITIVE);
    [
        ("store_blocks_compared", json!(stored.blocks_compared)),
        ("store_blocks_recovered", json!(stored.blocks_recovered)),
        ("store_bytes_written", json!(stored.bytes_written)),
        (
            "store_moved_gb_per_s",
            json!(rounded(real(stored.moved_bytes) / seconds / 1e9)),
        ),
        ("store_seconds", json!(rounded(stored.took.as_secs_f64()))),
    ]
    .map(|(name, value)| (name.to_owned(), value))
}

/// What is not in the first table.
fn figure_table(figures: &Map<String, Value>) -> Table {
    let mut table = Table::new(&["", ""]);
    for name in [
        "ssd_bytes_written",
        "drive_writes",
        "drive_writes_per_day",
        "failed_loads",
        "dropped",
        "offload_queue_blocks_max",
        "g3_write_queue_blocks_max",
        "g3_read_queue_blocks_max",
        "onboards_max",
        "waiting_requests_max",
        "requests_per_s",
        "store_blocks_compared",
        "store_blocks_recovered",
        "store_bytes_written",
        "store_moved_gb_per_s",
        "store_seconds",
    ] {
        let value = figures.get(name).filter(|value| !value.is_null());
        let shown = match value {
            None => continue,
            Some(Value::Object(parts)) if parts.is_empty() => "none".to_owned(),
            Some(Value::Object(parts)) => {
                let parts: Vec<String> = parts.iter().map(|(k, v)| format!("{k} {v}")).collect();
                parts.join(", ")
            }
            Some(value) => value.to_string(),
        };
        table.row(vec![name.replace('_', " "), shown]);
    }
    table
}
