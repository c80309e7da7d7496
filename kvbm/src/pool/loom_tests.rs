//! Every order in which threads can meet in a pool and its hubs. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p blockplane-kvbm --lib --release loom_`.

use std::{collections::BTreeSet, sync::Arc};

use blockplane_protocol::{
    DpRank, KvEventData, SaltHash, SequenceHash, Tier, TokenBlock, TokenSequence,
};
use loom::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use super::{BlockPool, PoolConfig};
use crate::{
    block::ImmutableBlock,
    events::{Consolidation, EventHub, EventSubscription, KvBatch},
};

fn names(blocks: usize) -> Vec<TokenBlock> {
    let tokens: Vec<u32> = (0..).take(blocks).collect();
    TokenSequence::from_tokens(&tokens, 1, SaltHash::default())
        .blocks()
        .to_vec()
}

fn pool(blocks: u32) -> BlockPool {
    BlockPool::builder(PoolConfig::default())
        .without_own_events()
        .accounting(blocks)
}

fn register(pool: &BlockPool, name: TokenBlock) -> Option<ImmutableBlock> {
    let block = pool.allocate(1).ok()?.remove(0);
    Some(block.complete(name, None).register())
}

/// What a subscriber that comes now knows in the end.
fn follow(known: &mut BTreeSet<SequenceHash>, subscription: &mut EventSubscription) {
    while let Ok(Some(batch)) = subscription.try_recv() {
        match batch {
            KvBatch::Snapshot(snapshot) => {
                *known = snapshot
                    .blocks
                    .iter()
                    .map(|entry| entry.block.sequence)
                    .collect();
            }
            KvBatch::Events(events) => {
                for event in events {
                    match event.data {
                        KvEventData::Stored { blocks, .. } => {
                            let new = blocks.iter().all(|block| known.insert(block.sequence));
                            assert!(new, "stored twice");
                        }
                        KvEventData::Removed { hashes, .. } => {
                            let here = hashes.iter().all(|hash| known.remove(hash));
                            assert!(here, "removed before it was stored");
                        }
                        KvEventData::Cleared => known.clear(),
                    }
                }
            }
        }
    }
}

/// Invariants 1 and 2: one thread asks for a name, two more put other contents into the only block.
#[test]
fn loom_a_found_block_has_the_bytes_of_its_name() {
    loom::model(|| {
        let pool = pool(1);
        let names = names(1);
        let memory = Arc::new(AtomicU64::new(0));
        let store = |bytes: u64| {
            let (pool, memory, name) = (pool.clone(), Arc::clone(&memory), names[0]);
            move || {
                let Ok(mut blocks) = pool.allocate(1) else {
                    return;
                };
                memory.store(bytes, Ordering::Relaxed);
                let block = blocks.remove(0);
                if bytes == name.sequence.0 {
                    drop(block.complete(name, None).register());
                }
            }
        };
        let right = thread::spawn(store(names[0].sequence.0));
        let other = thread::spawn(store(1));
        for block in pool.match_prefix(&names) {
            assert_eq!(memory.load(Ordering::Relaxed), block.hash().0);
        }
        right.join().unwrap();
        other.join().unwrap();
        let stats = pool.stats();
        assert_eq!((stats.active, stats.free + stats.cached), (0, 1));
    });
}

/// Two threads register one name, the first of which may be gone again by then.
#[test]
fn loom_a_name_is_one_block() {
    loom::model(|| {
        let pool = pool(2);
        let name = names(1)[0];
        let other = thread::spawn({
            let pool = pool.clone();
            move || register(&pool, name)
        });
        let own = register(&pool, name);
        let other = other.join().unwrap();
        let ids = [&own, &other].map(|block| block.as_ref().map(ImmutableBlock::id));
        assert_eq!(ids[0], ids[1]);
        drop(other);
        assert_eq!(pool.stats().active, 1);
        drop(own);
        assert_eq!((pool.stats().cached, pool.stats().free), (1, 1));
    });
}

/// The last two holders go while a third comes, and while the name is taken away.
#[test]
fn loom_the_last_holder_frees_once() {
    loom::model(|| {
        let pool = pool(1);
        let name = names(1)[0];
        let held = register(&pool, name);
        let second = held.clone();
        let releases = thread::spawn(move || drop(second));
        let forgets = thread::spawn({
            let pool = pool.clone();
            move || assert!(pool.forget(name.sequence))
        });
        drop(held);
        drop(pool.match_prefix(&[name]));
        releases.join().unwrap();
        forgets.join().unwrap();
        assert_eq!(pool.stats().free, 1);
    });
}

/// Blocks behind one handle, of which one has a name that another thread registers too.
#[test]
fn loom_blocks_of_one_handle_have_one_owner_each() {
    loom::model(|| {
        let pool = pool(3);
        let names = names(2);
        let other = thread::spawn({
            let (pool, name) = (pool.clone(), names[0]);
            move || drop(register(&pool, name))
        });
        let leased = pool.lease(2).unwrap();
        let held = leased.register([(names[0], None), (names[1], Some(names[0].sequence))]);
        let again = pool.hold(&names);
        assert!(held.ids().eq(again.ids()));
        other.join().unwrap();
        drop(held);
        assert_eq!(pool.stats().active, 2);
        drop(again);
        assert_eq!((pool.stats().cached, pool.stats().free), (2, 1));
    });
}

/// A block leaves one tier and comes to another: whoever subscribes at any moment knows in the end
/// where it is.
#[test]
fn loom_snapshots_over_tiers_fit_their_numbers() {
    loom::model(|| {
        let hub = EventHub::new(DpRank(0), 8, Consolidation::Dedup);
        let (device, host) = (pool(1), pool(1));
        let name = names(1)[0];
        device.join(&hub).unwrap();
        host.join(&hub).unwrap();
        drop(register(&device, name));
        let leaves = thread::spawn({
            let device = device.clone();
            move || device.forget(name.sequence)
        });
        let comes = thread::spawn({
            let host = host.clone();
            move || drop(register(&host, name))
        });
        let mut known = BTreeSet::new();
        let mut subscription = hub.feed().subscribe(None);
        follow(&mut known, &mut subscription);
        leaves.join().unwrap();
        comes.join().unwrap();
        follow(&mut known, &mut subscription);
        assert!(known.iter().eq([&name.sequence]));
    });
}

/// A pool joins a hub while it and another member change: no lock waits for another in a circle,
/// and nothing is missed.
#[test]
fn loom_a_pool_joins_while_it_changes() {
    loom::model(|| {
        let hub = EventHub::new(DpRank(0), 8, Consolidation::Dedup);
        let (device, host) = (pool(1), pool(1));
        let name = names(1)[0];
        host.join(&hub).unwrap();
        let stores = thread::spawn({
            let (device, host) = (device.clone(), host.clone());
            move || {
                drop(register(&device, name));
                drop(register(&host, name));
            }
        });
        let mut known = BTreeSet::new();
        let mut subscription = hub.feed().subscribe(Some(0));
        device.join(&hub).unwrap();
        follow(&mut known, &mut subscription);
        stores.join().unwrap();
        follow(&mut known, &mut subscription);
        assert!(known.iter().eq([&name.sequence]));
    });
}

/// The last handle of a pool goes while a subscriber looks.
#[test]
fn loom_the_end_of_a_pool_ends_its_events() {
    loom::model(|| {
        let config = PoolConfig {
            tier: Tier::Host,
            ..PoolConfig::default()
        };
        let pool = BlockPool::accounting(1, config);
        let mut subscription = pool.events().subscribe(None);
        let held = register(&pool, names(1)[0]);
        let ends = thread::spawn(move || drop(pool));
        let first = subscription.try_recv();
        drop(held);
        ends.join().unwrap();
        assert!(
            matches!(first, Ok(Some(KvBatch::Snapshot(_)))),
            "a handle was alive"
        );
        assert_eq!(subscription.try_recv(), Ok(None));
    });
}
