//! The settings as people and programs read them.

use std::fmt::Write;

use serde::Serialize;

use super::{Finding, KvbmSettings, Origin, Plain, Severity, Sizes, check::bytes};

/// Everything about the settings of a worker.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Every setting.
    pub settings: Vec<Row>,
    /// What they come to; `None` when the size of a block is not known.
    pub sizes: Option<Sizes>,
    /// What was given and has no effect, or another one than it had.
    pub notes: Vec<String>,
    /// What is wrong or odd.
    pub findings: Vec<Finding>,
}

/// One setting.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its variable.
    pub variable: String,
    /// Its value.
    pub value: Plain,
    /// What the value counts; empty where it is no amount.
    pub unit: &'static str,
    /// `default`, `file`, `variable` or `flag`.
    pub origin: &'static str,
    /// The file and table, the variable or the flag; empty for defaults.
    pub place: String,
    /// What it does.
    pub help: &'static str,
}

impl Report {
    /// Settings with what they come to and what was found.
    #[must_use]
    pub fn new(settings: &KvbmSettings, sizes: Option<Sizes>, findings: Vec<Finding>) -> Self {
        let values = settings.values();
        let rows = values.into_iter().map(|(setting, value, origin)| {
            let (origin, place) = match origin {
                Origin::Default => ("default", ""),
                Origin::File(place) => ("file", place.as_str()),
                Origin::Variable(name) => ("variable", name.as_str()),
                Origin::Flag(name) => ("flag", name.as_str()),
            };
            Row {
                variable: setting.variable(),
                value,
                unit: setting.unit,
                origin,
                place: place.to_owned(),
                help: setting.help.trim(),
            }
        });
        Self {
            settings: rows.collect(),
            sizes,
            notes: settings.notes.clone(),
            findings,
        }
    }

    /// Whether a worker would refuse to start.
    #[must_use]
    pub fn failed(&self) -> bool {
        let mut findings = self.findings.iter();
        findings.any(|finding| finding.severity == Severity::Error)
    }

    /// A table for people.
    #[must_use]
    pub fn text(&self) -> String {
        let rows: Vec<[String; 4]> = self.settings.iter().map(Row::cells).collect();
        let head = ["variable", "value", "unit", "origin"].map(str::to_owned);
        let mut widths = [0; 4];
        for row in rows.iter().chain([&head]) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.len().max(*width);
            }
        }
        let mut out = String::new();
        for row in [&head].into_iter().chain(&rows) {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                line += &format!("{cell:width$}  ");
            }
            out += line.trim_end();
            out.push('\n');
        }
        out.push('\n');
        match &self.sizes {
            None => {
                out += "sizes: give --model DIR or --block-bytes N to see blocks and bytes of each tier\n"
            }
            Some(sizes) => sizes_text(&mut out, sizes),
        }
        for note in &self.notes {
            out += &format!("\nnote: {note}\n");
        }
        for finding in &self.findings {
            let word = match finding.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            out += &format!("\n{word}: {}\n", finding.text);
        }
        out
    }
}

impl Row {
    fn cells(&self) -> [String; 4] {
        let origin = match self.origin {
            // The name of the variable is in the first column.
            "variable" if self.place == self.variable => self.origin.to_owned(),
            _ => format!("{} {}", self.origin, self.place),
        };
        let value = match &self.value {
            Plain::Text(text) if text.is_empty() => "''".to_owned(),
            value => value.to_string(),
        };
        [
            self.variable.clone(),
            value,
            self.unit.to_owned(),
            origin.trim_end().to_owned(),
        ]
    }
}

fn sizes_text(out: &mut String, sizes: &Sizes) {
    if sizes.off() {
        *out +=
            "tiers below G1: off (no size is set: DYN_KVBM_CPU_CACHE_GB, DYN_KVBM_DISK_CACHE_GB)\n";
        return;
    }
    let ranks = if sizes.ranks == 1 {
        String::new()
    } else {
        format!(" over {} ranks", sizes.ranks)
    };
    let block = bytes(sizes.block_bytes);
    let mut line = |text: String| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{text}");
    };
    line(format!("a block has {block}{ranks}"));
    if sizes.host_blocks > 0 {
        line(format!(
            "G2 host    {:>12} blocks  {:>12} of memory",
            sizes.host_blocks,
            bytes(sizes.host_bytes)
        ));
    } else {
        line(format!(
            "G2 off     {:>12} blocks  {:>12} of memory to pass through",
            sizes.bounce_blocks,
            bytes(sizes.host_bytes)
        ));
    }
    if sizes.disk_blocks > 0 {
        line(format!(
            "G3 disk    {:>12} blocks  {:>12} of disk",
            sizes.disk_blocks,
            bytes(sizes.disk_bytes)
        ));
    }
    if sizes.object_blocks > 0 {
        line(format!(
            "G4 objects {:>12} blocks at most",
            sizes.object_blocks
        ));
    }
    if sizes.peers {
        line(format!(
            "G4 peers   {:>12} blocks of G2 lent at most",
            sizes.lend_blocks
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{HostFacts, KvbmFlags, SETTINGS, resolve};

    fn report(given: &[(&str, &str)], block_bytes: Option<u64>) -> Report {
        let given = given
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let settings = resolve(given, None, &KvbmFlags::new()).unwrap();
        let sizes = block_bytes.map(|bytes| settings.sizes(bytes, 1));
        let findings = sizes.map_or_else(Vec::new, |sizes| {
            settings.check(&sizes, &HostFacts::default())
        });
        Report::new(&settings, sizes, findings)
    }

    #[test]
    fn every_setting_is_a_line_with_value_unit_and_origin() {
        let report = report(
            &[
                ("DYN_KVBM_CPU_CACHE_GB", "2.5"),
                ("DYN_KVBM_OBJECT_SECRET_KEY", "hunter2"),
            ],
            Some(1_000_000),
        );
        let text = report.text();
        for setting in SETTINGS {
            let line = text
                .lines()
                .find(|line| line.split_whitespace().next() == Some(&setting.variable()));
            assert!(line.is_some(), "{}", setting.key);
        }
        let line = text
            .lines()
            .find(|line| line.starts_with("DYN_KVBM_CPU_CACHE_GB"))
            .unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words, ["DYN_KVBM_CPU_CACHE_GB", "2.5", "GB", "variable"]);
        assert!(
            text.contains("2500 blocks") && text.contains("2.50 GB of memory"),
            "{text}"
        );
        assert!(
            !text.contains("hunter2") && text.contains("set, not shown"),
            "{text}"
        );
    }

    #[test]
    fn no_tier_is_plainly_off() {
        let report = report(&[], Some(4096));
        assert!(
            report.text().contains("tiers below G1: off"),
            "{}",
            report.text()
        );
        assert!(!report.failed());
    }

    #[test]
    fn errors_fail_and_notes_do_not() {
        let failed = report(&[("DYN_KVBM_OBJECT_ENABLED", "1")], Some(4096));
        assert!(failed.failed() && failed.text().contains("error: DYN_KVBM_OBJECT_ENABLED"));
        let noted = report(&[("DYN_KVBM_NCCL_MAX_CTAS", "1")], None);
        assert!(!noted.failed());
        assert!(
            noted
                .text()
                .contains("note: DYN_KVBM_NCCL_MAX_CTAS has no effect")
        );
    }
}
