//! Configuration, under the names and with the defaults of Dynamo's router flags where one exists.

use std::time::Duration;

use thiserror::Error;

use crate::disagg::DisaggPolicy;

/// How a worker is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RouterMode {
    /// Each rank in turn.
    #[default]
    RoundRobin,
    /// Any rank with equal probability.
    Random,
    /// The lowest cost by overlap and load (see [`crate::score`]).
    Kv,
}

/// Settings of a [`crate::Router`].
#[derive(Clone, Debug, PartialEq)]
pub struct RouterConfig {
    /// How a worker is chosen (`--router-mode`). Default: round-robin.
    pub mode: RouterMode,
    /// Tokens per block; equals the workers' `KvLayout::block_tokens`. Default: 16.
    pub block_tokens: u32,
    /// What one block on the device saves, in blocks of prefill
    /// (`--router-kv-overlap-score-credit`). At least 0; default 1.
    pub overlap_score_credit: f64,
    /// How fast the credit shrinks with prefill already queued on the rank
    /// (`--router-kv-overlap-score-credit-decay`). At least 0; default 0 (never).
    pub overlap_score_credit_decay: f64,
    /// Weight of prefill against decode blocks (`--router-prefill-load-scale`). Default: 1.
    pub prefill_load_scale: f64,
    /// Blocks that one active request counts for (`--router-decode-active-request-weight`).
    /// Default: 0.
    pub decode_active_request_weight: f64,
    /// Credit of a block in host memory (`--router-host-cache-hit-weight`). Default: 0.75.
    pub host_cache_hit_weight: f64,
    /// Credit of a block on disk (`--router-disk-cache-hit-weight`). Default: 0.25.
    pub disk_cache_hit_weight: f64,
    /// Credit of a block in shared or remote storage (`--shared-cache-multiplier`). Default: 0.
    pub shared_cache_multiplier: f64,
    /// Softmax temperature over the normalised cost (`--router-temperature`). 0, the default,
    /// always takes the lowest cost.
    pub temperature: f64,
    /// Use KV events (`--router-kv-events`). When false, every rank is routed to by prediction
    /// alone. Default: true.
    pub kv_events: bool,
    /// How long a routed prefix counts as present on a rank without a complete event feed
    /// (`--router-ttl-secs`). Default: 120 s.
    pub ttl: Duration,
    /// How long it counts as present on a rank with a complete feed, to bridge the time until its
    /// events arrive (`--router-predicted-ttl-secs`); zero turns this off. Default: 5 s, so that
    /// requests with a common prefix that arrive together land together.
    pub predicted_ttl: Duration,
    /// Count blocks of running requests (`--router-track-active-blocks`). Default: true.
    pub track_active_blocks: bool,
    /// Count blocks of generated tokens too (`--router-track-output-blocks`). Default: false.
    pub track_output_blocks: bool,
    /// Count prompt tokens until their first output token (`--router-track-prefill-tokens`).
    /// Default: true.
    pub track_prefill_tokens: bool,
    /// Requests on one rank share the blocks of a common prefix (`--router-assume-kv-reuse`).
    /// Default: true.
    pub assume_kv_reuse: bool,
    /// A rank with at least this share of its blocks active is busy
    /// (`--active-decode-blocks-threshold`), 0 to 1. Default: none.
    pub active_decode_blocks_threshold: Option<f64>,
    /// A rank with at least this many prompt tokens pending is busy
    /// (`--active-prefill-tokens-threshold`). Default: none.
    pub active_prefill_tokens_threshold: Option<u64>,
    /// A rank that reports at least this many waiting requests is busy. Default: none.
    pub waiting_requests_max: Option<u32>,
    /// A reservation without a sign of life for this long is dropped
    /// (`DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS`). Default: 300 s.
    pub active_request_expiry: Duration,
    /// A load report older than this is not used. Default: 30 s.
    pub load_report_expiry: Duration,
    /// Requests in flight through this router; more are refused as overloaded. A reservation takes
    /// about 100 bytes and 8 per prompt block. Default: 8192.
    pub requests_max: usize,
    /// Blocks that each pool's index keeps; 60 to 130 bytes each. Default: 2^20 (about 100 MB when
    /// full).
    pub index_blocks_max: usize,
    /// Pairs of block and rank that are predicted at a time; about 100 bytes each. Default: 2^18.
    pub predictions_max: usize,
    /// When a prompt is prefilled by another worker than the one that decodes.
    pub disagg: DisaggPolicy,
}

/// A setting that cannot work.
#[derive(Clone, Debug, PartialEq, Error)]
#[error("{name} is {value}; accepted: {accepted}")]
pub struct ConfigError {
    /// The field.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// What would do.
    pub accepted: &'static str,
}

impl RouterConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the first field out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (name, value) in [
            ("overlap_score_credit", self.overlap_score_credit),
            (
                "overlap_score_credit_decay",
                self.overlap_score_credit_decay,
            ),
            ("prefill_load_scale", self.prefill_load_scale),
            (
                "decode_active_request_weight",
                self.decode_active_request_weight,
            ),
            ("host_cache_hit_weight", self.host_cache_hit_weight),
            ("disk_cache_hit_weight", self.disk_cache_hit_weight),
            ("shared_cache_multiplier", self.shared_cache_multiplier),
            ("temperature", self.temperature),
        ] {
            if !value.is_finite() || value < 0.0 {
                return Err(error(name, &value, "a finite number of at least 0"));
            }
        }
        if let Some(share) = self.active_decode_blocks_threshold
            && !(0.0..=1.0).contains(&share)
        {
            return Err(error("active_decode_blocks_threshold", &share, "0 to 1"));
        }
        for (name, value) in [
            ("block_tokens", self.block_tokens as usize),
            ("requests_max", self.requests_max),
            ("index_blocks_max", self.index_blocks_max),
            ("predictions_max", self.predictions_max),
            ("disagg.hints_max", self.disagg.hints_max),
        ] {
            if value == 0 {
                return Err(error(name, &value, "at least 1"));
            }
        }
        if self.active_request_expiry.is_zero() {
            return Err(error("active_request_expiry", &"0 s", "more than 0 s"));
        }
        Ok(())
    }

    /// How long predictions have to be kept for all of their readers.
    pub(crate) fn prediction_ttl(&self) -> Duration {
        self.ttl.max(self.predicted_ttl)
    }
}

fn error(name: &'static str, value: &impl ToString, accepted: &'static str) -> ConfigError {
    ConfigError {
        name,
        value: value.to_string(),
        accepted,
    }
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            mode: RouterMode::RoundRobin,
            block_tokens: 16,
            overlap_score_credit: 1.0,
            overlap_score_credit_decay: 0.0,
            prefill_load_scale: 1.0,
            decode_active_request_weight: 0.0,
            host_cache_hit_weight: 0.75,
            disk_cache_hit_weight: 0.25,
            shared_cache_multiplier: 0.0,
            temperature: 0.0,
            kv_events: true,
            ttl: Duration::from_secs(120),
            predicted_ttl: Duration::from_secs(5),
            track_active_blocks: true,
            track_output_blocks: false,
            track_prefill_tokens: true,
            assume_kv_reuse: true,
            active_decode_blocks_threshold: None,
            active_prefill_tokens_threshold: None,
            waiting_requests_max: None,
            active_request_expiry: Duration::from_secs(300),
            load_report_expiry: Duration::from_secs(30),
            requests_max: 8192,
            index_blocks_max: 1 << 20,
            predictions_max: 1 << 18,
            disagg: DisaggPolicy::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_out_of_range_is_named() {
        let config = RouterConfig {
            temperature: -1.0,
            ..RouterConfig::default()
        };
        let error = config.validate().unwrap_err();
        assert_eq!(
            error.to_string(),
            "temperature is -1; accepted: a finite number of at least 0"
        );
        let config = RouterConfig {
            block_tokens: 0,
            ..RouterConfig::default()
        };
        assert_eq!(config.validate().unwrap_err().name, "block_tokens");
        assert_eq!(RouterConfig::default().validate(), Ok(()));
    }
}
