//! The worker's side: holds, loads and saves of one rank.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_protocol::{BlockId, SequenceHash, TokenBlock};
use parking_lot::{Condvar, Mutex};

use crate::tier::{OnboardTicket, Onboarded, PerTier, RankTiers, Saved, TierMatch};

/// Bounds of what an engine may leave lying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExternalConfig {
    /// How long what a lookup found is held for its load. Default 30 s.
    pub hold_time: Duration,
    /// Lookups that hold something, at most; the oldest is let go first. Default 1,024.
    pub holds_max: usize,
    /// Time a load may take; what is not there then is computed. Default 30 s.
    pub load_time: Duration,
}

impl Default for ExternalConfig {
    fn default() -> Self {
        Self {
            hold_time: Duration::from_secs(30),
            holds_max: 1024,
            load_time: Duration::from_secs(30),
        }
    }
}

/// A question for the tiers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LookupRequest {
    /// What an earlier lookup for the same request holds, which is let go; 0 for nothing.
    pub replaces: u64,
    /// Whether the request asks for the first time: some admission rules count that.
    pub first: bool,
    /// Name of the block before the first one, if it does not begin the sequence.
    pub parent: Option<SequenceHash>,
    /// Names of consecutive blocks.
    pub names: Vec<TokenBlock>,
}

/// An answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lookup {
    /// Names what is held for the load; 0 when nothing was found.
    pub hold: u64,
    /// Leading blocks that were found, by their tier.
    pub from: PerTier<u32>,
}

/// Something that was begun is over: none of its blocks of G1 is read or written any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A load.
    Load {
        /// Given with it.
        key: u64,
        /// What was loaded, and why not all.
        end: Onboarded,
    },
    /// A save.
    Save {
        /// Given with it.
        key: u64,
        /// What became of its blocks.
        end: Saved,
    },
}

/// The tiers as the worker of an engine uses them that keeps the books of its G1 itself. Clones
/// share it.
#[derive(Clone)]
pub struct ExternalRank {
    shared: Arc<Shared>,
}

struct Shared {
    tiers: RankTiers,
    config: ExternalConfig,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    last_hold: u64,
    holds: BTreeMap<u64, (Instant, TierMatch)>,
    loads: HashMap<u64, Option<OnboardTicket>>,
    saves: usize,
    ended: Vec<Ended>,
    /// Tickets of loads that ended.
    over: Vec<OnboardTicket>,
}

impl Lookup {
    /// Blocks that were found.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.from.host + self.from.disk + self.from.remote
    }
}

impl ExternalRank {
    /// Of a rank that was attached by
    /// [`TierManager::attach_external`](crate::TierManager::attach_external).
    #[must_use]
    pub fn new(tiers: RankTiers, config: ExternalConfig) -> Self {
        Self {
            shared: Arc::new(Shared {
                tiers,
                config,
                state: Mutex::default(),
                changed: Condvar::new(),
            }),
        }
    }

    /// The longest run of the names that is below G1. It is held until it is loaded, let go, replaced,
    /// or [too old](ExternalConfig::hold_time).
    #[must_use]
    pub fn lookup(&self, request: &LookupRequest) -> Lookup {
        if request.first {
            self.shared.tiers.referenced(&request.names);
        }
        let found = self.shared.tiers.find_after(request.parent, &request.names);
        let from = found.tiers();
        let now = Instant::now();
        let mut state = self.shared.state.lock();
        let mut gone = state.expired(now, self.shared.config.hold_time);
        gone.extend(state.holds.remove(&request.replaces));
        let mut hold = 0;
        if !found.is_empty() {
            if state.holds.len() >= self.shared.config.holds_max {
                gone.extend(state.holds.pop_first().map(|(_, held)| held));
            }
            state.last_hold += 1;
            hold = state.last_hold;
            state.holds.insert(hold, (now, found));
        }
        drop(state);
        drop(gone);
        Lookup { hold, from }
    }

    /// Lets go of what a lookup holds.
    pub fn release(&self, hold: u64) {
        let held = self.shared.state.lock().holds.remove(&hold);
        drop(held);
    }

    /// Brings the leading blocks of what a lookup found into `targets` of G1, one for each name. If it
    /// is not held any more, it is looked for again. Ends as [`Ended::Load`] with `key`, also when
    /// nothing is found.
    ///
    /// `names` are those that were asked for, or fewer.
    pub fn load(&self, key: u64, hold: u64, request: &LookupRequest, targets: &[BlockId]) {
        let names = &request.names[..request.names.len().min(targets.len())];
        let held = self.shared.state.lock().holds.remove(&hold);
        let same = |found: &TierMatch| {
            let held = found.blocks().map(|(name, _)| name);
            found.len() == names.len() && held.eq(names.iter().map(|name| name.sequence))
        };
        let found = held.map(|(_, found)| found).filter(same);
        let found = found.unwrap_or_else(|| self.shared.tiers.find_after(request.parent, names));
        let (used, rest) = targets.split_at(found.missing_targets().min(targets.len()));
        let rest = rest.to_vec();
        self.shared.state.lock().loads.insert(key, None);
        let shared = Arc::downgrade(&self.shared);
        let done = Box::new(move |mut end: Onboarded| {
            if let Some(shared) = shared.upgrade() {
                end.not_loaded.extend(rest);
                shared.ended(Ended::Load { key, end });
            }
        });
        let within = self.shared.config.load_time;
        let ticket = self
            .shared
            .tiers
            .onboard(found, used.to_vec(), within, done);
        let mut state = self.shared.state.lock();
        let over = match state.loads.get_mut(&key) {
            Some(place) => {
                *place = Some(ticket);
                None
            }
            // It ended meanwhile.
            None => Some(ticket),
        };
        drop(state);
        drop(over);
    }

    /// Calls a load off. It still ends as [`Ended::Load`].
    pub fn cancel(&self, key: u64) {
        let ticket = {
            let mut state = self.shared.state.lock();
            state.loads.get_mut(&key).and_then(Option::take)
        };
        // Dropping the ticket calls it off.
        drop(ticket);
    }

    /// Has computed blocks of G1 copied away: consecutive ones of a sequence, each with its id.
    /// `parent` names the block before the first. Ends as [`Ended::Save`] with `key`.
    pub fn save(
        &self,
        key: u64,
        parent: Option<SequenceHash>,
        blocks: &[(TokenBlock, BlockId)],
        priority: Option<u32>,
    ) {
        self.shared.state.lock().saves += 1;
        let shared = Arc::downgrade(&self.shared);
        let done = Box::new(move |end| {
            if let Some(shared) = shared.upgrade() {
                shared.ended(Ended::Save { key, end });
            }
        });
        self.shared.tiers.save(parent, blocks, priority, done);
    }

    /// What ended since the last call.
    #[must_use]
    pub fn ended(&self) -> Vec<Ended> {
        let mut state = self.shared.state.lock();
        let ended = std::mem::take(&mut state.ended);
        let over = std::mem::take(&mut state.over);
        drop(state);
        drop(over);
        ended
    }

    /// The same, once something has; nothing after `timeout`.
    #[must_use]
    pub fn wait_ended(&self, timeout: Duration) -> Vec<Ended> {
        let until = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        while state.ended.is_empty() {
            if self
                .shared
                .changed
                .wait_until(&mut state, until)
                .timed_out()
            {
                break;
            }
        }
        drop(state);
        self.ended()
    }

    /// Loads and saves that have not ended.
    #[must_use]
    pub fn open(&self) -> usize {
        let state = self.shared.state.lock();
        state.loads.len() + state.saves
    }
}

impl Shared {
    fn ended(&self, ended: Ended) {
        let mut state = self.state.lock();
        let ticket = match &ended {
            Ended::Load { key, .. } => state.loads.remove(key).flatten(),
            Ended::Save { .. } => {
                state.saves -= 1;
                None
            }
        };
        // It is not to be dropped where its end is told.
        state.over.extend(ticket);
        state.ended.push(ended);
        self.changed.notify_all();
    }
}

impl State {
    fn expired(&mut self, now: Instant, time: Duration) -> Vec<(Instant, TierMatch)> {
        let mut gone = Vec::new();
        while let Some(oldest) = self.holds.first_entry()
            && now.saturating_duration_since(oldest.get().0) >= time
        {
            gone.push(oldest.remove());
        }
        gone
    }
}

impl fmt::Debug for ExternalRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.lock();
        f.debug_struct("ExternalRank")
            .field("tiers", &self.shared.tiers)
            .field("holds", &state.holds.len())
            .field("loads", &state.loads.len())
            .field("saves", &state.saves)
            .finish_non_exhaustive()
    }
}
