//! A manager without work sleeps. Alone in its process: it counts how often threads wake up.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::disallowed_methods, reason = "nothing happens meanwhile")]

mod idle;

use std::{sync::Arc, thread, time::Duration};

use blockplane_kvbm::{
    BlockPool, MoveReport, MoveSpec, Mover, PoolConfig, TierConfig, TierManager, TierPools,
};
use blockplane_protocol::{DpRank, SaltHash, TokenSequence};
use idle::switches;

struct Null;

impl Mover for Null {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        MoveReport::moved(spec.blocks.len(), 0)
    }
}

#[test]
fn idle_threads_do_not_wake_up() {
    let config = TierConfig {
        host_blocks: 8,
        ..TierConfig::default()
    };
    let pools = TierPools {
        host: BlockPool::accounting(8, PoolConfig::default()),
        disk: None,
        remote: None,
    };
    let manager = TierManager::start_with(&config, pools, 1, Arc::new(Null)).unwrap();
    let device = BlockPool::accounting(4, PoolConfig::default());
    let tiers = manager.attach_books(DpRank(0), device.clone());
    let prompt = TokenSequence::from_tokens(&[1, 2], 2, SaltHash::default());
    let block = device.allocate(1).unwrap().remove(0);
    drop(block.complete(prompt.blocks()[0], None).register());
    tiers.offload(prompt.blocks(), None);
    assert!(manager.flush(Duration::from_secs(20)));
    thread::sleep(Duration::from_millis(100));
    let (threads, before) = switches("kvbm-");
    assert_eq!(threads, 5);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(switches("kvbm-"), (threads, before));
}
