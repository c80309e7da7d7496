//! The transfer benchmark inside one process, small and quick: its figures are complete, its
//! contents are checked by itself.

use blockplane_bench::{report::Report, transfer};
use blockplane_transfer::KernelConfig;
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
    let result = transfer::run_to(
        &args,
        &KernelConfig::default(),
        &mut Report::new(&mut out, json),
    );
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
        // Two sizes, two counts, two directions.
        for metric in ["bandwidth_gb_per_s", "latency_us"] {
            assert_eq!(of(lane, metric).len(), 8, "{lane} {metric}");
        }
        // And 10,000 blocks: scattered, and consecutive as a range and as a list.
        for metric in ["make_ns_per_block", "post_ns_per_block"] {
            assert_eq!(of(lane, metric).len(), 11, "{lane} {metric}");
        }
        assert_eq!(of(lane, "post_cpu_ns_per_block").len(), 3, "{lane}");
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
        // Receivers that spin, receivers that wait, and receivers that are asleep.
        assert_eq!(of(lane, "notify_us").len(), 3);
        assert_eq!(of(lane, "write_notify_us").len(), 3);
        for metric in ["metadata_us", "connect_us", "register_gib_us"] {
            assert_eq!(of(lane, metric).len(), 1, "{lane} {metric}");
        }
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
    assert!(out.contains("notification, receiver asleep"), "{out}");
    assert!(out.contains("idle and connected for 1 s, both"), "{out}");
}

#[test]
fn an_option_that_makes_no_sense_is_named() {
    for (options, name) in [
        ("--arena-mib 0", "--arena-mib"),
        ("--arena-mib 4 --block-bytes 1m --counts 8", "--arena-mib"),
        (
            "--arena-mib 4 --block-bytes 1m --counts 2 --depth 3",
            "--arena-mib",
        ),
        ("--threads 0", "--threads"),
        ("--targets 2 --initiators 1", "--targets"),
        ("--scheme one-to-many --measure idle", "--measure"),
        ("--from file:/nowhere", "--from"),
        ("--per-layer", "--model-config"),
        ("--plot picture.jpg", "--plot"),
        ("--start-count 4 --max-count 2", "--start-count"),
        ("--counts 0", "--counts"),
        ("--case-ms 0", "--case-ms"),
        ("--sms 4", "--sms"),
        ("--pull-writes", "--pull-writes"),
        ("--beside matmul", "--beside"),
    ] {
        let line = format!("transfer --in-process {options}");
        let args = Cli::parse_from(line.split_whitespace()).args;
        let error = transfer::run_to(
            &args,
            &KernelConfig::default(),
            &mut Report::new(Vec::new(), true),
        );
        let error = error.expect_err("refused").to_string();
        assert!(error.contains(name), "{error}");
    }
    let args = Cli::parse_from(["transfer", "--lanes", "loopback"]).args;
    let error = transfer::run_to(
        &args,
        &KernelConfig::default(),
        &mut Report::new(Vec::new(), true),
    );
    assert!(
        error
            .expect_err("refused")
            .to_string()
            .contains("--in-process")
    );
}

/// Every scheme moves what it says between all its pairs; contents are checked by the benchmark.
#[test]
fn schemes_threads_and_depth_move_every_byte() {
    for (scheme, pairs, rest) in [
        ("pairwise --initiators 2", 2, "--depth 2"),
        ("many-to-one", 2, "--threads 2"),
        ("one-to-many --targets 3", 3, "--prepared no --from host"),
        ("all-to-all", 4, "--to host --threads 2 --depth 2"),
    ] {
        let (result, out) = bench(
            &format!(
                "--lanes tcp,loopback --block-bytes 4k --counts 8 --iterations 5 --scheme {scheme} \
                 {rest}"
            ),
            true,
        );
        result.expect("all contents are right");
        let records: Vec<Value> = out
            .lines()
            .map(|line| serde_json::from_str(line).expect("one object a line"))
            .collect();
        for lane in ["tcp", "loopback"] {
            for op in ["write", "read"] {
                let of = |metric: &str| -> Vec<&Value> {
                    let case = |r: &&Value| r["case"]["lane"] == lane && r["case"]["op"] == op;
                    let all = records.iter().filter(|r| r["metric"] == metric);
                    all.filter(case).collect()
                };
                assert_eq!(of("bandwidth_gb_per_s").len(), 1, "{scheme} {lane} {op}");
                assert_eq!(of("pair_gb_per_s").len(), pairs, "{scheme} {lane} {op}");
                let total = of("bandwidth_gb_per_s")[0];
                // Five rounds of each transfer in flight.
                let lots = match rest {
                    "--depth 2" | "--threads 2" => 2,
                    "--to host --threads 2 --depth 2" => 4,
                    _ => 1,
                };
                assert_eq!(total["n"], 5 * lots * pairs, "{scheme} {lane} {op}");
            }
        }
    }
}

#[test]
fn ranges_take_the_place_of_lists() {
    let (result, out) = bench(
        "--lanes loopback --measure blocks --ops read --start-block-bytes 1k --max-block-bytes 4k \
         --start-count 1 --max-count 2 --no-check",
        true,
    );
    result.expect("it runs");
    let cases: Vec<(u64, u64)> = out
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("one object a line"))
        .filter(|record| record["metric"] == "bandwidth_gb_per_s")
        .map(|record| {
            let number = |field: &str| record["case"][field].as_u64().expect("a number");
            (number("block_bytes"), number("count"))
        })
        .collect();
    let expected: Vec<_> = [1024, 2048, 4096]
        .into_iter()
        .flat_map(|bytes| [(bytes, 1), (bytes, 2)])
        .collect();
    assert_eq!(cases, expected);
}

/// One request of a small model, whole and layer by layer.
#[test]
fn a_model_moves_the_bytes_of_its_cache() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.json");
    let config = serde_json::json!({
        "model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "hidden_size": 512, "torch_dtype": "float16"
    });
    std::fs::write(&path, config.to_string()).expect("written");
    for rest in ["", "--per-layer", "--layout block-first --tp 2"] {
        let (result, out) = bench(
            &format!(
                "--lanes loopback,tcp --model-config {} --tokens 100 {rest}",
                path.display()
            ),
            true,
        );
        result.expect("all contents are right");
        let records: Vec<Value> = out
            .lines()
            .map(|line| serde_json::from_str(line).expect("one object a line"))
            .filter(|record: &Value| record["metric"] == "bandwidth_gb_per_s")
            .collect();
        // Two lanes and two directions.
        assert_eq!(records.len(), 4, "{rest}");
        let heads = if rest.contains("--tp 2") { 2 } else { 4 };
        for record in records {
            // 100 tokens are 7 blocks of 16; two planes, 4 layers, heads of 64, 2 bytes.
            assert_eq!(record["case"]["bytes"], 7 * 16 * 2 * 4 * heads * 64 * 2);
            assert_eq!(record["case"]["descriptors"], 7 * 4 * 2);
            assert_eq!(record["case"]["count"], 7);
        }
    }
}

#[test]
fn figures_also_go_to_a_file_and_a_picture() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    for picture in ["plot.svg", "plot.png"] {
        let (result, out) = bench(
            &format!(
                "--lanes loopback --measure blocks --block-bytes 4k,64k --counts 2 --csv {} --plot \
                 {}",
                path("figures.csv"),
                path(picture)
            ),
            true,
        );
        result.expect("all contents are right");
        let csv = std::fs::read_to_string(path("figures.csv")).expect("written");
        let mut lines = csv.lines();
        let names: Vec<&str> = lines.next().expect("names").split(',').collect();
        let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
        let records: Vec<Value> = out
            .lines()
            .map(|line| serde_json::from_str(line).expect("one object a line"))
            .collect();
        assert_eq!(rows.len(), records.len());
        let column = |name: &str| names.iter().position(|n| *n == name).expect("a column");
        for (row, record) in rows.iter().zip(&records) {
            assert_eq!(row.len(), names.len(), "{row:?}");
            assert_eq!(row[column("metric")], record["metric"]);
            assert_eq!(row[column("op")], record["case"]["op"]);
            let value: f64 = row[column("value")].parse().expect("a number");
            let written = record["value"].as_f64().expect("a number");
            assert!((value - written).abs() <= written * 1e-9, "{row:?}");
        }
    }
    let svg = std::fs::read_to_string(path("plot.svg")).expect("written");
    for text in [">write, scattered<", ">read, scattered<", ">loopback x2<"] {
        assert!(svg.contains(text), "{text}");
    }
    // Two directions, each with its limit, and the legend.
    assert_eq!(svg.matches("stroke-dasharray").count(), 3);
    let png = std::fs::read(path("plot.png")).expect("written");
    assert!(png.starts_with(b"\x89PNG\r\n"));
}
