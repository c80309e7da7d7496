//! One engine on its own.

use futures::future::join_all;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_those_of_the_reference_alone_batched_chunked_and_cached() {
    let engine = Setup::default().start("agg");
    let prompts: Vec<_> = (0..24)
        .map(|i| prompt(i % 3, 1 + (i as usize * 11) % 70, i))
        .collect();
    for _ in 0..2 {
        let runs = prompts.iter().map(|p| run(&engine, request(p, 20)));
        for (prompt, outcome) in prompts.iter().zip(join_all(runs).await) {
            let outcome = outcome.unwrap();
            assert_eq!(outcome.tokens, fake::reference(prompt, 20));
            let stopped = outcome.tokens.last() == Some(&EOS);
            assert_eq!(outcome.finish == FinishReason::Stop, stopped);
        }
    }
    let alone = run(&engine, request(&prompts[7], 20)).await.unwrap();
    assert!(
        alone.usage.cached_tokens > 0,
        "all of them are cached by now"
    );
    assert_eq!(alone.tokens, fake::reference(&prompts[7], 20));
    all_blocks_back(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn preempted_requests_get_the_same_tokens() {
    let engine = Setup {
        blocks: 24,
        ..Setup::default()
    }
    .start("small");
    let prompts: Vec<_> = (0..12).map(|i| prompt(i, 20, i)).collect();
    let runs = prompts.iter().map(|prompt| {
        let mut request = request(prompt, 40);
        request.stop.ignore_eos = true;
        run(&engine, request)
    });
    for (prompt, outcome) in prompts.iter().zip(join_all(runs).await) {
        let tokens = outcome.unwrap().tokens;
        let expected = fake::reference(prompt, 40);
        // The reference stops at the end token; this request went on.
        assert_eq!(tokens.len(), 40);
        assert_eq!(tokens[..expected.len()], expected);
    }
    assert!(engine.load()[0].preemptions_total > 0);
    all_blocks_back(&engine).await;
}

/// A prompt that was asked for again and again, and then one time each many others, more than fit.
#[tokio::test(flavor = "multi_thread")]
async fn the_eviction_policy_decides_what_the_pool_keeps() {
    for (eviction, kept) in [
        (EvictionKind::Lru, false),
        (EvictionKind::MultiLru, true),
        (EvictionKind::S3Fifo, true),
        (EvictionKind::Lineage, false),
    ] {
        let engine = Setup {
            blocks: 24,
            eviction,
            ..Setup::default()
        }
        .start("evicts");
        let often = prompt(0, 21, 0);
        for _ in 0..6 {
            run(&engine, request(&often, 1)).await.unwrap();
        }
        // 5 blocks each, in a pool that has room for 4 of them.
        for other in 1..6 {
            run(&engine, request(&prompt(other, 21, 0), 1))
                .await
                .unwrap();
        }
        let again = run(&engine, request(&often, 1)).await.unwrap();
        assert_eq!(again.tokens, fake::reference(&often, 1));
        assert_eq!(again.usage.cached_tokens == 20, kept, "{eviction}");
        all_blocks_back(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_have_their_own_pools_and_events() {
    let engine = Setup {
        dp_size: 2,
        ..Setup::default()
    }
    .start("dep");
    let prompt = prompt(0, 30, 0);
    let mut second = request(&prompt, 4);
    second.route.rank = DpRank(1);
    run(&engine, second.clone()).await.unwrap();
    assert_eq!(engine.events(DpRank(0)).unwrap().last_event_id(), 0);
    assert!(engine.events(DpRank(1)).unwrap().last_event_id() > 0);
    assert!(engine.events(DpRank(2)).is_none());
    let first = run(&engine, request(&prompt, 4)).await.unwrap();
    assert_eq!(first.usage.cached_tokens, 0);
    let again = run(&engine, second).await.unwrap();
    assert_eq!(again.usage.cached_tokens, 28);
    let load = engine.load();
    assert_eq!(load[1].rank, DpRank(1));
    assert_eq!(load[1].cached_tokens_total, 28);
    assert_eq!(load[0].prefill_tokens_total, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_requests_are_refused_with_their_reason() {
    let engine = Setup::default().start("strict");
    let refused = |change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = request(&[1, 2, 3], 4);
        change(&mut request);
        let error = engine.generate(request).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidRequest, "{error}");
        error.message
    };
    let long = refused(&|r| r.token_ids = vec![1; 160]);
    assert!(
        long.contains("160 tokens") && long.contains("at most 159"),
        "{long}"
    );
    refused(&|r| r.token_ids.clear());
    refused(&|r| r.stop.max_tokens = 0);
    refused(&|r| r.model = "other".to_owned());
    refused(&|r| r.route.rank = DpRank(1));
    refused(&|r| r.sampling.temperature = f32::NAN);
    refused(&|r| r.sampling.top_p = 0.0);
    let high = refused(&|r| r.priority = Some(101));
    assert!(high.contains("101") && high.contains("0 to 100"), "{high}");
    let unknown = refused(&|r| r.token_ids[1] = VOCAB);
    assert!(unknown.contains("prompt[1]"), "{unknown}");
    let mut late = request(&[1], 1);
    late.deadline_ms = 0;
    let error = engine.generate(late).unwrap_err();
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_overload_and_a_cancelled_request_makes_room() {
    let (hook, go) = brake();
    let engine = Setup {
        hook: Some(hook),
        scheduler: SchedulerConfig {
            max_running: 1,
            max_waiting: 2,
            max_batch_tokens: 16,
            prefill_chunk_tokens: 8,
        },
        ..Setup::default()
    }
    .start("full");
    let streams: Vec<_> = (0..3)
        .map(|i| engine.generate(request(&prompt(i, 9, i), 3)).unwrap())
        .collect();
    let error = engine.generate(request(&[1], 1)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Overloaded);
    assert!(
        error.kind.retryable() && error.message.contains('3'),
        "{error}"
    );
    drop(streams);
    drop(go);
    all_blocks_back(&engine).await;
    run(&engine, request(&[1], 1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_request_with_what_it_has() {
    let (hook, go) = brake();
    let engine = Setup {
        hook: Some(hook),
        ..Setup::default()
    }
    .start("deadline");
    let mut late = request(&prompt(0, 9, 0), 140);
    late.deadline_ms = 1;
    let mut stream = engine.generate(late).unwrap();
    let started = Instant::now();
    eventually("the deadline passed", || {
        started.elapsed() > Duration::from_millis(1)
    })
    .await;
    drop(go);
    let mut last = None;
    while let Some(frame) = stream.next().await {
        last = Some(frame);
    }
    let error = last.expect("it ends with something").unwrap_err();
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    all_blocks_back(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let (hook, go) = brake();
    let engine = Setup {
        hook: Some(hook),
        ..Setup::default()
    }
    .start("drain");
    let prompt = prompt(0, 9, 0);
    let stream = engine.generate(request(&prompt, 5)).unwrap();
    let drained = engine.drain(Duration::from_secs(30));
    assert_eq!(engine.health(), Health::Draining);
    let error = engine.generate(request(&prompt, 5)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WorkerLost);
    drop(go);
    drained.await;
    assert_eq!(engine.health(), Health::Stopped);
    let frames: Vec<_> = stream.collect().await;
    let tokens: Vec<_> = frames
        .into_iter()
        .flat_map(|frame| frame.unwrap().tokens)
        .map(|token| token.id)
        .collect();
    assert_eq!(tokens, fake::reference(&prompt, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_drain_has_no_time_for_is_cancelled() {
    let (hook, go) = brake();
    let engine = Setup {
        hook: Some(hook),
        ..Setup::default()
    }
    .start("hurry");
    let mut endless = request(&prompt(0, 9, 0), 140);
    endless.stop.ignore_eos = true;
    let mut stream = engine.generate(endless).unwrap();
    let drained = engine.drain(Duration::ZERO);
    go.send(()).unwrap();
    drop(go);
    drained.await;
    let mut last = None;
    while let Some(frame) = stream.next().await {
        last = Some(frame);
    }
    let error = last.expect("it ends with something").unwrap_err();
    assert_eq!(error.kind, ErrorKind::WorkerLost);
    all_blocks_back(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_a_step_ends_every_request_and_is_seen() {
    let hook: Hook = Arc::new(|_, slices| {
        assert!(slices[0].tokens.len() > 1, "planted");
    });
    let engine = Setup {
        hook: Some(hook),
        ..Setup::default()
    }
    .start("broken");
    assert_eq!(engine.health(), Health::Ready);
    let error = run(&engine, request(&prompt(0, 9, 0), 5))
        .await
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::WorkerLost);
    eventually("its health shows it", || !engine.health().is_ready()).await;
    let error = engine.generate(request(&[1], 1)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WorkerLost);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_engine_ends_its_streams() {
    let (hook, go) = brake();
    let engine = Setup {
        hook: Some(hook),
        ..Setup::default()
    }
    .start("gone");
    let mut stream = engine.generate(request(&prompt(0, 9, 0), 50)).unwrap();
    drop(engine);
    drop(go);
    let mut last = None;
    while let Some(frame) = stream.next().await {
        last = Some(frame);
    }
    let error = last.expect("it ends with something").unwrap_err();
    assert_eq!(error.kind, ErrorKind::WorkerLost);
}
