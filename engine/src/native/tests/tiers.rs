//! Engines above kvbm's tiers, with a mover that does everything wrong that a mover can do.

use std::path::Path;

use blockplane_kvbm::{
    AdmissionConfig, AdmissionKind, ArenaPlace, BlockPool, Fingerprint, KvArena, PoolConfig,
    SlotStore, SlotStoreConfig,
    store::StoreLocation,
    tier::{
        BlockOutcome, DiskConfig, Dropped, HealthConfig, Invalid, LocalMover, MoveKind, MoveReport,
        MoveSpec, Mover, Pending, QueueConfig, TierConfig, TierManager, TierPools, host_arena,
    },
};
use blockplane_protocol::{BlockId, Tier};
use futures::future::join_all;
use parking_lot::Condvar;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::native::{below::Below, tiers::ManagedTiers};

/// Tiers of one worker, which engines come and go above.
pub(super) struct Stack {
    manager: TierManager,
    local: Arc<LocalMover>,
    faults: Arc<Faults>,
}

/// A mover that is sometimes late, wrong, or never done.
struct Faults {
    local: Arc<LocalMover>,
    random: Mutex<StdRng>,
    /// Moves that go wrong, of a hundred.
    percent: AtomicUsize,
    /// How often each way was taken.
    seen: Mutex<[u32; WAYS]>,
    hang: Arc<Hang>,
}

/// Moves that hang until they are let go; then their bytes land after all.
#[derive(Default)]
struct Hang {
    hanging: Mutex<bool>,
    changed: Condvar,
}

const WAYS: usize = 6;

/// Blocks of requests that have a lower one stay in G1.
const MIN_PRIORITY: u32 = 50;

impl Stack {
    /// `host` blocks of G2 and `disk` slots of G3 in `folder`; what the folder has is found again.
    fn new(folder: &Path, host: u32, disk: u32, seed: u64) -> Arc<Self> {
        static AGENTS: AtomicUsize = AtomicUsize::new(0);
        let name = format!("tiers-{}", AGENTS.fetch_add(1, Ordering::Relaxed));
        let agent = Agent::new(AgentConfig {
            socket_dir: std::env::temp_dir(),
            ..AgentConfig::new(name).with_lanes([Lane::Loopback])
        })
        .expect("it starts");
        let config = TierConfig {
            host_blocks: host,
            bounce_blocks: 8,
            disk: Some(DiskConfig {
                admission: AdmissionConfig::from(AdmissionKind::All),
                ..DiskConfig::new(disk)
            }),
            host_min_priority: MIN_PRIORITY,
            queues: QueueConfig {
                batch_blocks: 4,
                offload_time: Duration::from_millis(60),
                onboard_time: Duration::from_millis(60),
                ..QueueConfig::default()
            },
            health: HealthConfig {
                late_max: 4,
                failed_max: 1000,
                probe_every: Duration::from_millis(5),
            },
            ..TierConfig::default()
        };
        let layout = fake::layout();
        let arena = host_arena(&agent, &layout, &config, ArenaPlace::Host).expect("memory");
        let fingerprint = Fingerprint::of(7, &layout, 0, 1);
        let location = StoreLocation::Folder(folder.to_owned());
        let bytes = layout.block_bytes() as u64;
        let store = SlotStoreConfig::new(location, disk, bytes, fingerprint);
        let (store, recovered) = SlotStore::open(&agent, &store).expect("a store");
        let pool = |tier, prefix_caching| {
            BlockPool::builder(PoolConfig {
                tier,
                prefix_caching,
                ..PoolConfig::default()
            })
            .without_own_events()
        };
        let disk = pool(Tier::Disk, true).accounting(store.capacity());
        let recovered = recovered.into_iter();
        disk.restore(recovered.map(|slot| (BlockId(slot.slot), slot.name, slot.parent)));
        let pools = TierPools {
            host: pool(Tier::Host, host > 0).over(Arc::clone(&arena)),
            disk: Some(disk),
            remote: None,
        };
        let local = Arc::new(LocalMover::new(agent, arena, Some(store)));
        let faults = Arc::new(Faults {
            local: Arc::clone(&local),
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            percent: AtomicUsize::new(0),
            seen: Mutex::default(),
            hang: Arc::default(),
        });
        let mover = Arc::clone(&faults) as Arc<dyn Mover>;
        let manager = TierManager::start_with(&config, pools, bytes, mover).expect("it starts");
        Arc::new(Self {
            manager,
            local,
            faults,
        })
    }

    pub(super) fn attach(&self, rank: &RankShared, agent: &Agent) -> Arc<dyn Below> {
        let arena: &Arc<KvArena> = rank.pool.arena().expect("an engine's pool has memory");
        self.local
            .attach(rank.rank, agent, arena)
            .expect("the same layout");
        let tiers = self.manager.attach_books(rank.rank, rank.pool.clone());
        Arc::new(ManagedTiers::new(tiers, agent.clone()))
    }

    fn set_faults(&self, percent: usize) {
        self.faults.percent.store(percent, Ordering::Relaxed);
        *self.faults.hang.hanging.lock() = percent > 0;
        self.faults.hang.changed.notify_all();
    }

    /// Ends the tiers as the end of a process does: the store can be opened again afterwards.
    async fn end(self: Arc<Self>, engine: Arc<NativeEngine>) {
        let local = Arc::downgrade(&self.local);
        drop((engine, self));
        eventually("nobody has the store open", || local.strong_count() == 0).await;
    }

    fn settle(&self) {
        assert!(
            self.manager.flush(Duration::from_secs(20)),
            "{:?}",
            self.manager.stats()
        );
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.set_faults(0);
        self.manager.stop(Duration::from_secs(10));
    }
}

impl Mover for Faults {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        let count = spec.blocks.len();
        let (way, part) = {
            let mut random = self.random.lock();
            let wrong = random.random_range(0..100) < self.percent.load(Ordering::Relaxed);
            let way = if wrong {
                random.random_range(1..WAYS)
            } else {
                0
            };
            (way, random.random_range(0..count))
        };
        self.seen.lock()[way] += 1;
        let into_device = spec.kind == MoveKind::HostToDevice;
        match way {
            0 => self.local.run(spec),
            1 => MoveReport::failed(count, "planted"),
            2 => {
                // The first ones come.
                let mut first = spec.clone();
                first.blocks.truncate(part);
                let mut report = MoveReport::failed(count, "planted");
                if part > 0 {
                    let came = self.local.run(&first).outcomes;
                    report.outcomes[..part].clone_from_slice(&came);
                }
                report
            }
            3 => {
                self.hang.wait(spec.time);
                MoveReport::failed(count, "late")
            }
            4 => {
                // The bytes of other blocks land, and that is noticed. Only what is read into memory
                // may be spoilt: the books of a disk say what is in its slots.
                if spec.kind != MoveKind::HostToDisk {
                    let mut wrong = spec.clone();
                    let first = wrong.blocks[0].from;
                    for block in &mut wrong.blocks {
                        block.from = first;
                    }
                    if spec.kind != MoveKind::DiskToHost {
                        self.local.run(&wrong);
                    }
                }
                let outcome = if into_device {
                    BlockOutcome::Failed("spoilt".to_owned())
                } else {
                    BlockOutcome::Invalid(Invalid::Checksum)
                };
                MoveReport {
                    outcomes: vec![outcome; count],
                    ..MoveReport::failed(count, "")
                }
            }
            _ => {
                let (local, hang, late) = (
                    Arc::clone(&self.local),
                    Arc::clone(&self.hang),
                    spec.clone(),
                );
                MoveReport {
                    pending: Some(Pending::new(move || {
                        hang.wait(Duration::from_millis(300));
                        // Long after everybody has given up.
                        local.run(&late);
                    })),
                    ..MoveReport::failed(count, "hangs")
                }
            }
        }
    }
}

impl Hang {
    fn wait(&self, time: Duration) {
        let mut hanging = self.hanging.lock();
        let until = Instant::now() + time;
        while *hanging && !self.changed.wait_until(&mut hanging, until).timed_out() {}
    }
}

fn above(stack: &Arc<Stack>, blocks: u32) -> Setup {
    Setup {
        blocks,
        stack: Some(Arc::clone(stack)),
        ..Setup::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_comes_from_every_tier_and_from_disk_in_another_engine() {
    let folder = tempfile::tempdir().unwrap();
    let long = prompt(1, 61, 0);
    let expected = fake::reference(&long, 6);
    {
        let stack = Stack::new(folder.path(), 40, 400, 0);
        let engine = above(&stack, 24).start("every-tier");
        let check = async |what: &str| {
            let outcome = run(&engine, request(&long, 6)).await.unwrap();
            assert_eq!(outcome.tokens, expected, "{what}");
            let usage = outcome.usage;
            let lower = (usage.cached_host_tokens, usage.cached_disk_tokens);
            (usage.cached_tokens, lower)
        };
        assert_eq!(check("computed").await, (0, (0, 0)));
        assert_eq!(check("from the pool").await, (60, (0, 0)));
        stack.settle();
        run(&engine, request(&prompt(5, 64, 0), 1)).await.unwrap();
        stack.settle();
        let (cached, (host, disk)) = check("from host memory").await;
        assert!(
            cached == 60 && host > 0 && disk == 0,
            "{cached} {host} {disk}"
        );
        stack.settle();
        for family in 6..10 {
            run(&engine, request(&prompt(family, 64, 0), 1))
                .await
                .unwrap();
            stack.settle();
        }
        let (cached, (_, disk)) = check("from disk").await;
        assert!(cached == 60 && disk > 0, "{cached} {disk}");
        stack.settle();
        all_blocks_back(&engine).await;
        stack.end(engine).await;
    }
    let stack = Stack::new(folder.path(), 40, 400, 0);
    let engine = above(&stack, 24).start("restarted");
    let outcome = run(&engine, request(&long, 6)).await.unwrap();
    assert_eq!(outcome.tokens, expected);
    assert_eq!(
        (
            outcome.usage.cached_tokens,
            outcome.usage.cached_disk_tokens
        ),
        (60, 60)
    );
    all_blocks_back(&engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_below_the_threshold_leaves_nothing_in_lower_tiers() {
    let folder = tempfile::tempdir().unwrap();
    let stack = Stack::new(folder.path(), 100, 400, 0);
    let long = prompt(1, 61, 0);
    let mut dropped = Vec::new();
    for (priority, kept) in [(Some(49), 0), (Some(50), 60), (None, 60)] {
        let mut request = request(&long, 30);
        request.stop.ignore_eos = true;
        request.priority = priority;
        if priority.is_none() {
            // Another name of the same prompt: nothing of it is there.
            request.cache_salt = Some("other".to_owned());
        }
        let engine = above(&stack, 40).start("priority");
        let outcome = run(&engine, request.clone()).await.unwrap();
        assert_eq!(outcome.usage.cached_tokens, 0, "{priority:?}");
        stack.settle();
        dropped.push(stack.manager.stats().dropped(Dropped::Priority));
        // A pool that has nothing.
        drop(engine);
        let engine = above(&stack, 40).start("priority-again");
        let outcome = run(&engine, request).await.unwrap();
        assert_eq!(outcome.usage.cached_host_tokens, kept, "{priority:?}");
        stack.settle();
    }
    // Only the first blocks of a request were offered (chunks have 12 tokens, blocks 4), by both
    // engines; none of those that came later.
    assert_eq!(dropped, [3, 6, 6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_share_the_tiers() {
    let folder = tempfile::tempdir().unwrap();
    let stack = Stack::new(folder.path(), 100, 400, 0);
    let engine = Setup {
        dp_size: 2,
        ..above(&stack, 24)
    }
    .start("ranks");
    let long = prompt(1, 61, 0);
    let first = run(&engine, request(&long, 6)).await.unwrap();
    stack.settle();
    let mut second = request(&long, 6);
    second.route.rank = DpRank(1);
    let second = run(&engine, second).await.unwrap();
    assert_eq!(second.tokens, first.tokens);
    assert_eq!(second.usage.cached_host_tokens, 60);
    all_blocks_back(&engine).await;
}

/// Every way of going wrong, in every combination that a seed makes of them: the right tokens, an
/// end for each request, and every block back.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_those_of_the_reference_whatever_goes_wrong_below() {
    let mut seen = [0; WAYS];
    for (seed, host) in (0..).zip([0, 20, 60, 0, 20, 60]) {
        let mut random = StdRng::seed_from_u64(seed);
        let folder = tempfile::tempdir().unwrap();
        for life in 0..2 {
            let stack = Stack::new(folder.path(), host, 300, seed * 2 + life);
            let engine = above(&stack, random.random_range(44..70)).start("wrong-below");
            for round in 0..5 {
                stack.set_faults([0, 30, 60, 20, 0][round]);
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
                let runs = prompts.iter().map(|p| run(&engine, request(p, 12)));
                let leave = async {
                    tokio::time::sleep(Duration::from_millis(3)).await;
                    drop(cancelled);
                };
                let (outcomes, ()) = tokio::join!(join_all(runs), leave);
                for (prompt, outcome) in prompts.iter().zip(outcomes) {
                    let tokens = outcome.unwrap().tokens;
                    assert_eq!(tokens, fake::reference(prompt, 12), "seed {seed}");
                }
            }
            stack.set_faults(0);
            stack.settle();
            all_blocks_back(&engine).await;
            let ways = *stack.faults.seen.lock();
            for (total, count) in seen.iter_mut().zip(ways) {
                *total += count;
            }
            stack.end(engine).await;
        }
    }
    assert!(
        seen.iter().all(|&count| count > 0),
        "not every fault was met: {seen:?}"
    );
}
