//! What writers of different batches must not share: scratch memory with its intent page, and pages
//! of headers.

use std::{collections::HashSet, time::Instant};

use parking_lot::{Condvar, Mutex};

/// Numbers that one holder at a time has, each with a number that the holder may change.
#[derive(Default)]
pub(super) struct Lanes {
    free: Mutex<Vec<(u32, u32)>>,
    changed: Condvar,
}

impl Lanes {
    pub(super) fn new(count: u32) -> Self {
        Self {
            free: Mutex::new((0..count).rev().map(|lane| (lane, 0)).collect()),
            changed: Condvar::new(),
        }
    }

    /// A free one with its number, or none by then.
    pub(super) fn take(&self, until: Instant) -> Option<(u32, u32)> {
        let mut free = self.free.lock();
        loop {
            if let Some(lane) = free.pop() {
                return Some(lane);
            }
            if self.changed.wait_until(&mut free, until).timed_out() {
                return free.pop();
            }
        }
    }

    pub(super) fn give(&self, lane: u32, turn: u32) {
        self.free.lock().push((lane, turn));
        self.changed.notify_one();
    }
}

/// Pages of headers that somebody reads, changes and writes back.
#[derive(Default)]
pub(super) struct Pages {
    held: Mutex<HashSet<u32>>,
    changed: Condvar,
}

impl Pages {
    /// Takes all of them at once, or none by then: nobody waits while holding some.
    pub(super) fn take(&self, pages: &[u32], until: Instant) -> bool {
        let mut held = self.held.lock();
        loop {
            if !pages.iter().any(|page| held.contains(page)) {
                held.extend(pages);
                return true;
            }
            if self.changed.wait_until(&mut held, until).timed_out() {
                return false;
            }
        }
    }

    pub(super) fn give(&self, pages: &[u32]) {
        let mut held = self.held.lock();
        for page in pages {
            held.remove(page);
        }
        self.changed.notify_all();
    }
}
