//! Deployment files and the per-node launcher.

use std::fs;

use anyhow::{Result, ensure};
use blockplane_tests::{
    Cluster, ClusterBuilder, Role, cluster::STOP, fixtures, requests, traffic::LIMIT,
};

fn deployment(cluster: &Cluster) -> Result<String> {
    Ok(format!(
        r#"
namespace = "test"
discovery = "{}"
model = "{}"

[nodes.a]
run_dir = "{}"

[[nodes.a.roles]]
role = "frontend"
http_port = {}

[[nodes.a.roles]]
role = "prefill"
threads = 1
blocks = 256

[nodes.b]
run_dir = "{}"

[[nodes.b.roles]]
role = "decode"
count = 2
threads = 1
blocks = 256
args = ["--max-num-seqs", "8"]
"#,
        cluster.discovery(),
        fixtures::checkpoint("llama")?.display(),
        cluster.run_dir().join("a").display(),
        cluster.port(),
        cluster.run_dir().join("b").display(),
    ))
}

/// Two launchers, each with the part of one file that is its node's, make one deployment.
#[test]
fn two_nodes_of_one_file_make_one_deployment() -> Result<()> {
    let mut cluster = ClusterBuilder::new().empty()?;
    let file = cluster.folder().join("deployment.toml");
    fs::write(&file, deployment(&cluster)?)?;
    for node in ["a", "b"] {
        let arguments = ["launch", &file.display().to_string(), "--node", node].map(str::to_owned);
        let launcher = cluster.start(&format!("launch-{node}"), &arguments)?;
        cluster.adopt(Role::Frontend, launcher);
    }
    cluster.wait_ready("both nodes", |health| {
        health.count("prefill") == 1 && health.count("decode") == 2
    })?;
    let body = requests::completion("llama", &[7; 100], 8);
    let completion = cluster
        .client()
        .run("/v1/completions", &body, LIMIT)
        .done()?;
    ensure!(completion.tokens.len() == 8, "{completion:?}");
    cluster.stop()
}

/// A mistake in the file is one clear line, and nothing is started.
#[test]
fn a_bad_file_starts_nothing() -> Result<()> {
    let good = deployment(&ClusterBuilder::new().empty()?)?;
    for (text, node, expected) in [
        (good.clone(), "c", "node 'c'"),
        (good.replace("\"decode\"", "\"decoder\""), "b", "decoder"),
        (good.replace("count = 2", "count = \"two\""), "b", "count"),
        (
            good.replace("--max-num-seqs", "--max-num-seq"),
            "b",
            "--max-num-seq",
        ),
        (
            good.replace("[nodes.a]", "[nodes.a"),
            "a",
            "deployment.toml",
        ),
    ] {
        let cluster = ClusterBuilder::new().empty()?;
        let file = cluster.folder().join("deployment.toml");
        fs::write(&file, text)?;
        let arguments = ["launch", &file.display().to_string(), "--node", node].map(str::to_owned);
        let mut launcher = cluster.start("launch", &arguments)?;
        let status = launcher.wait(STOP)?;
        let log = launcher.log().join("\n");
        ensure!(status.code() == Some(1), "{status}: {log}");
        ensure!(log.contains(expected), "expected {expected:?}: {log}");
        ensure!(log.matches("blockplane: ").count() == 1, "one error: {log}");
        ensure!(!log.contains("panicked"), "{log}");
        cluster.stop()?;
    }
    Ok(())
}
