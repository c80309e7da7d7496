//! Figures as comma-separated values: one line each, one column for everything that tells cases
//! apart.

use serde_json::Value;

use super::Record;

/// Columns after those of the cases.
const FIGURES: [&str; 12] = [
    "metric", "value", "unit", "n", "p50", "p90", "p99", "p999", "max", "limit", "peer", "ratio",
];

/// All records, with a first line of names.
pub(super) fn text(records: &[Record]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in records.iter().flat_map(|record| record.case.keys()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let header = ["bench"].into_iter().chain(names.iter().copied());
    let mut out = line(header.chain(FIGURES).map(str::to_owned));
    for record in records {
        let number = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
        let case = names.iter().map(|&name| match record.case.get(name) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        });
        let figures = [
            record.metric.to_owned(),
            record.value.to_string(),
            record.unit.to_owned(),
            record.n.to_string(),
            number(record.p50),
            number(record.p90),
            number(record.p99),
            number(record.p999),
            number(record.max),
            number(record.limit),
            number(record.peer),
            number(record.ratio),
        ];
        let bench = [record.bench.to_owned()].into_iter();
        out += &line(bench.chain(case).chain(figures));
    }
    out
}

fn line(cells: impl Iterator<Item = String>) -> String {
    let cells: Vec<String> = cells.map(|cell| quoted(&cell)).collect();
    cells.join(",") + "\n"
}

/// A cell, in quotes where it holds something that would end it.
fn quoted(cell: &str) -> String {
    if cell.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::case;

    #[test]
    fn every_record_has_every_column() {
        let first = case([("lane", json!("shm")), ("count", json!(16))]);
        let second = case([("lane", json!("a, \"b\"")), ("side", json!("target"))]);
        let records = [
            Record::new("transfer", first, "notify_us", "us", 1.5, 3).limit(Some(1.0)),
            Record::new(
                "transfer",
                second,
                "idle_cpu_percent",
                "percent of a core",
                0.1,
                1,
            ),
        ];
        assert_eq!(
            text(&records),
            "bench,lane,count,side,metric,value,unit,n,p50,p90,p99,p999,max,limit,peer,ratio\n\
             transfer,shm,16,,notify_us,1.5,us,3,,,,,,1,,1.5\n\
             transfer,\"a, \"\"b\"\"\",,target,idle_cpu_percent,0.1,percent of a core,1,,,,,,,,\n"
        );
    }
}
