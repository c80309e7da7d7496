//! The engine benchmark on a small checkpoint.

use std::path::Path;

use blockplane_bench::{engine, report::Report};
use clap::Parser;
use serde_json::Value;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: engine::EngineArgs,
}

fn bench(options: &str) -> (anyhow::Result<()>, Vec<Value>) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/qwen3");
    let mut args = Cli::parse_from(
        ["engine", "--model", "."]
            .into_iter()
            .chain(options.split_whitespace()),
    )
    .args;
    args.model = model;
    let mut out = Vec::new();
    let result = engine::run_to(&args, &mut Report::new(&mut out, true));
    let lines = String::from_utf8(out).expect("JSON is UTF-8");
    let records = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("one object a line"))
        .collect();
    (result, records)
}

#[test]
fn both_phases_have_their_figures() {
    let (result, records) = bench(
        "--quick --threads 1 --prefill 8,33 --decode 1,3 --decode-context 5 --decode-steps 4",
    );
    result.expect("the checkpoint loads");
    let rates: Vec<&Value> = records
        .iter()
        .filter(|record| record["metric"] == "tokens_per_s")
        .collect();
    assert_eq!(rates.len(), 4);
    assert_eq!(records.len(), 8);
    for record in &rates {
        assert!(record["value"].as_f64() > Some(0.0), "{record}");
        assert!(record["p99"].as_f64() <= record["p50"].as_f64(), "{record}");
    }
    let decode = rates[3];
    assert_eq!(decode["case"]["phase"], "decode");
    assert_eq!(decode["case"]["sequences"], 3);
    // Two runs of four steps.
    assert_eq!(decode["n"], 8);
    assert!(decode["limit"].as_f64() > Some(0.0));
    assert!(rates[0]["limit"].is_null());
}

#[test]
fn a_case_beyond_the_context_is_refused() {
    let (result, _) = bench("--prefill 1000000");
    let error = result.expect_err("too long").to_string();
    assert!(error.contains("the model's context is"), "{error}");
    let (result, _) = bench("--runs 0");
    assert!(result.expect_err("refused").to_string().contains("--runs"));
}
