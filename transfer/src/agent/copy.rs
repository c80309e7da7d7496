//! Copy workers: threads that move bytes between mapped memories, parked while there is nothing.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::config::AgentConfig;
use crate::op::TransferState;

pub(crate) struct CopyPool {
    threads: usize,
    bytes_per_thread: u64,
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<TransferState>>,
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
            queue: Mutex::default(),
            work: Condvar::new(),
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

    /// Hands a transfer to as many workers as its size deserves. Bounded by `posts_max` per peer.
    pub(crate) fn submit(&self, transfer: &Arc<TransferState>) {
        let bytes = transfer.work.as_ref().map_or(0, |work| work.plan.bytes);
        let wanted = usize::try_from(bytes / self.bytes_per_thread).unwrap_or(usize::MAX);
        let helpers = wanted.clamp(1, self.threads);
        transfer.start_copying();
        let mut queue = self.queue.lock();
        if queue.stopped {
            drop(queue);
            // The agent is going down and ends this transfer; nobody is left to copy it.
            return;
        }
        queue
            .jobs
            .extend(std::iter::repeat_n(transfer, helpers).cloned());
        drop(queue);
        for _ in 0..helpers {
            self.work.notify_one();
        }
    }

    fn run(&self) {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job.copy_parts();
                drop(job);
                queue = self.queue.lock();
            } else if queue.stopped {
                return;
            } else {
                self.work.wait(&mut queue);
            }
        }
    }

    pub(crate) fn stop(&self) {
        self.queue.lock().stopped = true;
        self.work.notify_all();
    }
}
