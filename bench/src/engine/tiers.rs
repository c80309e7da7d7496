//! Time to the first token of a prompt by where its KV is: nowhere, in the pool, in host memory, on
//! disk, on disk after a restart, and in the host memory of another worker. The whole engine runs, as in a worker, without the network.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use blockplane_engine::{
    Engine, NativeConfig, NativeEngine, PoolSize, SchedulerConfig, TierHandle, model::Model,
};
use blockplane_kvbm::{
    AdmissionConfig, AdmissionKind, ArenaPlace, Fingerprint, PeerParts, PeerTier, PeerTierConfig,
    SlotStore, SlotStoreConfig, TierConfig,
    store::{RecoveredSlot, StoreError, StoreLocation},
    tier::{DiskConfig, RemoteConfig, TierManager, TierParts, host_arena},
};
use blockplane_protocol::{
    GenerateRequest, RequestId, RouteHints, SamplingParams, StopConditions, TokenId, Usage,
    WorkerRole,
};
use blockplane_transfer::{Agent, AgentConfig, Lane};
use futures::StreamExt;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

use super::EngineArgs;
use crate::report::{Record, Report, Samples, Table};

/// Options of this part of `blockplane bench engine`.
#[derive(Clone, Debug, clap::Args)]
pub struct TierArgs {
    /// Measure the time to the first token by tier too, with G3's file in this folder.
    #[arg(long, value_name = "DIR")]
    pub tiers_dir: Option<PathBuf>,
    /// Tokens of the prompt of that.
    #[arg(long, default_value_t = 2000)]
    pub tiers_prompt: u32,
}

/// Where the KV of a prompt is when it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Nowhere,
    Pool,
    Host,
    Disk,
    DiskAfterRestart,
    /// In the G2 of another worker, which is reached by that lane.
    Peer(Lane),
}

/// A worker without its network.
struct Stand {
    engine: Arc<NativeEngine>,
    tiers: Arc<TierManager>,
    /// The agent of the tiers.
    below: Agent,
    peers: Option<Arc<PeerTier>>,
    /// Who has the blocks, if another one has.
    lender: Option<Box<Self>>,
}

/// Name under which the model is served.
const MODEL: &str = "bench";
/// How long copies to lower tiers may take.
const COPIES: Duration = Duration::from_secs(60);

impl From {
    const ALL: [Self; 7] = [
        Self::Nowhere,
        Self::Pool,
        Self::Host,
        Self::Disk,
        Self::DiskAfterRestart,
        Self::Peer(Lane::Shm),
        Self::Peer(Lane::Tcp),
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Nowhere => "recompute",
            Self::Pool => "g1",
            Self::Host => "g2",
            Self::Disk => "g3",
            Self::DiskAfterRestart => "g3-after-restart",
            Self::Peer(Lane::Tcp) => "peer-tcp",
            Self::Peer(_) => "peer-shm",
        }
    }

    /// Tokens that came from where they should.
    const fn cached(self, usage: &Usage) -> u32 {
        match self {
            Self::Nowhere => 0,
            Self::Pool => usage.cached_tokens,
            Self::Host => usage.cached_host_tokens,
            Self::Disk | Self::DiskAfterRestart => usage.cached_disk_tokens,
            Self::Peer(_) => usage.cached_remote_tokens,
        }
    }
}

/// Measures every case and prints them.
pub(super) fn run<W: Write>(
    args: &EngineArgs,
    dir: &Path,
    model: &Arc<Model>,
    report: &mut Report<W>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    let folder =
        tempfile::tempdir_in(dir).with_context(|| format!("{} cannot hold G3", dir.display()))?;
    let mut rng = StdRng::seed_from_u64(args.seed);
    let tokens = args.tiers.tiers_prompt;
    let mut recompute = None;
    let mut table = Table::new(&["first token", "ms p50", "ms p99", "of recompute", "n"]);
    for from in From::ALL {
        let times = runtime.block_on(measure(args, from, folder.path(), model, &mut rng))?;
        let (p50, p99) = (times.median() * 1e3, times.percentile(99) * 1e3);
        let share = p50 / *recompute.get_or_insert(p50);
        let place = args.place(
            "first-token",
            [("tokens", json!(tokens)), ("from", json!(from.name()))],
        );
        let n = times.len() as u64;
        report
            .record(&Record::new("engine", place, "ttft_ms", "ms", p50, n).percentiles(p50, p99))?;
        table.row(vec![
            format!("{tokens} tokens, {}", from.name()),
            format!("{p50:.2}"),
            format!("{p99:.2}"),
            format!("{share:.4}"),
            n.to_string(),
        ]);
    }
    report.table(&table)?;
    Ok(())
}

/// Seconds to the first token of each run.
async fn measure(
    args: &EngineArgs,
    from: From,
    dir: &Path,
    model: &Arc<Model>,
    rng: &mut StdRng,
) -> anyhow::Result<Samples> {
    let mut times = Samples::default();
    let mut stand = Stand::start(args, from, dir, model)?;
    for _ in 0..args.runs {
        let vocab = TokenId::try_from(model.config().vocab_size).unwrap_or(TokenId::MAX);
        let mut prompt = || -> Vec<TokenId> {
            let tokens = 0..args.tiers.tiers_prompt;
            tokens.map(|_| rng.random_range(0..vocab)).collect()
        };
        let (asked, other) = (prompt(), prompt());
        if let Some(lender) = &stand.lender {
            lender.ask(&asked).await?;
            lender.settle()?;
            stand.hear(args)?;
        } else if from != From::Nowhere {
            stand.ask(&asked).await?;
            stand.settle()?;
        }
        if matches!(from, From::Host | From::Disk) {
            // Takes the place of the first one wherever there is no room for two.
            stand.ask(&other).await?;
            stand.settle()?;
        }
        if from == From::DiskAfterRestart {
            stand.stop()?;
            stand = Stand::start(args, from, dir, model)?;
        }
        let (seconds, usage) = stand.ask(&asked).await?;
        let cached = from.cached(&usage);
        let wanted = match from {
            From::Nowhere => 0,
            From::Pool | From::Host | From::Disk | From::DiskAfterRestart | From::Peer(_) => {
                args.tiers.tiers_prompt * 9 / 10
            }
        };
        ensure!(
            cached >= wanted,
            "only {cached} tokens came from {}: {usage:?}",
            from.name()
        );
        times.push(seconds);
    }
    stand.stop()?;
    Ok(times)
}

impl Stand {
    /// An engine whose pool holds one request, above tiers of which the one that is asked for is the
    /// only one with room for two.
    fn start(
        args: &EngineArgs,
        from: From,
        dir: &Path,
        model: &Arc<Model>,
    ) -> anyhow::Result<Self> {
        if !matches!(from, From::Peer(_)) {
            return Self::start_one("bench", args, from, dir, model);
        }
        let mut reader = Self::start_one("bench", args, from, dir, model)?;
        let lender = Self::start_one("bench-lender", args, from, dir, model)?;
        let sides = [&reader, &lender].map(|stand| (stand.peers.as_ref(), stand.below.metadata()));
        let [(Some(reads), reader_at), (Some(lends), lender_at)] = sides else {
            bail!("there is no exchange of blocks");
        };
        reads.add_peer(&lender_at)?;
        lends.add_peer(&reader_at)?;
        reader.lender = Some(Box::new(lender));
        Ok(reader)
    }

    fn start_one(
        name: &str,
        args: &EngineArgs,
        from: From,
        dir: &Path,
        model: &Arc<Model>,
    ) -> anyhow::Result<Self> {
        let agent = |name: &str, lanes: Vec<Lane>| {
            Agent::new(AgentConfig::new(name.to_owned()).with_lanes(lanes))
        };
        // The engine is reached in this process, the other worker as if it was another one.
        let lanes = match from {
            From::Peer(lane) => vec![lane, Lane::Loopback],
            _ => vec![Lane::Loopback],
        };
        let layout = model.kv_layout(args.block_tokens);
        // Room for the tokens that are generated too.
        let request = args.tiers.tiers_prompt.div_ceil(args.block_tokens) + 2;
        let many = request * (2 * args.runs + 4);
        let on_disk = matches!(from, From::Disk | From::DiskAfterRestart);
        let config = TierConfig {
            host_blocks: if on_disk { request } else { many },
            disk: on_disk.then(|| DiskConfig {
                admission: AdmissionConfig::from(AdmissionKind::All),
                ..DiskConfig::new(many)
            }),
            remote: matches!(from, From::Peer(_)).then_some(RemoteConfig {
                write_through: false,
            }),
            ..TierConfig::default()
        };
        let below = agent(&format!("{name}-tiers"), lanes)?;
        let host = host_arena(&below, &layout, &config, ArenaPlace::Host)?;
        let fingerprint = Fingerprint::of(model.kv_fingerprint(MODEL), &layout, 0, 1);
        let store = if on_disk {
            let bytes = layout.block_bytes() as u64;
            let location = StoreLocation::File(dir.join("g3"));
            let store = SlotStoreConfig::new(location, many, bytes, fingerprint);
            Some(open(&below, &store)?)
        } else {
            None
        };
        let peers = match &config.remote {
            None => None,
            Some(_) => {
                let parts = PeerParts {
                    control: below.clone(),
                    agent: below.clone(),
                    host: Arc::clone(&host),
                    fingerprint,
                };
                Some(PeerTier::start(parts, PeerTierConfig::default())?)
            }
        };
        let remote = peers.clone().map(|peers| (peers.clone() as _, peers as _));
        let parts = TierParts {
            agent: below.clone(),
            host,
            store,
            remote,
            hubs: Vec::new(),
        };
        let tiers = Arc::new(TierManager::start(&config, parts)?);
        if let Some(peers) = &peers {
            peers.lend(tiers.host())?;
        }
        let engine = agent(name, vec![Lane::Loopback])?;
        let mut config = NativeConfig::new(MODEL, WorkerRole::Aggregated, engine);
        config.block_tokens = args.block_tokens;
        config.pool = PoolSize::Blocks(request);
        config.scheduler = SchedulerConfig {
            max_running: 1,
            ..SchedulerConfig::default()
        };
        config.tiers = Some(TierHandle {
            manager: Arc::clone(&tiers),
            hubs: Vec::new(),
        });
        let engine = NativeEngine::start(model, &config)?;
        Ok(Self {
            engine,
            tiers,
            below,
            peers,
            lender: None,
        })
    }

    /// Waits until all copies are done.
    fn settle(&self) -> anyhow::Result<()> {
        ensure!(
            self.tiers.flush(COPIES),
            "copies took longer than {COPIES:?}"
        );
        Ok(())
    }

    /// Waits until it knows what the other one has.
    fn hear(&self, args: &EngineArgs) -> anyhow::Result<()> {
        let (Some(peers), Some(lender)) = (&self.peers, &self.lender) else {
            return Ok(());
        };
        let full = args.tiers.tiers_prompt / args.block_tokens;
        let until = Instant::now() + COPIES;
        loop {
            let stats = lender.tiers.host().stats();
            let wanted = (stats.cached + stats.active) as u64;
            if peers.stats().names >= wanted.max(full.into()) {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "it is not heard what the other one has"
            );
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// Ends it as the end of a process does.
    fn stop(self) -> anyhow::Result<()> {
        let Self {
            engine,
            tiers,
            lender,
            ..
        } = self;
        drop(engine);
        ensure!(tiers.stop(COPIES), "copies took longer than {COPIES:?}");
        lender.map_or(Ok(()), |lender| lender.stop())
    }

    /// Asks for two tokens; returns the seconds to the first, and what it cost.
    async fn ask(&self, prompt: &[TokenId]) -> anyhow::Result<(f64, Usage)> {
        let request = GenerateRequest {
            request_id: RequestId("bench".to_owned()),
            model: MODEL.to_owned(),
            token_ids: prompt.to_vec(),
            sampling: SamplingParams::default(),
            stop: StopConditions {
                max_tokens: 2,
                ignore_eos: true,
                ..StopConditions::default()
            },
            logprobs: None,
            cache_salt: None,
            lora_name: None,
            priority: None,
            deadline_ms: 600_000,
            route: RouteHints::default(),
        };
        let start = Instant::now();
        let mut stream = self.engine.generate(request)?;
        let mut first = None;
        while let Some(frame) = stream.next().await {
            let frame = frame?;
            first.get_or_insert_with(|| start.elapsed().as_secs_f64());
            if let (Some(usage), Some(first)) = (frame.usage, first) {
                return Ok((first, usage));
            }
        }
        bail!("the engine ended in the middle of a request");
    }
}

/// Opens a store, which an engine that is on its way out may still hold for a moment.
fn open(
    agent: &Agent,
    config: &SlotStoreConfig,
) -> anyhow::Result<(Arc<SlotStore>, Vec<RecoveredSlot>)> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match SlotStore::open(agent, config) {
            Err(StoreError::InUse { .. }) if Instant::now() < until => std::thread::yield_now(),
            other => return Ok(other?),
        }
    }
}
