//! `blockplane worker`: an engine behind RPC, registered in discovery.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use blockplane_engine::Engine;
use blockplane_kvbm::{KvbmSettings, metrics::Observation};
use blockplane_protocol::{EndpointId, ModelCard, WorkerId, WorkerRole};
use blockplane_runtime::{
    discovery::{Discovery, FileDiscovery, FileDiscoveryConfig, Instance},
    lifecycle::{ShutdownGate, ShutdownPlan},
    rpc::{RpcClient, RpcClientConfig, RpcServer, RpcServerConfig},
};

use super::{Reporter, finish, runtime, stop_requested};
use crate::{
    bundled,
    cli::WorkerArgs,
    hub::{self, LocalModel},
    kvbm::observe,
    supervise::Report,
    vllm,
    wiring::{
        descriptor::{GENERATE, WorkerDescriptor},
        engines, handlers,
        network::bind_address,
        peers::{self, KvPeer},
        prefill::RpcPrefill,
        tiers,
    },
};

/// Time for copies to lower tiers to end on shutdown, after the requests have.
const TIERS_STOP: Duration = Duration::from_secs(2);

/// Runs a worker until it is told to stop.
pub(crate) fn run(args: WorkerArgs) -> anyhow::Result<ExitCode> {
    args.check_engine()?;
    let kvbm = args.kvbm.settings()?;
    for note in &kvbm.notes {
        tracing::warn!("{note}");
    }
    let runtime = runtime()?;
    let outcome = runtime.block_on(serve(args, kvbm));
    finish(runtime);
    vllm::clean_up();
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn serve(args: WorkerArgs, kvbm: KvbmSettings) -> anyhow::Result<()> {
    let reporter = Reporter::start(args.exit_with_parent);
    let stop = stop_requested(args.exit_with_parent);
    tokio::pin!(stop);
    let gate = ShutdownGate::new();
    let started = async {
        let identity = {
            let args = args.clone();
            // It may have to download the model.
            tokio::task::spawn_blocking(move || Identity::new(&args))
                .await
                .context("looking for the model failed")??
        };
        let discovery =
            FileDiscovery::new(FileDiscoveryConfig::new(args.discovery.discovery.clone()))?;
        let remote = match identity.role {
            WorkerRole::Decode => {
                let watch = discovery.watch(identity.endpoint.namespace()).await?;
                let client = RpcClient::new(RpcClientConfig::default());
                Some(RpcPrefill::start(
                    client,
                    watch,
                    identity.model_name.clone(),
                ))
            }
            WorkerRole::Aggregated | WorkerRole::Prefill => None,
        };
        let told = kvbm.clone();
        let observation = Observation::start(&told)?;
        let settings = engines::Settings {
            args: args.clone(),
            role: identity.role,
            model_dir: identity.model_dir.clone(),
            model_name: identity.model_name.clone(),
            agent: identity.id.to_string(),
            remote,
            runtime: tokio::runtime::Handle::current(),
            kvbm,
            watch: Arc::clone(&observation),
            progress: Box::new(move |done, total| {
                reporter.report(&Report::Loading { done, total });
            }),
        };
        let (engine, tiers, over) = tokio::task::spawn_blocking(move || engines::start(&settings))
            .await
            .context("starting the engine failed")??;
        let observed = observe(&told, &observation, tiers.clone())?;
        let server = RpcServer::bind(bind_address(&args.host)?, RpcServerConfig::default()).await?;
        handlers::serve(&server, identity.id, &engine, &gate);
        let peers = tiers.as_ref().and_then(|tiers| tiers.peers.clone());
        let kv_peer = peers.as_ref().map(|peers| peers.own.clone());
        let instance = identity.instance(&args, server.local_addr(), engine.as_ref(), kv_peer)?;
        let lease = discovery.register(instance).await?;
        let follower = match peers {
            Some(peers) => {
                let watch = discovery.watch(identity.endpoint.namespace()).await?;
                Some(peers::follow(peers, watch, identity.id))
            }
            None => None,
        };
        let observed = (observed, follower);
        anyhow::Ok((
            identity, discovery, engine, tiers, observed, server, lease, over,
        ))
    };
    let (identity, _discovery, engine, tiers, _observed, server, lease, over) = tokio::select! {
        started = started => started?,
        reason = &mut stop => {
            tracing::info!(reason = reason?, "stopped before it was ready");
            return Ok(());
        }
    };
    reporter.report(&Report::Ready {
        detail: identity.summary(engine.as_ref(), &server),
    });

    let (reason, lost) = tokio::select! {
        reason = stop => (reason?, None),
        lost = over => ("the engine is lost", Some(lost)),
    };
    tracing::info!(reason, grace = ?args.grace, "stopping: unregister, drain, tear down");
    gate.begin();
    let plan = ShutdownPlan {
        grace: args.grace,
        ..ShutdownPlan::default()
    };
    let unregister = async {
        if let Err(error) = lease.revoke().await {
            tracing::warn!(%error, "the worker could not be unregistered; its entry expires");
        }
    };
    let teardown = async {
        engine.drain(Duration::ZERO).await;
        server.shutdown(Duration::ZERO).await;
        if let Some(tiers) = tiers {
            let stop = move || tiers::stop(&tiers.handle.manager, TIERS_STOP);
            // It logs what it could not do.
            let _ = tokio::task::spawn_blocking(stop).await;
        }
    };
    let report = gate.run(plan, unregister, teardown).await;
    tracing::info!(
        running = report.running,
        cancelled = report.cancelled,
        "stopped"
    );
    match lost {
        Some(reason) => Err(anyhow::anyhow!(
            "the engine of this worker is lost: {reason}"
        )),
        None => Ok(()),
    }
}

/// Who this worker is.
struct Identity {
    id: WorkerId,
    name: String,
    role: WorkerRole,
    endpoint: EndpointId,
    model_dir: PathBuf,
    model_name: String,
}

impl Identity {
    fn new(args: &WorkerArgs) -> anyhow::Result<Self> {
        let role = args.worker_role();
        let endpoint = match &args.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => EndpointId::new("blockplane", role.as_str(), GENERATE)?,
        };
        ensure!(
            endpoint.endpoint() == GENERATE,
            "--endpoint {endpoint}: a worker serves the endpoint '{GENERATE}'; accepted: \
             dyn://NAMESPACE.COMPONENT.{GENERATE}"
        );
        let LocalModel { dir, id } = match &args.model {
            Some(name) => hub::resolve(name, &args.hub)?,
            None => {
                let near = args.discovery.discovery.parent();
                LocalModel {
                    dir: bundled::unpack(near.unwrap_or_else(|| Path::new(".")))?,
                    id: None,
                }
            }
        };
        let model_dir = dir;
        let model_name = match args.served_model_name.clone().or(id) {
            Some(name) => name,
            None => model_dir
                .file_name()
                .with_context(|| {
                    let dir = model_dir.display();
                    format!("model directory {dir} has no name; give --served-model-name")
                })?
                .to_string_lossy()
                .into_owned(),
        };
        let pid = std::process::id();
        let name = args
            .name
            .clone()
            .unwrap_or_else(|| format!("{}-{pid}", role.as_str()));
        Ok(Self {
            id: WorkerId(rand::random()),
            name,
            role,
            endpoint,
            model_dir,
            model_name,
        })
    }

    fn instance(
        &self,
        args: &WorkerArgs,
        rpc: SocketAddr,
        engine: &dyn Engine,
        kv_peer: Option<KvPeer>,
    ) -> anyhow::Result<Instance> {
        let info = engine.info();
        let card = ModelCard {
            name: self.model_name.clone(),
            path: self
                .model_dir
                .to_str()
                .with_context(|| {
                    format!(
                        "model directory {} is not valid UTF-8",
                        self.model_dir.display()
                    )
                })?
                .to_owned(),
            context_tokens_max: info.context_tokens_max,
            vocab_size: info.vocab_size,
            eos_token_ids: info.eos_token_ids.clone(),
            kv_layout: info.layout.clone(),
            blocks: info.blocks,
            dp_size: info.dp_size,
            role: self.role,
        };
        let descriptor = WorkerDescriptor {
            name: self.name.clone(),
            pid: std::process::id(),
            card,
            kv_peer,
        };
        Ok(Instance {
            id: self.id,
            endpoint: self.endpoint.clone(),
            address: format!("{}:{}", args.host, rpc.port()),
            metadata: serde_json::to_value(descriptor)?,
        })
    }

    fn summary(&self, engine: &dyn Engine, server: &RpcServer) -> String {
        let info = engine.info();
        let ranks = if info.dp_size > 1 {
            format!(", {} ranks", info.dp_size)
        } else {
            String::new()
        };
        format!(
            "{} {} at {}, model {}, {} blocks of {} tokens{ranks}",
            self.role.as_str(),
            self.id,
            server.local_addr(),
            self.model_name,
            info.blocks,
            info.layout.block_tokens,
        )
    }
}
