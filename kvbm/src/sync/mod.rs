//! The locks of books and hubs: from parking_lot, or from loom when the model checker runs
//! (`--cfg loom`).

#[cfg(loom)]
mod model;
#[cfg(not(loom))]
mod real;

#[cfg(loom)]
pub(crate) use model::{BooksGuard, BooksLock, Condvar, Mutex, wait_until};
#[cfg(not(loom))]
pub(crate) use real::{BooksGuard, BooksLock, Condvar, Mutex, wait_until};
