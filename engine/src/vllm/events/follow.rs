//! Follows one publisher: what to believe, what is missing, what to ask for. No I/O and no clock.
//!
//! vLLM numbers its batches from 0 and keeps the last ones (10,000 by default) for those who missed
//! some. What is asked for and what comes back:
//!
//! | when | asked for | then |
//! |---|---|---|
//! | first connection | everything, from 0 | complete if it starts at 0, partial if older ones are gone |
//! | connected again | from the last one that is known | the same one comes back: the same vLLM, go on; otherwise a new vLLM: forget all, from 0 |
//! | a number is missing, or nothing came for a while | from that one | repaired; or no longer kept: forget all, partial |
//! | a block follows one that a complete view does not have | everything, from 0 | as on the first connection |
//!
//! Everything that is told is true at any time: what cannot be known is not told.

use std::time::{Duration, Instant};

use blockplane_kvbm::EventWriter;
use blockplane_protocol::{DpRank, Tier};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    chain::{Chain, Outcome},
    status::{Confidence, EventsStatus},
    wire::{Batch, Event},
};

/// Answers that bring nothing new before a gap is given up.
const ROUNDS_MAX: u32 = 3;
/// Between two resynchronisations because of an unknown block, at first and at most.
const RESYNC_PAUSE: Duration = Duration::from_secs(1);
const RESYNC_PAUSE_MAX: Duration = Duration::from_secs(300);

/// What is known of one rank of one vLLM.
#[derive(Debug)]
pub(super) struct Follower {
    chain: Chain,
    writer: EventWriter,
    /// Whether missed batches can be asked for.
    has_replay: bool,
    /// Number of the batch that is due; `None` before it is known.
    next: Option<u64>,
    /// Digest of the last batch taken in, which has the number before `next`.
    last: Option<u64>,
    /// Highest number that came on this connection without being asked for.
    live: Option<u64>,
    asking: Option<Asking>,
    /// Came after a gap, and waits for its repair.
    held: Option<(u64, Vec<u8>)>,
    /// Seen: a block that should be known and is not.
    doubt: bool,
    resync_at: Option<Instant>,
    resync_pause: Duration,
    status: EventsStatus,
}

/// What has to be asked of vLLM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Nothing,
    /// All batches from this number on.
    Replay(u64),
}

#[derive(Clone, Copy, Debug)]
struct Asking {
    purpose: Purpose,
    /// Nothing of the present answer has come yet.
    first: bool,
    /// What was due when the answer began, to see progress.
    due: Option<u64>,
    rounds: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// All there is.
    Fresh,
    /// The last known one and what follows.
    Resume,
    /// What is missing.
    Repair,
}

impl Follower {
    pub(super) fn new(rank: DpRank, chain: Chain, writer: EventWriter, has_replay: bool) -> Self {
        let status = EventsStatus {
            rank,
            block_tokens: chain.block_tokens(),
            ..EventsStatus::default()
        };
        Self {
            chain,
            writer,
            has_replay,
            next: None,
            last: None,
            live: None,
            asking: None,
            held: None,
            doubt: false,
            resync_at: None,
            resync_pause: RESYNC_PAUSE,
            status,
        }
    }

    pub(super) fn status(&self) -> EventsStatus {
        EventsStatus {
            last_sequence: self.next.and_then(|next| next.checked_sub(1)),
            blocks: self.writer.blocks(),
            ..self.status.clone()
        }
    }

    /// Batches come from now on.
    pub(super) fn connected(&mut self) -> Ask {
        self.status.connected = true;
        self.status.counters.connections += 1;
        self.live = None;
        if self.has_replay {
            return self.resume();
        }
        if self.next.take().is_some() {
            self.forget("the connection was lost, and there is no replay endpoint");
        }
        Ask::Nothing
    }

    /// No more batches come.
    pub(super) fn disconnected(&mut self, reason: &str) {
        self.status.connected = false;
        self.status.error = Some(reason.to_owned());
    }

    /// Nothing came for a while: perhaps the last one was lost, which nothing else would tell.
    pub(super) fn idle(&mut self) -> Ask {
        match self.next {
            _ if !self.has_replay => Ask::Nothing,
            // The connection stood all the time, so it is the same vLLM.
            Some(_) => self.ask(Purpose::Repair),
            None => self.ask(Purpose::Fresh),
        }
    }

    /// A batch that came without being asked for.
    pub(super) fn live(&mut self, number: u64, payload: &[u8], now: Instant) -> Ask {
        let ascends = self.live.is_none_or(|before| number > before);
        self.live = Some(number);
        if !ascends {
            self.forget("vLLM's numbers start over");
            self.next = None;
            if self.has_replay {
                return self.ask(Purpose::Fresh);
            }
        }
        match self.next {
            None => {
                self.begin(number);
                self.take(number, payload);
            }
            Some(next) if number < next => {}
            Some(next) if number == next => self.take(number, payload),
            Some(next) => {
                self.status.counters.gaps += 1;
                tracing::warn!(
                    rank = self.status.rank.0,
                    missing = next,
                    got = number,
                    "KV events of vLLM are missing"
                );
                self.held = Some((number, payload.to_vec()));
                if self.has_replay {
                    return self.ask(Purpose::Repair);
                }
                self.give_up();
            }
        }
        self.resync_if_due(now)
    }

    /// A batch of the answer. [`Ask::Replay`] ends this answer and asks for another one.
    pub(super) fn replayed(&mut self, number: u64, payload: &[u8]) -> Ask {
        let Some(asking) = &mut self.asking else {
            return Ask::Nothing;
        };
        let first = std::mem::take(&mut asking.first);
        let purpose = asking.purpose;
        self.status.counters.replayed += 1;
        if first && purpose == Purpose::Resume {
            let same = self.next == number.checked_add(1) && self.last == Some(xxh3_64(payload));
            if !same {
                self.forget("another vLLM than before publishes here");
                self.next = None;
                return self.ask(Purpose::Fresh);
            }
            return Ask::Nothing;
        }
        match self.next {
            None => self.begin(number),
            Some(next) if number < next => return Ask::Nothing,
            Some(next) if number == next => {}
            // It is not kept any more; nobody has it.
            Some(_) if first => {
                self.forget("vLLM does not keep the missing events any more");
                self.begin(number);
            }
            // The answer itself was too fast for the socket, which then drops.
            Some(_) => return self.ask_again(),
        }
        self.take(number, payload);
        Ask::Nothing
    }

    /// The answer is complete.
    pub(super) fn replay_ended(&mut self) -> Ask {
        let Some(asking) = self.asking.take() else {
            return Ask::Nothing;
        };
        if asking.purpose == Purpose::Fresh && std::mem::take(&mut self.doubt) {
            // Asking for everything did not help: what is missing is nowhere.
            self.status.confidence = Confidence::Partial;
        }
        if asking.first {
            match asking.purpose {
                Purpose::Fresh => self.begin(0),
                Purpose::Resume => {
                    self.forget("another vLLM than before publishes here");
                    self.next = None;
                    return self.ask(Purpose::Fresh);
                }
                Purpose::Repair => {}
            }
        }
        self.give_up();
        Ask::Nothing
    }

    /// No answer came, or not to its end.
    pub(super) fn replay_failed(&mut self, reason: &str) -> Ask {
        self.status.counters.replays_failed += 1;
        self.status.error = Some(format!("the replay endpoint did not answer: {reason}"));
        if self
            .asking
            .take()
            .is_some_and(|asking| asking.purpose == Purpose::Resume)
        {
            // It may have missed some; those that follow will tell.
            return Ask::Nothing;
        }
        self.give_up();
        Ask::Nothing
    }

    fn resume(&mut self) -> Ask {
        match self.next {
            Some(next) if next > 0 && self.last.is_some() => self.ask(Purpose::Resume),
            _ => {
                self.next = None;
                self.ask(Purpose::Fresh)
            }
        }
    }

    fn ask(&mut self, purpose: Purpose) -> Ask {
        self.asking = Some(Asking {
            purpose,
            first: true,
            due: self.next,
            rounds: 0,
        });
        self.status.counters.replays += 1;
        Ask::Replay(match purpose {
            Purpose::Fresh => 0,
            Purpose::Resume => self.next.unwrap_or(0).saturating_sub(1),
            Purpose::Repair => self.next.unwrap_or(0),
        })
    }

    /// For what the answer left out.
    fn ask_again(&mut self) -> Ask {
        let Some(before) = self.asking else {
            return Ask::Nothing;
        };
        let rounds = if before.due == self.next {
            before.rounds + 1
        } else {
            0
        };
        if rounds > ROUNDS_MAX {
            self.forget("the replay leaves events out");
            self.next = None;
            self.asking = None;
            self.give_up();
            return Ask::Nothing;
        }
        let ask = self.ask(Purpose::Repair);
        if let Some(asking) = &mut self.asking {
            asking.rounds = rounds;
        }
        ask
    }

    /// What came after a gap is taken in; if the gap is still there, all before it is forgotten.
    fn give_up(&mut self) {
        let Some((number, payload)) = self.held.take() else {
            return;
        };
        match self.next {
            Some(next) if number < next => return,
            Some(next) if number == next => {}
            Some(_) => {
                self.forget("events are missing that cannot be had any more");
                self.begin(number);
            }
            None => self.begin(number),
        }
        self.take(number, &payload);
    }

    /// `number` is the first one that is known.
    fn begin(&mut self, number: u64) {
        self.next = Some(number);
        self.last = None;
        self.status.confidence = if number == 0 {
            Confidence::Complete
        } else {
            Confidence::Partial
        };
    }

    /// Nothing that was told is believed any more.
    fn forget(&mut self, reason: &str) {
        tracing::warn!(
            rank = self.status.rank.0,
            blocks = self.writer.blocks(),
            reason,
            "the KV cache of vLLM is followed anew"
        );
        self.status.counters.resyncs += 1;
        self.status.error = Some(reason.to_owned());
        self.status.confidence = Confidence::Partial;
        self.last = None;
        self.drop_all();
    }

    fn drop_all(&mut self) {
        self.chain.clear();
        self.writer.cleared();
    }

    fn take(&mut self, number: u64, payload: &[u8]) {
        self.next = number.checked_add(1);
        self.last = Some(xxh3_64(payload));
        self.status.counters.batches += 1;
        match Batch::decode(payload) {
            Ok(batch) => batch.events.into_iter().for_each(|event| self.apply(event)),
            Err(error) => {
                self.status.counters.undecodable += 1;
                self.forget(&format!("batch {number} cannot be read: {error}"));
                self.last = Some(xxh3_64(payload));
            }
        }
    }

    fn apply(&mut self, event: Event) {
        self.status.counters.events += 1;
        let stored = match event {
            Event::Stored(stored) => stored,
            Event::Removed(removed) => {
                let unknown = self.chain.removed(&removed, &mut self.writer);
                self.status.counters.unknown_removed += unknown as u64;
                return;
            }
            Event::Cleared => {
                self.drop_all();
                self.status.cleared();
                return;
            }
            Event::Unknown => {
                self.status.counters.ignored += 1;
                return;
            }
        };
        let counters = &mut self.status.counters;
        match self.chain.stored(&stored, &mut self.writer) {
            Outcome::Taken { unnamed } => {
                counters.unnamed += unnamed as u64;
                if stored.block_tokens > 0 {
                    self.status.right_block_size(stored.block_tokens);
                }
            }
            Outcome::OtherGroup | Outcome::PartOfBlock | Outcome::NoTokens => {
                counters.ignored += 1;
            }
            Outcome::BlockSize(received) => self.status.wrong_block_size(received),
            Outcome::UnknownParent(tier) => {
                counters.orphans += 1;
                // Lower tiers may hold blocks whose beginning is nowhere any more.
                self.doubt |= tier == Tier::Device;
            }
            Outcome::Inconsistent(what) => {
                counters.undecodable += 1;
                self.status.error = Some(format!("a BlockStored contradicts itself: {what}"));
                self.doubt = true;
            }
            Outcome::Full => {
                let blocks = self.chain.len();
                self.forget(&format!(
                    "vLLM holds more than {blocks} blocks, which is the limit"
                ));
            }
        }
    }

    /// A block is missing. If the view was complete something was missed in it, and asking again
    /// tells. If it was not, what is missing is older than all that can be asked for.
    fn resync_if_due(&mut self, now: Instant) -> Ask {
        if !std::mem::take(&mut self.doubt) || self.status.confidence != Confidence::Complete {
            return Ask::Nothing;
        }
        if self.resync_at.is_some_and(|at| now < at) {
            self.status.confidence = Confidence::Partial;
            return Ask::Nothing;
        }
        self.resync_at = Some(now + self.resync_pause);
        self.resync_pause = (self.resync_pause * 2).min(RESYNC_PAUSE_MAX);
        self.forget("a block follows one that is not known");
        if !self.has_replay {
            return Ask::Nothing;
        }
        self.next = None;
        self.ask(Purpose::Fresh)
    }
}
