//! Hit rates over the last requests.

use std::collections::VecDeque;

use parking_lot::Mutex;

use super::{DiskWear, exposition};
use crate::{remote::PeerStats, tier::TierStats};

/// What one request found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestHits {
    /// Full blocks of its prompt.
    pub blocks: u32,
    /// Those found in G1.
    pub device: u32,
    /// Those found in G2.
    pub host: u32,
    /// Those found in G3.
    pub disk: u32,
    /// Those found in G4.
    pub remote: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
}

/// Shares of the blocks that the last requests asked for, 0 to 1. 0 before the first request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HitRates {
    /// Requests looked at.
    pub requests: usize,
    /// Found in G1.
    pub device: f64,
    /// Found in G2.
    pub host: f64,
    /// Found in G3.
    pub disk: f64,
    /// Found in G4.
    pub remote: f64,
}

/// Counts requests, and writes what is known of the tiers as text.
#[derive(Debug)]
pub struct KvbmMetrics {
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    last: VecDeque<RequestHits>,
    max: usize,
    sum: [u64; 5],
    matched_tokens: u64,
}

impl KvbmMetrics {
    /// Rates are taken over the last `requests` requests (`DYN_KVBM_CACHE_STATS_MAX_REQUESTS`), at
    /// least one; 24 bytes each.
    #[must_use]
    pub fn new(requests: u32) -> Self {
        Self {
            window: Mutex::new(Window {
                last: VecDeque::new(),
                max: requests.max(1) as usize,
                sum: [0; 5],
                matched_tokens: 0,
            }),
        }
    }

    /// Counts a request, once its tiers were looked through.
    pub fn request(&self, hits: RequestHits) {
        let mut window = self.window.lock();
        if window.last.len() == window.max
            && let Some(old) = window.last.pop_front()
        {
            for (sum, old) in window.sum.iter_mut().zip(old.counts()) {
                *sum -= old;
            }
        }
        for (sum, new) in window.sum.iter_mut().zip(hits.counts()) {
            *sum += new;
        }
        let below = u64::from(hits.host) + u64::from(hits.disk) + u64::from(hits.remote);
        window.matched_tokens += below * u64::from(hits.block_tokens);
        window.last.push_back(hits);
    }

    /// The rates as they are now.
    #[must_use]
    pub fn rates(&self) -> HitRates {
        self.window.lock().rates()
    }

    /// All metrics in Prometheus' text format 0.0.4. `recorded` and `record_dropped` are a recorder's
    /// counters, zero without one.
    #[must_use]
    pub fn text(
        &self,
        stats: &TierStats,
        wear: Option<DiskWear>,
        peers: Option<&PeerStats>,
        recorded: [u64; 2],
    ) -> String {
        let window = self.window.lock();
        let (rates, matched_tokens) = (window.rates(), window.matched_tokens);
        drop(window);
        exposition::write(stats, wear, peers, recorded, rates, matched_tokens)
    }

    /// One line about hit rates, for the log.
    #[must_use]
    pub fn line(&self) -> String {
        let rates = self.rates();
        let percent = |rate: f64| rate * 100.0;
        format!(
            "hit rates over {} requests: G1 {:.1} %, host {:.1} %, disk {:.1} %, remote {:.1} %",
            rates.requests,
            percent(rates.device),
            percent(rates.host),
            percent(rates.disk),
            percent(rates.remote)
        )
    }
}

impl RequestHits {
    fn counts(&self) -> [u64; 5] {
        [self.blocks, self.device, self.host, self.disk, self.remote].map(u64::from)
    }
}

impl Window {
    fn rates(&self) -> HitRates {
        let [blocks, device, host, disk, remote] = self.sum;
        #[expect(
            clippy::cast_precision_loss,
            reason = "a share needs no more than 53 bits"
        )]
        let share = |hits: u64| hits as f64 / blocks.max(1) as f64;
        HitRates {
            requests: self.last.len(),
            device: share(device),
            host: share(host),
            disk: share(disk),
            remote: share(remote),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_last_requests_only() {
        let metrics = KvbmMetrics::new(2);
        assert_eq!(metrics.rates(), HitRates::default());
        let hits = |host, disk| RequestHits {
            blocks: 10,
            host,
            disk,
            block_tokens: 16,
            ..RequestHits::default()
        };
        for (host, disk) in [(10, 0), (5, 1), (0, 2)] {
            metrics.request(hits(host, disk));
        }
        let rates = metrics.rates();
        assert_eq!((rates.requests, rates.host, rates.disk), (2, 0.25, 0.15));
        assert_eq!(
            metrics.line(),
            "hit rates over 2 requests: G1 0.0 %, host 25.0 %, disk 15.0 %, remote 0.0 %"
        );
        let text = metrics.text(&TierStats::default(), None, None, [0; 2]);
        // Of all requests, not of the last ones.
        assert!(text.contains("\nkvbm_matched_tokens 288\n"), "{text}");
        assert!(text.contains("\nkvbm_host_cache_hit_rate 0.25\n"), "{text}");
    }
}
