//! `blockplane doctor`.

use anyhow::{Context, Result, ensure};
use blockplane_tests::{ClusterBuilder, cluster::STOP};
use serde_json::Value;

/// The report speaks of everything that decides what can run here, and is not a failure on a machine
/// without accelerators.
#[test]
fn doctor_reports_what_the_machine_offers() -> Result<()> {
    let cluster = ClusterBuilder::new().empty()?;
    let mut doctor = cluster.start("doctor", &["doctor".to_owned()])?;
    let status = doctor.wait(STOP)?;
    let text = doctor.log().join("\n").to_lowercase();
    ensure!(status.success(), "{status}: {text}");
    for subject in [
        "core", "memory", "huge", "memlock", "io_uring", "cuda", "ucx", "verbs", "disk",
    ] {
        ensure!(text.contains(subject), "no word about {subject}:\n{text}");
    }

    let mut doctor = cluster.start("doctor", &["doctor", "--json"].map(str::to_owned))?;
    ensure!(doctor.wait(STOP)?.success());
    let log = doctor.log();
    let line = log
        .iter()
        .find(|line| line.starts_with('{'))
        .context("no object in the output")?;
    let value: Value = serde_json::from_str(line)?;
    let findings = value["findings"].as_array().context("findings")?;
    ensure!(findings.len() >= 8, "{findings:?}");
    for finding in findings {
        for key in ["name", "verdict", "found", "used"] {
            ensure!(finding[key].is_string(), "no {key} in {finding}");
        }
        let verdict = finding["verdict"].as_str().unwrap_or_default();
        let advised = finding["advice"]
            .as_str()
            .is_some_and(|text| !text.is_empty());
        ensure!(verdict == "ok" || advised, "no advice in {finding}");
    }
    cluster.stop()
}
