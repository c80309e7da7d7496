//! The figures of a run.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use super::{ServeArgs, load::Outcome};
use crate::report::{Histogram, Record, Report, Table, case};

pub(super) fn write<W: Write>(
    args: &ServeArgs,
    outcome: &Outcome,
    report: &mut Report<W>,
) -> io::Result<()> {
    let case = describe(args, outcome);
    let seconds = outcome.elapsed.as_secs_f64().max(1e-9);
    let n = outcome.succeeded();
    report.note(&headline(args, outcome))?;

    let mut table = Table::new(&["ms", "mean", "p50", "p90", "p99", "max", "n"]);
    let mut latencies = vec![
        ("ttft_ms", "time to first token", &outcome.ttft),
        ("itl_ms", "between pieces of text", &outcome.itl),
        ("tpot_ms", "per output token", &outcome.tpot),
        ("e2e_ms", "end to end", &outcome.total),
    ];
    if args.rate.is_some() || args.trace.is_some() {
        latencies.push(("send_lag_ms", "late start", &outcome.lag));
    }
    for (metric, title, histogram) in latencies {
        if histogram.is_empty() {
            continue;
        }
        table.row(latency_row(title, histogram));
        let p50 = histogram.percentile_ms(50.0);
        report.record(
            &Record::new("serve", case.clone(), metric, "ms", p50, histogram.len())
                .percentiles(p50, histogram.percentile_ms(99.0)),
        )?;
    }
    report.table(&table)?;

    let rates = [
        ("requests_per_s", "1/s", count(n) / seconds),
        (
            "output_tokens_per_s",
            "1/s",
            count(outcome.output_tokens) / seconds,
        ),
        (
            "input_tokens_per_s",
            "1/s",
            count(outcome.input_tokens) / seconds,
        ),
        (
            "cached_input_tokens",
            "tokens",
            count(outcome.cached_tokens),
        ),
        ("errors", "requests", count(outcome.failed())),
    ];
    let mut line = String::new();
    for (metric, unit, value) in rates {
        report.record(&Record::new("serve", case.clone(), metric, unit, value, n))?;
        line.push_str(&format!("{} {value:.1}   ", metric.replace('_', " ")));
    }
    report.note(line.trim_end())?;
    for (failure, &failed) in &outcome.failures {
        let mut case = case.clone();
        case.insert("kind".to_owned(), Value::from(failure.name()));
        let record = Record::new(
            "serve",
            case,
            "errors_by_kind",
            "requests",
            count(failed),
            n,
        );
        report.record(&record)?;
    }
    if outcome.failed() > 0 {
        report.note(&format!("errors by kind: {}", outcome.failures_text()))?;
    }
    Ok(())
}

fn headline(args: &ServeArgs, outcome: &Outcome) -> String {
    let how = match (&args.trace, args.rate) {
        (Some(path), _) => format!("trace {} x{}", path.display(), args.trace_speed),
        (None, Some(rate)) => format!("open loop, {rate}/s"),
        (None, None) => format!("closed loop, {} clients", args.concurrency),
    };
    format!(
        "{} at {} ({}): {how}; {} requests in {:.1} s",
        outcome.model,
        args.url,
        args.api.as_str(),
        outcome.succeeded() + outcome.failed(),
        outcome.elapsed.as_secs_f64(),
    )
}

fn describe(args: &ServeArgs, outcome: &Outcome) -> Map<String, Value> {
    let mut fields = case([
        ("model", json!(outcome.model)),
        ("api", json!(args.api.as_str())),
        ("seed", json!(args.seed)),
    ]);
    let mut add = |name: &str, value: Value| fields.insert(name.to_owned(), value);
    match (&args.trace, args.rate) {
        (Some(path), _) => {
            add("loop", json!("trace"));
            add(
                "trace",
                json!(path.file_name().map(|n| n.to_string_lossy())),
            );
            add("speed", json!(args.trace_speed));
            add("scale", json!(args.trace_scale));
        }
        (None, rate) => {
            match rate {
                Some(rate) => {
                    add("loop", json!("open"));
                    add("rate", json!(rate));
                }
                None => {
                    add("loop", json!("closed"));
                    add("concurrency", json!(args.concurrency));
                }
            }
            add("input_tokens", json!(args.input_tokens));
            add("output_tokens", json!(args.output_tokens));
            add("shared_prefix_tokens", json!(args.shared_prefix_tokens));
            add("prefixes", json!(args.prefixes));
        }
    }
    fields
}

fn latency_row(title: &str, histogram: &Histogram) -> Vec<String> {
    let mut row = vec![title.to_owned(), format!("{:.2}", histogram.mean_ms())];
    for percent in [50.0, 90.0, 99.0, 100.0] {
        row.push(format!("{:.2}", histogram.percentile_ms(percent)));
    }
    row.push(histogram.len().to_string());
    row
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
const fn count(n: u64) -> f64 {
    n as f64
}
