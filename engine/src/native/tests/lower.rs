//! Engines above a lower tier.

use futures::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{shelf::Mood, *};

/// An engine whose pool holds little more than one request, above `shelf`.
fn small(shelf: &Arc<Shelf>, blocks: u32) -> Setup {
    Setup {
        blocks,
        shelf: Some(Arc::clone(shelf)),
        ..Setup::default()
    }
}

/// Fills the pool with other prompts, so that nothing of earlier ones is left there.
async fn push_out(engine: &NativeEngine) {
    let blocks = engine.info().blocks;
    for family in 0..blocks.div_ceil(16) {
        run(engine, request(&prompt(900 + family, 64, family), 1))
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_left_the_pool_is_loaded_and_counted_as_cached() {
    let shelf = Arc::new(Shelf::default());
    let engine = small(&shelf, 24).start("loads");
    let prompt = prompt(1, 41, 0);
    let first = run(&engine, request(&prompt, 6)).await.unwrap();
    assert_eq!(first.usage.cached_tokens, 0);
    push_out(&engine).await;
    let again = run(&engine, request(&prompt, 6)).await.unwrap();
    assert_eq!(again.tokens, first.tokens);
    assert_eq!(again.tokens, fake::reference(&prompt, 6));
    let usage = again.usage;
    assert_eq!(usage.cached_tokens, 40);
    // The shelf says that half of it was in host memory.
    assert_eq!(
        (usage.cached_host_tokens, usage.cached_disk_tokens),
        (20, 20)
    );
    let load = engine.load()[0];
    assert_eq!(load.cached_tokens_total, 40);
    assert_eq!(
        (load.cached_host_tokens_total, load.cached_disk_tokens_total),
        (20, 20)
    );
    assert_eq!(load.onboard_failures_total, 0);
    // What was loaded is readable: the next one finds it in the pool.
    let third = run(&engine, request(&prompt, 6)).await.unwrap();
    assert_eq!(
        (third.usage.cached_tokens, third.usage.cached_host_tokens),
        (40, 0)
    );
    assert_eq!(shelf.loads.load(Ordering::Relaxed), 1);
    let others = 2;
    assert_eq!(shelf.referenced.load(Ordering::Relaxed), 3 + others);
    all_blocks_back(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_are_computed_while_one_loads() {
    let shelf = Arc::new(Shelf::default());
    let engine = small(&shelf, 40).start("overlap");
    let slow = prompt(1, 41, 0);
    run(&engine, request(&slow, 1)).await.unwrap();
    push_out(&engine).await;
    shelf.set(Mood {
        hold: true,
        ..Mood::default()
    });
    let waiting = engine.generate(request(&slow, 4)).unwrap();
    eventually("it loads", || shelf.loads.load(Ordering::Relaxed) == 1).await;
    let other = prompt(2, 30, 0);
    let outcome = run(&engine, request(&other, 9)).await.unwrap();
    assert_eq!(outcome.tokens, fake::reference(&other, 9));
    shelf.release();
    let frames: Vec<_> = waiting.collect().await;
    let tokens = frames.into_iter().flat_map(|frame| frame.unwrap().tokens);
    let tokens: Vec<_> = tokens.map(|token| token.id).collect();
    assert_eq!(tokens, fake::reference(&slow, 4));
    all_blocks_back(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_come_is_computed() {
    let shelf = Arc::new(Shelf::default());
    let engine = small(&shelf, 24).start("partly");
    let prompt = prompt(1, 41, 0);
    run(&engine, request(&prompt, 1)).await.unwrap();
    for come in [0, 3, 9] {
        shelf.set(Mood::default());
        push_out(&engine).await;
        shelf.set(Mood {
            fail_after: Some(come),
            ..Mood::default()
        });
        let outcome = run(&engine, request(&prompt, 8)).await.unwrap();
        assert_eq!(outcome.tokens, fake::reference(&prompt, 8), "{come} came");
        let usage = outcome.usage;
        assert_eq!(usage.cached_tokens as usize, come * BLOCK_TOKENS as usize);
        assert_eq!(
            usage.cached_host_tokens + usage.cached_disk_tokens,
            usage.cached_tokens
        );
    }
    assert_eq!(engine.load()[0].onboard_failures_total, 3);
    all_blocks_back(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_a_cancelled_load_come_back_when_no_byte_lands() {
    let shelf = Arc::new(Shelf::default());
    let engine = small(&shelf, 24).start("cancelled");
    let slow = prompt(1, 41, 0);
    run(&engine, request(&slow, 1)).await.unwrap();
    push_out(&engine).await;
    shelf.set(Mood {
        hold: true,
        ..Mood::default()
    });
    for round in 1..=2 {
        let mut late = request(&slow, 4);
        if round == 2 {
            // This one ends by its deadline.
            late.deadline_ms = 30;
        }
        let stream = engine.generate(late).unwrap();
        eventually("it loads", || shelf.loads.load(Ordering::Relaxed) == round).await;
        if round == 1 {
            drop(stream);
        } else {
            let frames: Vec<_> = stream.collect().await;
            let error = frames.last().unwrap().as_ref().unwrap_err();
            assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
        }
        eventually("it is given up", || {
            shelf.given_up.load(Ordering::Relaxed) == round
        })
        .await;
        assert!(stats(&engine)[0].active >= 10, "the targets are kept");
        shelf.release();
        all_blocks_back(&engine).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_does_not_wait_for_a_load_that_hangs() {
    let shelf = Arc::new(Shelf::default());
    let engine = small(&shelf, 24).start("draining");
    let slow = prompt(1, 41, 0);
    run(&engine, request(&slow, 1)).await.unwrap();
    push_out(&engine).await;
    shelf.set(Mood {
        hold: true,
        ..Mood::default()
    });
    let stream = engine.generate(request(&slow, 4)).unwrap();
    eventually("it loads", || shelf.loads.load(Ordering::Relaxed) == 1).await;
    engine.drain(Duration::from_millis(20)).await;
    let frames: Vec<_> = stream.collect().await;
    let error = frames.last().unwrap().as_ref().unwrap_err();
    assert_eq!(error.kind, ErrorKind::WorkerLost);
    shelf.release();
    all_blocks_back(&engine).await;
}

/// Requests of a few families that come and go over a pool that holds a few of them, above a tier
/// that gives all, some or nothing, now or later, and loses blocks.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_those_of_the_reference_whatever_the_lower_tier_does() {
    for seed in 0..12 {
        let mut random = StdRng::seed_from_u64(seed);
        let shelf = Arc::new(Shelf::default());
        let engine = small(&shelf, random.random_range(44..90)).start("faults");
        for _ in 0..12 {
            shelf.set(Mood {
                fail_after: random.random_bool(0.5).then(|| random.random_range(0..12)),
                hold: random.random_bool(0.3),
            });
            let prompts: Vec<_> = (0..6)
                .map(|_| {
                    let len = random.random_range(1..90);
                    prompt(random.random_range(0..5), len, random.random_range(0..3))
                })
                .collect();
            let cancelled: Vec<_> = prompts
                .iter()
                .take(random.random_range(0..3))
                .map(|prompt| engine.generate(request(prompt, 30)).unwrap())
                .collect();
            let runs = join_all(prompts.iter().map(|p| run(&engine, request(p, 12))));
            let helper = async {
                tokio::time::sleep(Duration::from_millis(2)).await;
                drop(cancelled);
                loop {
                    shelf.release();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            let outcomes = tokio::select! {
                outcomes = runs => outcomes,
                () = helper => unreachable!("it goes on for ever"),
            };
            for (prompt, outcome) in prompts.iter().zip(outcomes) {
                let tokens = outcome.unwrap().tokens;
                assert_eq!(tokens, fake::reference(prompt, 12), "seed {seed}");
            }
            if random.random_bool(0.3) {
                shelf.lose(random.random_range(2..6));
            }
        }
        shelf.release();
        shelf.set(Mood::default());
        assert!(
            shelf.loads.load(Ordering::Relaxed) > 3 && shelf.len() > 0,
            "seed {seed}"
        );
        all_blocks_back(&engine).await;
    }
}

/// The decode side loads what it has below before it asks a prefill worker for the rest, and
/// offers what it got from there.
#[tokio::test(flavor = "multi_thread")]
async fn both_sides_of_a_disaggregated_request_use_their_lower_tiers() {
    let direct = Arc::new(Direct::default());
    let (at_prefill, at_decode) = (Arc::new(Shelf::default()), Arc::new(Shelf::default()));
    let prefill = Setup {
        role: WorkerRole::Prefill,
        ..small(&at_prefill, 24)
    }
    .start("prefill");
    direct.add(1, Arc::clone(&prefill));
    let decode = Setup {
        role: WorkerRole::Decode,
        remote: Some(Arc::new(Client(Arc::clone(&direct)))),
        ..small(&at_decode, 24)
    }
    .start("decode");
    let long = prompt(1, 61, 0);
    let first = run(&decode, via(request(&long, 4), &[1])).await.unwrap();
    assert_eq!(first.usage.remote_prefill_tokens, 61);
    assert!(at_decode.len() >= 15 && at_prefill.len() >= 15);
    for (keep_at_decode, computed) in [(true, 0), (false, 1)] {
        for engine in [&decode, &prefill] {
            all_blocks_back(engine).await;
        }
        for family in 0..2 {
            let other = prompt(900 + family, 64, family);
            run(&decode, via(request(&other, 1), &[1])).await.unwrap();
        }
        if !keep_at_decode {
            at_decode.lose(1);
        }
        let outcome = run(&decode, via(request(&long, 4), &[1])).await.unwrap();
        assert_eq!(outcome.tokens, fake::reference(&long, 4));
        // One token is left here; without them, the other side has all but that one below.
        assert_eq!(outcome.usage.remote_prefill_tokens, computed);
    }
    eventually("the prefill side says what it loaded", || {
        let load = prefill.load()[0];
        load.cached_host_tokens_total + load.cached_disk_tokens_total == 60
    })
    .await;
    for engine in [&decode, &prefill] {
        all_blocks_back(engine).await;
    }
}
