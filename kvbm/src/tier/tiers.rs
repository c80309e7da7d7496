//! The books of all tiers: what is where, what is being moved, and what is moved next.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    hash::BuildHasherDefault,
    sync::Arc,
    time::Duration,
};

use blockplane_protocol::{DpRank, LowerTiers, SequenceHash, Tier, TokenBlock};

use super::{
    config::{TierConfig, TierConfigError},
    flight::{Flight, Parked},
    found::{Place, TierMatch},
    health::{Ended, Health, StateChange, TierState},
    moves::{BlockOutcome, MoveId, MoveKind, MoveSpec, MovedBlock, TierFault},
    onboard::{Onboard, OnboardId, Onboarded, Read},
    queue::RunQueue,
    save::Saves,
    slots::Slots,
    stats::{Dropped, Evicted, TierStats},
    write::{Disk, Remote},
};
use crate::{
    block::{ImmutableBlock, LeasedBlocks},
    pool::{BlockPool, HashIsUniform, PoolStats},
};

/// What is known to be in G4. Called under the manager's lock: no I/O.
pub trait RemoteIndex: Send + Sync {
    /// Whether a block of this name is there.
    fn contains(&self, name: SequenceHash) -> bool;

    /// Whether writing it there would be in vain, because it is kept. Blocks can be somewhere from
    /// where they go at any time.
    fn keeps(&self, name: SequenceHash) -> bool {
        self.contains(name)
    }

    /// Blocks there.
    fn len(&self) -> usize;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The books of the tiers below G1.
pub struct TierPools {
    /// G2, or, where there is none, the bounce pool: one without prefix caching.
    pub host: BlockPool,
    /// G3: block ids are slots of the store.
    pub disk: Option<BlockPool>,
    /// G4.
    pub remote: Option<Arc<dyn RemoteIndex>>,
}

/// All tiers of one worker: a state machine without clocks, threads or I/O.
///
/// Time is an argument that does not go backwards. [`Tiers::next_move`] says what to copy, and
/// [`Tiers::moved`] is told what became of it; everything else follows.
///
/// ```
/// use std::time::Duration;
///
/// use blockplane_kvbm::{
///     BlockPool, PoolConfig,
///     tier::{BlockOutcome, TierConfig, TierPools, Tiers},
/// };
/// use blockplane_protocol::{DpRank, SaltHash, TokenSequence};
///
/// let (now, rank) = (Duration::ZERO, DpRank(0));
/// let config = TierConfig { host_blocks: 16, ..TierConfig::default() };
/// let host = BlockPool::accounting(16, PoolConfig::default());
/// let pools = TierPools { host, disk: None, remote: None };
/// let mut tiers = Tiers::new(&config, pools, 1 << 20)?;
/// let device = BlockPool::accounting(2, PoolConfig::default());
/// tiers.attach(rank, device.clone());
///
/// // A prompt of two blocks is computed in G1, and offloaded.
/// let prompt = TokenSequence::from_tokens(&[1, 2, 3, 4], 2, SaltHash::default());
/// let mut parent = None;
/// for (block, name) in device.allocate(2)?.into_iter().zip(prompt.blocks()) {
///     drop(block.complete(*name, parent).register());
///     parent = Some(name.sequence);
/// }
/// tiers.offload(now, rank, prompt.blocks(), None);
/// while let Some(copy) = tiers.next_move(now) {
///     tiers.moved(now, copy.id, vec![BlockOutcome::Moved; copy.blocks.len()], true);
/// }
///
/// // G1 needs its room for something else; the prompt comes again.
/// drop(device.allocate(2)?);
/// let found = tiers.find(now, rank, prompt.blocks());
/// assert_eq!((found.device(), found.lower()), (0, 2));
/// let targets = device.allocate(2)?;
/// let ids = targets.iter().map(|block| block.id()).collect();
/// let id = tiers.onboard(now, rank, found, ids, now + Duration::from_secs(1));
/// while let Some(copy) = tiers.next_move(now) {
///     tiers.moved(now, copy.id, vec![BlockOutcome::Moved; copy.blocks.len()], true);
/// }
/// let (done, onboarded) = tiers.finished().remove(0);
/// assert_eq!((done, onboarded.loaded), (id, 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Tiers {
    pub(super) config: TierConfig,
    pub(super) block_bytes: u64,
    pub(super) ranks: Vec<Rank>,
    pub(super) host: BlockPool,
    /// False where the host pool only stands in for a G2.
    pub(super) listed: bool,
    pub(super) disk: Option<Disk>,
    pub(super) remote: Option<Remote>,
    /// Blocks of G1 that are to go to G2, by their names: they are held when their turn comes.
    pub(super) offloads: RunQueue<TokenBlock>,
    /// Blocks of a G1 whose books another engine keeps.
    pub(super) saves: Saves,
    pub(super) onboards: Slots<Onboard>,
    /// Onboards with blocks to copy into G1, oldest first.
    pub(super) loading: VecDeque<u64>,
    pub(super) reads: Slots<Read>,
    pub(super) reads_by_name: NameMap<u64>,
    pub(super) disk_reads: VecDeque<u64>,
    pub(super) remote_reads: VecDeque<u64>,
    pub(super) finished: Vec<(OnboardId, Onboarded)>,
    /// The earliest deadline of an onboard, or earlier.
    pub(super) next_deadline: Duration,
    /// Something waits for room in G2 that only others can make.
    pub(super) blocked: bool,
    pub(super) stats: TierStats,
    flights: Slots<Flight>,
    parked: HashMap<u64, Parked>,
    running: [u32; MoveKind::ALL.len()],
    changes: Vec<StateChange>,
}

/// G1 of one rank.
pub(super) struct Rank {
    pub(super) rank: DpRank,
    pub(super) pool: BlockPool,
    /// Blocks held for being copied away, and how many may be: what is held cannot be computed on.
    pub(super) held: usize,
    pub(super) held_max: usize,
}

pub(super) type NameMap<T> = HashMap<SequenceHash, T, BuildHasherDefault<HashIsUniform>>;

/// Share of a G1 that may be held for being copied away: one in this many blocks.
const HELD_SHARE: usize = 8;

/// How soon to look again for room that others may have made.
const BLOCKED_AGAIN: Duration = Duration::from_millis(2);

impl Tiers {
    /// The books over `pools`, whose blocks have `block_bytes` bytes each. What the pools have
    /// registered already is found at once.
    ///
    /// # Errors
    /// A number of the configuration is out of range.
    pub fn new(
        config: &TierConfig,
        pools: TierPools,
        block_bytes: u64,
    ) -> Result<Self, TierConfigError> {
        config.validate()?;
        let queue_max = config.queues.offload_blocks_max as usize;
        let disk = match (&config.disk, pools.disk) {
            (Some(disk), Some(pool)) => Some(Disk::new(disk, pool, queue_max)?),
            _ => None,
        };
        let remote = match (&config.remote, pools.remote) {
            (Some(remote), Some(index)) => Some(Remote::new(*remote, index, queue_max)),
            _ => None,
        };
        Ok(Self {
            block_bytes,
            ranks: Vec::new(),
            host: pools.host,
            listed: config.host_blocks > 0,
            disk,
            remote,
            offloads: RunQueue::new(queue_max),
            saves: Saves::new(queue_max),
            onboards: Slots::new(),
            loading: VecDeque::new(),
            reads: Slots::new(),
            reads_by_name: NameMap::default(),
            disk_reads: VecDeque::new(),
            remote_reads: VecDeque::new(),
            finished: Vec::new(),
            next_deadline: Duration::MAX,
            blocked: false,
            stats: TierStats::default(),
            flights: Slots::new(),
            parked: HashMap::new(),
            running: [0; MoveKind::ALL.len()],
            changes: Vec::new(),
            config: config.clone(),
        })
    }

    /// Adds the G1 of a rank, or replaces it. Nothing may be under way for the old one.
    pub fn attach(&mut self, rank: DpRank, device: BlockPool) {
        let books = Rank {
            rank,
            held: 0,
            held_max: (device.stats().total / HELD_SHARE).max(1),
            pool: device,
        };
        match self.ranks.iter_mut().find(|known| known.rank == rank) {
            Some(known) => *known = books,
            None => self.ranks.push(books),
        }
    }

    /// Notes that a request asks for these blocks, from the first of its prompt on: some admission
    /// rules count that. To be told once for each request, before it is computed.
    pub fn referenced(&mut self, names: &[TokenBlock]) {
        if let Some(disk) = &mut self.disk {
            disk.referenced(names);
        }
    }

    /// The longest run of `names`, from the first on, of which each block is in some tier. Each is
    /// held where it is. Nothing changes but how recently blocks were used.
    pub fn find(&mut self, now: Duration, rank: DpRank, names: &[TokenBlock]) -> TierMatch {
        self.extend(now, rank, Vec::new(), names)
    }

    /// [`Tiers::find`] for a run that does not begin its sequence: `parent` names the block before it.
    pub fn find_after(
        &mut self,
        now: Duration,
        rank: DpRank,
        parent: Option<SequenceHash>,
        names: &[TokenBlock],
    ) -> TierMatch {
        self.search(now, TierMatch::new(rank, parent, 0), names)
    }

    /// [`Tiers::find`] for a caller that holds the leading blocks in G1 already, up to the first one
    /// that is not there.
    pub fn extend(
        &mut self,
        now: Duration,
        rank: DpRank,
        held: Vec<ImmutableBlock>,
        names: &[TokenBlock],
    ) -> TierMatch {
        let mut found = TierMatch::new(rank, None, held.len());
        for (block, name) in held.into_iter().zip(names) {
            found.push(*name, Place::Device(Some(block)));
        }
        self.search(now, found, names)
    }

    /// Goes on from what was found.
    fn search(&self, now: Duration, mut found: TierMatch, names: &[TokenBlock]) -> TierMatch {
        let known = !found.is_empty();
        let device = self.rank_index(found.rank()).map(|at| &self.ranks[at].pool);
        let disk = self.disk.as_ref().filter(|disk| disk.health.usable(now));
        let remote = self.remote.as_ref().filter(|r| r.health.usable(now));
        let host = self.listed.then_some(&self.host);
        let pools = [device, host, disk.map(|disk| &disk.pool)];
        // The highest tier that has the next block continues the run, up to the first block that a
        // higher one has.
        let mut tier = usize::from(known);
        while tier <= pools.len() && found.len() < names.len() {
            let left = &names[found.len()..];
            let mut here = match pools.get(tier) {
                Some(pool) => pool.map_or_else(Vec::new, |pool| pool.match_prefix(left)),
                None => Vec::new(),
            };
            let count = match remote.filter(|_| tier == pools.len()) {
                Some(remote) => left
                    .iter()
                    .take_while(|name| remote.index.contains(name.sequence))
                    .count(),
                None => here.len(),
            };
            let higher = pools[..tier].iter().flatten();
            let run = higher.fold(count, |run, pool| {
                let there = pool.first_present(left.get(1..run).unwrap_or_default());
                there.map_or(run, |at| at + 1)
            });
            found.reserve(run);
            let mut here = here
                .drain(..)
                .map(Some)
                .chain(std::iter::repeat_with(|| None));
            for name in &left[..run] {
                let place = match (tier, here.next().flatten()) {
                    (0, block) => Place::Device(block),
                    (1, Some(block)) => Place::Host(block),
                    (2, Some(block)) => Place::Disk(block),
                    _ => Place::Remote,
                };
                found.push(*name, place);
            }
            tier = if run > 0 && tier > 0 { 0 } else { tier + 1 };
        }
        found
    }

    /// What to copy now, if anything: onboards first, then what makes room in G2 or goes to G3 and
    /// G4, then offloads. Whoever takes a move must report it with [`Tiers::moved`].
    pub fn next_move(&mut self, now: Duration) -> Option<MoveSpec> {
        if self.running.iter().sum::<u32>() >= self.config.queues.concurrent {
            return None;
        }
        self.blocked = false;
        let room_first = !self.config.demote_ahead;
        self.start_load(now)
            .or_else(|| room_first.then(|| self.start_demotion(now)).flatten())
            .or_else(|| self.start_read(now, Tier::Disk))
            .or_else(|| self.start_read(now, Tier::Remote))
            .or_else(|| self.start_demotion(now))
            .or_else(|| self.start_write(now, Tier::Disk))
            .or_else(|| self.start_write(now, Tier::Remote))
            .or_else(|| self.start_offload(now))
            .or_else(|| self.start_save(now))
    }

    /// Takes what became of a move. Without `quiet`, bytes of the blocks that were not moved may
    /// still land or be read: these blocks are kept out of use until [`Tiers::quiet`].
    pub fn moved(
        &mut self,
        now: Duration,
        id: MoveId,
        mut outcomes: Vec<BlockOutcome>,
        quiet: bool,
    ) {
        let Some(flight) = self.flights.remove(id.0) else {
            return;
        };
        let missing = || BlockOutcome::Failed("the mover said nothing of it".to_owned());
        outcomes.resize_with(flight.count, missing);
        self.running[flight.kind.index()] -= 1;
        self.account(now, &flight, &outcomes);
        let kind = flight.kind;
        let parked = self.land(now, flight, &outcomes, quiet);
        if let Some(parked) = parked {
            self.parked.insert(id.0, parked);
        }
        self.flush_if_down(now, kind.tier());
    }

    /// No byte of a move that was reported as not quiet can land or be read any more.
    pub fn quiet(&mut self, now: Duration, id: MoveId) {
        if let Some(parked) = self.parked.remove(&id.0) {
            self.unpark(now, parked);
        }
    }

    /// Onboards that ended since the last call.
    #[must_use]
    pub fn finished(&mut self) -> Vec<(OnboardId, Onboarded)> {
        std::mem::take(&mut self.finished)
    }

    /// Tiers that changed their state since the last call.
    #[must_use]
    pub fn state_changes(&mut self) -> Vec<StateChange> {
        std::mem::take(&mut self.changes)
    }

    /// Ends what is past its deadline. Returns when to call again at the latest, if nothing else
    /// happens.
    pub fn tick(&mut self, now: Duration) -> Option<Duration> {
        if now >= self.next_deadline {
            self.end_late_onboards(now);
        }
        let saves = self.end_late_saves(now);
        let again = Some(self.next_deadline).filter(|at| *at < Duration::MAX);
        let blocked = self.blocked.then(|| now + BLOCKED_AGAIN);
        again.into_iter().chain(blocked).chain(saves).min()
    }

    /// G3 or G4 does not work any more as it did. Other tiers have no faults.
    pub fn fault(&mut self, now: Duration, tier: Tier, fault: TierFault) {
        let changed = self.health_mut(tier).is_some_and(|health| match fault {
            TierFault::ReadOnly(reason) => health.stop_writes(reason),
            TierFault::Off(reason) => health.turn_off(reason),
        });
        if changed {
            self.state_changed(tier);
        }
        self.flush_if_down(now, tier);
    }

    /// Whether nothing waits and nothing moves.
    #[must_use]
    pub fn idle(&self) -> bool {
        let writes = |queue: Option<usize>| queue.unwrap_or(0) == 0;
        self.flights.len() == 0
            && self.offloads.is_empty()
            && self.saves.is_empty()
            && self.onboards.len() == 0
            && writes(self.disk.as_ref().map(|disk| disk.writes.len()))
            && writes(self.remote.as_ref().map(|remote| remote.writes.len()))
    }

    /// What the tiers hold and have done.
    #[must_use]
    pub fn stats(&self) -> TierStats {
        let mut stats = self.stats.clone();
        if self.listed {
            stats.host = self.host.stats();
            stats.host_activity = self.host.activity();
        }
        for rank in &self.ranks {
            stats.device.add(&rank.pool.stats());
            stats.device_activity.add(&rank.pool.activity());
        }
        for (moves, running) in stats.moves.iter_mut().zip(self.running) {
            moves.running = running;
        }
        stats.offload_queue_blocks = self.offloads.len() + self.saves.waiting();
        if let Some(disk) = &self.disk {
            stats.disk = disk.pool.stats();
            stats.disk_activity = disk.pool.activity();
            stats.disk_queue_blocks = disk.writes.len();
            stats.disk_quarantined_blocks = disk.quarantined();
            stats.states.disk = disk.health.state().clone();
        }
        if let Some(remote) = &self.remote {
            stats.remote_blocks = remote.index.len();
            stats.remote_queue_blocks = remote.writes.len();
            stats.states.remote = remote.health.state().clone();
        }
        stats.read_queue_blocks = self.disk_reads.len() + self.remote_reads.len();
        stats.onboards = self.onboards.len();
        stats.unquiet_moves = self.parked.len();
        stats
    }

    /// What the tiers hold, in short.
    #[must_use]
    pub fn occupancy(&self) -> LowerTiers {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let host = if self.listed {
            self.host.stats()
        } else {
            PoolStats::default()
        };
        let disk = self.disk.as_ref().map(|disk| disk.pool.stats());
        let disk = disk.unwrap_or_default();
        let remote = self.remote.as_ref().map_or(0, |remote| remote.index.len());
        LowerTiers {
            host_blocks_total: count(host.total),
            host_blocks_used: count(host.cached + host.active),
            disk_blocks_total: count(disk.total),
            disk_blocks_used: count(disk.cached + disk.active),
            remote_blocks: count(remote),
        }
    }

    /// Whether something waits for room in G2 that its holders must make: look again soon.
    #[must_use]
    pub const fn blocked(&self) -> bool {
        self.blocked
    }

    /// The G2 pool, for peers that read from it.
    #[must_use]
    pub const fn host(&self) -> &BlockPool {
        &self.host
    }

    pub(super) fn rank_index(&self, rank: DpRank) -> Option<usize> {
        self.ranks.iter().position(|known| known.rank == rank)
    }

    pub(super) fn dropped(&mut self, reason: Dropped, blocks: usize) {
        self.stats.dropped[reason as usize] += blocks as u64;
    }

    pub(super) fn host_evicted(&mut self, reason: Evicted, blocks: usize) {
        self.stats.host_evicted[reason as usize] += blocks as u64;
    }

    pub(super) const fn batch_max(&self) -> usize {
        self.config.queues.batch_blocks as usize
    }

    /// Whether a block is being copied by a move of these kinds.
    pub(super) fn arriving(&self, kind: impl Fn(MoveKind) -> bool, name: SequenceHash) -> bool {
        let mut flights = self.flights.iter().filter(|(_, flight)| kind(flight.kind));
        flights.any(|(_, flight)| flight.job.brings(name))
    }

    /// Takes up to `wanted` blocks of G2 to fill, evicting others.
    pub(super) fn host_room(&mut self, wanted: usize) -> LeasedBlocks {
        let (blocks, evicted) = self.host.lease_up_to(wanted);
        self.host_evicted(Evicted::Room, evicted);
        blocks
    }

    /// Whether a move to or from a lower tier may start. G1 always finds one mover, and reads find
    /// one that no write has taken, where there is more than one.
    pub(super) fn lane_open(&self, now: Duration, kind: MoveKind) -> bool {
        let count = |kinds: [MoveKind; 2]| kinds.map(|k| self.running[k.index()]).iter().sum();
        let disk: u32 = count([MoveKind::DiskToHost, MoveKind::HostToDisk]);
        let remote: u32 = count([MoveKind::RemoteToHost, MoveKind::HostToRemote]);
        let all_max = less_one(self.config.queues.concurrent);
        let tier_max = match (&self.disk, &self.remote) {
            (Some(_), Some(_)) => less_one(all_max),
            _ => all_max,
        };
        let unquiet = self.parked.values().filter(|p| p.tier == kind.tier());
        if unquiet.count() >= self.config.queues.concurrent as usize {
            return false;
        }
        let (tier, health) = match kind.tier() {
            Tier::Disk => (disk, self.disk.as_ref().map(|disk| &disk.health)),
            Tier::Remote => (remote, self.remote.as_ref().map(|remote| &remote.health)),
            Tier::Device | Tier::Host => return true,
        };
        disk + remote < all_max
            && tier < tier_max
            && (kind.into_host() || self.running[kind.index()] < less_one(tier_max))
            && health.is_some_and(|health| {
                health.usable(now) && (kind.into_host() || health.writable(now))
            })
    }

    pub(super) fn start(&mut self, flight: Flight, blocks: Vec<MovedBlock>) -> MoveSpec {
        self.running[flight.kind.index()] += 1;
        if let Some(health) = self.health_mut(flight.kind.tier()) {
            health.started();
        }
        let (kind, rank, time) = (flight.kind, flight.rank, flight.time);
        MoveSpec {
            id: MoveId(self.flights.insert(flight)),
            kind,
            rank,
            blocks,
            time,
        }
    }

    /// Counts a move that ended, and what it says of its tier.
    fn account(&mut self, now: Duration, flight: &Flight, outcomes: &[BlockOutcome]) {
        let took = now.saturating_sub(flight.started);
        let tier = flight.kind.tier();
        let (mut moved, mut invalid, mut bad) = (0, 0, 0);
        for outcome in outcomes {
            match outcome {
                BlockOutcome::Moved => moved += 1,
                BlockOutcome::Invalid(_) => invalid += 1,
                BlockOutcome::Bad(_) => bad += 1,
                BlockOutcome::Failed(_) => {}
            }
        }
        let late = took >= flight.time && moved < outcomes.len();
        let stats = &mut self.stats.moves[flight.kind.index()];
        stats.moves += 1;
        stats.blocks += moved as u64;
        stats.bytes += moved as u64 * self.block_bytes;
        stats.failed_blocks += (outcomes.len() - moved) as u64;
        stats.late += u64::from(late);
        stats.latency.record(took);
        let source = if flight.kind.into_host() {
            tier
        } else {
            Tier::Host
        };
        *self.stats.invalid.get_mut(source) += invalid;
        let ended = match (moved as u64 + invalid + bad, late) {
            (0, true) => Ended::Late,
            (0, false) => Ended::Failed,
            _ => Ended::Answered,
        };
        let config = self.config.health;
        let changed = self
            .health_mut(tier)
            .is_some_and(|health| health.ended(now, ended, &config));
        if changed {
            self.state_changed(tier);
        }
    }

    pub(super) fn health_mut(&mut self, tier: Tier) -> Option<&mut Health> {
        match tier {
            Tier::Disk => self.disk.as_mut().map(|disk| &mut disk.health),
            Tier::Remote => self.remote.as_mut().map(|remote| &mut remote.health),
            Tier::Device | Tier::Host => None,
        }
    }

    pub(super) fn state_changed(&mut self, tier: Tier) {
        let state = self.health_mut(tier).map(|health| health.state().clone());
        *self.stats.state_changes.get_mut(tier) += 1;
        self.changes.push(StateChange {
            tier,
            state: state.unwrap_or(TierState::On),
        });
    }

    /// Lets go of what waits for a tier that is left alone, or not written any more.
    fn flush_if_down(&mut self, now: Duration, tier: Tier) {
        let Some(health) = self.health_mut(tier) else {
            return;
        };
        let (reads, writes) = (!health.left_alone(now), health.writable(now));
        if !writes {
            let queue = match tier {
                Tier::Disk => self.disk.as_mut().map(|disk| &mut disk.writes),
                Tier::Remote => self.remote.as_mut().map(|remote| &mut remote.writes),
                Tier::Device | Tier::Host => None,
            };
            let writes = queue.map_or(0, RunQueue::clear);
            self.dropped(Dropped::TierDown, writes);
        }
        if !reads {
            self.fail_queued_reads(now, tier);
        }
    }
}

const fn less_one(count: u32) -> u32 {
    if count > 1 { count - 1 } else { 1 }
}

impl fmt::Debug for Tiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tiers")
            .field("moves", &self.flights.len())
            .field("onboards", &self.onboards.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for TierPools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TierPools")
            .field("host", &self.host)
            .field("disk", &self.disk)
            .finish_non_exhaustive()
    }
}
