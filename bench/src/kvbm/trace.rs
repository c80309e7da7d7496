//! Traffic to replay: Mooncake's traces and recordings of our own workers.
//!
//! One JSON object a line:
//!
//! ```json
//! {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}
//! ```
//!
//! `timestamp` is in milliseconds and does not go back. `hash_ids` has one id for each block of the
//! prompt, the last of which may be partly filled, or one for each full block; equal ids mean equal
//! text up to and including that block. A line may say how many tokens its blocks have
//! (`block_tokens`); otherwise the caller does, and 512 in Mooncake's traces.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead, BufReader},
    ops::Range,
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use blockplane_protocol::{BlockHash, SequenceHash, TokenBlock};
use serde::Deserialize;

/// Tokens of a block in Mooncake's traces.
pub const MOONCAKE_BLOCK_TOKENS: u32 = 512;

/// Which blocks of a prompt count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceConfig {
    /// Tokens of a block where the trace does not say it.
    pub block_tokens: u32,
    /// Whether a last block that is not full counts. A cache cannot find such a block again, so it
    /// does not by default.
    pub partial: bool,
}

/// Requests in the order in which they came.
#[derive(Clone, Debug)]
pub struct Trace {
    requests: Vec<Request>,
    blocks: Vec<TokenBlock>,
    block_tokens: u32,
    distinct: usize,
}

#[derive(Clone, Debug)]
struct Request {
    at: Duration,
    tokens: u32,
    blocks: Range<usize>,
    line: usize,
}

/// One request of a trace.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// When it came, from the first request on.
    pub at: Duration,
    /// Tokens of its prompt.
    pub tokens: u32,
    /// Names of its blocks.
    pub blocks: &'a [TokenBlock],
    /// Where it is in the file.
    pub line: usize,
}

#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u32,
    hash_ids: Vec<u64>,
    block_tokens: Option<u32>,
}

impl Default for TraceConfig {
    fn default() -> Self {
        Self {
            block_tokens: MOONCAKE_BLOCK_TOKENS,
            partial: false,
        }
    }
}

impl Trace {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, or a line is not what it should be, which is named.
    pub fn read(path: &Path, config: TraceConfig) -> anyhow::Result<Self> {
        let file = File::open(path)
            .with_context(|| format!("cannot open the trace {}", path.display()))?;
        Self::parse(BufReader::new(file), config).with_context(|| path.display().to_string())
    }

    /// Reads lines.
    ///
    /// # Errors
    /// When a line is not what it should be, which is named.
    pub fn parse(input: impl BufRead, config: TraceConfig) -> anyhow::Result<Self> {
        let mut trace = Self {
            requests: Vec::new(),
            blocks: Vec::new(),
            block_tokens: config.block_tokens,
            distinct: 0,
        };
        let mut parents: HashMap<u64, (Option<u64>, usize)> = HashMap::new();
        let mut first = None;
        for (number, text) in (1..).zip(input.lines()) {
            let text = text.with_context(|| format!("line {number}"))?;
            if text.trim().is_empty() {
                continue;
            }
            let line: Line =
                serde_json::from_str(&text).with_context(|| format!("line {number}"))?;
            let start = *first.get_or_insert(line.timestamp);
            trace
                .push(number, &line, start, config.partial, &mut parents)
                .with_context(|| format!("line {number}"))?;
        }
        ensure!(!trace.requests.is_empty(), "the trace has no request");
        trace.distinct = parents.len();
        Ok(trace)
    }

    fn push(
        &mut self,
        number: usize,
        line: &Line,
        start: u64,
        partial: bool,
        parents: &mut HashMap<u64, (Option<u64>, usize)>,
    ) -> anyhow::Result<()> {
        let block_tokens = line.block_tokens.unwrap_or(self.block_tokens);
        ensure!(block_tokens > 0, "blocks of 0 tokens");
        if self.requests.is_empty() {
            self.block_tokens = block_tokens;
        }
        ensure!(
            block_tokens == self.block_tokens,
            "blocks of {block_tokens} tokens, of {} before",
            self.block_tokens
        );
        let full = (line.input_length / block_tokens) as usize;
        let all = line.input_length.div_ceil(block_tokens) as usize;
        let given = line.hash_ids.len();
        if given != all && given != full {
            bail!(
                "{given} hash_ids for {} tokens; expected {all}, one for each {block_tokens} tokens",
                line.input_length
            );
        }
        let last = self.requests.last().map_or(Duration::ZERO, |last| last.at);
        let at = line.timestamp.checked_sub(start).map(Duration::from_millis);
        let Some(at) = at.filter(|at| *at >= last) else {
            bail!(
                "the timestamp {} is before the previous one",
                line.timestamp
            );
        };
        let ids = &line.hash_ids[..if partial { given } else { full }];
        let begin = self.blocks.len();
        let mut parent = None;
        for &id in ids {
            let (known, seen) = *parents.entry(id).or_insert((parent, number));
            if known != parent {
                let show =
                    |id: Option<u64>| id.map_or_else(|| "nothing".to_owned(), |id| id.to_string());
                bail!(
                    "block {id} follows {} here and {} in line {seen}: equal ids must mean equal \
                     text up to that block",
                    show(parent),
                    show(known)
                );
            }
            let before = parent.and_then(|_| self.blocks.last());
            let block = name(id, before.map(|before| before.sequence));
            parent = Some(id);
            self.blocks.push(block);
        }
        self.requests.push(Request {
            at,
            tokens: line.input_length,
            blocks: begin..self.blocks.len(),
            line: number,
        });
        Ok(())
    }

    /// The requests.
    pub fn requests(&self) -> impl ExactSizeIterator<Item = Asked<'_>> {
        (0..self.requests.len()).map(|i| self.request(i))
    }

    /// The request with this number, from 0.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn request(&self, number: usize) -> Asked<'_> {
        let request = &self.requests[number];
        Asked {
            at: request.at,
            tokens: request.tokens,
            blocks: &self.blocks[request.blocks.clone()],
            line: request.line,
        }
    }

    /// Blocks asked for, each as often as it is.
    #[must_use]
    pub const fn block_refs(&self) -> usize {
        self.blocks.len()
    }

    /// Different blocks.
    #[must_use]
    pub const fn distinct(&self) -> usize {
        self.distinct
    }

    /// Tokens of a block.
    #[must_use]
    pub const fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// From the first request to the last.
    #[must_use]
    pub fn span(&self) -> Duration {
        self.requests.last().map_or(Duration::ZERO, |last| last.at)
    }

    /// Tokens of all prompts.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.requests.iter().map(|r| u64::from(r.tokens)).sum()
    }
}

/// Names a block by its id and what it follows, as tokens do. Ids are small numbers, hashes are
/// spread evenly, and so must these be.
fn name(id: u64, parent: Option<SequenceHash>) -> TokenBlock {
    // SplitMix64's finalizer: one to one.
    let mut mixed = id.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let block = BlockHash(mixed ^ (mixed >> 31));
    TokenBlock {
        block,
        sequence: SequenceHash::extend(parent, block),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"timestamp": 50, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}

{"timestamp": 80, "input_length": 1024, "hash_ids": [7, 10]}
"#;

    fn parse(text: &str, partial: bool) -> anyhow::Result<Trace> {
        let config = TraceConfig {
            partial,
            ..TraceConfig::default()
        };
        Trace::parse(text.as_bytes(), config)
    }

    #[test]
    fn requests_are_read() {
        let trace = parse(GOOD, false).unwrap();
        assert_eq!((trace.block_refs(), trace.distinct()), (4, 3));
        let asked: Vec<_> = trace.requests().collect();
        assert_eq!((asked[0].blocks.len(), asked[1].blocks.len()), (2, 2));
        assert_eq!(asked[0].blocks[0], asked[1].blocks[0]);
        assert_ne!(asked[0].blocks[1], asked[1].blocks[1]);
        assert_eq!((asked[1].at, asked[1].line), (Duration::from_millis(30), 3));
        assert_eq!(trace.tokens(), 2_124);
        assert_eq!(parse(GOOD, true).unwrap().block_refs(), 5);
    }

    #[test]
    fn a_recording_says_its_block_size_and_may_leave_the_last_block_out() {
        let line =
            r#"{"timestamp": 1, "input_length": 40, "hash_ids": [1, 2], "block_tokens": 16}"#;
        let trace = parse(line, false).unwrap();
        assert_eq!((trace.block_tokens(), trace.block_refs()), (16, 2));
        let mixed = format!("{line}\n{}", line.replace("16}", "20}"));
        let error = format!("{:#}", parse(&mixed, false).unwrap_err());
        assert!(
            error.contains("line 2: blocks of 20 tokens, of 16"),
            "{error}"
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        for (from, to, expected) in [
            (
                "\"timestamp\": 80",
                "\"timestamp\": 20",
                "line 3: the timestamp 20",
            ),
            (
                "[7, 10]",
                "[7]",
                "line 3: 1 hash_ids for 1024 tokens; expected 2",
            ),
            (
                "[7, 10]",
                "[8, 10]",
                "line 3: block 8 follows nothing here and 7 in line 1",
            ),
            ("[7, 10]", "[7, -1]", "line 3: invalid value"),
            (
                "\"input_length\": 1024, ",
                "",
                "line 3: missing field `input_length`",
            ),
            ("}\n\n", "\n\n", "line 1: EOF"),
        ] {
            let error = format!("{:#}", parse(&GOOD.replace(from, to), false).unwrap_err());
            assert!(error.starts_with(expected), "{error}");
        }
        let error = parse("\n", false).unwrap_err().to_string();
        assert!(error.contains("no request"), "{error}");
    }
}
