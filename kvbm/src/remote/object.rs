//! The object tier: write-once objects, verified reads.

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use blockplane_protocol::SequenceHash;
use blockplane_transfer::{
    AccessError, Agent, ArenaConfig, BlockLayout, LocalBlocks, ObjectBlocks, ObjectStore, Op,
    PostOptions, RegisterError, Registration, RemoteAccess, StorageError, StorageErrorKind,
    Transfer, TransferError,
};
use parking_lot::{Condvar, Mutex};
use thiserror::Error;

use super::{
    format::{HEADER, Header, folder, key, name_of, payload_hasher},
    names::Names,
    slots::Slots,
};
use crate::{
    arena::KvArena,
    fingerprint::Fingerprint,
    tier::{BlockOutcome, Invalid, MoveKind, MoveReport, MoveSpec, MovedBlock, Mover, RemoteIndex},
};

/// Longest time that is spent on deleting one bad object.
const DELETE_TIME: Duration = Duration::from_secs(2);

/// How an object tier behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectTierConfig {
    /// Names of objects kept in memory, at most; the oldest is forgotten first. Default 1,000,000.
    /// Cost: about 50 bytes each. 0 turns the tier into one that only writes.
    pub names_max: usize,
    /// Objects that can be under way at a time. Default 16. Cost: 128 bytes and a block of memory
    /// each.
    pub bounce_blocks: u32,
    /// How often the store is asked which objects it has, beside once at the start. Default 60 s; none
    /// for never again. Cost: with S3 one request for 1,000 names.
    pub list_every: Option<Duration>,
    /// Longest time for one listing. Default 30 s.
    pub list_time: Duration,
}

impl Default for ObjectTierConfig {
    fn default() -> Self {
        Self {
            names_max: 1_000_000,
            bounce_blocks: 16,
            list_every: Some(Duration::from_secs(60)),
            list_time: Duration::from_secs(30),
        }
    }
}

/// Why an object tier could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ObjectTierError {
    /// A setting is out of range.
    #[error("{field} is {got}; accepted: {accepted}")]
    InvalidConfig {
        /// The setting.
        field: &'static str,
        /// Its value.
        got: String,
        /// What is accepted.
        accepted: &'static str,
    },
    /// The bounce memory could not be had.
    #[error("{bytes} bytes of bounce memory for objects: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// What is wrong.
        source: Box<RegisterError>,
    },
    /// The thread that lists the store could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// What an object tier did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectStats {
    /// Objects written.
    pub written: u64,
    /// Writes of objects that existed already: nothing was written.
    pub existed: u64,
    /// Blocks read and verified.
    pub read: u64,
    /// Objects that were not what their key says: deleted, as far as the store allows.
    pub invalid: u64,
    /// Reads of objects that the store does not have (any more).
    pub missing: u64,
    /// Blocks that were not moved for another reason, such as a deadline.
    pub failed: u64,
    /// Listings of the store that succeeded.
    pub listings: u64,
    /// Listings that failed.
    pub failed_listings: u64,
    /// Names known now.
    pub names: u64,
}

#[derive(Debug, Default)]
struct Counters {
    written: AtomicU64,
    existed: AtomicU64,
    read: AtomicU64,
    invalid: AtomicU64,
    missing: AtomicU64,
    failed: AtomicU64,
    listings: AtomicU64,
    failed_listings: AtomicU64,
}

/// G4 in an object store: moves blocks between it and G2, and knows what is there.
///
/// An object is written once and never changed; writing one that exists succeeds. What is read is
/// checked against a checksum that is bound to the name of the block and to the [`Fingerprint`]; an
/// object that does not pass is deleted and is a miss.
///
/// Bytes pass through bounce memory: a store that does not answer never keeps a block of G2 busy
/// beyond the deadline of its move.
pub struct ObjectTier {
    agent: Agent,
    store: ObjectStore,
    host: Arc<KvArena>,
    fingerprint: Fingerprint,
    folder: String,
    config: ObjectTierConfig,
    bounce: Registration,
    bounce_layout: BlockLayout,
    slots: Slots,
    names: Mutex<Names>,
    listing: Mutex<()>,
    counters: Counters,
    stop: Arc<Stop>,
}

#[derive(Debug, Default)]
struct Stop {
    stopped: Mutex<bool>,
    changed: Condvar,
}

/// An object under way: block of the move, bounce slot, transfer.
struct Flying {
    index: usize,
    slot: u32,
    transfer: Transfer,
}

impl ObjectTier {
    /// Opens the tier over the blocks of `host` (G2). The names in `store` are learned by a thread of
    /// its own, so this waits for nobody; until then there are no hits.
    ///
    /// `store` is one of `agent`, as is `host`.
    ///
    /// # Errors
    /// A setting makes no sense, or memory or a thread cannot be had.
    pub fn open(
        agent: &Agent,
        store: ObjectStore,
        host: Arc<KvArena>,
        fingerprint: Fingerprint,
        config: ObjectTierConfig,
    ) -> Result<Arc<Self>, ObjectTierError> {
        let invalid = |field, got: String, accepted| ObjectTierError::InvalidConfig {
            field,
            got,
            accepted,
        };
        if !(1..=4096).contains(&config.bounce_blocks) {
            let got = config.bounce_blocks.to_string();
            return Err(invalid("bounce_blocks", got, "1 to 4096"));
        }
        if config.list_every.is_some_and(|every| every.is_zero()) {
            return Err(invalid(
                "list_every",
                "0".to_owned(),
                "more than 0, or none",
            ));
        }
        if config.list_time.is_zero() {
            return Err(invalid("list_time", "0".to_owned(), "more than 0"));
        }
        let slot_bytes = HEADER as u64 + block_bytes(&host.transfer_layout());
        let bounce_layout = BlockLayout::contiguous(config.bounce_blocks, slot_bytes);
        let bytes = usize::try_from(slot_bytes)
            .ok()
            .and_then(|bytes| bytes.checked_mul(config.bounce_blocks as usize));
        let bytes = bytes
            .ok_or_else(|| invalid("bounce_blocks", config.bounce_blocks.to_string(), "less"))?;
        let bounce = agent
            .allocate(ArenaConfig::new(bytes, "kvbm objects").with_access(RemoteAccess::None))
            .map_err(|source| ObjectTierError::Memory {
                bytes,
                source: Box::new(source),
            })?;
        let tier = Arc::new(Self {
            agent: agent.clone(),
            store,
            host,
            folder: folder(&fingerprint),
            fingerprint,
            config,
            bounce,
            bounce_layout,
            slots: Slots::new(config.bounce_blocks),
            names: Mutex::new(Names::new(config.names_max)),
            listing: Mutex::default(),
            counters: Counters::default(),
            stop: Arc::default(),
        });
        let (weak, stop) = (Arc::downgrade(&tier), Arc::clone(&tier.stop));
        thread::Builder::new()
            .name("kvbm-objects".to_owned())
            .spawn(move || keep_listing(&weak, &stop, config.list_every))
            .map_err(ObjectTierError::Thread)?;
        Ok(tier)
    }

    /// Learns which objects the store has; how many of them are blocks of this fingerprint.
    ///
    /// # Errors
    /// The store refuses or does not answer within `list_time`. What was known stays.
    pub fn refresh(&self) -> Result<usize, StorageError> {
        // One at a time: the books remember what happens during one.
        let _listing = self.listing.lock();
        let since = self.names.lock().begin();
        let ObjectTierConfig {
            names_max,
            list_time,
            ..
        } = self.config;
        let listed = self.store.list(Some(&self.folder), names_max, list_time);
        let listed = listed.inspect_err(|_| {
            self.names.lock().listed(&HashSet::new(), since, false);
            count(&self.counters.failed_listings);
        })?;
        let bytes = self.bounce_layout.run_bytes;
        let named = listed.objects.iter().filter(|(_, length)| *length == bytes);
        let named: HashSet<SequenceHash> = named
            .filter_map(|(key, _)| name_of(&self.folder, key))
            .collect();
        self.names.lock().listed(&named, since, listed.complete);
        count(&self.counters.listings);
        Ok(named.len())
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> ObjectStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        ObjectStats {
            written: of(&counters.written),
            existed: of(&counters.existed),
            read: of(&counters.read),
            invalid: of(&counters.invalid),
            missing: of(&counters.missing),
            failed: of(&counters.failed),
            listings: of(&counters.listings),
            failed_listings: of(&counters.failed_listings),
            names: self.names.lock().len() as u64,
        }
    }

    /// Moves all blocks, as many at a time as there are slots.
    fn move_all(&self, op: Op, spec: &MoveSpec, deadline: Instant) -> Vec<BlockOutcome> {
        let late = || BlockOutcome::Failed(format!("objects: not done within {:?}", spec.time));
        let mut outcomes = vec![None; spec.blocks.len()];
        let mut next = 0;
        let mut run = vec![0; usize::try_from(self.host.transfer_layout().run_bytes).unwrap_or(0)];
        while next < spec.blocks.len() {
            let mut flying = Vec::new();
            let free = self.slots.take(spec.blocks.len() - next, deadline);
            if free.is_empty() {
                break;
            }
            for slot in free {
                let index = next;
                next += 1;
                let block = &spec.blocks[index];
                let known = self.names.lock().contains(block.name.sequence);
                if op == Op::Write && known {
                    count(&self.counters.existed);
                    outcomes[index] = Some(BlockOutcome::Moved);
                    self.slots.give_back(slot);
                    continue;
                }
                match self.post(op, block, slot, &mut run, deadline) {
                    Ok(transfer) => flying.push(Flying {
                        index,
                        slot,
                        transfer,
                    }),
                    Err(reason) => {
                        outcomes[index] = Some(BlockOutcome::Failed(reason));
                        self.slots.give_back(slot);
                    }
                }
            }
            for Flying {
                index,
                slot,
                transfer,
            } in flying
            {
                let block = &spec.blocks[index];
                // Its own deadline ends it; a folder that hangs does not know of that.
                let time = deadline.saturating_duration_since(Instant::now());
                let result = transfer.wait(time + Duration::from_millis(20));
                if let Err(TransferError::StillInFlight { .. }) = result {
                    self.slots.give_back_after(transfer, slot);
                    outcomes[index] = Some(late());
                    continue;
                }
                outcomes[index] = Some(match op {
                    Op::Write => self.written(block, result),
                    Op::Read => self.read(block, slot, &mut run, result, deadline),
                });
                self.slots.give_back(slot);
            }
        }
        let outcomes: Vec<BlockOutcome> = outcomes
            .into_iter()
            .map(|outcome| outcome.unwrap_or_else(late))
            .collect();
        for outcome in &outcomes {
            if matches!(outcome, BlockOutcome::Failed(_)) {
                count(&self.counters.failed);
            }
        }
        outcomes
    }

    /// Starts moving one object between its slot and the store.
    fn post(
        &self,
        op: Op,
        block: &MovedBlock,
        slot: u32,
        run: &mut [u8],
        deadline: Instant,
    ) -> Result<Transfer, String> {
        if op == Op::Write {
            self.fill(block, slot, run)
                .map_err(|error| format!("objects: block {} of G2: {error}", block.from))?;
        }
        let keys = [key(&self.folder, block.name.sequence)];
        let local = LocalBlocks {
            registration: &self.bounce,
            layout: self.bounce_layout,
            ids: [slot].into(),
            layers: 0..1,
        };
        let objects = ObjectBlocks {
            store: &self.store,
            keys: &keys,
            range: None,
            create_only: op == Op::Write,
        };
        let prepared = self.agent.prepare_objects(op, local, objects);
        let prepared = prepared.map_err(|error| error.to_string())?;
        let time = deadline.saturating_duration_since(Instant::now());
        prepared
            .post(PostOptions::within(time))
            .map_err(|error| error.to_string())
    }

    /// Header and payload of a block of G2 into a slot.
    fn fill(&self, block: &MovedBlock, slot: u32, run: &mut [u8]) -> Result<(), AccessError> {
        let layout = self.host.transfer_layout();
        let mut hasher = payload_hasher(block.name, &self.fingerprint);
        let first = u64::from(slot) * self.bounce_layout.block_stride;
        let mut at = first + HEADER as u64;
        for layer in 0..layout.layers {
            let from = layout.run_offset(block.from, layer).unwrap_or(u64::MAX);
            self.host.registration().read_at(from, run)?;
            hasher.update(run);
            self.bounce.write_at(at, run)?;
            at += layout.run_bytes;
        }
        let header = Header {
            name: block.name,
            parent: block.parent,
            fingerprint: self.fingerprint,
            bytes: block_bytes(&layout),
            checksum: hasher.digest(),
        };
        self.bounce.write_at(first, &header.encode())
    }

    fn written(&self, block: &MovedBlock, result: Result<(), TransferError>) -> BlockOutcome {
        match result {
            Ok(()) => count(&self.counters.written),
            Err(TransferError::Storage(StorageError {
                kind: StorageErrorKind::Precondition(_),
                ..
            })) => count(&self.counters.existed),
            Err(error) => return BlockOutcome::Failed(error.to_string()),
        }
        self.names.lock().insert(block.name.sequence);
        BlockOutcome::Moved
    }

    fn read(
        &self,
        block: &MovedBlock,
        slot: u32,
        run: &mut [u8],
        result: Result<(), TransferError>,
        deadline: Instant,
    ) -> BlockOutcome {
        let invalid = match result {
            Ok(()) => match self.empty(block, slot, run) {
                Ok(Ok(())) => {
                    count(&self.counters.read);
                    return BlockOutcome::Moved;
                }
                Ok(Err(invalid)) => invalid,
                Err(error) => {
                    let to = block.to;
                    return BlockOutcome::Failed(format!("objects: block {to} of G2: {error}"));
                }
            },
            Err(TransferError::Storage(StorageError {
                kind: StorageErrorKind::NotFound,
                ..
            })) => Invalid::Missing,
            Err(TransferError::Storage(StorageError {
                kind: StorageErrorKind::Length { got, .. },
                ..
            })) if got != self.bounce_layout.run_bytes => Invalid::Checksum,
            Err(error) => return BlockOutcome::Failed(error.to_string()),
        };
        self.names.lock().remove(block.name.sequence);
        if invalid == Invalid::Missing {
            count(&self.counters.missing);
        } else {
            count(&self.counters.invalid);
            self.delete(block, invalid, deadline);
        }
        BlockOutcome::Invalid(invalid)
    }

    /// A slot into its block of G2, if it holds what it should.
    fn empty(
        &self,
        block: &MovedBlock,
        slot: u32,
        run: &mut [u8],
    ) -> Result<Result<(), Invalid>, AccessError> {
        let layout = self.host.transfer_layout();
        let first = u64::from(slot) * self.bounce_layout.block_stride;
        let mut header = [0; HEADER];
        self.bounce.read_at(first, &mut header)?;
        let header = Header::decode(&header).and_then(|header| {
            header.check(block.name, &self.fingerprint, block_bytes(&layout))?;
            Ok(header)
        });
        let header = match header {
            Ok(header) => header,
            Err(invalid) => return Ok(Err(invalid)),
        };
        let mut hasher = payload_hasher(block.name, &self.fingerprint);
        let mut at = first + HEADER as u64;
        for layer in 0..layout.layers {
            self.bounce.read_at(at, run)?;
            hasher.update(run);
            let to = layout.run_offset(block.to, layer).unwrap_or(u64::MAX);
            self.host.registration().write_at(to, run)?;
            at += layout.run_bytes;
        }
        Ok(if hasher.digest() == header.checksum {
            Ok(())
        } else {
            Err(Invalid::Checksum)
        })
    }

    /// Makes room for a good object under the key of a bad one.
    fn delete(&self, block: &MovedBlock, invalid: Invalid, deadline: Instant) {
        let key = key(&self.folder, block.name.sequence);
        let time = deadline.saturating_duration_since(Instant::now());
        let deleted = self.store.delete(&[&key], time.min(DELETE_TIME));
        let store = self.store.name();
        match deleted {
            Ok(()) => tracing::warn!(store, key, reason = ?invalid, "bad object deleted"),
            Err(error) => tracing::warn!(store, key, reason = ?invalid, %error, "bad object stays"),
        }
    }
}

impl Mover for ObjectTier {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        let deadline = Instant::now() + spec.time;
        let op = match spec.kind {
            MoveKind::HostToRemote => Op::Write,
            MoveKind::RemoteToHost => Op::Read,
            MoveKind::DeviceToHost
            | MoveKind::HostToDevice
            | MoveKind::HostToDisk
            | MoveKind::DiskToHost => {
                let reason = format!("an object tier does no moves {}", spec.kind);
                return MoveReport::failed(spec.blocks.len(), &reason);
            }
        };
        let outcomes = self.move_all(op, spec, deadline);
        let moved = outcomes
            .iter()
            .filter(|outcome| **outcome == BlockOutcome::Moved);
        MoveReport {
            bytes: moved.count() as u64 * block_bytes(&self.host.transfer_layout()),
            outcomes,
            pending: None,
            fault: None,
        }
    }
}

impl RemoteIndex for ObjectTier {
    fn contains(&self, name: SequenceHash) -> bool {
        self.names.lock().contains(name)
    }

    fn len(&self) -> usize {
        self.names.lock().len()
    }
}

impl Drop for ObjectTier {
    fn drop(&mut self) {
        *self.stop.stopped.lock() = true;
        self.stop.changed.notify_all();
    }
}

impl fmt::Debug for ObjectTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectTier")
            .field("store", &self.store.name())
            .field("folder", &self.folder)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// Lists the store at the start and from time to time, until the tier is gone.
fn keep_listing(tier: &Weak<ObjectTier>, stop: &Stop, every: Option<Duration>) {
    loop {
        let Some(tier) = tier.upgrade() else { return };
        if let Err(error) = tier.refresh() {
            let store = tier.store.name();
            tracing::warn!(store, %error, "objects could not be listed");
        }
        drop(tier);
        let Some(every) = every else { return };
        let until = Instant::now() + every;
        let mut stopped = stop.stopped.lock();
        while !*stopped {
            if stop.changed.wait_until(&mut stopped, until).timed_out() {
                break;
            }
        }
        if *stopped {
            return;
        }
    }
}

fn block_bytes(layout: &BlockLayout) -> u64 {
    u64::from(layout.layers) * layout.run_bytes
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
