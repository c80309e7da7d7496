//! Ids that no other request has.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Makes ids of 32 hex digits: 64 bits drawn for this process and a mixed counter.
#[derive(Debug)]
pub(crate) struct Ids {
    process: u64,
    count: AtomicU64,
}

impl Ids {
    pub(crate) fn new() -> Self {
        // Keys of the standard hasher are drawn from the system's random source.
        let random = RandomState::new();
        Self {
            process: random.hash_one(unix_seconds()),
            count: AtomicU64::new(random.hash_one(std::process::id())),
        }
    }

    pub(crate) fn next(&self) -> String {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}{:016x}", self.process, mixed(count))
    }
}

/// Time since 1970.
pub(crate) fn unix_time() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    unix_time().as_secs()
}

/// The finaliser of `SplitMix64`: one to one, and neighbours look unrelated.
const fn mixed(count: u64) -> u64 {
    let mut z = count.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
