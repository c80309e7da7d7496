//! `blockplane launch` and `blockplane up`: one node's processes, from start to a clean stop.
//!
//! `up` is `launch` with a deployment that is made from its flags instead of read from a file.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    bundled,
    cli::{LaunchArgs, RouterModeArg, UpArgs, UpMode},
    deployment::{Deployment, Node, NodePlan, Role, RoleKind},
    output,
    supervise::{Change, State, Supervisor},
};

/// `blockplane launch FILE --node NAME`.
pub(crate) fn launch(args: &LaunchArgs) -> anyhow::Result<ExitCode> {
    let deployment = Deployment::read(&args.file)?;
    let plan = deployment.plan(&args.node)?;
    let run_dir = RunDir::open(args.run_dir.clone().or_else(|| plan.run_dir.clone()))?;
    output::line(&format!(
        "blockplane {}: node {} of {}, {} processes",
        env!("CARGO_PKG_VERSION"),
        args.node,
        args.file.display(),
        plan.processes.len()
    ));
    supervise(&plan, &run_dir)
}

/// `blockplane up`.
pub(crate) fn up(args: UpArgs) -> anyhow::Result<ExitCode> {
    let run_dir = RunDir::open(args.run_dir.clone())?;
    let model = match &args.model {
        Some(dir) => dir
            .canonicalize()
            .with_context(|| format!("model directory {} cannot be opened", dir.display()))?,
        None => bundled::unpack(&run_dir.path)?,
    };
    let mode = args.mode;
    let deployment = built_in_deployment(args, model, &run_dir.path)?;
    let plan = deployment.plan(UP_NODE)?;
    output::line(&format!(
        "blockplane {}: mode {}, {} processes, logs in {}",
        env!("CARGO_PKG_VERSION"),
        mode_name(mode),
        plan.processes.len(),
        run_dir.path.join("logs").display()
    ));
    supervise(&plan, &run_dir)
}

const UP_NODE: &str = "local";

fn built_in_deployment(args: UpArgs, model: PathBuf, run_dir: &Path) -> anyhow::Result<Deployment> {
    let disaggregated = matches!(args.mode, UpMode::Disagg | UpMode::DisaggRouter);
    ensure!(
        disaggregated || args.prefill.unwrap_or(0) == 0,
        "--prefill {} needs --mode disagg or disagg-router; mode {} has no prefill workers",
        args.prefill.unwrap_or(0),
        mode_name(args.mode)
    );
    let router_mode = match args.mode {
        UpMode::Agg | UpMode::Disagg => RouterModeArg::RoundRobin,
        UpMode::AggRouter | UpMode::DisaggRouter | UpMode::Dep => RouterModeArg::Kv,
    };
    let grace = format!("{}", args.grace.as_secs_f64());
    let mut frontend = Role {
        http_host: Some(args.http_host.clone()),
        http_port: Some(args.http_port),
        router_mode: Some(router_mode),
        seed: args.seed,
        args: vec!["--grace".to_owned(), grace.clone()],
        ..Role::new(RoleKind::Frontend)
    };
    frontend
        .args
        .extend(args.frontend_args.split_whitespace().map(str::to_owned));
    let worker = |kind, count| {
        let mut role = Role {
            count,
            engine: Some(args.engine),
            compute: Some(args.compute),
            threads: args.threads,
            block_size: args.block_size,
            blocks: args.blocks,
            lanes: args.lanes.clone(),
            args: vec!["--grace".to_owned(), grace.clone()],
            ..Role::new(kind)
        };
        role.args
            .extend(args.worker_args.split_whitespace().map(str::to_owned));
        role
    };
    let mut roles = vec![frontend];
    match args.mode {
        UpMode::Agg | UpMode::AggRouter => {
            roles.push(worker(RoleKind::Aggregated, args.decode.unwrap_or(1)));
        }
        UpMode::Disagg | UpMode::DisaggRouter => {
            roles.push(worker(RoleKind::Prefill, args.prefill.unwrap_or(1)));
            roles.push(worker(RoleKind::Decode, args.decode.unwrap_or(1)));
        }
        UpMode::Dep => {
            let ranks = Some(args.decode.unwrap_or(2));
            roles.push(Role {
                data_parallel_size: ranks,
                ..worker(RoleKind::Aggregated, 1)
            });
        }
    }
    roles.retain(|role| role.count > 0);
    let node = Node {
        grace_secs: Some(args.grace.as_secs_f64()),
        roles,
        ..Node::default()
    };
    Ok(Deployment {
        namespace: "blockplane".to_owned(),
        discovery: Some(format!("file:{}", run_dir.join("discovery").display())),
        model: Some(model),
        served_model_name: args.served_model_name,
        kvbm: BTreeMap::new(),
        source: String::new(),
        nodes: BTreeMap::from([(UP_NODE.to_owned(), node)]),
    })
}

const fn mode_name(mode: UpMode) -> &'static str {
    match mode {
        UpMode::Agg => "agg",
        UpMode::AggRouter => "agg-router",
        UpMode::Disagg => "disagg",
        UpMode::DisaggRouter => "disagg-router",
        UpMode::Dep => "dep",
    }
}

/// A directory for logs, sockets and discovery; removed at the end when nobody named it.
#[derive(Debug)]
struct RunDir {
    path: PathBuf,
    temporary: bool,
}

impl RunDir {
    fn open(named: Option<PathBuf>) -> anyhow::Result<Self> {
        let temporary = named.is_none();
        let path = named.unwrap_or_else(|| {
            std::env::temp_dir().join(format!("blockplane-up-{}", std::process::id()))
        });
        std::fs::create_dir_all(&path)
            .with_context(|| format!("run directory {} cannot be made", path.display()))?;
        let path = path
            .canonicalize()
            .with_context(|| format!("run directory {} cannot be opened", path.display()))?;
        Ok(Self { path, temporary })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.temporary
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(dir = %self.path.display(), %error, "run directory was left behind");
        }
    }
}

fn supervise(plan: &NodePlan, run_dir: &RunDir) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let (supervisor, mut changes) = Supervisor::start(plan, &run_dir.path)?;
        tokio::select! {
            () = show_changes(&mut changes, plan) => {}
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        output::line("stopping");
        tokio::select! {
            () = supervisor.stop() => {}
            () = show_changes(&mut changes, plan) => {}
        }
        while let Ok(change) = changes.try_recv() {
            show(&change);
        }
        output::line("stopped");
        Ok(ExitCode::SUCCESS)
    })
}

/// Prints state changes, and how to send a request once all processes are up and a model is served.
async fn show_changes(changes: &mut mpsc::Receiver<Change>, plan: &NodePlan) {
    let mut states: BTreeMap<String, State> = BTreeMap::new();
    let mut introduced = false;
    while let Some(change) = changes.recv().await {
        show(&change);
        states.insert(change.name, change.state);
        let all_up = plan.processes.iter().all(|process| {
            matches!(
                states.get(&process.name),
                Some(State::Ready { .. } | State::Serving { .. })
            )
        });
        let serving = states.values().find_map(|state| match state {
            State::Serving { model, url, .. } => Some((model, url)),
            State::Starting { .. }
            | State::Ready { .. }
            | State::Restarting { .. }
            | State::Stopped => None,
        });
        if let Some((model, url)) = serving
            && all_up
            && !introduced
        {
            introduced = true;
            introduce(model, url);
        }
    }
    // Every keeper is gone; whoever asked for that goes on by its own signal.
    std::future::pending::<()>().await;
}

fn show(change: &Change) {
    let text = match &change.state {
        State::Starting { pid } => format!("starting    pid {pid}"),
        State::Ready { pid, detail } => format!("ready       pid {pid}, {detail}"),
        State::Serving { pid, model, url } => {
            format!("serving     pid {pid}, model {model} at {url}")
        }
        State::Restarting { reason, delay } => {
            format!("restarting  in {:.1} s: {reason}", delay.as_secs_f64())
        }
        State::Stopped => "stopped".to_owned(),
    };
    output::line(&format!("  {:<14} {text}", change.name));
}

fn introduce(model: &str, url: &str) {
    let body = serde_json::json!({
        "model": model,
        "messages": [{"role": "user", "content": "Hello, how are you?"}],
        "max_tokens": 32,
    });
    output::line(&format!("listening on {url}, model {model}; try:"));
    output::line(&format!(
        "curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    ));
    output::line("Ctrl-C stops everything.");
}
