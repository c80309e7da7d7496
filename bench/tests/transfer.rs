//! The transfer benchmark inside one process, small and quick: its figures are complete, its
//! contents are checked by itself.

use blockplane_bench::{report::Report, transfer};
use clap::Parser;
use serde_json::Value;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: transfer::TransferArgs,
}

fn bench(options: &str, json: bool) -> (anyhow::Result<()>, String) {
    let line = format!("transfer --in-process --arena-mib 4 --case-ms 5 --quick {options}");
    let args = Cli::parse_from(line.split_whitespace()).args;
    let mut out = Vec::new();
    let result = transfer::run_to(&args, &mut Report::new(&mut out, json));
    (result, String::from_utf8(out).expect("text"))
}

#[test]
fn every_case_has_its_figures() {
    let (result, out) = bench(
        "--lanes loopback,tcp --block-bytes 4k,64k --counts 1,8 --patterns scattered",
        true,
    );
    result.expect("all contents are right");
    let records: Vec<Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).expect("one object a line"))
        .collect();
    let of = |lane: &str, metric: &str| -> Vec<&Value> {
        records
            .iter()
            .filter(|r| r["case"]["lane"] == lane && r["metric"] == metric)
            .collect()
    };
    for lane in ["loopback", "tcp"] {
        for metric in [
            "bandwidth_gb_per_s",
            "latency_us",
            "make_ns_per_block",
            "post_ns_per_block",
        ] {
            // Two sizes, two counts, two directions.
            assert_eq!(of(lane, metric).len(), 8, "{lane} {metric}");
        }
        for record in of(lane, "bandwidth_gb_per_s") {
            let number = |field: &str| record[field].as_f64().expect("a number");
            assert!(number("value") > 0.0 && number("limit") > 0.0, "{record}");
            assert!(number("p99") <= number("p50"), "{record}");
            let ratio = number("value") / number("limit");
            assert!((number("ratio") - ratio).abs() < 1e-9, "{record}");
            for field in ["op", "block_bytes", "count", "from", "to", "pattern"] {
                assert!(!record["case"][field].is_null(), "{field} in {record}");
            }
        }
        assert_eq!(of(lane, "notify_us").len(), 1);
        assert_eq!(of(lane, "write_notify_us").len(), 1);
        assert_eq!(of(lane, "idle_cpu_percent").len(), 1);
    }
}

#[test]
fn people_get_a_table() {
    let (result, out) = bench(
        "--lanes loopback --block-bytes 4k --counts 4 --ops read",
        false,
    );
    result.expect("all contents are right");
    assert!(out.contains("memcpy x1"), "{out}");
    assert!(out.contains("read 4K x4 scattered"), "{out}");
    assert!(out.contains("idle and connected, both"), "{out}");
}

#[test]
fn an_option_that_makes_no_sense_is_named() {
    for (options, name) in [
        ("--arena-mib 0", "--arena-mib"),
        ("--arena-mib 4 --block-bytes 1m --counts 8", "--arena-mib"),
        ("--counts 0", "--counts"),
        ("--case-ms 0", "--case-ms"),
    ] {
        let line = format!("transfer --in-process {options}");
        let args = Cli::parse_from(line.split_whitespace()).args;
        let error = transfer::run_to(&args, &mut Report::new(Vec::new(), true));
        let error = error.expect_err("refused").to_string();
        assert!(error.contains(name), "{error}");
    }
    let args = Cli::parse_from(["transfer", "--lanes", "loopback"]).args;
    let error = transfer::run_to(&args, &mut Report::new(Vec::new(), true));
    assert!(
        error
            .expect_err("refused")
            .to_string()
            .contains("--in-process")
    );
}
