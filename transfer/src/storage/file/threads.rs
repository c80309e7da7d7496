//! The engine without io_uring: threads that call `preadv` and `pwritev`.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Condvar, Mutex};

use super::plan::{Request, Segment};
use super::work::{FileWork, Step};
use crate::error::TransferError;
use crate::op::{Op, TransferState, Work};

/// Requests that the kernel interrupts are repeated this often.
const RETRIES_MAX: u32 = 8;

/// Most pieces of memory that one call of the kernel takes.
const IOVECS_MAX: usize = 1024;

#[derive(Debug)]
pub(crate) struct Threads {
    shared: Arc<Shared>,
    threads: u32,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Arc<Job>>,
    stopped: bool,
}

/// A transfer and how many of its requests are not finished.
#[derive(Debug)]
struct Job {
    transfer: Arc<TransferState>,
    work: Arc<Work>,
    claimed: AtomicU32,
    left: AtomicU32,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.queue.lock().stopped = true;
        self.shared.work.notify_all();
    }
}

impl Threads {
    pub(super) fn start(threads: usize) -> io::Result<Self> {
        // Dropped on failure, which ends the threads that run already.
        let pool = Self {
            shared: Arc::new(Shared {
                queue: Mutex::default(),
                work: Condvar::new(),
            }),
            threads: u32::try_from(threads).unwrap_or(u32::MAX),
        };
        for index in 0..threads {
            let shared = pool.shared.clone();
            std::thread::Builder::new()
                .name(format!("bp-file-{index}"))
                .spawn(move || shared.run())?;
        }
        Ok(pool)
    }

    /// Bounded by `posts_max` per file.
    pub(super) fn transfer(&self, transfer: &Arc<TransferState>) {
        let Some(work) = transfer.work.clone() else {
            return;
        };
        let Some(file) = work.file() else { return };
        let requests = file.requests();
        let helpers = work.parts.min(self.threads);
        let job = Arc::new(Job {
            transfer: transfer.clone(),
            claimed: AtomicU32::new(0),
            left: AtomicU32::new(requests),
            work,
        });
        let mut queue = self.shared.queue.lock();
        queue
            .jobs
            .extend(std::iter::repeat_n(job, helpers as usize));
        drop(queue);
        for _ in 0..helpers {
            self.shared.work.notify_one();
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                // Its last reference may hold the agent, and with it this queue: it goes unlocked.
                let more = job.step().then_some(job);
                queue = self.queue.lock();
                queue.jobs.extend(more);
            } else if queue.stopped {
                return;
            } else {
                self.work.wait(&mut queue);
            }
        }
    }
}

impl Job {
    /// Does one part; false when there is none to claim any more.
    fn step(&self) -> bool {
        let Some(file) = self.work.file() else {
            return false;
        };
        // Requests are claimed one by one; whoever finishes the last one does the sync as well.
        let claimed = self.claimed.fetch_add(1, Ordering::Relaxed);
        let first = if claimed < file.requests() || file.requests() == 0 {
            self.transfer.claim_part()
        } else {
            None
        };
        let Some(part) = first else { return false };
        if part >= file.requests() {
            self.finish(file, part);
            return false;
        }
        self.finish(file, part);
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1
            && file.durable
            && let Some(sync) = self.transfer.claim_part()
        {
            self.finish(file, sync);
        }
        true
    }

    fn finish(&self, file: &FileWork, part: u32) {
        if let Err(error) = self.perform(file, part) {
            self.transfer.stop(TransferError::Storage(error));
        }
        self.transfer.part_done();
    }

    fn perform(&self, file: &FileWork, part: u32) -> Result<(), super::super::error::StorageError> {
        let op = self.work.op;
        let (mut moved, mut retries) = (0, 0);
        loop {
            if self.transfer.called_off() {
                return Ok(());
            }
            let result = match file.requests.get(part) {
                Some(request) => self.call(file, request, moved),
                None => sync(file),
            };
            match file.after(op, part, moved, result) {
                Step::Done => return Ok(()),
                Step::Again { moved: now } => {
                    moved = now;
                    retries = 0;
                }
                Step::Interrupted if retries < RETRIES_MAX => retries += 1,
                Step::Interrupted => {
                    let errno = result.err().unwrap_or(libc::EINTR);
                    return Err(file.gave_up(op, part, moved, errno));
                }
                Step::Failed(error) => return Err(error),
            }
        }
    }

    /// One system call for the rest of a request.
    fn call(&self, file: &FileWork, request: &Request, moved: u32) -> Result<u32, i32> {
        let mut iovecs = Vec::new();
        gather(
            &self.work,
            file.requests.segments(request),
            moved,
            &mut iovecs,
        );
        iovecs.truncate(IOVECS_MAX);
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        let offset = request.offset + u64::from(moved);
        let offset = libc::off_t::try_from(offset).map_err(|_| libc::EFBIG)?;
        let fd = file.file.fd(request.via);
        let done = match self.work.op {
            // SAFETY: the iovecs name live memory of regions that `self.work` keeps.
            Op::Read => unsafe { libc::preadv(fd, iovecs.as_ptr(), count, offset) },
            // SAFETY: as above.
            Op::Write => unsafe { libc::pwritev(fd, iovecs.as_ptr(), count, offset) },
        };
        u32::try_from(done).map_err(|_| errno())
    }
}

fn errno() -> i32 {
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

fn sync(file: &FileWork) -> Result<u32, i32> {
    // SAFETY: a descriptor that `file` keeps open.
    match unsafe { libc::fdatasync(file.file.fd(super::plan::Via::Buffered)) } {
        0 => Ok(0),
        _ => Err(errno()),
    }
}

/// Appends the memory of a request without its first `skip` bytes.
pub(super) fn gather(work: &Work, segments: &[Segment], skip: u32, into: &mut Vec<libc::iovec>) {
    let mut skip = u64::from(skip);
    for segment in segments {
        let bytes = u64::from(segment.bytes);
        if skip >= bytes {
            skip -= bytes;
            continue;
        }
        let Some(set) = work.sets.get(segment.set as usize) else {
            continue;
        };
        let [offset, len] =
            [segment.offset + skip, bytes - skip].map(|v| usize::try_from(v).unwrap_or(usize::MAX));
        skip = 0;
        // SAFETY: the plan was made from sets that are validated against this region.
        let base = unsafe { set.local_region.base().add(offset) };
        into.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        });
    }
}
