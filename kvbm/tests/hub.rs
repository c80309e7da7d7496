//! One stream of events over several pools, and pools that tell several hubs.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockplane_kvbm::{
    BlockPool, Consolidation, EventHub, EventSubscription, ImmutableBlock, JoinError, KvBatch,
    PoolConfig,
};
use blockplane_protocol::{DpRank, KvEventData, SaltHash, Tier, TokenBlock, TokenSequence};
use proptest::{collection::vec, prelude::*};

fn sequence(seed: u32, blocks: usize) -> Vec<TokenBlock> {
    let tokens: Vec<u32> = (0..).map(|i| seed * 1000 + i).take(blocks * 4).collect();
    TokenSequence::from_tokens(&tokens, 4, SaltHash::default())
        .blocks()
        .to_vec()
}

fn pool(tier: Tier, blocks: u32) -> BlockPool {
    let config = PoolConfig {
        tier,
        ..PoolConfig::default()
    };
    BlockPool::builder(config)
        .without_own_events()
        .accounting(blocks)
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

/// What a subscriber knows: tiers by name.
#[derive(Default)]
struct Known {
    blocks: BTreeMap<u64, Vec<Tier>>,
    last: u64,
    snapshots: usize,
    events: Vec<KvEventData>,
}

impl Known {
    fn follow(&mut self, subscription: &mut EventSubscription) {
        while let Ok(Some(batch)) = subscription.try_recv() {
            match batch {
                KvBatch::Snapshot(snapshot) => {
                    self.blocks.clear();
                    for entry in snapshot.blocks {
                        let tiers = self.blocks.entry(entry.block.sequence.0).or_default();
                        assert!(!tiers.contains(&entry.tier), "told once");
                        tiers.push(entry.tier);
                    }
                    self.last = snapshot.last_event_id;
                    self.snapshots += 1;
                }
                KvBatch::Events(events) => {
                    for event in events {
                        self.last += 1;
                        assert_eq!(event.event_id, self.last, "numbers have no gap");
                        self.apply(&event.data);
                        self.events.push(event.data);
                    }
                }
            }
        }
    }

    fn apply(&mut self, data: &KvEventData) {
        match data {
            KvEventData::Stored { blocks, tier, .. } => {
                for block in blocks {
                    let tiers = self.blocks.entry(block.sequence.0).or_default();
                    assert!(!tiers.contains(tier), "stored once");
                    tiers.push(*tier);
                }
            }
            KvEventData::Removed { hashes, tier } => {
                for hash in hashes {
                    let tiers = self.blocks.get_mut(&hash.0).expect("removed after stored");
                    let at = tiers.iter().position(|other| other == tier);
                    tiers.remove(at.expect("removed from the tier it was announced with"));
                    if tiers.is_empty() {
                        self.blocks.remove(&hash.0);
                    }
                }
            }
            KvEventData::Cleared => self.blocks.clear(),
        }
    }
}

#[test]
fn a_block_is_announced_by_the_first_tier_and_removed_by_the_last() {
    let hub = EventHub::new(DpRank(3), 100, Consolidation::Dedup);
    let (device, host) = (pool(Tier::Device, 4), pool(Tier::Host, 4));
    device.join(&hub).unwrap();
    host.join(&hub).unwrap();
    host.join(&hub).unwrap();
    let mut subscription = hub.feed().subscribe(Some(0));
    let mut known = Known::default();

    let prompt = sequence(1, 2);
    drop(store(&device, &prompt));
    drop(store(&host, &prompt));
    assert!(device.forget(prompt[1].sequence));
    assert!(!device.forget(prompt[1].sequence));
    known.follow(&mut subscription);
    assert_eq!(known.events.len(), 1, "{:?}", known.events);
    assert!(host.forget(prompt[1].sequence));
    known.follow(&mut subscription);
    let expected = KvEventData::Removed {
        hashes: vec![prompt[1].sequence],
        tier: Tier::Device,
    };
    assert_eq!(known.events[1..], [expected]);
}

#[test]
fn a_pool_tells_all_its_hubs_and_forgets_one_that_has_ended() {
    let hubs = [0, 1].map(|rank| EventHub::new(DpRank(rank), 100, Consolidation::Dedup));
    let devices = hubs.each_ref().map(|hub| {
        let device = pool(Tier::Device, 4);
        device.join(hub).unwrap();
        device
    });
    let host = pool(Tier::Host, 4);
    hubs.iter().for_each(|hub| host.join(hub).unwrap());
    let [first, second] = devices;
    drop(first);
    let mut ended = hubs[0].feed().subscribe(Some(0));
    assert_eq!(ended.try_recv(), Ok(None));
    assert_eq!(
        pool(Tier::Disk, 1).join(&hubs[0]),
        Err(JoinError::Ended { rank: 0 })
    );

    drop(store(&host, &sequence(1, 1)));
    assert_eq!(hubs[1].feed().last_event_id(), 1);
    assert_eq!(
        Arc::strong_count(&hubs[0]),
        2,
        "here and in the subscription"
    );
    drop(second);
}

#[test]
fn a_hub_has_a_limit() {
    let hub = EventHub::new(DpRank(0), 10, Consolidation::Passthrough);
    let pools: Vec<BlockPool> = (0..7).map(|_| pool(Tier::Host, 1)).collect();
    let joined = pools.iter().map(|pool| pool.join(&hub).is_ok());
    assert_eq!(joined.filter(|ok| *ok).count(), 6);
}

/// Consolidated numbers and snapshots while threads change all the pools.
#[test]
fn a_late_subscriber_and_an_early_one_know_the_same() {
    for mode in [Consolidation::Dedup, Consolidation::Passthrough] {
        let hub = EventHub::new(DpRank(0), 64, mode);
        let pools = [
            pool(Tier::Device, 12),
            pool(Tier::Host, 20),
            pool(Tier::Disk, 30),
        ];
        pools.iter().for_each(|pool| pool.join(&hub).unwrap());
        let mut early = hub.feed().subscribe(Some(0));
        let mut known = Known::default();
        std::thread::scope(|scope| {
            for (salt, pool) in (0..).zip(&pools) {
                scope.spawn(move || {
                    for round in 0..2_000u32 {
                        let seed = round.wrapping_mul(2_654_435_761 + salt) >> 28;
                        drop(store(pool, &sequence(seed, 3)));
                        if round % 7 == 0 {
                            pool.forget(sequence(seed, 3)[1].sequence);
                        }
                    }
                });
            }
            for _ in 0..300 {
                let mut late = Known::default();
                late.follow(&mut hub.feed().subscribe(None));
                assert!(late.snapshots >= 1);
                known.follow(&mut early);
            }
        });
        known.follow(&mut early);
        let mut late = Known::default();
        late.follow(&mut hub.feed().subscribe(None));
        known.blocks.values_mut().for_each(|tiers| tiers.sort());
        late.blocks.values_mut().for_each(|tiers| tiers.sort());
        assert_eq!((late.last, &late.blocks), (known.last, &known.blocks));
        let names: usize = late.blocks.values().map(Vec::len).sum();
        let cached: usize = pools.iter().map(|pool| pool.stats().cached).sum();
        match mode {
            Consolidation::Dedup => assert!(names < cached, "{names} of {cached}"),
            Consolidation::Passthrough => assert_eq!(names, cached),
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Join(usize),
    Store(usize, u32, usize),
    Forget(usize, u32, usize),
    Clear(usize),
    Restore(usize, u32, usize),
}

fn op() -> impl Strategy<Value = Op> {
    let pool = || 0..4usize;
    prop_oneof![
        1 => pool().prop_map(Op::Join),
        9 => (pool(), 0..3u32, 1..4usize).prop_map(|(pool, seed, n)| Op::Store(pool, seed, n)),
        5 => (pool(), 0..3u32, 0..4usize).prop_map(|(pool, seed, n)| Op::Forget(pool, seed, n)),
        1 => pool().prop_map(Op::Clear),
        1 => (pool(), 0..3u32, 1..4usize).prop_map(|(pool, seed, n)| Op::Restore(pool, seed, n)),
    ]
}

const TIERS: [Tier; 4] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote];

proptest! {
    /// A subscriber that is told everything, one that is too slow and gets snapshots, and one that
    /// comes new each time know what the members hold.
    #[test]
    fn subscribers_know_what_the_pools_hold(
        dedup: bool, ops in vec(op(), 1..60), slow_every in 1..20usize,
    ) {
        let mode = if dedup { Consolidation::Dedup } else { Consolidation::Passthrough };
        let hub = EventHub::new(DpRank(0), 12, mode);
        let pools = TIERS.map(|tier| pool(tier, 7));
        let mut members = Vec::new();
        let (mut quick, mut slow) = (Known::default(), Known::default());
        let mut quick_feed = hub.feed().subscribe(Some(0));
        let mut slow_feed = hub.feed().subscribe(Some(0));
        for (step, op) in ops.into_iter().enumerate() {
            match op {
                Op::Join(pool) => {
                    pools[pool].join(&hub).unwrap();
                    if !members.contains(&pool) {
                        members.push(pool);
                    }
                }
                Op::Store(pool, seed, n) => drop(store(&pools[pool], &sequence(seed, n))),
                Op::Forget(pool, seed, n) => {
                    let name = sequence(seed, 4)[n].sequence;
                    let was = pools[pool].contains(name);
                    prop_assert_eq!(pools[pool].forget(name), was);
                    prop_assert!(!pools[pool].contains(name));
                }
                Op::Clear(pool) => pools[pool].clear(),
                Op::Restore(pool, seed, n) => {
                    let names = sequence(seed, n);
                    let parents = std::iter::once(None).chain(names.iter().map(|n| Some(n.sequence)));
                    let free: Vec<_> = pools[pool].allocate(pools[pool].stats().free).unwrap();
                    let ids: Vec<_> = free.iter().map(|block| block.id()).collect();
                    drop(free);
                    let blocks: Vec<_> = ids.into_iter().zip(names.iter().copied()).zip(parents)
                        .map(|((id, name), parent)| (id, name, parent)).collect();
                    let new = blocks.iter().filter(|(_, name, _)| !pools[pool].contains(name.sequence));
                    let new = new.count();
                    prop_assert_eq!(pools[pool].restore(blocks), new);
                }
            }
            quick.follow(&mut quick_feed);
            if step % slow_every == 0 {
                slow.follow(&mut slow_feed);
            }
            let mut new = Known::default();
            new.follow(&mut hub.feed().subscribe(None));
            prop_assert_eq!((new.last, new.snapshots), (quick.last, 1));

            let mut expected: BTreeMap<u64, Vec<Tier>> = BTreeMap::new();
            for &member in &members {
                for seed in 0..3 {
                    for name in sequence(seed, 4) {
                        if pools[member].contains(name.sequence) {
                            expected.entry(name.sequence.0).or_default().push(TIERS[member]);
                        }
                    }
                }
            }
            for known in [&mut quick, &mut new] {
                known.blocks.values_mut().for_each(|tiers| tiers.sort());
                if dedup {
                    prop_assert!(known.blocks.keys().eq(expected.keys()));
                    prop_assert!(known.blocks.values().all(|tiers| tiers.len() == 1));
                } else {
                    expected.values_mut().for_each(|tiers| tiers.sort());
                    prop_assert_eq!(&known.blocks, &expected);
                }
            }
            if dedup {
                prop_assert_eq!(&new.blocks, &quick.blocks, "the same tier is told to all");
            }
        }
        slow.follow(&mut slow_feed);
        slow.blocks.values_mut().for_each(|tiers| tiers.sort());
        prop_assert_eq!(slow.blocks, quick.blocks);
    }
}
