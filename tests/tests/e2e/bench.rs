//! `blockplane bench`: what it prints can be read by a machine, and is measured and not made up.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use blockplane_tests::{Cluster, ClusterBuilder, health::Health, wait};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

/// The objects that a benchmark prints with `--json`.
fn records(cluster: &Cluster, arguments: &[&str]) -> Result<Vec<Value>> {
    let mut all: Vec<String> = vec!["bench".to_owned()];
    all.extend(arguments.iter().map(|&text| text.to_owned()));
    all.push("--json".to_owned());
    let mut bench = cluster.start("bench", &all)?;
    let status = bench.wait(LIMIT)?;
    let log = bench.log();
    ensure!(status.success(), "{status}: {}", log.join("\n"));
    let records = log
        .iter()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).with_context(|| line.clone()))
        .collect::<Result<Vec<Value>>>()?;
    ensure!(!records.is_empty(), "no object in {}", log.join("\n"));
    for record in &records {
        for key in ["bench", "metric", "unit"] {
            ensure!(record[key].is_string(), "no {key} in {record}");
        }
        ensure!(
            record["case"].is_object() && record["value"].is_number(),
            "{record}"
        );
    }
    Ok(records)
}

/// Every lane is measured in both directions, beside a limit of the same run.
#[test]
fn transfer() -> Result<()> {
    let cluster = ClusterBuilder::new().empty()?;
    let records = records(&cluster, &["transfer", "--quick"])?;
    let cases: BTreeSet<(String, String)> = records
        .iter()
        .filter(|record| record["metric"] == "bandwidth_gb_per_s")
        .map(|record| {
            (
                record["case"]["lane"].to_string(),
                record["case"]["op"].to_string(),
            )
        })
        .collect();
    for lane in ["\"shm\"", "\"tcp\""] {
        for op in ["\"write\"", "\"read\""] {
            ensure!(
                cases.contains(&(lane.to_owned(), op.to_owned())),
                "{lane} {op}: {cases:?}"
            );
        }
    }
    let limited = records
        .iter()
        .filter(|record| record["limit"].as_f64().is_some_and(|limit| limit > 0.0));
    ensure!(limited.count() > 0, "no figure beside its limit");
    cluster.stop()
}

/// The requests are really sent: the workers have generated their tokens.
#[test]
fn serve() -> Result<()> {
    let cluster = ClusterBuilder::new()
        .arguments(&["--mode", "agg", "--threads", "1", "--blocks", "256"])
        .up()?;
    let url = format!("http://{}", cluster.client().address());
    let records = records(
        &cluster,
        &[
            "serve",
            "--url",
            &url,
            "--requests",
            "8",
            "--output-tokens",
            "16",
            "--warmup",
            "0",
        ],
    )?;
    ensure!(
        records.iter().any(|record| {
            record["metric"]
                .as_str()
                .is_some_and(|metric| metric.contains("ttft"))
        }),
        "{records:?}"
    );
    let client = cluster.client();
    // Load reports follow the work. The first token of each answer may count as one of prefill.
    wait::until("the tokens in the load reports", LIMIT, || {
        let health = Health::read(&client).map_err(|error| format!("{error:#}"))?;
        let loads = health.workers.iter().flat_map(|worker| &worker.load);
        let tokens: u64 = loads.map(|load| load.decode_tokens_total).sum();
        if tokens >= 8 * 15 {
            Ok(())
        } else {
            Err(format!("{health:?}"))
        }
    })?;
    cluster.stop()
}
