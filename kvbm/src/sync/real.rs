//! Locks that wait.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

/// A mutex for sections of some ten nanoseconds that touch much of the same memory.
///
/// When threads take turns at such sections, most of the time goes into moving the memory between
/// their cores. So whoever finds the lock taken stays away from it for a moment, and for longer if
/// the other threads took it all the time meanwhile: they do many sections in a row then, with the
/// memory in their own caches and nobody to wake. The time adapts itself to about [`ROW`] sections.
/// While nobody hurries it is as short as a section, and a thread that does not get the lock then
/// sleeps until it is woken.
#[derive(Debug)]
pub(crate) struct BooksLock<T> {
    books: Mutex<T>,
    /// How often the lock was taken. Written only by its owner.
    taken: AtomicU32,
    /// How long to stay away, in pauses. Written only by those who wait.
    patience: AtomicU32,
}

/// Access to the books.
pub(crate) type BooksGuard<'a, T> = MutexGuard<'a, T>;

/// Sections in a row that make up for moving the memory once.
const ROW: u32 = 1_024;
/// Pauses, each of 10 to 50 ns.
const PATIENCE_MIN: u32 = 4;
const PATIENCE_MAX: u32 = 4_096;
/// A thread that takes the lock at least once in so many pauses hurries: right after the books have
/// come to it, a section takes a microsecond.
const HURRY: u32 = 64;
/// Attempts, a pause apart, before a thread sleeps.
const ATTEMPTS: u32 = 64;

impl<T> BooksLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            books: Mutex::new(value),
            taken: AtomicU32::new(0),
            patience: AtomicU32::new(PATIENCE_MIN),
        }
    }

    #[inline]
    pub(crate) fn lock(&self) -> BooksGuard<'_, T> {
        let books = self.books.try_lock().unwrap_or_else(|| self.wait());
        let taken = self.taken.load(Ordering::Relaxed);
        self.taken.store(taken.wrapping_add(1), Ordering::Relaxed);
        books
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.books.get_mut()
    }

    #[cold]
    fn wait(&self) -> BooksGuard<'_, T> {
        let patience = self.patience.load(Ordering::Relaxed);
        let before = self.taken.load(Ordering::Relaxed);
        (0..patience).for_each(|_| spin_loop());
        let attempt = |_| {
            spin_loop();
            self.books.try_lock()
        };
        let books = (0..ATTEMPTS).find_map(attempt);
        let books = books.unwrap_or_else(|| self.books.lock());
        let row = self.taken.load(Ordering::Relaxed).wrapping_sub(before);
        self.patience
            .store(adapted(patience, row), Ordering::Relaxed);
        books
    }
}

/// How long to stay away next time, when others took the lock `row` times meanwhile.
fn adapted(patience: u32, row: u32) -> u32 {
    let better = if row >= ROW {
        patience / 2
    } else if row > patience / HURRY {
        patience * 2
    } else {
        patience / 2
    };
    better.clamp(PATIENCE_MIN, PATIENCE_MAX)
}

/// Waits for a notification; true when `deadline` came first. One beyond the clock's range never
/// comes.
pub(crate) fn wait_until<T>(
    condvar: &Condvar,
    guard: &mut MutexGuard<'_, T>,
    deadline: Option<Instant>,
) -> bool {
    match deadline {
        Some(deadline) => condvar.wait_until(guard, deadline).timed_out(),
        None => {
            condvar.wait(guard);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[test]
    fn patience_grows_only_while_others_hurry() {
        let grown = (0..20).fold(PATIENCE_MIN, |patience, _| adapted(patience, patience / 2));
        assert!((ROW..=PATIENCE_MAX).contains(&grown), "{grown}");
        assert!(adapted(grown, 2 * ROW) < grown, "it was long enough");
        let calm = (0..12).fold(grown, |patience, _| adapted(patience, patience / 100));
        assert_eq!(calm, PATIENCE_MIN);
        assert_eq!(adapted(PATIENCE_MIN, 0), PATIENCE_MIN);
        assert_eq!(adapted(PATIENCE_MAX, ROW - 1), PATIENCE_MAX);
    }

    #[test]
    fn no_section_overlaps_another() {
        let lock = Arc::new(BooksLock::new(0u64));
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let lock = Arc::clone(&lock);
                thread::spawn(move || (0..50_000).for_each(|_| *lock.lock() += 1))
            })
            .collect();
        workers
            .into_iter()
            .for_each(|worker| worker.join().unwrap());
        assert_eq!(*lock.lock(), 200_000);
        assert_eq!(lock.taken.load(Ordering::Relaxed), 200_001);
    }
}
