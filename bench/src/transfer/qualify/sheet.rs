//! The results: rows as they come, tables, failures, and the watch over the time.

use std::{
    fs::File,
    io::{self, Stdout, Write},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;
use serde_json::{Map, Value, json};

use crate::report::{Record, Report, Table};

/// Name in every record.
const BENCH: &str = "gpu";
/// Exit status when a row neither ends nor can be ended.
const HANGS: i32 = 3;

/// What a figure ought to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    const fn value(self) -> f64 {
        match self {
            Self::AtLeast(value) | Self::AtMost(value) => value,
        }
    }

    fn met(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(value) => figure >= value,
            Self::AtMost(value) => figure <= value,
        }
    }

    fn show(self) -> String {
        match self {
            Self::AtLeast(value) => format!(">= {value}"),
            Self::AtMost(value) => format!("<= {value}"),
        }
    }
}

/// One figure of a row.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    pub(super) record: Record,
    pub(super) goal: Option<Goal>,
}

/// What one row is about: its name for people, and its case in the records.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) name: String,
    pub(super) case: Map<String, Value>,
}

impl Work {
    /// A figure of this row.
    pub(super) fn figure(
        &self,
        metric: &'static str,
        unit: &'static str,
        value: f64,
        n: u64,
    ) -> Figure {
        Figure {
            record: Record::new(BENCH, self.case.clone(), metric, unit, value, n),
            goal: None,
        }
    }

    /// A figure with the percentiles of its samples.
    pub(super) fn samples(
        &self,
        metric: &'static str,
        unit: &'static str,
        samples: &crate::report::Samples,
    ) -> Figure {
        Figure {
            record: Record::of_samples(BENCH, self.case.clone(), metric, unit, samples),
            goal: None,
        }
    }
}

impl Figure {
    pub(super) fn goal(mut self, goal: Option<Goal>) -> Self {
        self.goal = goal;
        self.record.goal = goal.map(Goal::value);
        self
    }

    pub(super) fn limit(mut self, limit: Option<f64>) -> Self {
        self.record = self.record.limit(limit);
        self
    }
}

/// Where results go.
pub(super) struct Sheet {
    report: Report<Stdout>,
    file: Option<Report<File>>,
    table: Table,
    rows: usize,
    missed: usize,
    failed: Vec<String>,
    started: Instant,
    end: Instant,
    row_limit: Duration,
    watch: Watch,
}

impl Sheet {
    pub(super) fn new(
        report: Report<Stdout>,
        file: Option<Report<File>>,
        total: Duration,
        row_limit: Duration,
    ) -> io::Result<Self> {
        let started = Instant::now();
        Ok(Self {
            report,
            file,
            table: titles(),
            rows: 0,
            missed: 0,
            failed: Vec::new(),
            started,
            end: started + total,
            row_limit,
            watch: Watch::start()?,
        })
    }

    /// Runs one row; returns whether it went well. Its figures, or why it has none, go to the table
    /// and the records.
    pub(super) fn row(
        &mut self,
        work: &Work,
        run: impl FnOnce(Instant) -> anyhow::Result<Vec<Figure>>,
    ) -> io::Result<bool> {
        let now = Instant::now();
        if now >= self.end {
            let total = self.end - self.started;
            self.fail(
                work,
                &format!("not begun: the {total:?} of the whole are over"),
            )?;
            return Ok(false);
        }
        writeln!(
            io::stderr(),
            "[{:6.1} s] {}",
            self.started.elapsed().as_secs_f64(),
            work.name
        )?;
        let until = now + self.row_limit;
        self.watch.over(&work.name, until);
        let outcome = run(until);
        self.watch.nothing();
        match outcome {
            Ok(figures) => {
                self.figures(work, &figures)?;
                Ok(true)
            }
            Err(error) => {
                self.fail(work, &format!("{error:#}"))?;
                Ok(false)
            }
        }
    }

    /// A row that this node has no use for.
    pub(super) fn left_out(&mut self, name: &str, why: &str) -> io::Result<()> {
        self.report.note(&format!("{name}: {why}, left out"))
    }

    /// A line for people.
    pub(super) fn note(&mut self, line: &str) -> io::Result<()> {
        self.report.note(line)
    }

    fn figures(&mut self, work: &Work, figures: &[Figure]) -> io::Result<()> {
        for (i, figure) in figures.iter().enumerate() {
            let Record {
                metric,
                value,
                unit,
                p99,
                limit,
                ratio,
                n,
                ..
            } = &figure.record;
            let met = figure.goal.map(|goal| goal.met(*value));
            self.missed += usize::from(met == Some(false));
            let number = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.2}"));
            self.table.row(vec![
                if i == 0 {
                    work.name.clone()
                } else {
                    String::new()
                },
                (*metric).to_owned(),
                format!("{value:.2}"),
                (*unit).to_owned(),
                number(*p99),
                figure.goal.map_or_else(String::new, Goal::show),
                match met {
                    Some(true) => "yes".to_owned(),
                    Some(false) => "NO".to_owned(),
                    None => String::new(),
                },
                number(*limit),
                number(*ratio),
                n.to_string(),
            ]);
            self.report.record(&figure.record)?;
            if let Some(file) = &mut self.file {
                file.record(&figure.record)?;
            }
        }
        self.rows += 1;
        Ok(())
    }

    fn fail(&mut self, work: &Work, why: &str) -> io::Result<()> {
        writeln!(io::stderr(), "           FAILED: {why}")?;
        self.failed.push(format!("{}: {why}", work.name));
        self.table.row(vec![work.name.clone(), "FAILED".to_owned()]);
        let mut case = work.case.clone();
        case.insert("row".to_owned(), json!(work.name));
        case.insert("error".to_owned(), json!(why));
        let record = Record::new(BENCH, case, "failed", "rows", 1.0, 1);
        self.report.record(&record)?;
        if let Some(file) = &mut self.file {
            file.record(&record)?;
        }
        self.rows += 1;
        Ok(())
    }

    /// Prints the rows since the last title.
    pub(super) fn print(&mut self, title: &str) -> io::Result<()> {
        let table = std::mem::replace(&mut self.table, titles());
        self.report.note(&format!("\n{title}"))?;
        self.report.table(&table)
    }

    /// The last lines.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        self.report.note(&format!(
            "\n{} rows in {:.0} s, {} failed; {} figures are not what is aimed at on H200",
            self.rows,
            self.started.elapsed().as_secs_f64(),
            self.failed.len(),
            self.missed,
        ))?;
        if self.failed.is_empty() {
            return Ok(());
        }
        bail!(
            "{} rows failed:\n  {}",
            self.failed.len(),
            self.failed.join("\n  ")
        )
    }
}

fn titles() -> Table {
    Table::new(&[
        "work", "figure", "value", "unit", "p99", "goal", "met", "limit", "ratio", "runs",
    ])
}

/// Ends this process, and with it the others, when a row does not end in spite of its limit.
struct Watch(Arc<Mutex<Option<(String, Instant)>>>);

impl Watch {
    fn start() -> io::Result<Self> {
        /// Rows end by themselves within this time after their limit.
        const GRACE: Duration = Duration::from_secs(20);
        const LOOK: Duration = Duration::from_millis(250);
        let watched = Arc::new(Mutex::new(None::<(String, Instant)>));
        let seen = Arc::downgrade(&watched);
        thread::Builder::new()
            .name("bench-watch".to_owned())
            .spawn(move || {
                while let Some(watched) = seen.upgrade() {
                    let watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some((name, until)) = &*watched
                        && Instant::now() > *until + GRACE
                    {
                        // Nobody is left to hear of a closed output.
                        let _ = writeln!(io::stderr(), "'{name}' hangs: the benchmark ends here");
                        std::process::exit(HANGS);
                    }
                    drop(watched);
                    thread::park_timeout(LOOK);
                }
            })?;
        Ok(Self(watched))
    }

    fn over(&self, name: &str, until: Instant) {
        let mut watched = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *watched = Some((name.to_owned(), until));
    }

    fn nothing(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
