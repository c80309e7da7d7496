//! A stand-in for the tiers below the pool: copies of blocks on a shelf, and a thread that brings
//! them back as well as the test lets it.

use std::{collections::HashMap, fmt, sync::mpsc, thread};

use blockplane_kvbm::{ImmutableBlock, KvArena};
use blockplane_protocol::{BlockId, LayerIndex, SequenceHash, TokenBlock};

use super::*;
use crate::{
    native::below::{Below, Loaded, LoadedFrom, Loading, Lower},
    scheduler::Found,
};

/// How a load goes: blocks that come, and whether they come only when [`Shelf::release`] is called.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mood {
    pub(super) fail_after: Option<usize>,
    pub(super) hold: bool,
}

/// Copies of blocks by name.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    books: Mutex<HashMap<SequenceHash, Vec<u8>>>,
    mood: Mutex<Mood>,
    held: Mutex<Vec<mpsc::Sender<()>>>,
    pub(super) loads: AtomicUsize,
    pub(super) referenced: AtomicUsize,
    /// Loads that nobody wanted any more.
    pub(super) given_up: AtomicUsize,
}

#[derive(Debug)]
struct OfPool {
    shelf: Arc<Shelf>,
    arena: Arc<KvArena>,
    pool: BlockPool,
}

struct Books {
    shelf: Arc<Shelf>,
    arena: Arc<KvArena>,
    /// One for each block not readable, in order, with its place in the run.
    contents: Vec<(usize, Vec<u8>)>,
    run: usize,
}

type Done = Box<dyn FnOnce(Loaded) + Send>;

/// What the thread and the engine share of one load.
struct Way {
    shelf: Arc<Shelf>,
    state: Arc<Mutex<State>>,
}

enum State {
    Wanted(Done),
    GivenUp(#[expect(dead_code, reason = "dropped when the bytes are at rest")] Box<dyn Send>),
    Over,
}

impl Shelf {
    pub(super) fn below(shelf: &Arc<Self>, pool: &BlockPool) -> Arc<dyn Below> {
        Arc::new(OfPool {
            shelf: Arc::clone(shelf),
            arena: Arc::clone(pool.arena().expect("an engine's pool has memory")),
            pool: pool.clone(),
        })
    }

    pub(super) fn set(&self, mood: Mood) {
        *self.mood.lock() = mood;
    }

    /// Lets the loads go on that are held.
    pub(super) fn release(&self) {
        self.held.lock().clear();
    }

    pub(super) fn len(&self) -> usize {
        self.books.lock().len()
    }

    /// Takes away one in `every` blocks.
    pub(super) fn lose(&self, every: usize) {
        let mut place = 0;
        self.books.lock().retain(|_, _| {
            place += 1;
            place % every != 0
        });
    }
}

impl Below for OfPool {
    fn extend_prefix(&self, prefix: Vec<ImmutableBlock>, blocks: &[TokenBlock]) -> Found<KvPool> {
        let mut found = Found::readable(prefix);
        let mut contents = Vec::new();
        let books = self.shelf.books.lock();
        for (place, block) in blocks.iter().enumerate().skip(found.blocks.len()) {
            let readable = self.pool.match_prefix(&[*block]).pop();
            if readable.is_none() {
                let Some(content) = books.get(&block.sequence) else {
                    break;
                };
                contents.push((place, content.clone()));
            }
            found.blocks.push(readable);
        }
        let run = found.blocks.len();
        found.lower = (!contents.is_empty()).then(|| {
            Box::new(Books {
                shelf: Arc::clone(&self.shelf),
                arena: Arc::clone(&self.arena),
                contents,
                run,
            }) as Box<dyn Lower>
        });
        found
    }

    fn referenced(&self, _blocks: &[TokenBlock]) {
        self.shelf.referenced.fetch_add(1, Ordering::Relaxed);
    }

    fn offload(&self, blocks: &[TokenBlock], _priority: Option<u32>) -> bool {
        let mut books = self.shelf.books.lock();
        for block in self.pool.match_prefix(blocks) {
            books.insert(block.hash(), copy_out(&self.arena, block.id()));
        }
        true
    }
}

impl Lower for Books {
    fn load(
        self: Box<Self>,
        targets: Vec<BlockId>,
        _within: Duration,
        done: Done,
    ) -> Box<dyn Loading> {
        let shelf = Arc::clone(&self.shelf);
        shelf.loads.fetch_add(1, Ordering::Relaxed);
        assert_eq!(targets.len(), self.contents.len(), "each has a place");
        let mood = *shelf.mood.lock();
        let wait = mood.hold.then(|| {
            let (go, wait) = mpsc::channel();
            shelf.held.lock().push(go);
            wait
        });
        let state = Arc::new(Mutex::new(State::Wanted(done)));
        let way = Way {
            shelf,
            state: Arc::clone(&state),
        };
        thread::spawn(move || {
            let come = mood.fail_after.unwrap_or(usize::MAX);
            let (now, later) = (come / 2, come);
            self.copy(&targets, 0..now);
            if let Some(wait) = wait {
                // Ends when the sender is dropped.
                let _ = wait.recv();
            }
            // Bytes still land although the load may have been given up.
            self.copy(&targets, now..later);
            let leading = match self.contents.get(come) {
                Some((place, _)) => {
                    spoil(&self.arena, targets[come]);
                    *place
                }
                None => self.run,
            };
            let loaded = u32::try_from(come.min(self.contents.len())).unwrap();
            let state = std::mem::replace(&mut *state.lock(), State::Over);
            if let State::Wanted(done) = state {
                let host = loaded / 2;
                let disk = loaded - host;
                let remote = 0;
                let from = LoadedFrom { host, disk, remote };
                done(Loaded { leading, from });
            }
        });
        Box::new(way)
    }
}

impl Books {
    fn copy(&self, targets: &[BlockId], places: std::ops::Range<usize>) {
        let pairs = targets.iter().zip(&self.contents);
        for (&target, (_, content)) in pairs.take(places.end).skip(places.start) {
            copy_in(&self.arena, target, content);
        }
    }
}

impl Loading for Way {
    fn give_up(self: Box<Self>, keep: Box<dyn Send>) {
        self.shelf.given_up.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.lock();
        if matches!(*state, State::Wanted(_)) {
            *state = State::GivenUp(keep);
        }
    }
}

impl fmt::Debug for Books {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Books").field("run", &self.run).finish()
    }
}

fn runs(arena: &KvArena, id: BlockId) -> impl Iterator<Item = *mut u8> {
    let layers = (0..arena.layout().layers).map(LayerIndex);
    layers.map(move |layer| arena.run_ptr(id, layer).as_ptr())
}

fn copy_out(arena: &KvArena, id: BlockId) -> Vec<u8> {
    let len = arena.layout().layer_bytes();
    let mut bytes = vec![0; len * arena.layout().layers as usize];
    for (run, to) in runs(arena, id).zip(bytes.chunks_mut(len)) {
        // SAFETY: a run is `len` bytes of the arena, and nobody writes to a readable block.
        unsafe { run.copy_to_nonoverlapping(to.as_mut_ptr(), len) };
    }
    bytes
}

fn copy_in(arena: &KvArena, id: BlockId, bytes: &[u8]) {
    let len = arena.layout().layer_bytes();
    for (run, from) in runs(arena, id).zip(bytes.chunks(len)) {
        // SAFETY: a run is `len` bytes of the arena, and the block is kept for this load.
        unsafe { run.copy_from_nonoverlapping(from.as_ptr(), len) };
    }
}

fn spoil(arena: &KvArena, id: BlockId) {
    let bytes = vec![0xA5; arena.layout().layer_bytes() * arena.layout().layers as usize];
    copy_in(arena, id, &bytes);
}
