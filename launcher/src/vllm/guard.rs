//! The guard of a process group: it runs one program, and ends the whole group when its standard input
//! closes. Its parent holds the other end; however that ends, nothing of the group is left.

use std::process::{ExitCode, Stdio};

use anyhow::Context;
use rustix::process::{Pid, Signal, getpgrp, kill_process, kill_process_group};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use crate::{cli::GuardArgs, role::parent_gone};

/// Runs the program to its end, or to that of our parent.
pub(crate) fn run(args: GuardArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    runtime.block_on(guard(args))
}

async fn guard(args: GuardArgs) -> anyhow::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
    let mut words = args.argv.into_iter();
    let program = words.next().context("no program was given")?;
    let mut child = Command::new(&program)
        .args(words)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("'{}' cannot be started", program.display()))?;
    let gone = parent_gone(true);
    tokio::pin!(gone);
    loop {
        tokio::select! {
            status = child.wait() => return Ok(code(status?)),
            gone = &mut gone => {
                gone?;
                kill_process_group(getpgrp(), Signal::KILL)
                    .context("the process group cannot be ended")?;
                anyhow::bail!("the process group goes on after SIGKILL");
            }
            _ = terminate.recv() => pass_on(&child),
        }
    }
}

fn pass_on(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok());
    if let Some(pid) = pid.and_then(Pid::from_raw) {
        // Where it fails it has ended, which the next turn sees.
        let _ = kill_process(pid, Signal::TERM);
    }
}

/// The status as a shell tells it.
fn code(status: std::process::ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt;
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}
