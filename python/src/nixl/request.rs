//! A request: operations that were prepared once and are posted as often as the caller likes.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blockplane_transfer::{Agent, Peer, PostOptions, Prepared, RegionId, Transfer, TransferStatus};
use parking_lot::Mutex;

use super::backend::Backend;
use super::error::Fault;
use super::kinds::{Status, Telemetry};

#[derive(Debug)]
pub(super) struct Request {
    pub(super) backend: Backend,
    /// Descriptors as the caller named them, and their bytes.
    count: u64,
    bytes: u64,
    /// Local regions that it names.
    uses: Vec<RegionId>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// One for all but requests over several files; none after its memory was deregistered.
    prepared: Vec<Prepared>,
    in_flight: Vec<Transfer>,
    message: Vec<u8>,
    /// The message of a request of several parts, until all of them are done.
    due: Option<(Peer, Vec<u8>)>,
    posted: Option<Posted>,
}

#[derive(Clone, Copy, Debug)]
struct Posted {
    at: SystemTime,
    begun: Instant,
    post: Duration,
}

impl Request {
    pub(super) fn new(
        backend: Backend,
        prepared: Vec<Prepared>,
        uses: Vec<RegionId>,
        message: Vec<u8>,
        (count, bytes): (u64, u64),
    ) -> Self {
        Self {
            backend,
            count,
            bytes,
            uses,
            state: Mutex::new(State {
                prepared,
                in_flight: Vec::new(),
                message,
                due: None,
                posted: None,
            }),
        }
    }

    /// Starts it, with another message if there is one.
    pub(super) fn post(
        &self,
        message: Vec<u8>,
        agent: &Agent,
        deadline: Duration,
        own: impl FnOnce() -> Result<Peer, Fault>,
    ) -> Result<Status, Fault> {
        let mut state = self.state.lock();
        if state.flies() {
            return Err(Fault::RepostActive);
        }
        if state.prepared.is_empty() {
            return Err(Fault::NotFound(
                "memory of the request was deregistered".to_owned(),
            ));
        }
        if !message.is_empty() {
            state.message = message;
        }
        let begun = Instant::now();
        let at = SystemTime::now();
        state.posted = None;
        state.in_flight.clear();
        state.due = None;
        let message = state.message.clone();
        let bound = state.prepared.len() == 1;
        let mut transfers = Vec::with_capacity(state.prepared.len());
        for prepared in &state.prepared {
            let mut options = PostOptions::within(deadline);
            if bound && !message.is_empty() {
                options = options.notify(message.clone());
            }
            transfers.push(prepared.post(options)?);
        }
        if !bound && !message.is_empty() {
            state.due = Some((own()?, message));
        }
        state.in_flight = transfers;
        state.posted = Some(Posted {
            at,
            begun,
            post: begun.elapsed(),
        });
        // A failure shows when the state is asked for.
        Ok(state.settle(agent, deadline).unwrap_or(Status::InProgress))
    }

    /// Where it stands; a look at a few words of memory.
    pub(super) fn status(&self, agent: &Agent, deadline: Duration) -> Result<Status, Fault> {
        let mut state = self.state.lock();
        if state.posted.is_none() {
            return Err(Fault::NotPosted("the request was not posted".to_owned()));
        }
        state.settle(agent, deadline)
    }

    pub(super) fn telemetry(&self) -> Result<Telemetry, Fault> {
        let state = self.state.lock();
        let Some(posted) = state.posted else {
            return Err(Fault::NotPosted("the request was not posted".to_owned()));
        };
        let ended = state.in_flight.iter().map(Transfer::telemetry);
        let total = ended
            .map(|told| told.map_or_else(|| posted.begun.elapsed(), |told| told.total))
            .max()
            .unwrap_or_default();
        // A part of a microsecond is one: nothing takes no time.
        let micros =
            |time: Duration| u64::try_from(time.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX);
        let since = posted.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let post = micros(posted.post).max(1);
        Ok(Telemetry {
            startTime: micros(since),
            postDuration: post,
            xferDuration: micros(total).max(post),
            totalBytes: self.bytes,
            descCount: self.count,
            backendName: self.backend.name().to_owned(),
        })
    }

    /// Expected time and its margin of error, both in microseconds.
    pub(super) fn estimate(&self) -> (u64, u64) {
        let state = self.state.lock();
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        state
            .prepared
            .iter()
            .fold((0, 0), |(time, margin), prepared| {
                let estimate = prepared.estimate();
                let wide = estimate.high.saturating_sub(estimate.low) / 2;
                (
                    time.max(micros(estimate.expected)),
                    margin.max(micros(wide)),
                )
            })
    }

    /// How the parts run, for people.
    pub(super) fn plans(&self) -> Vec<String> {
        let state = self.state.lock();
        let plan = |prepared: &Prepared| {
            let plan = prepared.plan();
            format!(
                "{} sets, {} pieces, {}: {}",
                plan.sets, plan.pieces, plan.lane, plan.reason
            )
        };
        state.prepared.iter().map(plan).collect()
    }

    /// Calls it off and waits until none of its bytes moves, at most until `until`. False when they
    /// still do.
    pub(super) fn cancel(&self, until: Instant) -> bool {
        let mut state = self.state.lock();
        state.due = None;
        state.in_flight.iter().for_each(Transfer::request_cancel);
        for transfer in &state.in_flight {
            let left = until.saturating_duration_since(Instant::now());
            // How it ends does not matter, only that it does.
            let _ = transfer.wait(left);
        }
        !state.flies()
    }

    /// Lets go of memory that is deregistered; a request in flight is called off first.
    pub(super) fn forget(&self, region: RegionId, until: Instant) {
        if self.uses.contains(&region) && self.cancel(until) {
            let mut state = self.state.lock();
            state.prepared.clear();
            state.in_flight.clear();
        }
    }
}

impl State {
    /// Where it stands. The message of several parts goes when the last of them is done.
    fn settle(&mut self, agent: &Agent, deadline: Duration) -> Result<Status, Fault> {
        let mut status = Status::Success;
        for transfer in &self.in_flight {
            match transfer.status() {
                TransferStatus::InFlight => status = Status::InProgress,
                TransferStatus::Done => {}
                TransferStatus::Failed(error) => return Err(error.into()),
            }
        }
        if status == Status::Success
            && let Some((own, message)) = self.due.take()
        {
            agent.notify(&own, message, deadline)?.detach();
        }
        Ok(status)
    }

    fn flies(&self) -> bool {
        let flies = |transfer: &Transfer| transfer.status() == TransferStatus::InFlight;
        self.in_flight.iter().any(flies)
    }
}
