//! Waiting for a caller, for a change of the directory, or for time to pass.

use std::{io, mem::MaybeUninit, os::fd::OwnedFd, path::Path, time::Duration};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::inotify,
};

/// Wakes the thread.
#[derive(Debug)]
pub(super) struct Wake(OwnedFd);

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    pub(super) fn wake(&self) {
        // The only possible failure is a full counter, and then the thread is about to wake. Any
        // value above 0 serves, so that the byte order of this one does not matter.
        let _pending = rustix::io::write(&self.0, &1u64.to_le_bytes());
    }

    fn drain(&self) {
        let mut counter = [0u8; 8];
        // Nothing to read means that nobody woke us.
        let _empty = rustix::io::read(&self.0, &mut counter);
    }
}

/// Reports changes of a directory through inotify.
#[derive(Debug)]
pub(super) struct DirectoryNotify {
    inotify: OwnedFd,
    /// Device and inode of what is watched.
    watched: Option<(u64, u64)>,
}

impl DirectoryNotify {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            inotify: inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?,
            watched: None,
        })
    }

    /// Watches the directory that is now at `path`, whose identity this is. Returns whether it does.
    pub(super) fn follow(&mut self, path: &Path, identity: Option<(u64, u64)>) -> bool {
        if self.watched.is_some() && self.watched == identity {
            return true;
        }
        // Touches are not among the events: lease renewals are seen by the regular look, and would
        // otherwise wake every watcher for every worker.
        let flags = inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::MOVED_FROM
            | inotify::WatchFlags::CLOSE_WRITE
            | inotify::WatchFlags::DELETE
            | inotify::WatchFlags::DELETE_SELF
            | inotify::WatchFlags::MOVE_SELF
            | inotify::WatchFlags::ONLYDIR;
        self.watched = identity.filter(|_| inotify::add_watch(&self.inotify, path, flags).is_ok());
        self.watched.is_some()
    }

    /// Takes what was reported; returns whether there was anything.
    fn drain(&mut self) -> bool {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut changed = false;
        let mut gone = false;
        while let Ok(event) = reader.next() {
            changed = true;
            gone |= event.events().intersects(
                inotify::ReadFlags::DELETE_SELF
                    | inotify::ReadFlags::MOVE_SELF
                    | inotify::ReadFlags::IGNORED
                    | inotify::ReadFlags::UNMOUNT,
            );
        }
        if gone {
            self.watched = None;
        }
        changed
    }
}

/// Waits until woken, until the directory changes or for `timeout`; returns whether it changed.
pub(super) fn wait(
    wake: &Wake,
    directory: Option<&mut DirectoryNotify>,
    timeout: Option<Duration>,
) -> bool {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let mut fds = vec![PollFd::new(&wake.0, PollFlags::IN)];
    if let Some(directory) = &directory {
        fds.push(PollFd::new(&directory.inotify, PollFlags::IN));
    }
    // A signal that ends the wait early does no harm: the caller looks and waits again.
    let _interrupted = poll(&mut fds, timeout.as_ref());
    drop(fds);
    wake.drain();
    directory.is_some_and(DirectoryNotify::drain)
}
