//! The leader: sends each move to all ranks and joins what they say.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use thiserror::Error;

use super::{
    RankLink, RankShape,
    codec::{Done, Message},
};
use crate::{
    fingerprint::Fingerprint,
    tier::{BlockOutcome, MoveKind, MoveReport, MoveSpec, Mover, Pending, TierFault},
};

/// Moves under way or not over, at most.
const FLIGHTS_MAX: usize = 256;
/// Earlier lives of a rank whose late greetings are ignored.
const OLD_EPOCHS: usize = 16;
/// A rank that owes an answer is asked this often.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// What a rank may take longer than the time of a move, to report the deadline itself.
const GRACE: Duration = Duration::from_millis(50);

/// Why leader and ranks did not come together.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RankError {
    /// Ranks are missing.
    #[error("ranks {missing:?} of {size} did not join within {waited:?}")]
    Missing {
        /// The ranks.
        missing: Vec<u32>,
        /// How many there are.
        size: u32,
        /// How long the leader waited.
        waited: Duration,
    },
    /// The leader does not take this rank.
    #[error("the leader refuses this rank: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
    },
    /// No answer of the leader.
    #[error("no welcome from the leader within {waited:?}")]
    NoLeader {
        /// How long the rank waited.
        waited: Duration,
    },
}

/// What the leader did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RankStats {
    /// Moves sent to all ranks.
    pub moves: u64,
    /// Moves that a rank did not answer in time, or was lost in.
    pub unanswered: u64,
    /// Answers of earlier sessions and moves, ignored.
    pub stale: u64,
    /// Ranks that joined, also again.
    pub joined: u64,
    /// Ranks that were lost.
    pub lost: u64,
    /// Moves under way, or whose bytes may still move.
    pub open: u64,
}

/// A mover that has every rank move its share of each block. Clones share it.
#[derive(Clone)]
pub struct RankedMover {
    shared: Arc<Shared>,
}

struct Shared {
    shape: RankShape,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    ranks: Vec<Rank>,
    flights: HashMap<u64, Flight>,
    next_id: u64,
    next_session: u64,
    stats: RankStats,
}

#[derive(Default)]
struct Rank {
    joined: Option<Joined>,
    old: VecDeque<u64>,
    /// It started anew: what the books say of its G1 is not true any more.
    device_lost: bool,
}

struct Joined {
    epoch: u64,
    attempt: u64,
    session: u64,
    link: Arc<dyn RankLink>,
    /// Gets no new moves: nothing is heard from it.
    lost: bool,
}

/// A move; one part for each rank.
struct Flight {
    parts: Vec<Part>,
}

enum Part {
    /// Sent in this session.
    Waiting {
        session: u64,
    },
    Answered(Done),
    /// It moves no byte, and never will.
    Gone(String),
}

impl Part {
    const fn quiet(&self) -> bool {
        match self {
            Self::Waiting { .. } => false,
            Self::Answered(done) => done.quiet,
            Self::Gone(_) => true,
        }
    }

    const fn session(&self) -> Option<u64> {
        match self {
            Self::Waiting { session } => Some(*session),
            Self::Answered(done) => Some(done.session),
            Self::Gone(_) => None,
        }
    }
}

impl RankedMover {
    /// A leader of `shape.fingerprint.tp_size` ranks that nobody has joined yet. `epoch` is a number
    /// that no other life of this leader has.
    #[must_use]
    pub fn new(shape: RankShape, epoch: u64) -> Self {
        let size = shape.fingerprint.tp_size.max(1) as usize;
        Self {
            shared: Arc::new(Shared {
                shape,
                state: Mutex::new(State {
                    ranks: std::iter::repeat_with(Rank::default).take(size).collect(),
                    flights: HashMap::new(),
                    next_id: 0,
                    next_session: epoch,
                    stats: RankStats::default(),
                }),
                changed: Condvar::new(),
            }),
        }
    }

    /// How many ranks there are.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.shared.shape.fingerprint.tp_size
    }

    /// Waits until all ranks have joined.
    ///
    /// # Errors
    /// Names the ranks that are missing.
    pub fn wait_ready(&self, timeout: Duration) -> Result<(), RankError> {
        let until = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        loop {
            let missing: Vec<u32> = (0..)
                .zip(&state.ranks)
                .filter(|(_, rank)| rank.ready().is_none())
                .map(|(rank, _)| rank)
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            if self
                .shared
                .changed
                .wait_until(&mut state, until)
                .timed_out()
            {
                return Err(RankError::Missing {
                    missing,
                    size: self.shared.shape.fingerprint.tp_size,
                    waited: timeout,
                });
            }
        }
    }

    /// Takes a message of a rank; `link` leads back to it. What is not understood is ignored.
    pub fn receive(&self, message: &[u8], link: &Arc<dyn RankLink>) {
        match Message::decode(message) {
            Some(Message::Hello {
                epoch,
                attempt,
                shape,
                ..
            }) => {
                let answer = match self.shared.refusal(&shape) {
                    Some(reason) => Some(Message::Refused { epoch, reason }),
                    None => self.shared.hello(epoch, attempt, &shape, link),
                };
                if let Some(Err(error)) = answer.map(|answer| link.send(answer.encode(), ASK_EVERY))
                {
                    // It greets again.
                    tracing::debug!(error, "a rank cannot be answered");
                }
            }
            Some(Message::Done(done)) => self.shared.done(done),
            Some(
                Message::Welcome { .. }
                | Message::Refused { .. }
                | Message::Run { .. }
                | Message::Ask { .. },
            )
            | None => {}
        }
    }

    /// Nothing is heard from this life of a rank: moves fail at once until it joins again. It may
    /// still copy what it was told to.
    pub fn lost(&self, rank: u32, epoch: u64) {
        let mut state = self.shared.state.lock();
        let joined = state.ranks.get_mut(rank as usize);
        let joined = joined.and_then(|rank| rank.joined.as_mut());
        if let Some(joined) = joined.filter(|joined| joined.epoch == epoch && !joined.lost) {
            joined.lost = true;
            state.stats.lost += 1;
            self.shared.changed.notify_all();
        }
    }

    /// This life of a rank has ended: it copies nothing any more.
    pub fn ended(&self, rank: u32, epoch: u64) {
        self.lost(rank, epoch);
        let mut state = self.shared.state.lock();
        let Some(known) = state.ranks.get_mut(rank as usize) else {
            return;
        };
        let ended = known.joined.take_if(|joined| joined.epoch == epoch);
        if let Some(ended) = ended {
            known.retire(epoch);
            state.settle(rank as usize, ended.session, "its process ended");
            self.shared.changed.notify_all();
        }
    }

    /// Whether a rank started anew since its G1 was last known to be empty: nothing is offloaded until
    /// [`Self::device_emptied`].
    #[must_use]
    pub fn device_lost(&self) -> bool {
        let state = self.shared.state.lock();
        state.ranks.iter().any(|rank| rank.device_lost)
    }

    /// The pool of G1 has no blocks of before any more. To be called after
    /// [`BlockPool::clear`](crate::BlockPool::clear), when nothing computes on older blocks.
    pub fn device_emptied(&self) {
        let mut state = self.shared.state.lock();
        for rank in &mut state.ranks {
            rank.device_lost = false;
        }
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> RankStats {
        let state = self.shared.state.lock();
        RankStats {
            open: state.flights.len() as u64,
            ..state.stats
        }
    }
}

impl Rank {
    fn ready(&self) -> Option<&Joined> {
        self.joined.as_ref().filter(|joined| !joined.lost)
    }

    /// Late greetings of this life are ignored from now on.
    fn retire(&mut self, epoch: u64) {
        if self.old.len() >= OLD_EPOCHS {
            self.old.pop_front();
        }
        self.old.push_back(epoch);
    }
}

impl State {
    /// What a rank was told in a session is over.
    fn settle(&mut self, rank: usize, session: u64, why: &str) {
        for flight in self.flights.values_mut() {
            if let Some(part) = flight.parts.get_mut(rank)
                && part.session() == Some(session)
            {
                match part {
                    Part::Waiting { .. } => *part = Part::Gone(why.to_owned()),
                    Part::Answered(done) => done.quiet = true,
                    Part::Gone(_) => {}
                }
            }
        }
    }
}

impl Shared {
    /// Why a rank of this shape cannot take part.
    fn refusal(&self, shape: &RankShape) -> Option<String> {
        let own = &self.shape;
        let rank = shape.fingerprint.tp_rank;
        let expected = Fingerprint {
            tp_rank: rank,
            ..own.fingerprint
        };
        if shape.fingerprint != expected || rank >= own.fingerprint.tp_size {
            return Some(format!(
                "it has {}; the leader has {}",
                shape.fingerprint, own.fingerprint
            ));
        }
        [
            ("G1", shape.device_blocks, own.device_blocks),
            ("G2", shape.host_blocks, own.host_blocks),
            ("G3", shape.disk_blocks, own.disk_blocks),
        ]
        .into_iter()
        .find(|(_, got, expected)| got != expected)
        .map(|(tier, got, expected)| {
            format!("it has {got} blocks in {tier}; the leader has {expected}")
        })
    }

    fn hello(
        &self,
        epoch: u64,
        attempt: u64,
        shape: &RankShape,
        link: &Arc<dyn RankLink>,
    ) -> Option<Message> {
        let mut state = self.state.lock();
        let State {
            ranks,
            next_session,
            stats,
            ..
        } = &mut *state;
        let number = shape.fingerprint.tp_rank as usize;
        let rank = ranks.get_mut(number)?;
        if rank.old.contains(&epoch) {
            stats.stale += 1;
            return None;
        }
        let before = match &mut rank.joined {
            Some(joined) if joined.epoch == epoch && attempt < joined.attempt => {
                stats.stale += 1;
                return None;
            }
            Some(joined) if joined.epoch == epoch && attempt == joined.attempt => {
                // Repeated, or heard from again: it still knows what it was told.
                if std::mem::take(&mut joined.lost) {
                    joined.link = Arc::clone(link);
                    stats.joined += 1;
                    self.changed.notify_all();
                }
                return Some(Message::Welcome {
                    epoch,
                    attempt,
                    session: joined.session,
                });
            }
            before => before.as_ref().map(|joined| (joined.epoch, joined.session)),
        };
        *next_session = next_session.wrapping_add(1);
        let session = *next_session;
        rank.joined = Some(Joined {
            epoch,
            attempt,
            session,
            link: Arc::clone(link),
            lost: false,
        });
        stats.joined += 1;
        if let Some((old, _)) = before.filter(|(old, _)| *old != epoch) {
            rank.retire(old);
        }
        // Lives that ended were retired when they did.
        rank.device_lost |= !rank.old.is_empty() && before.is_none_or(|(old, _)| old != epoch);
        if let Some((_, ended)) = before {
            // It greets when what it was told before is over; another life of it took its place.
            state.settle(number, ended, "it joined anew");
        }
        tracing::info!(rank = number, epoch, attempt, "rank joined");
        self.changed.notify_all();
        Some(Message::Welcome {
            epoch,
            attempt,
            session,
        })
    }

    fn done(&self, done: Done) {
        let mut state = self.state.lock();
        let State { flights, stats, .. } = &mut *state;
        let part = flights.get_mut(&done.id);
        let part = part.and_then(|flight| flight.parts.get_mut(done.rank as usize));
        match part {
            Some(part) if part.session() == Some(done.session) => match part {
                // The first answer counts; later ones say when it is quiet.
                Part::Answered(known) => known.quiet |= done.quiet,
                Part::Waiting { .. } | Part::Gone(_) => *part = Part::Answered(done),
            },
            _ => stats.stale += 1,
        }
        self.changed.notify_all();
    }

    /// Tells all ranks; the number of the move, or why it cannot be done.
    fn send(&self, spec: &MoveSpec) -> Result<u64, String> {
        let mut state = self.state.lock();
        if state.flights.len() >= FLIGHTS_MAX {
            return Err(format!("{FLIGHTS_MAX} moves of all ranks are not over"));
        }
        let mut links = Vec::with_capacity(state.ranks.len());
        for (number, rank) in state.ranks.iter().enumerate() {
            let joined = rank.ready();
            let joined = joined.ok_or_else(|| format!("rank {number} is not there"))?;
            if rank.device_lost && spec.kind == MoveKind::DeviceToHost {
                return Err(format!(
                    "rank {number} started anew, and what its G1 had is gone"
                ));
            }
            links.push((joined.session, Arc::clone(&joined.link)));
        }
        let id = state.next_id;
        state.next_id += 1;
        state.stats.moves += 1;
        let waiting = |(session, _): &(u64, _)| Part::Waiting { session: *session };
        let parts = links.iter().map(waiting).collect();
        state.flights.insert(id, Flight { parts });
        drop(state);
        for (rank, (session, link)) in links.into_iter().enumerate() {
            let message = Message::Run {
                session,
                id,
                spec: spec.clone(),
            };
            if let Err(reason) = link.send(message.encode(), spec.time) {
                let mut state = self.state.lock();
                let flight = state.flights.get_mut(&id);
                if let Some(part) = flight.and_then(|flight| flight.parts.get_mut(rank))
                    && matches!(part, Part::Waiting { .. })
                {
                    *part = Part::Gone(reason);
                }
            }
        }
        Ok(id)
    }

    /// Asks those that owe an answer.
    fn ask(&self, id: u64) {
        let mut asked = Vec::new();
        let state = self.state.lock();
        let parts = state.flights.get(&id).map(|flight| &flight.parts);
        for (rank, part) in state.ranks.iter().zip(parts.into_iter().flatten()) {
            if let (Some(joined), Some(session), false) =
                (&rank.joined, part.session(), part.quiet())
            {
                asked.push((Arc::clone(&joined.link), session));
            }
        }
        drop(state);
        for (link, session) in asked {
            if let Err(error) = link.send(Message::Ask { session, id }.encode(), ASK_EVERY) {
                tracing::debug!(error, "a rank cannot be asked");
            }
        }
    }

    /// Waits until no rank moves a byte of it any more.
    fn wait_quiet(&self, id: u64) {
        loop {
            self.ask(id);
            let until = Instant::now() + ASK_EVERY;
            let mut state = self.state.lock();
            let over = |state: &State| {
                let flight = state.flights.get(&id);
                flight.is_none_or(|flight| flight.parts.iter().all(Part::quiet))
            };
            while !over(&state) {
                if self.changed.wait_until(&mut state, until).timed_out() {
                    break;
                }
            }
            if over(&state) {
                state.flights.remove(&id);
                return;
            }
        }
    }

    /// What all ranks said, or did not say until `deadline`.
    fn join(
        &self,
        id: u64,
        blocks: usize,
        deadline: Instant,
    ) -> (MutexGuard<'_, State>, MoveReport, bool) {
        let mut state = self.state.lock();
        let open = |state: &State| {
            let flight = state.flights.get(&id);
            let waits = |part: &Part| matches!(part, Part::Waiting { .. });
            flight.is_some_and(|flight| flight.parts.iter().any(waits))
        };
        while open(&state) {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        let mut report = MoveReport::moved(blocks, 0);
        let (mut unanswered, mut quiet) = (false, true);
        let parts = state.flights.get(&id).map(|flight| flight.parts.as_slice());
        for (rank, part) in parts.unwrap_or_default().iter().enumerate() {
            quiet &= part.quiet();
            let silent = |reason: &str| BlockOutcome::Failed(format!("rank {rank}: {reason}"));
            match part {
                Part::Answered(done) => {
                    report.bytes += done.bytes;
                    // One that is off is worse than one that is read-only.
                    if !matches!(report.fault, Some(TierFault::Off(_))) {
                        report.fault = done.fault.clone().or_else(|| report.fault.take());
                    }
                    for (at, worst) in report.outcomes.iter_mut().enumerate() {
                        let said = done.outcomes.get(at).cloned();
                        let said = said.unwrap_or_else(|| silent("it was not done"));
                        worsen(worst, said);
                    }
                }
                Part::Waiting { .. } | Part::Gone(_) => {
                    unanswered = true;
                    let outcome = match part {
                        Part::Gone(reason) => silent(reason),
                        Part::Waiting { .. } | Part::Answered(_) => silent("no answer in time"),
                    };
                    for worst in &mut report.outcomes {
                        worsen(worst, outcome.clone());
                    }
                }
            }
        }
        state.stats.unanswered += u64::from(unanswered);
        (state, report, quiet)
    }
}

impl Mover for RankedMover {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        let deadline = Instant::now() + spec.time + GRACE;
        let id = match self.shared.send(spec) {
            Ok(id) => id,
            Err(reason) => return MoveReport::failed(spec.blocks.len(), &reason),
        };
        let (mut state, mut report, quiet) = self.shared.join(id, spec.blocks.len(), deadline);
        if quiet {
            state.flights.remove(&id);
        } else {
            let shared = Arc::clone(&self.shared);
            report.pending = Some(Pending::new(move || shared.wait_quiet(id)));
        }
        report
    }
}

/// Keeps the worse of two outcomes: a block counts as moved only if all ranks moved it, and is
/// forgotten everywhere if one rank's share of it is wrong.
fn worsen(worst: &mut BlockOutcome, other: BlockOutcome) {
    let badness = |outcome: &BlockOutcome| match outcome {
        BlockOutcome::Moved => 0,
        BlockOutcome::Failed(_) => 1,
        BlockOutcome::Bad(_) => 2,
        BlockOutcome::Invalid(_) => 3,
    };
    if badness(&other) > badness(worst) {
        *worst = other;
    }
}

impl fmt::Debug for RankedMover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RankedMover")
            .field("shape", &self.shared.shape)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
