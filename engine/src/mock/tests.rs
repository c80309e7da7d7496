//! The mock alone, and two of them that share requests.

use std::sync::Arc;

use blockplane_kvbm::KvArena;
use blockplane_protocol::{
    BlockId, ErrorKind, FinishReason, LayerIndex, PrefillHint, PrefillReply, RequestId, RouteHints,
    SamplingParams, StopConditions, Usage, WorkerId,
};
use blockplane_transfer::AgentConfig;
use futures::{StreamExt, future::join_all};
use tokio::runtime::Handle;

use super::*;
use crate::{
    RemotePrefill,
    disagg::HandoffConfig,
    model::{ForwardError, SequenceSlice},
    native::Forward,
};

const BLOCK_TOKENS: u32 = 4;

fn model() -> MockModel {
    MockModel {
        vocab_size: 500,
        context_tokens_max: 400,
        eos_token_ids: vec![0, 7, 499],
        ..MockModel::default()
    }
}

fn start(name: &str, role: WorkerRole, change: impl FnOnce(&mut MockConfig)) -> Arc<MockEngine> {
    let agent = Agent::new(AgentConfig::new(name)).unwrap();
    let mut config = MockConfig::new("m", role, agent);
    config.model = model();
    config.timing = MockTiming::instant();
    config.engine.block_tokens = BLOCK_TOKENS;
    config.engine.pool = PoolSize::Blocks(256);
    change(&mut config);
    Arc::new(MockEngine::start(config).unwrap())
}

fn prompt(seed: u32, tokens: u32) -> Vec<TokenId> {
    (0..tokens).map(|n| (seed * 131 + n * 17) % 500).collect()
}

fn request(prompt: &[TokenId], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: RequestId(format!("r{}-{max_tokens}", prompt.len())),
        model: "m".to_owned(),
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

struct Outcome {
    tokens: Vec<TokenId>,
    usage: Usage,
}

async fn run(engine: &MockEngine, request: GenerateRequest) -> Result<Outcome, GenerateError> {
    let mut stream = engine.generate(request)?;
    let mut tokens = Vec::new();
    while let Some(frame) = stream.next().await {
        let frame = frame?;
        tokens.extend(frame.tokens.iter().map(|token| token.id));
        if let Some(reason) = frame.finish {
            assert_eq!(reason, FinishReason::Length);
            let usage = frame.usage.expect("usage comes with the end");
            return Ok(Outcome { tokens, usage });
        }
    }
    panic!("the stream ended without a last frame");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_the_expected_ones_batched_cached_and_preempted() {
    let engine = start("agg", WorkerRole::Aggregated, |config| {
        config.engine.pool = PoolSize::Blocks(40);
    });
    let prompts: Vec<_> = (0..16).map(|i| prompt(i % 5, 9 + i)).collect();
    for _ in 0..2 {
        let runs = prompts.iter().map(|p| {
            let mut request = request(p, 30);
            // Whatever the sampling.
            request.sampling.temperature = 1.5;
            request.sampling.frequency_penalty = 2.0;
            run(&engine, request)
        });
        for (prompt, outcome) in prompts.iter().zip(join_all(runs).await) {
            let tokens = outcome.unwrap().tokens;
            assert_eq!(tokens, model().expected_tokens(prompt, 30));
            assert!(
                tokens
                    .iter()
                    .all(|token| !model().eos_token_ids.contains(token))
            );
        }
    }
    let load = engine.load()[0];
    assert!(
        load.preemptions_total > 0 && load.cached_tokens_total > 0,
        "{load:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_moves_goes_on_with_the_same_tokens() {
    let (first, second) = (
        start("from", WorkerRole::Aggregated, |_| {}),
        start("to", WorkerRole::Aggregated, |_| {}),
    );
    let prompt = prompt(3, 21);
    let mut tokens = prompt.clone();
    tokens.extend(run(&first, request(&prompt, 9)).await.unwrap().tokens);
    let rest = run(&second, request(&tokens, 14)).await.unwrap().tokens;
    tokens.extend(rest);
    assert_eq!(tokens[prompt.len()..], model().expected_tokens(&prompt, 23));
}

/// Sends jobs to an engine in the same process.
#[derive(Debug)]
struct InProcess(Arc<MockEngine>);

impl RemotePrefill for InProcess {
    fn available(&self) -> bool {
        self.0.health().is_ready()
    }

    fn prefill(
        &self,
        _hints: Vec<PrefillHint>,
        job: PrefillJob,
    ) -> BoxFuture<'static, Result<PrefillReply, GenerateError>> {
        let ticket = self.0.prefill(job);
        Box::pin(async { ticket?.await })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_worker_fills_the_blocks_of_a_decode_worker() {
    let runtime = Handle::current();
    let prefill = start("prefill", WorkerRole::Prefill, |config| {
        config.engine.handoff = Some(HandoffConfig::new(runtime.clone()));
    });
    let client = Arc::new(InProcess(Arc::clone(&prefill)));
    let decode = start("decode", WorkerRole::Decode, |config| {
        config.engine.handoff = Some(HandoffConfig {
            remote_prefill: Some(client),
            remote_prefill_min_tokens: 8,
            ..HandoffConfig::new(runtime)
        });
    });
    let hint = PrefillHint {
        worker: WorkerId(1),
        rank: DpRank(0),
        overlap_blocks: 0,
    };
    let prompts: Vec<_> = (0..12).map(|i| prompt(i % 4, 40 + 3 * i)).collect();
    let runs = prompts.iter().map(|p| {
        let mut request = request(p, 12);
        request.route.prefill = vec![hint];
        run(&decode, request)
    });
    let mut moved = 0;
    for (prompt, outcome) in prompts.iter().zip(join_all(runs).await) {
        let outcome = outcome.unwrap();
        assert_eq!(outcome.tokens, model().expected_tokens(prompt, 12));
        moved += outcome.usage.transfer_blocks;
    }
    assert!(moved > 0);
    assert_eq!(decode.load()[0].transfer_blocks_total, u64::from(moved));
    assert!(prefill.load()[0].prefill_tokens_total > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_request_and_a_drained_engine_leave_nothing_behind() {
    let engine = start("drain", WorkerRole::Aggregated, |config| {
        // Long enough that nothing ends by itself.
        config.timing.speed_up = 0.01;
    });
    let streams: Vec<_> = (0..6)
        .map(|i| engine.generate(request(&prompt(i, 30), 200)).unwrap())
        .collect();
    drop(streams);
    engine.drain(Duration::ZERO).await;
    let load = engine.load()[0];
    assert_eq!((load.blocks_active, load.blocks_quarantined), (0, 0));
    let error = engine.generate(request(&[1], 1)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WorkerLost);
}

#[test]
fn what_cannot_be_pretended_is_refused() {
    let refused = |change: &dyn Fn(&mut MockConfig)| {
        let agent = Agent::new(AgentConfig::new("refused")).unwrap();
        let mut config = MockConfig::new("m", WorkerRole::Aggregated, agent);
        change(&mut config);
        MockEngine::start(config).unwrap_err().to_string()
    };
    assert!(refused(&|c| c.model.layers = 0).contains("layers"));
    assert!(refused(&|c| c.timing.prefill_tokens_per_second = 0.0).contains("prefill"));
    let no_token = refused(&|c| {
        c.model.vocab_size = 1;
        c.model.eos_token_ids = vec![0];
    });
    assert!(no_token.contains("vocab_size"), "{no_token}");
}

/// A mock's model on its own, with a block table of the test's.
struct Bench {
    arena: Arc<KvArena>,
    forward: MockForward,
}

impl Bench {
    fn new(verify_kv: bool) -> Self {
        let agent = Agent::new(AgentConfig::new("bench")).unwrap();
        let layout = kv::layout(model().layers, BLOCK_TOKENS);
        let model = MockModel {
            verify_kv,
            ..model()
        };
        Self {
            arena: KvArena::allocate(&agent, layout, 16, "kv").unwrap(),
            forward: MockForward::new(model, MockTiming::instant()),
        }
    }

    /// Computes `tokens[from..]`; returns the next token.
    fn step(
        &mut self,
        tokens: &[TokenId],
        from: usize,
        blocks: &[u32],
    ) -> Result<usize, ForwardError> {
        let blocks: Vec<BlockId> = blocks.iter().copied().map(BlockId).collect();
        let slice = SequenceSlice {
            tokens: &tokens[from..],
            position: u32::try_from(from).unwrap(),
            blocks: &blocks,
            logits: true,
        };
        let mut next = 0;
        let mut on_logits = |_, row: &[f32]| {
            next = row.iter().position(|&logit| logit > 0.0).unwrap();
        };
        let on_layer = &mut |_: LayerIndex| {};
        self.forward
            .forward(&[slice], &self.arena, on_layer, &mut on_logits)?;
        Ok(next)
    }

    fn found(&mut self, tokens: &[TokenId], from: usize, blocks: &[u32]) -> (u32, &'static str) {
        match self.step(tokens, from, blocks) {
            Err(ForwardError::Contents {
                position, found, ..
            }) => (position, found),
            other => panic!("wrong KV was not found: {other:?}"),
        }
    }
}

#[test]
fn every_wrong_block_is_found() {
    let mut bench = Bench::new(true);
    let (ours, theirs) = (prompt(1, 13), prompt(2, 13));
    let expected = model().expected_tokens(&ours, 1)[0];
    assert_eq!(
        bench.step(&ours[..5], 0, &[3, 1]),
        Ok(model().expected_tokens(&ours[..5], 1)[0] as usize)
    );
    assert_eq!(
        bench.step(&ours, 5, &[3, 1, 0, 2]),
        Ok(expected as usize),
        "in chunks"
    );
    bench.step(&theirs, 0, &[4, 5, 6, 7]).unwrap();

    let last = &ours[..13];
    assert_eq!(bench.step(last, 12, &[3, 1, 0, 2]), Ok(expected as usize));
    let other = "the KV of another sequence or place";
    assert_eq!(
        bench.found(last, 12, &[3, 5, 0, 2]),
        (4, other),
        "another sequence's"
    );
    assert_eq!(
        bench.found(last, 12, &[1, 3, 0, 2]),
        (0, other),
        "exchanged"
    );
    let empty = "bytes that were not written for it";
    assert_eq!(
        bench.found(last, 12, &[3, 1, 9, 2]),
        (8, empty),
        "never written"
    );

    // One bit, anywhere in the block.
    let strides = bench.arena.transfer_layout();
    for layer in 0..2 {
        for at in [0, 9, 14, 64, 79, 127] {
            let offset = strides.run_offset(1, layer).unwrap() + at;
            let mut byte = [0];
            bench
                .arena
                .registration()
                .read_at(offset, &mut byte)
                .unwrap();
            bench
                .arena
                .registration()
                .write_at(offset, &[byte[0] ^ 4])
                .unwrap();
            assert!(
                bench.step(last, 12, &[3, 1, 0, 2]).is_err(),
                "layer {layer} byte {at}"
            );
            bench.arena.registration().write_at(offset, &byte).unwrap();
        }
    }
    // Another layer's bytes.
    let mut run = vec![0; bench.arena.layout().layer_bytes()];
    let layer = |layer| strides.run_offset(0, layer).unwrap();
    bench
        .arena
        .registration()
        .read_at(layer(0), &mut run)
        .unwrap();
    bench.arena.registration().write_at(layer(1), &run).unwrap();
    assert_eq!(bench.found(last, 12, &[3, 1, 0, 2]), (8, empty));
}

#[test]
fn without_checks_the_next_token_still_comes_from_the_kv() {
    let mut bench = Bench::new(false);
    let (ours, theirs) = (prompt(1, 9), prompt(2, 9));
    bench.step(&ours[..8], 0, &[0, 1]).unwrap();
    bench.step(&theirs[..8], 0, &[2, 3]).unwrap();
    let expected = model().expected_tokens(&ours, 1)[0] as usize;
    assert_eq!(bench.step(&ours, 8, &[0, 1, 4]), Ok(expected));
    assert_ne!(bench.step(&ours, 8, &[0, 3, 4]), Ok(expected));
    assert!(bench.step(&ours, 8, &[0, 9, 4]).is_err(), "never written");
    assert!(matches!(
        bench.step(&ours, 8, &[0, 1]),
        Err(ForwardError::BlockTable { needed: 3, .. })
    ));
    assert!(matches!(
        bench.step(&ours, 8, &[0, 1, 16]),
        Err(ForwardError::Block { blocks: 16, .. })
    ));
}
