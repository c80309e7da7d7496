//! What a peer tier counts.

use std::{
    cmp::Reverse,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

use super::{RETELL, State, announce::Inbox};
use crate::tier::Histogram;

/// What a peer tier did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerStats {
    /// Peers that are known.
    pub peers: u64,
    /// Those of them that blocks can be read from now.
    pub usable: u64,
    /// Peers refused, for another fingerprint or another shape of blocks.
    pub refused_peers: u64,
    /// Times that a peer was lost.
    pub lost: u64,
    /// Names that peers have told, those of several peers once. Up to a second old.
    pub names: u64,
    /// Blocks read from peers and verified.
    pub read: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Times from the request for blocks until they are there, or not, one for each move.
    pub read_times: Histogram,
    /// Blocks that a peer had told of and does not have any more.
    pub missing: u64,
    /// Blocks whose bytes were not what their owner said.
    pub invalid: u64,
    /// Blocks that were not read for another reason, such as a deadline.
    pub failed: u64,
    /// Blocks lent to peers.
    pub lent: u64,
    /// Their bytes.
    pub lent_bytes: u64,
    /// Requests for leases that were refused.
    pub refused: u64,
    /// Leases that were not given back in time.
    pub expired: u64,
    /// Messages that were not understood, or of somebody who is no peer.
    pub ignored: u64,
    /// Blocks held for peers now.
    pub held: u64,
    /// Those of them whose lease has ended, and that a stopped reader may still be copying.
    pub overdue: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) refused_peers: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) read: AtomicU64,
    pub(super) missing: AtomicU64,
    pub(super) invalid: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) lent: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) ignored: AtomicU64,
    pub(super) held: AtomicU64,
    pub(super) overdue: AtomicU64,
    pub(super) read_times: Mutex<Histogram>,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    /// The rest follows from the peers.
    pub(super) fn stats(&self, block_bytes: u64) -> PeerStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PeerStats {
            refused_peers: of(&self.refused_peers),
            lost: of(&self.lost),
            read: of(&self.read),
            read_bytes: of(&self.read) * block_bytes,
            read_times: *self.read_times.lock(),
            missing: of(&self.missing),
            invalid: of(&self.invalid),
            failed: of(&self.failed),
            lent: of(&self.lent),
            lent_bytes: of(&self.lent) * block_bytes,
            refused: of(&self.refused),
            expired: of(&self.expired),
            ignored: of(&self.ignored),
            held: of(&self.held),
            overdue: of(&self.overdue),
            ..PeerStats::default()
        }
    }
}

/// Counts names that several peers have once. That takes a look at every name, so an answer is kept for
/// a while.
#[derive(Debug, Default)]
pub(super) struct Distinct(Option<(Duration, usize)>);

impl Distinct {
    pub(super) fn get(&mut self, now: Duration, state: &State) -> usize {
        if let Some((at, count)) = self.0
            && now < at + RETELL
        {
            return count;
        }
        let usable = state.peers.values().filter(|peer| peer.usable().is_some());
        let count = distinct(usable.map(|peer| &peer.inbox).collect());
        self.0 = Some((now, count));
        count
    }
}

fn distinct(mut inboxes: Vec<&Inbox>) -> usize {
    // The names of the largest are not looked at one by one.
    inboxes.sort_by_key(|inbox| Reverse(inbox.len()));
    let mut count = inboxes.first().map_or(0, |inbox| inbox.len());
    for (at, inbox) in inboxes.iter().enumerate().skip(1) {
        let earlier = &inboxes[..at];
        let known = |name| earlier.iter().any(|inbox| inbox.contains(name));
        count += inbox.names().filter(|name| !known(*name)).count();
    }
    count
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::SequenceHash;

    use super::{super::codec::Part, *};

    #[test]
    fn names_of_several_peers_count_once() {
        let told = |names: std::ops::Range<u64>| {
            let mut inbox = Inbox::new(100);
            inbox.take(&Part {
                before: None,
                last: 1,
                part: 0,
                parts: 1,
                stored: names.map(SequenceHash).collect(),
                removed: Vec::new(),
            });
            inbox
        };
        let inboxes = [told(0..3), told(2..10), told(8..12), told(0..3), told(0..0)];
        assert_eq!(distinct(inboxes.iter().collect()), 12);
        assert_eq!(distinct(Vec::new()), 0);
    }
}
