//! What a deployment did between two looks at its status.

use std::{fmt::Write, time::Instant};

use serde_json::Value;

/// Counters at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Snapshot {
    at: Option<Instant>,
    in_flight: u64,
    requests: u64,
    failed: u64,
    prompt_tokens: u64,
    output_tokens: u64,
    moved_blocks: u64,
    moved_bytes: u64,
    /// Prompt tokens reused, all tiers, then G2, G3, G4 of them.
    reused: [u64; 4],
    /// Prompt tokens that were computed.
    computed: u64,
    ttft_ms: Option<f64>,
    itl_ms: Option<f64>,
}

/// What a line shows.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Figures {
    /// Nothing has happened.
    pub(super) idle: bool,
    now: Snapshot,
    tokens_per_s: f64,
    prompt_tokens_per_s: f64,
    gigabytes_per_s: f64,
}

impl Snapshot {
    /// Reads `GET /blockplane/status`.
    pub(super) fn read(status: &Value, at: Instant) -> Self {
        let total = |name: &str| status["totals"][name].as_u64().unwrap_or(0);
        let workers = status["workers"].as_array().into_iter().flatten();
        let loads: Vec<&Value> = workers
            .flat_map(|worker| worker["load"].as_array().into_iter().flatten())
            .collect();
        let sum = |name: &str| -> u64 { loads.iter().filter_map(|load| load[name].as_u64()).sum() };
        let recent = status["recent"].as_array().into_iter().flatten();
        let recent: Vec<&Value> = recent.collect();
        let middle = |name: &str| {
            let mut times: Vec<f64> = recent.iter().filter_map(|r| r[name].as_f64()).collect();
            times.sort_by(f64::total_cmp);
            times.get(times.len() / 2).copied()
        };
        Self {
            at: Some(at),
            in_flight: total("in_flight"),
            requests: total("requests"),
            failed: total("failed"),
            prompt_tokens: total("prompt_tokens"),
            output_tokens: total("output_tokens"),
            // Both ends of a transfer count it.
            moved_blocks: sum("transfer_blocks_total") / 2,
            moved_bytes: sum("transfer_bytes_total") / 2,
            reused: [
                sum("cached_tokens_total"),
                sum("cached_host_tokens_total"),
                sum("cached_disk_tokens_total"),
                sum("cached_remote_tokens_total"),
            ],
            computed: sum("prefill_tokens_total"),
            ttft_ms: middle("ttft_ms"),
            itl_ms: middle("itl_ms"),
        }
    }
}

impl Figures {
    pub(super) fn between(before: &Snapshot, now: &Snapshot) -> Self {
        let seconds = match (before.at, now.at) {
            (Some(before), Some(now)) => (now - before).as_secs_f64(),
            _ => 0.0,
        };
        // A process that was restarted counts from zero again.
        let rate = |before: u64, now: u64| {
            if seconds > 0.0 {
                float(now.saturating_sub(before)) / seconds
            } else {
                0.0
            }
        };
        Self {
            idle: now.in_flight == 0 && now.requests == before.requests,
            tokens_per_s: rate(before.output_tokens, now.output_tokens),
            prompt_tokens_per_s: rate(before.prompt_tokens, now.prompt_tokens),
            gigabytes_per_s: rate(before.moved_bytes, now.moved_bytes) / 1e9,
            now: now.clone(),
        }
    }

    /// Two lines for people: requests and their times, then KV.
    pub(super) fn lines(&self) -> [String; 2] {
        let now = &self.now;
        let millis = |time: Option<f64>| match time {
            None => "-".to_owned(),
            Some(ms) if ms < 10.0 => format!("{ms:.1} ms"),
            Some(ms) => format!("{ms:.0} ms"),
        };
        let failed = if now.failed > 0 {
            format!(" ({} failed)", now.failed)
        } else {
            String::new()
        };
        let requests = format!(
            "{} in flight, {} requests{failed} | {:.0} tokens/s out, {:.0} in | TTFT {}, ITL {}",
            now.in_flight,
            now.requests,
            self.tokens_per_s,
            self.prompt_tokens_per_s,
            millis(now.ttft_ms),
            millis(now.itl_ms),
        );
        let mut kv = format!(
            "KV moved {} blocks, {:.2} GB/s | reused",
            now.moved_blocks, self.gigabytes_per_s,
        );
        let [all, lower @ ..] = now.reused;
        let asked = float(all + now.computed).max(1.0);
        let own = all.saturating_sub(lower.iter().sum());
        for (tier, tokens) in ["G1", "G2", "G3", "G4"]
            .into_iter()
            .zip(std::iter::once(own).chain(lower))
        {
            if tokens > 0 || tier == "G1" {
                let _ = write!(kv, " {tier} {:.0} %", 100.0 * float(tokens) / asked);
            }
        }
        [requests, kv]
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "shown with a few digits at most"
)]
const fn float(n: u64) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_says_what_happened_since_the_last_one() {
        let began = Instant::now();
        let status = |scale: u64| {
            json!({
                "totals": {"in_flight": scale, "requests": 10 * scale, "failed": 0,
                           "prompt_tokens": 1000 * scale, "output_tokens": 100 * scale},
                "workers": [
                    {"load": [{"transfer_bytes_total": 1_000_000_000 * scale,
                               "transfer_blocks_total": 50 * scale, "prefill_tokens_total": 50}]},
                    {"load": [{"transfer_bytes_total": 1_000_000_000 * scale,
                               "transfer_blocks_total": 50 * scale, "cached_tokens_total": 50,
                               "cached_host_tokens_total": 20}]},
                ],
                "recent": [{"ttft_ms": 30.0, "itl_ms": 3.0}, {"ttft_ms": 10.0, "itl_ms": null},
                           {"ttft_ms": 20.0, "itl_ms": 2.0}],
            })
        };
        let before = Snapshot::read(&status(1), began);
        let now = Snapshot::read(&status(3), began + Duration::from_secs(2));
        let figures = Figures::between(&before, &now);
        assert!(!figures.idle);
        assert_eq!(
            figures.lines(),
            [
                "3 in flight, 30 requests | 100 tokens/s out, 1000 in | TTFT 20 ms, ITL 3.0 ms",
                "KV moved 150 blocks, 1.00 GB/s | reused G1 30 % G2 20 %"
            ]
        );
    }

    #[test]
    fn nothing_new_is_idle_and_a_restart_counts_no_backwards() {
        let began = Instant::now();
        let many = json!({"totals": {"requests": 5, "output_tokens": 100}});
        let none = json!({"totals": {"requests": 5, "output_tokens": 0}});
        let before = Snapshot::read(&many, began);
        let now = Snapshot::read(&none, began + Duration::from_secs(1));
        let figures = Figures::between(&before, &now);
        assert!(figures.idle);
        assert!(figures.lines()[0].contains("| 0 tokens/s out, 0 in | TTFT -, ITL -"));
    }
}
