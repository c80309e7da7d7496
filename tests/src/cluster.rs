//! A deployment of real processes.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::{
    client::Client,
    fixtures, health,
    proc_table::{self, Entry},
    process::{self, Process, Signal},
    wait,
};

/// How long a deployment of tiny checkpoints may take to serve its first request. Generous: a test
/// machine may run several at once.
pub const START: Duration = Duration::from_secs(60);
/// How long a graceful stop may take.
pub const STOP: Duration = Duration::from_secs(30);

/// What a process of a deployment does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// HTTP and routing.
    Frontend,
    /// Fills KV blocks of decode workers.
    Prefill,
    /// Generates tokens, with KV from prefill workers where it can.
    Decode,
    /// Does both.
    Aggregated,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterBuilder {
    checkpoint: Option<PathBuf>,
    arguments: Vec<String>,
    frontend_arguments: Vec<String>,
    worker_arguments: Vec<String>,
    variables: Vec<(String, String)>,
    start: Duration,
}

/// A running deployment. Dropping it kills every process of it, and prints the logs unless
/// [`Cluster::stop`] found everything in order before.
#[derive(Debug)]
pub struct Cluster {
    folder: TempDir,
    mark: String,
    builder: ClusterBuilder,
    port: u16,
    members: Vec<(Role, Process)>,
    /// Workers started by hand so far.
    started: u32,
    stopped: bool,
}

impl Role {
    /// Its name on the command line and in `/health`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Frontend => "frontend",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Aggregated => "aggregated",
        }
    }
}

impl Default for ClusterBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl ClusterBuilder {
    /// A deployment of the checkpoint that the binary serves when it is told none.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            checkpoint: None,
            arguments: Vec::new(),
            frontend_arguments: Vec::new(),
            worker_arguments: Vec::new(),
            variables: Vec::new(),
            start: START,
        }
    }

    /// Gives it this long to serve, instead of [`START`].
    #[must_use]
    pub const fn start_within(mut self, limit: Duration) -> Self {
        self.start = limit;
        self
    }

    /// Sets a variable in the environment of every process.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &dyn std::fmt::Display) -> Self {
        self.variables.push((name.to_owned(), value.to_string()));
        self
    }

    /// Serves the checkpoint of this folder.
    #[must_use]
    pub fn checkpoint(mut self, folder: &Path) -> Self {
        self.checkpoint = Some(folder.to_owned());
        self
    }

    /// Adds arguments of `blockplane up`.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|&text| text.to_owned()));
        self
    }

    /// Adds arguments of every `blockplane frontend` that the test starts by hand.
    #[must_use]
    pub fn frontend_arguments(mut self, arguments: &[&str]) -> Self {
        self.frontend_arguments
            .extend(arguments.iter().map(|&text| text.to_owned()));
        self
    }

    /// Adds arguments of every `blockplane worker` that the test starts by hand.
    #[must_use]
    pub fn worker_arguments(mut self, arguments: &[&str]) -> Self {
        self.worker_arguments
            .extend(arguments.iter().map(|&text| text.to_owned()));
        self
    }

    /// Starts `blockplane up` and waits until it serves and all of its workers are known.
    ///
    /// # Errors
    /// It does not start, or is not ready within [`START`].
    pub fn up(self) -> Result<Cluster> {
        let mut cluster = self.empty()?;
        let port = cluster.port.to_string();
        let mut arguments: Vec<String> = ["up", "--http-port", &port, "--run-dir"]
            .map(str::to_owned)
            .into();
        arguments.push(cluster.run_dir().display().to_string());
        if let Some(folder) = &cluster.builder.checkpoint {
            arguments.extend(["--model".to_owned(), folder.display().to_string()]);
        }
        arguments.extend(cluster.builder.arguments.iter().cloned());
        let up = cluster.start("up", &arguments)?;
        cluster.members.push((Role::Frontend, up));
        let mark = cluster.mark.clone();
        cluster.wait_ready("`blockplane up` to serve", |health| {
            [Role::Prefill, Role::Decode, Role::Aggregated]
                .iter()
                .all(|&role| health.count(role.name()) == with_role(&mark, role).len())
        })?;
        Ok(cluster)
    }

    /// Starts a frontend and these workers, one process after the other as a person would in several
    /// terminals, and waits until the frontend knows all of them.
    ///
    /// # Errors
    /// One does not start, or they are not ready within [`START`].
    pub fn by_hand(self, workers: &[Role]) -> Result<Cluster> {
        let mut cluster = self.empty()?;
        cluster.start_frontend()?;
        for &role in workers {
            cluster.start_worker(role)?;
        }
        cluster.wait_ready("all workers started by hand", |health| {
            workers.iter().all(|role| {
                let wanted = workers.iter().filter(|&other| other == role).count();
                health.count(role.name()) == wanted
            })
        })?;
        Ok(cluster)
    }

    /// A cluster without processes, for a test that starts them itself.
    ///
    /// # Errors
    /// No folder or port is to be had.
    pub fn empty(self) -> Result<Cluster> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cluster = Cluster {
            folder: tempfile::Builder::new()
                .prefix("blockplane-test")
                .tempdir()?,
            mark: format!("{}-{number}", std::process::id()),
            builder: self,
            port: free_port()?,
            members: Vec::new(),
            started: 0,
            stopped: false,
        };
        std::fs::create_dir_all(cluster.run_dir())?;
        Ok(cluster)
    }
}

impl Cluster {
    /// A client of its frontend.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::new(SocketAddr::from((Ipv4Addr::LOCALHOST, self.port)))
    }

    /// The HTTP port of its frontend.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// A folder that lives as long as the cluster.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The run directory of `up` and `launch`.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// The discovery argument of processes started by hand.
    #[must_use]
    pub fn discovery(&self) -> String {
        format!("file:{}", self.folder.path().join("discovery").display())
    }

    /// Starts any command of the binary as a part of this cluster. The caller keeps it.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(&self, name: &str, arguments: &[String]) -> Result<Process> {
        let mut variables = vec![(proc_table::MARK, self.mark.as_str())];
        let given = self.builder.variables.iter();
        variables.extend(given.map(|(name, value)| (name.as_str(), value.as_str())));
        Process::start(name, &fixtures::binary()?, arguments, &variables)
    }

    /// Starts `blockplane frontend`.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start_frontend(&mut self) -> Result<()> {
        let (port, discovery) = (self.port.to_string(), self.discovery());
        let mut arguments: Vec<String> = [
            "frontend",
            "--http-port",
            &port,
            "--namespace",
            "test",
            "--discovery",
            &discovery,
        ]
        .map(str::to_owned)
        .into();
        arguments.extend(self.builder.frontend_arguments.iter().cloned());
        let frontend = self.start("frontend", &arguments)?;
        self.members.push((Role::Frontend, frontend));
        Ok(())
    }

    /// Starts `blockplane worker` and returns its process id.
    ///
    /// # Errors
    /// The process cannot be started, or no checkpoint was named.
    pub fn start_worker(&mut self, role: Role) -> Result<u32> {
        self.start_worker_with(role, &[])
    }

    /// The same with arguments of its own.
    ///
    /// # Errors
    /// The process cannot be started, or no checkpoint was named.
    pub fn start_worker_with(&mut self, role: Role, more: &[&str]) -> Result<u32> {
        let checkpoint = self.builder.checkpoint.clone();
        let checkpoint = checkpoint.context("a worker started by hand needs a checkpoint")?;
        let endpoint = format!("dyn://test.{}.generate", role.name());
        let name = format!("{}-{}", role.name(), self.started);
        let mut arguments: Vec<String> = [
            "worker",
            "--role",
            role.name(),
            "--endpoint",
            &endpoint,
            "--name",
            &name,
            "--discovery",
            &self.discovery(),
            "--model",
            &checkpoint.display().to_string(),
        ]
        .map(str::to_owned)
        .into();
        arguments.extend(self.builder.worker_arguments.iter().cloned());
        arguments.extend(more.iter().map(|&text| text.to_owned()));
        let worker = self.start(&name, &arguments)?;
        self.started += 1;
        let pid = worker.pid();
        self.members.push((role, worker));
        Ok(pid)
    }

    /// Waits until a request would be served and `condition` holds.
    ///
    /// # Errors
    /// Not within the time to start, or a process that the test started has ended.
    pub fn wait_ready(
        &mut self,
        what: &str,
        condition: impl Fn(&health::Health) -> bool,
    ) -> Result<health::Health> {
        let client = self.client();
        wait::until(what, self.builder.start, || {
            for (_, member) in self.members.iter().filter(|(_, p)| !p.has_ended()) {
                let ended = proc_table::entry(member.pid()).is_none_or(|e| e.state == 'Z');
                if ended {
                    // Not worth waiting for: report it at once, as a success of the wait.
                    return Ok(Err(format!("{} has ended", member.name())));
                }
            }
            match health::Health::read(&client) {
                Ok(health) if health.ready && condition(&health) => Ok(Ok(health)),
                Ok(health) => Err(format!("{health:?}")),
                Err(error) => Err(format!("{error:#}")),
            }
        })?
        .map_err(|ended| anyhow::anyhow!("while waiting for {what}: {ended}"))
    }

    /// The processes of this role, also those that `up` or `launch` started, by ascending id.
    #[must_use]
    pub fn processes(&self, role: Role) -> Vec<Entry> {
        with_role(&self.mark, role)
    }

    /// Every process of this cluster.
    #[must_use]
    pub fn all_processes(&self) -> Vec<Entry> {
        proc_table::marked(&self.mark)
    }

    /// Id of the only process of this role.
    ///
    /// # Errors
    /// There is none, or more than one.
    pub fn pid(&self, role: Role) -> Result<u32> {
        match self.processes(role).as_slice() {
            [one] => Ok(one.pid),
            others => bail!("expected one {} process, found {others:?}", role.name()),
        }
    }

    /// Sends `signal` to the only process of this role and returns its id.
    ///
    /// # Errors
    /// There is not exactly one.
    pub fn signal(&self, role: Role, signal: Signal) -> Result<u32> {
        let pid = self.pid(role)?;
        process::send(pid, signal)?;
        Ok(pid)
    }

    /// The process that `up` (or `launch`, or the frontend started by hand) runs in.
    ///
    /// # Errors
    /// The test has not started one.
    pub fn leader(&mut self) -> Result<&mut Process> {
        self.members
            .first_mut()
            .map(|(_, process)| process)
            .context("nothing was started")
    }

    /// Takes over a process that the test started with [`Self::start`].
    pub fn adopt(&mut self, role: Role, process: Process) {
        self.members.push((role, process));
    }

    /// A process that the test started, by id.
    ///
    /// # Errors
    /// The test has started none with this id.
    pub fn member(&mut self, pid: u32) -> Result<&mut Process> {
        self.members
            .iter_mut()
            .map(|(_, process)| process)
            .find(|process| process.pid() == pid)
            .with_context(|| format!("process {pid} was not started by the test"))
    }

    /// Kills a process that the test started, as a crash would end it, and waits for its end.
    ///
    /// # Errors
    /// The test has started none with this id, or it does not end.
    pub fn kill(&mut self, pid: u32) -> Result<()> {
        let member = self.member(pid)?;
        member.signal(Signal::KILL)?;
        member.wait(STOP)?;
        Ok(())
    }

    /// Waits until no process of the cluster is left.
    ///
    /// # Errors
    /// One is left after `limit`.
    pub fn wait_gone(&self, limit: Duration) -> Result<()> {
        wait::until("the end of every process", limit, || {
            let left = self.all_processes();
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        })
    }

    /// Stops the deployment as a person would, with Ctrl-C to the leader and to the processes started
    /// by hand (but for those whose end the test has waited for), and asserts that everything ends
    /// cleanly: status 0, nothing left, no panic.
    ///
    /// # Errors
    /// Any of that does not hold.
    pub fn stop(mut self) -> Result<()> {
        let running = |process: &Process| !process.has_ended();
        for (_, process) in self.members.iter().filter(|(_, p)| running(p)) {
            process.signal(Signal::INT)?;
        }
        for (_, process) in self.members.iter_mut().filter(|(_, p)| running(p)) {
            let status = process.wait(STOP)?;
            ensure!(status.success(), "{} ended with {status}", process.name());
        }
        self.wait_gone(STOP)?;
        self.assert_no_panic()?;
        self.stopped = true;
        Ok(())
    }

    /// Asserts that no process of the cluster has panicked.
    ///
    /// # Errors
    /// A log shows a panic.
    pub fn assert_no_panic(&self) -> Result<()> {
        for (name, text) in self.logs() {
            ensure!(!text.contains("panicked at"), "{name} panicked:\n{text}");
        }
        Ok(())
    }

    /// Logs by name: what the test's own processes wrote, and the `*.log` files of the run directory.
    #[must_use]
    pub fn logs(&self) -> Vec<(String, String)> {
        let mut logs: Vec<(String, String)> = self
            .members
            .iter()
            .map(|(_, process)| (process.name().to_owned(), process.log().join("\n")))
            .collect();
        log_files(&self.run_dir(), &mut logs);
        logs
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for entry in self.all_processes() {
            process::send(entry.pid, Signal::KILL).ok();
        }
        self.members.iter_mut().for_each(|(_, process)| {
            process.wait(Duration::from_secs(5)).ok();
        });
        if !self.stopped {
            for (name, text) in self.logs() {
                eprintln!("---- log of {name} ----\n{text}");
            }
        }
    }
}

fn with_role(mark: &str, role: Role) -> Vec<Entry> {
    let mut entries = proc_table::marked(mark);
    entries.retain(|entry| match role {
        Role::Frontend => entry.arguments.get(1).is_some_and(|a| a == "frontend"),
        Role::Prefill | Role::Decode | Role::Aggregated => {
            entry.arguments.get(1).is_some_and(|a| a == "worker")
                && entry.has_option("--role", role.name())
        }
    });
    entries
}

/// A port of the loopback interface that nobody listens on now.
///
/// # Errors
/// There is none.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

fn log_files(folder: &Path, logs: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            log_files(&path, logs);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            logs.push((path.display().to_string(), text));
        }
    }
}
