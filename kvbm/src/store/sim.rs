//! A disk in memory that tears, forgets, reorders, spoils and hangs.
//!
//! What was written is seen by reads at once. When the process is killed it stays; when the power goes,
//! each sector written since the last sync has, on its own, any of the contents that it had since
//! then.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock},
    time::Instant,
};

use blockplane_transfer::{Agent, AgentConfig, ArenaConfig, Op, Registration};
use parking_lot::{Condvar, Mutex};

use super::disk::{Disk, DiskError, DiskErrorKind, Flight, InFlight, Piece};

/// What a disk writes whole or not at all.
pub(super) const SECTOR: usize = 512;

/// Memory of all tests.
pub(super) static AGENT: LazyLock<Agent> =
    LazyLock::new(|| Agent::new(AgentConfig::new("sim")).unwrap());

/// A generator of numbers (splitmix64).
#[derive(Clone, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub(super) fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).unwrap()
    }

    pub(super) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Which write fails, counted over the life of the disk, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    pub(super) write: u64,
    pub(super) kind: DiskErrorKind,
    /// This one and all later ones.
    pub(super) for_good: bool,
}

#[derive(Debug)]
pub(super) struct State {
    bytes: Vec<u8>,
    /// Sectors as they were at the last sync, and what was written since.
    dirty: HashMap<usize, Vec<[u8; SECTOR]>>,
    random: Random,
    /// Writes so far.
    pub(super) writes: u64,
    pub(super) failure: Option<Failure>,
    /// The machine stops in the middle of this write.
    pub(super) crash: Option<u64>,
    pub(super) crashed: bool,
    /// Requests do not end as long as it is set.
    pub(super) hangs: bool,
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Kill,
    PowerLoss,
}

/// Clones are the same disk.
#[derive(Clone)]
pub(super) struct SimDisk {
    state: Arc<(Mutex<State>, Condvar)>,
}

impl SimDisk {
    pub(super) fn new(bytes: Vec<u8>, seed: u64) -> Self {
        let state = State {
            bytes,
            dirty: HashMap::new(),
            random: Random(seed),
            writes: 0,
            failure: None,
            crash: None,
            crashed: false,
            hangs: false,
        };
        Self {
            state: Arc::new((Mutex::new(state), Condvar::new())),
        }
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.0.lock());
        self.state.1.notify_all();
        result
    }

    /// What the next life finds.
    pub(super) fn after(&self, end: End) -> Vec<u8> {
        let mut state = self.state.0.lock();
        let State {
            bytes,
            dirty,
            random,
            ..
        } = &mut *state;
        let mut bytes = bytes.clone();
        if end == End::PowerLoss {
            let mut sectors: Vec<_> = dirty.iter().collect();
            sectors.sort_unstable_by_key(|(sector, _)| **sector);
            for (&sector, versions) in sectors {
                // The last one is what is in place.
                let version = random.index(versions.len() + 1);
                if let Some(version) = versions.get(version) {
                    bytes[sector * SECTOR..][..SECTOR].copy_from_slice(version);
                }
            }
        }
        bytes
    }
}

impl State {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (index, part) in bytes.chunks(SECTOR).enumerate() {
            let at = at + index * SECTOR;
            let sector = at / SECTOR;
            let mut before = [0; SECTOR];
            before.copy_from_slice(&self.bytes[sector * SECTOR..][..SECTOR]);
            self.dirty.entry(sector).or_default().push(before);
            self.bytes[at..at + part.len()].copy_from_slice(part);
        }
    }

    /// Some sectors of a write that does not end well.
    fn put_some(&mut self, at: usize, bytes: &[u8]) {
        let reordered = self.random.chance(2);
        let keep = self.random.below(101);
        for (index, part) in bytes.chunks(SECTOR).enumerate() {
            let whole = match reordered {
                true => self.random.below(100) < keep,
                false => index as u64 * 100 < keep * (bytes.len() / SECTOR) as u64,
            };
            if whole {
                self.put(at + index * SECTOR, part);
            }
        }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), DiskError> {
        let number = self.writes;
        self.writes += 1;
        if self.crash == Some(number) {
            self.put_some(at, bytes);
            self.crashed = true;
            return Err(failure(DiskErrorKind::Other));
        }
        if let Some(fails) = self.failure
            && (number == fails.write || fails.for_good && number > fails.write)
        {
            self.put_some(at, bytes);
            return Err(failure(fails.kind));
        }
        self.put(at, bytes);
        Ok(())
    }

    fn run(&mut self, op: Op, pieces: &[Piece<'_>]) -> Result<(), DiskError> {
        let mut result = Ok(());
        for piece in pieces {
            if self.crashed {
                return Err(failure(DiskErrorKind::Other));
            }
            let at = usize::try_from(piece.at).unwrap();
            let bytes = usize::try_from(piece.bytes).unwrap();
            if at + bytes > self.bytes.len() {
                return Err(failure(DiskErrorKind::Media));
            }
            match op {
                Op::Read => {
                    let from = &self.bytes[at..at + bytes];
                    piece.memory.write_at(piece.offset, from).unwrap();
                }
                Op::Write => {
                    let mut buffer = vec![0; bytes];
                    piece.memory.read_at(piece.offset, &mut buffer).unwrap();
                    // Others of the request may well get there.
                    let written = self.write(at, &buffer);
                    result = result.and(written);
                }
            }
        }
        result
    }
}

fn failure(kind: DiskErrorKind) -> DiskError {
    DiskError {
        kind,
        message: format!("injected: {kind:?}"),
    }
}

struct SimFlight {
    state: Arc<(Mutex<State>, Condvar)>,
    result: Result<(), DiskError>,
}

impl InFlight for SimFlight {
    fn wait(&mut self, until: Instant) -> Option<Result<(), DiskError>> {
        let mut state = self.state.0.lock();
        while state.hangs {
            if self.state.1.wait_until(&mut state, until).timed_out() {
                return None;
            }
        }
        Some(self.result.clone())
    }
}

impl Disk for SimDisk {
    fn start(&self, op: Op, pieces: &[Piece<'_>], _until: Instant) -> Result<Flight, DiskError> {
        let result = self.state.0.lock().run(op, pieces);
        Ok(Flight(Box::new(SimFlight {
            state: self.state.clone(),
            result,
        })))
    }

    fn sync(&self, _until: Instant) -> Result<Flight, DiskError> {
        let mut state = self.state.0.lock();
        let result = match state.crashed {
            true => Err(failure(DiskErrorKind::Other)),
            false => {
                state.dirty.clear();
                Ok(())
            }
        };
        drop(state);
        Ok(Flight(Box::new(SimFlight {
            state: self.state.clone(),
            result,
        })))
    }

    fn length(&self) -> Result<u64, DiskError> {
        Ok(self.state.0.lock().bytes.len() as u64)
    }

    fn memory(&self, bytes: usize) -> Result<Registration, DiskError> {
        let config = ArenaConfig::new(bytes, "sim");
        AGENT.allocate(config).map_err(DiskError::other)
    }
}
