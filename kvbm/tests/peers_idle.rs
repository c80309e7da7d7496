//! A peer tier without work sleeps. Alone in its process: it counts how often threads wake up.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::disallowed_methods, reason = "nothing happens meanwhile")]

mod idle;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    BlockPool, Fingerprint, KvArena, PeerParts, PeerTier, PeerTierConfig, PoolConfig,
};
use blockplane_protocol::{DType, KvLayout};
use blockplane_transfer::{Agent, AgentConfig};
use idle::switches;

fn tier(name: &str) -> (Arc<PeerTier>, Agent) {
    let agent = Agent::new(AgentConfig::new(name)).unwrap();
    let layout = KvLayout::dense(2, 2, 8, 4, DType::F16);
    let host = KvArena::allocate(&agent, layout.clone(), 8, "g2").unwrap();
    let parts = PeerParts {
        control: agent.clone(),
        agent: agent.clone(),
        host: Arc::clone(&host),
        fingerprint: Fingerprint::of(1, &layout, 0, 1),
    };
    let tier = PeerTier::start(parts, PeerTierConfig::default()).unwrap();
    tier.lend(BlockPool::new(host, PoolConfig::default()))
        .unwrap();
    (tier, agent)
}

#[test]
fn idle_threads_sleep_until_something_happens() {
    let (one, agent) = tier("one");
    thread::sleep(Duration::from_millis(100));
    let before = switches("kvbm-peers");
    assert_eq!(before.0, 3);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(
        switches("kvbm-peers"),
        before,
        "without peers nothing is looked at"
    );

    let (other, its) = tier("other");
    one.add_peer(&its.metadata()).unwrap();
    other.add_peer(&agent.metadata()).unwrap();
    while one.stats().usable + other.stats().usable < 2 {
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(Duration::from_millis(700));
    let before = switches("kvbm-peers");
    assert_eq!(before.0, 6);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(switches("kvbm-peers"), before, "with peers neither");

    drop(other);
    drop(its);
    let until = Instant::now() + Duration::from_secs(10);
    while one.stats().lost == 0 {
        assert!(Instant::now() < until, "the loss goes unnoticed");
        thread::sleep(Duration::from_millis(5));
    }
}
