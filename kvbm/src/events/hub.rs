//! One numbered stream of events over the pools of one rank.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::Waker,
    time::{Duration, Instant},
};

use blockplane_protocol::{DpRank, KvEvent, SequenceHash, SnapshotBlock, StoredBlock, Tier};
use thiserror::Error;

use super::{EventFeed, KvSnapshot, present::Present, ring::Ring, writer::Told};
use crate::{
    pool::{Shared, lock_all},
    sync::{Condvar, Mutex, wait_until},
};

/// Blocks named in one batch, so that a batch stays far below the size limit of a message.
const BATCH_WEIGHT_MAX: usize = 8_192;
/// Pools that one hub joins at most: there are four tiers.
pub const HUB_POOLS_MAX: usize = 6;

/// One numbered stream of events over several pools: the tiers in which one rank finds blocks.
///
/// A pool tells its hubs of a change before anybody else can see it, so the numbers are in the order
/// of the changes, and a snapshot is what the pools hold at one number. A hub ends when one of its
/// pools is gone.
pub struct EventHub {
    rank: DpRank,
    mode: Consolidation,
    state: Mutex<State>,
    arrived: Condvar,
    subscribers: AtomicU64,
}

/// What a hub says of a block that several of its pools hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consolidation {
    /// `Stored` when the first pool gets the block, under that pool's tier; `Removed` when the last
    /// loses it, under the tier that it was announced with. Needs 11 to 23 bytes for each block of
    /// the pools together.
    #[default]
    Dedup,
    /// Every change of every pool, under its tier.
    Passthrough,
}

/// Why a pool could not join a hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum JoinError {
    /// One of the pools of the hub is gone.
    #[error("the event hub of rank {rank} has ended: one of its pools is gone")]
    Ended {
        /// The hub's rank.
        rank: u32,
    },
    /// The hub has [`HUB_POOLS_MAX`] pools.
    #[error(
        "the event hub of rank {rank} has {HUB_POOLS_MAX} pools, which is the most it can have"
    )]
    Full {
        /// The hub's rank.
        rank: u32,
    },
}

#[derive(Debug)]
struct State {
    ring: Ring,
    sources: Vec<Source>,
    /// Who holds what; only where two pools may hold the same.
    present: Option<Present>,
    /// What a writer told; empty where pools are the sources.
    told: Told,
    /// At most one per subscription.
    wakers: Vec<(SubscriberId, Waker)>,
    closed: bool,
}

/// A pool whose changes are told here.
#[derive(Debug)]
struct Source {
    pool: std::sync::Weak<Shared>,
    tier: Tier,
}

/// A pool's place in a hub.
#[derive(Clone, Debug)]
pub(crate) struct Membership {
    pub(crate) hub: Arc<EventHub>,
    /// Its index in `sources`.
    source: u8,
}

/// What changed in a pool.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change<'a> {
    Stored(&'a [(Option<SequenceHash>, StoredBlock)]),
    Removed(&'a [SequenceHash]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SubscriberId(u64);

/// What there is for a subscriber.
#[derive(Debug)]
pub(super) enum Take {
    Events(Vec<KvEvent>),
    /// The event after the one it saw is not in the ring.
    TooFarBehind,
    Nothing,
    Closed,
}

/// Tasks to wake once no lock is held: waking runs code that is not ours.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Wakeups(Vec<Waker>);

impl EventHub {
    /// A hub that no pool has joined yet. `events_max` is as in
    /// [`PoolConfig`](crate::PoolConfig::events_max).
    #[must_use]
    pub fn new(rank: DpRank, events_max: usize, mode: Consolidation) -> Arc<Self> {
        Arc::new(Self {
            rank,
            mode,
            state: Mutex::new(State {
                ring: Ring::new(events_max),
                sources: Vec::new(),
                present: None,
                told: Told::default(),
                wakers: Vec::new(),
                closed: false,
            }),
            arrived: Condvar::new(),
            subscribers: AtomicU64::new(0),
        })
    }

    /// A hub whose only source is the [`EventWriter`](super::EventWriter) that made it.
    pub(super) fn told(rank: DpRank, events_max: usize) -> Arc<Self> {
        Self::new(rank, events_max, Consolidation::Passthrough)
    }

    /// A writer's change: of what is told, and the events that say so.
    pub(super) fn tell(&self, change: impl FnOnce(&mut Ring, &mut Told)) {
        let mut state = self.state.lock();
        let State { ring, told, .. } = &mut *state;
        change(ring, told);
        let wakeups = state.take_wakers();
        drop(state);
        self.arrived.notify_all();
        wakeups.fire();
    }

    /// What a writer told.
    pub(super) fn with_told<R>(&self, look: impl FnOnce(&Told) -> R) -> R {
        look(&self.state.lock().told)
    }

    /// A hub that tells nothing and has ended.
    pub(crate) fn ended(rank: DpRank) -> Arc<Self> {
        let hub = Self::new(rank, 0, Consolidation::Passthrough);
        hub.close();
        hub
    }

    /// The events. A feed does not keep the pools alive.
    #[must_use]
    pub fn feed(self: &Arc<Self>) -> EventFeed {
        EventFeed::new(Arc::clone(self))
    }

    /// Lets `pool` tell its changes here. What it holds already is told to subscribers by a
    /// snapshot. False when it is a member already.
    pub(crate) fn join(self: &Arc<Self>, pool: &Arc<Shared>) -> Result<bool, JoinError> {
        let rank = self.rank.0;
        loop {
            let members = self.members().ok_or(JoinError::Ended { rank })?;
            if members.iter().any(|member| Arc::ptr_eq(member, pool)) {
                return Ok(false);
            }
            if members.len() == HUB_POOLS_MAX {
                return Err(JoinError::Full { rank });
            }
            let mut all = members.clone();
            all.push(Arc::clone(pool));
            let mut books = lock_all(&all);
            let mut state = self.state.lock();
            if state.closed {
                return Err(JoinError::Ended { rank });
            }
            if state.sources.len() != members.len() {
                continue;
            }
            let source = u8::try_from(members.len()).expect("at most HUB_POOLS_MAX");
            state.sources.push(Source {
                pool: Arc::downgrade(pool),
                tier: pool.tier(),
            });
            if self.mode == Consolidation::Dedup && source == 1 {
                let mut present = Present::default();
                present.store_all(0, members[0].tier(), books[0].store.names());
                state.present = Some(present);
            }
            let joining = books.last_mut().expect("it was pushed");
            if let Some(present) = &mut state.present {
                present.store_all(source, pool.tier(), joining.store.names());
            }
            joining.memberships.push(Membership {
                hub: Arc::clone(self),
                source,
            });
            let wakeups = if joining.store.names().len() > 0 {
                state.ring.skip();
                state.take_wakers()
            } else {
                Wakeups::default()
            };
            drop(state);
            drop(books);
            self.arrived.notify_all();
            wakeups.fire();
            return Ok(true);
        }
    }

    pub(super) fn subscriber_id(&self) -> SubscriberId {
        SubscriberId(self.subscribers.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn last_id(&self) -> u64 {
        self.state.lock().ring.last_id()
    }

    /// What the pools hold now, and the event it is the state after; `None` when one of them is
    /// gone.
    pub(super) fn snapshot(&self) -> Option<KvSnapshot> {
        let (last_event_id, held, present, told) = loop {
            let members = self.members()?;
            let books = lock_all(&members);
            let state = self.state.lock();
            if state.sources.len() != members.len() {
                continue;
            }
            let held: Vec<Vec<SnapshotBlock>> = (books.iter().zip(&members))
                .map(|(books, member)| {
                    let mut held = Vec::with_capacity(books.store.names().len());
                    held.extend(books.store.published(member.tier()));
                    held
                })
                .collect();
            let (present, told) = (state.present.clone(), state.told.clone());
            break (state.ring.last_id(), held, present, told);
        };
        // Only copies are made while all wait; what is looked up is looked up here.
        let mut blocks: Vec<SnapshotBlock> = match present {
            None => held.concat(),
            Some(present) => (0..)
                .zip(held)
                .flat_map(|(source, held)| held.into_iter().map(move |block| (source, block)))
                .filter_map(|(source, block)| {
                    let tier = present.first_of(block.block.sequence, source)?;
                    Some(SnapshotBlock { tier, ..block })
                })
                .collect(),
        };
        blocks.extend(told.published());
        Some(KvSnapshot::sorted(last_event_id, &blocks))
    }

    /// No event will come any more.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let wakeups = state.take_wakers();
        drop(state);
        self.arrived.notify_all();
        wakeups.fire();
    }

    pub(super) fn take_or_wake(
        &self,
        seen: Option<u64>,
        subscriber: SubscriberId,
        waker: &Waker,
    ) -> Take {
        // Cloned before and dropped after the lock is held: wakers run code that is not ours.
        let waker = waker.clone();
        let mut state = self.state.lock();
        let take = self.take(&state, seen);
        let replaced = match take {
            Take::Nothing => state.set_waker(subscriber, Some(waker)),
            Take::Events(_) | Take::TooFarBehind | Take::Closed => None,
        };
        drop(state);
        drop(replaced);
        take
    }

    pub(super) fn take_within(&self, seen: Option<u64>, timeout: Duration) -> Take {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock();
        loop {
            let take = self.take(&state, seen);
            if !matches!(take, Take::Nothing) || wait_until(&self.arrived, &mut state, deadline) {
                return take;
            }
        }
    }

    pub(super) fn forget_waker(&self, subscriber: SubscriberId) {
        let forgotten = self.state.lock().set_waker(subscriber, None);
        drop(forgotten);
    }

    /// The pools in the order in which they joined; `None` when one of them is gone.
    fn members(&self) -> Option<Vec<Arc<Shared>>> {
        let state = self.state.lock();
        let pools = state.sources.iter().map(|source| source.pool.upgrade());
        // Those that are upgraded must not go under the lock: their end takes it.
        let pools: Vec<Option<Arc<Shared>>> = pools.collect();
        let closed = state.closed;
        drop(state);
        pools.into_iter().collect::<Option<_>>().filter(|_| !closed)
    }

    fn take(&self, state: &State, seen: Option<u64>) -> Take {
        let Some(seen) = seen else {
            return Take::TooFarBehind;
        };
        if seen == state.ring.last_id() {
            return if state.closed {
                Take::Closed
            } else {
                Take::Nothing
            };
        }
        seen.checked_add(1)
            .and_then(|first| state.ring.batch(first, self.rank, BATCH_WEIGHT_MAX))
            .map_or(Take::TooFarBehind, Take::Events)
    }
}

impl Membership {
    /// Tells the hub of a change. The pool's lock is held, so numbers are in the order of the
    /// changes. False when the hub has ended.
    pub(crate) fn tell(&self, change: Change<'_>, wakeups: &mut Wakeups) -> bool {
        self.update(wakeups, |state, source| match change {
            Change::Stored(stored) => state.stored(source, stored),
            Change::Removed(names) => state.removed(source, names),
        })
    }

    /// All that the pool held is gone. False when the hub has ended.
    pub(crate) fn tell_cleared(
        &self,
        names: impl Iterator<Item = SequenceHash>,
        wakeups: &mut Wakeups,
    ) -> bool {
        self.update(wakeups, |state, source| {
            if state.sources.len() == 1 {
                state.ring.push_cleared();
            } else {
                // What the others hold remains.
                if let Some(present) = &mut state.present {
                    names.for_each(|name| {
                        present.remove(source, name);
                    });
                }
                state.ring.skip();
            }
        })
    }

    /// The pool got more at once than is told one by one. False when the hub has ended.
    pub(crate) fn tell_restored(
        &self,
        names: impl Iterator<Item = SequenceHash>,
        wakeups: &mut Wakeups,
    ) -> bool {
        self.update(wakeups, |state, source| {
            let tier = state.sources[usize::from(source)].tier;
            if let Some(present) = &mut state.present {
                present.store_all(source, tier, names);
            }
            state.ring.skip();
        })
    }

    fn update(&self, wakeups: &mut Wakeups, change: impl FnOnce(&mut State, u8)) -> bool {
        let mut state = self.hub.state.lock();
        if state.closed {
            return false;
        }
        change(&mut state, self.source);
        wakeups.0.append(&mut state.take_wakers().0);
        drop(state);
        self.hub.arrived.notify_all();
        true
    }
}

impl State {
    fn stored(&mut self, source: u8, stored: &[(Option<SequenceHash>, StoredBlock)]) {
        let tier = self.sources[usize::from(source)].tier;
        match &mut self.present {
            None => push_runs(&mut self.ring, stored, tier),
            Some(present) => {
                let first =
                    |(_, block): &&(_, StoredBlock)| present.store(source, tier, block.sequence);
                let new: Vec<_> = stored.iter().filter(first).copied().collect();
                push_runs(&mut self.ring, &new, tier);
            }
        }
    }

    fn removed(&mut self, source: u8, names: &[SequenceHash]) {
        let tier = self.sources[usize::from(source)].tier;
        match &mut self.present {
            None => self.ring.push_removed(names.iter().copied(), tier),
            Some(present) => {
                let last = |&name| Some((present.remove(source, name)?, name));
                let gone: Vec<(Tier, SequenceHash)> = names.iter().filter_map(last).collect();
                for run in gone.chunk_by(|(before, _), (tier, _)| before == tier) {
                    let names = run.iter().map(|(_, name)| *name);
                    self.ring.push_removed(names, run[0].0);
                }
            }
        }
    }

    fn take_wakers(&mut self) -> Wakeups {
        Wakeups(self.wakers.drain(..).map(|(_, waker)| waker).collect())
    }

    /// Replaces the waker of a subscriber; returns the one it had.
    fn set_waker(&mut self, subscriber: SubscriberId, waker: Option<Waker>) -> Option<Waker> {
        let place = self.wakers.iter().position(|(id, _)| *id == subscriber);
        let had = place.map(|place| self.wakers.swap_remove(place).1);
        self.wakers.extend(waker.map(|waker| (subscriber, waker)));
        had
    }
}

/// One `Stored` event for each run of blocks that follow one another.
fn push_runs(ring: &mut Ring, stored: &[(Option<SequenceHash>, StoredBlock)], tier: Tier) {
    for run in stored.chunk_by(|(_, before), (parent, _)| *parent == Some(before.sequence)) {
        ring.push_stored(run[0].0, run.iter().map(|(_, block)| *block), tier);
    }
}

impl Wakeups {
    pub(crate) fn fire(self) {
        self.0.into_iter().for_each(Waker::wake);
    }
}

impl fmt::Debug for EventHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventHub")
            .field("rank", &self.rank.0)
            .field("mode", &self.mode)
            .field("last_event_id", &self.last_id())
            .finish_non_exhaustive()
    }
}
