//! The owner's side of a world: memory that the other side reads and writes, windows over it, and
//! the queue of notifications. It does what the other side asks over the link.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use blockplane_transfer::{
    Agent, ArenaConfig, Notification, Registration, RemoteAccess, Window, WindowAccess, WindowScope,
};
use parking_lot::{Condvar, Mutex};

use crate::blocks::window_layout;
use crate::pattern::pattern;
use crate::{BLOCKS, SLOT, SLOTS, WAIT};

/// An arena open to peers, an arena behind windows, ordinary memory open to peers.
pub(crate) const REGIONS: usize = 3;
pub(crate) const GUARDED: usize = 1;

pub(crate) struct Owner {
    agent: Agent,
    regions: Mutex<[Registration; REGIONS]>,
    books: Mutex<Books>,
    heard: Condvar,
}

#[derive(Default)]
struct Books {
    windows: HashMap<u64, (usize, Window)>,
    /// Slots that were taken back without the other side asking for it.
    reclaimed: HashSet<usize>,
    temporary: HashMap<u64, Registration>,
    /// Lives of the other side that are over.
    dead: HashSet<u64>,
    /// Notifications by life and connection of the sender.
    seen: HashMap<(u64, u64), Vec<u64>>,
    held: bool,
    wrong: Vec<String>,
}

impl Owner {
    pub(crate) fn start(agent: &Agent) -> Arc<Self> {
        let owner = Arc::new(Self {
            agent: agent.clone(),
            regions: Mutex::new(regions(agent)),
            books: Mutex::default(),
            heard: Condvar::new(),
        });
        let (listener, notifications) = (Arc::downgrade(&owner), agent.notifications());
        std::thread::spawn(move || {
            // The queue ends with the agent.
            while let Ok(note) = notifications.recv_timeout(Duration::from_secs(3600)) {
                let Some(owner) = listener.upgrade() else {
                    return;
                };
                owner.hear(&note);
            }
        });
        owner
    }

    /// Payload: connection, number, and if it is bound to a WRITE: region, slot, checksum.
    fn hear(&self, note: &Notification) {
        let text = std::str::from_utf8(&note.payload).unwrap();
        let numbers: Vec<u64> = text
            .trim_end()
            .split(' ')
            .map(|n| n.parse().unwrap())
            .collect();
        let mut books = self.books.lock();
        while books.held {
            self.heard.wait(&mut books);
        }
        if let [_, number, region, slot, sum] = numbers[..]
            // What was taken back has other bytes by now.
            && !books.dead.contains(&note.epoch)
            && !(region as usize == GUARDED && books.reclaimed.contains(&(slot as usize)))
        {
            let bytes = self.slot(region as usize, slot as usize);
            if u64::from(crc32c::crc32c(&bytes)) != sum {
                books
                    .wrong
                    .push(format!("notification {number} came before its bytes"));
            }
        }
        let seen = books.seen.entry((note.epoch, numbers[0])).or_default();
        let last = seen.last().copied();
        seen.push(numbers[1]);
        if last.is_some_and(|last| last >= numbers[1]) {
            let wrong = format!("notification {} came after {last:?}", numbers[1]);
            books.wrong.push(wrong);
        }
        drop(books);
        self.heard.notify_all();
    }

    fn slot(&self, region: usize, slot: usize) -> Vec<u8> {
        let mut bytes = vec![0; SLOT];
        self.regions.lock()[region]
            .read_at((slot * SLOT) as u64, &mut bytes)
            .unwrap();
        bytes
    }

    fn fill(&self, region: usize, slot: usize, tag: u64) {
        self.regions.lock()[region]
            .write_at((slot * SLOT) as u64, &pattern(tag, SLOT))
            .unwrap();
    }

    /// Answers one question of the other side.
    pub(crate) fn serve(&self, question: &str) -> String {
        let mut words = question.split(' ');
        let verb = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        let at = |index: usize| numbers[index] as usize;
        match verb {
            "metadata" => hex(&self.agent.metadata().to_bytes()),
            "regions" => self
                .regions
                .lock()
                .iter()
                .map(|region| region.id().0.to_string())
                .collect::<Vec<_>>()
                .join(" "),
            "fill" if at(0) == GUARDED && self.books.lock().reclaimed.contains(&at(1)) => {
                "reclaimed".to_owned()
            }
            "fill" => {
                self.fill(at(0), at(1), numbers[2]);
                "ok".to_owned()
            }
            "check" => self.check(at(0), at(1), numbers[2]),
            "open" => self.open(at(0), numbers[1]),
            "close" => self.close(numbers[0], numbers[1]),
            "temporary" => self.temporary(at(0)),
            "release" => {
                let region = self.books.lock().temporary.remove(&numbers[0]);
                drop(region);
                "ok".to_owned()
            }
            "hold" => {
                self.books.lock().held = true;
                "ok".to_owned()
            }
            "resume" => {
                self.books.lock().held = false;
                self.heard.notify_all();
                "ok".to_owned()
            }
            "seen" => self.seen((numbers[0], numbers[1]), numbers[2]),
            "wrong" => self.books.lock().wrong.join("; "),
            other => panic!("unknown question {other:?}"),
        }
    }

    fn check(&self, region: usize, slot: usize, sum: u64) -> String {
        if region == GUARDED && self.books.lock().reclaimed.contains(&slot) {
            return "reclaimed".to_owned();
        }
        let got = u64::from(crc32c::crc32c(&self.slot(region, slot)));
        if got == sum {
            "ok".to_owned()
        } else {
            format!("bytes differ in slot {slot} of region {region}")
        }
    }

    fn open(&self, slot: usize, kind: u64) -> String {
        let blocks_first = slot as u64 * u64::from(BLOCKS);
        let offset = (slot * SLOT) as u64;
        let scope = if kind == 0 {
            WindowScope::Ranges(std::iter::once(offset..offset + SLOT as u64).collect())
        } else {
            WindowScope::Blocks {
                layout: window_layout(),
                ids: (0..BLOCKS)
                    .map(|block| blocks_first as u32 + block)
                    .collect(),
            }
        };
        let region = self.regions.lock()[GUARDED].clone();
        let window = self
            .agent
            .open_window(&region, scope, WindowAccess::ReadWrite)
            .unwrap();
        let id = window.id().0;
        self.books.lock().windows.insert(id, (slot, window));
        id.to_string()
    }

    /// Closes a window and gives its slot another meaning at once.
    fn close(&self, id: u64, tag: u64) -> String {
        let Some((slot, window)) = self.books.lock().windows.remove(&id) else {
            return "reclaimed".to_owned();
        };
        match window.close(WAIT) {
            Ok(()) => {
                self.fill(GUARDED, slot, tag);
                "ok".to_owned()
            }
            Err(busy) => panic!("{busy}"),
        }
    }

    fn temporary(&self, kind: usize) -> String {
        let region = if kind == 0 {
            self.agent
                .allocate(ArenaConfig::new(SLOT, "temporary"))
                .unwrap()
        } else {
            self.agent
                .register(vec![0; SLOT], RemoteAccess::Open)
                .unwrap()
        };
        let id = region.id().0;
        self.books.lock().temporary.insert(id, region);
        id.to_string()
    }

    fn seen(&self, from: (u64, u64), number: u64) -> String {
        let mut books = self.books.lock();
        while !books
            .seen
            .get(&from)
            .is_some_and(|seen| seen.contains(&number))
        {
            if self.heard.wait_for(&mut books, WAIT).timed_out() {
                return format!("notification {number} is lost");
            }
        }
        "ok".to_owned()
    }

    /// Takes all windows back, without the other side: it is dead, or (`may_be_busy`) stopped.
    /// Slots that could be closed get other bytes; the other windows stay in `reclaimed`.
    pub(crate) fn reclaim(&self, reclaimed: &mut Reclaimed, may_be_busy: bool) {
        let windows: Vec<_> = self.books.lock().windows.drain().collect();
        // Long enough for a live peer to answer on a busy machine.
        let timeout = if may_be_busy {
            Duration::from_millis(200)
        } else {
            WAIT
        };
        for (_, (slot, window)) in windows {
            self.books.lock().reclaimed.insert(slot);
            match window.close(timeout) {
                Ok(()) => {
                    self.fill(GUARDED, slot, reclaimed.tag);
                    reclaimed.slots.push(slot);
                }
                Err(busy) if may_be_busy => reclaimed.busy.push((slot, busy.window)),
                Err(busy) => panic!("{busy}, although nobody can use it"),
            }
        }
    }

    /// Closes what was busy; its holder lives again or is dead by now.
    pub(crate) fn reclaim_rest(&self, reclaimed: &mut Reclaimed) {
        for (slot, window) in reclaimed.busy.drain(..) {
            window.close(WAIT).unwrap();
            self.fill(GUARDED, slot, reclaimed.tag);
            reclaimed.slots.push(slot);
        }
    }

    /// Slots that were written to after they were taken back.
    pub(crate) fn damaged(&self, reclaimed: &Reclaimed) -> Vec<usize> {
        let expected = pattern(reclaimed.tag, SLOT);
        let mut slots = reclaimed.slots.clone();
        slots.retain(|slot| self.slot(GUARDED, *slot) != expected);
        slots
    }

    /// A life of the other side is over: the next one finds new memory, full of zeros.
    pub(crate) fn renew(&self, dead: u64) {
        let mut books = self.books.lock();
        books.dead.insert(dead);
        drop(books);
        let old = std::mem::replace(&mut *self.regions.lock(), regions(&self.agent));
        let mut books = self.books.lock();
        books.reclaimed.clear();
        books.temporary.clear();
        books.held = false;
        drop(books);
        drop(old);
        self.heard.notify_all();
    }
}

fn regions(agent: &Agent) -> [Registration; REGIONS] {
    let bytes = SLOT * SLOTS;
    let arena = |access| {
        let config = ArenaConfig::new(bytes, "served").with_access(access);
        agent.allocate(config).unwrap()
    };
    [
        arena(RemoteAccess::Open),
        arena(RemoteAccess::WindowOnly),
        agent.register(vec![0; bytes], RemoteAccess::Open).unwrap(),
    ]
}

/// What [`Owner::reclaim`] got.
pub(crate) struct Reclaimed {
    tag: u64,
    slots: Vec<usize>,
    busy: Vec<(usize, Window)>,
}

impl Reclaimed {
    pub(crate) const fn new(tag: u64) -> Self {
        Self {
            tag,
            slots: Vec::new(),
            busy: Vec::new(),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}
