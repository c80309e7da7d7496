//! Rotary position embedding: which angle each pair of elements turns by, per position.

use serde_json::Value;

use super::config::{flag, narrow, number, optional, present, value};
use super::error::ConfigError;

/// What the supported architectures use when the configuration does not say.
const THETA_DEFAULT: f64 = 10_000.0;

/// Frequencies of the rotation, computed once from the configuration.
///
/// Elements `i` and `i + head_dim / 2` of a head turn together by `position * inverse_frequencies[i]`
/// radians; sine and cosine are then scaled by `attention_scale` (1 except for YaRN).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Radians per position, one per pair of elements.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on sine and cosine.
    pub attention_scale: f32,
}

impl RopeConfig {
    /// Reads `rope_parameters`, or `rope_theta` and `rope_scaling`.
    ///
    /// Dynamic scaling changes nothing up to `max_position_embeddings`, and longer sequences are
    /// not accepted: past that point it would turn cached keys by angles that no longer hold.
    pub(super) fn parse(
        json: &Value,
        head_dim: usize,
        context_tokens_max: usize,
    ) -> Result<Self, ConfigError> {
        let nothing = Value::Null;
        let parameters = present(json, "rope_parameters")
            .or_else(|| present(json, "rope_scaling"))
            .unwrap_or(&nothing);
        if !(parameters.is_null() || parameters.is_object()) {
            return Err(value("rope_scaling", &parameters, "an object or null"));
        }
        for holder in [json, parameters] {
            if let Some(part) = number(holder, "partial_rotary_factor")?
                && part != 1.0
            {
                return Err(value("partial_rotary_factor", &part, "1"));
            }
        }
        let theta = match number(parameters, "rope_theta")? {
            Some(theta) => theta,
            None => number(json, "rope_theta")?.unwrap_or(THETA_DEFAULT),
        };
        if !(theta.is_finite() && theta > 1.0) {
            return Err(value("rope_theta", &theta, "a number above 1"));
        }
        let kind = present(parameters, "rope_type")
            .or_else(|| present(parameters, "type"))
            .map_or(Ok("default"), |kind| {
                kind.as_str().ok_or_else(|| unknown_type(kind))
            })?;
        // Rounded to single precision at each step, as the models were trained: at position 100,000
        // one unit in the last place is already visible.
        let exponent = |pair: usize| narrow(to_f64(2 * pair)) / narrow(to_f64(head_dim));
        let plain: Vec<f64> = (0..head_dim / 2)
            .map(|pair| f64::from(1.0 / narrow(theta).powf(exponent(pair))))
            .collect();
        let original = optional(parameters, "original_max_position_embeddings", 1, 1 << 28)?
            .unwrap_or(context_tokens_max);
        let (frequencies, attention_scale) = match kind {
            "default" | "dynamic" => (plain, 1.0),
            "linear" => {
                let factor = factor(parameters)?;
                (plain.into_iter().map(|f| f / factor).collect(), 1.0)
            }
            "llama3" => (llama3(parameters, plain, original)?, 1.0),
            "yarn" => yarn(parameters, &plain, theta, head_dim, original)?,
            other => return Err(unknown_type(&Value::from(other))),
        };
        Ok(Self {
            inverse_frequencies: frequencies.into_iter().map(narrow).collect(),
            attention_scale: narrow(attention_scale),
        })
    }
}

/// Low frequencies slowed down by `factor`, high ones kept, those between blended.
fn llama3(parameters: &Value, plain: Vec<f64>, original: usize) -> Result<Vec<f64>, ConfigError> {
    let factor = factor(parameters)?;
    let low = positive(parameters, "low_freq_factor")?.unwrap_or(1.0);
    let high = positive(parameters, "high_freq_factor")?.unwrap_or(4.0);
    if high <= low {
        return Err(value(
            "high_freq_factor",
            &high,
            "more than low_freq_factor",
        ));
    }
    let original = to_f64(original);
    Ok(plain
        .into_iter()
        .map(|frequency| {
            let turns = original * frequency / std::f64::consts::TAU;
            let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            keep * frequency + (1.0 - keep) * frequency / factor
        })
        .collect())
}

/// YaRN: dimensions that turn often over the original context are kept, those that turn less than
/// once are slowed down by `factor`, with a linear ramp over the dimensions between.
fn yarn(
    parameters: &Value,
    plain: &[f64],
    theta: f64,
    head_dim: usize,
    original: usize,
) -> Result<(Vec<f64>, f64), ConfigError> {
    let factor = factor(parameters)?;
    let beta_fast = positive(parameters, "beta_fast")?.unwrap_or(32.0);
    let beta_slow = positive(parameters, "beta_slow")?.unwrap_or(1.0);
    let truncate = flag(parameters, "truncate")?.unwrap_or(true);
    let mscale = number(parameters, "mscale")?.filter(|&scale| scale != 0.0);
    let mscale_all = number(parameters, "mscale_all_dim")?.filter(|&scale| scale != 0.0);
    let magnitude = |scale: f64| 0.1 * scale * factor.max(1.0).ln() + 1.0;
    let attention_scale = match (
        positive(parameters, "attention_factor")?,
        mscale,
        mscale_all,
    ) {
        (Some(given), _, _) => given,
        (None, Some(numerator), Some(denominator)) => magnitude(numerator) / magnitude(denominator),
        (None, _, _) => magnitude(1.0),
    };

    let width = to_f64(head_dim);
    let dimension_of = |turns: f64| {
        width * (to_f64(original) / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
    };
    let (mut first, mut last) = (dimension_of(beta_fast), dimension_of(beta_slow));
    if truncate {
        (first, last) = (first.floor(), last.ceil());
    }
    let first = first.max(0.0);
    // A ramp of no length would divide by zero.
    let last = match last.min(width - 1.0) {
        last if last == first => last + 0.001,
        last => last,
    };
    let frequencies = plain
        .iter()
        .enumerate()
        .map(|(pair, &frequency)| {
            let slow = ((to_f64(pair) - first) / (last - first)).clamp(0.0, 1.0);
            slow * frequency / factor + (1.0 - slow) * frequency
        })
        .collect();
    Ok((frequencies, attention_scale))
}

fn factor(parameters: &Value) -> Result<f64, ConfigError> {
    positive(parameters, "factor")?.ok_or(ConfigError::Missing {
        field: "factor (of rope_scaling or rope_parameters)",
    })
}

fn positive(parameters: &Value, field: &'static str) -> Result<Option<f64>, ConfigError> {
    let found = number(parameters, field)?;
    match found {
        Some(number) if !(number.is_finite() && number > 0.0) => {
            Err(value(field, &number, "a positive number"))
        }
        _ => Ok(found),
    }
}

fn unknown_type(kind: &Value) -> ConfigError {
    value("rope_type", &kind, "default, linear, dynamic, llama3, yarn")
}

/// Exact for every dimension that passes the limits of the configuration.
#[expect(
    clippy::cast_precision_loss,
    reason = "dimensions are limited far below 2^53"
)]
const fn to_f64(n: usize) -> f64 {
    n as f64
}
