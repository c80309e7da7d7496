//! Starts the processes of a node, forwards their logs, restarts what dies or hangs, and stops all
//! of them in order.
//!
//! A child reports on its standard output, one JSON object a line ([`Report`]); what it writes to
//! standard error is its log. It stops when its standard input closes, so that no child outlives a
//! launcher that was killed.

use std::{
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader},
    process::{Child, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    deployment::{NodePlan, ProcessSpec, RoleKind},
    output,
};

/// What a child tells the launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub(crate) enum Report {
    /// It reads a model's weights.
    Loading {
        /// Layers that are ready.
        done: u32,
        /// All layers.
        total: u32,
    },
    /// It takes requests; `detail` says where or with what.
    Ready {
        /// For people.
        detail: String,
    },
    /// A frontend can serve a model.
    Serving {
        /// The model's name.
        model: String,
        /// Base URL.
        url: String,
    },
    /// It is alive. Sent regularly; when it stays away the process is taken for hung.
    Alive,
}

/// State of one process, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Starting {
        pid: u32,
    },
    Loading {
        done: u32,
        total: u32,
    },
    Ready {
        pid: u32,
        detail: String,
    },
    Serving {
        pid: u32,
        model: String,
        url: String,
    },
    Restarting {
        reason: String,
        delay: Duration,
    },
    Stopped,
}

/// A change of one process.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) name: String,
    pub(crate) state: State,
}

/// How often a child says that it is alive.
pub(crate) const ALIVE_INTERVAL: Duration = Duration::from_secs(2);

const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A process that ran this long starts again without delay debt.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// Added to the grace period before a stopping process is killed.
const KILL_MARGIN: Duration = Duration::from_secs(5);
const CHANGES_MAX: usize = 256;

/// The running processes of a node.
#[derive(Debug)]
pub(crate) struct Supervisor {
    tasks: Vec<Supervised>,
}

#[derive(Debug)]
struct Supervised {
    kind: RoleKind,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

struct Keeper {
    spec: ProcessSpec,
    binary: PathBuf,
    log_dir: PathBuf,
    grace: Duration,
    unhealthy_after: Duration,
    changes: mpsc::Sender<Change>,
    stop: watch::Receiver<bool>,
}

enum Ended {
    Stopped,
    Died(String),
}

impl Supervisor {
    /// Starts every process of the plan. State changes arrive on the returned channel.
    pub(crate) fn start(
        plan: &NodePlan,
        run_dir: &Path,
    ) -> anyhow::Result<(Self, mpsc::Receiver<Change>)> {
        let binary = std::env::current_exe().context("the path of this program is not known")?;
        let log_dir = run_dir.join("logs");
        std::fs::create_dir_all(&log_dir)
            .with_context(|| format!("log directory {} cannot be made", log_dir.display()))?;
        let (changes, receiver) = mpsc::channel(CHANGES_MAX);
        let tasks = plan.processes.iter().map(|spec| {
            let (stop, stopped) = watch::channel(false);
            let keeper = Keeper {
                spec: spec.clone(),
                binary: binary.clone(),
                log_dir: log_dir.clone(),
                grace: plan.grace,
                unhealthy_after: plan.unhealthy_after,
                changes: changes.clone(),
                stop: stopped,
            };
            Supervised {
                kind: spec.kind,
                stop,
                task: tokio::spawn(keeper.run()),
            }
        });
        Ok((
            Self {
                tasks: tasks.collect(),
            },
            receiver,
        ))
    }

    /// Stops everything: frontends first so that no request is accepted any more, then the workers
    /// that take requests, then those that only prefill.
    pub(crate) async fn stop(self) {
        let order = |kind| match kind {
            RoleKind::Frontend => 0,
            RoleKind::Decode | RoleKind::Aggregated => 1,
            RoleKind::Prefill => 2,
        };
        let mut tasks = self.tasks;
        tasks.sort_by_key(|task| order(task.kind));
        let mut remaining = tasks.into_iter().peekable();
        while let Some(first) = remaining.next() {
            let rank = order(first.kind);
            let mut group = vec![first];
            while let Some(next) = remaining.next_if(|task| order(task.kind) == rank) {
                group.push(next);
            }
            for task in &group {
                task.stop.send_replace(true);
            }
            for task in group {
                // A keeper that panicked has nothing left to stop.
                let _ = task.task.await;
            }
        }
    }
}

impl Keeper {
    async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let started = Instant::now();
            let ended = match self.run_once().await {
                Ok(ended) => ended,
                Err(error) => Ended::Died(format!("{error:#}")),
            };
            let reason = match ended {
                Ended::Stopped => break,
                Ended::Died(_) if *self.stop.borrow() => break,
                Ended::Died(reason) => reason,
            };
            if started.elapsed() > STABLE_AFTER {
                backoff = BACKOFF_MIN;
            }
            self.change(State::Restarting {
                reason,
                delay: backoff,
            })
            .await;
            tokio::select! {
                () = sleep(backoff) => {}
                () = told_to_stop(&mut self.stop) => break,
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
        self.change(State::Stopped).await;
    }

    async fn run_once(&self) -> anyhow::Result<Ended> {
        let mut child = self.spawn()?;
        let pid = child.id().context("the process ended at once")?;
        self.change(State::Starting { pid }).await;
        // Waiting for a child closes its standard input unless somebody else holds it.
        let _held_open = child
            .stdin
            .take()
            .context("standard input is not connected")?;
        let stdout = child
            .stdout
            .take()
            .context("standard output is not connected")?;
        let stderr = child
            .stderr
            .take()
            .context("standard error is not connected")?;
        let log_path = self.log_dir.join(format!("{}.log", self.spec.name));
        let tail = Arc::new(parking_lot::Mutex::new(String::new()));
        let log = tokio::spawn(forward_log(
            stderr,
            self.spec.name.clone(),
            log_path,
            tail.clone(),
        ));
        let mut reports = BufReader::new(stdout).lines();
        let mut last_alive = Instant::now();
        let mut reporting = true;
        let mut stop = self.stop.clone();
        let ended = loop {
            let hung_at = last_alive + self.unhealthy_after;
            tokio::select! {
                status = child.wait() => break Ended::Died(describe_exit(status?)),
                () = told_to_stop(&mut stop) => {
                    self.terminate(&mut child, pid).await;
                    break Ended::Stopped;
                }
                line = reports.next_line(), if reporting => match line {
                    Ok(Some(line)) => {
                        last_alive = Instant::now();
                        self.report(pid, &line).await;
                    }
                    Ok(None) | Err(_) => reporting = false,
                },
                () = tokio::time::sleep_until(hung_at) => {
                    child.start_kill().context("a hung process cannot be killed")?;
                    child.wait().await?;
                    let secs = self.unhealthy_after.as_secs_f64();
                    break Ended::Died(format!("gave no sign of life for {secs:.0} s and was killed"));
                }
            }
        };
        // The pipe closes with the process unless a grandchild holds it.
        let _ = timeout(Duration::from_secs(1), log).await;
        Ok(match ended {
            Ended::Died(reason) => {
                let last = tail.lock().clone();
                Ended::Died(if last.is_empty() {
                    reason
                } else {
                    format!("{reason}: {last}")
                })
            }
            Ended::Stopped => Ended::Stopped,
        })
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        // Arguments for vLLM may follow, behind which nothing is ours.
        let (subcommand, arguments) = self.spec.argv.split_at(1.min(self.spec.argv.len()));
        Command::new(&self.binary)
            .args(subcommand)
            .arg("--exit-with-parent")
            .args(arguments)
            .envs(&self.spec.variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Its own group: Ctrl-C reaches the launcher alone, which then stops all in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{} cannot be started", self.binary.display()))
    }

    async fn report(&self, pid: u32, line: &str) {
        match serde_json::from_str(line) {
            Ok(Report::Loading { done, total }) => {
                self.change(State::Loading { done, total }).await;
            }
            Ok(Report::Ready { detail }) => self.change(State::Ready { pid, detail }).await,
            Ok(Report::Serving { model, url }) => {
                self.change(State::Serving { pid, model, url }).await;
            }
            Ok(Report::Alive) => {}
            Err(_) => output::diagnostic(&format!("[{}] {line}", self.spec.name)),
        }
    }

    async fn terminate(&self, child: &mut Child, pid: u32) {
        let signalled = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .is_some_and(|pid| kill_process(pid, Signal::TERM).is_ok());
        if signalled
            && timeout(self.grace + KILL_MARGIN, child.wait())
                .await
                .is_ok()
        {
            return;
        }
        output::diagnostic(&format!(
            "[{}] did not stop in time and is killed",
            self.spec.name
        ));
        // It may have ended in between.
        let _ = child.kill().await;
    }

    async fn change(&self, state: State) {
        let change = Change {
            name: self.spec.name.clone(),
            state,
        };
        // Nobody listens any more while the node is going down.
        let _ = self.changes.send(change).await;
    }
}

/// Waits for the word to stop; a supervisor that is gone has said it too.
async fn told_to_stop(stop: &mut watch::Receiver<bool>) {
    let _told = stop.wait_for(|stop| *stop).await;
}

/// Writes a child's log to its file and to our standard error; keeps the last line that is an error.
async fn forward_log(
    stderr: impl AsyncRead + Unpin,
    name: String,
    path: PathBuf,
    tail: Arc<parking_lot::Mutex<String>>,
) {
    let mut file = match tokio::fs::File::options()
        .create(true)
        .append(true)
        .open(&path)
        .await
    {
        Ok(file) => Some(file),
        Err(error) => {
            output::diagnostic(&format!(
                "[{name}] log {} cannot be written: {error}",
                path.display()
            ));
            None
        }
    };
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        output::diagnostic(&format!("[{name}] {line}"));
        if let Some(message) = line.strip_prefix("blockplane: ") {
            message.clone_into(&mut tail.lock());
        }
        if let Some(log) = &mut file
            && let Err(error) = log.write_all(format!("{line}\n").as_bytes()).await
        {
            output::diagnostic(&format!(
                "[{name}] log {} cannot be written: {error}",
                path.display()
            ));
            file = None;
        }
    }
    if let Some(mut log) = file {
        let _ = log.flush().await;
    }
}

fn describe_exit(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}
