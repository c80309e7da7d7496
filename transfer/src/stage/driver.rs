//! The thread that posts halves. It is parked while nothing is under way.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Part;
use super::near::Near;
use super::part::StagedWork;
use super::progress::{Half, Next, Progress};
use super::slots::Slots;
use crate::error::{PostError, Rejection, TransferError};
use crate::op::{TransferState, Work};

/// The thread looks whether an event that an operation waits for is past after an eighth of the time
/// that it has waited already, within these bounds.
const EVENT_NAP_MIN: Duration = Duration::from_micros(50);
const EVENT_NAP_MAX: Duration = Duration::from_millis(1);

/// Something to do for the thread.
#[derive(Debug)]
pub(super) enum Event {
    Start(Arc<TransferState>),
    Stop(u64),
    Ended(Part, Result<(), TransferError>),
}

/// What other threads tell the thread. Bounded by operations in flight and twice the slots.
#[derive(Debug, Default)]
pub(super) struct Mail {
    state: Mutex<Letters>,
    arrived: Condvar,
    /// No copies on devices are started any more. Held while one is.
    closed: Mutex<bool>,
}

#[derive(Debug, Default)]
struct Letters {
    events: VecDeque<Event>,
    /// The thread is to end once nothing is under way.
    quit: bool,
    /// Nobody reads any more.
    gone: bool,
}

impl Mail {
    pub(super) fn push(&self, event: Event) {
        let mut state = self.state.lock();
        if !state.gone {
            state.events.push_back(event);
            drop(state);
            self.arrived.notify_one();
        }
    }

    pub(super) fn close(&self) {
        *self.closed.lock() = true;
        self.state.lock().quit = true;
        self.arrived.notify_one();
    }

    /// Moves what has come in behind `into`, or waits for something, up to `nap` long. False when the
    /// thread is to end: nothing has come in, and nothing is under way, which `idle` says.
    fn take(&self, into: &mut VecDeque<Event>, nap: Option<Duration>, idle: bool) -> bool {
        let mut state = self.state.lock();
        if state.events.is_empty() {
            if state.quit && idle {
                state.gone = true;
                return false;
            }
            match nap {
                Some(nap) => drop(self.arrived.wait_for(&mut state, nap)),
                None => self.arrived.wait(&mut state),
            }
        }
        into.append(&mut state.events);
        true
    }
}

/// A posted operation.
struct Job {
    transfer: Arc<TransferState>,
    entered: Instant,
    progress: Progress,
    halves: HashMap<u32, Arc<TransferState>>,
}

impl Job {
    fn parts(&self) -> Option<(&Work, &StagedWork)> {
        let work = self.transfer.work.as_ref()?;
        Some((work, work.staged()?))
    }
}

pub(super) struct Driver {
    mail: Arc<Mail>,
    near: Arc<dyn Near>,
    jobs: HashMap<u64, Job>,
    slots: Slots,
    /// Operations that touch nothing before an event is past. They hold no slot: the event may wait
    /// for another staged operation.
    early: Vec<u64>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("jobs", &self.jobs.len())
            .finish_non_exhaustive()
    }
}

impl Driver {
    pub(super) fn start(mail: &Arc<Mail>, near: &Arc<dyn Near>, slots: u32) -> io::Result<()> {
        let driver = Self {
            mail: mail.clone(),
            near: near.clone(),
            jobs: HashMap::new(),
            slots: Slots::new(slots),
            early: Vec::new(),
        };
        std::thread::Builder::new()
            .name("bp-stage".to_owned())
            .spawn(move || driver.run())?;
        Ok(())
    }

    fn run(mut self) {
        let mut events = VecDeque::new();
        loop {
            let nap = self.event_nap();
            let idle = self.jobs.is_empty();
            if !self.mail.take(&mut events, nap, idle) {
                return;
            }
            for event in events.drain(..) {
                match event {
                    Event::Start(transfer) => self.enter(transfer),
                    Event::Stop(operation) => self.stop(operation),
                    Event::Ended(part, outcome) => self.ended(part, outcome),
                }
            }
            self.look_at_events();
            self.fill();
        }
    }

    /// How long until the events are to be looked at again; none when there are none.
    fn event_nap(&self) -> Option<Duration> {
        let jobs = self.early.iter().filter_map(|id| self.jobs.get(id));
        let nap = jobs.map(|job| job.entered.elapsed() / 8).min()?;
        Some(nap.clamp(EVENT_NAP_MIN, EVENT_NAP_MAX))
    }

    fn enter(&mut self, transfer: Arc<TransferState>) {
        let Some(staged) = transfer.work.as_ref().and_then(|work| work.staged()) else {
            return;
        };
        let progress = Progress::new(staged.chunks(), staged.seals());
        let id = transfer.id;
        if transfer.device.after.is_some() {
            self.early.push(id);
        } else {
            self.slots.enter(id);
        }
        let job = Job {
            transfer,
            entered: Instant::now(),
            progress,
            halves: HashMap::new(),
        };
        self.jobs.insert(id, job);
    }

    /// Lets operations whose event is past have their turn.
    fn look_at_events(&mut self) {
        let Self {
            early, jobs, near, ..
        } = self;
        let mut over = Vec::new();
        early.retain(|id| {
            let Some(job) = jobs.get(id) else {
                return false;
            };
            let region = job
                .transfer
                .work
                .as_ref()
                .and_then(|work| work.sets.first());
            let (Some(set), Some(event)) = (region, job.transfer.device.after) else {
                return false;
            };
            match near.is_past(&set.local_region, event) {
                Ok(false) => true,
                Ok(true) => {
                    over.push(*id);
                    false
                }
                Err(error) => {
                    job.transfer.stop(error);
                    over.push(*id);
                    false
                }
            }
        });
        over.into_iter().for_each(|id| self.slots.enter(id));
    }

    /// Gives free slots to the operations whose turn it is.
    fn fill(&mut self) {
        while let Some((id, slot)) = self.slots.next() {
            let job = self.jobs.get_mut(&id);
            let begun = job.and_then(|job| {
                let part = job.transfer.claim_part()?;
                let half = job.progress.begin(part, slot);
                Some((part, half, job.progress.wants_slot()))
            });
            let Some((part, half, more)) = begun else {
                self.slots.back(id, slot);
                self.slots.leave(id);
                self.forget_if_over(id);
                continue;
            };
            if !more {
                self.slots.leave(id);
            }
            self.go(
                Part {
                    operation: id,
                    part,
                },
                half,
            );
        }
    }

    /// Posts a half; one that cannot be posted has ended.
    fn go(&mut self, part: Part, half: Half) {
        let Some(job) = self.jobs.get_mut(&part.operation) else {
            return;
        };
        match post(job, &*self.near, &self.mail, part.part, half) {
            Ok(posted) => {
                job.halves.insert(part.part, posted.clone());
                // A stop that came before is behind this in the mail, or was handled.
                if job.transfer.called_off() {
                    posted.stop(TransferError::Cancelled);
                }
            }
            Err(error) => self.ended(part, Err(error)),
        }
    }

    fn ended(&mut self, part: Part, outcome: Result<(), TransferError>) {
        let Some(job) = self.jobs.get_mut(&part.operation) else {
            return;
        };
        if let Some(half) = job.halves.remove(&part.part) {
            job.transfer.took_sms(half.most_sms());
        }
        let well = outcome.is_ok();
        if let Err(error) = outcome {
            job.transfer.stop(error);
        }
        let on = well && !job.transfer.called_off();
        match job.progress.ended(part.part, on) {
            Next::Go(half) => self.go(part, half),
            Next::Over { slot } => {
                if let Some(slot) = slot {
                    self.slots.back(part.operation, slot);
                }
                let seal = job.progress.wants_seal();
                let sealed = seal.then(|| job.transfer.claim_part()).flatten();
                let begun = sealed.map(|last| (last, job.progress.seal(last)));
                let transfer = job.transfer.clone();
                if let Some((last, half)) = begun {
                    let part = Part {
                        operation: part.operation,
                        part: last,
                    };
                    self.go(part, half);
                }
                self.forget_if_over(part.operation);
                transfer.part_done();
            }
        }
    }

    /// The operation is called off: what is under way of it is, too.
    fn stop(&mut self, id: u64) {
        self.slots.leave(id);
        self.early.retain(|early| *early != id);
        let halves: Vec<_> = match self.jobs.get(&id) {
            Some(job) => job.halves.values().cloned().collect(),
            None => return,
        };
        for half in halves {
            half.stop(TransferError::Cancelled);
        }
        self.forget_if_over(id);
    }

    /// Lets go of an operation of which nothing is under way and nothing is to come.
    fn forget_if_over(&mut self, id: u64) {
        let over = self.jobs.get(&id).is_some_and(|job| {
            let more = job.progress.wants_slot() || job.progress.wants_seal();
            job.progress.is_quiet() && (!more || job.transfer.called_off())
        });
        if over {
            self.slots.leave(id);
            self.early.retain(|early| *early != id);
            self.jobs.remove(&id);
        }
    }
}

/// Posts a half of a part.
fn post(
    job: &Job,
    near: &dyn Near,
    mail: &Mail,
    part: u32,
    half: Half,
) -> Result<Arc<TransferState>, TransferError> {
    let Some((work, staged)) = job.parts() else {
        return Err(TransferError::Cancelled);
    };
    let (made, session, by_device) = staged.half(near, &job.transfer, work, part, half)?;
    let made = Arc::new(made);
    if let Err(error) = made.begin_use() {
        return Err(match (error, session.lost()) {
            // With the connection go its windows: the loss is the reason.
            (_, Some(lost)) => TransferError::PeerLost(lost),
            (PostError::WindowClosed { window }, None) => TransferError::WindowClosed { window },
            (_, None) => TransferError::Rejected(Rejection::UnknownRegion),
        });
    }
    let posted = job.transfer.half(session, made.clone(), part);
    if let Err(lost) = session.admit_half(&posted) {
        made.end_use();
        return Err(TransferError::PeerLost(lost));
    }
    if by_device {
        // What watches devices ends with the agent: nothing is started after that.
        let closed = mail.closed.lock();
        if *closed {
            posted.stop(TransferError::Cancelled);
        } else {
            posted.start();
        }
    } else {
        posted.start();
    }
    Ok(posted)
}
