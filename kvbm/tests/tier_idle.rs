//! A manager without work sleeps. Alone in its process: it counts how often threads wake up.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::disallowed_methods, reason = "nothing happens meanwhile")]

use std::{fs, sync::Arc, thread, time::Duration};

use blockplane_kvbm::{
    BlockPool, MoveReport, MoveSpec, Mover, PoolConfig, TierConfig, TierManager, TierPools,
};
use blockplane_protocol::{DpRank, SaltHash, TokenSequence};

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
    let (threads, before) = switches();
    assert_eq!(threads, 5);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(switches(), (threads, before));
}

/// Threads of the manager, and how often they slept so far.
fn switches() -> (usize, u64) {
    let (mut threads, mut sum) = (0, 0);
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with("kvbm-") {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let key = "voluntary_ctxt_switches:";
            let count = status.lines().find_map(|line| line.strip_prefix(key));
            sum += count.unwrap().trim().parse::<u64>().unwrap();
            threads += 1;
        }
    }
    (threads, sum)
}
