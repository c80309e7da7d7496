//! What a process of a deployment is: a frontend with its router, or a worker.

pub(crate) mod frontend;
pub(crate) mod worker;

use std::{io::stdin, os::fd::AsFd, time::Duration};

use anyhow::Context;
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
};

use crate::{
    output,
    supervise::{ALIVE_INTERVAL, Report},
};

/// Tells the launcher something, or a person at a terminal who started this process by hand.
#[derive(Clone, Copy, Debug)]
struct Reporter {
    to_launcher: bool,
}

impl Reporter {
    /// Starts to report; towards a launcher also that this process is alive.
    fn start(to_launcher: bool) -> Self {
        let reporter = Self { to_launcher };
        if to_launcher {
            tokio::spawn(async move {
                let mut tick = tokio::time::interval(ALIVE_INTERVAL);
                loop {
                    tick.tick().await;
                    reporter.report(&Report::Alive);
                }
            });
        }
        reporter
    }

    fn report(self, report: &Report) {
        if self.to_launcher {
            let json = serde_json::to_string(report).expect("a report is plain data");
            output::line(&json);
            return;
        }
        match report {
            Report::Ready { detail } => output::line(&format!("ready: {detail}")),
            Report::Serving { model, url } => {
                output::line(&format!("serving model {model} at {url}"));
            }
            // A person by hand reads a line when it is done.
            Report::Loading { .. } | Report::Alive => {}
        }
    }
}

/// Waits until this process shall stop: SIGINT, SIGTERM, or the end of the launcher.
async fn stop_requested(exit_with_parent: bool) -> anyhow::Result<&'static str> {
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        gone = parent_gone(exit_with_parent) => gone.map(|()| "the launcher has ended")?,
    })
}

/// Completes when standard input, a pipe whose other end the launcher holds, is closed.
pub(crate) async fn parent_gone(watched: bool) -> anyhow::Result<()> {
    if !watched {
        return std::future::pending().await;
    }
    let pipe = stdin().as_fd().try_clone_to_owned()?;
    let mut pipe = pipe::Receiver::from_owned_fd(pipe)
        .context("--exit-with-parent needs a pipe as standard input")?;
    // Nobody writes to it: whatever comes, the other end is gone.
    let _ended = pipe.read(&mut [0; 1]).await;
    Ok(())
}

/// The async runtime of a role. Requests are small messages; the work is on the engine's threads.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .enable_all()
        .build()
        .context("the async runtime cannot be started")
}

/// Ends the process in time even if a blocking task does not.
fn finish(runtime: tokio::runtime::Runtime) {
    runtime.shutdown_timeout(Duration::from_secs(1));
}
