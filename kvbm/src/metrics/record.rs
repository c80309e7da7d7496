//! The names of every request in a file, one JSON object a line, as `blockplane kvbm replay` reads it.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use blockplane_protocol::TokenBlock;
use thiserror::Error;

/// Requests that may wait to be written.
const QUEUE_MAX: usize = 1024;
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

struct Request {
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
    /// `blocks`, of `block_tokens` tokens each.
    pub fn request(&self, blocks: &[TokenBlock], input_tokens: u32, block_tokens: u32) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let request = Request {
            milliseconds: since.unwrap_or_default().as_millis(),
            input_tokens,
            block_tokens,
            names: blocks.iter().map(|block| block.sequence.0).collect(),
        };
        if self.queue.try_send(request).is_err() {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Requests written, and requests dropped.
    #[must_use]
    pub fn counts(&self) -> [u64; 2] {
        let counters = &self.counters;
        [&counters.written, &counters.dropped].map(|counter| counter.load(Ordering::Relaxed))
    }
}

fn write(mut file: File, path: &Path, requests: &Receiver<Request>, counters: &Counters) {
    let (mut lines, mut count) = (String::new(), 0);
    let mut failed = false;
    loop {
        let next = requests.recv_timeout(FLUSH_EVERY);
        let ended = matches!(next, Err(RecvTimeoutError::Disconnected));
        let more = next.is_ok();
        if let Ok(request) = next {
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
    fn write(&self, line: &mut String) {
        // Writing to a string does not fail.
        let _ = write!(
            line,
            "{{\"timestamp\":{},\"input_length\":{},\"output_length\":0,\"block_tokens\":{},\"hash_ids\":[",
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
        recorder.request(prompt.blocks(), 9, 4);
        recorder.request(&[], 3, 4);
        drop(recorder);
        // The thread ends when the last recorder is gone.
        let until = Instant::now() + Duration::from_secs(10);
        let text = loop {
            let text = std::fs::read_to_string(&path).unwrap();
            if text.lines().count() == 2 {
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
    }

    #[test]
    fn a_file_that_takes_nothing_costs_nobody_anything() {
        let recorder = Recorder::start(Path::new("/dev/full")).unwrap();
        for _ in 0..100_000 {
            recorder.request(&[], 1, 1);
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
