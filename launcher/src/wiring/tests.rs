//! Requests over scripted workers: real RPC and discovery, no engine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use blockplane_frontend::ModelService;
use blockplane_protocol::{
    DType, ErrorKind, FinishReason, GenerateError, GenerateRequest, KvLayout, ModelCard, RequestId,
    SamplingParams, StopConditions, TokenFrame, TokenOutput, Usage, WorkerId, WorkerRole, codec,
    feed::FeedItem, request::RouteHints,
};
use blockplane_router::{RouterConfig, RouterMode};
use blockplane_runtime::{
    discovery::{Discovery, Instance, Lease, MemoryDiscovery},
    events::feed_response,
    rpc::{RpcClient, RpcClientConfig, RpcServer, RpcServerConfig, handler_fn},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::time::timeout;

use super::{
    descriptor::{FEED, GENERATE, WorkerDescriptor},
    fleet::Fleet,
    service::RoutedService,
};

const LIMIT: Duration = Duration::from_secs(20);
const MODEL: &str = "scripted";

/// What a scripted worker does with a request. Token `n` of a sequence is its position.
#[derive(Clone, Copy, Debug)]
enum Script {
    /// Serves it.
    Serve,
    /// Refuses it as one that is leaving does.
    Leave,
    /// Ends the stream without a last frame after so many tokens.
    CutAfter(usize),
    /// Answers nothing.
    Silent,
}

struct Worker {
    server: RpcServer,
    _lease: Lease,
    requests: Arc<AtomicUsize>,
}

struct Deployment {
    discovery: MemoryDiscovery,
    fleet: Arc<Fleet>,
    service: RoutedService,
}

impl Deployment {
    async fn new(migration_limit: u32) -> Self {
        let discovery = MemoryDiscovery::new();
        let client = RpcClient::new(RpcClientConfig::default());
        let config = RouterConfig {
            mode: RouterMode::RoundRobin,
            ..RouterConfig::default()
        };
        let watch = discovery.watch("test").await.unwrap();
        let fleet = Arc::new(Fleet::start(client, watch, config));
        let service = RoutedService::new(Arc::clone(&fleet), migration_limit, Some(1));
        Self {
            discovery,
            fleet,
            service,
        }
    }

    /// Starts a worker and waits until it is routed to.
    async fn worker(&self, id: u64, script: Script) -> Worker {
        let server = RpcServer::bind(RpcServer::LOOPBACK, RpcServerConfig::default())
            .await
            .unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&requests);
        server.handle(
            GENERATE,
            handler_fn(move |_context, payload| {
                seen.fetch_add(1, Ordering::Relaxed);
                async move { answer(script, &codec::decode(&payload).unwrap()) }
            }),
        );
        server.handle(
            FEED,
            handler_fn(|_context, _payload| async {
                let first = stream::iter([FeedItem::Load(Vec::new())]);
                Ok(feed_response(first.chain(stream::pending())))
            }),
        );
        let card = card();
        let descriptor = WorkerDescriptor {
            name: format!("w{id}"),
            pid: 1,
            card,
            kv_peer: None,
        };
        let instance = Instance {
            id: WorkerId(id),
            endpoint: "dyn://test.aggregated.generate".parse().unwrap(),
            address: server.local_addr().to_string(),
            metadata: serde_json::to_value(descriptor).unwrap(),
        };
        let lease = self.discovery.register(instance).await.unwrap();
        let mut changes = self.fleet.changes();
        let ready = async {
            while !self
                .service
                .status()
                .workers
                .iter()
                .any(|worker| worker.id == WorkerId(id) && worker.state == "ready")
            {
                changes.changed().await.unwrap();
            }
        };
        timeout(LIMIT, ready)
            .await
            .expect("the worker is routed to");
        Worker {
            server,
            _lease: lease,
            requests,
        }
    }

    /// Runs a request of four prompt tokens to its end.
    async fn run(&self, max_tokens: u32) -> Result<(Vec<u32>, Usage), GenerateError> {
        let run = async {
            let mut frames = self.service.generate(request(max_tokens)).await?;
            let mut tokens = Vec::new();
            while let Some(frame) = frames.next().await {
                let frame = frame?;
                tokens.extend(frame.tokens.iter().map(|token| token.id));
                if frame.finish.is_some() {
                    assert!(
                        frames.next().await.is_none(),
                        "nothing follows the last frame"
                    );
                    return Ok((tokens, frame.usage.unwrap_or_default()));
                }
            }
            panic!("the stream ended without a last frame after {tokens:?}");
        };
        timeout(LIMIT, run).await.expect("the request ends")
    }
}

fn answer(
    script: Script,
    request: &GenerateRequest,
) -> Result<blockplane_runtime::rpc::ResponseStream, GenerateError> {
    let prompt = u32::try_from(request.token_ids.len()).unwrap();
    let count = request.stop.max_tokens;
    let cut = match script {
        Script::Serve => u32::MAX,
        Script::CutAfter(tokens) => u32::try_from(tokens).unwrap(),
        Script::Leave => return Err(GenerateError::new(ErrorKind::WorkerLost, "leaving")),
        Script::Silent => return Ok(Box::pin(stream::pending())),
    };
    let frames = (0..count.min(cut)).map(move |n| TokenFrame {
        tokens: vec![TokenOutput {
            id: prompt + n,
            logprob: None,
            top: Vec::new(),
        }],
        finish: (n + 1 == count).then_some(FinishReason::Length),
        usage: (n + 1 == count).then(|| Usage {
            prompt_tokens: prompt,
            completion_tokens: count,
            ..Usage::default()
        }),
    });
    Ok(Box::pin(stream::iter(
        frames.map(|frame| Ok(Bytes::from(codec::encode(&frame)))),
    )))
}

pub(super) fn card() -> ModelCard {
    ModelCard {
        name: MODEL.to_owned(),
        path: "/nowhere".to_owned(),
        context_tokens_max: 128,
        vocab_size: 1000,
        eos_token_ids: vec![0],
        kv_layout: KvLayout::dense(1, 1, 8, 4, DType::F32),
        blocks: 64,
        dp_size: 1,
        role: WorkerRole::Aggregated,
    }
}

fn request(max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: RequestId("r".to_owned()),
        model: MODEL.to_owned(),
        token_ids: vec![7; 4],
        sampling: SamplingParams::default(),
        stop: StopConditions {
            max_tokens,
            ..StopConditions::default()
        },
        logprobs: None,
        cache_salt: None,
        lora_name: None,
        priority: None,
        deadline_ms: 10_000,
        route: RouteHints::default(),
    }
}

#[tokio::test]
async fn a_request_is_served_and_its_worker_known() {
    let deployment = Deployment::new(0).await;
    assert!(!deployment.service.status().ready);
    let worker = deployment.worker(1, Script::Serve).await;
    assert!(deployment.service.status().ready);
    assert_eq!(deployment.service.models().len(), 1);
    let (tokens, usage) = deployment.run(3).await.unwrap();
    assert_eq!(tokens, [4, 5, 6]);
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (4, 3));
    assert_eq!(worker.requests.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_cut_request_goes_on_elsewhere_without_a_token_lost_or_twice() {
    let deployment = Deployment::new(1).await;
    let cut = deployment.worker(1, Script::CutAfter(2)).await;
    let whole = deployment.worker(2, Script::Serve).await;
    for _ in 0..2 {
        let (tokens, usage) = deployment.run(5).await.unwrap();
        assert_eq!(tokens, [4, 5, 6, 7, 8]);
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (4, 5));
    }
    assert!(
        cut.requests.load(Ordering::Relaxed) >= 1,
        "round robin reaches both"
    );
    assert_eq!(whole.requests.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn without_budget_or_another_worker_the_loss_is_an_error() {
    let no_budget = Deployment::new(0).await;
    let _cut = no_budget.worker(1, Script::CutAfter(2)).await;
    assert_eq!(
        no_budget.run(5).await.unwrap_err().kind,
        ErrorKind::WorkerLost
    );

    let alone = Deployment::new(3).await;
    let cut = alone.worker(1, Script::CutAfter(2)).await;
    let error = alone.run(5).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::WorkerLost);
    assert!(
        error.message.contains("no other worker takes the request"),
        "{error}"
    );
    assert_eq!(
        cut.requests.load(Ordering::Relaxed),
        1,
        "a worker that failed is not asked again"
    );
}

#[tokio::test]
async fn a_leaving_worker_costs_no_request() {
    let deployment = Deployment::new(1).await;
    let _leaving = deployment.worker(1, Script::Leave).await;
    let _stays = deployment.worker(2, Script::Serve).await;
    for _ in 0..4 {
        assert_eq!(deployment.run(1).await.unwrap().0, [4]);
    }
}

#[tokio::test]
async fn a_lost_connection_takes_the_worker_out() {
    let deployment = Deployment::new(0).await;
    let worker = deployment.worker(1, Script::Serve).await;
    let mut changes = deployment.fleet.changes();
    drop(worker.server);
    let gone = async {
        while deployment.service.status().ready {
            changes.changed().await.unwrap();
        }
    };
    timeout(LIMIT, gone).await.expect("the router notices");
    assert_eq!(
        deployment.run(1).await.unwrap_err().kind,
        ErrorKind::Unavailable
    );
}

#[tokio::test]
async fn a_silent_worker_is_an_error_at_the_deadline() {
    let deployment = Deployment::new(1).await;
    let _silent = deployment.worker(1, Script::Silent).await;
    let request = GenerateRequest {
        deadline_ms: 50,
        ..request(1)
    };
    let ended = timeout(LIMIT, deployment.service.generate(request))
        .await
        .expect("it ends");
    assert_eq!(
        ended.map(|_| ()).unwrap_err().kind,
        ErrorKind::DeadlineExceeded
    );
}

#[tokio::test]
async fn a_worker_with_another_layout_is_refused_with_the_reason() {
    let deployment = Deployment::new(0).await;
    let _first = deployment.worker(1, Script::Serve).await;
    let mut other = card();
    other.kv_layout = KvLayout::dense(1, 1, 8, 8, DType::F32);
    let descriptor = WorkerDescriptor {
        name: "odd".to_owned(),
        pid: 1,
        card: other,
        kv_peer: None,
    };
    let instance = Instance {
        id: WorkerId(2),
        endpoint: "dyn://test.aggregated.generate".parse().unwrap(),
        address: "127.0.0.1:1".to_owned(),
        metadata: serde_json::to_value(descriptor).unwrap(),
    };
    let _lease = deployment.discovery.register(instance).await.unwrap();
    let refused = async {
        loop {
            let workers = deployment.service.status().workers;
            if let Some(odd) = workers.iter().find(|worker| worker.name == "odd")
                && odd.state.starts_with("refused")
            {
                return odd.state.clone();
            }
            tokio::task::yield_now().await;
        }
    };
    let state = timeout(LIMIT, refused).await.expect("it is refused");
    assert!(
        state.contains("8 tokens per block") && state.contains("here 4"),
        "{state}"
    );
    assert_eq!(deployment.run(1).await.unwrap().0, [4]);
}
