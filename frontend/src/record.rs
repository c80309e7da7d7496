//! What the last requests cost, for people who look: the status page, `blockplane chat`.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blockplane_protocol::{FinishReason, Usage};
use parking_lot::Mutex;
use serde::Serialize;

use crate::{generation::Finish, http::unix_time};

/// Requests that are remembered.
const REMEMBERED: usize = 256;

/// The requests that ended last, and totals since the start.
#[derive(Debug, Default)]
pub(crate) struct Records {
    ended: Mutex<VecDeque<Arc<RequestRecord>>>,
    in_flight: AtomicU64,
    started: AtomicU64,
    failed: AtomicU64,
    prompt_tokens: AtomicU64,
    output_tokens: AtomicU64,
    cached_tokens: AtomicU64,
}

/// Totals of one frontend since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Totals {
    /// Requests being served now.
    in_flight: u64,
    /// Requests to a model that is served.
    requests: u64,
    /// Those of them that failed or lost their client.
    failed: u64,
    /// Tokens of prompts.
    prompt_tokens: u64,
    /// Tokens generated.
    output_tokens: u64,
    /// Prompt tokens whose KV was found in some tier.
    cached_tokens: u64,
}

/// One request that has ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct RequestRecord {
    /// The `id` of its response.
    pub(crate) id: String,
    pub(crate) model: String,
    /// `stop`, `length`, `error`, or `disconnected`.
    outcome: &'static str,
    /// When it came in, in milliseconds since 1970.
    started_unix_ms: u64,
    /// From its first byte to its first token.
    ttft_ms: Option<f64>,
    /// Mean time from one token to the next.
    itl_ms: Option<f64>,
    /// From its first byte to its end.
    total_ms: f64,
    prompt_tokens: u32,
    output_tokens: u32,
    cached: CachedTokens,
    transfer: Transfer,
}

/// Prompt tokens whose KV was found, by tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct CachedTokens {
    /// All tiers.
    tokens: u32,
    /// The worker's own pool (G1).
    g1: u32,
    /// Host memory (G2).
    g2: u32,
    /// Disk (G3).
    g3: u32,
    /// An object store or another worker (G4).
    g4: u32,
}

/// KV that a prefill worker sent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Transfer {
    /// Prompt tokens that the prefill worker computed.
    prefill_tokens: u32,
    blocks: u32,
    bytes: u64,
    /// The lane that carried them.
    lane: Option<String>,
    /// Share of the bytes that were in place before the prompt's last layer was computed, 0 to 1.
    overlap: Option<f64>,
}

/// Follows one request. Dropping it before [`Recorder::finished`] counts it as failed.
#[derive(Debug)]
pub(crate) struct Recorder {
    records: Arc<Records>,
    start: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    record: RequestRecord,
}

impl Records {
    /// Counts a request in.
    pub(crate) fn begin(self: &Arc<Self>, model: &str, start: Instant) -> Recorder {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.started.fetch_add(1, Ordering::Relaxed);
        Recorder {
            records: Arc::clone(self),
            start,
            first: None,
            last: None,
            record: RequestRecord {
                model: model.to_owned(),
                outcome: "disconnected",
                started_unix_ms: unix_ms(start),
                ..RequestRecord::default()
            },
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Totals {
            in_flight: read(&self.in_flight),
            requests: read(&self.started),
            failed: read(&self.failed),
            prompt_tokens: read(&self.prompt_tokens),
            output_tokens: read(&self.output_tokens),
            cached_tokens: read(&self.cached_tokens),
        }
    }

    /// The requests that ended last, newest first, at most `limit`.
    pub(crate) fn recent(&self, limit: usize) -> Vec<Arc<RequestRecord>> {
        let ended = self.ended.lock();
        ended.iter().rev().take(limit).cloned().collect()
    }

    /// A request that ended, if it is still remembered.
    pub(crate) fn find(&self, id: &str) -> Option<Arc<RequestRecord>> {
        let ended = self.ended.lock();
        ended.iter().rev().find(|record| record.id == id).cloned()
    }

    fn end(&self, record: RequestRecord) {
        if matches!(record.outcome, "error" | "disconnected") {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        let add = |counter: &AtomicU64, n: u32| counter.fetch_add(n.into(), Ordering::Relaxed);
        add(&self.cached_tokens, record.cached.tokens);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        let mut ended = self.ended.lock();
        if ended.len() == REMEMBERED {
            ended.pop_front();
        }
        ended.push_back(Arc::new(record));
    }
}

impl Recorder {
    /// The request has this id and a prompt of so many tokens.
    pub(crate) fn prepared(&mut self, id: &str, prompt_tokens: usize) {
        id.clone_into(&mut self.record.id);
        self.record.prompt_tokens = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
        let tokens = self.record.prompt_tokens.into();
        self.records
            .prompt_tokens
            .fetch_add(tokens, Ordering::Relaxed);
    }

    /// So many tokens arrived at `now`.
    pub(crate) fn tokens(&mut self, tokens: u32, now: Instant) {
        self.first.get_or_insert(now);
        self.last = Some(now);
        self.record.output_tokens = self.record.output_tokens.saturating_add(tokens);
        let all = &self.records.output_tokens;
        all.fetch_add(tokens.into(), Ordering::Relaxed);
    }

    /// The generation ended well.
    pub(crate) fn finished(&mut self, finish: &Finish, usage: Option<&Usage>) {
        let record = &mut self.record;
        record.outcome = match finish.reason {
            FinishReason::Length => "length",
            FinishReason::Stop | FinishReason::Cancelled => "stop",
        };
        record.output_tokens = finish.completion_tokens;
        let Some(usage) = usage else {
            return;
        };
        let below = [
            usage.cached_host_tokens,
            usage.cached_disk_tokens,
            usage.cached_remote_tokens,
        ];
        record.cached = CachedTokens {
            tokens: finish.cached_tokens,
            g1: finish.cached_tokens.saturating_sub(below.iter().sum()),
            g2: usage.cached_host_tokens,
            g3: usage.cached_disk_tokens,
            g4: usage.cached_remote_tokens,
        };
        record.transfer = Transfer {
            prefill_tokens: usage.remote_prefill_tokens,
            blocks: usage.transfer_blocks,
            bytes: usage.transfer_bytes,
            lane: usage.lane.clone(),
            overlap: share(usage.overlapped_bytes, usage.transfer_bytes),
        };
    }

    /// The request failed.
    pub(crate) fn failed(&mut self) {
        self.record.outcome = "error";
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let mut record = std::mem::take(&mut self.record);
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        record.total_ms = millis(self.start.elapsed());
        record.ttft_ms = self.first.map(|first| millis(first - self.start));
        if let (Some(first), Some(last)) = (self.first, self.last)
            && record.output_tokens > 1
        {
            record.itl_ms = Some(millis(last - first) / f64::from(record.output_tokens - 1));
        }
        self.records.end(record);
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of one request are far below 2^52"
)]
fn share(part: u64, of: u64) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

/// Wall-clock time of a moment that has passed.
fn unix_ms(moment: Instant) -> u64 {
    let since = unix_time().saturating_sub(moment.elapsed());
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINISH: Finish = Finish {
        reason: FinishReason::Stop,
        prompt_tokens: 40,
        completion_tokens: 3,
        cached_tokens: 32,
    };

    #[test]
    fn a_request_is_recorded_with_its_times_tiers_and_transfer() {
        let records = Arc::new(Records::default());
        let start = Instant::now();
        let mut recorder = records.begin("m", start);
        assert_eq!(records.totals().in_flight, 1);
        recorder.prepared("chatcmpl-1", 40);
        let at = |millis| start + Duration::from_millis(millis);
        recorder.tokens(1, at(10));
        recorder.tokens(2, at(30));
        let usage = Usage {
            cached_tokens: 32,
            cached_host_tokens: 16,
            cached_disk_tokens: 8,
            transfer_blocks: 2,
            transfer_bytes: 200,
            overlapped_bytes: 150,
            lane: Some("shm".to_owned()),
            ..Usage::default()
        };
        recorder.finished(&FINISH, Some(&usage));
        drop(recorder);
        let record = records.find("chatcmpl-1").unwrap();
        assert_eq!(record.outcome, "stop");
        assert_eq!(record.ttft_ms, Some(10.0));
        assert_eq!(record.itl_ms, Some(10.0));
        let cached = record.cached;
        assert_eq!(
            (cached.tokens, cached.g1, cached.g2, cached.g3, cached.g4),
            (32, 8, 16, 8, 0)
        );
        assert_eq!(record.transfer.overlap, Some(0.75));
        let totals = records.totals();
        assert_eq!(
            (totals.in_flight, totals.requests, totals.failed),
            (0, 1, 0)
        );
        assert_eq!((totals.prompt_tokens, totals.output_tokens), (40, 3));
        assert_eq!(totals.cached_tokens, 32);
    }

    #[test]
    fn a_dropped_request_counts_as_failed_and_old_ones_are_forgotten() {
        let records = Arc::new(Records::default());
        for n in 0..=REMEMBERED {
            let mut recorder = records.begin("m", Instant::now());
            recorder.prepared(&n.to_string(), 1);
        }
        assert_eq!(records.totals().failed, REMEMBERED as u64 + 1);
        assert_eq!(records.find("0"), None);
        assert_eq!(records.find("1").unwrap().outcome, "disconnected");
        assert_eq!(records.recent(2)[0].id, REMEMBERED.to_string());
        assert_eq!(records.recent(usize::MAX).len(), REMEMBERED);
    }
}
