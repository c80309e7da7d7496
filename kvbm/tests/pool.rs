//! What the pool promises, one scenario each.

use std::{
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use blockplane_kvbm::{BlockPool, ImmutableBlock, KvBatch, PoolActivity, PoolConfig, PoolStats};
use blockplane_protocol::{BlockId, KvEventData, SaltHash, TokenBlock, TokenSequence};

fn sequence(seed: u32, blocks: usize) -> Vec<TokenBlock> {
    let tokens: Vec<u32> = (0..).map(|i| seed * 1000 + i).take(blocks * 4).collect();
    TokenSequence::from_tokens(&tokens, 4, SaltHash::default())
        .blocks()
        .to_vec()
}

fn store(pool: &BlockPool, hashes: &[TokenBlock]) -> Vec<ImmutableBlock> {
    let mut parent = None;
    let fresh = pool.allocate(hashes.len()).expect("room");
    let complete = fresh.into_iter().zip(hashes).map(|(block, hashes)| {
        let complete = block.complete(*hashes, parent);
        parent = Some(hashes.sequence);
        complete
    });
    BlockPool::register(complete.collect())
}

fn events(batch: Option<KvBatch>) -> Vec<(u64, KvEventData)> {
    let Some(KvBatch::Events(events)) = batch else {
        panic!("events expected, got {batch:?}");
    };
    events
        .into_iter()
        .map(|event| (event.event_id, event.data))
        .collect()
}

#[test]
fn what_was_registered_is_found_after_release_and_evicted_tail_first() {
    let pool = BlockPool::accounting(4, PoolConfig::default());
    let prompt = sequence(1, 3);
    drop(store(&pool, &prompt));
    assert_eq!((pool.stats().cached, pool.stats().free), (3, 1));
    assert_eq!(pool.match_prefix(&prompt).len(), 3);

    let taken = pool.allocate(3).unwrap();
    assert_eq!(
        pool.match_prefix(&prompt).len(),
        1,
        "the head outlives the tail"
    );
    drop(taken);
    assert_eq!(pool.peek_prefix(&prompt), 1);
}

#[test]
fn a_held_block_is_never_evicted() {
    let pool = BlockPool::accounting(4, PoolConfig::default());
    let held = store(&pool, &sequence(1, 3));
    drop(store(&pool, &sequence(2, 1)));
    let error = pool.allocate(2).unwrap_err();
    assert_eq!((error.wanted, error.available), (2, 1));
    assert!(error.retryable());
    assert_eq!(
        pool.peek_prefix(&sequence(2, 1)),
        1,
        "a failed allocation evicts nothing"
    );
    assert!(!pool.allocate(5).unwrap_err().retryable());
    drop(held);
    assert_eq!(pool.allocate(4).unwrap().len(), 4);
}

#[test]
fn a_duplicate_collapses_onto_the_first_block() {
    let pool = BlockPool::accounting(4, PoolConfig::default());
    let prompt = sequence(1, 1);
    let first = store(&pool, &prompt);
    let second = store(&pool, &prompt);
    assert_eq!(first[0].id(), second[0].id());
    assert_eq!((pool.stats().active, pool.stats().free), (1, 3));
}

#[test]
fn without_prefix_caching_nothing_is_found_and_nothing_is_told() {
    let config = PoolConfig {
        prefix_caching: false,
        ..PoolConfig::default()
    };
    let pool = BlockPool::accounting(4, config);
    let held = store(&pool, &sequence(1, 2));
    assert!(pool.match_prefix(&sequence(1, 2)).is_empty());
    drop(held);
    assert_eq!(pool.stats().free, 4);
    assert_eq!(pool.events().last_event_id(), 0);
}

#[test]
fn what_a_pool_does_is_counted() {
    let pool = BlockPool::accounting(4, PoolConfig::default());
    let (first, second, third) = (sequence(1, 2), sequence(2, 2), sequence(3, 1));
    let held = store(&pool, &first);
    // The same again: two blocks for names that are there.
    drop(store(&pool, &first));
    drop(held);
    drop(store(&pool, &second));
    // Two of the four are overwritten.
    drop(store(&pool, &third));
    let taken = pool.allocate(1).unwrap();
    assert_eq!(pool.activity().filling, 1);
    let quarantine = pool.quarantine(taken);
    assert_eq!(pool.activity().filling, 0);
    let back = quarantine.take_back();
    assert_eq!(pool.activity().filling, 1);
    back.into_iter().for_each(|block| block.retire());
    drop(pool.match_prefix(&sequence(4, 5)));
    drop(pool.match_prefix(&third));
    drop(pool.scan(&[third[0], sequence(4, 1)[0]]));
    let expected = PoolActivity {
        allocations: 2 + 2 + 2 + 1 + 1,
        allocations_from_reset: 2 + 2 + 2,
        evictions: 2,
        registrations: 2 + 2 + 2 + 1,
        registration_dedup: 2,
        match_requested: 5 + 1,
        match_returned: 1,
        scan_requested: 2,
        scan_returned: 1,
        filling: 0,
    };
    assert_eq!(pool.activity(), expected);
}

#[test]
fn quarantined_blocks_are_counted_and_cannot_be_had() {
    let pool = BlockPool::accounting(4, PoolConfig::default());
    let quarantine = pool.quarantine(pool.allocate(3).unwrap());
    let expected = PoolStats {
        total: 4,
        free: 1,
        quarantined: 3,
        ..PoolStats::default()
    };
    assert_eq!(pool.stats(), expected);
    assert!(pool.allocate(2).is_err());
    let back = quarantine.take_back();
    assert_eq!((pool.stats().quarantined, pool.stats().active), (0, 3));
    drop(pool.quarantine(back));
    assert_eq!(pool.stats().free, 4);
}

#[test]
#[should_panic(expected = "invariant 2")]
fn a_block_cannot_be_completed_under_another_name() {
    let pool = BlockPool::accounting(1, PoolConfig::default());
    let blocks = sequence(1, 2);
    let block = pool.allocate(1).unwrap().remove(0);
    let _ = block.complete(blocks[1], None);
}

#[test]
fn clearing_forgets_held_blocks_too() {
    let pool = BlockPool::accounting(4, PoolConfig::default());
    let prompt = sequence(1, 2);
    let held = store(&pool, &prompt);
    drop(store(&pool, &sequence(2, 1)));
    pool.clear();
    assert!(pool.match_prefix(&prompt).is_empty());
    assert_eq!((pool.stats().cached, pool.stats().free), (0, 2));
    let again = store(&pool, &prompt);
    assert_ne!(
        again[0].id(),
        held[0].id(),
        "the old contents are not shared any more"
    );
    drop(held);
    assert_eq!(pool.stats().free, 2);
    assert_eq!(pool.match_prefix(&prompt).len(), 2);
}

#[test]
fn events_tell_of_whole_runs_and_of_evictions() {
    let pool = BlockPool::accounting(3, PoolConfig::default());
    let mut subscription = pool.events().subscribe(Some(0));
    let prompt = sequence(1, 3);
    drop(store(&pool, &prompt));
    drop(pool.allocate(2).unwrap());

    let events = events(subscription.try_recv().unwrap());
    assert_eq!(events.len(), 2);
    let (
        1,
        KvEventData::Stored {
            parent: None,
            blocks,
            ..
        },
    ) = &events[0]
    else {
        panic!("{events:?}");
    };
    assert!(
        blocks
            .iter()
            .map(|b| b.sequence)
            .eq(prompt.iter().map(|b| b.sequence))
    );
    let (2, KvEventData::Removed { hashes, .. }) = &events[1] else {
        panic!("{events:?}");
    };
    assert_eq!(hashes[..], [prompt[2].sequence, prompt[1].sequence]);
}

#[test]
fn a_subscriber_resumes_after_the_number_it_saw() {
    let pool = BlockPool::accounting(8, PoolConfig::default());
    let held: Vec<_> = (0..4)
        .map(|seed| store(&pool, &sequence(seed, 1)))
        .collect();
    let mut resumed = pool.events().subscribe(Some(2));
    let ids: Vec<u64> = events(resumed.try_recv().unwrap())
        .iter()
        .map(|(id, _)| *id)
        .collect();
    assert_eq!(ids, [3, 4]);
    assert!(resumed.try_recv().is_err(), "nothing new");
    drop(held);
}

#[test]
fn a_subscriber_that_is_too_far_behind_gets_a_snapshot_and_then_what_follows() {
    let config = PoolConfig {
        events_max: 3,
        ..PoolConfig::default()
    };
    let pool = BlockPool::accounting(8, config);
    let feed = pool.events();
    let mut slow = feed.subscribe(Some(0));
    let mut of_an_earlier_life = feed.subscribe(Some(77));
    let long = sequence(0, 3);
    let held: Vec<_> = [store(&pool, &long), store(&pool, &sequence(1, 1))].into();

    for subscription in [&mut slow, &mut of_an_earlier_life] {
        let Ok(Some(KvBatch::Snapshot(snapshot))) = subscription.try_recv() else {
            panic!("a snapshot is due");
        };
        assert_eq!((snapshot.last_event_id, snapshot.blocks.len()), (2, 4));
        let chain: Vec<_> = snapshot
            .blocks
            .iter()
            .map(|entry| entry.block.sequence)
            .collect();
        let places: Vec<_> = long
            .iter()
            .map(|block| chain.iter().position(|&name| name == block.sequence))
            .collect();
        assert!(places.is_sorted(), "parents first: {places:?}");
    }
    drop(store(&pool, &sequence(2, 1)));
    assert_eq!(events(slow.try_recv().unwrap())[0].0, 3);
    drop(held);
}

#[test]
fn the_end_of_the_pool_is_the_end_of_its_events() {
    let pool = BlockPool::accounting(2, PoolConfig::default());
    let mut subscription = pool.events().subscribe(Some(0));
    let held = store(&pool, &sequence(1, 1));
    drop(pool);
    drop(held);
    assert_eq!(events(subscription.try_recv().unwrap()).len(), 1);
    assert_eq!(subscription.try_recv(), Ok(None));
    let mut context = Context::from_waker(Waker::noop());
    assert_eq!(
        pin!(subscription.next()).poll(&mut context),
        Poll::Ready(None)
    );
}

struct CountWakes(AtomicU64);

impl Wake for CountWakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_waiting_task_is_woken_once_and_a_dropped_one_never() {
    let pool = BlockPool::accounting(2, PoolConfig::default());
    let (waiting, dropped) = (
        Arc::new(CountWakes(AtomicU64::new(0))),
        Arc::new(CountWakes(AtomicU64::new(0))),
    );
    let mut subscription = pool.events().subscribe(Some(0));
    let waker = Waker::from(Arc::clone(&waiting));
    for _ in 0..2 {
        assert_eq!(
            subscription.poll_next(&mut Context::from_waker(&waker)),
            Poll::Pending
        );
    }
    let mut gone = pool.events().subscribe(Some(0));
    let gone_waker = Waker::from(Arc::clone(&dropped));
    assert!(
        gone.poll_next(&mut Context::from_waker(&gone_waker))
            .is_pending()
    );
    drop(gone);

    drop(store(&pool, &sequence(1, 1)));
    drop(store(&pool, &sequence(2, 1)));
    assert_eq!(waiting.0.load(Ordering::SeqCst), 1);
    assert_eq!(dropped.0.load(Ordering::SeqCst), 0);
    assert!(
        subscription
            .poll_next(&mut Context::from_waker(&waker))
            .is_ready()
    );
}

/// A waker may run anything, the pool included: it must not be woken under the pool's lock.
#[test]
fn a_waker_may_use_the_pool() {
    struct UsesPool(BlockPool, Mutex<Option<PoolStats>>);
    impl Wake for UsesPool {
        fn wake(self: Arc<Self>) {
            *self.1.lock().unwrap() = Some(self.0.stats());
        }
    }
    let pool = BlockPool::accounting(1, PoolConfig::default());
    let uses_pool = Arc::new(UsesPool(pool.clone(), Mutex::new(None)));
    let mut subscription = pool.events().subscribe(Some(0));
    let waker = Waker::from(Arc::clone(&uses_pool));
    assert!(
        subscription
            .poll_next(&mut Context::from_waker(&waker))
            .is_pending()
    );
    drop(store(&pool, &sequence(1, 1)));
    assert!(uses_pool.1.lock().unwrap().is_some());
}

/// Threads that match, fill, drop and evict the same few sequences. Each block's "memory" says which
/// name was written into it last; whoever holds a block must find its own name there (invariants 1
/// and 2), and the events must rebuild what the pool ends with.
#[test]
fn many_threads_share_one_pool() {
    const BLOCKS: u32 = 24;
    const ROUNDS: u32 = 3_000;
    let pool = BlockPool::accounting(BLOCKS, PoolConfig::default());
    let memory: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let mut subscription = pool.events().subscribe(Some(0));
    let prompts: Vec<Vec<TokenBlock>> = (0..8).map(|seed| sequence(seed, 5)).collect();

    let mut known = thread::scope(|scope| {
        let (pool, memory, prompts, stop) = (&pool, &memory, &prompts, &stop);
        let listener = scope.spawn(move || {
            let mut known = std::collections::BTreeSet::new();
            loop {
                let done = stop.load(Ordering::SeqCst);
                match subscription.recv_timeout(Duration::from_millis(if done { 0 } else { 50 })) {
                    Ok(batch) => apply(&mut known, batch),
                    Err(_) if done => break known,
                    Err(_) => {}
                }
            }
        });
        let workers: Vec<_> = (0..4u32)
            .map(|thread| {
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let pick = (round.wrapping_mul(2_654_435_761) >> 7) + thread * 3;
                        let prompt = &prompts[pick as usize % prompts.len()];
                        let mut held = pool.match_prefix(prompt);
                        let missing = &prompt[held.len()..];
                        let Ok(fresh) = pool.allocate(missing.len()) else {
                            continue;
                        };
                        for (block, hashes) in fresh.into_iter().zip(missing) {
                            let parent = held.last().map(ImmutableBlock::hash);
                            memory[block.id().index()].store(hashes.sequence.0, Ordering::Relaxed);
                            held.push(block.complete(*hashes, parent).register());
                        }
                        for (block, hashes) in held.iter().zip(prompt) {
                            assert_eq!(block.hash(), hashes.sequence);
                            let bytes = memory[block.id().index()].load(Ordering::Relaxed);
                            assert_eq!(bytes, hashes.sequence.0, "invariant 2");
                        }
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .for_each(|worker| worker.join().unwrap());
        stop.store(true, Ordering::SeqCst);
        listener.join().unwrap()
    });

    let mut snapshot = std::collections::BTreeSet::new();
    apply(
        &mut snapshot,
        pool.events().subscribe(None).try_recv().unwrap(),
    );
    assert_eq!(std::mem::take(&mut known), snapshot);
    let stats = pool.stats();
    assert_eq!((stats.active, stats.cached), (0, snapshot.len()));
}

fn apply(known: &mut std::collections::BTreeSet<u64>, batch: Option<KvBatch>) {
    match batch.expect("the pool lives") {
        KvBatch::Snapshot(snapshot) => {
            *known = snapshot
                .blocks
                .iter()
                .map(|entry| entry.block.sequence.0)
                .collect();
        }
        KvBatch::Events(events) => {
            for event in events {
                match event.data {
                    KvEventData::Stored { blocks, .. } => {
                        known.extend(blocks.iter().map(|block| block.sequence.0));
                    }
                    KvEventData::Removed { hashes, .. } => {
                        for hash in hashes {
                            assert!(known.remove(&hash.0), "removed before it was stored");
                        }
                    }
                    KvEventData::Cleared => known.clear(),
                }
            }
        }
    }
}

#[test]
fn a_scan_does_not_stop_at_a_miss_and_handles_know_their_names() {
    let pool = BlockPool::accounting(4, PoolConfig::default());
    let prompt = sequence(1, 3);
    drop(store(&pool, &prompt));
    assert!(pool.forget(prompt[1].sequence));
    let found = pool.scan(&prompt);
    assert_eq!(pool.match_prefix(&prompt).len(), 1);
    let names = found
        .iter()
        .map(|block| block.as_ref().map(ImmutableBlock::name));
    assert!(names.eq([Some(prompt[0]), None, Some(prompt[2])]));
    let tail = found[2].as_ref().unwrap();
    assert_eq!(tail.parent(), Some(prompt[1].sequence));
    assert_eq!(found[0].as_ref().unwrap().parent(), None);
    let here = pool.contains_each(prompt.iter().map(|block| block.sequence));
    assert_eq!(here, [true, false, true]);
    assert_eq!((pool.stats().active, pool.stats().free), (2, 2));
}

#[test]
fn victims_are_held_and_found_until_they_are_given_up() {
    let pool = BlockPool::accounting(3, PoolConfig::default());
    let prompts: Vec<_> = (0..3).map(|seed| sequence(seed, 1)).collect();
    prompts.iter().for_each(|prompt| drop(store(&pool, prompt)));
    pool.touch([prompts[0][0].sequence]);
    let mut victims = pool.victims(2).into_iter();
    let (first, second) = (victims.next().unwrap(), victims.next().unwrap());
    assert_eq!(
        [first.name(), second.name()],
        [prompts[1][0], prompts[2][0]]
    );
    assert!(pool.allocate(2).is_err(), "they are held");

    let hit = pool.match_prefix(&prompts[1]);
    assert!(!first.forget_unshared(), "a request uses it by now");
    assert!(pool.contains(prompts[1][0].sequence));
    drop(hit);
    assert!(second.forget_unshared());
    assert!(!pool.contains(prompts[2][0].sequence));
    assert_eq!((pool.stats().free, pool.stats().cached), (1, 2));
    assert_eq!(pool.victims(9).len(), 2);
}

#[test]
fn retired_slots_never_come_back() {
    let pool = BlockPool::accounting(4, PoolConfig::default());
    let prompt = sequence(1, 2);
    pool.allocate(1).unwrap().remove(0).retire();
    let held = store(&pool, &prompt);
    let again = pool.match_prefix(&prompt);
    let bad = held[1].id();
    held.into_iter().nth(1).unwrap().retire();
    assert_eq!(pool.peek_prefix(&prompt), 1, "the name is gone at once");
    assert_eq!(pool.stats().retired, 1, "its second holder still reads it");
    drop(again);
    let stats = pool.stats();
    assert_eq!((stats.retired, stats.free, stats.cached), (2, 1, 1));
    let error = pool.allocate(3).unwrap_err();
    assert_eq!((error.total, error.retryable()), (2, false));
    assert!(
        pool.allocate(2)
            .unwrap()
            .iter()
            .all(|block| block.id() != bad)
    );
}

#[test]
fn a_forgotten_block_is_free_when_its_last_holder_is_gone() {
    let pool = BlockPool::accounting(2, PoolConfig::default());
    let prompt = sequence(1, 1);
    let held = store(&pool, &prompt);
    assert!(pool.forget(prompt[0].sequence));
    assert!(!pool.forget(prompt[0].sequence));
    assert!(pool.match_prefix(&prompt).is_empty());
    assert_eq!(pool.stats().active, 1);
    let second = store(&pool, &prompt);
    assert_ne!(second[0].id(), held[0].id());
    drop(held);
    assert_eq!((pool.stats().free, pool.stats().active), (1, 1));
    assert_eq!(pool.events().last_event_id(), 3);
}

#[test]
fn what_was_on_disk_is_found_again_in_its_slots() {
    let pool = BlockPool::accounting(8, PoolConfig::default());
    let prompt = sequence(1, 3);
    let taken = pool.allocate(1).unwrap();
    let mut subscription = pool.events().subscribe(Some(0));
    let blocks = [
        (BlockId(6), prompt[0], None),
        (BlockId(2), prompt[1], Some(prompt[0].sequence)),
        (BlockId(2), prompt[2], Some(prompt[1].sequence)),
        (BlockId(3), prompt[1], Some(prompt[0].sequence)),
        (BlockId(4), prompt[2], Some(prompt[0].sequence)),
        (taken[0].id(), prompt[2], Some(prompt[1].sequence)),
        (BlockId(99), prompt[2], Some(prompt[1].sequence)),
    ];
    assert_eq!(pool.restore(blocks), 2);
    let found = pool.match_prefix(&prompt);
    let ids: Vec<u32> = found.iter().map(|block| block.id().0).collect();
    assert_eq!(ids, [6, 2]);
    assert_eq!(found[1].parent(), Some(prompt[0].sequence));
    drop((found, taken));
    let Ok(Some(KvBatch::Snapshot(snapshot))) = subscription.try_recv() else {
        panic!("too much at once is told by a snapshot");
    };
    assert_eq!(snapshot.blocks.len(), 2);
    let all = pool.allocate(8).unwrap();
    let mut ids: Vec<u32> = all.iter().map(|block| block.id().0).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..8), "each slot once");
}
