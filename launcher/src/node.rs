//! `blockplane launch` and `blockplane up`: one node's processes, from start to a clean stop.
//!
//! `up` is `launch` with a deployment that is made from its flags instead of read from a file.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    bundled,
    cli::{LaunchArgs, RouterModeArg, UpArgs, UpMode},
    deployment::{Deployment, Node, NodePlan, Role, RoleKind},
    hub::{self, LocalModel},
    output,
    supervise::Supervisor,
    view::View,
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
    supervise(&plan, &run_dir, args.plain)
}

/// `blockplane up`.
pub(crate) fn up(mut args: UpArgs) -> anyhow::Result<ExitCode> {
    let run_dir = RunDir::open(args.run_dir.clone())?;
    let model = match &args.model {
        Some(name) => {
            let LocalModel { dir, id } = hub::resolve(name, &args.hub)?;
            args.served_model_name = args.served_model_name.or(id);
            dir
        }
        None => bundled::unpack(&run_dir.path)?,
    };
    let (mode, plain) = (args.mode, args.plain);
    let deployment = built_in_deployment(args, model, &run_dir.path)?;
    let plan = deployment.plan(UP_NODE)?;
    output::line(&format!(
        "blockplane {}: mode {}, {} processes, logs in {}",
        env!("CARGO_PKG_VERSION"),
        mode_name(mode),
        plan.processes.len(),
        run_dir.path.join("logs").display()
    ));
    supervise(&plan, &run_dir, plain)
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
    let by_prefix = matches!(
        args.mode,
        UpMode::AggRouter | UpMode::DisaggRouter | UpMode::Dep
    );
    let without_cache = args.vllm_args.iter().any(|word| {
        matches!(
            word.replace('_', "-").as_str(),
            "--no-enable-prefix-caching"
        )
    });
    ensure!(
        !(by_prefix && without_cache),
        "mode {} routes by cached prefixes, and --no-enable-prefix-caching leaves none; use --mode agg or \
         disagg, or leave it out",
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
            compute: args.compute,
            threads: args.threads,
            block_size: args.block_size,
            blocks: args.blocks,
            lanes: args.lanes.clone(),
            vllm_program: args.vllm_program.clone(),
            vllm_args: args.vllm_args.clone(),
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

fn supervise(plan: &NodePlan, run_dir: &RunDir, plain: bool) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let (supervisor, mut changes) = Supervisor::start(plan, &run_dir.path)?;
        let mut view = View::open(plan, plain);
        tokio::select! {
            () = view.follow(&mut changes) => {}
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        view.close();
        output::line("stopping");
        tokio::select! {
            () = supervisor.stop() => {}
            () = view.follow(&mut changes) => {}
        }
        while let Ok(change) = changes.try_recv() {
            view.take(change);
        }
        output::line("stopped");
        Ok(ExitCode::SUCCESS)
    })
}
