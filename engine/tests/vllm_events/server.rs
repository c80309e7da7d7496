//! A `vllm serve` of its own.

use std::{
    env,
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use blockplane_engine::vllm::events::Endpoint;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Tokens per block. CPU attention takes multiples of 32 only.
pub(super) const BLOCK: u32 = 32;
/// On two busy cores it needs up to a minute.
const START: Duration = Duration::from_secs(240);
const REQUEST: Duration = Duration::from_secs(60);

/// The server, its process group, and where its events are.
pub(super) struct Server {
    child: Child,
    folder: TempDir,
    arguments: Vec<String>,
    port: u16,
    pub(super) endpoint: Endpoint,
    pub(super) replay: Endpoint,
}

impl Server {
    /// Starts one, and waits until it serves.
    pub(super) fn start(more: &[&str]) -> Result<Self> {
        let port = free_ports(1)?;
        let events = free_ports(2)?;
        let replay = free_ports(2)?;
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/blockplane-tiny");
        let config = json!({
            "enable_kv_cache_events": true, "publisher": "zmq", "topic": "kv",
            "endpoint": format!("tcp://*:{events}"), "replay_endpoint": format!("tcp://127.0.0.1:{replay}"),
        });
        let (port_text, block) = (port.to_string(), BLOCK.to_string());
        let arguments = [
            "serve",
            model,
            "--host",
            "127.0.0.1",
            "--port",
            &port_text,
            "--served-model-name",
            "tiny",
            "--max-model-len",
            "512",
            "--block-size",
            &block,
            "--enforce-eager",
            "--api-server-count",
            "1",
            "--kv-events-config",
            &config.to_string(),
        ];
        let arguments: Vec<String> = arguments
            .iter()
            .chain(more)
            .map(ToString::to_string)
            .collect();
        let folder = tempfile::tempdir()?;
        let server = Self {
            child: spawn(&arguments, &folder)?,
            folder,
            arguments,
            port,
            endpoint: format!("tcp://127.0.0.1:{events}").parse()?,
            replay: format!("tcp://127.0.0.1:{replay}").parse()?,
        };
        server.wait()
    }

    /// As the kernel ends it when memory is short, and as a supervisor starts it again.
    pub(super) fn kill_and_start_again(&mut self) -> Result<()> {
        self.kill()?;
        self.child = spawn(&self.arguments, &self.folder)?;
        self.wait_ready()
    }

    /// `POST` with a JSON body; the answer has to be a success.
    pub(super) fn post(&self, path: &str, body: &Value) -> Result<String> {
        self.post_with(path, body, "X-Nothing: 0")
    }

    pub(super) fn post_with(&self, path: &str, body: &Value, header: &str) -> Result<String> {
        let body = body.to_string();
        let length = body.len();
        self.exchange(&format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{header}\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        ))
    }

    fn wait(self) -> Result<Self> {
        match self.wait_ready() {
            Ok(()) => Ok(self),
            Err(error) => {
                let log = std::fs::read_to_string(self.log()).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
                Err(error)
            }
        }
    }

    fn wait_ready(&self) -> Result<()> {
        let end = Instant::now() + START;
        let request = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        while let Err(error) = self.exchange(request) {
            if Instant::now() > end {
                return Err(error.context("vLLM does not serve"));
            }
            pause();
        }
        Ok(())
    }

    fn exchange(&self, request: &str) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(REQUEST))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{answer}");
        // vLLM gives lengths, so the body is as it is.
        Ok(body.to_owned())
    }

    fn kill(&mut self) -> Result<()> {
        let id = i32::try_from(self.child.id())?;
        kill_process_group(Pid::from_raw(id).context("an id")?, Signal::KILL)?;
        self.child.wait()?;
        Ok(())
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("vLLM cannot be ended: {error:#}");
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test executable is configured by its environment only"
)]
fn program() -> Result<String> {
    env::var("BLOCKPLANE_VLLM")
        .context("BLOCKPLANE_VLLM has to name the `vllm` of an installation: see tests/vllm_env.py")
}

fn spawn(arguments: &[String], folder: &TempDir) -> Result<Child> {
    let log = File::options()
        .append(true)
        .create(true)
        .open(folder.path().join("log"))?;
    let child = Command::new(program()?)
        .args(arguments)
        .envs([
            ("OMP_NUM_THREADS", "1"),
            ("OMP_WAIT_POLICY", "PASSIVE"),
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
            ("VLLM_CPU_KVCACHE_SPACE", "1"),
            ("TORCHDYNAMO_DISABLE", "1"),
            ("HF_HUB_OFFLINE", "1"),
            ("VLLM_NO_USAGE_STATS", "1"),
            ("VLLM_SERVER_DEV_MODE", "1"),
        ])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Its processes end together.
        .process_group(0)
        .spawn()?;
    Ok(child)
}

/// The first of `count` neighbouring ports that are free.
fn free_ports(count: u16) -> Result<u16> {
    for _ in 0..100 {
        let first = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let all =
            (0..count).map(|more| TcpListener::bind(("0.0.0.0", first.checked_add(more)?)).ok());
        if all.collect::<Option<Vec<_>>>().is_some() {
            return Ok(first);
        }
    }
    bail!("no {count} neighbouring ports are free")
}

#[expect(
    clippy::disallowed_methods,
    reason = "a server that starts gives no event to wait for"
)]
fn pause() {
    std::thread::sleep(Duration::from_millis(200));
}
