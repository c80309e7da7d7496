//! Locks that wait.

use std::{
    hint::spin_loop,
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

/// A mutex for sections of some ten nanoseconds that touch much of the same memory.
///
/// When threads take turns at such sections, most of the time goes into moving the memory between
/// their cores. So whoever finds the lock taken stays away for a while, longer the more often that
/// happens, so that the other one does many sections in a row with the memory in its own cache and
/// nobody to wake. The time adapts itself: it grows while the lock was taken fewer than
/// [`ROW`] times since somebody last waited for it, and shrinks otherwise. A thread that finds it
/// taken every time sleeps until it is woken.
#[derive(Debug)]
pub(crate) struct BooksLock<T> {
    books: Mutex<Counted<T>>,
    /// How long to stay away, in pauses. Written only by those who wait.
    patience: AtomicU32,
}

#[derive(Debug)]
struct Counted<T> {
    /// How often the lock was taken since somebody last waited for it.
    row: u32,
    value: T,
}

/// Access to the books.
#[derive(Debug)]
pub(crate) struct BooksGuard<'a, T>(MutexGuard<'a, Counted<T>>);

/// Sections in a row that make up for moving the memory once.
const ROW: u32 = 1_024;
/// Pauses, each of 10 to 50 ns.
const PATIENCE_MIN: u32 = 4;
const PATIENCE_MAX: u32 = 4_096;
/// Attempts before a thread sleeps.
const ATTEMPTS: u32 = 8;

impl<T> BooksLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            books: Mutex::new(Counted { row: 0, value }),
            patience: AtomicU32::new(PATIENCE_MIN),
        }
    }

    #[inline]
    pub(crate) fn lock(&self) -> BooksGuard<'_, T> {
        let mut books = self.books.try_lock().unwrap_or_else(|| self.wait());
        books.row = books.row.saturating_add(1);
        BooksGuard(books)
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        &mut self.books.get_mut().value
    }

    #[cold]
    fn wait(&self) -> MutexGuard<'_, Counted<T>> {
        let patience = self.patience.load(Ordering::Relaxed);
        let attempt = |_| {
            (0..patience).for_each(|_| spin_loop());
            self.books.try_lock()
        };
        let taken = (0..ATTEMPTS).find_map(attempt);
        let mut books = taken.unwrap_or_else(|| self.books.lock());
        let better = if books.row < ROW {
            patience.saturating_mul(2).min(PATIENCE_MAX)
        } else {
            (patience / 2).max(PATIENCE_MIN)
        };
        books.row = 0;
        self.patience.store(better, Ordering::Relaxed);
        books
    }
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

impl<T> Deref for BooksGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> DerefMut for BooksGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0.value
    }
}
