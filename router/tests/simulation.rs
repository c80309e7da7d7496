//! Whole-router behaviour with simulated workers: virtual time, seeded requests, fake caches.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use blockplane_protocol::{
    KvEvent, KvEventData, LoadReport, SaltHash, SequenceHash, StoredBlock, Tier, TokenSequence,
    WorkerId, WorkerRank, WorkerRole,
};
use blockplane_router::{
    Applied, Confidence, DisaggPolicy, LocalReason, PrefillPlan, RankInfo, RouteError,
    RouteRequest, Router, RouterConfig, RouterMode,
};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

const BLOCK: usize = 16;
const SEED: u64 = 20_261;
const INFO: RankInfo = RankInfo {
    dp_size: 1,
    blocks: 200,
};

/// A rank's cache: blocks in LRU order, with the events that it would send.
struct FakeCache {
    rank: WorkerRank,
    blocks: VecDeque<SequenceHash>,
    present: HashSet<SequenceHash>,
    capacity: usize,
    event_id: u64,
}

impl FakeCache {
    fn new(rank: WorkerRank, capacity: usize) -> Self {
        Self {
            rank,
            blocks: VecDeque::new(),
            present: HashSet::new(),
            capacity,
            event_id: 0,
        }
    }

    /// Runs a prompt; returns the blocks that were there and the events of those that were not.
    fn run(&mut self, prompt: &TokenSequence) -> (usize, Vec<KvEvent>) {
        let blocks = prompt.blocks();
        let hits = blocks
            .iter()
            .take_while(|block| self.present.contains(&block.sequence))
            .count();
        let mut events = Vec::new();
        let named: HashSet<_> = blocks.iter().map(|block| block.sequence).collect();
        self.blocks.retain(|held| !named.contains(held));
        // Deepest first, so that a prefix outlives what hangs on it.
        for block in blocks.iter().rev() {
            self.blocks.push_back(block.sequence);
            self.present.insert(block.sequence);
        }
        if hits < blocks.len() {
            let data = KvEventData::Stored {
                parent: hits.checked_sub(1).map(|i| blocks[i].sequence),
                blocks: blocks[hits..]
                    .iter()
                    .map(|b| StoredBlock {
                        block: b.block,
                        sequence: b.sequence,
                    })
                    .collect(),
                tier: Tier::Device,
            };
            events.push(self.event(data));
        }
        let excess = self.blocks.len().saturating_sub(self.capacity);
        let hashes: Vec<_> = self.blocks.drain(..excess).collect();
        for hash in &hashes {
            self.present.remove(hash);
        }
        if !hashes.is_empty() {
            let data = KvEventData::Removed {
                hashes,
                tier: Tier::Device,
            };
            events.push(self.event(data));
        }
        (hits, events)
    }

    fn event(&mut self, data: KvEventData) -> KvEvent {
        self.event_id += 1;
        KvEvent {
            event_id: self.event_id,
            rank: self.rank.rank,
            data,
        }
    }
}

struct Outcome {
    hit_ratio: f64,
    per_rank: Vec<usize>,
}

/// 1,500 requests over 24 shared prefixes on 4 workers that each hold a third of them.
fn simulate(mode: RouterMode, events: bool) -> Outcome {
    let router = Router::new(RouterConfig {
        mode,
        ..RouterConfig::default()
    })
    .expect("valid settings");
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut caches = BTreeMap::new();
    for worker in (1..=4).map(WorkerId) {
        router.add_worker(worker, WorkerRole::Aggregated, INFO);
        let rank = WorkerRank::new(worker, 0);
        caches.insert(rank, FakeCache::new(rank, INFO.blocks as usize));
    }
    let mut running = VecDeque::new();
    let (mut hits, mut total) = (0, 0);
    let mut per_rank: BTreeMap<WorkerRank, usize> = BTreeMap::new();
    for i in 0..1_500u32 {
        let now = Duration::from_millis(u64::from(i) * 40);
        let prefix = rng.random_range(0..24u32);
        let mut tokens = vec![prefix; 20 * BLOCK];
        tokens.extend((0..2 * BLOCK).map(|_| rng.random_range(100..50_000u32)));
        let prompt = TokenSequence::from_tokens(&tokens, BLOCK, SaltHash::default());
        let routed = router
            .plan(&RouteRequest::from_sequence(&prompt), now, rng.next_u64())
            .expect("workers with room");
        let target = routed.plan.decode.target;
        *per_rank.entry(target).or_default() += 1;
        let (found, feed) = caches
            .get_mut(&target)
            .expect("a registered rank")
            .run(&prompt);
        hits += found;
        total += prompt.blocks().len();
        if events {
            for event in feed {
                let applied = router.apply_event(target.worker, &event);
                assert_eq!(applied, Some(Applied::InOrder));
            }
        }
        routed.reservation.prefill_done(now);
        running.push_back(routed.reservation);
        if running.len() > 16 {
            running.pop_front();
        }
    }
    drop(running);
    assert_eq!(router.admission().in_flight, 0);
    assert_eq!(router.decode_pool().stats().reservations, 0);
    Outcome {
        hit_ratio: f64::from(u32::try_from(hits).expect("small"))
            / f64::from(u32::try_from(total).expect("small")),
        per_rank: per_rank.into_values().collect(),
    }
}

#[test]
fn kv_mode_finds_more_cached_blocks_than_round_robin_and_leaves_nobody_idle() {
    let round_robin = simulate(RouterMode::RoundRobin, true);
    let kv = simulate(RouterMode::Kv, true);
    assert_eq!(round_robin.per_rank, [375; 4]);
    assert!(
        kv.hit_ratio > round_robin.hit_ratio + 0.2,
        "kv {} round robin {}",
        kv.hit_ratio,
        round_robin.hit_ratio
    );
    assert!(
        kv.per_rank.iter().all(|&requests| requests > 150),
        "{:?}",
        kv.per_rank
    );
}

#[test]
fn without_events_predictions_still_beat_round_robin() {
    let round_robin = simulate(RouterMode::RoundRobin, false);
    let kv = simulate(RouterMode::Kv, false);
    assert!(
        kv.hit_ratio > round_robin.hit_ratio + 0.1,
        "kv {} round robin {}",
        kv.hit_ratio,
        round_robin.hit_ratio
    );
}

#[test]
fn the_same_seed_gives_the_same_decisions() {
    for mode in [RouterMode::Kv, RouterMode::Random] {
        assert_eq!(simulate(mode, true).per_rank, simulate(mode, true).per_rank);
    }
}

fn prompt(seed: u32, tokens: usize) -> TokenSequence {
    let tokens: Vec<u32> = (0..).map(|i| seed * 1_000_000 + i).take(tokens).collect();
    TokenSequence::from_tokens(&tokens, BLOCK, SaltHash::default())
}

fn kv_router(config: &RouterConfig) -> Router {
    Router::new(RouterConfig {
        mode: RouterMode::Kv,
        ..config.clone()
    })
    .expect("valid settings")
}

fn stored(event_id: u64, prompt: &TokenSequence) -> KvEvent {
    KvEvent {
        event_id,
        rank: blockplane_protocol::DpRank(0),
        data: KvEventData::Stored {
            parent: None,
            blocks: prompt
                .blocks()
                .iter()
                .map(|b| StoredBlock {
                    block: b.block,
                    sequence: b.sequence,
                })
                .collect(),
            tier: Tier::Device,
        },
    }
}

#[test]
fn concurrent_requests_see_each_others_reservations() {
    let router = kv_router(&RouterConfig::default());
    for worker in 1..=4 {
        router.add_worker(WorkerId(worker), WorkerRole::Aggregated, INFO);
    }
    let held: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                let router = &router;
                scope.spawn(move || {
                    (0..50)
                        .map(|i| {
                            let request =
                                RouteRequest::from_sequence(&prompt(thread * 50 + i, 4 * BLOCK));
                            router.plan(&request, Duration::ZERO, 0).unwrap()
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut per_rank = BTreeMap::new();
    for routed in &held {
        *per_rank.entry(routed.plan.decode.target).or_insert(0) += 1;
    }
    // Every request costs the same, so anything but an even spread means that a choice was made
    // on a load that another thread had already changed.
    assert_eq!(per_rank.into_values().collect::<Vec<_>>(), [100; 4]);
}

#[test]
fn a_gap_lowers_confidence_until_a_snapshot_closes_it() {
    let router = kv_router(&RouterConfig::default());
    router.add_worker(WorkerId(1), WorkerRole::Aggregated, INFO);
    let rank = WorkerRank::new(WorkerId(1), 0);
    let (first, second) = (prompt(1, 64), prompt(2, 64));
    let confidence = || router.decode_pool().status(Duration::ZERO)[0].confidence;
    assert_eq!(confidence(), Confidence::NoEvents);
    assert_eq!(
        router.apply_event(WorkerId(1), &stored(1, &first)),
        Some(Applied::InOrder)
    );
    assert_eq!(confidence(), Confidence::Complete);
    assert_eq!(
        router.apply_event(WorkerId(1), &stored(4, &second)),
        Some(Applied::Gap {
            expected: 2,
            got: 4
        })
    );
    assert_eq!(confidence(), Confidence::Gap);
    let mut parent = None;
    let blocks: Vec<_> = second
        .blocks()
        .iter()
        .map(|b| {
            let stored = StoredBlock {
                block: b.block,
                sequence: b.sequence,
            };
            (parent.replace(b.sequence), stored)
        })
        .collect();
    assert!(router.load_snapshot(rank, 9, Tier::Device, &blocks));
    assert_eq!(confidence(), Confidence::Complete);
    let overlap = |prompt: &TokenSequence| {
        let routed = router
            .plan(&RouteRequest::from_sequence(prompt), Duration::ZERO, 0)
            .unwrap();
        routed.plan.decode.cached_blocks
    };
    assert_eq!((overlap(&first), overlap(&second)), (0, 4));
    assert_eq!(
        router.apply_event(WorkerId(1), &stored(10, &first)),
        Some(Applied::InOrder)
    );
    assert_eq!(overlap(&first), 4);
    assert_eq!(router.apply_event(WorkerId(2), &stored(1, &first)), None);
}

#[test]
fn a_long_prompt_goes_to_the_prefill_rank_that_has_most_of_it() {
    let router = kv_router(&RouterConfig::default());
    router.add_worker(WorkerId(1), WorkerRole::Decode, INFO);
    for worker in 2..=4 {
        router.add_worker(WorkerId(worker), WorkerRole::Prefill, INFO);
    }
    let long = prompt(1, 20 * BLOCK);
    router.apply_event(WorkerId(3), &stored(1, &prompt(1, 12 * BLOCK)));
    let request = RouteRequest::from_sequence(&long);
    let now = Duration::ZERO;
    let routed = router.plan(&request, now, 0).unwrap();
    let hints = routed.plan.route_hints();
    assert_eq!(hints.prefill.len(), 3);
    assert_eq!(hints.prefill[0].worker, WorkerId(3));
    assert_eq!(hints.prefill[0].overlap_blocks, 12);
    let load = |pool: &blockplane_router::Pool, at: usize| pool.status(now)[at].load;
    assert_eq!(load(router.prefill_pool(), 1).prefill_tokens, 8 * 16);
    assert_eq!(load(router.decode_pool(), 0).prefill_tokens, 0);
    assert_eq!(load(router.decode_pool(), 0).active_blocks, 20);
    routed.reservation.prefill_done(now);
    assert_eq!(load(router.prefill_pool(), 1).active_requests, 0);
    assert_eq!(load(router.decode_pool(), 0).active_blocks, 20);
    drop(routed);
    assert_eq!(load(router.decode_pool(), 0).active_blocks, 0);

    // What decode has is not sent again: only the rest counts.
    router.apply_event(WorkerId(1), &stored(1, &prompt(1, 18 * BLOCK)));
    let routed = router.plan(&request, now, 0).unwrap();
    assert_eq!(routed.plan.prefill, PrefillPlan::Local(LocalReason::Short));
    assert_eq!(load(router.decode_pool(), 0).prefill_tokens, 2 * 16);
}

#[test]
fn a_full_prefill_queue_and_a_lost_prefill_worker_mean_local_prefill() {
    let router = kv_router(&RouterConfig {
        disagg: DisaggPolicy {
            prefill_requests_max: 2,
            ..DisaggPolicy::default()
        },
        ..RouterConfig::default()
    });
    router.add_worker(WorkerId(1), WorkerRole::Decode, INFO);
    router.add_worker(WorkerId(2), WorkerRole::Prefill, INFO);
    let plan = |seed| {
        router
            .plan(
                &RouteRequest::from_sequence(&prompt(seed, 20 * BLOCK)),
                Duration::ZERO,
                0,
            )
            .unwrap()
    };
    let held: Vec<_> = (0..2).map(plan).collect();
    assert!(
        held.iter()
            .all(|r| !r.plan.route_hints().prefill.is_empty())
    );
    assert_eq!(
        plan(3).plan.prefill,
        PrefillPlan::Local(LocalReason::QueueFull)
    );
    drop(held);
    assert!(!plan(4).plan.route_hints().prefill.is_empty());
    assert!(router.remove_worker(WorkerId(2)));
    assert_eq!(
        plan(5).plan.prefill,
        PrefillPlan::Local(LocalReason::NoPrefillWorker)
    );
}

#[test]
fn ranks_are_addressed_one_by_one() {
    let router = Router::new(RouterConfig::default()).unwrap();
    router.add_worker(
        WorkerId(1),
        WorkerRole::Aggregated,
        RankInfo {
            dp_size: 3,
            blocks: 100,
        },
    );
    let request = RouteRequest::from_sequence(&prompt(1, 64));
    let ranks: Vec<_> = (0..6)
        .map(|_| {
            let routed = router.plan(&request, Duration::ZERO, 0).unwrap();
            routed.plan.route_hints().rank.0
        })
        .collect();
    assert_eq!(ranks, [0, 1, 2, 0, 1, 2]);
    let pinned = RouteRequest {
        pin: Some(WorkerRank::new(WorkerId(1), 2)),
        ..request
    };
    for _ in 0..2 {
        let routed = router.plan(&pinned, Duration::ZERO, 0).unwrap();
        assert_eq!(routed.plan.decode.target, WorkerRank::new(WorkerId(1), 2));
    }
}

#[test]
fn refusals_name_their_reason() {
    let router = kv_router(&RouterConfig {
        requests_max: 2,
        waiting_requests_max: Some(4),
        ..RouterConfig::default()
    });
    let request = RouteRequest::from_sequence(&prompt(1, 64));
    let plan = |request: &RouteRequest| router.plan(request, Duration::ZERO, 0);
    assert_eq!(plan(&request).unwrap_err(), RouteError::NoWorkers);
    router.add_worker(WorkerId(1), WorkerRole::Aggregated, INFO);
    let excluding = RouteRequest {
        excluded: vec![WorkerId(1)],
        ..request.clone()
    };
    assert_eq!(
        plan(&excluding).unwrap_err(),
        RouteError::NoneEligible {
            ranks: 1,
            excluded: 1,
            not_allowed: 0
        }
    );
    let held = [plan(&request).unwrap(), plan(&request).unwrap()];
    let refused = plan(&request).unwrap_err();
    assert!(matches!(
        refused,
        RouteError::TooManyRequests { in_flight: 2, .. }
    ));
    assert!(refused.retry_after().is_some());
    drop(held);
    let waiting = LoadReport {
        requests_waiting: 4,
        ..LoadReport::default()
    };
    assert!(router.report_load(WorkerId(1), waiting, Duration::ZERO));
    assert!(matches!(
        plan(&request).unwrap_err(),
        RouteError::AllBusy { busy: 1, .. }
    ));
    assert_eq!(router.admission().in_flight, 0);
    let error: blockplane_protocol::GenerateError = plan(&request).unwrap_err().into();
    assert_eq!(error.kind, blockplane_protocol::ErrorKind::Overloaded);
}

#[test]
fn a_request_without_a_full_block_is_routed_by_load() {
    let router = kv_router(&RouterConfig::default());
    router.add_worker(WorkerId(1), WorkerRole::Aggregated, INFO);
    router.add_worker(WorkerId(2), WorkerRole::Aggregated, INFO);
    let short = RouteRequest {
        prompt_tokens: 5,
        hashes: Arc::from([]),
        ..RouteRequest::default()
    };
    let first = router.plan(&short, Duration::ZERO, 0).unwrap();
    let second = router.plan(&short, Duration::ZERO, 0).unwrap();
    assert_ne!(first.plan.decode.target, second.plan.decode.target);
    assert_eq!(first.plan.decode.uncached_tokens, 5);
}
