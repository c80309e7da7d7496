//! Engines with a stand-in model, alone and in pairs over real transfers.

mod aggregated;
mod disagg;
mod fake;
mod lower;
mod shelf;
mod tiers;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use blockplane_kvbm::{EvictionKind, PoolStats};
use blockplane_protocol::{
    ConnectorTarget, ErrorKind, FinishReason, GenerateError, GenerateRequest, PrefillHint,
    PrefillJob, PrefillReply, PrefillTarget, RequestId, RouteHints, SamplingParams, StopConditions,
    TokenId, Usage, WorkerId, WorkerRole,
};
use blockplane_transfer::{Agent, AgentConfig, FaultConfig, Lane};
use futures::{FutureExt, StreamExt, future::BoxFuture};
use parking_lot::Mutex;
use tokio::runtime;

use self::{
    fake::{BLOCK_TOKENS, EOS, Fake, Hook, VOCAB},
    shelf::Shelf,
    tiers::Stack,
};
use super::*;
use crate::{disagg::HandoffConfig, engine::RemotePrefill, scheduler::SchedulerConfig};

const MODEL: &str = "fake";

/// How a test's worker differs from the usual one.
struct Setup {
    role: WorkerRole,
    lanes: Vec<Lane>,
    faults: Option<FaultConfig>,
    blocks: u32,
    eviction: EvictionKind,
    dp_size: u32,
    scheduler: SchedulerConfig,
    remote: Option<Arc<dyn RemotePrefill>>,
    attempt_timeout: Duration,
    hook: Option<Hook>,
    fingerprint: u64,
    /// A lower tier, the same for all ranks.
    shelf: Option<Arc<Shelf>>,
    /// kvbm's tiers.
    stack: Option<Arc<Stack>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            role: WorkerRole::Aggregated,
            lanes: vec![Lane::Tcp],
            faults: None,
            blocks: 256,
            eviction: EvictionKind::Lru,
            dp_size: 1,
            scheduler: SchedulerConfig {
                max_running: 16,
                max_waiting: 64,
                max_batch_tokens: 40,
                prefill_chunk_tokens: 12,
            },
            remote: None,
            attempt_timeout: Duration::from_secs(20),
            hook: None,
            fingerprint: 7,
            shelf: None,
            stack: None,
        }
    }
}

impl Setup {
    /// Starts the engine; its tasks run on the calling test's runtime.
    fn start(self, name: &str) -> Arc<NativeEngine> {
        // Agents of one name replace each other, and tests run side by side.
        static AGENTS: AtomicUsize = AtomicUsize::new(0);
        let name = format!("{name}-{}", AGENTS.fetch_add(1, Ordering::Relaxed));
        let agent = Agent::new(AgentConfig {
            lanes: self.lanes,
            faults: self.faults,
            peer_loss_timeout: Duration::from_millis(500),
            socket_dir: std::env::temp_dir(),
            ..AgentConfig::new(name)
        })
        .expect("loopback addresses can be bound");
        let handoff = HandoffConfig {
            remote_prefill: self.remote,
            remote_prefill_min_tokens: 6,
            attempt_timeout: self.attempt_timeout,
            notification_timeout: Duration::from_secs(1),
            transfer_timeout: Duration::from_secs(3),
            ..HandoffConfig::new(runtime::Handle::current())
        };
        let config = NativeConfig {
            block_tokens: BLOCK_TOKENS,
            pool: PoolSize::Blocks(self.blocks),
            eviction: self.eviction,
            dp_size: self.dp_size,
            scheduler: self.scheduler,
            handoff: Some(handoff),
            ..NativeConfig::new(MODEL, self.role, agent)
        };
        let facts = ModelFacts {
            layout: fake::layout(),
            fingerprint: self.fingerprint,
            context_tokens_max: 160,
            vocab_size: VOCAB,
            eos_token_ids: vec![EOS],
        };
        let hook = self.hook;
        let mut make_forward = || -> Result<Box<dyn Forward>, StartError> {
            Ok(Box::new(Fake { hook: hook.clone() }))
        };
        let attach = |rank: &RankShared| {
            let shelf = self.shelf.as_ref();
            let shelf = shelf.map(|shelf| Shelf::below(shelf, &rank.pool));
            let stack = self.stack.as_ref();
            Ok(shelf.or_else(|| Some(stack?.attach(rank, &config.agent))))
        };
        NativeEngine::start_with(&config, facts, &mut make_forward, &attach)
            .expect("the configuration is valid")
    }
}

/// The way to prefill engines in the same process.
#[derive(Debug, Default)]
struct Direct {
    engines: Mutex<BTreeMap<WorkerId, Arc<NativeEngine>>>,
    calls: AtomicUsize,
    replies: Mutex<Vec<PrefillReply>>,
}

impl Direct {
    fn add(&self, id: u64, engine: Arc<NativeEngine>) {
        self.engines.lock().insert(WorkerId(id), engine);
    }

    /// A prefill worker is gone, with everything in it.
    fn remove(&self, id: u64) {
        let engine = self.engines.lock().remove(&WorkerId(id));
        drop(engine);
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

/// Clones of one [`Direct`] as a trait object that keeps the replies.
#[derive(Debug)]
struct Client(Arc<Direct>);

impl RemotePrefill for Client {
    fn available(&self) -> bool {
        !self.0.engines.lock().is_empty()
    }

    fn prefill(
        &self,
        hints: Vec<PrefillHint>,
        mut job: PrefillJob,
    ) -> BoxFuture<'static, Result<PrefillReply, GenerateError>> {
        let direct = Arc::clone(&self.0);
        direct.calls.fetch_add(1, Ordering::Relaxed);
        async move {
            let hint = hints[0];
            job.request.route.rank = hint.rank;
            let engine = direct.engines.lock().get(&hint.worker).cloned();
            let ticket = engine
                .ok_or_else(|| GenerateError::new(ErrorKind::Unavailable, "gone"))?
                .prefill(job)?;
            let reply = ticket.await?;
            direct.replies.lock().push(reply.clone());
            Ok(reply)
        }
        .boxed()
    }
}

fn request(prompt: &[TokenId], max_tokens: u32) -> GenerateRequest {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    GenerateRequest {
        request_id: RequestId(format!("r{number}")),
        model: MODEL.to_owned(),
        token_ids: prompt.to_vec(),
        sampling: SamplingParams::default(),
        stop: StopConditions {
            max_tokens,
            ..StopConditions::default()
        },
        logprobs: None,
        cache_salt: None,
        lora_name: None,
        priority: None,
        deadline_ms: 60_000,
        route: RouteHints::default(),
    }
}

/// The same request with these prefill workers to choose from.
fn via(mut request: GenerateRequest, workers: &[u64]) -> GenerateRequest {
    let hint = |&worker| PrefillHint {
        worker: WorkerId(worker),
        rank: DpRank(0),
        overlap_blocks: 0,
    };
    request.route.prefill = workers.iter().map(hint).collect();
    request
}

/// What a request ended with.
#[derive(Debug)]
struct Outcome {
    tokens: Vec<TokenId>,
    finish: FinishReason,
    usage: Usage,
}

async fn run(engine: &NativeEngine, request: GenerateRequest) -> Result<Outcome, GenerateError> {
    let mut stream = engine.generate(request)?;
    let mut tokens = Vec::new();
    while let Some(frame) = stream.next().await {
        let frame = frame?;
        tokens.extend(frame.tokens.iter().map(|token| token.id));
        if let Some(finish) = frame.finish {
            let usage = frame.usage.expect("comes with the end");
            assert_eq!(usage.completion_tokens as usize, tokens.len());
            return Ok(Outcome {
                tokens,
                finish,
                usage,
            });
        }
    }
    panic!("the stream ended without an end");
}

/// A prompt of one of a few families; those of a family begin alike.
fn prompt(family: u32, len: usize, tail: u32) -> Vec<TokenId> {
    let shared = len.saturating_sub(5);
    (0..len)
        .map(|i| {
            let i = u32::try_from(i).unwrap();
            let salt = if (i as usize) < shared { 0 } else { tail };
            1 + (family * 31 + i * 7 + salt * 13) % (VOCAB - 1)
        })
        .collect()
}

fn stats(engine: &NativeEngine) -> Vec<PoolStats> {
    engine.ranks.iter().map(|rank| rank.pool.stats()).collect()
}

/// Waits until something is so that happens on other threads.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            // Other threads need the processor to bring it about.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let result = tokio::time::timeout(Duration::from_secs(20), wait).await;
    assert!(result.is_ok(), "not so in 20 s: {what}");
}

/// Waits until no request and no block is held by anything, as at the start.
async fn all_blocks_back(engine: &NativeEngine) {
    eventually("no request is left", || {
        engine.ranks.iter().all(|rank| rank.live() == 0)
    })
    .await;
    let held = |stats: &PoolStats| stats.active > 0 || stats.quarantined > 0;
    eventually("no block is held", || !stats(engine).iter().any(held)).await;
}

/// A hook that holds the engine in its step until the test lets it go.
fn brake() -> (Hook, mpsc::Sender<()>) {
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let hook: Hook = Arc::new(move |layer, _| {
        if layer.0 == 0 {
            // Runs on without a brake when the test has dropped it.
            let _ = wait.lock().recv();
        }
    });
    (hook, go)
}
