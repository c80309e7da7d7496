//! `blockplane kvbm advise`.

mod estimate;
mod sweep;

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use blockplane_kvbm::{AdmissionKind, WriteBudgetConfig};
pub use estimate::Speeds;
use serde_json::{Value, json};
use sweep::sweep;

use super::{
    Outcome, Simulation, Trace, TrafficArgs,
    args::blocks_of,
    outcome::{real, rounded},
};
use crate::report::{Chart, Panel, Report, Series, Table};

/// Options of `blockplane kvbm advise`.
#[derive(Clone, Debug, clap::Args)]
pub struct AdviseArgs {
    #[command(flatten)]
    traffic: TrafficArgs,
    /// Memory of the GPUs that holds KV blocks (G1), in GB (1e9 bytes) over all ranks.
    #[arg(long)]
    gpu_gb: f64,
    /// Host memory that may be used (G2).
    #[arg(long)]
    cpu_gb: f64,
    /// Disk that may be used (G3).
    #[arg(long)]
    disk_gb: f64,
    /// Size of the drive that the disk space is on, for its wear; --disk-gb if not given.
    #[arg(long)]
    drive_gb: Option<f64>,
    /// Whole writes of the drive that it endures in a day. The advice keeps to it; without it, it
    /// keeps --keep-percent.
    #[arg(long)]
    drive_writes_per_day: Option<f64>,
    /// Share of the hits of the best policy that is good enough: of those that reach it the one with
    /// the fewest writes is taken.
    #[arg(long, default_value_t = 80.0)]
    keep_percent: f64,
    #[command(flatten)]
    speeds: Speeds,
    /// Also draws the plot into this file (.svg or .png).
    #[arg(long)]
    plot: Option<PathBuf>,
    /// One line of JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// The admission policies that are tried.
const POLICIES: [&str; 14] = [
    "tail-1024",
    "tail-2048",
    "tail-4096",
    "tail-6144",
    "tail-8192",
    "tail-12288",
    "tail-16384",
    "tail-32768",
    "frequency",
    "frequency+hits",
    "seen-2",
    "seen-3",
    "on-evict",
    "all",
];
/// The policies that are drawn beside the one that is advised.
const BESIDE: [AdmissionKind; 2] = [AdmissionKind::Frequency, AdmissionKind::All];
/// Sizes that are tried, as parts of what may be used.
const PARTS: [f64; 7] = [0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0];

/// What an advice follows from.
struct Study<'a> {
    args: &'a AdviseArgs,
    trace: Trace,
    block_bytes: u64,
    drive_bytes: u64,
    /// All tiers as large as they may be.
    full: Simulation,
}

/// One policy, and what comes of it.
struct Tried {
    policy: AdmissionKind,
    outcome: Outcome,
}

/// Tries sizes and policies on a trace and prints the settings to take, and why.
///
/// # Errors
/// When the trace or the model cannot be read, or a size makes no sense.
pub fn advise(args: &AdviseArgs) -> anyhow::Result<()> {
    let study = Study::new(args)?;
    let policies = study.policies()?;
    let best = study.choose(&policies)?;
    let steps = study.steps(best.policy)?;
    let chart = study.chart(best.policy)?;
    if let Some(path) = &args.plot {
        draw(&chart, path)?;
    }
    if args.json {
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, &study.json(&policies, best, &steps))?;
        writeln!(out)?;
        return Ok(());
    }
    let mut report = Report::stdout(false);
    for line in study.advice(best, &steps) {
        report.note(&line)?;
    }
    report.note("\nAdmission to G3 at these sizes:")?;
    report.table(&study.table(&policies, best.policy))?;
    report.note(&format!("\n{}", chart.text()))?;
    Ok(())
}

impl<'a> Study<'a> {
    fn new(args: &'a AdviseArgs) -> anyhow::Result<Self> {
        args.speeds.check()?;
        ensure!(
            (0.0..=100.0).contains(&args.keep_percent),
            "--keep-percent {}; accepted: 0 to 100",
            args.keep_percent
        );
        let trace = args.traffic.read()?;
        let block_bytes = args.traffic.block_bytes(trace.block_tokens())?;
        let block_bytes = block_bytes.context("how large is a block? Give --model-config")?;
        let size = |gb, flag: &str| blocks_of(gb, block_bytes).with_context(|| flag.to_owned());
        let g1 = size(args.gpu_gb, "--gpu-gb")?;
        ensure!(g1 > 0, "--gpu-gb {} is less than one block", args.gpu_gb);
        let (g2, g3) = (
            size(args.cpu_gb, "--cpu-gb")?,
            size(args.disk_gb, "--disk-gb")?,
        );
        ensure!(
            g2 > 0 || g3 > 0,
            "neither --cpu-gb nor --disk-gb has room for one block of {block_bytes} bytes"
        );
        let drive_blocks = size(args.drive_gb.unwrap_or(args.disk_gb), "--drive-gb")?;
        let drive_bytes = u64::from(drive_blocks) * block_bytes;
        let mut full = Simulation::new(g1, g2, g3);
        full.block_bytes = block_bytes;
        full.budget = WriteBudgetConfig {
            drive_writes_per_day: args.drive_writes_per_day,
            drive_bytes,
            ..WriteBudgetConfig::default()
        };
        Ok(Self {
            args,
            trace,
            block_bytes,
            drive_bytes,
            full,
        })
    }

    fn sized(&self, policy: AdmissionKind, cpu: f64, disk: f64) -> Simulation {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a few times a number of blocks; saturates"
        )]
        let part = |blocks: u32, part: f64| (f64::from(blocks) * part) as u32;
        Simulation {
            admission: policy,
            g2_blocks: part(self.full.g2_blocks, cpu),
            g3_blocks: part(self.full.g3_blocks, disk),
            ..self.full.clone()
        }
    }

    fn policies(&self) -> anyhow::Result<Vec<Tried>> {
        let kinds: Vec<AdmissionKind> = if self.full.g3_blocks == 0 {
            vec![AdmissionKind::None]
        } else {
            POLICIES
                .iter()
                .map(|name| name.parse())
                .collect::<Result<_, _>>()?
        };
        let simulations: Vec<_> = kinds
            .iter()
            .map(|kind| self.sized(*kind, 1.0, 1.0))
            .collect();
        let outcomes = sweep(&self.trace, &simulations)?;
        let tried = kinds.into_iter().zip(outcomes);
        Ok(tried
            .map(|(policy, outcome)| Tried { policy, outcome })
            .collect())
    }

    /// With a budget the most hits; otherwise the fewest writes of those with enough hits.
    fn choose<'t>(&self, tried: &'t [Tried]) -> anyhow::Result<&'t Tried> {
        let hits = |tried: &&Tried| tried.outcome.hit_blocks();
        let best = tried
            .iter()
            .max_by_key(hits)
            .context("no policy was tried")?;
        if self.args.drive_writes_per_day.is_some() {
            return Ok(best);
        }
        let enough = real(hits(&best)) * self.args.keep_percent / 100.0;
        let good = tried.iter().filter(|tried| real(hits(tried)) >= enough);
        Ok(good
            .min_by_key(|tried| tried.outcome.disk_writes())
            .unwrap_or(best))
    }

    /// G1 alone, with G2, and with all tiers under KVBM's filter and the advised policy.
    fn steps(&self, policy: AdmissionKind) -> anyhow::Result<Vec<(&'static str, Outcome)>> {
        let mut names = vec!["G1 alone"];
        let mut simulations = vec![self.sized(policy, 0.0, 0.0)];
        if self.full.g2_blocks > 0 {
            names.push("and G2");
            simulations.push(self.sized(policy, 1.0, 0.0));
        }
        if self.full.g3_blocks > 0 {
            names.push("and G3, KVBM's filter");
            simulations.push(self.sized(AdmissionKind::Frequency, 1.0, 1.0));
            names.push("and G3, as advised");
            simulations.push(self.sized(policy, 1.0, 1.0));
        }
        let outcomes = sweep(&self.trace, &simulations)?;
        Ok(names.into_iter().zip(outcomes).collect())
    }

    fn dwpd(&self, outcome: &Outcome) -> f64 {
        outcome.drive_writes_per_day(self.block_bytes, self.drive_bytes)
    }

    fn ttft_ms(&self, outcome: &Outcome) -> f64 {
        self.args
            .speeds
            .ttft_ms(&self.trace, outcome, self.block_bytes)
    }

    /// The settings, one a line, and the figures behind them.
    fn advice(&self, best: &Tried, steps: &[(&str, Outcome)]) -> Vec<String> {
        let mut lines: Vec<String> = self.settings(best.policy);
        lines.push(String::new());
        let mut table = Table::new(&["", "hits %", "TTFT ms", "G3 writes", "drive writes/day"]);
        for (name, outcome) in steps {
            table.row(vec![
                (*name).to_owned(),
                format!("{:.1}", outcome.hit_percent()),
                format!("{:.0}", self.ttft_ms(outcome)),
                outcome.disk_writes().to_string(),
                format!("{:.2}", self.dwpd(outcome)),
            ]);
        }
        lines.push(table.to_string().trim_end().to_owned());
        let Speeds {
            prefill_tokens_per_s,
            cpu_gb_per_s,
            disk_gb_per_s,
        } = self.args.speeds;
        lines.push(format!(
            "TTFT is the mean of an idle worker that prefills {prefill_tokens_per_s} tokens/s and \
             reads G2 at {cpu_gb_per_s} and G3 at {disk_gb_per_s} GB/s; queues come on top."
        ));
        lines.push(match self.args.drive_writes_per_day {
            Some(limit) => format!("Every policy keeps to {limit} drive writes a day; the one with the most hits is advised."),
            None => format!(
                "Of the policies with {} % of the most hits the one with the fewest writes is advised.",
                self.args.keep_percent
            ),
        });
        lines
    }

    fn settings(&self, policy: AdmissionKind) -> Vec<String> {
        let mut lines = Vec::new();
        if self.full.g2_blocks > 0 {
            lines.push(format!("DYN_KVBM_CPU_CACHE_GB={}", self.args.cpu_gb));
        }
        if self.full.g3_blocks > 0 {
            lines.push(format!("DYN_KVBM_DISK_CACHE_GB={}", self.args.disk_gb));
            lines.push(format!("DYN_KVBM_G3_ADMISSION={policy}"));
        }
        if let Some(limit) = self.args.drive_writes_per_day {
            lines.push(format!("DYN_KVBM_DISK_DWPD={limit}"));
            if let Some(gb) = self.args.drive_gb {
                lines.push(format!("DYN_KVBM_DISK_DRIVE_GB={gb}"));
            }
        }
        lines
    }

    fn table(&self, tried: &[Tried], chosen: AdmissionKind) -> Table {
        let mut table = Table::new(&[
            "policy",
            "hits %",
            "G1 %",
            "G2 %",
            "G3 %",
            "TTFT ms",
            "G3 writes",
            "drive writes/day",
            "",
        ]);
        for Tried { policy, outcome } in tried {
            let share = |blocks| format!("{:.1}", outcome.percent(blocks));
            let mark = if *policy == chosen { "<- advised" } else { "" };
            table.row(vec![
                policy.to_string(),
                format!("{:.1}", outcome.hit_percent()),
                share(outcome.hits.device),
                share(outcome.hits.host),
                share(outcome.hits.disk),
                format!("{:.0}", self.ttft_ms(outcome)),
                outcome.disk_writes().to_string(),
                format!("{:.2}", self.dwpd(outcome)),
                mark.to_owned(),
            ]);
        }
        table
    }

    /// Hits against the size of G3, and against that of G2.
    fn chart(&self, policy: AdmissionKind) -> anyhow::Result<Chart> {
        let mut panels = Vec::new();
        if self.full.g3_blocks > 0 {
            let mut kinds = vec![policy];
            kinds.extend(BESIDE.into_iter().filter(|kind| *kind != policy));
            let lines = kinds.iter().map(|kind| (kind.to_string(), *kind, true));
            panels.push(self.panel("G3", lines.collect(), |simulation| simulation.g3_blocks)?);
        }
        if self.full.g2_blocks > 0 {
            let mut lines = vec![("no G3".to_owned(), policy, false)];
            if self.full.g3_blocks > 0 {
                lines.push((policy.to_string(), policy, true));
            }
            panels.push(self.panel("G2", lines, |simulation| simulation.g2_blocks)?);
        }
        Ok(Chart {
            title: "Blocks found in the cache, by its size".to_owned(),
            x_label: "bytes".to_owned(),
            y_label: "%".to_owned(),
            y_percent: true,
            panels,
        })
    }

    fn panel(
        &self,
        tier: &str,
        lines: Vec<(String, AdmissionKind, bool)>,
        size: fn(&Simulation) -> u32,
    ) -> anyhow::Result<Panel> {
        let sized = |(_, kind, disk): &(String, AdmissionKind, bool)| {
            let (kind, whole) = (*kind, if *disk { 1.0 } else { 0.0 });
            PARTS.map(|part| match tier {
                "G3" => self.sized(kind, 1.0, part),
                _ => self.sized(kind, part, whole),
            })
        };
        let simulations: Vec<Simulation> = lines.iter().flat_map(sized).collect();
        let outcomes = sweep(&self.trace, &simulations)?;
        let points: Vec<(f64, f64)> = simulations
            .iter()
            .zip(&outcomes)
            .map(|(simulation, outcome)| {
                let bytes = u64::from(size(simulation)) * self.block_bytes;
                (real(bytes), outcome.hit_percent())
            })
            .collect();
        let lines = lines.into_iter().zip(points.chunks(PARTS.len()));
        Ok(Panel {
            title: format!("size of {tier}"),
            series: lines
                .map(|((label, ..), points)| Series {
                    label,
                    bound: false,
                    points: points.iter().copied().filter(|(x, _)| *x > 0.0).collect(),
                })
                .collect(),
        })
    }

    fn json(&self, tried: &[Tried], best: &Tried, steps: &[(&str, Outcome)]) -> Value {
        let figures = |outcome: &Outcome| {
            let mut figures = outcome.figures();
            figures.insert("ttft_ms".to_owned(), json!(rounded(self.ttft_ms(outcome))));
            let dwpd = json!(rounded(self.dwpd(outcome)));
            figures.insert("drive_writes_per_day".to_owned(), dwpd);
            figures
        };
        let named = |name: String, outcome: &Outcome| {
            let mut figures = figures(outcome);
            figures.insert("name".to_owned(), json!(name));
            figures
        };
        let policies = tried
            .iter()
            .map(|t| named(t.policy.to_string(), &t.outcome));
        let steps = steps
            .iter()
            .map(|(name, outcome)| named((*name).to_owned(), outcome));
        json!({
            "settings": self.settings(best.policy),
            "admission": best.policy.to_string(),
            "hit_percent": rounded(best.outcome.hit_percent()),
            "g3_writes": best.outcome.disk_writes(),
            "block_bytes": self.block_bytes,
            "policies": policies.collect::<Vec<_>>(),
            "steps": steps.collect::<Vec<_>>(),
        })
    }
}

fn draw(chart: &Chart, path: &Path) -> anyhow::Result<()> {
    let bytes = match path.extension().and_then(|extension| extension.to_str()) {
        Some("svg") => chart.svg().into_bytes(),
        Some("png") => chart.png()?,
        _ => bail!("--plot {}: accepted are .svg and .png", path.display()),
    };
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
