//! What runs in a vLLM server, as far as it came through this engine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blockplane_protocol::{DpRank, LoadReport};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::metrics::Samples;

/// The books of all ranks.
#[derive(Debug)]
pub(super) struct Load {
    ranks: Vec<Mutex<Rank>>,
    /// Requests that have not ended.
    active: watch::Sender<usize>,
    started: Instant,
    /// When a token last came from each rank, in milliseconds after `started`.
    progress: Vec<AtomicU64>,
    block_tokens: u32,
}

#[derive(Debug, Default)]
struct Rank {
    report: LoadReport,
    /// Blocks that the server says are in use, by any client of it.
    blocks_used: u32,
}

/// One request in the books. Dropping it takes it out.
#[derive(Debug)]
pub(super) struct Entry {
    load: Arc<Load>,
    rank: DpRank,
    prompt: u32,
    tokens: u32,
    /// It has got a token.
    running: bool,
}

impl Load {
    pub(super) fn new(ranks: u32, blocks: u32, block_tokens: u32) -> Arc<Self> {
        let rank = |rank| {
            Mutex::new(Rank {
                report: LoadReport {
                    rank: DpRank(rank),
                    blocks_total: blocks,
                    ..LoadReport::default()
                },
                blocks_used: 0,
            })
        };
        Arc::new(Self {
            ranks: (0..ranks).map(rank).collect(),
            active: watch::Sender::new(0),
            started: Instant::now(),
            progress: (0..ranks).map(|_| AtomicU64::new(0)).collect(),
            block_tokens,
        })
    }

    /// Enters a request of `prompt` tokens.
    pub(super) fn enter(self: &Arc<Self>, rank: DpRank, prompt: usize) -> Entry {
        let entry = Entry {
            load: Arc::clone(self),
            rank,
            prompt: u32::try_from(prompt).unwrap_or(u32::MAX),
            tokens: 0,
            running: false,
        };
        self.active.send_modify(|active| *active += 1);
        entry.change(|report, entry| {
            report.requests_waiting += 1;
            report.prefill_tokens_queued += u64::from(entry.prompt);
            report.blocks_active += entry.blocks();
        });
        entry
    }

    /// The load of each rank.
    pub(super) fn reports(&self) -> Vec<LoadReport> {
        let report = |rank: &Mutex<Rank>| {
            let rank = rank.lock();
            let mut report = rank.report;
            // Requests of other clients of the server count, too.
            let used = report.blocks_active.max(rank.blocks_used);
            report.blocks_active = used.min(report.blocks_total);
            report
        };
        self.ranks.iter().map(report).collect()
    }

    /// Takes over what only the server knows.
    pub(super) fn observe(&self, samples: &Samples) {
        for (rank, number) in self.ranks.iter().zip(0..) {
            let mut rank = rank.lock();
            let total = f64::from(rank.report.blocks_total);
            if let Some(share) = samples.of_rank("vllm:kv_cache_usage_perc", number) {
                rank.blocks_used = count(share * total);
            }
            if let Some(times) = samples.of_rank("vllm:num_preemptions_total", number) {
                rank.report.preemptions_total = count(times).into();
            }
        }
    }

    /// Requests that have not ended.
    pub(super) fn active(&self) -> usize {
        *self.active.borrow()
    }

    /// Waits until none is left.
    pub(super) async fn idle(&self) {
        // The sender is `self`.
        let _ = self
            .active
            .subscribe()
            .wait_for(|active| *active == 0)
            .await;
    }

    /// The rank from which no token came for longest, and for how long.
    pub(super) fn quietest(&self) -> (DpRank, Duration) {
        let last = self.progress.iter().map(|at| at.load(Ordering::Relaxed));
        let (_, rank) = last.zip(0..).min().unwrap_or_default();
        (DpRank(rank), self.quiet(DpRank(rank)))
    }

    /// How long ago a token came from a rank.
    pub(super) fn quiet(&self, rank: DpRank) -> Duration {
        let at = self.progress[rank.0 as usize].load(Ordering::Relaxed);
        self.started
            .elapsed()
            .saturating_sub(Duration::from_millis(at))
    }

    /// Notes that a rank works.
    pub(super) fn made_progress(&self, rank: DpRank) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.progress[rank.0 as usize].store(now, Ordering::Relaxed);
    }

    /// Notes that all ranks begin anew.
    pub(super) fn begin_anew(&self) {
        (0..)
            .zip(&self.progress)
            .for_each(|(rank, _)| self.made_progress(DpRank(rank)));
    }
}

impl Entry {
    /// Notes that tokens came.
    pub(super) fn tokens(&mut self, new: usize) {
        self.load.made_progress(self.rank);
        let before = self.blocks();
        let first = !std::mem::replace(&mut self.running, true);
        self.tokens += u32::try_from(new).unwrap_or(u32::MAX);
        self.change(|report, entry| {
            if first {
                report.requests_waiting -= 1;
                report.requests_running += 1;
                report.prefill_tokens_queued -= u64::from(entry.prompt);
                report.prefill_tokens_total += u64::from(entry.prompt);
            }
            report.blocks_active += entry.blocks() - before;
            report.decode_tokens_total += new as u64;
        });
    }

    /// Notes that so much of the prompt was in the cache.
    pub(super) fn cached(&self, tokens: u32) {
        self.change(|report, _| {
            let tokens = u64::from(tokens);
            report.cached_tokens_total += tokens;
            report.prefill_tokens_total = report.prefill_tokens_total.saturating_sub(tokens);
        });
    }

    fn blocks(&self) -> u32 {
        let tokens = self.prompt.saturating_add(self.tokens);
        tokens.div_ceil(self.load.block_tokens)
    }

    fn change(&self, change: impl FnOnce(&mut LoadReport, &Self)) {
        change(
            &mut self.load.ranks[self.rank.0 as usize].lock().report,
            self,
        );
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.change(|report, entry| {
            if entry.running {
                report.requests_running -= 1;
            } else {
                report.requests_waiting -= 1;
                report.prefill_tokens_queued -= u64::from(entry.prompt);
            }
            report.blocks_active -= entry.blocks();
        });
        self.load.active.send_modify(|active| *active -= 1);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count that a server reports; saturating is right for nonsense"
)]
const fn count(value: f64) -> u32 {
    value.round() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_in_the_books_until_it_is_dropped() {
        let load = Load::new(2, 100, 16);
        let mut entry = load.enter(DpRank(1), 40);
        let report = load.reports()[1];
        assert_eq!((report.requests_waiting, report.requests_running), (1, 0));
        assert_eq!(
            (report.prefill_tokens_queued, report.blocks_active),
            (40, 3)
        );
        entry.tokens(1);
        entry.tokens(8);
        entry.cached(32);
        let report = load.reports()[1];
        assert_eq!((report.requests_waiting, report.requests_running), (0, 1));
        assert_eq!((report.prefill_tokens_queued, report.blocks_active), (0, 4));
        assert_eq!(
            (report.prefill_tokens_total, report.cached_tokens_total),
            (8, 32)
        );
        assert_eq!(load.active(), 1);
        drop(entry);
        let report = load.reports()[1];
        assert_eq!((report.requests_running, report.blocks_active), (0, 0));
        assert_eq!(report.decode_tokens_total, 9);
        assert_eq!(load.active(), 0);
        assert_eq!(load.reports()[0].decode_tokens_total, 0);
    }

    #[test]
    fn a_rank_without_tokens_is_found_whatever_the_others_do() {
        let load = Load::new(3, 10, 16);
        std::iter::repeat_with(|| load.started.elapsed())
            .find(|elapsed| elapsed.as_millis() > 2)
            .expect("time passes");
        load.made_progress(DpRank(0));
        load.enter(DpRank(2), 4).tokens(1);
        let (rank, quiet) = load.quietest();
        assert!(
            rank == DpRank(1) && quiet.as_millis() > 1,
            "{rank} {quiet:?}"
        );
        load.begin_anew();
        assert!(load.quietest().1 <= quiet);
    }

    #[test]
    fn other_clients_of_the_server_count() {
        let load = Load::new(1, 200, 16);
        load.observe(&Samples::parse(
            "vllm:kv_cache_usage_perc{engine=\"0\"} 0.25\nvllm:num_preemptions_total{engine=\"0\"} 3.0\n",
        ));
        let _entry = load.enter(DpRank(0), 16);
        let report = load.reports()[0];
        assert_eq!((report.blocks_active, report.preemptions_total), (50, 3));
    }
}
