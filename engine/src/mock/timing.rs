//! How long a step of a pretended model takes.

use std::time::Duration;

use crate::error::StartError;

const STEP_SECONDS_MAX: f64 = 86_400.0;

/// Speed of a [`MockEngine`](super::MockEngine). The defaults are those of a small model on one
/// accelerator; set them from measurements of what is to be imitated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MockTiming {
    /// Prompt tokens computed per second. Default 20,000.
    pub prefill_tokens_per_second: f64,
    /// Tokens per second of one sequence that decodes alone. Default 100.
    pub decode_tokens_per_second: f64,
    /// What each further decoding sequence adds to a step. Default 100 us.
    pub decode_sequence: Duration,
    /// What each step takes in addition. Default 200 us.
    pub step_overhead: Duration,
    /// All of this happens so many times faster. Infinity waits for nothing. Steps below about
    /// 0.1 ms are not timed exactly. Default 1.
    pub speed_up: f64,
}

impl MockTiming {
    /// A mock that waits for nothing.
    #[must_use]
    pub fn instant() -> Self {
        Self {
            speed_up: f64::INFINITY,
            ..Self::default()
        }
    }

    /// Time of a step that computes so many tokens of prompts and so many sequences' next tokens; a
    /// day at most.
    #[must_use]
    pub fn step_time(&self, prefill_tokens: u32, decode_sequences: u32) -> Duration {
        let mut seconds = self.step_overhead.as_secs_f64();
        seconds += f64::from(prefill_tokens) / self.prefill_tokens_per_second;
        if let Some(further) = decode_sequences.checked_sub(1) {
            seconds += 1.0 / self.decode_tokens_per_second;
            seconds += f64::from(further) * self.decode_sequence.as_secs_f64();
        }
        Duration::from_secs_f64((seconds / self.speed_up).min(STEP_SECONDS_MAX))
    }

    pub(super) fn validate(&self) -> Result<(), StartError> {
        for (name, value) in [
            ("prefill_tokens_per_second", self.prefill_tokens_per_second),
            ("decode_tokens_per_second", self.decode_tokens_per_second),
            ("speed_up", self.speed_up),
        ] {
            if value.is_nan() || value <= 0.0 {
                return Err(StartError::Config {
                    name,
                    value: value.to_string(),
                    accepted: "more than 0".to_owned(),
                });
            }
        }
        Ok(())
    }
}

impl Default for MockTiming {
    fn default() -> Self {
        Self {
            prefill_tokens_per_second: 20_000.0,
            decode_tokens_per_second: 100.0,
            decode_sequence: Duration::from_micros(100),
            step_overhead: Duration::from_micros(200),
            speed_up: 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_what_its_parts_take() {
        let timing = MockTiming {
            prefill_tokens_per_second: 1_000.0,
            decode_tokens_per_second: 50.0,
            decode_sequence: Duration::from_millis(1),
            step_overhead: Duration::from_millis(3),
            speed_up: 1.0,
        };
        let ms = |prefill, decode| timing.step_time(prefill, decode).as_millis();
        assert_eq!(ms(0, 1), 23);
        assert_eq!(ms(0, 5), 27);
        assert_eq!(ms(100, 0), 103);
        assert_eq!(ms(100, 2), 124);
        let faster = MockTiming {
            speed_up: 10.0,
            ..timing
        };
        assert_eq!(faster.step_time(100, 2), Duration::from_micros(12_400));
        let stopped = MockTiming {
            speed_up: f64::MIN_POSITIVE,
            ..timing
        };
        assert_eq!(stopped.step_time(1, 0), Duration::from_secs(86_400));
        assert_eq!(MockTiming::instant().step_time(u32::MAX, 9), Duration::ZERO);
    }

    #[test]
    fn speeds_must_be_positive() {
        assert!(MockTiming::instant().validate().is_ok());
        for wrong in [0.0, -1.0, f64::NAN] {
            let timing = MockTiming {
                speed_up: wrong,
                ..MockTiming::default()
            };
            let error = timing.validate().unwrap_err().to_string();
            assert!(error.contains("speed_up"), "{error}");
        }
    }
}
