//! Traces in Mooncake's format: when a request came, its lengths, and the ids of its 512-token
//! blocks. Equal ids mean equal text up to and including that block.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use anyhow::{Context, ensure};
use serde::Deserialize;

/// Tokens of one block of a trace.
pub(super) const BLOCK_TOKENS: u32 = 512;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct TraceLine {
    /// Milliseconds since the trace started.
    pub(super) timestamp: u64,
    pub(super) input_length: u32,
    pub(super) output_length: u32,
    pub(super) hash_ids: Vec<u64>,
}

/// Reads at most `lines_max` requests.
pub(super) fn read(path: &Path, lines_max: usize) -> anyhow::Result<Vec<TraceLine>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    parse(BufReader::new(file), lines_max).with_context(|| path.display().to_string())
}

fn parse(input: impl BufRead, lines_max: usize) -> anyhow::Result<Vec<TraceLine>> {
    let mut lines: Vec<TraceLine> = Vec::new();
    for (number, text) in (1..).zip(input.lines()) {
        let text = text?;
        if text.trim().is_empty() {
            continue;
        }
        if lines.len() == lines_max {
            break;
        }
        let line: TraceLine =
            serde_json::from_str(&text).with_context(|| format!("line {number}"))?;
        let blocks = line.input_length.div_ceil(BLOCK_TOKENS) as usize;
        ensure!(
            line.hash_ids.len() == blocks,
            "line {number}: {} hash_ids for {} tokens; expected {blocks}, one for each \
             {BLOCK_TOKENS} tokens",
            line.hash_ids.len(),
            line.input_length,
        );
        ensure!(
            lines
                .last()
                .is_none_or(|last| last.timestamp <= line.timestamp),
            "line {number}: the timestamp is before the previous one"
        );
        lines.push(line);
    }
    ensure!(!lines.is_empty(), "the trace has no request");
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}

{"timestamp": 30, "input_length": 512, "output_length": 9, "hash_ids": [0]}
"#;

    #[test]
    fn lines_are_read_up_to_the_bound() {
        let lines = parse(GOOD.as_bytes(), 10).unwrap();
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[1].timestamp, lines[1].output_length), (30, 9));
        assert_eq!(parse(GOOD.as_bytes(), 1).unwrap().len(), 1);
    }

    #[test]
    fn a_bad_line_is_named() {
        let text = format!("{GOOD}{}", GOOD.lines().next().unwrap());
        let error = parse(text.as_bytes(), 10).unwrap_err().to_string();
        assert!(error.starts_with("line 4: the timestamp"), "{error}");
        let error = parse(GOOD.replace("[0]", "[0, 7]").as_bytes(), 10).unwrap_err();
        assert!(error.to_string().contains("line 3: 2 hash_ids"), "{error}");
        let error = parse(&b"{}"[..], 10).unwrap_err();
        assert!(format!("{error:#}").contains("timestamp"), "{error:#}");
        assert!(parse(&b""[..], 10).is_err());
    }
}
