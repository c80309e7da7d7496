//! The names of every request in a file, one JSON object a line, as `blockplane kvbm replay` reads it.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use blockplane_protocol::TokenBlock;
use thiserror::Error;

/// Requests that may wait to be written.
const QUEUE_MAX: usize = 1024;
/// Requests that may run while later ones wait for their line; the oldest is written without its
/// output then.
const RUNNING_MAX: usize = 4096;
/// Output of a request that runs.
const RUNS: u32 = u32::MAX;
/// Bytes that are written at once.
const LINES_BYTES: usize = 64 << 10;
/// Time without a request after which what was written is given to the system.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// Why nothing can be recorded.
#[derive(Debug, Error)]
#[error(
    "the record {path} cannot be written: {source}; set DYN_KVBM_RECORD_PATH, to a file for each worker"
)]
pub struct RecordError {
    path: PathBuf,
    source: io::Error,
}

/// Appends requests to a file on a thread of its own. Recording never waits: what the file is too
/// slow for is dropped and counted. The file is readable by its owner only: names are hashes of
/// prompts.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: SyncSender<Request>,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    written: AtomicU64,
    dropped: AtomicU64,
}

/// A request that is recorded when it ends: when this is dropped, at the latest.
#[derive(Debug)]
#[must_use = "dropping it ends the request without output"]
pub struct Recording {
    output_tokens: Arc<AtomicU32>,
}

struct Request {
    output_tokens: Arc<AtomicU32>,
    milliseconds: u128,
    input_tokens: u32,
    block_tokens: u32,
    names: Vec<u64>,
}

impl Recorder {
    /// Opens the file, to append to it.
    ///
    /// # Errors
    /// It cannot be opened, or a thread cannot be had.
    pub fn start(path: &Path) -> Result<Self, RecordError> {
        let error = |source| RecordError {
            path: path.to_owned(),
            source,
        };
        let mut options = OpenOptions::new();
        let file = options
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(error)?;
        // Lines of two workers in one file would not be in the order of their times.
        file.try_lock().map_err(|refused| error(refused.into()))?;
        let (queue, requests) = sync_channel(QUEUE_MAX);
        let counters = Arc::new(Counters::default());
        let counted = Arc::clone(&counters);
        let shown = path.to_owned();
        std::thread::Builder::new()
            .name("kvbm-record".to_owned())
            .spawn(move || write(file, &shown, &requests, &counted))
            .map_err(error)?;
        Ok(Self { queue, counters })
    }

    /// Notes a request for a prompt of `input_tokens` tokens that begins with the full blocks
    /// `blocks`, of `block_tokens` tokens each. Lines are in the order of these calls, each once its
    /// request and those before it have ended.
    pub fn request(
        &self,
        blocks: &[TokenBlock],
        input_tokens: u32,
        block_tokens: u32,
    ) -> Recording {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let output_tokens = Arc::new(AtomicU32::new(RUNS));
        let request = Request {
            output_tokens: Arc::clone(&output_tokens),
            milliseconds: since.unwrap_or_default().as_millis(),
            input_tokens,
            block_tokens,
            names: blocks.iter().map(|block| block.sequence.0).collect(),
        };
        if self.queue.try_send(request).is_err() {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Recording { output_tokens }
    }

    /// Requests written, and requests dropped.
    #[must_use]
    pub fn counts(&self) -> [u64; 2] {
        let counters = &self.counters;
        [&counters.written, &counters.dropped].map(|counter| counter.load(Ordering::Relaxed))
    }
}

impl Recording {
    /// The request has ended, after so many tokens.
    pub fn finish(self, output_tokens: u32) {
        let tokens = output_tokens.min(RUNS - 1);
        self.output_tokens.store(tokens, Ordering::Relaxed);
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // Nothing to do if it has been finished.
        let order = Ordering::Relaxed;
        let _ = self.output_tokens.compare_exchange(RUNS, 0, order, order);
    }
}

fn write(mut file: File, path: &Path, requests: &Receiver<Request>, counters: &Counters) {
    let (mut lines, mut count) = (String::new(), 0);
    let mut running: VecDeque<Request> = VecDeque::new();
    let mut failed = false;
    loop {
        let next = requests.recv_timeout(FLUSH_EVERY);
        let ended = matches!(next, Err(RecvTimeoutError::Disconnected));
        let more = next.is_ok();
        running.extend(next);
        while let Some(first) = running.front()
            && (ended || !first.runs() || running.len() > RUNNING_MAX)
            && let Some(request) = running.pop_front()
        {
            request.write(&mut lines);
            count += 1;
        }
        if count == 0 || (more && lines.len() < LINES_BYTES) {
            if ended {
                return;
            }
            continue;
        }
        // Whole lines, so that a reader and a worker that is killed see no halves.
        match file.write_all(lines.as_bytes()) {
            Ok(()) => counters.written.fetch_add(count, Ordering::Relaxed),
            Err(error) => {
                if !failed {
                    tracing::warn!(path = %path.display(), %error, "requests are not recorded");
                    failed = true;
                }
                counters.dropped.fetch_add(count, Ordering::Relaxed)
            }
        };
        lines.clear();
        count = 0;
        if ended {
            return;
        }
    }
}

impl Request {
    fn runs(&self) -> bool {
        self.output_tokens.load(Ordering::Relaxed) == RUNS
    }

    fn write(&self, line: &mut String) {
        let output = match self.output_tokens.load(Ordering::Relaxed) {
            RUNS => 0,
            tokens => tokens,
        };
        // Writing to a string does not fail.
        let _ = write!(
            line,
            "{{\"timestamp\":{},\"input_length\":{},\"output_length\":{output},\"block_tokens\":{},\"hash_ids\":[",
            self.milliseconds, self.input_tokens, self.block_tokens
        );
        for (index, name) in self.names.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(line, "{comma}{name}");
        }
        line.push_str("]}\n");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use blockplane_protocol::{SaltHash, TokenSequence};

    use super::*;

    #[test]
    fn requests_are_lines_that_a_replay_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.jsonl");
        let prompt =
            TokenSequence::from_tokens(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 4, SaltHash::default());
        let recorder = Recorder::start(&path).unwrap();
        let first = recorder.request(prompt.blocks(), 9, 4);
        let second = recorder.request(&[], 3, 4);
        let lost = recorder.request(&[], 1, 4);
        // Ends before the one that came before it.
        second.finish(20);
        drop(lost);
        first.finish(7);
        drop(recorder);
        // The thread ends when the last recorder is gone.
        let until = Instant::now() + Duration::from_secs(10);
        let text = loop {
            let text = std::fs::read_to_string(&path).unwrap();
            if text.lines().count() == 3 {
                break text;
            }
            assert!(Instant::now() < until, "{text}");
            std::thread::yield_now();
        };
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let names: Vec<u64> = prompt
            .blocks()
            .iter()
            .map(|block| block.sequence.0)
            .collect();
        assert_eq!(lines[0]["hash_ids"], serde_json::json!(names));
        assert_eq!(lines[0]["input_length"], 9);
        assert_eq!(lines[0]["block_tokens"], 4);
        assert!(lines[0]["timestamp"].as_u64() <= lines[1]["timestamp"].as_u64());
        assert_eq!(lines[1]["hash_ids"], serde_json::json!([]));
        let outputs: Vec<_> = lines.iter().map(|line| &line["output_length"]).collect();
        assert_eq!(outputs, [7, 20, 0]);
    }

    #[test]
    fn a_request_that_does_not_end_holds_up_so_many_others_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.jsonl");
        let recorder = Recorder::start(&path).unwrap();
        let long = recorder.request(&[], 1, 4);
        recorder.request(&[], 2, 4).finish(2);
        let until = Instant::now() + Duration::from_secs(20);
        let written = || recorder.counts()[0];
        let mut sent = 2;
        while written() == 0 {
            let before = sent;
            recorder.request(&[], 2, 4).finish(2);
            sent += 1;
            if sent > RUNNING_MAX as u64 + 1 {
                std::thread::yield_now();
            }
            assert!(Instant::now() < until, "{before} sent, none written");
        }
        assert!(sent > RUNNING_MAX as u64, "{sent}");
        long.finish(9);
        let text = std::fs::read_to_string(&path).unwrap();
        let first = text.lines().next().unwrap();
        assert!(first.contains("\"output_length\":0"), "{first}");
    }

    #[test]
    fn a_file_that_takes_nothing_costs_nobody_anything() {
        let recorder = Recorder::start(Path::new("/dev/full")).unwrap();
        for _ in 0..100_000 {
            recorder.request(&[], 1, 1).finish(1);
        }
        let until = Instant::now() + Duration::from_secs(10);
        while recorder.counts()[1] == 0 {
            assert!(Instant::now() < until, "{:?}", recorder.counts());
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_record_that_cannot_be_opened_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.jsonl");
        let _first = Recorder::start(&path).unwrap();
        let error = Recorder::start(&path).unwrap_err().to_string();
        assert!(error.contains("DYN_KVBM_RECORD_PATH"), "{error}");
        let error = Recorder::start(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }
}
