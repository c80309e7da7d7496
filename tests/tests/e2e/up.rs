//! `blockplane up` as a person meets it first.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use blockplane_tests::{
    ClusterBuilder, Role,
    cluster::{START, STOP},
    process::Signal,
    requests,
    traffic::LIMIT,
};
use serde_json::Value;

/// The bare command carries its own checkpoint, says what it serves and where, prints a command that
/// works when pasted, and Ctrl-C leaves nothing behind.
#[test]
fn the_bare_command_ends_in_a_served_request() -> Result<()> {
    let mut cluster = ClusterBuilder::new().up()?;
    let up = cluster.leader()?;
    let line = up.wait_for_line("curl -s http", START)?;
    let output = Command::new("sh")
        .args(["-c", &line])
        .output()
        .context("run the printed command")?;
    let body = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{line}\n{body}");
    let value: Value = serde_json::from_str(&body).context(body.clone())?;
    let text = value.pointer("/choices/0/message/content");
    ensure!(text.is_some_and(Value::is_string), "{body}");

    for role in [Role::Frontend, Role::Prefill, Role::Decode] {
        let pid = cluster.pid(role)?;
        let log = cluster.leader()?.log().join("\n");
        ensure!(
            log.contains(&format!("pid {pid}")),
            "no line about {role:?}, process {pid}:\n{log}"
        );
    }
    let pids = cluster.all_processes().len();
    ensure!(
        pids == 4,
        "launcher and three roles, found {pids} processes"
    );
    cluster.stop()
}

/// SIGTERM is what a service manager sends; it ends as cleanly as Ctrl-C, with requests running.
#[test]
fn a_stop_with_requests_running_lets_them_finish() -> Result<()> {
    let mut cluster = ClusterBuilder::new().arguments(&["--threads", "1"]).up()?;
    let client = cluster.client();
    let body = requests::streamed("blockplane-tiny", &[5, 6, 7], 64);
    let mut signalled = Ok(());
    let outcome = client.run_with("/v1/completions", &body, LIMIT, &mut |so_far| {
        if so_far.chunks == 1 {
            signalled = cluster.leader().and_then(|up| up.signal(Signal::TERM));
        }
        std::ops::ControlFlow::Continue(())
    });
    signalled?;
    let completion = outcome.done()?;
    ensure!(completion.tokens.len() == 64, "{completion:?}");
    let status = cluster.leader()?.wait(STOP)?;
    ensure!(status.success(), "up ended with {status}");
    cluster.stop()
}

/// Losing the launcher itself (kill -9) leaves no orphan behind.
#[test]
fn no_role_outlives_a_killed_launcher() -> Result<()> {
    let mut cluster = ClusterBuilder::new().arguments(&["--threads", "1"]).up()?;
    let up = cluster.leader()?;
    up.signal(Signal::KILL)?;
    up.wait(STOP)?;
    cluster.wait_gone(STOP)?;
    cluster.stop()
}

/// What dies is started again, a little later each time, and the rest goes on meanwhile.
#[test]
fn a_killed_role_is_started_again_with_back_off() -> Result<()> {
    let mut cluster = ClusterBuilder::new().arguments(&["--threads", "1"]).up()?;
    let client = cluster.client();
    let body = requests::completion("blockplane-tiny", &[5, 6, 7], 8);
    let before = client.run("/v1/completions", &body, LIMIT).done()?;
    for (role, delay) in [
        (Role::Decode, "0.5 s"),
        (Role::Decode, "1.0 s"),
        (Role::Prefill, "0.5 s"),
        (Role::Frontend, "0.5 s"),
    ] {
        let killed = cluster.signal(role, Signal::KILL)?;
        let name = format!("{}-0", role.name());
        blockplane_tests::wait::until("the line about the restart", START, || {
            let log = cluster.leader().map_err(|e| e.to_string())?.log();
            log.iter()
                .find(|line| {
                    line.contains(&name) && line.contains("restarting") && line.contains(delay)
                })
                .map(|_| ())
                .ok_or_else(|| log.join("\n"))
        })?;
        let role_is_back = blockplane_tests::wait::until("the role to be back", START, || {
            let pid = cluster.pid(role).map_err(|error| error.to_string())?;
            if pid == killed {
                Err("the killed process".to_owned())
            } else {
                Ok(pid)
            }
        })?;
        ensure!(role_is_back != killed);
        cluster.wait_ready("the deployment to be whole again", |health| {
            health.count("prefill") == 1 && health.count("decode") == 1
        })?;
        let after = client.run("/v1/completions", &body, LIMIT).done()?;
        ensure!(after.tokens == before.tokens, "{before:?} {after:?}");
    }
    cluster.stop()
}
