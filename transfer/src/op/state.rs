//! Life of one posted operation.
//!
//! `Moving` (bytes) -> `Notifying` (if a notification is bound) -> `Finished`. A verdict (cancel,
//! deadline, lost peer, closed window, refusal) given while bytes move ends the operation when the
//! gate reports that nothing is left: an error is never visible while bytes can still move.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use tracing::Span;

use super::completion::{Completion, CompletionQueue};
use super::gate::Gate;
use super::request::{Op, PostOptions};
use super::telemetry::{Stopwatch, TransferTelemetry};
use super::work::{Path, Work};
use crate::agent::{Core, Session, TimerKey};
use crate::cuda::DeviceEvent;
use crate::error::{LossCause, TransferError};
use crate::stage::Part;
use crate::wire::Wanted;

/// Where the notification of an operation stands, for the FIFO of its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Turn {
    /// Its bytes are not in place yet.
    Waiting = 0,
    /// To be sent when its turn comes.
    Ready = 1,
    /// The operation ended without it.
    Dropped = 2,
    /// On its way.
    Sent = 3,
}

pub(crate) struct TransferState {
    pub(crate) id: u64,
    pub(crate) core: Arc<Core>,
    pub(crate) session: Arc<Session>,
    /// None for a standalone notification.
    pub(crate) work: Option<Arc<Work>>,
    pub(crate) notification: Option<Bytes>,
    pub(crate) deadline: Duration,
    /// What a device is told beside the work.
    pub(crate) device: DeviceOptions,
    /// Most multiprocessors that one of its launches occupied.
    sms: AtomicU32,
    /// The part of another operation that this one is a half of.
    half_of: Option<Part>,
    completion: Option<(CompletionQueue, u64)>,
    request_id: Option<Arc<str>>,
    stopwatch: Stopwatch,
    /// Carries the name of the request, the peer and the lane; nothing when nobody listens.
    span: Span,
    gate: Gate,
    turn: AtomicU8,
    /// The notification goes along with the bytes.
    rides: AtomicBool,
    started: AtomicBool,
    finished: AtomicBool,
    /// Threads that serve sockets while they wait for this operation, and are parked.
    helpers_parked: AtomicUsize,
    cell: Mutex<Cell>,
    done: Condvar,
}

impl std::fmt::Debug for TransferState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TransferState")
            .field("id", &self.id)
            .field("phase", &self.cell.lock().phase)
            .finish_non_exhaustive()
    }
}

/// What a posting says to the device that does the work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceOptions {
    pub(crate) after: Option<DeviceEvent>,
    pub(crate) sms: Option<u32>,
}

struct Cell {
    phase: Phase,
    verdict: Option<TransferError>,
    timer: Option<TimerKey>,
    wakers: Vec<Waker>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Moving,
    Notifying,
    Finished(Result<(), TransferError>),
}

impl TransferState {
    pub(crate) fn new(
        core: Arc<Core>,
        session: Arc<Session>,
        work: Option<Arc<Work>>,
        posted: Instant,
        options: PostOptions,
    ) -> Arc<Self> {
        let id = core.next_operation();
        let span = tracing::debug_span!(
            target: "blockplane_transfer",
            "transfer",
            id,
            request_id = options.request_id.as_deref(),
            peer = session.peer_name(),
            lane = %session.lane().lane,
            op = work.as_ref().map_or("notify", |work| work.op.name()),
            bytes = work.as_ref().map_or(0, |work| work.plan.bytes),
        );
        Self::with_span(core, session, work, posted, options, None, (id, span))
    }

    /// A half of a part of this operation: it counts nowhere, and its end is told to the stage.
    pub(crate) fn half(
        self: &Arc<Self>,
        session: &Arc<Session>,
        work: Arc<Work>,
        part: u32,
    ) -> Arc<Self> {
        let options = PostOptions {
            sms: self.device.sms,
            ..PostOptions::within(self.deadline)
        };
        let of = Part {
            operation: self.id,
            part,
        };
        let core = self.core.clone();
        let id = core.next_operation();
        let named = (id, Span::none());
        Self::with_span(
            core,
            session.clone(),
            Some(work),
            Instant::now(),
            options,
            Some(of),
            named,
        )
    }

    fn with_span(
        core: Arc<Core>,
        session: Arc<Session>,
        work: Option<Arc<Work>>,
        posted: Instant,
        options: PostOptions,
        half_of: Option<Part>,
        (id, span): (u64, Span),
    ) -> Arc<Self> {
        let PostOptions {
            deadline,
            notification,
            completion,
            request_id,
            after,
            sms,
        } = options;
        let parts = work.as_ref().map_or(0, |work| work.parts);
        Arc::new(Self {
            id,
            core,
            session,
            work,
            notification,
            deadline,
            device: DeviceOptions { after, sms },
            sms: AtomicU32::new(0),
            half_of,
            completion,
            request_id,
            stopwatch: Stopwatch::new(posted),
            span,
            gate: Gate::new(parts),
            turn: AtomicU8::new(Turn::Waiting as u8),
            rides: AtomicBool::new(false),
            started: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            helpers_parked: AtomicUsize::new(0),
            cell: Mutex::new(Cell {
                phase: Phase::Moving,
                verdict: None,
                timer: None,
                wakers: Vec::new(),
            }),
            done: Condvar::new(),
        })
    }

    pub(crate) fn phase(&self) -> Phase {
        self.cell.lock().phase.clone()
    }

    /// Sets the deadline, unless the operation is over already.
    pub(crate) fn set_deadline(self: &Arc<Self>, until: Instant) {
        let mut cell = self.cell.lock();
        if !matches!(cell.phase, Phase::Finished(_)) {
            cell.timer = Some(self.core.timers.deadline(until, self));
        }
    }

    /// Waits for the end; `None` when `until` passes first.
    pub(crate) fn wait_until(
        self: &Arc<Self>,
        until: Instant,
    ) -> Option<Result<(), TransferError>> {
        if !self.here() {
            if self.on_device() {
                self.core.mover.help(self, until);
            } else {
                self.session.backend().help(self, until);
            }
        }
        let mut cell = self.cell.lock();
        loop {
            if let Phase::Finished(outcome) = &cell.phase {
                return Some(outcome.clone());
            }
            if self.done.wait_until(&mut cell, until).timed_out() {
                return match &cell.phase {
                    Phase::Finished(outcome) => Some(outcome.clone()),
                    Phase::Moving | Phase::Notifying => None,
                };
            }
        }
    }

    /// Sleeps until the end, or until a moment; true at the end.
    pub(crate) fn sleep_until(&self, until: Instant) -> bool {
        let mut cell = self.cell.lock();
        while !matches!(cell.phase, Phase::Finished(_)) {
            if self.done.wait_until(&mut cell, until).timed_out() {
                return matches!(cell.phase, Phase::Finished(_));
            }
        }
        true
    }

    /// Waits a little while without parking, when the end is as near as one part of a copy.
    pub(crate) fn spin_for_workers(&self) {
        let copied = |work: &Arc<Work>| matches!(work.path, Path::Copy { .. });
        if !self.work.as_ref().is_some_and(copied) {
            return;
        }
        let until = Instant::now() + self.core.config.copy_spin;
        while !self.finished.load(Ordering::Acquire) && Instant::now() < until {
            std::hint::spin_loop();
        }
    }

    /// The outcome, or registers the waker.
    pub(crate) fn poll(&self, waker: &Waker) -> Option<Result<(), TransferError>> {
        let mut cell = self.cell.lock();
        if let Phase::Finished(outcome) = &cell.phase {
            return Some(outcome.clone());
        }
        if !cell.wakers.iter().any(|known| known.will_wake(waker)) {
            cell.wakers.push(waker.clone());
        }
        None
    }

    /// The copy workers may take parts from now on.
    pub(crate) fn start_copying(&self) {
        self.started.store(true, Ordering::Release);
    }

    /// A launch of it occupies so many multiprocessors.
    pub(crate) fn most_sms(&self) -> u32 {
        self.sms.load(Ordering::Relaxed)
    }

    pub(crate) fn took_sms(&self, sms: u32) {
        self.sms.fetch_max(sms, Ordering::Relaxed);
    }

    /// Starts the copies of an operation whose memory this process reaches itself.
    pub(crate) fn start_here(self: &Arc<Self>) {
        if self.on_device() {
            self.core.mover.start(self);
        } else {
            self.core.copies.submit(self);
        }
    }

    /// Starts moving the bytes.
    pub(crate) fn start(self: &Arc<Self>) {
        if self.is_staged() {
            self.core.stage.start(self);
        } else {
            self.session.backend().start(self);
        }
    }

    /// Whether it is a half of a part of another operation.
    pub(crate) const fn is_half(&self) -> bool {
        self.half_of.is_some()
    }

    fn is_staged(&self) -> bool {
        self.work
            .as_ref()
            .is_some_and(|work| work.staged().is_some())
    }

    /// Calls off what has not begun of them. Copy workers give their parts back by themselves, each is
    /// short.
    pub(crate) fn stop_here(self: &Arc<Self>) {
        if self.on_device() {
            self.core.mover.stop(self);
        }
    }

    fn on_device(&self) -> bool {
        self.work
            .as_ref()
            .is_some_and(|work| work.device().is_some())
    }

    /// Copies parts until none is left to claim. Any thread may help.
    pub(crate) fn copy_parts(self: &Arc<Self>) {
        let Some(work) = &self.work else { return };
        if !self.started.load(Ordering::Acquire) {
            return;
        }
        while let Some(part) = self.claim_part() {
            if let Err(error) = work.copy_part(part) {
                self.inaccessible(&error);
            }
            self.part_done();
        }
    }

    /// The kernel did not copy a part: the peer's process is gone, or its memory is.
    fn inaccessible(self: &Arc<Self>, error: &io::Error) {
        if error.raw_os_error() == Some(libc::ESRCH) {
            self.session.lose(LossCause::ProcessExited);
        } else {
            let reason = error.to_string();
            self.stop(TransferError::Inaccessible { reason });
        }
    }

    /// The next part for a backend that moves bytes itself; each is answered by one
    /// [`Self::part_done`].
    pub(crate) fn claim_part(&self) -> Option<u32> {
        let part = self.gate.claim()?;
        self.stopwatch.part();
        Some(part)
    }

    /// Whether the rest of the bytes need not move.
    pub(crate) fn called_off(&self) -> bool {
        self.gate.stopped()
    }

    pub(crate) fn part_done(self: &Arc<Self>) {
        if self.gate.finish() {
            self.bytes_quiet();
        }
    }

    /// No byte moves any more: all are in place, or the rest was called off.
    pub(crate) fn bytes_quiet(self: &Arc<Self>) {
        let mut cell = self.cell.lock();
        if let Some(error) = cell.verdict.take() {
            drop(cell);
            self.turn.store(Turn::Dropped as u8, Ordering::Release);
            self.finish(&Err(error));
        } else if self.notification.is_some() {
            cell.phase = Phase::Notifying;
            self.stopwatch.quiet();
            drop(cell);
            // A stop may have come in between; it has finished the operation then.
            let _ = self.turn.compare_exchange(
                Turn::Waiting as u8,
                Turn::Ready as u8,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
        } else {
            drop(cell);
            self.finish(&Ok(()));
            return;
        }
        if self.notification.is_some() {
            self.session.send_due_notifications();
        }
    }

    /// Ends the operation with `error` as soon as no byte moves any more.
    pub(crate) fn stop(self: &Arc<Self>, error: TransferError) {
        let mut cell = self.cell.lock();
        match cell.phase {
            Phase::Moving => {
                if cell.verdict.is_some() {
                    // Called off, and the peer is lost before it has said that it places no more:
                    // only the loss says that more may land there.
                    let lost = matches!(error, TransferError::PeerLost(_));
                    if lost && self.peer_places() {
                        cell.verdict = Some(error);
                    }
                    return;
                }
                cell.verdict = Some(error);
                drop(cell);
                let quiet = self.gate.stop();
                if self.is_staged() {
                    // Also when nothing has begun: it waits there for its turn.
                    self.core.stage.stop(self.id);
                } else if !quiet {
                    self.session.backend().stop(self);
                }
                if quiet {
                    self.bytes_quiet();
                }
            }
            Phase::Notifying => {
                drop(cell);
                self.turn.store(Turn::Dropped as u8, Ordering::Release);
                self.finish(&Err(error));
                self.session.send_due_notifications();
            }
            Phase::Finished(_) => {}
        }
    }

    /// Whether the peer's own threads place the bytes.
    fn peer_places(&self) -> bool {
        self.work.as_ref().is_some_and(|work| {
            let streamed = match &work.path {
                Path::Stream { .. } => true,
                Path::Staged(staged) => staged.streamed(),
                _ => false,
            };
            work.op == Op::Write && streamed
        })
    }

    /// The peer's answer to the notification.
    pub(crate) fn notified(&self, outcome: &Result<(), TransferError>) {
        let notifying = self.cell.lock().phase == Phase::Notifying;
        if notifying {
            self.finish(outcome);
            if self.rides() {
                // Later ones have waited for this answer.
                self.session.send_due_notifications();
            }
        }
    }

    /// The notification goes along with the bytes, and later ones wait for its answer.
    pub(crate) fn set_rides(&self) {
        self.rides.store(true, Ordering::Release);
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    pub(crate) fn rides(&self) -> bool {
        self.rides.load(Ordering::Acquire)
    }

    pub(crate) fn turn(&self) -> Turn {
        match self.turn.load(Ordering::Acquire) {
            0 => Turn::Waiting,
            1 => Turn::Ready,
            2 => Turn::Dropped,
            _ => Turn::Sent,
        }
    }

    /// Takes the turn to be sent; false when the operation ended meanwhile.
    pub(crate) fn take_turn(&self) -> bool {
        self.turn
            .compare_exchange(
                Turn::Ready as u8,
                Turn::Sent as u8,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
    }

    fn finish(&self, outcome: &Result<(), TransferError>) {
        let mut cell = self.cell.lock();
        if matches!(cell.phase, Phase::Finished(_)) {
            return;
        }
        // What is counted is counted before anybody can see the end.
        let elapsed = self.stopwatch.end();
        let (op, bytes, lane) = match &self.work {
            Some(work) => (Some(work.op), work.plan.bytes, work.plan.lane),
            None => (None, 0, self.session.lane().lane),
        };
        if self.half_of.is_none() {
            for counters in [&self.core.counters, self.session.counters()] {
                counters.finished(lane, op, outcome, bytes, elapsed);
                if self.notification.is_some() && outcome.is_ok() {
                    counters.notified();
                }
            }
            if let (Some(op), Ok(())) = (op, outcome) {
                self.session.meter().record(op, bytes, elapsed);
            }
        }
        cell.phase = Phase::Finished(outcome.clone());
        self.finished.store(true, Ordering::SeqCst);
        let wakers = std::mem::take(&mut cell.wakers);
        let timer = cell.timer.take();
        drop(cell);
        self.session.retire(self.id);
        if let Some(timer) = timer {
            self.core.timers.cancel(timer);
        }
        if let Some(work) = &self.work {
            work.end_use();
        }
        if let Some(part) = self.half_of {
            self.core.stage.ended(part, outcome.clone());
            return;
        }
        self.trace_end(outcome, elapsed);
        self.done.notify_all();
        if self.helpers_parked.load(Ordering::SeqCst) > 0 {
            self.session.backend().wake_helpers();
        }
        wakers.into_iter().for_each(Waker::wake);
        if let Some((queue, token)) = &self.completion {
            queue.complete(Completion {
                token: *token,
                outcome: outcome.clone(),
                bytes,
                elapsed,
            });
        }
    }

    fn trace_end(&self, outcome: &Result<(), TransferError>, elapsed: Duration) {
        match outcome {
            Ok(()) => tracing::debug!(
                target: "blockplane_transfer",
                parent: &self.span,
                ?elapsed,
                "transfer done"
            ),
            Err(error) => tracing::debug!(
                target: "blockplane_transfer",
                parent: &self.span,
                ?elapsed,
                %error,
                "transfer failed"
            ),
        }
    }

    /// How it went; `None` before the end.
    pub(crate) fn telemetry(&self) -> Option<TransferTelemetry> {
        let Phase::Finished(outcome) = self.phase() else {
            return None;
        };
        let plan = self.work.as_ref().map(|work| &work.plan);
        let (bytes_phase, total) = (self.stopwatch.bytes_phase(), self.stopwatch.total());
        let lane = self.session.lane();
        Some(TransferTelemetry {
            id: self.id,
            request_id: self.request_id.clone(),
            peer: self.session.peer_name().into(),
            posted_at: self.stopwatch.posted_at(),
            until_first_part: self.stopwatch.until_first_part(),
            bytes_phase,
            notification_phase: total.saturating_sub(bytes_phase),
            total,
            op: plan.map(|plan| plan.op),
            bytes: plan.map_or(0, |plan| plan.bytes),
            runs: plan.map_or(0, |plan| plan.runs),
            pieces: plan.map_or(0, |plan| plan.pieces),
            parts: plan.map_or(0, |plan| plan.parts),
            lane: plan.map_or(lane.lane, |plan| plan.lane),
            reason: plan.map_or(&lane.reason, |plan| &plan.reason).clone(),
            sms: Some(self.most_sms()).filter(|&sms| sms > 0),
            outcome,
        })
    }
}

impl Wanted for TransferState {
    fn here(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    fn parked(&self, parked: bool) -> bool {
        // Sequentially consistent with the end of the operation: either that sees the parked
        // thread, or the thread sees the end.
        if parked {
            self.helpers_parked.fetch_add(1, Ordering::SeqCst);
        } else {
            self.helpers_parked.fetch_sub(1, Ordering::SeqCst);
        }
        self.finished.load(Ordering::SeqCst)
    }
}
