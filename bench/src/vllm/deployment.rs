//! Our frontend and a worker in front of a server that runs already.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::client::Server;

/// How often it is asked whether they serve.
const POLL: Duration = Duration::from_millis(100);

/// The processes. They end when it is dropped.
#[derive(Debug)]
pub(super) struct Deployment {
    pub(super) url: String,
    children: Vec<Child>,
    _folder: TempDir,
}

impl Deployment {
    /// Starts both, and waits until they serve.
    pub(super) async fn start(model: &Path, vllm: &str, limit: Duration) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("a folder for discovery")?;
        let discovery = format!("file:{}", folder.path().display());
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let http_port = port.to_string();
        let model = model.display().to_string();
        let frontend = [
            "frontend",
            "--http-port",
            &http_port,
            "--namespace",
            "bench",
        ];
        let worker = [
            "worker", "--engine", "vllm", "--attach", vllm, "--model", &model,
        ];
        let worker_more = [
            "--role",
            "aggregated",
            "--endpoint",
            "dyn://bench.vllm.generate",
        ];
        let mut deployment = Self {
            url: format!("http://127.0.0.1:{port}"),
            children: Vec::new(),
            _folder: folder,
        };
        for words in [&frontend[..], &[&worker[..], &worker_more].concat()] {
            deployment.children.push(start(words, &discovery)?);
        }
        deployment.wait(limit).await?;
        Ok(deployment)
    }

    async fn wait(&mut self, limit: Duration) -> anyhow::Result<()> {
        let server = Server::new(&self.url, POLL * 10)?;
        let end = Instant::now() + limit;
        loop {
            // Status 503 until a worker serves.
            if server.get("/health").await.is_ok() && !server.models().await?.is_empty() {
                return Ok(());
            }
            for child in &mut self.children {
                if let Some(status) = child.try_wait()? {
                    anyhow::bail!("a process of ours ended with {status} before it served");
                }
            }
            ensure!(
                Instant::now() < end,
                "our worker did not serve within {limit:?}"
            );
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        for child in &mut self.children {
            // They hold nothing that has to be kept.
            let _it_may_be_gone = child.kill();
            let _it_is_gone = child.wait();
        }
    }
}

fn start(words: &[&str], discovery: &str) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("the path of this program is not known")?;
    Command::new(&program)
        .args(words)
        .args(["--discovery", discovery])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {} {}", program.display(), words[0]))
}
