//! From blocks that were found to time that users wait.

use crate::kvbm::{Outcome, Trace, outcome::real};

/// How fast things are, as the user says.
#[derive(Clone, Copy, Debug, PartialEq, clap::Args)]
pub struct Speeds {
    /// Tokens that the model prefills in a second, for the estimate of the time to first token.
    #[arg(long, default_value_t = 10_000.0)]
    pub prefill_tokens_per_s: f64,
    /// Bandwidth between G2 and G1, for the same.
    #[arg(long, default_value_t = 20.0)]
    pub cpu_gb_per_s: f64,
    /// Bandwidth between G3 and G2, for the same.
    #[arg(long, default_value_t = 5.0)]
    pub disk_gb_per_s: f64,
}

impl Speeds {
    pub(super) fn check(&self) -> anyhow::Result<()> {
        for (name, speed) in [
            ("--prefill-tokens-per-s", self.prefill_tokens_per_s),
            ("--cpu-gb-per-s", self.cpu_gb_per_s),
            ("--disk-gb-per-s", self.disk_gb_per_s),
        ] {
            anyhow::ensure!(
                speed > 0.0 && speed.is_finite(),
                "{name} {speed}; accepted: above 0"
            );
        }
        Ok(())
    }

    /// Mean time until a prompt is computed, in milliseconds, on a worker that does nothing else:
    /// what is not found is prefilled, what is found below G1 is read first.
    pub(super) fn ttft_ms(&self, trace: &Trace, outcome: &Outcome, block_bytes: u64) -> f64 {
        let found = outcome.hit_blocks() * u64::from(trace.block_tokens());
        let prefill = real(trace.tokens().saturating_sub(found)) / self.prefill_tokens_per_s;
        let bytes = |blocks: u64| real(blocks) * real(block_bytes);
        let host = bytes(outcome.hits.host + outcome.hits.disk) / (self.cpu_gb_per_s * 1e9);
        let disk = bytes(outcome.hits.disk) / (self.disk_gb_per_s * 1e9);
        (prefill + host + disk) / real(outcome.requests as u64) * 1e3
    }
}
