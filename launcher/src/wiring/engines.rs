//! Starts the engine that a worker's flags ask for.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, ensure};
use blockplane_engine::{
    Engine, HandoffConfig, NativeConfig, NativeEngine, PoolSize, RemotePrefill, SchedulerConfig,
    mock::{MockConfig, MockEngine, MockModel, MockTiming},
    model::{LoadOptions, Model, ModelConfig},
    ops::Compute,
};
use blockplane_kvbm::{KvbmSettings, metrics::Observation};
use blockplane_protocol::{KvLayout, WorkerRole};
use blockplane_transfer::Agent;
use futures::{
    FutureExt,
    future::{BoxFuture, pending},
};

use super::{
    network::agent_config,
    prefill::RpcPrefill,
    tiers::{self, Below},
};
use crate::cli::{ComputeArg, EngineArg, WorkerArgs};

/// Everything an engine is made of.
pub(crate) struct Settings {
    pub(crate) args: WorkerArgs,
    pub(crate) role: WorkerRole,
    pub(crate) model_dir: PathBuf,
    pub(crate) model_name: String,
    /// Name of the transfer agent of an engine that needs one.
    pub(crate) agent: String,
    /// The way to prefill workers, for a decode worker.
    pub(crate) remote: Option<Arc<RpcPrefill>>,
    /// Where the hand-offs run.
    pub(crate) runtime: tokio::runtime::Handle,
    /// The tiers below the pools.
    pub(crate) kvbm: KvbmSettings,
    /// Is told of every request.
    pub(crate) watch: Arc<Observation>,
    /// Is told how many layers of how many are loaded.
    pub(crate) progress: Box<dyn Fn(u32, u32) + Send + Sync>,
}

/// An engine, the tiers below its pools, and when it is over with it, if that can be.
pub(crate) type Started = (Arc<dyn Engine>, Option<Below>, BoxFuture<'static, String>);

/// Starts the engine. Takes as long as loading the weights does.
pub(crate) fn start(settings: &Settings) -> anyhow::Result<Started> {
    match settings.args.engine {
        EngineArg::Native => native(settings),
        EngineArg::Mock => mock(settings),
        EngineArg::Vllm => {
            let engine = crate::vllm::start(settings)?;
            let over = engine.given_up().boxed();
            Ok((engine, None, over))
        }
    }
}

fn native(settings: &Settings) -> anyhow::Result<Started> {
    let args = &settings.args;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = args.threads.unwrap_or(cores);
    ensure!(threads > 0, "--threads is 0; accepted: 1 or more");
    let compute = match args.compute {
        ComputeArg::Bf16 => Compute::Bf16,
        ComputeArg::F32 => Compute::F32,
    };
    let dir = settings.model_dir.display();
    let mut options = LoadOptions::new(compute, threads);
    options.cpu.isa = args.isa;
    let model = Model::load_with_progress(&settings.model_dir, &options, &settings.progress)
        .with_context(|| format!("the model in {dir} cannot be served"))?;
    let mut config = engine_config(settings)?;
    let fingerprint = model.kv_fingerprint(&config.model_name);
    let below = below(
        settings,
        &config,
        model.kv_layout(args.block_tokens()),
        fingerprint,
    )?;
    config.tiers = below.as_ref().map(|below| below.handle.clone());
    let engine = NativeEngine::start(&model, &config)
        .with_context(|| format!("the engine for the model in {dir} cannot be started"))?;
    Ok((engine, below, pending().boxed()))
}

/// A timing model with the vocabulary of the checkpoint, so that its tokens are text.
fn mock(settings: &Settings) -> anyhow::Result<Started> {
    let args = &settings.args;
    let dir = settings.model_dir.display();
    let parameters = ModelConfig::read(&settings.model_dir)
        .with_context(|| format!("the model in {dir} cannot be imitated"))?;
    let tokens = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let model = MockModel {
        vocab_size: tokens(parameters.vocab_size),
        context_tokens_max: tokens(parameters.context_tokens_max),
        eos_token_ids: parameters.eos_token_ids,
        ..MockModel::default()
    };
    let mut engine = engine_config(settings)?;
    let fingerprint = model.kv_fingerprint(&engine.model_name);
    let below = below(
        settings,
        &engine,
        model.kv_layout(args.block_tokens()),
        fingerprint,
    )?;
    engine.tiers = below.as_ref().map(|below| below.handle.clone());
    let config = MockConfig {
        engine,
        model,
        timing: MockTiming {
            prefill_tokens_per_second: args.mock_prefill_tokens_per_s,
            decode_tokens_per_second: args.mock_decode_tokens_per_s,
            speed_up: args.mock_speedup,
            ..MockTiming::default()
        },
    };
    let engine = MockEngine::start(config).context("the mock engine cannot be started")?;
    Ok((Arc::new(engine), below, pending().boxed()))
}

/// The tiers below the pools of such an engine.
fn below(
    settings: &Settings,
    config: &NativeConfig,
    layout: KvLayout,
    fingerprint: u64,
) -> anyhow::Result<Option<Below>> {
    let blocks = match config.pool {
        PoolSize::Blocks(blocks) => Some(blocks.saturating_mul(config.dp_size)),
        PoolSize::Bytes(_) => None,
    };
    let above = tiers::Above {
        agent: config.agent.name().to_owned(),
        layout,
        fingerprint,
        ranks: config.dp_size,
        blocks,
        events_max: config.kv_events_max,
        network: agent_config(&settings.args, config.agent.name().to_owned())?,
    };
    let tiers = tiers::start(&settings.kvbm, &above)?;
    if tiers.is_some() && !config.prefix_caching {
        tracing::warn!("KV tiers: not used, because of --no-prefix-caching");
    }
    Ok(tiers)
}

/// What does not depend on the model.
fn engine_config(settings: &Settings) -> anyhow::Result<NativeConfig> {
    let args = &settings.args;
    let name = settings.model_name.clone();
    let agent = Agent::new(agent_config(args, settings.agent.clone())?)
        .context("the transfer agent cannot be started")?;
    let mut config = NativeConfig::new(name, settings.role, agent);
    config.block_tokens = args.block_tokens();
    config.pool = pool_size(args)?;
    config.dp_size = args.ranks();
    config.prefix_caching = !args.no_prefix_caching;
    config.eviction = settings.kvbm.device_eviction.value;
    config.scheduler = SchedulerConfig {
        max_running: args.max_num_seqs,
        max_waiting: args.max_waiting,
        max_batch_tokens: args.max_num_batched_tokens,
        ..SchedulerConfig::default()
    };
    config.watch = Some(Arc::clone(&settings.watch));
    config.handoff = handoff(settings);
    Ok(config)
}

fn pool_size(args: &WorkerArgs) -> anyhow::Result<PoolSize> {
    if let Some(blocks) = args.blocks {
        return Ok(PoolSize::Blocks(blocks));
    }
    let gb = args.kv_gb;
    ensure!(
        gb.is_finite() && gb > 0.0,
        "--kv-gb is {gb}; accepted: more than 0, in GB (10^9 bytes)"
    );
    let bytes = gb * 1e9 / f64::from(args.ranks());
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and saturating is right for more memory than there can be"
    )]
    Ok(PoolSize::Bytes(bytes as u64))
}

fn handoff(settings: &Settings) -> Option<HandoffConfig> {
    if settings.role == WorkerRole::Aggregated {
        return None;
    }
    let mut config = HandoffConfig::new(settings.runtime.clone());
    config.remote_prefill = settings
        .remote
        .clone()
        .map(|remote| remote as Arc<dyn RemotePrefill>);
    config.remote_prefill_min_tokens = settings.args.remote_prefill_min_tokens;
    Some(config)
}
