//! The threads around the books: they take moves, have them done, and tell who waits.

use std::{
    collections::HashMap,
    fmt, io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use blockplane_protocol::{
    BlockId, DpRank, KvLayout, LayoutOrder, LowerTiers, SequenceHash, Tier, TokenBlock,
};
use blockplane_transfer::Agent;
use parking_lot::{Condvar, Mutex, MutexGuard};
use thiserror::Error;

use super::{
    config::{TierConfig, TierConfigError},
    found::TierMatch,
    health::TierState,
    local::{AttachError, ExternalMemory, LocalMover, fault_of},
    moves::{MoveKind, MoveReport, MoveSpec, Mover},
    onboard::{OnboardId, Onboarded},
    save::{SaveId, Saved},
    stats::TierStats,
    tiers::{RemoteIndex, TierPools, Tiers},
};
use crate::{
    arena::{ArenaError, ArenaPlace, KvArena},
    block::ImmutableBlock,
    events::{EventHub, JoinError},
    pool::{BlockPool, PoolConfig},
    store::{RecoveredSlot, SlotStore},
};

/// The tiers below G1 of one worker, shared by its ranks: books, threads and movers.
///
/// [`QueueConfig::concurrent`](super::QueueConfig::concurrent) threads copy, one more watches
/// deadlines; all are parked while there is nothing to do. Dropping it stops them without waiting.
pub struct TierManager {
    shared: Arc<Shared>,
    local: Option<Arc<LocalMover>>,
    store: Option<Arc<SlotStore>>,
    threads: Arc<Threads>,
}

/// Threads that still have a share in the books, the movers and the store.
#[derive(Default)]
struct Threads {
    count: Mutex<u32>,
    ended: Condvar,
}

/// What a manager works with.
pub struct TierParts {
    /// The agent whose memory G2 is.
    pub agent: Agent,
    /// G2, or what stands in for it, of [`host_arena`].
    pub host: Arc<KvArena>,
    /// G3, opened on the same agent, and what was in it. Used if the configuration has a disk.
    pub store: Option<(Arc<SlotStore>, Vec<RecoveredSlot>)>,
    /// G4: what is in it, and who moves blocks between it and `host`. Used if the configuration has
    /// a remote tier.
    pub remote: Option<(Arc<dyn RemoteIndex>, Arc<dyn Mover>)>,
    /// The event hubs of the ranks: they are told what G2 and G3 hold.
    pub hubs: Vec<Arc<EventHub>>,
}

/// Why there is no manager.
#[derive(Debug, Error)]
pub enum TierError {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] TierConfigError),
    /// The arena does not fit the configuration.
    #[error("the arena of G2 has {got} blocks; {expected} are configured")]
    Arena {
        /// Its blocks.
        got: u32,
        /// Configured.
        expected: u32,
    },
    /// A tier is configured and was not brought.
    #[error("{0} is configured, and there is none")]
    Missing(&'static str),
    /// An event hub does not take the tiers.
    #[error(transparent)]
    Hub(#[from] JoinError),
    /// A thread could not be started.
    #[error("a thread of the tiers: {0}")]
    Thread(#[from] io::Error),
}

/// The tiers as one rank uses them. Nothing here waits for a copy.
#[derive(Clone)]
pub struct RankTiers {
    shared: Arc<Shared>,
    rank: DpRank,
}

/// An onboard under way. Dropping it calls the onboard off; `done` is still called.
#[must_use = "dropping the ticket calls the onboard off"]
pub struct OnboardTicket {
    shared: Arc<Shared>,
    id: OnboardId,
    told: Arc<Mutex<Told>>,
}

type Done = Box<dyn FnOnce(Onboarded) + Send>;
type SaveDone = Box<dyn FnOnce(Saved) + Send>;

/// Who is told of the end of an onboard.
enum Told {
    Call(Done),
    /// Nobody; this is dropped.
    Keep(#[expect(dead_code, reason = "dropped at the end")] Box<dyn Send>),
    Over,
}

struct Shared {
    books: Mutex<Books>,
    /// There may be a move to take.
    work: Condvar,
    /// The next deadline may be an earlier one.
    timer: Condvar,
    /// A move ended.
    progress: Condvar,
    mover: Arc<dyn Mover>,
    started: Instant,
}

struct Books {
    tiers: Tiers,
    told: HashMap<OnboardId, Arc<Mutex<Told>>>,
    savers: HashMap<SaveId, SaveDone>,
    stopping: bool,
}

/// What is to be told once the lock is gone.
#[derive(Default)]
struct News {
    ended: Vec<(Arc<Mutex<Told>>, Onboarded)>,
    saved: Vec<(SaveDone, Saved)>,
}

/// Copies in this worker by one mover, and to and from G4 by another.
struct Both {
    local: Arc<LocalMover>,
    remote: Option<Arc<dyn Mover>>,
}

/// Allocates G2 (or what stands in for it) for blocks like those of `layout`: each block in one
/// piece.
///
/// # Errors
/// The memory cannot be had.
pub fn host_arena(
    agent: &Agent,
    layout: &KvLayout,
    config: &TierConfig,
    place: ArenaPlace,
) -> Result<Arc<KvArena>, ArenaError> {
    let layout = KvLayout {
        order: LayoutOrder::BlockFirst,
        ..layout.clone()
    };
    KvArena::allocate_in(agent, layout, config.host_memory_blocks(), "g2", place)
}

impl TierManager {
    /// Starts the tiers of a worker. What the store holds is found from now on.
    ///
    /// # Errors
    /// The parts do not fit the configuration, or a thread cannot be had.
    pub fn start(config: &TierConfig, parts: TierParts) -> Result<Self, TierError> {
        config.validate()?;
        if parts.host.blocks() != config.host_memory_blocks() {
            return Err(TierError::Arena {
                got: parts.host.blocks(),
                expected: config.host_memory_blocks(),
            });
        }
        let pool = |tier, prefix_caching, eviction| {
            BlockPool::builder(PoolConfig {
                tier,
                prefix_caching,
                ..PoolConfig::default()
            })
            .eviction(eviction)
            .without_own_events()
        };
        let host = pool(Tier::Host, config.host_blocks > 0, config.host_eviction);
        let host = host.over(Arc::clone(&parts.host));
        let mut store = None;
        let disk = match (&config.disk, parts.store) {
            (None, _) => None,
            (Some(_), None) => return Err(TierError::Missing("G3")),
            (Some(disk), Some((opened, recovered))) => {
                let pool = pool(Tier::Disk, true, disk.eviction).accounting(opened.capacity());
                let slots = recovered.into_iter();
                pool.restore(slots.map(|slot| (BlockId(slot.slot), slot.name, slot.parent)));
                store = Some(opened);
                Some(pool)
            }
        };
        let (index, remote) = match (&config.remote, parts.remote) {
            (None, _) => (None, None),
            (Some(_), None) => return Err(TierError::Missing("G4")),
            (Some(_), Some((index, mover))) => (Some(index), Some(mover)),
        };
        for hub in &parts.hubs {
            for pool in [Some(&host), disk.as_ref()].into_iter().flatten() {
                pool.join(hub)?;
            }
        }
        let block_bytes = parts.host.layout().block_bytes() as u64;
        let local = Arc::new(LocalMover::new(parts.agent, parts.host, store.clone()));
        let pools = TierPools {
            host,
            disk,
            remote: index,
        };
        let mover = Arc::new(Both {
            local: Arc::clone(&local),
            remote,
        });
        let mut manager = Self::start_with(config, pools, block_bytes, mover)?;
        if let Some(fault) = store.as_deref().and_then(fault_of) {
            let mut books = manager.shared.books.lock();
            books.tiers.fault(manager.shared.now(), Tier::Disk, fault);
            books.log_state_changes();
        }
        manager.local = Some(local);
        manager.store = store;
        Ok(manager)
    }

    /// Starts the threads over books and a mover of the caller's: for ranks that move together, and
    /// for tests.
    ///
    /// # Errors
    /// The configuration cannot work, or a thread cannot be had.
    pub fn start_with(
        config: &TierConfig,
        pools: TierPools,
        block_bytes: u64,
        mover: Arc<dyn Mover>,
    ) -> Result<Self, TierError> {
        let shared = Arc::new(Shared {
            books: Mutex::new(Books {
                tiers: Tiers::new(config, pools, block_bytes)?,
                told: HashMap::new(),
                savers: HashMap::new(),
                stopping: false,
            }),
            work: Condvar::new(),
            timer: Condvar::new(),
            progress: Condvar::new(),
            mover,
            started: Instant::now(),
        });
        // Stops the threads that did start when one cannot be had.
        let manager = Self {
            shared,
            local: None,
            store: None,
            threads: Arc::default(),
        };
        for i in 0..config.queues.concurrent {
            manager.spawn(format!("kvbm-move-{i}"), Shared::move_blocks)?;
        }
        manager.spawn("kvbm-timer".to_owned(), Shared::watch_deadlines)?;
        Ok(manager)
    }

    /// Adds a rank of this worker: `pool` is its G1, in an arena of `agent`.
    ///
    /// # Errors
    /// Its blocks are others than those of G2, or its agent is not reached.
    pub fn attach(
        &self,
        rank: DpRank,
        agent: &Agent,
        pool: &BlockPool,
    ) -> Result<RankTiers, AttachError> {
        if let Some(local) = &self.local {
            let arena = pool.arena().ok_or(AttachError::NoArena { rank: rank.0 })?;
            local.attach(rank, agent, arena)?;
        }
        Ok(self.attach_books(rank, pool.clone()))
    }

    /// Adds a rank of another engine that keeps the books of its G1 itself: the tiers know where its
    /// blocks lie, and nothing of what is in them. They are filled by [`RankTiers::save`], with ids,
    /// and found by [`RankTiers::find_after`].
    ///
    /// # Errors
    /// Its blocks do not have the size of those of G2, or its agent is not reached.
    pub fn attach_external(
        &self,
        rank: DpRank,
        agent: &Agent,
        memory: &ExternalMemory,
    ) -> Result<RankTiers, AttachError> {
        let blocks = memory.blocks(rank)?;
        if let Some(local) = &self.local {
            local.attach_external(rank, agent, memory)?;
        }
        let books = PoolConfig {
            prefix_caching: false,
            ..PoolConfig::default()
        };
        Ok(self.attach_books(rank, BlockPool::accounting(blocks, books)))
    }

    /// Adds a rank whose memory the mover knows already.
    pub fn attach_books(&self, rank: DpRank, pool: BlockPool) -> RankTiers {
        self.shared.books.lock().tiers.attach(rank, pool);
        RankTiers {
            shared: Arc::clone(&self.shared),
            rank,
        }
    }

    /// What the tiers hold and have done.
    #[must_use]
    pub fn stats(&self) -> TierStats {
        self.shared.books.lock().tiers.stats()
    }

    /// What the tiers hold, in short.
    #[must_use]
    pub fn occupancy(&self) -> LowerTiers {
        self.shared.books.lock().tiers.occupancy()
    }

    /// The G2 pool, for peers that read from it.
    #[must_use]
    pub fn host(&self) -> BlockPool {
        self.shared.books.lock().tiers.host().clone()
    }

    /// The store of G3, if it was started with one.
    #[must_use]
    pub fn store(&self) -> Option<&Arc<SlotStore>> {
        self.store.as_ref()
    }

    /// Waits until nothing waits and nothing moves, and G3 is durable. False when it took longer
    /// than `timeout`, or the disk refused.
    pub fn flush(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut books = self.shared.books.lock();
        while !books.tiers.idle() {
            if self
                .shared
                .progress
                .wait_until(&mut books, until)
                .timed_out()
            {
                return false;
            }
        }
        drop(books);
        self.store
            .as_ref()
            .is_none_or(|store| store.flush(until).is_ok())
    }

    /// Calls off what is under way and waits for the threads; then G3 is closed, and opens without a
    /// repair next time. False when that took longer than `timeout`: a thread hangs in a device, and
    /// ends with it.
    pub fn stop(&self, timeout: Duration) -> bool {
        self.shared.stop();
        let until = Instant::now() + timeout;
        let mut count = self.threads.count.lock();
        while *count > 0 {
            if self.threads.ended.wait_until(&mut count, until).timed_out() {
                return false;
            }
        }
        drop(count);
        self.store
            .as_ref()
            .is_none_or(|store| store.close(until).is_ok())
    }

    fn spawn(&self, name: String, run: fn(&Arc<Shared>)) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let threads = Arc::clone(&self.threads);
        *self.threads.count.lock() += 1;
        let spawned = thread::Builder::new().name(name).spawn(move || {
            run(&shared);
            drop(shared);
            *threads.count.lock() -= 1;
            threads.ended.notify_all();
        });
        spawned.map(drop).inspect_err(|_| {
            *self.threads.count.lock() -= 1;
        })
    }
}

impl Drop for TierManager {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl RankTiers {
    /// The rank.
    #[must_use]
    pub const fn rank(&self) -> DpRank {
        self.rank
    }

    /// See [`Tiers::referenced`].
    pub fn referenced(&self, names: &[TokenBlock]) {
        self.shared.books.lock().tiers.referenced(names);
    }

    /// See [`Tiers::find`].
    pub fn find(&self, names: &[TokenBlock]) -> TierMatch {
        self.extend(Vec::new(), names)
    }

    /// See [`Tiers::extend`].
    pub fn extend(&self, held: Vec<ImmutableBlock>, names: &[TokenBlock]) -> TierMatch {
        let now = self.shared.now();
        let mut books = self.shared.books.lock();
        books.tiers.extend(now, self.rank, held, names)
    }

    /// See [`Tiers::find_after`].
    pub fn find_after(&self, parent: Option<SequenceHash>, names: &[TokenBlock]) -> TierMatch {
        let now = self.shared.now();
        let mut books = self.shared.books.lock();
        books.tiers.find_after(now, self.rank, parent, names)
    }

    /// See [`Tiers::save`]. `done` is called once, when the blocks are not read any more: on a thread
    /// of the manager, or here. It must be short.
    pub fn save(
        &self,
        parent: Option<SequenceHash>,
        blocks: &[(TokenBlock, BlockId)],
        priority: Option<u32>,
        done: Box<dyn FnOnce(Saved) + Send>,
    ) {
        let now = self.shared.now();
        let mut books = self.shared.books.lock();
        let id = books.tiers.save(now, self.rank, parent, blocks, priority);
        books.savers.insert(id, done);
        if books.stopping {
            books.tiers.end_saves();
        }
        let news = books.news();
        drop(books);
        self.shared.work.notify_one();
        self.shared.timer.notify_one();
        news.tell();
    }

    /// Brings a match into G1, into `targets`, one for each block that is not there, in order.
    /// `done` is called once, when no byte lands in them any more: that is `within` that time, or as
    /// soon after it as a copy into them has ended. It is called on a thread of the manager, or here;
    /// not after [`OnboardTicket::give_up`]. It must be short and not give up its own ticket.
    ///
    /// # Panics
    /// See [`Tiers::onboard`].
    pub fn onboard(
        &self,
        found: TierMatch,
        targets: Vec<BlockId>,
        within: Duration,
        done: Box<dyn FnOnce(Onboarded) + Send>,
    ) -> OnboardTicket {
        let told = Arc::new(Mutex::new(Told::Call(done)));
        let now = self.shared.now();
        let deadline = now.saturating_add(within);
        let mut books = self.shared.books.lock();
        let tiers = &mut books.tiers;
        let id = tiers.onboard(now, self.rank, found, targets, deadline);
        books.told.insert(id, Arc::clone(&told));
        if books.stopping {
            books.tiers.cancel(now, id);
        }
        let news = books.news();
        drop(books);
        self.shared.work.notify_one();
        self.shared.timer.notify_one();
        news.tell();
        OnboardTicket {
            shared: Arc::clone(&self.shared),
            id,
            told,
        }
    }

    /// See [`Tiers::offload`].
    pub fn offload(&self, names: &[TokenBlock], priority: Option<u32>) -> bool {
        let now = self.shared.now();
        let mut books = self.shared.books.lock();
        if books.stopping {
            return true;
        }
        let more = books.tiers.offload(now, self.rank, names, priority);
        let waits = !books.tiers.idle();
        drop(books);
        if waits {
            self.shared.work.notify_one();
        }
        more
    }
}

impl OnboardTicket {
    /// Nobody wants the blocks any more, and `done` is not called any more: `keep`, which holds the
    /// targets, is dropped as soon as no byte can land in them.
    pub fn give_up(self, keep: Box<dyn Send>) {
        let over = {
            let mut told = self.told.lock();
            if matches!(*told, Told::Over) {
                Some(keep)
            } else {
                *told = Told::Keep(keep);
                None
            }
        };
        drop(over);
        // Dropping the ticket calls it off.
    }
}

impl Drop for OnboardTicket {
    fn drop(&mut self) {
        let now = self.shared.now();
        let mut books = self.shared.books.lock();
        books.tiers.cancel(now, self.id);
        let news = books.news();
        drop(books);
        news.tell();
    }
}

impl Shared {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The life of a thread that copies.
    fn move_blocks(self: &Arc<Self>) {
        let mut books = self.books.lock();
        while !books.stopping {
            let now = self.now();
            let Some(spec) = books.tiers.next_move(now) else {
                // Looking for work may have ended an onboard, or found that there is no room.
                books = self.tell(books);
                if books.stopping {
                    break;
                }
                if books.tiers.blocked() {
                    self.timer.notify_one();
                }
                self.work.wait(&mut books);
                continue;
            };
            drop(books);
            // There may be more than one thread can do.
            self.work.notify_one();
            let report = self.mover.run(&spec);
            books = self.books.lock();
            self.ended(&mut books, &spec, report);
            books = self.tell(books);
            self.progress.notify_all();
        }
    }

    /// The life of the thread that watches deadlines.
    fn watch_deadlines(self: &Arc<Self>) {
        let mut books = self.books.lock();
        while !books.stopping {
            let now = self.now();
            let next = books.tiers.tick(now);
            books = self.tell(books);
            if books.tiers.blocked() {
                self.work.notify_one();
            }
            if books.stopping {
                break;
            }
            match next {
                Some(at) => {
                    let until = self.started + at;
                    let _ = self.timer.wait_until(&mut books, until);
                }
                None => self.timer.wait(&mut books),
            }
        }
    }

    /// Takes the end of a move.
    fn ended(self: &Arc<Self>, books: &mut Books, spec: &MoveSpec, report: MoveReport) {
        let now = self.now();
        let quiet = report.pending.is_none();
        books.tiers.moved(now, spec.id, report.outcomes, quiet);
        if let Some(fault) = report.fault {
            books.tiers.fault(now, spec.kind.tier(), fault);
        }
        books.log_state_changes();
        let Some(pending) = report.pending else {
            return;
        };
        let (shared, id) = (Arc::clone(self), spec.id);
        let wait = move || {
            pending.wait();
            let mut books = shared.books.lock();
            books.tiers.quiet(shared.now(), id);
            drop(shared.tell(books));
            shared.work.notify_one();
            shared.progress.notify_all();
        };
        // Few at a time: a tier with many moves that are not quiet gets no more. Without a thread
        // the blocks stay out of use.
        let spawned = thread::Builder::new()
            .name("kvbm-pending".to_owned())
            .spawn(wait);
        if let Err(error) = spawned {
            tracing::warn!(%error, "blocks of a move that hangs stay out of use");
        }
    }

    /// Tells who waits, without the lock.
    fn tell<'a>(&'a self, mut books: MutexGuard<'a, Books>) -> MutexGuard<'a, Books> {
        let news = books.news();
        if !news.is_empty() {
            MutexGuard::unlocked(&mut books, || news.tell());
        }
        books
    }

    fn stop(&self) {
        let mut books = self.books.lock();
        if std::mem::replace(&mut books.stopping, true) {
            return;
        }
        let now = self.now();
        let ids: Vec<OnboardId> = books.told.keys().copied().collect();
        for id in ids {
            books.tiers.cancel(now, id);
        }
        books.tiers.end_saves();
        let news = books.news();
        drop(books);
        self.work.notify_all();
        self.timer.notify_all();
        news.tell();
    }
}

impl Books {
    fn log_state_changes(&mut self) {
        for change in self.tiers.state_changes() {
            match change.state {
                TierState::On => tracing::info!(tier = ?change.tier, "tier works again"),
                state => tracing::warn!(tier = ?change.tier, ?state, "tier changed its state"),
            }
        }
    }

    fn news(&mut self) -> News {
        let finished = self.tiers.finished();
        let ended = finished.into_iter().filter_map(|(id, onboarded)| {
            let told = self.told.remove(&id)?;
            Some((told, onboarded))
        });
        let ended = ended.collect();
        let saved = self.tiers.saved().into_iter().filter_map(|(id, saved)| {
            let done = self.savers.remove(&id)?;
            Some((done, saved))
        });
        News {
            ended,
            saved: saved.collect(),
        }
    }
}

impl News {
    fn is_empty(&self) -> bool {
        self.ended.is_empty() && self.saved.is_empty()
    }

    fn tell(self) {
        for (done, saved) in self.saved {
            done(saved);
        }
        for (told, onboarded) in self.ended {
            // Held while it is told, so that nobody is told after giving up.
            let mut told = told.lock();
            if let Told::Call(done) = std::mem::replace(&mut *told, Told::Over) {
                done(onboarded);
            }
        }
    }
}

impl Mover for Both {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        match (spec.kind, &self.remote) {
            (MoveKind::HostToRemote | MoveKind::RemoteToHost, Some(remote)) => remote.run(spec),
            _ => self.local.run(spec),
        }
    }
}

impl fmt::Debug for TierManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TierManager")
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for TierParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TierParts")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for RankTiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RankTiers")
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for OnboardTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnboardTicket")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
