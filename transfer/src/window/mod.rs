//! Windows: grants by the owner of memory, revocable.
//!
//! The owner opens a window over blocks that a peer is to fill (or read) and closes it before the
//! blocks get another meaning. Where the owner's own threads place the bytes (tcp), closing is
//! immediate: each placement holds the window's lock for reading. Where the peer copies into a
//! mapping (loopback, shm), the peer acknowledges that nothing of its own is under way, or dies.

mod grant;
mod scope;
mod usage;

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard};

use crate::agent::Core;
use crate::clock::after;
use crate::memory::Region;
use crate::plan::BlockSet;

pub use scope::WindowScope;

pub(crate) use grant::{Grant, GrantSpec};
pub(crate) use scope::Scope;
pub(crate) use usage::{Acknowledge, Usage};

/// Names a window of one agent in one epoch; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WindowId(pub u64);

impl fmt::Display for WindowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What peers may do through a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WindowAccess {
    /// Write only.
    Write,
    /// Read only.
    Read,
    /// Both.
    #[default]
    ReadWrite,
}

impl WindowAccess {
    pub(crate) const fn allows(self, write: bool) -> bool {
        match self {
            Self::Write => write,
            Self::Read => !write,
            Self::ReadWrite => true,
        }
    }
}

/// Somebody who can copy into the memory of a window on its own.
pub(crate) trait Holder: Send + Sync {
    /// Asks the holder to stop using the window. It answers through [`OpenWindow::acknowledge`].
    fn revoke(&self, window: &Arc<OpenWindow>);
}

/// The owner's side of a window.
pub(crate) struct OpenWindow {
    pub(crate) id: WindowId,
    pub(crate) region: Arc<Region>,
    pub(crate) scope: Scope,
    pub(crate) access: WindowAccess,
    /// True once closed. Held for reading while this process places or fetches bytes for a peer.
    closed: RwLock<bool>,
    holders: Mutex<Holders>,
    quiet: Condvar,
}

#[derive(Default)]
struct Holders {
    closing: bool,
    keys: HashSet<u64>,
    known: Vec<(u64, Weak<dyn Holder>)>,
    wakers: Vec<Waker>,
}

impl fmt::Debug for OpenWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenWindow")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl OpenWindow {
    pub(crate) fn new(
        id: WindowId,
        region: Arc<Region>,
        scope: Scope,
        access: WindowAccess,
    ) -> Self {
        Self {
            id,
            region,
            scope,
            access,
            closed: RwLock::new(false),
            holders: Mutex::default(),
            quiet: Condvar::new(),
        }
    }

    /// Whether the (validated) set may be accessed through this window.
    pub(crate) fn permits(
        &self,
        region: &Region,
        set: &BlockSet,
        write: bool,
    ) -> Result<(), String> {
        if region.id != self.region.id {
            return Err(format!(
                "region {} is not the region of the window",
                region.id
            ));
        }
        if !self.access.allows(write) {
            return Err(format!("it is open for {:?}", self.access));
        }
        self.scope.covers(set)
    }

    /// Holds the window open for one short placement, or `None` when it is closed.
    pub(crate) fn enter(&self) -> Option<RwLockReadGuard<'_, bool>> {
        let guard = self.closed.read();
        (!*guard).then_some(guard)
    }

    /// Adds somebody who wants to know when the window closes; false when it is closing. Closing
    /// waits for those who can copy on their own.
    pub(crate) fn add_holder(&self, key: u64, holder: Weak<dyn Holder>, copies: bool) -> bool {
        let mut holders = self.holders.lock();
        if holders.closing {
            return false;
        }
        if !holders.known.iter().any(|(known, _)| *known == key) {
            holders.known.push((key, holder));
        }
        if copies {
            holders.keys.insert(key);
        }
        true
    }

    /// A holder has stopped using the window, or is gone.
    pub(crate) fn acknowledge(&self, key: u64) {
        let mut holders = self.holders.lock();
        holders.known.retain(|(known, _)| *known != key);
        if !holders.keys.remove(&key) {
            return;
        }
        if holders.keys.is_empty() {
            let wakers = std::mem::take(&mut holders.wakers);
            drop(holders);
            self.quiet.notify_all();
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Starts closing: no new placement and no new holder; holders are asked to stop.
    fn begin_close(self: &Arc<Self>) {
        *self.closed.write() = true;
        let mut holders = self.holders.lock();
        if std::mem::replace(&mut holders.closing, true) {
            return;
        }
        let known = holders.known.clone();
        drop(holders);
        for (key, holder) in known {
            match holder.upgrade() {
                Some(holder) => holder.revoke(self),
                None => self.acknowledge(key),
            }
        }
    }

    fn wait_quiet(&self, timeout: Duration) -> bool {
        let until = after(timeout);
        let mut holders = self.holders.lock();
        while !holders.keys.is_empty() {
            if self.quiet.wait_until(&mut holders, until).timed_out() {
                return holders.keys.is_empty();
            }
        }
        true
    }
}

/// A grant to peers, held by the owner of the memory. Send [`Window::id`] to the peer.
///
/// Dropping an open window closes it without waiting; the region stays alive until no byte can
/// land any more, but the blocks must not be reused on that ground: use [`Window::close`].
#[must_use = "dropping a window closes it"]
pub struct Window {
    pub(crate) open: Arc<OpenWindow>,
    pub(crate) core: Weak<Core>,
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window")
            .field("id", &self.id())
            .finish_non_exhaustive()
    }
}

impl Window {
    /// How the peer names this window.
    #[must_use]
    pub fn id(&self) -> WindowId {
        self.open.id
    }

    /// Closes the window. `Ok` means that no further byte can land through it, and none be read.
    ///
    /// # Errors
    /// A peer that maps the memory did not acknowledge in time and is not dead: the window comes
    /// back (closed to new operations) and its blocks stay untouchable. Try again, or await
    /// [`Window::closed`].
    pub fn close(self, timeout: Duration) -> Result<(), WindowBusy> {
        self.begin_close();
        if self.open.wait_quiet(timeout) {
            Ok(())
        } else {
            Err(WindowBusy { window: self })
        }
    }

    /// Closes the window; the future is ready when no further byte can land through it.
    #[must_use]
    pub fn closed(&self) -> Closed<'_> {
        self.begin_close();
        Closed { window: self }
    }

    fn begin_close(&self) {
        if let Some(core) = self.core.upgrade() {
            core.forget_window(self.open.id);
        }
        self.open.begin_close();
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.begin_close();
    }
}

/// Future of [`Window::closed`].
#[derive(Debug)]
pub struct Closed<'a> {
    window: &'a Window,
}

impl Future for Closed<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut holders = self.window.open.holders.lock();
        if holders.keys.is_empty() {
            return Poll::Ready(());
        }
        if !holders
            .wakers
            .iter()
            .any(|waker| waker.will_wake(context.waker()))
        {
            holders.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }
}

/// A window that could not be closed in time: a peer that maps its memory has neither acknowledged
/// nor died. Keep its blocks out of use.
#[derive(Debug, thiserror::Error)]
#[error("window {} is still in use by a peer", window.id())]
pub struct WindowBusy {
    /// The window, closed to new operations.
    pub window: Window,
}
