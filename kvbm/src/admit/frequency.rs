//! KVBM's frequency filter: counts double, and all of them go down by one every ten minutes.
//!
//! ```text
//! offer(name):   c = known(name) ? c * 2 : 1 ; admitted when c >= 2
//! every 600 s:   every c -= 1 ; forget c = 0
//! too many:      repeat (every c -= 1 ; forget c = 0) until they fit ; the 600 s start again
//! ```
//!
//! Source: `offload/filter.rs` of Dynamo's block manager 1.6.1. There each of the two lower steps
//! walks over all entries. Here an entry holds the *epoch* at which its count is going to be 0, and
//! the two steps only advance the epoch.

use std::{collections::BTreeMap, time::Duration};

use super::table::Table;

/// The largest count there.
const COUNT_MAX: u64 = i64::MAX as u64;

/// Counts of names.
#[derive(Clone, Debug)]
pub(super) struct Frequency {
    threshold: u64,
    decay: Duration,
    entries_max: usize,
    /// Values are the epochs at which entries end.
    ends: Table,
    epoch: u64,
    /// When the current epoch began.
    since: Duration,
    live: usize,
    /// Entries by the epoch at which they end.
    ending: BTreeMap<u64, usize>,
}

impl Frequency {
    pub(super) fn new(threshold: u32, decay: Duration, entries_max: usize) -> Self {
        Self {
            threshold: u64::from(threshold),
            decay,
            entries_max,
            ends: Table::new(),
            epoch: 0,
            since: Duration::ZERO,
            live: 0,
            ending: BTreeMap::new(),
        }
    }

    /// Counts `name`; whether its count reached the threshold.
    pub(super) fn count(&mut self, now: Duration, name: u64) -> bool {
        self.decay(now);
        let epoch = self.epoch;
        let mut count = 1;
        let mut next = 0;
        let end = self.ends.set(
            name,
            |end| {
                if end > epoch {
                    count = (end - epoch).saturating_mul(2).min(COUNT_MAX);
                }
                next = epoch.saturating_add(count);
                next
            },
            |end| end <= epoch,
        );
        if end > epoch {
            self.leave(end);
        }
        *self.ending.entry(next).or_insert(0) += 1;
        self.live += 1;
        if self.live > self.entries_max {
            self.prune(now);
        }
        count >= self.threshold
    }

    /// Names with a count.
    pub(super) const fn len(&self) -> usize {
        self.live
    }

    pub(super) fn bytes(&self) -> usize {
        self.ends.bytes()
    }

    fn decay(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.since);
        if passed < self.decay {
            return;
        }
        let decay = self.decay.as_nanos().max(1);
        let into = passed.as_nanos() % decay;
        self.since = now.saturating_sub(Duration::from_nanos_u128(into));
        let steps = u64::try_from(passed.as_nanos() / decay).unwrap_or(COUNT_MAX);
        self.advance(self.epoch.saturating_add(steps));
    }

    /// Goes to the first epoch in which few enough entries are left.
    fn prune(&mut self, now: Duration) {
        while self.live > self.entries_max {
            let Some((&end, _)) = self.ending.first_key_value() else {
                break;
            };
            self.advance(end);
        }
        self.since = now;
    }

    fn advance(&mut self, epoch: u64) {
        self.epoch = epoch;
        while let Some(first) = self.ending.first_entry()
            && *first.key() <= epoch
        {
            self.live -= first.remove();
        }
    }

    fn leave(&mut self, end: u64) {
        if let Some(entries) = self.ending.get_mut(&end) {
            *entries -= 1;
            if *entries == 0 {
                self.ending.remove(&end);
            }
        }
        self.live -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// The rule as it is written above.
    struct Naive {
        counts: HashMap<u64, u64>,
        next: Duration,
        max: usize,
    }

    impl Naive {
        fn step(&mut self) {
            self.counts.retain(|_, count| {
                *count -= 1;
                *count > 0
            });
        }

        fn count(&mut self, now: Duration, name: u64) -> bool {
            while now >= self.next {
                self.step();
                self.next += Duration::from_secs(600);
            }
            let count = self.counts.get(&name).map_or(1, |count| count * 2);
            self.counts.insert(name, count);
            if self.counts.len() > self.max {
                while self.counts.len() > self.max {
                    self.step();
                }
                self.next = now + Duration::from_secs(600);
            }
            count >= 2
        }
    }

    proptest! {
        #[test]
        fn it_is_the_rule(
            max in 1usize..40,
            steps in prop::collection::vec((0u64..60, prop_oneof![4 => 0u64..60, 1 => 0u64..3_000]), 1..800),
        ) {
            let mut filter = Frequency::new(2, Duration::from_secs(600), max);
            let mut naive = Naive { counts: HashMap::new(), next: Duration::from_secs(600), max };
            let mut now = Duration::ZERO;
            for (name, seconds) in steps {
                now += Duration::from_secs(seconds);
                // More doublings than this do not fit the counts of the naive one.
                if naive.counts.get(&name).is_some_and(|&count| count > 1 << 12) {
                    continue;
                }
                prop_assert_eq!(filter.count(now, name), naive.count(now, name));
                prop_assert_eq!(filter.len(), naive.counts.len());
            }
        }
    }

    #[test]
    fn a_count_that_cannot_grow_stays() {
        let mut filter = Frequency::new(2, Duration::from_secs(600), 2);
        for _ in 0..100 {
            filter.count(Duration::ZERO, 1);
        }
        assert!(filter.count(Duration::from_secs(u64::from(u32::MAX)), 1));
        assert!(!filter.count(Duration::MAX, 2));
        assert_eq!(filter.len(), 2);
        assert!(!filter.count(Duration::MAX, 3), "and an overflow ends");
        assert_eq!(filter.len(), 1);
    }
}
