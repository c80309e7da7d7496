//! What is sent when.

use std::{sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    ServeArgs,
    prompt::{Calibration, whole, words},
    trace::{self, BLOCK_TOKENS, TraceLine},
};

/// Requests by number. Everything follows from the seed.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    calibration: Calibration,
    seed: u64,
    source: Source,
    /// When each request starts; absent in a closed loop.
    arrivals: Option<Arc<[Duration]>>,
    requests: usize,
}

#[derive(Clone, Debug)]
enum Source {
    Synthetic {
        input_tokens: u32,
        output_tokens: u32,
        prefix_tokens: u32,
        prefixes: u64,
    },
    Trace {
        lines: Arc<[TraceLine]>,
        scale: f64,
    },
}

impl Workload {
    pub(super) fn new(args: &ServeArgs, calibration: Calibration) -> anyhow::Result<Self> {
        let (source, arrivals) = if let Some(path) = &args.trace {
            let lines = trace::read(path, args.requests)?;
            let start = lines[0].timestamp;
            let arrivals = lines
                .iter()
                .map(|line| Duration::from_millis(line.timestamp - start).div_f64(args.trace_speed))
                .collect();
            let source = Source::Trace {
                lines: lines.into(),
                scale: args.trace_scale,
            };
            (source, Some(arrivals))
        } else {
            let source = Source::Synthetic {
                input_tokens: args.input_tokens,
                output_tokens: args.output_tokens,
                prefix_tokens: args.shared_prefix_tokens,
                prefixes: u64::from(args.prefixes),
            };
            let arrivals = args
                .rate
                .map(|rate| poisson(args.seed, rate, args.requests).into());
            (source, arrivals)
        };
        let requests = match &source {
            Source::Synthetic { .. } => args.requests,
            Source::Trace { lines, .. } => lines.len(),
        };
        Ok(Self {
            calibration,
            seed: args.seed,
            source,
            arrivals,
            requests,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.requests
    }

    /// When each request starts; absent in a closed loop.
    pub(super) fn arrivals(&self) -> Option<Arc<[Duration]>> {
        self.arrivals.clone()
    }

    /// Prompt and output tokens of a request. Numbers past the end are warm-up requests, whose
    /// prompts share nothing with the others.
    pub(super) fn request(&self, number: usize) -> (String, u32) {
        match &self.source {
            Source::Synthetic {
                input_tokens,
                output_tokens,
                prefix_tokens,
                prefixes,
            } => {
                let number = number as u64;
                let total = f64::from(*input_tokens) - self.calibration.tokens_fixed;
                let total = self.calibration.words(total);
                let shared = if *prefix_tokens == 0 || number >= self.requests as u64 {
                    0
                } else {
                    let shared = self.calibration.words(f64::from(*prefix_tokens));
                    shared.min(total)
                };
                let mut text = words(self.seed, PREFIX_KEYS + number % prefixes, shared);
                text.push_str(&words(self.seed, number, total - shared));
                (text, *output_tokens)
            }
            Source::Trace { lines, scale } => {
                let Some(line) = lines.get(number) else {
                    let text = words(self.seed, number as u64, self.calibration.words(64.0));
                    return (text, 8);
                };
                let mut text = String::new();
                let mut left = line.input_length;
                for &id in &line.hash_ids {
                    let tokens = left.min(BLOCK_TOKENS);
                    left -= tokens;
                    let count = self.calibration.words(f64::from(tokens) * scale);
                    text.push_str(&words(self.seed, PREFIX_KEYS + id, count));
                }
                (text, whole(f64::from(line.output_length) * scale))
            }
        }
    }
}

/// Keys of shared text, apart from those of single requests.
const PREFIX_KEYS: u64 = 1 << 40;

/// Arrival times with exponential gaps.
fn poisson(seed: u64, rate: f64, requests: usize) -> Vec<Duration> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut at = 0.0;
    (0..requests)
        .map(|_| {
            let uniform: f64 = rng.random();
            at += -(1.0 - uniform).ln() / rate;
            Duration::from_secs_f64(at)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: ServeArgs,
    }

    fn workload(line: &str) -> Workload {
        let args = Cli::parse_from(std::iter::once("serve").chain(line.split_whitespace())).args;
        Workload::new(&args, Calibration::default()).unwrap()
    }

    #[test]
    fn prompts_share_their_prefix_by_group() {
        let workload =
            workload("--input-tokens 100 --shared-prefix-tokens 60 --prefixes 2 --requests 8");
        let prompts: Vec<Vec<String>> = (0..8)
            .map(|i| {
                let (text, _) = workload.request(i);
                text.split_whitespace().map(str::to_owned).collect()
            })
            .collect();
        assert!(prompts.iter().all(|prompt| prompt.len() == 100));
        assert_eq!(prompts[0][..60], prompts[2][..60]);
        assert_ne!(prompts[0][..60], prompts[1][..60]);
        assert_ne!(prompts[0][60..], prompts[2][60..]);
        assert_eq!(workload.request(3), workload.request(3));
    }

    #[test]
    fn arrivals_are_repeatable_and_of_the_wanted_rate() {
        let arrivals = poisson(7, 50.0, 10_000);
        assert_eq!(arrivals, poisson(7, 50.0, 10_000));
        assert!(arrivals.is_sorted());
        let seconds = arrivals.last().unwrap().as_secs_f64();
        assert!((seconds - 200.0).abs() < 10.0, "{seconds}");
    }

    #[test]
    fn a_trace_keeps_times_lengths_and_shared_blocks() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(
            file,
            r#"{{"timestamp": 100, "input_length": 1000, "output_length": 40, "hash_ids": [0, 1]}}"#
        )
        .unwrap();
        writeln!(
            file,
            r#"{{"timestamp": 2100, "input_length": 1024, "output_length": 1, "hash_ids": [0, 5]}}"#
        )
        .unwrap();
        let path = file.path().display();
        let workload = workload(&format!(
            "--trace {path} --trace-speed 2 --trace-scale 0.25"
        ));
        let arrivals = workload.arrivals().unwrap();
        assert_eq!(*arrivals, [Duration::ZERO, Duration::from_secs(1)]);
        let (first, output) = workload.request(0);
        let (second, _) = workload.request(1);
        let words =
            |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
        assert_eq!((words(&first).len(), output), (250, 10));
        assert_eq!(words(&second).len(), 256);
        assert_eq!(words(&first)[..128], words(&second)[..128]);
        assert_ne!(words(&first)[128..], words(&second)[128..250]);
    }
}
