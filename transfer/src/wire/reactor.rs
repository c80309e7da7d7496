//! Threads that serve sockets: epoll, edge-triggered, parked while nothing happens.
//!
//! Waking a thread costs more than a small transfer, so whoever has a reason to be awake does the
//! work itself: a thread that posts an operation sends what the socket takes, and a thread that
//! waits for one serves the sockets meanwhile. A reactor is driven by one thread at a time. Its own
//! thread parks on a second epoll instance (the gate) that watches the first one once per arming: a
//! helper takes the gate's arming away, and events then wake nobody but the helper.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use super::data::DataCommand;

/// Something that a reactor serves. Calls come from one thread at a time.
pub(crate) trait Source: Send {
    /// What epoll watches.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Something happened to the descriptor; nothing did after [`Flow::Again`]. Edge-triggered: go
    /// on until the call would block, or say [`Flow::Again`].
    fn ready(&mut self, event: Event) -> Flow;

    /// A command from another thread.
    fn command(&mut self, command: DataCommand) -> Flow {
        let _ = command;
        Flow::Keep
    }
}

/// What became of a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other side is gone, or the connection is broken; reading tells.
    pub(crate) ended: bool,
}

/// What becomes of a source.
pub(crate) enum Flow {
    /// Wait for the next event.
    Keep,
    /// There is more to do; others first.
    Again,
    /// It is finished.
    Drop,
    /// Another source takes its place (same descriptor), perhaps on another reactor.
    Become(Placement, Box<dyn Source>),
}

/// Where a source is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    reactor: usize,
    token: u64,
}

/// What a thread that helps waits for.
pub(crate) trait Wanted {
    /// Whether it has come.
    fn here(&self) -> bool;

    /// The thread is about to park (true) or is awake again. While it is parked, whoever brings
    /// what is wanted calls [`Reactors::wake`]. Says again whether it has come.
    fn parked(&self, parked: bool) -> bool;
}

enum Command {
    Add(u64, Box<dyn Source>),
    Data(u64, DataCommand),
    Remove(u64),
    Stop,
}

/// Token of the eventfd.
const WAKE: u64 = 0;
const EVENTS_PER_ROUND: usize = 64;
/// A quiet time counts as at most this long.
const QUIET_MAX: Duration = Duration::from_millis(1);
/// A helper waits at most so long for the reactor's thread to make room.
const HAND_OVER_MAX: Duration = Duration::from_millis(1);
const NO_WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

struct Reactor {
    /// What the reactor's thread parks on.
    gate: OwnedFd,
    epoll: OwnedFd,
    wake: OwnedFd,
    /// An unread wake-up is in the eventfd.
    awake: AtomicBool,
    inbox: Mutex<Inbox>,
    driver: Mutex<Driver>,
    /// The gate wakes the reactor's thread when something happens.
    armed: AtomicBool,
    /// The reactor's own thread drives, and how many helpers want it to make room.
    at_work: AtomicBool,
    helpers_waiting: AtomicUsize,
    spin: Duration,
    all: Weak<Reactors>,
}

#[derive(Default)]
struct Inbox {
    commands: Vec<Command>,
    stopped: bool,
}

/// What the thread that drives a reactor works with.
struct Driver {
    sources: HashMap<u64, Box<dyn Source>>,
    /// Sources with more to do.
    again: Vec<u64>,
    ready: Vec<(u64, Event)>,
    last: Instant,
    /// How long it was quiet between the last events, smoothed.
    quiet: Duration,
    stopped: bool,
}

/// The reactors of one agent.
pub(crate) struct Reactors {
    list: Vec<Arc<Reactor>>,
    tokens: AtomicU64,
    next: AtomicUsize,
}

impl fmt::Debug for Reactors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactors")
            .field("threads", &self.list.len())
            .finish_non_exhaustive()
    }
}

impl Reactors {
    pub(crate) fn start(threads: usize, spin: Duration) -> io::Result<Arc<Self>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // On one core whoever is waited for needs it.
        let spin = if cores == 1 { Duration::ZERO } else { spin };
        let mut failed = None;
        let reactors = Arc::new_cyclic(|all| {
            let made = (0..threads).map(|_| Reactor::new(spin, all.clone()).map(Arc::new));
            let list = made
                .collect::<io::Result<Vec<_>>>()
                .unwrap_or_else(|error| {
                    failed = Some(error);
                    Vec::new()
                });
            Self {
                list,
                tokens: AtomicU64::new(WAKE + 1),
                next: AtomicUsize::new(0),
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        for (index, reactor) in reactors.list.iter().enumerate() {
            let reactor = reactor.clone();
            let started = std::thread::Builder::new()
                .name(format!("bp-io-{index}"))
                .spawn(move || reactor.run());
            if let Err(error) = started {
                reactors.stop();
                return Err(error);
            }
        }
        Ok(reactors)
    }

    /// A place on the reactor for listeners and control connections.
    pub(crate) fn place_control(&self) -> Placement {
        Placement {
            reactor: 0,
            token: self.tokens.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// A place for a data connection: reactors take turns, starting with the last one so that the
    /// control reactor is the least loaded.
    pub(crate) fn place_data(&self) -> Placement {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.list.len();
        Placement {
            reactor: self.list.len() - 1 - turn,
            token: self.tokens.fetch_add(1, Ordering::Relaxed),
        }
    }

    pub(crate) fn add(&self, at: Placement, source: Box<dyn Source>) {
        self.list[at.reactor].send(Command::Add(at.token, source));
    }

    /// Gives a command to a data connection, and runs it on this thread if nobody drives the
    /// reactor at the moment.
    pub(crate) fn data(&self, at: Placement, command: DataCommand) {
        self.list[at.reactor].run_or_send(Command::Data(at.token, command));
    }

    pub(crate) fn remove(&self, at: Placement) {
        self.list[at.reactor].send(Command::Remove(at.token));
    }

    /// Serves the sockets of the reactor of `at` until what is wanted is here or `until` passes.
    /// Returns early when another thread does that already, or the reactor stops.
    pub(crate) fn help(&self, at: Placement, until: Instant, wanted: &impl Wanted) {
        self.list[at.reactor].help(until, wanted, true);
    }

    /// The same for control connections and without parking: returns when it has been quiet for a
    /// while, or is most of the time.
    pub(crate) fn look(&self, until: Instant, wanted: &impl Wanted) {
        self.list[0].help(until, wanted, false);
    }

    /// Wakes the thread that drives the reactor of `at`.
    pub(crate) fn wake(&self, at: Placement) {
        self.list[at.reactor].notify();
    }

    pub(crate) fn stop(&self) {
        for reactor in &self.list {
            reactor.send(Command::Stop);
        }
    }
}

impl Reactor {
    fn new(spin: Duration, all: Weak<Reactors>) -> io::Result<Self> {
        let gate = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(WAKE);
        epoll::add(&epoll, &wake, data, epoll::EventFlags::IN)?;
        epoll::add(&gate, &epoll, data, epoll::EventFlags::ONESHOT)?;
        Ok(Self {
            gate,
            epoll,
            wake,
            awake: AtomicBool::new(false),
            inbox: Mutex::default(),
            driver: Mutex::new(Driver {
                sources: HashMap::new(),
                again: Vec::new(),
                ready: Vec::new(),
                last: Instant::now(),
                quiet: QUIET_MAX,
                stopped: false,
            }),
            armed: AtomicBool::new(false),
            at_work: AtomicBool::new(false),
            helpers_waiting: AtomicUsize::new(0),
            spin,
            all,
        })
    }

    /// Puts a command into the inbox; false when nobody is going to read it any more.
    fn push(&self, command: Command) -> bool {
        let mut inbox = self.inbox.lock();
        if inbox.stopped {
            drop(inbox);
            // Sources that nobody will serve close their descriptors here.
            drop(command);
            return false;
        }
        inbox.stopped = matches!(command, Command::Stop);
        inbox.commands.push(command);
        true
    }

    fn send(&self, command: Command) {
        if self.push(command) {
            self.notify();
        }
    }

    fn run_or_send(&self, command: Command) {
        if !self.push(command) {
            return;
        }
        let Some(mut driver) = self.driver.try_lock() else {
            self.notify();
            return;
        };
        self.commands(&mut driver);
        let more = !driver.again.is_empty() || driver.stopped;
        drop(driver);
        // Whoever wanted to drive meanwhile has left it to this thread to arm the gate.
        fence(Ordering::SeqCst);
        if !self.armed.load(Ordering::Relaxed) {
            self.arm(true);
        }
        if more {
            self.notify();
        }
    }

    /// Makes the driver look at its inbox, now or before it parks.
    fn notify(&self) {
        if !self.awake.swap(true, Ordering::AcqRel) {
            // Fails only if the counter is full, and then the thread is awake anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_le_bytes());
        }
    }

    /// Lets events wake the reactor's thread, once.
    fn arm(&self, on: bool) {
        use epoll::EventFlags as E;
        let flags = if on { E::IN | E::ONESHOT } else { E::ONESHOT };
        let data = epoll::EventData::new_u64(WAKE);
        self.armed.store(on, Ordering::Release);
        if let Err(error) = epoll::modify(&self.gate, &self.epoll, data, flags) {
            tracing::error!(%error, "epoll failed");
        }
    }

    /// Works until the reactor stops.
    fn run(&self) {
        loop {
            self.armed.store(false, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            // Another thread that drives arms the gate when it leaves.
            if let Some(mut driver) = self.driver.try_lock() {
                self.at_work.store(true, Ordering::Relaxed);
                let room = self.work(&mut driver);
                self.at_work.store(false, Ordering::Relaxed);
                if driver.stopped {
                    return;
                }
                if !room {
                    self.arm(true);
                }
            }
            let mut events = [MaybeUninit::uninit(); 1];
            match epoll::wait(&self.gate, &mut events, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "epoll failed; the i/o thread ends");
                    return;
                }
            }
        }
    }

    /// Serves until it has been quiet for a while, or to make room for a helper (true).
    fn work(&self, driver: &mut Driver) -> bool {
        let mut quiet_since = Instant::now();
        loop {
            if self.round(driver, NO_WAIT) {
                quiet_since = Instant::now();
            }
            if driver.stopped {
                return false;
            }
            if self.helpers_waiting.load(Ordering::Acquire) > 0 {
                return true;
            }
            if driver.again.is_empty() {
                if quiet_since.elapsed() >= self.patience(driver) {
                    return false;
                }
                std::thread::yield_now();
            }
        }
    }

    /// How long to look for the next event before parking: not at all when it usually takes longer.
    fn patience(&self, driver: &Driver) -> Duration {
        // A pause that was spent parked is longer than it had to be by two wake-ups.
        if driver.quiet <= self.spin * 3 {
            self.spin
        } else {
            Duration::ZERO
        }
    }

    fn help(&self, until: Instant, wanted: &impl Wanted, park: bool) {
        let Some(mut driver) = self.take_over() else {
            return;
        };
        self.arm(false);
        let mut quiet_since = Instant::now();
        while !wanted.here() && !driver.stopped {
            if !park && self.patience(&driver).is_zero() {
                break;
            }
            if self.round(&mut driver, NO_WAIT) {
                quiet_since = Instant::now();
                continue;
            }
            let now = Instant::now();
            let left = until.saturating_duration_since(now);
            if left.is_zero() {
                break;
            }
            if now.duration_since(quiet_since) < self.spin {
                std::thread::yield_now();
                continue;
            }
            if !park {
                break;
            }
            if !wanted.parked(true) {
                let wait = Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: left.subsec_nanos().into(),
                };
                self.round(&mut driver, wait);
            }
            wanted.parked(false);
            quiet_since = Instant::now();
        }
        if driver.stopped {
            // The reactor's own thread ends as well.
            self.awake.store(false, Ordering::Release);
        }
        let more = driver.stopped || !driver.again.is_empty();
        // The gate is armed when the place is free: its thread does not wait for it.
        drop(driver);
        if more {
            self.notify();
        }
        self.arm(true);
    }

    /// The driver's place, unless another helper has it.
    fn take_over(&self) -> Option<MutexGuard<'_, Driver>> {
        self.driver.try_lock().or_else(|| {
            self.at_work.load(Ordering::Relaxed).then_some(())?;
            self.helpers_waiting.fetch_add(1, Ordering::AcqRel);
            let driver = self.driver.try_lock_for(HAND_OVER_MAX);
            self.helpers_waiting.fetch_sub(1, Ordering::AcqRel);
            // The thread may have made room for this helper, which comes too late.
            if driver.is_none() {
                self.arm(true);
                self.notify();
            }
            driver
        })
    }

    /// Serves what has happened, waiting for it up to `wait`; false when nothing had.
    fn round(&self, driver: &mut Driver, wait: Timespec) -> bool {
        let wait = if driver.again.is_empty() {
            wait
        } else {
            NO_WAIT
        };
        let mut events = [MaybeUninit::uninit(); EVENTS_PER_ROUND];
        let events: &[epoll::Event] = match epoll::wait(&self.epoll, &mut events, Some(&wait)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => &[],
            Err(error) => {
                tracing::error!(%error, "epoll failed; the reactor stops");
                driver.stop();
                return true;
            }
        };
        let mut ready = std::mem::take(&mut driver.ready);
        let mut woken = self.awake.load(Ordering::Acquire);
        ready.extend(
            driver
                .again
                .drain(..)
                .map(|token| (token, Event::default())),
        );
        for event in events {
            use epoll::EventFlags as E;
            let (token, flags) = (event.data.u64(), event.flags);
            if token == WAKE {
                woken = true;
                continue;
            }
            let event = Event {
                readable: flags.intersects(E::IN | E::RDHUP | E::HUP | E::ERR),
                writable: flags.intersects(E::OUT | E::HUP | E::ERR),
                ended: flags.intersects(E::RDHUP | E::HUP | E::ERR),
            };
            match ready.iter_mut().find(|known| known.0 == token) {
                Some(known) => known.1 = event,
                None => ready.push((token, event)),
            }
        }
        let busy = !ready.is_empty() || woken;
        if busy {
            let now = Instant::now();
            let quiet = now.duration_since(driver.last).min(QUIET_MAX);
            driver.quiet = (driver.quiet * 3 + quiet) / 4;
            driver.last = now;
        }
        // Commands after events: a removal or a stop is seen before the next event.
        for (token, event) in ready.drain(..) {
            let flow = driver
                .sources
                .get_mut(&token)
                .map(|source| source.ready(event));
            self.settle(driver, token, flow);
        }
        driver.ready = ready;
        if woken {
            let mut counter = [0; 8];
            // Cleared before the inbox is read: a later command wakes the thread again.
            let _ = rustix::io::read(&self.wake, &mut counter);
            self.awake.store(false, Ordering::Release);
            self.commands(driver);
        }
        busy
    }

    fn commands(&self, driver: &mut Driver) {
        // Taken in a statement of its own: the lock must not be held while commands run.
        let commands = std::mem::take(&mut self.inbox.lock().commands);
        for command in commands {
            match command {
                Command::Add(token, source) => self.add(driver, token, source),
                Command::Data(token, command) => {
                    let flow = driver
                        .sources
                        .get_mut(&token)
                        .map(|source| source.command(command));
                    self.settle(driver, token, flow);
                }
                Command::Remove(token) => self.settle(driver, token, Some(Flow::Drop)),
                Command::Stop => driver.stop(),
            }
        }
    }

    fn add(&self, driver: &mut Driver, token: u64, source: Box<dyn Source>) {
        use epoll::EventFlags as E;
        if driver.stopped {
            return;
        }
        let flags = E::IN | E::OUT | E::RDHUP | E::ET;
        let data = epoll::EventData::new_u64(token);
        match epoll::add(&self.epoll, source.fd(), data, flags) {
            Ok(()) => {
                driver.sources.insert(token, source);
            }
            // Dropping the source tells its owner.
            Err(error) => tracing::error!(%error, "cannot watch a socket"),
        }
    }

    fn settle(&self, driver: &mut Driver, token: u64, flow: Option<Flow>) {
        match flow {
            None | Some(Flow::Keep) => {}
            Some(Flow::Again) => {
                if !driver.again.contains(&token) {
                    driver.again.push(token);
                }
            }
            Some(Flow::Drop) => {
                if let Some(source) = driver.sources.remove(&token) {
                    // The descriptor may live on in a clone: stop watching it explicitly.
                    let _ = epoll::delete(&self.epoll, source.fd());
                }
            }
            Some(Flow::Become(at, next)) => {
                if let Some(old) = driver.sources.remove(&token) {
                    let _ = epoll::delete(&self.epoll, old.fd());
                }
                if let Some(all) = self.all.upgrade() {
                    all.add(at, next);
                }
            }
        }
    }
}

impl Driver {
    fn stop(&mut self) {
        self.stopped = true;
        self.again.clear();
        self.sources.clear();
    }
}
