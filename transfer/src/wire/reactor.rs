//! Threads that serve sockets: epoll, edge-triggered, parked while nothing happens.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};

use super::data::DataCommand;

/// Something that a reactor serves. All calls come from one thread.
pub(crate) trait Source: Send {
    /// What epoll watches.
    fn fd(&self) -> BorrowedFd<'_>;

    /// The descriptor became readable, writable or both; neither after [`Flow::Again`].
    /// Edge-triggered: go on until the call would block, or say [`Flow::Again`].
    fn ready(&mut self, readable: bool, writable: bool) -> Flow;

    /// A command from another thread.
    fn command(&mut self, command: DataCommand) -> Flow {
        let _ = command;
        Flow::Keep
    }
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

enum Command {
    Add(u64, Box<dyn Source>),
    Data(u64, DataCommand),
    Remove(u64),
    Stop,
}

/// Token of the eventfd.
const WAKE: u64 = 0;

struct Reactor {
    epoll: OwnedFd,
    wake: OwnedFd,
    /// An unread wake-up is in the eventfd.
    awake: AtomicBool,
    inbox: Mutex<Inbox>,
}

#[derive(Default)]
struct Inbox {
    commands: Vec<Command>,
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
    pub(crate) fn start(threads: usize) -> io::Result<Arc<Self>> {
        let mut list = Vec::with_capacity(threads);
        for _ in 0..threads {
            list.push(Arc::new(Reactor::new()?));
        }
        let reactors = Arc::new(Self {
            list,
            tokens: AtomicU64::new(WAKE + 1),
            next: AtomicUsize::new(0),
        });
        for (index, reactor) in reactors.list.iter().enumerate() {
            let (reactor, all) = (reactor.clone(), Arc::downgrade(&reactors));
            let started = std::thread::Builder::new()
                .name(format!("bp-io-{index}"))
                .spawn(move || {
                    reactor.run(|placement, source| {
                        if let Some(all) = all.upgrade() {
                            all.add(placement, source);
                        }
                    });
                });
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

    pub(crate) fn data(&self, at: Placement, command: DataCommand) {
        self.list[at.reactor].send(Command::Data(at.token, command));
    }

    pub(crate) fn remove(&self, at: Placement) {
        self.list[at.reactor].send(Command::Remove(at.token));
    }

    pub(crate) fn stop(&self) {
        for reactor in &self.list {
            reactor.send(Command::Stop);
        }
    }
}

impl Reactor {
    fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(
            &epoll,
            &wake,
            epoll::EventData::new_u64(WAKE),
            epoll::EventFlags::IN,
        )?;
        Ok(Self {
            epoll,
            wake,
            awake: AtomicBool::new(false),
            inbox: Mutex::default(),
        })
    }

    fn send(&self, command: Command) {
        let mut inbox = self.inbox.lock();
        if inbox.stopped {
            drop(inbox);
            // Sources that nobody will serve close their descriptors here.
            drop(command);
            return;
        }
        inbox.stopped = matches!(command, Command::Stop);
        inbox.commands.push(command);
        drop(inbox);
        if !self.awake.swap(true, Ordering::AcqRel) {
            // Fails only if the counter is full, and then the thread is awake anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_le_bytes());
        }
    }

    fn run(&self, hand_over: impl Fn(Placement, Box<dyn Source>)) {
        let mut sources: HashMap<u64, Box<dyn Source>> = HashMap::new();
        let mut events: Vec<epoll::Event> = Vec::with_capacity(128);
        let mut again: Vec<u64> = Vec::new();
        loop {
            let poll = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let timeout = if again.is_empty() { None } else { Some(&poll) };
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "epoll failed, sockets of this agent are dead");
                    return;
                }
            }
            let unfinished = std::mem::take(&mut again)
                .into_iter()
                .map(|token| (token, false, false));
            let mut ready: Vec<(u64, bool, bool)> = unfinished.collect();
            for event in &events {
                use epoll::EventFlags as E;
                let (token, flags) = (event.data.u64(), event.flags);
                if token == WAKE {
                    continue;
                }
                let readable = flags.intersects(E::IN | E::RDHUP | E::HUP | E::ERR);
                let writable = flags.intersects(E::OUT | E::HUP | E::ERR);
                match ready.iter_mut().find(|known| known.0 == token) {
                    Some(known) => *known = (token, readable, writable),
                    None => ready.push((token, readable, writable)),
                }
            }
            // Commands after events: a removal or a stop is seen before the next event.
            for (token, readable, writable) in ready {
                let flow = sources
                    .get_mut(&token)
                    .map(|source| source.ready(readable, writable));
                self.settle(&mut sources, &mut again, token, flow, &hand_over);
            }
            if self.awake.load(Ordering::Acquire) {
                let mut counter = [0; 8];
                // Cleared before the inbox is read: a later command wakes the thread again.
                let _ = rustix::io::read(&self.wake, &mut counter);
                self.awake.store(false, Ordering::Release);
            }
            // Taken in a statement of its own: the lock must not be held while commands run.
            let commands = std::mem::take(&mut self.inbox.lock().commands);
            for command in commands {
                match command {
                    Command::Add(token, source) => self.add(&mut sources, token, source),
                    Command::Data(token, command) => {
                        let flow = sources
                            .get_mut(&token)
                            .map(|source| source.command(command));
                        self.settle(&mut sources, &mut again, token, flow, &hand_over);
                    }
                    Command::Remove(token) => {
                        self.settle(
                            &mut sources,
                            &mut again,
                            token,
                            Some(Flow::Drop),
                            &hand_over,
                        );
                    }
                    Command::Stop => return,
                }
            }
        }
    }

    fn add(
        &self,
        sources: &mut HashMap<u64, Box<dyn Source>>,
        token: u64,
        source: Box<dyn Source>,
    ) {
        use epoll::EventFlags as E;
        let flags = E::IN | E::OUT | E::RDHUP | E::ET;
        let data = epoll::EventData::new_u64(token);
        match epoll::add(&self.epoll, source.fd(), data, flags) {
            Ok(()) => {
                sources.insert(token, source);
            }
            // Dropping the source tells its owner.
            Err(error) => tracing::error!(%error, "cannot watch a socket"),
        }
    }

    fn settle(
        &self,
        sources: &mut HashMap<u64, Box<dyn Source>>,
        again: &mut Vec<u64>,
        token: u64,
        flow: Option<Flow>,
        hand_over: &impl Fn(Placement, Box<dyn Source>),
    ) {
        match flow {
            None | Some(Flow::Keep) => {}
            Some(Flow::Again) => {
                if !again.contains(&token) {
                    again.push(token);
                }
            }
            Some(Flow::Drop) => {
                if let Some(source) = sources.remove(&token) {
                    // The descriptor may live on in a clone: stop watching it explicitly.
                    let _ = epoll::delete(&self.epoll, source.fd());
                }
            }
            Some(Flow::Become(at, next)) => {
                if let Some(old) = sources.remove(&token) {
                    let _ = epoll::delete(&self.epoll, old.fd());
                }
                hand_over(at, next);
            }
        }
    }
}
