//! Copy workers: threads that move bytes between mapped memories, parked while there is nothing.
//!
//! Waking a parked thread costs the caller about as much as copying 100 KiB, and the thread comes
//! as much later. So small transfers are copied by the thread that posts them, and a worker that
//! has just finished looks for the next job a little while before it parks.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::config::AgentConfig;
use crate::op::TransferState;

pub(crate) struct CopyPool {
    threads: usize,
    bytes_per_thread: u64,
    inline_bytes: u64,
    spin: Duration,
    queue: Mutex<Queue>,
    work: Condvar,
    /// Jobs in the queue, for workers that look without the lock.
    waiting: AtomicUsize,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<TransferState>>,
    /// Workers that are about to look at the queue on their own.
    awake: usize,
    stopped: bool,
}

impl fmt::Debug for CopyPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyPool")
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl CopyPool {
    pub(super) fn start(config: &AgentConfig) -> io::Result<Arc<Self>> {
        let pool = Arc::new(Self {
            threads: config.copy_threads,
            bytes_per_thread: config.copy_bytes_per_thread,
            inline_bytes: config.copy_inline_bytes,
            spin: config.copy_spin,
            queue: Mutex::default(),
            work: Condvar::new(),
            waiting: AtomicUsize::new(0),
        });
        for index in 0..config.copy_threads {
            let worker = pool.clone();
            let started = std::thread::Builder::new()
                .name(format!("bp-copy-{index}"))
                .spawn(move || worker.run());
            if let Err(error) = started {
                pool.stop();
                return Err(error);
            }
        }
        Ok(pool)
    }

    /// Copies a small transfer at once, and hands a larger one to as many workers as its size
    /// deserves. Bounded by `posts_max` per peer.
    pub(crate) fn submit(&self, transfer: &Arc<TransferState>) {
        let bytes = transfer.work.as_ref().map_or(0, |work| work.plan.bytes);
        transfer.start_copying();
        if bytes <= self.inline_bytes {
            transfer.copy_parts();
            return;
        }
        let wanted = usize::try_from(bytes / self.bytes_per_thread).unwrap_or(usize::MAX);
        let helpers = wanted.clamp(1, self.threads);
        let mut queue = self.queue.lock();
        if queue.stopped {
            drop(queue);
            // The agent is going down and ends this transfer; nobody is left to copy it.
            return;
        }
        queue
            .jobs
            .extend(std::iter::repeat_n(transfer, helpers).cloned());
        let jobs = queue.jobs.len();
        self.waiting.store(jobs, Ordering::Release);
        // Those that are awake take the first jobs without being called.
        let asleep = jobs.saturating_sub(queue.awake).min(helpers);
        drop(queue);
        for _ in 0..asleep {
            self.work.notify_one();
        }
    }

    fn run(&self) {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                self.waiting.store(queue.jobs.len(), Ordering::Release);
                drop(queue);
                job.copy_parts();
                drop(job);
                queue = self.look_around();
            } else if queue.stopped {
                return;
            } else {
                self.work.wait(&mut queue);
            }
        }
    }

    /// Waits a little while for the next job without parking.
    fn look_around(&self) -> MutexGuard<'_, Queue> {
        let mut queue = self.queue.lock();
        if !queue.jobs.is_empty() || queue.stopped || self.spin.is_zero() {
            return queue;
        }
        queue.awake += 1;
        drop(queue);
        let until = Instant::now() + self.spin;
        while self.waiting.load(Ordering::Acquire) == 0 && Instant::now() < until {
            std::hint::spin_loop();
        }
        let mut queue = self.queue.lock();
        queue.awake -= 1;
        queue
    }

    pub(crate) fn stop(&self) {
        self.queue.lock().stopped = true;
        self.work.notify_all();
    }
}
