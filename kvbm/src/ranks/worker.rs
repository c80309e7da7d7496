//! One rank: does the moves that the leader asks for, each at most once.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt, io,
    sync::{Arc, Weak},
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{
    RankLink, RankShape,
    codec::{Done, Message},
    held::Held,
    leader::RankError,
};
use crate::tier::{BlockOutcome, MoveReport, MoveSpec, Mover};

/// Moves that are remembered, so that a repeated message does not do one twice. More than a leader has
/// under way.
const REMEMBERED: usize = 1024;
/// Moves that wait for a thread.
const QUEUE_MAX: usize = 256;
/// Pause before a greeting is repeated.
const HELLO_EVERY: Duration = Duration::from_millis(100);
/// An answer is of no use after this time: the leader asks again.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// The worker of one rank: a few threads that copy with the rank's own mover.
pub struct RankWorker {
    shared: Arc<Shared>,
}

struct Shared {
    shape: RankShape,
    epoch: u64,
    address: Vec<u8>,
    mover: Arc<dyn Mover>,
    /// What this life of the rank has in G2.
    held: Held,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    link: Option<Arc<dyn RankLink>>,
    attempt: u64,
    session: Option<u64>,
    refused: Option<String>,
    /// Moves of the session by number; those below `floor` are neither done nor remembered.
    known: BTreeMap<u64, Known>,
    floor: u64,
    queue: VecDeque<(u64, u64, MoveSpec)>,
    /// Moves that wait or whose bytes may still move, of any session.
    busy: usize,
    stopped: bool,
}

enum Known {
    Running,
    Done(Done),
}

impl RankWorker {
    /// Starts `threads` threads (one for each move at a time). `epoch` is a number that no other life
    /// of this rank has; `address` is handed to the leader's transport.
    ///
    /// # Errors
    /// A thread cannot be had.
    pub fn start(
        shape: RankShape,
        epoch: u64,
        address: Vec<u8>,
        mover: Arc<dyn Mover>,
        threads: usize,
    ) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            shape,
            epoch,
            address,
            mover,
            held: Held::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let worker = Arc::new(Self { shared });
        for _ in 0..threads.max(1) {
            let shared = Arc::clone(&worker.shared);
            thread::Builder::new()
                .name("kvbm-rank".to_owned())
                .spawn(move || shared.serve())?;
        }
        Ok(worker)
    }

    /// Greets the leader and waits for its welcome. Also after the leader was lost: moves of the
    /// session before are over when this returns `Ok`.
    ///
    /// # Errors
    /// The leader refuses, does not answer in time, or moves of the session before do not end.
    pub fn join(&self, leader: Arc<dyn RankLink>, timeout: Duration) -> Result<(), RankError> {
        let shared = &self.shared;
        let until = Instant::now() + timeout;
        let late = || RankError::NoLeader { waited: timeout };
        let mut state = shared.state.lock();
        state.session = None;
        state.refused = None;
        while let Some((_, id, _)) = state.queue.pop_front() {
            state.known.remove(&id);
            state.busy = state.busy.saturating_sub(1);
        }
        state.link = Some(leader);
        while state.busy > 0 {
            if shared.changed.wait_until(&mut state, until).timed_out() {
                return Err(late());
            }
        }
        state.known.clear();
        state.floor = 0;
        state.attempt += 1;
        loop {
            drop(state);
            self.greet();
            state = shared.state.lock();
            let again = Instant::now() + HELLO_EVERY;
            while state.session.is_none() && state.refused.is_none() {
                let pause = again.min(until);
                if shared.changed.wait_until(&mut state, pause).timed_out() {
                    break;
                }
            }
            if let Some(reason) = state.refused.take() {
                return Err(RankError::Refused { reason });
            }
            if state.session.is_some() {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(late());
            }
        }
    }

    /// Greets the leader once more, which tells one that took this rank for lost that it is not.
    pub fn greet(&self) {
        let shared = &self.shared;
        let (link, attempt) = {
            let state = shared.state.lock();
            (state.link.clone(), state.attempt)
        };
        let hello = Message::Hello {
            epoch: shared.epoch,
            attempt,
            shape: shared.shape,
            address: shared.address.clone(),
        };
        if let Some(Err(error)) = link.map(|link| link.send(hello.encode(), HELLO_EVERY)) {
            tracing::debug!(error, "the leader cannot be greeted");
        }
    }

    /// Takes a message of the leader. What is not understood, or of another session, is ignored.
    pub fn receive(&self, message: &[u8]) {
        match Message::decode(message) {
            Some(Message::Welcome {
                epoch,
                attempt,
                session,
            }) => {
                let mut state = self.shared.state.lock();
                let mine = epoch == self.shared.epoch && attempt == state.attempt;
                if mine && state.session.is_none() && state.busy == 0 {
                    state.session = Some(session);
                    self.shared.changed.notify_all();
                }
            }
            Some(Message::Refused { epoch, reason }) if epoch == self.shared.epoch => {
                self.shared.state.lock().refused = Some(reason);
                self.shared.changed.notify_all();
            }
            Some(Message::Run { session, id, spec }) => self.shared.run(session, id, spec),
            Some(Message::Ask { session, id }) => self.shared.ask(session, id),
            Some(Message::Refused { .. } | Message::Hello { .. } | Message::Done(_)) | None => {}
        }
    }
}

impl State {
    /// Makes room for one more; the oldest that is over is forgotten.
    fn remember(&mut self, id: u64, known: Known) {
        self.known.insert(id, known);
        while self.known.len() > REMEMBERED {
            match self.known.first_key_value() {
                Some((&first, Known::Done(done))) if done.quiet => {
                    self.known.remove(&first);
                    self.floor = self.floor.max(first + 1);
                }
                _ => break,
            }
        }
    }
}

impl Shared {
    /// An answer that says that nothing was moved.
    fn nothing(&self, session: u64, id: u64) -> Done {
        Done {
            rank: self.shape.fingerprint.tp_rank,
            session,
            id,
            quiet: true,
            bytes: 0,
            fault: None,
            outcomes: Vec::new(),
        }
    }

    fn answer(&self, done: &Done) {
        let link = self.state.lock().link.clone();
        let message = Message::Done(done.clone()).encode();
        if let Some(Err(error)) = link.map(|link| link.send(message, ANSWER_TIME)) {
            // The leader asks again.
            tracing::debug!(error, "an answer was not sent");
        }
    }

    fn run(&self, session: u64, id: u64, spec: MoveSpec) {
        let mut state = self.state.lock();
        let known = id < state.floor || state.known.contains_key(&id);
        if state.session != Some(session) || known || state.stopped {
            return;
        }
        if state.queue.len() >= QUEUE_MAX {
            let full = Done {
                outcomes: vec![
                    BlockOutcome::Failed("too many moves wait".to_owned());
                    spec.blocks.len()
                ],
                ..self.nothing(session, id)
            };
            state.remember(id, Known::Done(full.clone()));
            drop(state);
            self.answer(&full);
            return;
        }
        state.remember(id, Known::Running);
        state.busy += 1;
        state.queue.push_back((session, id, spec));
        self.changed.notify_all();
    }

    fn ask(&self, session: u64, id: u64) {
        let mut state = self.state.lock();
        if state.session != Some(session) {
            return;
        }
        let done = match state.known.get(&id) {
            Some(Known::Running) => return,
            Some(Known::Done(done)) => done.clone(),
            None => {
                let nothing = self.nothing(session, id);
                if id >= state.floor {
                    // Whoever asks has given up: should it still come, it is too late.
                    state.remember(id, Known::Done(nothing.clone()));
                }
                nothing
            }
        };
        drop(state);
        self.answer(&done);
    }

    fn serve(self: Arc<Self>) {
        loop {
            let (session, id, spec) = {
                let mut state = self.state.lock();
                loop {
                    if state.stopped {
                        return;
                    }
                    if let Some(next) = state.queue.pop_front() {
                        break next;
                    }
                    self.changed.wait(&mut state);
                }
            };
            let MoveReport {
                outcomes,
                pending,
                bytes,
                fault,
            } = self.held.run(self.mover.as_ref(), &spec);
            let mut done = Done {
                quiet: pending.is_none(),
                bytes,
                fault,
                outcomes,
                ..self.nothing(session, id)
            };
            self.finished(&done);
            if let Some(pending) = pending {
                let shared = Arc::downgrade(&self);
                let wait = move || {
                    pending.wait();
                    done.quiet = true;
                    if let Some(shared) = Weak::upgrade(&shared) {
                        shared.finished(&done);
                    }
                };
                let name = "kvbm-rank-wait".to_owned();
                if let Err(error) = thread::Builder::new().name(name).spawn(wait) {
                    // The leader keeps the blocks out of use until this rank joins anew.
                    tracing::error!(%error, "a move that hangs is not watched");
                }
            }
        }
    }

    fn finished(&self, done: &Done) {
        let mut state = self.state.lock();
        if done.quiet {
            state.busy = state.busy.saturating_sub(1);
        }
        if let Some(known) = state.known.get_mut(&done.id) {
            *known = Known::Done(done.clone());
        }
        let current = state.session == Some(done.session);
        self.changed.notify_all();
        drop(state);
        if current {
            self.answer(done);
        }
    }
}

impl Drop for RankWorker {
    fn drop(&mut self) {
        self.shared.state.lock().stopped = true;
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for RankWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RankWorker")
            .field("shape", &self.shared.shape)
            .field("epoch", &self.shared.epoch)
            .finish_non_exhaustive()
    }
}
