//! Is the peer alive: heartbeats over the connection, and the end of a process on this host.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::reactor::{Event, Flow, Source};

/// Times of one connection: when to send a heartbeat, and when silence means loss.
#[derive(Debug)]
pub(crate) struct Pulse {
    started: Instant,
    loss_timeout: Duration,
    beat: Duration,
    /// Last sign of life of the peer, in microseconds since `started`.
    heard: AtomicU64,
    /// Last tick, likewise.
    ticked: AtomicU64,
}

impl Pulse {
    pub(crate) fn new(own_loss_timeout: Duration, peer_loss_timeout: Duration) -> Self {
        let beat = own_loss_timeout.min(peer_loss_timeout.max(Duration::from_millis(20))) / 8;
        Self {
            started: Instant::now(),
            loss_timeout: own_loss_timeout,
            beat,
            heard: AtomicU64::new(0),
            ticked: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    pub(crate) fn heard(&self) {
        self.heard.store(self.now(), Ordering::Relaxed);
    }

    pub(crate) fn next_tick(&self) -> Instant {
        Instant::now() + self.beat
    }

    /// How long the peer has been silent, if that is too long.
    ///
    /// A tick that comes late (this process was stopped, or starved) does not judge: what the peer
    /// sent meanwhile may still wait in the socket.
    pub(crate) fn tick(&self) -> Option<Duration> {
        let now = self.now();
        let last = self.ticked.swap(now, Ordering::Relaxed);
        let since = |then: u64| Duration::from_micros(now.saturating_sub(then));
        if since(last) > self.beat * 2 {
            return None;
        }
        let silent = since(self.heard.load(Ordering::Relaxed));
        // One beat of slack lets the loss be noticed within the timeout, not one beat after it.
        (silent + self.beat > self.loss_timeout).then_some(silent)
    }
}

/// Waits for the end of a process.
pub(crate) struct ProcessWatch<F> {
    process: OwnedFd,
    ended: Option<F>,
}

impl<F: FnOnce() + Send> ProcessWatch<F> {
    pub(crate) const fn new(process: OwnedFd, ended: F) -> Self {
        Self {
            process,
            ended: Some(ended),
        }
    }
}

impl<F: FnOnce() + Send> Source for ProcessWatch<F> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    fn ready(&mut self, event: Event) -> Flow {
        if !event.readable {
            return Flow::Keep;
        }
        if let Some(ended) = self.ended.take() {
            ended();
        }
        Flow::Drop
    }
}

/// A descriptor that becomes readable when the process at the other end of a Unix socket ends.
/// `None` where the kernel cannot say (the end of the connection tells as well, later if the
/// process has left children behind).
pub(crate) fn process_of(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut raw: libc::c_int = -1;
    let mut len: libc::socklen_t = 4;
    // SAFETY: `raw` and `len` are valid for writes of the stated size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut raw).cast(),
            &raw mut len,
        )
    };
    if result == 0 && raw >= 0 {
        // SAFETY: a descriptor that the kernel has just installed for us alone.
        return Some(unsafe { OwnedFd::from_raw_fd(raw) });
    }
    // Before Linux 6.5: by number, checked by the kernel at this moment only.
    let credentials = rustix::net::sockopt::socket_peercred(socket).ok()?;
    rustix::process::pidfd_open(credentials.pid, rustix::process::PidfdFlags::empty()).ok()
}
