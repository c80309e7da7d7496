//! Locks whose every order loom tries.

use std::time::Instant;

use loom::sync;
pub(crate) use loom::sync::MutexGuard;

/// [`loom::sync::Mutex`] without poison.
#[derive(Debug)]
pub(crate) struct Mutex<T>(sync::Mutex<T>);

pub(crate) type BooksLock<T> = Mutex<T>;
pub(crate) type BooksGuard<'a, T> = MutexGuard<'a, T>;

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect("a model that panics has failed")
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().expect("a model that panics has failed")
    }
}

/// Nobody waits in the models: subscribers there look from time to time.
#[derive(Debug)]
pub(crate) struct Condvar;

impl Condvar {
    pub(crate) fn new() -> Self {
        Self
    }

    pub(crate) fn notify_all(&self) {}
}

/// The time is always over.
pub(crate) fn wait_until<T>(
    _condvar: &Condvar,
    _guard: &mut MutexGuard<'_, T>,
    _deadline: Option<Instant>,
) -> bool {
    true
}
