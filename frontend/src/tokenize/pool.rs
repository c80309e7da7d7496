//! A fixed set of threads for work that would hold up the sockets: templates and tokenising.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use thiserror::Error;
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// Threads behind a bounded queue. They end when the pool is dropped.
#[derive(Debug)]
pub(crate) struct TokenizePool {
    jobs: Sender<Job>,
    queue_max: usize,
}

/// Why work was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum PoolError {
    /// The queue is full.
    #[error("{0} prompts are waiting to be tokenised, which is the limit")]
    Full(usize),
    /// The work panicked.
    #[error("preparing the prompt failed")]
    Panicked,
}

impl TokenizePool {
    /// Starts `threads` threads behind a queue of `queue_max` jobs.
    pub(crate) fn new(threads: usize, queue_max: usize) -> io::Result<Self> {
        let (jobs, queue) = crossbeam_channel::bounded::<Job>(queue_max);
        for index in 0..threads.max(1) {
            let queue = queue.clone();
            thread::Builder::new()
                .name(format!("tokenize-{index}"))
                .spawn(move || work(&queue))?;
        }
        Ok(Self { jobs, queue_max })
    }

    /// Runs `work` on a thread of the pool. Dropping the future skips work that has not begun.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let (reply, result) = oneshot::channel();
        let job = Box::new(move || {
            if !reply.is_closed() {
                // An error means that the caller left meanwhile.
                let _ = reply.send(work());
            }
        });
        match self.jobs.try_send(job) {
            Ok(()) => result.await.map_err(|_| PoolError::Panicked),
            Err(TrySendError::Full(_)) => Err(PoolError::Full(self.queue_max)),
            Err(TrySendError::Disconnected(_)) => Err(PoolError::Panicked),
        }
    }
}

fn work(queue: &Receiver<Job>) {
    while let Ok(job) = queue.recv() {
        // The job's reply channel is dropped by the panic, which its caller sees.
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("a tokenising job panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_panicking_job_costs_its_caller_only() {
        let pool = TokenizePool::new(1, 4).unwrap();
        let failed: Result<(), _> = pool.run(|| panic!("on purpose")).await;
        assert_eq!(failed, Err(PoolError::Panicked));
        assert_eq!(pool.run(|| 7).await, Ok(7));
    }

    #[tokio::test]
    async fn a_full_queue_is_refused_at_once() {
        let pool = TokenizePool::new(1, 1).unwrap();
        let (release, gate) = mpsc::channel::<()>();
        let (started, begun) = oneshot::channel();
        let running = pool.run(move || {
            let _ = started.send(());
            let _ = gate.recv();
        });
        let queued = pool.run(|| ());
        tokio::pin!(running, queued);
        assert!(futures::poll!(running.as_mut()).is_pending());
        begun.await.unwrap();
        assert!(futures::poll!(queued.as_mut()).is_pending());
        assert_eq!(pool.run(|| ()).await, Err(PoolError::Full(1)));
        release.send(()).unwrap();
        assert_eq!(running.await, Ok(()));
        assert_eq!(queued.await, Ok(()));
    }
}
