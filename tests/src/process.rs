//! One process: its log, its signals, its end.

use std::{
    fmt,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use parking_lot::{Condvar, Mutex};
pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

use crate::{proc_table, wait};

/// A started process. Dropping it kills it.
pub struct Process {
    name: String,
    child: Child,
    log: Arc<Log>,
    /// The test has waited for its end, and so knows about it.
    ended: bool,
}

#[derive(Default)]
struct Log {
    text: Mutex<Text>,
    grown: Condvar,
}

#[derive(Default)]
struct Text {
    lines: Vec<String>,
    /// Pipes that have reached their end.
    closed: usize,
}

/// Standard output and standard error.
const PIPES: usize = 2;
/// How long the rest of a log may take after the end of its process. It only takes longer when a child
/// of the process still holds the pipe.
const REST: Duration = Duration::from_secs(2);

impl Process {
    /// Starts `binary` with `arguments` and the environment `variables` added to ours.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(
        name: &str,
        binary: &Path,
        arguments: &[String],
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let mut child = Command::new(binary)
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {} {}", binary.display(), arguments.join(" ")))?;
        let log = Arc::new(Log::default());
        for (pipe, source) in [
            ("out", child.stdout.take().map(boxed)),
            ("err", child.stderr.take().map(boxed)),
        ] {
            let source = source.context("a pipe was asked for")?;
            let log = Arc::clone(&log);
            std::thread::Builder::new()
                .name(format!("{name}-{pipe}"))
                .spawn(move || log.follow(source))
                .context("a thread that reads a log")?;
        }
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
            ended: false,
        })
    }

    /// Its name in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// The process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        send(self.pid(), signal)
    }

    /// Waits for the end of the process, and for the rest of its log.
    ///
    /// # Errors
    /// It is still there after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        let status = wait::until(&format!("the end of {name}"), limit, || {
            match self.child.try_wait() {
                Ok(Some(status)) => Ok(status),
                Ok(None) => Err(format!("{:?}", proc_table::entry(self.pid()))),
                Err(error) => Err(error.to_string()),
            }
        })?;
        self.ended = true;
        let end = Instant::now() + REST;
        let mut text = self.log.text.lock();
        while text.closed < PIPES && !self.log.grown.wait_until(&mut text, end).timed_out() {}
        Ok(status)
    }

    /// Whether [`Self::wait`] has seen its end.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        self.ended
    }

    /// Everything it wrote so far, standard output and error together, line by line.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.log.text.lock().lines.clone()
    }

    /// Waits for a line that holds `text` and returns it.
    ///
    /// # Errors
    /// There is none after `limit`.
    pub fn wait_for_line(&self, text: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        let mut log = self.log.text.lock();
        loop {
            if let Some(line) = log.lines.iter().find(|line| line.contains(text)) {
                return Ok(line.clone());
            }
            if self.log.grown.wait_until(&mut log, end).timed_out() {
                bail!("{} wrote no line with {text:?} within {limit:?}", self.name);
            }
        }
    }
}

/// Sends `signal` to the process with this id.
///
/// # Errors
/// There is no such process.
pub fn send(pid: u32, signal: Signal) -> Result<()> {
    let id = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("{pid} is not a process id"))?;
    kill_process(id, signal).with_context(|| format!("send {signal:?} to process {pid}"))
}

fn boxed(source: impl Read + Send + 'static) -> Box<dyn Read + Send> {
    Box::new(source)
}

impl Log {
    fn follow(&self, source: Box<dyn Read + Send>) {
        let mut source = BufReader::new(source);
        let mut line = Vec::new();
        while source.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            self.text.lock().lines.push(text);
            self.grown.notify_all();
            line.clear();
        }
        self.text.lock().closed += 1;
        self.grown.notify_all();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // A stopped process does not get it before it runs again, except for SIGKILL.
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("name", &self.name)
            .field("pid", &self.child.id())
            .finish_non_exhaustive()
    }
}
