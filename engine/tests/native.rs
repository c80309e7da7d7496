//! Native engines on real checkpoints: the tokens of transformers, however a request is computed.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use blockplane_engine::{
    Engine, HandoffConfig, NativeConfig, NativeEngine, PoolSize, RemotePrefill, SchedulerConfig,
    model::{LoadOptions, Model},
    ops::Compute,
};
use blockplane_protocol::{
    DpRank, GenerateError, GenerateRequest, PrefillHint, PrefillJob, PrefillReply, RequestId,
    RouteHints, SamplingParams, StopConditions, TokenId, TokenOutput, Usage, WorkerId, WorkerRole,
};
use blockplane_transfer::{Agent, AgentConfig, Lane};
use futures::{
    FutureExt, StreamExt,
    future::{BoxFuture, join_all},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::runtime;

const FIXTURES: [&str; 3] = ["llama", "qwen3", "mistral-swa"];
const LANES: [Lane; 3] = [Lane::Loopback, Lane::Shm, Lane::Tcp];
const BLOCK_TOKENS: u32 = 8;

/// A fixture's model, and what transformers generated from its prompts.
struct Fixture {
    model: Arc<Model>,
    prompts: Vec<(Vec<TokenId>, Vec<TokenId>)>,
}

fn fixture(name: &str, compute: Compute) -> Fixture {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name);
    let text = std::fs::read(folder.join("reference/reference.json")).expect("committed");
    let reference: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let ids = |value: &serde_json::Value| -> Vec<TokenId> {
        let ids = value.as_array().expect("a list").iter();
        ids.map(|id| u32::try_from(id.as_u64().expect("an id")).expect("32 bits"))
            .collect()
    };
    let prompts = reference["prompts"].as_array().expect("a list").iter();
    Fixture {
        model: Model::load(&folder, &LoadOptions::new(compute, 2)).expect("it loads"),
        prompts: prompts
            .map(|prompt| (ids(&prompt["ids"]), ids(&prompt["greedy"])))
            .collect(),
    }
}

/// How an engine of a test is set up.
struct Setup {
    role: WorkerRole,
    lane: Lane,
    blocks: u32,
    chunk: usize,
    remote: Option<Arc<dyn RemotePrefill>>,
}

impl Setup {
    fn aggregated() -> Self {
        Self {
            role: WorkerRole::Aggregated,
            lane: Lane::Loopback,
            blocks: 512,
            chunk: 64,
            remote: None,
        }
    }

    fn start(self, model: &Arc<Model>) -> Arc<NativeEngine> {
        // Agents of one name replace each other, and tests run side by side.
        static AGENTS: AtomicUsize = AtomicUsize::new(0);
        let name = format!("native-{}", AGENTS.fetch_add(1, Ordering::Relaxed));
        let agent = Agent::new(AgentConfig {
            socket_dir: std::env::temp_dir(),
            ..AgentConfig::new(name).with_lanes([self.lane])
        });
        let mut config = NativeConfig::new("fixture", self.role, agent.expect("it starts"));
        config.block_tokens = BLOCK_TOKENS;
        config.pool = PoolSize::Blocks(self.blocks);
        config.scheduler = SchedulerConfig {
            max_running: 16,
            max_waiting: 256,
            max_batch_tokens: 16 + self.chunk,
            prefill_chunk_tokens: self.chunk,
        };
        config.handoff = Some(HandoffConfig {
            remote_prefill: self.remote,
            remote_prefill_min_tokens: 9,
            ..HandoffConfig::new(runtime::Handle::current())
        });
        NativeEngine::start(model, &config).expect("it starts")
    }
}

/// The way to one prefill engine in this process.
#[derive(Debug)]
struct Direct(Arc<NativeEngine>);

impl RemotePrefill for Direct {
    fn available(&self) -> bool {
        true
    }

    fn prefill(
        &self,
        _: Vec<PrefillHint>,
        job: PrefillJob,
    ) -> BoxFuture<'static, Result<PrefillReply, GenerateError>> {
        let engine = Arc::clone(&self.0);
        async move { engine.prefill(job)?.await }.boxed()
    }
}

/// A decode engine whose prompts are computed by a prefill engine over `lane`.
fn disaggregated(model: &Arc<Model>, lane: Lane, chunk: usize) -> Arc<NativeEngine> {
    let prefill = Setup {
        role: WorkerRole::Prefill,
        lane,
        chunk,
        ..Setup::aggregated()
    };
    Setup {
        role: WorkerRole::Decode,
        lane,
        remote: Some(Arc::new(Direct(prefill.start(model)))),
        ..Setup::aggregated()
    }
    .start(model)
}

fn greedy(prompt: &[TokenId], max_tokens: usize) -> GenerateRequest {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    GenerateRequest {
        request_id: RequestId(format!("r{number}")),
        model: "fixture".to_owned(),
        token_ids: prompt.to_vec(),
        sampling: SamplingParams::default(),
        stop: StopConditions {
            max_tokens: u32::try_from(max_tokens).expect("small"),
            ignore_eos: true,
            ..StopConditions::default()
        },
        logprobs: None,
        cache_salt: None,
        lora_name: None,
        priority: None,
        deadline_ms: 120_000,
        // Engines without a way to prefill workers ignore it.
        route: RouteHints {
            prefill: vec![PrefillHint {
                worker: WorkerId(1),
                rank: DpRank(0),
                overlap_blocks: 0,
            }],
            ..RouteHints::default()
        },
    }
}

async fn run(engine: &NativeEngine, request: GenerateRequest) -> (Vec<TokenOutput>, Usage) {
    let mut stream = engine.generate(request).expect("valid");
    let mut tokens = Vec::new();
    loop {
        let frame = stream.next().await.expect("an end").expect("no error");
        tokens.extend(frame.tokens);
        if frame.finish.is_some() {
            return (tokens, frame.usage.expect("comes with the end"));
        }
    }
}

async fn tokens_of(engine: &NativeEngine, prompt: &[TokenId], max_tokens: usize) -> Vec<TokenId> {
    let (tokens, _) = run(engine, greedy(prompt, max_tokens)).await;
    tokens.into_iter().map(|token| token.id).collect()
}

/// All prompts of a fixture, one after the other or at once, give the recorded tokens.
async fn check(engine: &NativeEngine, fixture: &Fixture, what: &str) {
    for (prompt, expected) in &fixture.prompts {
        let tokens = tokens_of(engine, prompt, expected.len()).await;
        assert_eq!(&tokens, expected, "{what}, alone");
    }
    let runs = fixture
        .prompts
        .iter()
        .map(|(prompt, expected)| tokens_of(engine, prompt, expected.len()));
    for (tokens, (_, expected)) in join_all(runs).await.iter().zip(&fixture.prompts) {
        assert_eq!(tokens, expected, "{what}, at once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_tokens_are_those_of_transformers_aggregated() {
    for name in FIXTURES {
        let fixture = fixture(name, Compute::F32);
        assert!(fixture.prompts.iter().all(|(_, greedy)| greedy.len() == 64));
        for chunk in [8, 24, 256] {
            let engine = Setup {
                chunk,
                ..Setup::aggregated()
            }
            .start(&fixture.model);
            // The second round finds the prompts in the cache.
            for round in 0..2 {
                check(
                    &engine,
                    &fixture,
                    &format!("{name}, chunks of {chunk}, {round}"),
                )
                .await;
            }
            assert!(engine.load()[0].cached_tokens_total > 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_tokens_are_those_of_transformers_preempted() {
    for name in FIXTURES {
        let fixture = fixture(name, Compute::F32);
        let most = fixture.prompts.iter().map(|(p, g)| p.len() + g.len()).max();
        let blocks = u32::try_from(most.expect("three")).expect("small") / BLOCK_TOKENS + 3;
        let engine = Setup {
            blocks,
            ..Setup::aggregated()
        }
        .start(&fixture.model);
        let runs = fixture.prompts.iter().cycle().take(9);
        let tokens = join_all(runs.clone().map(|(p, g)| tokens_of(&engine, p, g.len()))).await;
        for (tokens, (_, expected)) in tokens.iter().zip(runs) {
            assert_eq!(tokens, expected, "{name}");
        }
        assert!(engine.load()[0].preemptions_total > 0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_tokens_are_those_of_transformers_disaggregated() {
    for name in FIXTURES {
        let fixture = fixture(name, Compute::F32);
        for lane in LANES {
            let engine = disaggregated(&fixture.model, lane, 16);
            check(&engine, &fixture, &format!("{name} over {lane}")).await;
            assert!(
                engine.load()[0].transfer_bytes_total > 0,
                "{name} over {lane}"
            );
        }
    }
}

/// Prompts of which many begin alike, at block boundaries and elsewhere.
fn random_prompts(seed: u64, count: usize) -> Vec<Vec<TokenId>> {
    let mut random = StdRng::seed_from_u64(seed);
    let stems: Vec<Vec<TokenId>> = (0..8)
        .map(|_| (0..96).map(|_| random.random_range(3..500)).collect())
        .collect();
    (0..count)
        .map(|_| {
            let stem = &stems[random.random_range(0..stems.len())];
            let mut prompt = stem[..random.random_range(0..stem.len())].to_vec();
            let tail = random.random_range(1..40);
            prompt.extend((0..tail).map(|_| random.random_range(3..500u32)));
            prompt
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn disaggregated_equals_aggregated_on_random_prompts_that_share_prefixes() {
    for compute in [Compute::F32, Compute::Bf16] {
        let fixture = fixture("qwen3", compute);
        let prompts = random_prompts(5, 200);
        let aggregated = Setup::aggregated().start(&fixture.model);
        let expected = join_all(prompts.iter().map(|p| tokens_of(&aggregated, p, 12))).await;
        for lane in [Lane::Shm, Lane::Tcp] {
            let engine = disaggregated(&fixture.model, lane, 24);
            let mut remote = 0;
            for (prompts, expected) in prompts.chunks(20).zip(expected.chunks(20)) {
                let runs = prompts.iter().map(|p| run(&engine, greedy(p, 12)));
                for ((tokens, usage), expected) in join_all(runs).await.into_iter().zip(expected) {
                    let tokens: Vec<_> = tokens.into_iter().map(|token| token.id).collect();
                    assert_eq!(&tokens, expected, "{compute:?} over {lane}");
                    remote += u32::from(usage.remote_prefill_tokens > 0);
                }
            }
            assert!(remote > 100, "{remote} of 200 were prefilled remotely");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sampler_goes_on_where_the_prefill_worker_stopped() {
    let fixture = fixture("qwen3", Compute::F32);
    let aggregated = Setup::aggregated().start(&fixture.model);
    let disaggregated = disaggregated(&fixture.model, Lane::Tcp, 16);
    for (seed, prompt) in (0..).zip(random_prompts(9, 20)) {
        let mut request = greedy(&prompt, 24);
        request.sampling = SamplingParams {
            temperature: 1.1,
            top_p: 0.95,
            seed: Some(seed),
            presence_penalty: 0.4,
            repetition_penalty: 1.2,
            ..SamplingParams::default()
        };
        request.logprobs = Some(3);
        let (expected, _) = run(&aggregated, request.clone()).await;
        let (tokens, usage) = run(&disaggregated, request).await;
        assert_eq!(tokens, expected);
        assert_eq!(tokens[0].top.len(), 3);
        let long = prompt.len() - usage.cached_tokens as usize >= 9;
        assert_eq!(usage.remote_prefill_tokens > 0, long);
    }
}
