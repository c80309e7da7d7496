//! Lookups from the scheduler's process in that of the worker, through a Unix socket.

use std::{
    collections::HashMap,
    fmt, io,
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use thiserror::Error;

use super::{
    codec::{ANSWER_MAX, NAMES_MAX, REQUEST_MAX, decode, decode_answer, encode, encode_answer},
    codec::{receive, send},
    rank::{ExternalRank, Lookup, LookupRequest},
};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 16;
/// An answer that nobody takes for so long ends the connection.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Why there is no answer. It counts as nothing found.
#[derive(Debug, Error)]
pub enum LookupError {
    /// The question is too long.
    #[error("a lookup of {names} blocks; at most {NAMES_MAX} are accepted")]
    TooLong {
        /// How many were asked for.
        names: usize,
    },
    /// The worker is not reached, or says nothing in time.
    #[error("the KV tiers at {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Answers lookups at a socket until it is dropped. Who may open the socket may ask: it belongs in a
/// folder of this user alone.
#[derive(Debug)]
pub struct LookupServer {
    path: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared(Mutex<Connections>);

#[derive(Debug, Default)]
struct Connections {
    open: HashMap<u64, UnixStream>,
    next: u64,
    stopped: bool,
}

/// Asks a [`LookupServer`].
pub struct LookupClient {
    path: PathBuf,
    stream: Mutex<Option<UnixStream>>,
}

impl LookupServer {
    /// Answers for `rank` at `path`, where nothing is yet.
    ///
    /// # Errors
    /// The socket cannot be made, or a thread cannot be had.
    pub fn start(path: &Path, rank: ExternalRank) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let server = Self {
            path: path.to_owned(),
            shared: Arc::default(),
        };
        let shared = Arc::clone(&server.shared);
        thread::Builder::new()
            .name("kvbm-lookups".to_owned())
            .spawn(move || shared.accept(&listener, &rank))?;
        Ok(server)
    }

    /// Where it answers.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &UnixListener, rank: &ExternalRank) {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Too many files: the client tries again.
                continue;
            };
            let Some(key) = self.admit(&stream) else {
                if self.0.lock().stopped {
                    return;
                }
                continue;
            };
            let (shared, rank) = (Arc::clone(self), rank.clone());
            let name = "kvbm-lookup".to_owned();
            let spawned = thread::Builder::new().name(name).spawn(move || {
                if let Err(error) = answer(&stream, &rank) {
                    tracing::debug!(%error, "a client of the KV tiers is not answered any more");
                }
                shared.0.lock().open.remove(&key);
            });
            if spawned.is_err() {
                self.0.lock().open.remove(&key);
            }
        }
    }

    /// Its number, if there is room for it.
    fn admit(&self, stream: &UnixStream) -> Option<u64> {
        let mut connections = self.0.lock();
        if connections.stopped || connections.open.len() >= CONNECTIONS_MAX {
            return None;
        }
        let copy = stream.try_clone().ok()?;
        let key = connections.next;
        connections.next += 1;
        connections.open.insert(key, copy);
        Some(key)
    }
}

fn answer(stream: &UnixStream, rank: &ExternalRank) -> io::Result<()> {
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    while let Some(message) = receive(stream, REQUEST_MAX)? {
        let request = decode(&message)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a lookup"))?;
        send(stream, &encode_answer(&rank.lookup(&request)))?;
    }
    Ok(())
}

impl Drop for LookupServer {
    fn drop(&mut self) {
        let mut connections = self.shared.0.lock();
        connections.stopped = true;
        for stream in connections.open.values() {
            // It may be gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(connections);
        // Wakes the thread that accepts.
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
    }
}

impl LookupClient {
    /// Asks the server at `path`; connects when it is first asked, and again after an error.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            stream: Mutex::new(None),
        }
    }

    /// The longest run of the names that is below G1, held as [`ExternalRank::lookup`] says.
    ///
    /// # Errors
    /// The worker does not answer within `timeout`: nothing is found, and nothing is held for long.
    pub fn lookup(
        &self,
        request: &LookupRequest,
        timeout: Duration,
    ) -> Result<Lookup, LookupError> {
        let names = request.names.len();
        if names > NAMES_MAX {
            return Err(LookupError::TooLong { names });
        }
        let mut place = self.stream.lock();
        let asked = match place.take() {
            Some(stream) => Ok(stream),
            None => UnixStream::connect(&self.path),
        };
        let asked = asked.and_then(|stream| {
            let answer = ask(&stream, request, timeout)?;
            Ok((stream, answer))
        });
        match asked {
            Ok((stream, answer)) => {
                *place = Some(stream);
                Ok(answer)
            }
            Err(source) => Err(LookupError::Io {
                path: self.path.clone(),
                source,
            }),
        }
    }
}

fn ask(stream: &UnixStream, request: &LookupRequest, timeout: Duration) -> io::Result<Lookup> {
    // None would be no limit.
    let time = Some(timeout.max(Duration::from_millis(1)));
    stream.set_read_timeout(time)?;
    stream.set_write_timeout(time)?;
    send(stream, &encode(request))?;
    let answer = receive(stream, ANSWER_MAX)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    decode_answer(&answer)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an answer to a lookup"))
}

impl fmt::Debug for LookupClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LookupClient")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}
