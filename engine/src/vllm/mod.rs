//! An engine that is a vLLM server: started and kept by this one, or attached to.
//!
//! Requests go to it as token ids over HTTP and come back as token ids; templates, tokenising, stop
//! strings and parsers stay in the frontend, as with every engine.
//!
//! * `client`, `request`, `answer`: HTTP, our requests in vLLM's words, its answers in ours.
//! * `run`: one request from start to end; `handoff`: its prompt computed on another server.
//! * [`arguments`]: the command line of a server that is started.
//! * `facts`: what the server says of itself, and what the checkpoint says.
//! * [`events`]: its KV events, as an event feed.
//! * `server`, `keeper`: the process, its health, its restarts. `load`, `metrics`: its load.

mod answer;
pub mod arguments;
mod client;
pub mod events;
mod facts;
mod handoff;
mod keeper;
mod load;
mod metrics;
mod request;
mod run;
mod server;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use blockplane_kvbm::EventFeed;
use blockplane_protocol::{
    DpRank, GenerateError, GenerateRequest, LoadReport, PrefillJob, RequestId, RouteHints,
    SamplingParams, StopConditions, WorkerRole,
};
use futures::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    task::JoinHandle,
};
use xxhash_rust::xxh3::xxh3_64;

use self::{
    client::Http,
    facts::CheckpointFacts,
    keeper::{Order, Serving},
    load::{Entry, Load},
    request::Target,
    run::{Cancel, Generation},
};
use crate::{
    engine::{Engine, EngineInfo, Health},
    error::{RequestError, validate_parameters},
    stream::{PrefillTicket, TokenStream, prefill_channel, token_channel},
};
pub use client::HttpError;
use events::{Endpoint, EndpointError, EventsConfig, VllmEvents};
pub use facts::{Route, ServerFacts};
pub use handoff::RemotePrefillConfig;
pub use keeper::HealthConfig;
pub use server::{OnLog, ServerCommand};

/// KV events kept for each rank for subscribers that are behind.
const EVENTS_MAX: usize = 65_536;

/// Configuration of a [`VllmEngine`].
#[derive(Clone, Debug)]
pub struct VllmConfig {
    /// Name under which the model is served to us.
    pub model_name: String,
    /// What part of a request it does.
    pub role: WorkerRole,
    /// Folder of the checkpoint that the server serves: what `config.json` says is not asked of the
    /// server.
    pub checkpoint: PathBuf,
    /// The server.
    pub source: VllmSource,
    /// Tokens per KV block that the server has to have; any when `None`.
    pub block_tokens: Option<u32>,
    /// Where it publishes KV events; without it routers know nothing of its cache.
    pub events: Option<EventsSource>,
    /// The server orders requests by priority: it was started with `--scheduling-policy priority`.
    pub by_priority: bool,
    /// The way to prefill workers, for a decode worker; without it the server computes all prompts.
    pub remote: Option<RemotePrefillConfig>,
    /// How its health is watched.
    pub health: HealthConfig,
    /// Where requests run. Needs time and I/O.
    pub runtime: Handle,
}

/// Where the server is.
#[derive(Clone, Debug)]
pub enum VllmSource {
    /// It is started, kept and stopped by this engine.
    Start(ServerCommand),
    /// Somebody else keeps it, at `http://HOST:PORT`.
    Attach(String),
}

/// Where a server publishes KV events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventsSource {
    /// Of rank 0; `tcp://HOST:PORT` (each further rank has the next port) or `ipc://PATH`.
    pub endpoint: String,
    /// Where rank 0 answers who missed some, if it does.
    pub replay: Option<String>,
    /// Their topic.
    pub topic: String,
}

/// Why a vLLM server cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VllmError {
    /// It does not give an answer that is needed.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Its process cannot be started.
    #[error("'{program}' cannot be started: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// It ended before it was ready.
    #[error("vLLM ended before it was ready: {end}")]
    Ended {
        /// How, with the last lines of its log.
        end: String,
    },
    /// It was not ready in time.
    #[error("vLLM was not ready within {limit:?}")]
    StartTimeout {
        /// How long it had.
        limit: Duration,
    },
    /// The checkpoint cannot be read.
    #[error("{path}: {reason}")]
    Checkpoint {
        /// The file.
        path: String,
        /// Why.
        reason: String,
    },
    /// Its KV events are nowhere.
    #[error("vLLM's KV events: {0}")]
    Events(#[from] EndpointError),
    /// It is not what is needed.
    #[error("this vLLM server cannot be used: {reason}")]
    Unfit {
        /// Why, and what would be.
        reason: String,
    },
}

/// The engine. See the module documentation.
#[derive(Debug)]
pub struct VllmEngine {
    shared: Arc<Shared>,
    runtime: Handle,
    orders: watch::Sender<Order>,
    keeper: Mutex<Option<JoinHandle<()>>>,
    /// Of each rank, in their order; none when the server publishes none.
    events: Vec<VllmEvents>,
    draining: watch::Sender<Drain>,
}

/// What requests, keeper and engine share.
#[derive(Debug)]
struct Shared {
    http: Http,
    info: EngineInfo,
    facts: ServerFacts,
    load: Arc<Load>,
    serving: watch::Sender<Serving>,
    command: Option<ServerCommand>,
    remote: Option<RemotePrefillConfig>,
    /// What another server needs to have the same to hand KV over.
    identity: String,
    health: HealthConfig,
    canary: GenerateRequest,
    by_priority: bool,
    /// Asks the keeper to look at the server's health at once.
    look_now: Notify,
    /// Requests sent so far: makes their names unique on the server.
    sent: AtomicU64,
}

/// How far the engine is with leaving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Drain {
    No,
    /// Takes nothing new.
    Draining,
    /// What still runs is cancelled.
    Cancelled,
    Stopped,
}

impl VllmConfig {
    /// The defaults for this model, role and server, with requests on `runtime`.
    #[must_use]
    pub fn new(
        model_name: impl Into<String>,
        role: WorkerRole,
        checkpoint: impl Into<PathBuf>,
        source: VllmSource,
        runtime: Handle,
    ) -> Self {
        Self {
            model_name: model_name.into(),
            role,
            checkpoint: checkpoint.into(),
            source,
            block_tokens: None,
            events: None,
            by_priority: false,
            remote: None,
            health: HealthConfig::default(),
            runtime,
        }
    }
}

impl VllmEngine {
    /// Starts the server where it is to be started, and returns when it has generated a token.
    ///
    /// # Errors
    /// When the server does not start, does not answer, or is not what the configuration needs.
    pub async fn start(config: VllmConfig) -> Result<Arc<Self>, VllmError> {
        let checkpoint = CheckpointFacts::read(&config.checkpoint)?;
        let (http, server, command) = match config.source {
            VllmSource::Attach(url) => {
                let http = Http::new(&url)?;
                http.get("/health", config.health.timeout).await?;
                (http, None, None)
            }
            VllmSource::Start(command) => {
                let http = Http::new(&command.url)?;
                let server = keeper::start(&command, &http).await?;
                (http, Some(server), Some(command))
            }
        };
        let facts = ServerFacts::read(&http).await?;
        facts.check(config.block_tokens)?;
        tracing::info!(
            version = facts.version,
            url = http.base(),
            route = facts.route.path(),
            model = facts.model,
            context = facts.context_tokens_max,
            blocks = facts.blocks,
            block_tokens = facts.block_tokens,
            ranks = facts.dp_size,
            prefix_caching = facts.prefix_caching,
            "vLLM is ready"
        );
        let layout = checkpoint.layout(facts.block_tokens);
        let events = match &config.events {
            Some(source) => follow(source, &facts, &config.runtime)?,
            None => Vec::new(),
        };
        let identity = facts.identity(&config.model_name);
        let info = EngineInfo {
            model_fingerprint: xxh3_64(identity.as_bytes()),
            model: config.model_name,
            role: config.role,
            layout,
            blocks: facts.blocks,
            dp_size: facts.dp_size,
            context_tokens_max: facts.context_tokens_max,
            vocab_size: checkpoint.vocab_size,
            eos_token_ids: checkpoint.eos_token_ids,
        };
        let canary = match config.health.canary.clone() {
            Some(canary) => canary,
            None => default_canary(),
        };
        let shared = Arc::new(Shared {
            http,
            load: Load::new(facts.dp_size, facts.blocks, facts.block_tokens),
            info,
            facts,
            serving: watch::Sender::new(Serving::Ready),
            command,
            remote: config.remote,
            identity,
            health: config.health,
            canary,
            by_priority: config.by_priority,
            look_now: Notify::new(),
            sent: AtomicU64::new(0),
        });
        // The first token takes longer than others: no client shall wait for it.
        for rank in (0..shared.facts.dp_size).map(DpRank) {
            keeper::canary(&shared, rank, shared.health.canary_timeout).await?;
        }
        let (orders, told) = watch::channel(Order::Keep);
        let keeper = config
            .runtime
            .spawn(keeper::keep(Arc::clone(&shared), server, told));
        Ok(Arc::new(Self {
            shared,
            runtime: config.runtime,
            orders,
            keeper: Mutex::new(Some(keeper)),
            events,
            draining: watch::Sender::new(Drain::No),
        }))
    }

    /// Completes with the reason when the server will not come back: it was started too often in vain.
    pub fn given_up(&self) -> impl Future<Output = String> + Send + use<> {
        let mut serving = self.shared.serving.subscribe();
        async move {
            loop {
                if let Serving::GivenUp(reason) = &*serving.borrow_and_update() {
                    return reason.clone();
                }
                if serving.changed().await.is_err() {
                    // The engine is gone, and with it the question.
                    return std::future::pending().await;
                }
            }
        }
    }

    /// What the server says of itself.
    #[must_use]
    pub fn facts(&self) -> &ServerFacts {
        &self.shared.facts
    }

    /// Runs `work` until it is cancelled or the engine is drained. Ending it closes its connection, by
    /// which vLLM knows to give the request up.
    fn while_wanted(&self, cancel: Cancel, work: impl Future<Output = ()> + Send + 'static) {
        let mut draining = self.draining.subscribe();
        self.runtime.spawn(async move {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                _ = draining.wait_for(|drain| *drain >= Drain::Cancelled) => {}
                () = work => {}
            }
        });
    }

    /// How well the KV events of each rank are followed; nothing when the server publishes none.
    #[must_use]
    pub fn events_status(&self) -> Vec<events::EventsStatus> {
        self.events.iter().map(VllmEvents::status).collect()
    }

    /// Whether a request may start now; then it is in the books.
    fn admit(&self, request: &GenerateRequest) -> Result<Entry, RequestError> {
        match self.health() {
            Health::Ready => Ok(self
                .shared
                .load
                .enter(request.route.rank, request.token_ids.len())),
            Health::Draining | Health::Stopped => Err(RequestError::Draining),
            Health::Unhealthy { reason } => Err(RequestError::Unhealthy { reason }),
        }
    }
}

impl Engine for VllmEngine {
    fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    fn generate(&self, request: GenerateRequest) -> Result<TokenStream, GenerateError> {
        self.shared.refuse_role(WorkerRole::Prefill, "generate")?;
        self.shared.validate(&request)?;
        let entry = self.admit(&request)?;
        let cancel = Cancel::default();
        let on_cancel = cancel.clone();
        let (sender, stream) = token_channel(Box::new(move || on_cancel.cancel()));
        let shared = Arc::clone(&self.shared);
        let generation = Generation::new(request, sender, entry);
        self.while_wanted(cancel, async move { run::run(&shared, generation).await });
        Ok(stream)
    }

    fn prefill(&self, job: PrefillJob) -> Result<PrefillTicket, GenerateError> {
        let PrefillJob { request, target } = job;
        for refused in [WorkerRole::Decode, WorkerRole::Aggregated] {
            self.shared
                .refuse_role(refused, "prefill for other workers")?;
        }
        self.shared.validate(&request)?;
        handoff::check(&target, &self.shared.identity)?;
        let entry = self.admit(&request)?;
        let cancel = Cancel::default();
        let on_cancel = cancel.clone();
        let (sender, ticket) = prefill_channel(Box::new(move || on_cancel.cancel()));
        let shared = Arc::clone(&self.shared);
        self.while_wanted(cancel, async move {
            sender.finish(handoff::prefill(&shared, &request, entry).await);
        });
        Ok(ticket)
    }

    fn load(&self) -> Vec<LoadReport> {
        let mut reports = self.shared.load.reports();
        for (report, events) in reports.iter_mut().zip(&self.events) {
            report.events = events.status().report();
        }
        reports
    }

    fn events(&self, rank: DpRank) -> Option<EventFeed> {
        Some(self.events.get(rank.0 as usize)?.feed())
    }

    fn drain(&self, grace: Duration) -> BoxFuture<'static, ()> {
        let draining = self.draining.clone();
        draining.send_if_modified(|drain| {
            let first = *drain == Drain::No;
            if first {
                *drain = Drain::Draining;
            }
            first
        });
        let load = Arc::clone(&self.shared.load);
        let orders = self.orders.clone();
        let keeper = self.keeper.lock().take();
        self.runtime
            .spawn(async move {
                // Those that do not end in time are cancelled.
                let _ = tokio::time::timeout(grace, load.idle()).await;
                draining.send_modify(|drain| *drain = (*drain).max(Drain::Cancelled));
                load.idle().await;
                orders.send_replace(Order::Stop);
                if let Some(keeper) = keeper {
                    // It logs what it could not do.
                    let _ = keeper.await;
                }
                draining.send_replace(Drain::Stopped);
            })
            .map(|_| ())
            .boxed()
    }

    fn health(&self) -> Health {
        match *self.draining.borrow() {
            Drain::No => {}
            Drain::Draining | Drain::Cancelled => return Health::Draining,
            Drain::Stopped => return Health::Stopped,
        }
        match &*self.shared.serving.borrow() {
            Serving::Ready => Health::Ready,
            Serving::Down(reason) | Serving::GivenUp(reason) => Health::Unhealthy {
                reason: reason.clone(),
            },
            Serving::Stopped => Health::Stopped,
        }
    }
}

impl Drop for VllmEngine {
    fn drop(&mut self) {
        self.draining.send_replace(Drain::Stopped);
        self.orders.send_replace(Order::Stop);
    }
}

impl Shared {
    fn refuse_role(&self, refused: WorkerRole, what: &'static str) -> Result<(), RequestError> {
        let role = self.info.role;
        if role == refused {
            return Err(RequestError::Role { role, what });
        }
        Ok(())
    }

    /// Everything that vLLM would refuse, and what we do.
    fn validate(&self, request: &GenerateRequest) -> Result<(), RequestError> {
        validate_parameters(request, &self.info)?;
        let salt = request.cache_salt.as_deref().unwrap_or_default();
        let chars = salt.chars().count();
        if chars > request::CACHE_SALT_CHARS_MAX {
            return Err(RequestError::CacheSalt {
                chars,
                limit: request::CACHE_SALT_CHARS_MAX,
            });
        }
        Ok(())
    }

    fn target(&self) -> Target<'_> {
        Target {
            route: self.facts.route,
            model: &self.facts.model,
            context_tokens_max: self.facts.context_tokens_max,
            by_priority: self.by_priority,
        }
    }

    /// The headers of a request. It is given a name that no other one on the server has.
    fn headers(&self, request: &GenerateRequest) -> Vec<(&'static str, String)> {
        let name = self.name(&request.request_id.0).0;
        let rank = (self.info.dp_size > 1).then_some(request.route.rank.0);
        request::headers(&name, rank)
    }

    fn name(&self, base: &str) -> RequestId {
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        RequestId(format!("{base}-{number}"))
    }
}

impl ServerFacts {
    /// What two servers need to have the same to hand KV to each other, in words.
    fn identity(&self, model_name: &str) -> String {
        format!(
            "vLLM {}, model {model_name}, blocks of {} tokens, KV of type {}",
            self.version, self.block_tokens, self.kv_dtype
        )
    }

    fn check(&self, block_tokens: Option<u32>) -> Result<(), VllmError> {
        let unfit = |reason: String| Err(VllmError::Unfit { reason });
        if let Some(wanted) = block_tokens
            && wanted != self.block_tokens
        {
            return unfit(format!(
                "it has blocks of {} tokens and --block-size is {wanted}; start it with --block-size \
                 {wanted}, or leave --block-size out here",
                self.block_tokens
            ));
        }
        Ok(())
    }

    /// Refuses a server that came back as another one: routers know the first. How many blocks it has
    /// depends on what else is in the memory of its GPU.
    fn same_as(&self, now: &Self) -> Result<(), VllmError> {
        let expected = Self {
            blocks: now.blocks,
            ..self.clone()
        };
        if expected == *now {
            return Ok(());
        }
        Err(VllmError::Unfit {
            reason: format!("it came back as another one: it was {self:?} and is {now:?}"),
        })
    }
}

/// Follows the events of all ranks.
fn follow(
    source: &EventsSource,
    facts: &ServerFacts,
    runtime: &Handle,
) -> Result<Vec<VllmEvents>, VllmError> {
    let endpoint: Endpoint = source.endpoint.parse()?;
    let replay = source.replay.as_deref().map(str::parse::<Endpoint>);
    let replay = replay.transpose()?;
    let one = |rank| {
        let config = EventsConfig {
            endpoint: endpoint.clone(),
            replay: replay.clone(),
            topic: source.topic.clone(),
            rank: DpRank(rank),
            block_tokens: facts.block_tokens,
            // Tiers of vLLM's own, below its pool, may hold some times as much.
            blocks_max: (facts.blocks as usize).saturating_mul(8).max(1 << 16),
            events_max: EVENTS_MAX,
        };
        VllmEvents::start(config, runtime).map_err(VllmError::from)
    };
    (0..facts.dp_size).map(one).collect()
}

fn default_canary() -> GenerateRequest {
    GenerateRequest {
        request_id: RequestId("canary".to_owned()),
        model: String::new(),
        token_ids: vec![1],
        sampling: SamplingParams::default(),
        stop: StopConditions {
            max_tokens: 1,
            ignore_eos: true,
            ..StopConditions::default()
        },
        logprobs: None,
        cache_salt: None,
        lora_name: None,
        priority: None,
        deadline_ms: 0,
        route: RouteHints::default(),
    }
}
