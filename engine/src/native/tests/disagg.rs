//! Decode and prefill engines, over real transfers.

use blockplane_protocol::KvTarget;
use futures::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::{
    disagg::HandoffEvent,
    scheduler::{SequenceBlocks, SequenceId},
};

const LANES: [Lane; 3] = [Lane::Loopback, Lane::Shm, Lane::Tcp];

/// A decode engine and its prefill engines, with ids from 1.
struct Pair {
    direct: Arc<Direct>,
    decode: Arc<NativeEngine>,
    prefill: Vec<Arc<NativeEngine>>,
}

fn pair(lane: Lane, prefill: Vec<Setup>, decode: Setup) -> Pair {
    let direct = Arc::new(Direct::default());
    let prefill: Vec<_> = prefill
        .into_iter()
        .zip(1..)
        .map(|(setup, id)| {
            let setup = Setup {
                role: WorkerRole::Prefill,
                lanes: vec![lane],
                ..setup
            };
            let engine = setup.start(&format!("prefill-{id}"));
            direct.add(id, Arc::clone(&engine));
            engine
        })
        .collect();
    let decode = Setup {
        role: WorkerRole::Decode,
        lanes: vec![lane],
        remote: Some(Arc::new(Client(Arc::clone(&direct)))),
        ..decode
    }
    .start("decode");
    Pair {
        direct,
        decode,
        prefill,
    }
}

impl Pair {
    fn usual(lane: Lane) -> Self {
        pair(lane, vec![Setup::default()], Setup::default())
    }

    async fn all_blocks_back(&self) {
        all_blocks_back(&self.decode).await;
        for prefill in &self.prefill {
            all_blocks_back(prefill).await;
        }
    }

    /// The `number`-th reply, which may come after the tokens.
    async fn reply(&self, number: usize) -> PrefillReply {
        let replies = &self.direct.replies;
        eventually("the reply arrived", || replies.lock().len() > number).await;
        replies.lock()[number].clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_those_of_the_reference_over_every_lane() {
    for lane in LANES {
        let pair = Pair::usual(lane);
        let prompts: Vec<_> = (0..60)
            .map(|i| prompt(i % 4, 1 + (i as usize * 17) % 90, i))
            .collect();
        let mut remote = 0;
        for batch in prompts.chunks(12) {
            let runs = batch
                .iter()
                .map(|prompt| run(&pair.decode, via(request(prompt, 16), &[1])));
            for (prompt, outcome) in batch.iter().zip(join_all(runs).await) {
                let outcome = outcome.unwrap();
                assert_eq!(outcome.tokens, fake::reference(prompt, 16), "{lane}");
                remote += u32::from(outcome.usage.remote_prefill_tokens > 0);
            }
        }
        assert!(
            remote > 20,
            "{remote} of 60 were prefilled remotely over {lane}"
        );
        pair.all_blocks_back().await;
        let load = pair.decode.load()[0];
        assert!(load.transfer_blocks_total > 0 && load.transfer_bytes_total > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_decode_has_is_read_and_not_computed_again() {
    for lane in LANES {
        let pair = Pair::usual(lane);
        // Decode computes the beginning by itself.
        let begin = prompt(2, 24, 0);
        run(&pair.decode, request(&begin, 2)).await.unwrap();
        let mut longer = begin.clone();
        longer.extend(prompt(3, 19, 1));
        let outcome = run(&pair.decode, via(request(&longer, 8), &[1]))
            .await
            .unwrap();
        assert_eq!(outcome.tokens, fake::reference(&longer, 8), "{lane}");
        assert_eq!(outcome.usage.cached_tokens, 24);
        assert_eq!(outcome.usage.remote_prefill_tokens, 19);
        // 43 tokens are 11 blocks, of which decode had 6.
        assert_eq!(outcome.usage.transfer_blocks, 5);
        assert_eq!(outcome.usage.lane, Some(lane.to_string()));
        // The last layer is sent after it is computed.
        assert!(outcome.usage.overlapped_bytes < outcome.usage.transfer_bytes);
        let reply = pair.reply(0).await;
        assert_eq!((reply.cached_blocks, reply.read_blocks), (0, 6));
        assert_eq!((reply.computed_tokens, reply.written_blocks), (19, 5));
        pair.all_blocks_back().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_prefill_has_is_sent_and_not_computed_again() {
    for lane in LANES {
        let pair = Pair::usual(lane);
        let prompt = prompt(2, 43, 0);
        let first = run(&pair.decode, via(request(&prompt, 8), &[1]))
            .await
            .unwrap();
        assert_eq!(first.usage.remote_prefill_tokens, 43);
        // A second decode worker has none of it.
        let other = Setup {
            role: WorkerRole::Decode,
            lanes: vec![lane],
            remote: Some(Arc::new(Client(Arc::clone(&pair.direct)))),
            ..Setup::default()
        }
        .start("decode-2");
        let second = run(&other, via(request(&prompt, 8), &[1])).await.unwrap();
        assert_eq!(second.tokens, fake::reference(&prompt, 8), "{lane}");
        let reply = pair.reply(1).await;
        assert_eq!((reply.cached_blocks, reply.computed_tokens), (10, 3));
        assert_eq!(reply.written_blocks, 11);
        pair.all_blocks_back().await;
        all_blocks_back(&other).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn short_prompts_and_those_without_a_prefill_worker_stay_local() {
    let pair = Pair::usual(Lane::Loopback);
    let short = run(&pair.decode, via(request(&[1, 2, 3, 4, 5], 4), &[1]))
        .await
        .unwrap();
    assert_eq!(short.usage.remote_prefill_tokens, 0);
    assert_eq!(pair.direct.calls(), 0);
    let long = prompt(0, 30, 0);
    let no_hint = run(&pair.decode, request(&long, 4)).await.unwrap();
    assert_eq!(no_hint.usage.remote_prefill_tokens, 0);
    pair.direct.remove(1);
    let other = prompt(1, 30, 0);
    let gone = run(&pair.decode, via(request(&other, 4), &[1]))
        .await
        .unwrap();
    assert_eq!(gone.tokens, fake::reference(&other, 4));
    assert_eq!(gone.usage.remote_prefill_tokens, 0);
    assert_eq!(pair.direct.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_at_any_moment_leaks_nothing() {
    for lane in LANES {
        let pair = pair(
            lane,
            vec![Setup::default()],
            Setup {
                blocks: 96,
                ..Setup::default()
            },
        );
        let mut random = StdRng::seed_from_u64(11);
        for round in 0..12 {
            let runs = (0..12).map(|i| {
                let prompt = prompt(i % 3, 8 + (i as usize * 13) % 80, round * 12 + i);
                let patience = random.random_range(0..400);
                let engine = Arc::clone(&pair.decode);
                async move {
                    let request = via(request(&prompt, 16), &[1]);
                    let mut impatient = Box::pin(run(&engine, request));
                    for _ in 0..patience {
                        match (&mut impatient).now_or_never() {
                            None => tokio::task::yield_now().await,
                            Some(Ok(outcome)) => {
                                return assert_eq!(outcome.tokens, fake::reference(&prompt, 16));
                            }
                            // Those that were left before are not all gone yet.
                            Some(Err(error)) => {
                                return assert_eq!(error.kind, ErrorKind::Overloaded, "{error}");
                            }
                        }
                    }
                }
            });
            join_all(runs).await;
        }
        pair.all_blocks_back().await;
        let prompt = prompt(0, 60, 999);
        let outcome = run(&pair.decode, via(request(&prompt, 8), &[1]))
            .await
            .unwrap();
        assert_eq!(outcome.tokens, fake::reference(&prompt, 8));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_faulty_lane_ends_in_the_right_tokens() {
    for (lane, seed) in LANES.into_iter().zip(1..) {
        let faults = FaultConfig {
            delay: 0.3,
            loss: 0.01,
            disconnect: 0.01,
            ..FaultConfig::seeded(seed)
        };
        let pair = pair(
            lane,
            vec![Setup {
                faults: Some(faults),
                ..Setup::default()
            }],
            Setup {
                attempt_timeout: Duration::from_millis(400),
                ..Setup::default()
            },
        );
        for round in 0..3 {
            let prompts: Vec<_> = (0..12).map(|i| prompt(i, 30, round * 12 + i)).collect();
            let runs = prompts
                .iter()
                .map(|prompt| run(&pair.decode, via(request(prompt, 8), &[1, 1])));
            for (prompt, outcome) in prompts.iter().zip(join_all(runs).await) {
                assert_eq!(
                    outcome.unwrap().tokens,
                    fake::reference(prompt, 8),
                    "{lane}"
                );
            }
        }
        pair.all_blocks_back().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_worker_that_dies_in_the_middle_is_replaced_by_another_or_by_decode() {
    for lane in LANES {
        let dying = || {
            let hook: Hook = Arc::new(|layer, slices| {
                let late = slices.iter().any(|slice| slice.position > 0);
                assert!(!(late && layer.0 == 1), "planted: dies in the second chunk");
            });
            Setup {
                hook: Some(hook),
                ..Setup::default()
            }
        };
        let pair = pair(
            lane,
            vec![dying(), Setup::default(), dying()],
            Setup::default(),
        );
        let first = prompt(0, 40, 0);
        let outcome = run(&pair.decode, via(request(&first, 8), &[1, 2]))
            .await
            .unwrap();
        assert_eq!(outcome.tokens, fake::reference(&first, 8), "{lane}");
        assert_eq!(outcome.usage.remote_prefill_tokens, 40);
        assert_eq!(pair.direct.calls(), 2);
        let second = prompt(1, 40, 0);
        let outcome = run(&pair.decode, via(request(&second, 8), &[3]))
            .await
            .unwrap();
        assert_eq!(outcome.tokens, fake::reference(&second, 8), "{lane}");
        assert_eq!(outcome.usage.remote_prefill_tokens, 0);
        all_blocks_back(&pair.decode).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_worker_that_is_too_slow_writes_nothing_after_it_was_given_up() {
    for lane in LANES {
        let (hook, go) = brake();
        let pair = pair(
            lane,
            vec![Setup {
                hook: Some(hook),
                ..Setup::default()
            }],
            Setup {
                attempt_timeout: Duration::from_millis(50),
                ..Setup::default()
            },
        );
        let prompts: Vec<_> = (0..4).map(|i| prompt(i, 40, 0)).collect();
        let runs = prompts
            .iter()
            .map(|prompt| run(&pair.decode, via(request(prompt, 30), &[1])));
        let outcomes = join_all(runs).await;
        // Its steps go on now, with windows that are closed.
        drop(go);
        for (prompt, outcome) in prompts.iter().zip(outcomes) {
            assert_eq!(
                outcome.unwrap().tokens,
                fake::reference(prompt, 30),
                "{lane}"
            );
        }
        pair.all_blocks_back().await;
        for prompt in &prompts {
            let again = run(&pair.decode, request(prompt, 30)).await.unwrap();
            assert!(again.usage.cached_tokens > 0);
            assert_eq!(again.tokens, fake::reference(prompt, 30), "{lane}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_sent_while_later_ones_are_computed() {
    for lane in LANES {
        let (go, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let hook: Hook = Arc::new(move |layer, _| {
            if layer.0 == 1 {
                let _ = wait.lock().recv();
            }
        });
        let slow = Setup {
            hook: Some(hook),
            ..Setup::default()
        };
        let pair = pair(lane, vec![slow], Setup::default());
        let prompt = prompt(0, 12, 0);
        let mut stream = pair
            .decode
            .generate(via(request(&prompt, 4), &[1]))
            .unwrap();
        // The engine is held in layer 1 of the only chunk; layer 0 of its 3 blocks arrives.
        let agent = pair.prefill[0].handoff.as_ref().unwrap().agent();
        let bytes = 3 * fake::layout().layer_bytes() as u64;
        eventually("layer 0 was sent", || agent.stats().bytes_done == bytes).await;
        drop(go);
        let frame = stream.next().await.unwrap().unwrap();
        assert_eq!(frame.tokens[0].id, fake::reference(&prompt, 1)[0], "{lane}");
        drop(stream);
        pair.all_blocks_back().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_blocks_are_stuck_goes_on_in_others() {
    let (hook, go) = brake();
    let slow = Setup {
        hook: Some(hook),
        ..Setup::default()
    };
    let pair = pair(Lane::Shm, vec![slow], Setup::default());
    let prompt = prompt(0, 40, 0);
    let mut stream = pair
        .decode
        .generate(via(request(&prompt, 8), &[1]))
        .unwrap();
    eventually("the job was sent", || pair.direct.calls() == 1).await;
    // What the task says when a peer that maps the memory does not let go of it.
    let stuck = HandoffEvent::PrefillStuck(GenerateError::new(ErrorKind::WorkerLost, "planted"));
    let mailbox = &pair.decode.ranks[0].mailbox;
    mailbox.post(Command::Handoff(SequenceId(0), stuck));
    let mut tokens = Vec::new();
    while let Some(frame) = stream.next().await {
        tokens.extend(frame.unwrap().tokens.iter().map(|token| token.id));
    }
    assert_eq!(tokens, fake::reference(&prompt, 8));
    assert_eq!(pair.decode.load()[0].prefill_tokens_total, 40);
    drop(go);
    pair.all_blocks_back().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_set_aside_count_as_quarantined_until_they_are_let_go() {
    let engine = Setup::default().start("aside");
    let rank = &engine.ranks[0];
    let blocks = SequenceBlocks {
        shared: Vec::new(),
        owned: rank.pool.allocate(5).unwrap(),
    };
    let quarantine = HeldBlocks::new(blocks, Arc::clone(rank)).quarantine();
    assert_eq!(engine.load()[0].blocks_quarantined, 5);
    drop(quarantine);
    assert_eq!(engine.load()[0].blocks_quarantined, 0);
    assert_eq!(rank.pool.stats().free, rank.pool.stats().total);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_in_the_middle_of_a_remote_prefill_frees_both_sides() {
    let (hook, go) = brake();
    let slow = Setup {
        hook: Some(hook),
        ..Setup::default()
    };
    let pair = pair(Lane::Loopback, vec![slow], Setup::default());
    let mut request = via(request(&prompt(0, 40, 0), 8), &[1]);
    request.deadline_ms = 50;
    let error = run(&pair.decode, request).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    all_blocks_back(&pair.decode).await;
    drop(go);
    pair.all_blocks_back().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_of_another_model_is_refused_and_decode_prefills_itself() {
    let other = Setup {
        fingerprint: 8,
        ..Setup::default()
    };
    let pair = pair(Lane::Loopback, vec![other], Setup::default());
    let prompt = prompt(0, 40, 0);
    let outcome = run(&pair.decode, via(request(&prompt, 8), &[1]))
        .await
        .unwrap();
    assert_eq!(outcome.tokens, fake::reference(&prompt, 8));
    assert_eq!(
        (outcome.usage.remote_prefill_tokens, pair.direct.calls()),
        (0, 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_contradict_themselves_are_refused_with_their_reason() {
    let prefill = Setup {
        role: WorkerRole::Prefill,
        ..Setup::default()
    }
    .start("strict-prefill");
    let target = || KvTarget {
        agent: Vec::new().into(),
        region: 1,
        window: 1,
        layout: fake::layout(),
        pool_blocks: 10,
        model_fingerprint: 7,
        block_ids: (0..3).map(blockplane_protocol::BlockId).collect(),
        cached_blocks: 0,
        cached_window: None,
    };
    let job = |target| PrefillJob {
        request: request(&prompt(0, 10, 0), 1),
        target,
    };
    let refuses = |job: PrefillJob| {
        let error = prefill.prefill(job).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidRequest, "{error}");
        error.message
    };
    let refused = |change: &dyn Fn(&mut KvTarget)| {
        let mut target = target();
        change(&mut target);
        refuses(job(PrefillTarget::Blocks(target)))
    };
    let model = refused(&|target| target.model_fingerprint = 8);
    assert!(model.contains("fingerprint"), "{model}");
    let layout = refused(&|target| target.layout.head_dim = 8);
    assert!(layout.contains("head_dim: 8"), "{layout}");
    refused(&|target| target.block_ids.truncate(2));
    refused(&|target| target.block_ids[1].0 = 10);
    refused(&|target| target.cached_blocks = 1);
    refused(&|target| {
        target.cached_blocks = 3;
        target.cached_window = Some(2);
    });
    let job = || job(PrefillTarget::Blocks(target()));
    let mut empty = job();
    empty.request.token_ids.clear();
    refuses(empty);
    let connector = refuses(PrefillJob {
        target: PrefillTarget::Connector(ConnectorTarget {
            identity: "vLLM".to_owned(),
        }),
        ..job()
    });
    assert!(connector.contains("connector"), "{connector}");
    let metadata = prefill.prefill(job()).unwrap().await.unwrap_err();
    assert!(metadata.message.contains("metadata"), "{metadata}");

    let decode = Setup {
        role: WorkerRole::Decode,
        ..Setup::default()
    }
    .start("strict-decode");
    let error = decode.prefill(job()).unwrap_err();
    assert!(error.message.contains("decode"), "{error}");
    let error = prefill.generate(request(&[1], 1)).unwrap_err();
    assert!(error.message.contains("prefill"), "{error}");
}
