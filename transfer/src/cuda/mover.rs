//! Launches of an agent, and how their end is seen.
//!
//! Every launch has a slot: a line of pinned host memory and a counter on the device. The last CTA of a
//! kernel stores the launch's ticket there after all bytes, and whoever looks sees it: a thread that waits for
//! a short transfer, or the thread of this module, which sleeps while nothing is in flight and most of the
//! time while a long transfer runs. No stream is synchronised.
//!
//! A launch that waits for an event of the caller's can be called off until it starts. Host and kernel each
//! store a word and then read the other's, so that both know whether it has started (see
//! `kernels/done.cuh`). Every other launch starts as soon as the device has room for it, and is
//! short.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::device::Device;
use super::error::CudaError;
use super::kernels::abi::BpDone;
use super::pace::Way;
use super::share::SmShare;
use super::slots::{Slot, SlotPool};
use super::stream::{Lease, Streams};
use super::work::{DeviceWork, Grid};
use crate::config::CudaConfig;
use crate::error::{DeviceFailure, TransferError};
use crate::op::TransferState;

/// How long the thread sleeps between looks at a launch that is not due yet.
const NAP: Duration = Duration::from_micros(50);
/// The same when only launches are left that were called off before they started.
const LONG_NAP: Duration = Duration::from_millis(2);
/// The end of a launch is looked for from this part of the expected time on, less the time that a sleeping
/// thread takes to wake up.
const EARLY: f64 = 0.95;
const WAKE_UP: Duration = Duration::from_micros(100);
/// The device is asked for errors when a launch shows no end for so long, and again after each such time.
const LOOK_AT_DEVICE: Duration = Duration::from_millis(2);
/// Looks at one launch before the thread lets others run.
const LOOKS: usize = 64;

/// What an agent has on its devices.
pub(crate) struct Mover {
    config: CudaConfig,
    state: Mutex<State>,
    changed: Condvar,
    /// Launches and stops so far: what a thread that is awake looks at.
    posted: AtomicUsize,
}

#[derive(Default)]
struct State {
    flights: Vec<Arc<Flight>>,
    /// Parts for which there was no slot.
    waiting: VecDeque<(Arc<TransferState>, u32)>,
    running: bool,
    /// The thread sleeps and has to be called.
    asleep: bool,
    stopped: bool,
}

/// A launch whose end was not seen yet.
struct Flight {
    transfer: Arc<TransferState>,
    slot: Slot,
    lease: Lease,
    /// The multiprocessors that it occupies, if any.
    share: Option<SmShare>,
    ticket: u32,
    /// It waits for an event, and agrees with the host before it touches a byte.
    guarded: bool,
    way: Way,
    bytes: u64,
    /// When its end is expected.
    due: Instant,
    launched: Instant,
    /// When the device was last asked for errors, in microseconds since the launch.
    asked: AtomicU64,
    /// Its part was given back.
    reported: AtomicBool,
}

impl fmt::Debug for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mover")
            .field("in_flight", &self.state.lock().flights.len())
            .finish_non_exhaustive()
    }
}

impl Mover {
    pub(crate) fn new(config: &CudaConfig) -> Arc<Self> {
        Arc::new(Self {
            config: config.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
            posted: AtomicUsize::new(0),
        })
    }

    /// Launches what nobody has claimed of a transfer.
    pub(crate) fn start(self: &Arc<Self>, transfer: &Arc<TransferState>) {
        while let Some(part) = transfer.claim_part() {
            self.launch(transfer, part);
        }
    }

    fn launch(self: &Arc<Self>, transfer: &Arc<TransferState>, part: u32) {
        let Some(work) = transfer.work.as_ref().and_then(|work| work.device()) else {
            transfer.part_done();
            return;
        };
        // The engine's copies are one launch, whatever the number of parts.
        let nothing = part > 0 && work.by_engine() && transfer.device.after.is_none();
        if transfer.called_off() || nothing {
            transfer.part_done();
            return;
        }
        let flight = match self.put_on_stream(transfer, work, part) {
            Ok(Some(flight)) => flight,
            Ok(None) => {
                let mut state = self.state.lock();
                state.waiting.push_back((transfer.clone(), part));
                self.wake(&mut state);
                return;
            }
            Err(error) => {
                fail(transfer, work.device, &error);
                transfer.part_done();
                return;
            }
        };
        let flight = Arc::new(flight);
        let mut state = self.state.lock();
        state.flights.push(flight.clone());
        self.wake(&mut state);
        drop(state);
        // A stop that came before the launch was in the books has not seen it.
        if transfer.called_off() && flight.call_off() {
            flight.report();
        }
    }

    /// Makes sure that the thread runs and looks.
    fn wake(self: &Arc<Self>, state: &mut State) {
        if !state.running && !state.stopped {
            let mover = self.clone();
            let started = std::thread::Builder::new()
                .name("bp-cuda".to_owned())
                .spawn(move || mover.run());
            match started {
                Ok(_) => state.running = true,
                // Threads that wait for their transfers look themselves; the next post tries again.
                Err(error) => {
                    tracing::warn!(%error, "cannot start the thread that watches devices")
                }
            }
        }
        self.posted.fetch_add(1, Ordering::Release);
        if state.asleep {
            self.changed.notify_one();
        }
    }

    /// `None` when every slot is taken.
    fn put_on_stream(
        &self,
        transfer: &Arc<TransferState>,
        work: &DeviceWork,
        part: u32,
    ) -> Result<Option<Flight>, CudaError> {
        let device = work.device;
        let options = &transfer.device;
        let Some(slot) = SlotPool::slot(device)? else {
            return Ok(None);
        };
        let lease = Streams::lend(device, self.config.streams, options.after.is_some())?;
        let ticket = slot.arm();
        // An engine cannot be called off, so what waits for an event goes to a kernel.
        let by_engine = work.by_engine() && options.after.is_none();
        let (grid, share) = self.grid(work, part, options.sms);
        let _entered = device.enter()?;
        if let Some(event) = options.after {
            lease.wait_for(event)?;
        }
        let (way, bytes) = work.pace(if by_engine { 0 } else { share.sms() });
        let launched = Instant::now();
        let flight = Flight {
            transfer: transfer.clone(),
            ticket,
            guarded: !by_engine && options.after.is_some(),
            way,
            bytes,
            due: launched + device.paces.expected(way, bytes),
            launched,
            asked: AtomicU64::new(0),
            reported: AtomicBool::new(false),
            slot,
            share: (!by_engine).then_some(share),
            lease,
        };
        let put = if by_engine {
            let flag = flight.slot.flag_address();
            // SAFETY: the transfer keeps regions, windows and mappings until its part is given back,
            // and the flight keeps the slot until its flag was seen.
            unsafe { work.copy_by_engine(&flight.lease, flag, ticket) }
        } else {
            let done = BpDone {
                arrived: flight.slot.counter_address(),
                flag: flight.slot.flag_address(),
                word: flight.slot.words_address(),
                ticket,
                guarded: u32::from(flight.guarded),
            };
            transfer.took_sms(flight.share.as_ref().map_or(0, SmShare::sms));
            // SAFETY: as above.
            unsafe { work.launch(part, grid, &flight.lease, done) }
        };
        match put {
            Ok(()) => Ok(Some(flight)),
            Err(error) => {
                device.note(&error);
                // Some copies of the engine may be under way: nothing says when they end but the stream.
                if by_engine && !error.poisons() {
                    flight.lease.drain();
                }
                Err(error)
            }
        }
    }

    /// How a launch spreads over the device: as the caller says, or else over its share of what
    /// transfers may occupy together.
    fn grid(&self, work: &DeviceWork, part: u32, wanted: Option<u32>) -> (Grid, SmShare) {
        let device = work.device;
        let most = device.info.multiprocessors;
        if let Some(sms) = wanted {
            let grid = work.grid(part, sms.clamp(1, most));
            return (grid, device.occupied.take(grid.ctas()));
        }
        let full = work.grid(part, work.sms);
        let total = self.config.sms_total.min(most);
        let share = device
            .occupied
            .share(full.ctas(), total, self.config.sms_min);
        if share.sms() == full.ctas() {
            (full, share)
        } else {
            (work.grid(part, share.sms()), share)
        }
    }

    /// The transfer is called off: parts whose launch has not started are given back at once.
    pub(crate) fn stop(&self, transfer: &Arc<TransferState>) {
        let mut state = self.state.lock();
        let before = state.waiting.len();
        state
            .waiting
            .retain(|(waiting, _)| !Arc::ptr_eq(waiting, transfer));
        let given_back = before - state.waiting.len();
        let flights: Vec<_> = of(&state.flights, transfer).cloned().collect();
        drop(state);
        for _ in 0..given_back {
            transfer.part_done();
        }
        for flight in flights {
            if flight.call_off() {
                flight.report();
            }
        }
    }

    /// Looks for the end of a transfer from shortly before it is due until a while after, or until
    /// `until`, and sleeps before. One that takes longer than expected, or waits for an event, is left to
    /// the thread.
    pub(crate) fn help(&self, transfer: &Arc<TransferState>, until: Instant) {
        if transfer.device.after.is_some() {
            return;
        }
        let flights: Vec<_> = of(&self.state.lock().flights, transfer).cloned().collect();
        let Some(last) = flights.iter().max_by_key(|flight| flight.due) else {
            return;
        };
        let begin = last.looked_for_from();
        if Instant::now() < begin && transfer.sleep_until(begin.min(until)) {
            return;
        }
        let until = until.min(last.looked_for_until(self.config.spin));
        while !transfer.is_finished() && Instant::now() < until {
            for _ in 0..LOOKS {
                for flight in flights.iter().filter(|flight| flight.ended()) {
                    flight.report();
                }
                std::hint::spin_loop();
            }
        }
    }

    fn run(self: &Arc<Self>) {
        loop {
            let posted = self.posted.load(Ordering::Acquire);
            let state = self.state.lock();
            if state.stopped && state.flights.is_empty() {
                return;
            }
            let idle = state.flights.is_empty() && state.waiting.is_empty();
            let flights = state.flights.clone();
            drop(state);
            if idle {
                self.linger(posted);
                continue;
            }
            let mut over = flights.is_empty();
            let mut rest = None;
            // Posting threads want the lock: many looks for each time that it is taken.
            for _ in 0..LOOKS {
                for flight in &flights {
                    over |= flight.settle();
                }
                rest = nap(&flights, self.config.spin);
                let posted = self.posted.load(Ordering::Acquire) != posted;
                if over || posted || rest.is_some() {
                    break;
                }
                std::hint::spin_loop();
            }
            drop(flights);
            if over {
                self.clear_away();
            }
            match rest {
                Some(nap) if !over => self.sleep(posted, Some(nap)),
                Some(_) | None => std::thread::yield_now(),
            }
        }
    }

    /// Looks a little while for the next launch, and sleeps until there is one.
    fn linger(&self, posted: usize) {
        let until = Instant::now() + self.config.spin;
        while Instant::now() < until {
            if self.posted.load(Ordering::Acquire) != posted {
                return;
            }
            std::thread::yield_now();
        }
        self.sleep(posted, None);
    }

    /// Sleeps until something was posted since, or the time is over.
    fn sleep(&self, posted: usize, most: Option<Duration>) {
        let mut state = self.state.lock();
        if self.posted.load(Ordering::Acquire) != posted {
            return;
        }
        state.asleep = true;
        match most {
            Some(most) => drop(self.changed.wait_for(&mut state, most)),
            None => self.changed.wait(&mut state),
        }
        state.asleep = false;
    }

    /// Forgets launches that are over and gives their slots to parts that wait for one.
    fn clear_away(self: &Arc<Self>) {
        let mut state = self.state.lock();
        state.flights.retain(|flight| !flight.is_over());
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for (transfer, part) in waiting {
            self.launch(&transfer, part);
        }
    }

    /// Ends the thread when nothing is in flight any more.
    pub(crate) fn stop_all(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        let waiting = std::mem::take(&mut state.waiting);
        self.posted.fetch_add(1, Ordering::Release);
        drop(state);
        self.changed.notify_all();
        for (transfer, _) in waiting {
            transfer.part_done();
        }
    }
}

fn of<'a>(
    flights: &'a [Arc<Flight>],
    transfer: &'a Arc<TransferState>,
) -> impl Iterator<Item = &'a Arc<Flight>> {
    flights
        .iter()
        .filter(move |flight| Arc::ptr_eq(&flight.transfer, transfer))
}

/// Ends a transfer with an error of its device.
fn fail(transfer: &Arc<TransferState>, device: &Device, error: &CudaError) {
    transfer.stop(TransferError::Device(DeviceFailure {
        device: device.ordinal(),
        poisoned: device.lost().is_some(),
        error: error.clone(),
    }));
}

/// How long to sleep before the next look: not at all while an end may come any moment, long when only
/// launches are left that nobody waits for.
fn nap(flights: &[Arc<Flight>], spin: Duration) -> Option<Duration> {
    let now = Instant::now();
    let mut waited_for = flights.iter().filter(|flight| !flight.was_reported());
    if waited_for.clone().any(|flight| flight.is_due(now, spin)) {
        None
    } else if waited_for.next().is_some() || flights.is_empty() {
        Some(NAP)
    } else {
        Some(LONG_NAP)
    }
}

impl Flight {
    /// The device has stored the ticket.
    fn ended(&self) -> bool {
        self.slot.ended(self.ticket)
    }

    /// Gives the part back, once.
    fn report(&self) {
        if self.reported.swap(true, Ordering::AcqRel) {
            return;
        }
        if self.ended() && self.transfer.device.after.is_none() {
            let took = self.launched.elapsed();
            self.lease.device.paces.learn(self.way, self.bytes, took);
        }
        self.transfer.part_done();
    }

    fn was_reported(&self) -> bool {
        self.reported.load(Ordering::Acquire)
    }

    /// Tells the launch not to start; true when it has not started and never will.
    fn call_off(&self) -> bool {
        self.guarded && self.slot.call_off(self.ticket)
    }

    /// Looks at the launch; true when it is over.
    fn settle(&self) -> bool {
        if self.ended() {
            self.report();
            return true;
        }
        let micros = u64::try_from(self.launched.elapsed().as_micros()).unwrap_or(u64::MAX);
        let asked = self.asked.load(Ordering::Relaxed);
        if Duration::from_micros(micros - asked) < LOOK_AT_DEVICE {
            return false;
        }
        self.asked.store(micros, Ordering::Relaxed);
        let device = self.lease.device;
        let asked = device.enter().and_then(|_entered| self.lease.done());
        if let Err(error) = asked {
            device.note(&error);
            fail(&self.transfer, device, &error);
            if device.lost().is_some() {
                // With the context ends everything that it runs.
                self.report();
                return true;
            }
        }
        false
    }

    /// Nothing of it comes any more, and its part was given back.
    fn is_over(&self) -> bool {
        self.was_reported() && (self.ended() || self.lease.device.lost().is_some())
    }

    /// Looking for the end begins a little before it is due: about as long as it takes to wake up.
    fn looked_for_from(&self) -> Instant {
        let expected = self.due.duration_since(self.launched);
        self.launched + expected.mul_f64(EARLY).saturating_sub(WAKE_UP)
    }

    /// And ends when it is later than such launches are.
    fn looked_for_until(&self, spin: Duration) -> Instant {
        let expected = self.due.duration_since(self.launched);
        self.due + spin.max(expected / 4)
    }

    /// Whether the end may come any moment.
    fn is_due(&self, now: Instant, spin: Duration) -> bool {
        (self.looked_for_from()..self.looked_for_until(spin)).contains(&now)
    }
}
