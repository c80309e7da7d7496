//! The process of a vLLM server: started, read, ended.
//!
//! It runs below a *guard*, a small process that ends the whole process group as soon as its standard
//! input closes. So nothing of vLLM, which starts processes of its own, outlives a worker that is
//! killed.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fmt,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, ChildStdin, Command},
    task::JoinHandle,
    time::timeout,
};

use super::VllmError;

/// Last lines of the log that are repeated in a message.
const TAIL_LINES_MAX: usize = 8;
/// A longer line of the log is cut into several.
const LINE_BYTES_MAX: usize = 16 << 10;
/// For the rest of a log after the end of its process.
const LOG_REST: Duration = Duration::from_millis(500);

/// Takes a line of a server's log.
pub type OnLog = Arc<dyn Fn(&str) + Send + Sync>;

/// How a server is started.
#[derive(Clone)]
pub struct ServerCommand {
    /// The guard: a program with arguments, to which the command line of vLLM is added. It starts that
    /// program in its own process group, passes SIGTERM on to it, ends with its status, and kills the
    /// process group when its standard input closes.
    pub guard: Vec<OsString>,
    /// `vllm` and its arguments.
    pub argv: Vec<OsString>,
    /// Added to the environment.
    pub variables: Vec<(String, String)>,
    /// The address that it will listen on.
    pub url: String,
    /// From start to ready: reading weights and compiling may take long.
    pub start_timeout: Duration,
    /// From SIGTERM to SIGKILL. Requests are over by then.
    pub stop_timeout: Duration,
    /// Its log, line by line.
    pub on_log: OnLog,
}

/// A running server. Dropping it kills the process group.
#[derive(Debug)]
pub(super) struct Server {
    guard: Child,
    /// The guard and its group.
    pid: Option<Pid>,
    /// Held open for as long as the server shall live.
    _alive: ChildStdin,
    tail: Arc<Mutex<VecDeque<String>>>,
    logs: Vec<JoinHandle<()>>,
}

impl fmt::Debug for ServerCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCommand")
            .field("argv", &self.argv)
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Starts the process.
    pub(super) fn spawn(command: &ServerCommand) -> Result<Self, VllmError> {
        let program = command.argv.first().cloned().unwrap_or_default();
        let fault = |source: std::io::Error| VllmError::Spawn {
            program: program.to_string_lossy().into_owned(),
            source,
        };
        let mut words = command.guard.iter().chain(&command.argv);
        let first = words.next().cloned().unwrap_or_default();
        let mut guard = Command::new(first)
            .args(words)
            .envs(command.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(fault)?;
        let pid = guard.id().and_then(|id| i32::try_from(id).ok());
        let missing = || fault(std::io::Error::other("a pipe to it is missing"));
        let alive = guard.stdin.take().ok_or_else(missing)?;
        let out = guard.stdout.take().ok_or_else(missing)?;
        let err = guard.stderr.take().ok_or_else(missing)?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let follow = |source: Box<dyn AsyncRead + Send + Unpin>| {
            tokio::spawn(follow(
                source,
                Arc::clone(&command.on_log),
                Arc::clone(&tail),
            ))
        };
        let logs = vec![follow(Box::new(out)), follow(Box::new(err))];
        Ok(Self {
            guard,
            pid: pid.and_then(Pid::from_raw),
            _alive: alive,
            tail,
            logs,
        })
    }

    /// Waits for its end and says how it ended. Cancel safe.
    pub(super) async fn ended(&mut self) -> String {
        let status = self.guard.wait().await;
        for log in self.logs.iter_mut().filter(|log| !log.is_finished()) {
            // A process of its that lives on may hold the pipe.
            let _ = timeout(LOG_REST, log).await;
        }
        self.kill_group();
        let status = status.map_or_else(|error| error.to_string(), describe);
        let tail = self.tail.lock();
        let lines: Vec<&str> = tail.iter().map(String::as_str).collect();
        if lines.is_empty() {
            status
        } else {
            format!("{status}; its last lines:\n  {}", lines.join("\n  "))
        }
    }

    /// Ends it: politely, and after `limit` by force.
    pub(super) async fn stop(&mut self, limit: Duration) {
        if let Some(pid) = self.pid
            && kill_process(pid, Signal::TERM).is_ok()
            && timeout(limit, self.guard.wait()).await.is_ok()
        {
            self.kill_group();
            return;
        }
        self.kill().await;
    }

    /// Ends it now.
    pub(super) async fn kill(&mut self) {
        self.kill_group();
        // It is not there any more, or about to be.
        let _ = self.guard.wait().await;
    }

    /// Once: the number of a group that is gone may become that of another.
    fn kill_group(&mut self) {
        if let Some(pid) = self.pid.take() {
            // Nobody is left, where it fails.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill_group();
    }
}

/// Hands on a log line by line until it is closed.
async fn follow(
    mut source: Box<dyn AsyncRead + Send + Unpin>,
    on_log: OnLog,
    tail: Arc<Mutex<VecDeque<String>>>,
) {
    let tell = |line: &[u8]| {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end();
        if text.is_empty() {
            return;
        }
        on_log(text);
        let mut tail = tail.lock();
        if tail.len() == TAIL_LINES_MAX {
            tail.pop_front();
        }
        tail.push_back(text.to_owned());
    };
    let mut buffer = Vec::with_capacity(LINE_BYTES_MAX);
    loop {
        match source.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let mut start = 0;
        while let Some(length) = buffer[start..].iter().position(|&byte| byte == b'\n') {
            tell(&buffer[start..start + length]);
            start += length + 1;
        }
        buffer.drain(..start);
        if buffer.len() >= LINE_BYTES_MAX {
            tell(&buffer);
            buffer.clear();
        }
    }
    tell(&buffer);
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it exited with status {code}"),
        (None, Some(signal)) => format!("it was killed by signal {signal}"),
        (None, None) => "it ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sh` as a guard that guards nothing: enough to see the process of a server.
    fn shell(script: &str) -> (ServerCommand, Arc<Mutex<Vec<String>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        let command = ServerCommand {
            guard: vec!["sh".into(), "-c".into()],
            argv: vec![script.into()],
            variables: vec![("GREETING".to_owned(), "hello".to_owned())],
            url: "http://127.0.0.1:1".to_owned(),
            start_timeout: Duration::from_secs(5),
            stop_timeout: Duration::from_secs(5),
            on_log: Arc::new(move |line: &str| seen.lock().push(line.to_owned())),
        };
        (command, lines)
    }

    #[tokio::test]
    async fn the_end_is_told_with_the_last_lines() {
        let (command, lines) =
            shell("echo $GREETING; for i in 1 2 3 4 5 6 7 8 9; do echo $i; done; exit 3");
        let mut server = Server::spawn(&command).unwrap();
        let end = server.ended().await;
        assert!(
            end.starts_with("it exited with status 3; its last lines:\n  2\n"),
            "{end}"
        );
        assert_eq!(lines.lock()[..2], ["hello", "1"]);
    }

    #[tokio::test]
    async fn the_whole_group_ends_by_force_when_it_does_not_by_itself() {
        // The grandchild would outlive its parent, and holds its log open.
        let (command, lines) = shell("trap '' TERM; (trap '' TERM; sleep 60) & echo up; wait");
        let mut server = Server::spawn(&command).unwrap();
        while lines.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        let group = server.pid.unwrap();
        server.stop(Duration::from_millis(100)).await;
        let gone = async {
            while rustix::process::test_kill_process_group(group).is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(5), gone)
            .await
            .expect("nobody of the group is left");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let (mut command, _) = shell("");
        command.guard.clear();
        command.argv = vec!["/no/such/vllm".into()];
        let error = Server::spawn(&command).unwrap_err().to_string();
        assert!(error.contains("/no/such/vllm"), "{error}");
    }
}
