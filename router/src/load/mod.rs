//! What is running where: reports of the workers joined with the router's own reservations.
//!
//! A reservation shows a request's load from the moment it is routed, before any report can. A
//! report shows what other routers sent. Both see this router's requests, so the table takes the
//! larger of the two and not their sum.

mod active;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use blockplane_protocol::{LoadReport, SequenceHash, WorkerId, WorkerRank};

use self::active::ActiveBlocks;

/// Load of one rank as the router sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankLoad {
    /// Prompt tokens sent to it or reported by it, not yet computed.
    pub prefill_tokens: u64,
    /// Blocks of running requests.
    pub active_blocks: u64,
    /// Requests running or waiting.
    pub active_requests: u32,
    /// Requests it reports as waiting for room.
    pub waiting_requests: u32,
    /// Blocks of its pool.
    pub blocks_total: u32,
}

/// What a request takes on the rank it is sent to.
#[derive(Clone, Debug)]
pub(crate) struct Charge {
    pub(crate) prefill_tokens: u64,
    /// Prompt blocks that running requests may share.
    pub(crate) shared: Arc<[SequenceHash]>,
    /// Prompt blocks that they cannot.
    pub(crate) private_blocks: u64,
}

/// Name of a reservation in one table.
pub(crate) type ReservationId = u64;

#[derive(Debug)]
pub(crate) struct LoadTable {
    ranks: BTreeMap<WorkerRank, Entry>,
    reservations: HashMap<ReservationId, Reserved>,
    next_id: ReservationId,
    selections: u64,
    request_expiry: Duration,
    report_expiry: Duration,
    swept: Duration,
    expired_total: u64,
}

#[derive(Debug, Default)]
struct Entry {
    blocks_total: u32,
    report: Option<(LoadReport, Duration)>,
    prefill_tokens: u64,
    requests: u32,
    active: ActiveBlocks,
    selected: u64,
}

/// What a choice depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RankState {
    pub(crate) load: RankLoad,
    /// Leading blocks of the prompt that running requests hold.
    pub(crate) held_blocks: u64,
    /// When the rank was last chosen: smaller is longer ago.
    pub(crate) selected: u64,
}

#[derive(Debug)]
struct Reserved {
    rank: WorkerRank,
    charge: Charge,
    seen: Duration,
}

impl LoadTable {
    pub(crate) fn new(request_expiry: Duration, report_expiry: Duration) -> Self {
        Self {
            ranks: BTreeMap::new(),
            reservations: HashMap::new(),
            next_id: 0,
            selections: 0,
            request_expiry,
            report_expiry,
            swept: Duration::ZERO,
            expired_total: 0,
        }
    }

    pub(crate) fn add(&mut self, rank: WorkerRank, blocks_total: u32) {
        // A newcomer starts as if it had just been chosen, so that ties do not flood it.
        let entry = self.ranks.entry(rank).or_insert_with(|| Entry {
            selected: self.selections,
            ..Entry::default()
        });
        entry.blocks_total = blocks_total;
    }

    pub(crate) fn remove_worker(&mut self, worker: WorkerId) {
        self.ranks.retain(|rank, _| rank.worker != worker);
        self.reservations.retain(|_, r| r.rank.worker != worker);
    }

    pub(crate) fn report(&mut self, worker: WorkerId, report: LoadReport, now: Duration) {
        let rank = WorkerRank {
            worker,
            rank: report.rank,
        };
        if let Some(entry) = self.ranks.get_mut(&rank) {
            entry.report = Some((report, now));
        }
    }

    /// All ranks, ascending.
    pub(crate) fn ranks(&self) -> impl Iterator<Item = WorkerRank> + '_ {
        self.ranks.keys().copied()
    }

    pub(crate) fn rank_count(&self) -> usize {
        self.ranks.len()
    }

    pub(crate) fn reservations(&self) -> usize {
        self.reservations.len()
    }

    pub(crate) fn expired_total(&self) -> u64 {
        self.expired_total
    }

    /// Load of a rank; `None` when it is not in the table.
    pub(crate) fn load(&self, rank: WorkerRank, now: Duration) -> Option<RankLoad> {
        Some(self.ranks.get(&rank)?.load(now, self.report_expiry))
    }

    /// What a choice needs to know of a rank for a prompt; `None` when it is not in the table.
    pub(crate) fn state(
        &self,
        rank: WorkerRank,
        prompt: &[SequenceHash],
        now: Duration,
    ) -> Option<RankState> {
        let entry = self.ranks.get(&rank)?;
        Some(RankState {
            load: entry.load(now, self.report_expiry),
            held_blocks: entry.active.held(prompt) as u64,
            selected: entry.selected,
        })
    }

    pub(crate) fn reserve(
        &mut self,
        rank: WorkerRank,
        charge: Charge,
        now: Duration,
    ) -> ReservationId {
        self.selections += 1;
        self.next_id += 1;
        if let Some(entry) = self.ranks.get_mut(&rank) {
            entry.selected = self.selections;
            entry.requests += 1;
            entry.prefill_tokens += charge.prefill_tokens;
            entry.active.add(&charge.shared, charge.private_blocks);
            self.reservations.insert(
                self.next_id,
                Reserved {
                    rank,
                    charge,
                    seen: now,
                },
            );
        }
        self.next_id
    }

    /// Charges prompt tokens to a request that was reserved without them.
    pub(crate) fn charge_prefill(&mut self, id: ReservationId, tokens: u64) {
        if let Some(reserved) = self.reservations.get_mut(&id)
            && let Some(entry) = self.ranks.get_mut(&reserved.rank)
        {
            reserved.charge.prefill_tokens += tokens;
            entry.prefill_tokens += tokens;
        }
    }

    /// The first token is there: the prompt is computed.
    pub(crate) fn prefill_done(&mut self, id: ReservationId, now: Duration) {
        if let Some(reserved) = self.reservations.get_mut(&id) {
            reserved.seen = reserved.seen.max(now);
            let tokens = std::mem::take(&mut reserved.charge.prefill_tokens);
            if let Some(entry) = self.ranks.get_mut(&reserved.rank) {
                entry.prefill_tokens = entry.prefill_tokens.saturating_sub(tokens);
            }
        }
    }

    /// The request lives and has filled `blocks` more blocks with output.
    pub(crate) fn output_blocks(&mut self, id: ReservationId, blocks: u64, now: Duration) {
        if let Some(reserved) = self.reservations.get_mut(&id) {
            reserved.seen = reserved.seen.max(now);
            reserved.charge.private_blocks += blocks;
            if let Some(entry) = self.ranks.get_mut(&reserved.rank) {
                entry.active.add(&[], blocks);
            }
        }
    }

    /// The request ended, however it ended. False when its reservation was gone.
    pub(crate) fn finish(&mut self, id: ReservationId) -> bool {
        let Some(Reserved { rank, charge, .. }) = self.reservations.remove(&id) else {
            return false;
        };
        if let Some(entry) = self.ranks.get_mut(&rank) {
            entry.requests = entry.requests.saturating_sub(1);
            entry.prefill_tokens = entry.prefill_tokens.saturating_sub(charge.prefill_tokens);
            entry.active.remove(&charge.shared, charge.private_blocks);
        }
        true
    }

    /// Drops reservations without a sign of life. Looks at them all, at most 16 times per expiry
    /// time.
    pub(crate) fn expire(&mut self, now: Duration) {
        if now.saturating_sub(self.swept) < self.request_expiry / 16 {
            return;
        }
        self.swept = now;
        let stale: Vec<ReservationId> = self
            .reservations
            .iter()
            .filter(|(_, reserved)| now.saturating_sub(reserved.seen) >= self.request_expiry)
            .map(|(&id, _)| id)
            .collect();
        for id in stale {
            self.finish(id);
            self.expired_total += 1;
        }
    }
}

impl Entry {
    fn load(&self, now: Duration, report_expiry: Duration) -> RankLoad {
        let report = self
            .report
            .filter(|(_, at)| now.saturating_sub(*at) < report_expiry)
            .map_or_else(LoadReport::default, |(report, _)| report);
        RankLoad {
            prefill_tokens: self.prefill_tokens.max(report.prefill_tokens_queued),
            active_blocks: self.active.len().max(u64::from(report.blocks_active)),
            active_requests: self.requests.max(
                report
                    .requests_running
                    .saturating_add(report.requests_waiting),
            ),
            waiting_requests: report.requests_waiting,
            blocks_total: self.blocks_total,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn rank() -> WorkerRank {
        WorkerRank::new(WorkerId(1), 0)
    }

    fn table() -> LoadTable {
        let mut table = LoadTable::new(300 * SECOND, 30 * SECOND);
        table.add(rank(), 100);
        table
    }

    fn charge(prefill_tokens: u64, blocks: u64) -> Charge {
        Charge {
            prefill_tokens,
            shared: (1..=blocks).map(SequenceHash).collect(),
            private_blocks: 1,
        }
    }

    #[test]
    fn prefill_is_charged_until_the_first_token_and_blocks_until_the_end() {
        let mut table = table();
        let id = table.reserve(rank(), charge(64, 4), SECOND);
        let load = table.load(rank(), SECOND).unwrap();
        assert_eq!(
            (
                load.prefill_tokens,
                load.active_blocks,
                load.active_requests
            ),
            (64, 5, 1)
        );
        table.prefill_done(id, 2 * SECOND);
        table.prefill_done(id, 2 * SECOND);
        table.output_blocks(id, 2, 3 * SECOND);
        let load = table.load(rank(), SECOND).unwrap();
        assert_eq!((load.prefill_tokens, load.active_blocks), (0, 7));
        assert!(table.finish(id));
        assert!(!table.finish(id));
        let load = table.load(rank(), SECOND).unwrap();
        assert_eq!((load.active_blocks, load.active_requests), (0, 0));
    }

    #[test]
    fn a_report_and_a_reservation_of_the_same_load_are_not_added_up() {
        let mut table = table();
        table.reserve(rank(), charge(64, 4), SECOND);
        let report = LoadReport {
            blocks_active: 9,
            prefill_tokens_queued: 32,
            requests_running: 1,
            requests_waiting: 2,
            ..LoadReport::default()
        };
        table.report(WorkerId(1), report, SECOND);
        let load = table.load(rank(), 2 * SECOND).unwrap();
        assert_eq!(
            (
                load.prefill_tokens,
                load.active_blocks,
                load.active_requests
            ),
            (64, 9, 3)
        );
        let later = table.load(rank(), 32 * SECOND).unwrap();
        assert_eq!((later.active_blocks, later.active_requests), (5, 1));
    }

    #[test]
    fn a_silent_reservation_expires_and_a_live_one_does_not() {
        let mut table = table();
        table.reserve(rank(), charge(64, 4), SECOND);
        let live = table.reserve(rank(), charge(64, 4), SECOND);
        table.output_blocks(live, 0, 200 * SECOND);
        table.expire(302 * SECOND);
        assert_eq!((table.reservations(), table.expired_total()), (1, 1));
        assert_eq!(table.load(rank(), 302 * SECOND).unwrap().prefill_tokens, 64);
        assert!(table.finish(live));
    }

    #[test]
    fn a_removed_worker_takes_its_reservations_with_it() {
        let mut table = table();
        let id = table.reserve(rank(), charge(64, 4), SECOND);
        table.remove_worker(WorkerId(1));
        assert_eq!(table.reservations(), 0);
        table.prefill_done(id, SECOND);
        assert!(!table.finish(id));
        table.add(rank(), 100);
        assert_eq!(table.load(rank(), SECOND).unwrap().active_requests, 0);
    }
}
