//! Results: one object a line for machines, a table for people.

mod chart;
mod csv;
mod stats;
mod table;

use std::io::{self, Write};

use serde::Serialize;
use serde_json::{Map, Value};

pub use chart::{Chart, Panel, Series};
pub use stats::{Histogram, Samples};
pub use table::Table;

/// One measured figure.
///
/// ```json
/// {"bench":"transfer","case":{"lane":"shm"},"metric":"bandwidth_gb_per_s","value":9.1,"unit":"GB/s",
///  "n":20,"p50":9.1,"p99":8.2,"limit":11.0,"peer":null,"ratio":0.83}
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Record {
    /// Name of the benchmark.
    pub bench: &'static str,
    /// What distinguishes this figure from others of the same metric.
    pub case: Map<String, Value>,
    /// What was measured; the unit is the end of the name where it is not obvious.
    pub metric: &'static str,
    /// The figure: a median unless the metric is a rate or a count over the whole run.
    pub value: f64,
    /// Unit of `value`, `p50`, `p99`, `limit` and `peer`.
    pub unit: &'static str,
    /// Observations behind it.
    pub n: u64,
    /// Median.
    pub p50: Option<f64>,
    /// 99th percentile; of a bandwidth the slow end, so that 99 % of the runs were at least as
    /// fast.
    pub p99: Option<f64>,
    /// Physical bound measured in the same run.
    pub limit: Option<f64>,
    /// A competitor's figure from the same run.
    pub peer: Option<f64>,
    /// `value / peer`, or `value / limit` where no competitor ran.
    pub ratio: Option<f64>,
    /// What the figure ought to reach, where there is such a value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<f64>,
    /// 90th percentile, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p90: Option<f64>,
    /// 99.9th percentile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p999: Option<f64>,
    /// The largest observation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

/// Where results go.
#[derive(Debug)]
pub struct Report<W> {
    out: W,
    json: bool,
    /// Figures so far, where they are wanted later.
    kept: Option<Vec<Record>>,
}

impl Record {
    /// A figure without percentiles and bound.
    #[must_use]
    pub fn new(
        bench: &'static str,
        case: Map<String, Value>,
        metric: &'static str,
        unit: &'static str,
        value: f64,
        n: u64,
    ) -> Self {
        Self {
            bench,
            case,
            metric,
            value,
            unit,
            n,
            p50: None,
            p99: None,
            limit: None,
            peer: None,
            ratio: None,
            goal: None,
            p90: None,
            p999: None,
            max: None,
        }
    }

    /// The same with percentiles.
    #[must_use]
    pub fn percentiles(mut self, p50: f64, p99: f64) -> Self {
        self.p50 = Some(p50);
        self.p99 = Some(p99);
        self
    }

    /// A median with all percentiles of its samples.
    #[must_use]
    pub fn of_samples(
        bench: &'static str,
        case: Map<String, Value>,
        metric: &'static str,
        unit: &'static str,
        samples: &Samples,
    ) -> Self {
        let p50 = samples.median();
        Self {
            p90: Some(samples.percentile(90)),
            p999: Some(samples.per_mille(999)),
            max: Some(samples.percentile(100)),
            ..Self::new(bench, case, metric, unit, p50, samples.len() as u64)
                .percentiles(p50, samples.percentile(99))
        }
    }

    /// The same beside a bound of the same unit, when one was measured.
    #[must_use]
    pub fn limit(mut self, limit: Option<f64>) -> Self {
        self.limit = limit;
        if self.peer.is_none() {
            self.ratio = limit.filter(|&limit| limit > 0.0).map(|l| self.value / l);
        }
        self
    }
}

impl Report<io::Stdout> {
    /// Writes to standard output.
    #[must_use]
    pub fn stdout(json: bool) -> Self {
        Self::new(io::stdout(), json)
    }
}

impl<W: Write> Report<W> {
    /// Writes to `out`.
    pub const fn new(out: W, json: bool) -> Self {
        Self {
            out,
            json,
            kept: None,
        }
    }

    /// Keeps all figures from now on for [`Report::kept`] and [`Report::csv`].
    pub fn keep(&mut self) {
        self.kept.get_or_insert_default();
    }

    /// The figures since [`Report::keep`].
    #[must_use]
    pub fn kept(&self) -> &[Record] {
        self.kept.as_deref().unwrap_or_default()
    }

    /// The kept figures as comma-separated values: a line of names, then one line each.
    #[must_use]
    pub fn csv(&self) -> String {
        csv::text(self.kept())
    }

    /// Writes one figure if figures are wanted.
    ///
    /// # Errors
    /// When the output is closed.
    pub fn record(&mut self, record: &Record) -> io::Result<()> {
        if let Some(kept) = &mut self.kept {
            kept.push(record.clone());
        }
        if self.json {
            serde_json::to_writer(&mut self.out, record)?;
            writeln!(self.out)?;
            self.out.flush()?;
        }
        Ok(())
    }

    /// Writes a table if a table is wanted.
    ///
    /// # Errors
    /// When the output is closed.
    pub fn table(&mut self, table: &Table) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        write!(self.out, "{table}")?;
        self.out.flush()
    }

    /// Writes a line for people.
    ///
    /// # Errors
    /// When the output is closed.
    pub fn note(&mut self, line: &str) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        writeln!(self.out, "{line}")?;
        self.out.flush()
    }
}

/// Builds the `case` of a [`Record`].
#[must_use]
pub fn case<const N: usize>(pairs: [(&str, Value); N]) -> Map<String, Value> {
    pairs
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_figure_is_one_line_with_every_field_in_order() {
        let record = Record::new(
            "transfer",
            case([("lane", json!("shm")), ("block_bytes", json!(4096))]),
            "bandwidth_gb_per_s",
            "GB/s",
            6.0,
            20,
        )
        .percentiles(6.0, 5.0)
        .limit(Some(12.0));
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, true);
        report.record(&record).unwrap();
        report.note("not for machines").unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "{\"bench\":\"transfer\",\"case\":{\"lane\":\"shm\",\"block_bytes\":4096},\
             \"metric\":\"bandwidth_gb_per_s\",\"value\":6.0,\"unit\":\"GB/s\",\"n\":20,\"p50\":6.0,\
             \"p99\":5.0,\"limit\":12.0,\"peer\":null,\"ratio\":0.5}\n"
        );
    }

    #[test]
    fn a_figure_without_a_bound_has_no_ratio() {
        let record = Record::new("serve", Map::new(), "ttft_ms", "ms", 6.0, 1).limit(None);
        let value = serde_json::to_value(&record).unwrap();
        assert_eq!(value["ratio"], Value::Null);
        assert_eq!(value["limit"], Value::Null);
    }
}
