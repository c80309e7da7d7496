//! Worker threads for data-parallel loops.
//!
//! A step of a small model is hundreds of loops of some microseconds each, so handing one over
//! must cost less than a system call. Idle workers spin for a moment before they sleep, the caller
//! works too, and a worker that wakes up late finds the loop closed and is not waited for.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use thiserror::Error;

/// The most threads of one pool.
const THREADS_MAX: usize = 1024;
/// Spins before an idle worker sleeps: some 150 microseconds, more than the longest item of a loop
/// that another thread may still be at.
const SPINS_IDLE: u32 = 3_000;
/// Spins before a caller that waits for the last items sleeps.
const SPINS_FINISH: u32 = 3_000;

/// Arithmetic worth handing over: some microseconds of it.
pub(super) const OPERATIONS_MIN: usize = 200_000;

/// In `Shared::state`: no worker may join the loop any more.
const CLOSED: u64 = 1 << 31;
/// In `Shared::state`: workers inside the loop.
const ACTIVE: u64 = CLOSED - 1;
/// In `Shared::state`: one more loop.
const GENERATION: u64 = 1 << 32;

/// Why a pool is not started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The number of threads makes no sense.
    #[error("{found} compute threads; accepted: 1 to {THREADS_MAX}")]
    Threads {
        /// The number asked for.
        found: usize,
    },
    /// The operating system refused a thread.
    #[error("compute thread {index} cannot be started: {source}")]
    Spawn {
        /// Which one.
        index: usize,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// Threads that run loops together with their caller. Dropping it ends them.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held for the length of a loop: callers take turns.
    submit: Mutex<()>,
}

/// A loop: its body and the number of items.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    items: usize,
}

struct Shared {
    /// `generation | CLOSED | active workers`. Closed with nobody active means that `job` may be
    /// replaced; open means that it may be run.
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    asleep: Mutex<()>,
    wake: Condvar,
    /// Whether the caller of the loop sleeps until the last worker has left it.
    caller_sleeps: AtomicBool,
    left: Condvar,
    stop: AtomicBool,
}

// SAFETY: `job` is written only by the holder of `Pool::submit` while `state` is closed with no
// active worker, and read only by that holder and by workers that are counted as active.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside `job` is used only as described above; nothing is bound to a thread.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of each loop included.
    pub(super) fn new(threads: usize) -> Result<Self, PoolError> {
        if !(1..=THREADS_MAX).contains(&threads) {
            return Err(PoolError::Threads { found: threads });
        }
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
            left: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(threads - 1),
            submit: Mutex::new(()),
        };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("compute-{index}"))
                .spawn(move || shared.work())
                .map_err(|source| PoolError::Spawn { index, source })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that take part in a loop.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(0)` to `body(items - 1)`, in any order, and returns when all are done: on all
    /// threads, or on this one alone if `operations`, a rough count of all arithmetic, says that
    /// handing over would take longer. The wait is bounded by the items that are running when the caller runs out of them.
    ///
    /// # Panics
    /// With the payload of the first item that panicked, after the others are done.
    pub(super) fn run(&self, items: usize, operations: usize, body: &(dyn Fn(usize) + Sync)) {
        if items <= 1 || operations < OPERATIONS_MIN || self.workers.is_empty() {
            (0..items).for_each(body);
            return;
        }
        let _turn = self.submit.lock();
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. `run` does not return before no worker is active and
        // none can join, so `body` outlives every use.
        let body = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync)>(
                body,
            )
        };
        let job = Job { body, items };
        // SAFETY: the state is closed with nobody active, and this thread holds `submit`.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        let closed = shared.state.load(Ordering::Relaxed);
        let open = (closed & !(CLOSED | ACTIVE)).wrapping_add(GENERATION);
        // Sequentially consistent together with `sleepers`: either this thread sees the sleeper or
        // the sleeper sees the open loop.
        shared.state.store(open, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(shared.asleep.lock());
            shared.wake.notify_all();
        }
        shared.run_items(job);
        shared.state.fetch_or(CLOSED, Ordering::AcqRel);
        shared.wait_until_left();
        let panic = shared.panic.lock().take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Shared {
    fn run_items(&self, job: Job) {
        // SAFETY: the caller of `Pool::run` keeps the body alive while the loop is open or active.
        let body = unsafe { &*job.body };
        let run = || {
            loop {
                let item = self.next.fetch_add(1, Ordering::Relaxed);
                if item >= job.items {
                    break;
                }
                body(item);
            }
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(run)) {
            self.panic.lock().get_or_insert(payload);
        }
    }

    /// Waits until no worker is inside the closed loop.
    fn wait_until_left(&self) {
        for _ in 0..SPINS_FINISH {
            if self.state.load(Ordering::Acquire) & ACTIVE == 0 {
                return;
            }
            spin_loop();
        }
        // Sequentially consistent together with `state`: either this thread sees that the last
        // worker has left, or that worker sees that this thread sleeps.
        self.caller_sleeps.store(true, Ordering::SeqCst);
        let mut asleep = self.asleep.lock();
        while self.state.load(Ordering::SeqCst) & ACTIVE != 0 {
            self.left.wait(&mut asleep);
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }

    fn work(&self) {
        let mut seen = 0;
        while let Some(state) = self.wait_for_loop(seen) {
            seen = state / GENERATION;
            let joined =
                self.state
                    .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
            match joined {
                Ok(_) => {
                    // SAFETY: this worker is counted as active, so the job is not replaced.
                    let job = unsafe { *self.job.get() };
                    if let Some(job) = job {
                        self.run_items(job);
                    }
                    let before = self.state.fetch_sub(1, Ordering::SeqCst);
                    if before & (CLOSED | ACTIVE) == CLOSED | 1
                        && self.caller_sleeps.load(Ordering::SeqCst)
                    {
                        drop(self.asleep.lock());
                        self.left.notify_one();
                    }
                }
                // Another worker joined in between, or the loop closed: look again.
                Err(now) if now / GENERATION == seen && now & CLOSED == 0 => seen -= 1,
                Err(_) => {}
            }
        }
    }

    /// The state when a loop later than `seen` is open; `None` when the pool ends.
    fn wait_for_loop(&self, seen: u64) -> Option<u64> {
        let open = |state: u64| state & CLOSED == 0 && state / GENERATION != seen;
        for _ in 0..SPINS_IDLE {
            let state = self.state.load(Ordering::Acquire);
            if open(state) {
                return Some(state);
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            spin_loop();
        }
        let mut asleep = self.asleep.lock();
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let state = loop {
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            let state = self.state.load(Ordering::SeqCst);
            if open(state) {
                break Some(state);
            }
            self.wake.wait(&mut asleep);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        state
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.asleep.lock());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!("a compute thread ended with a panic");
            }
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            for items in [0, 1, 2, 7, 100, 1000] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, OPERATIONS_MIN, &|item| {
                    counts[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts
                        .iter()
                        .all(|count| count.load(Ordering::Relaxed) == 1)
                );
            }
        }
    }

    #[test]
    fn many_short_loops_see_their_own_body() {
        let pool = Pool::new(4).unwrap();
        for round in 0..20_000_usize {
            let sum = AtomicUsize::new(0);
            pool.run(5, OPERATIONS_MIN, &|item| {
                sum.fetch_add(round + item, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 5 * round + 10);
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(3).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let sum = AtomicUsize::new(0);
                        pool.run(16, OPERATIONS_MIN, &|item| {
                            sum.fetch_add(item, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 120);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        let done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, OPERATIONS_MIN, &|item| {
                assert_ne!(item, 20, "planted");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(64, OPERATIONS_MIN, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 64);
    }

    #[test]
    fn little_work_stays_on_its_thread() {
        let pool = Pool::new(4).unwrap();
        let caller = std::thread::current().id();
        for _ in 0..100 {
            pool.run(64, OPERATIONS_MIN - 1, &|_| {
                assert_eq!(std::thread::current().id(), caller);
            });
        }
    }

    #[test]
    fn a_caller_that_sleeps_is_woken() {
        // The items of the worker take longer than the caller spins.
        let pool = Pool::new(2).unwrap();
        let caller = std::thread::current().id();
        for _ in 0..20 {
            let slow = AtomicUsize::new(0);
            pool.run(2, OPERATIONS_MIN, &|_| {
                if std::thread::current().id() != caller {
                    for _ in 0..20 * SPINS_FINISH {
                        spin_loop();
                    }
                }
                slow.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(slow.into_inner(), 2);
        }
    }

    #[test]
    fn a_wrong_number_of_threads_is_an_error() {
        assert!(matches!(Pool::new(0), Err(PoolError::Threads { found: 0 })));
        assert!(Pool::new(THREADS_MAX + 1).is_err());
    }
}
