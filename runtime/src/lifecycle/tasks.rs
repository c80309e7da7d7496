//! Background tasks with names: who runs, who failed, all of them ended at shutdown.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};

use crate::panic_text;

/// A set of tasks. Clones are the same set. When the last clone is dropped, the tasks are aborted.
#[derive(Clone)]
pub struct Tasks {
    inner: Arc<Inner>,
}

struct Inner {
    tracker: TaskTracker,
    stop: CancellationToken,
    running: Arc<Mutex<BTreeMap<u64, Running>>>,
    next: AtomicU64,
    failure: Arc<watch::Sender<Option<TaskFailure>>>,
}

struct Running {
    name: String,
    /// Absent for the moment between entry and spawn.
    task: Option<AbortOnDropHandle<()>>,
}

/// The first task that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("task '{name}' failed: {reason}")]
pub struct TaskFailure {
    /// The task.
    pub name: String,
    /// Its panic message, or that it ended although it was to run until shutdown.
    pub reason: String,
}

impl Tasks {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                tracker: TaskTracker::new(),
                stop: CancellationToken::new(),
                running: Arc::default(),
                next: AtomicU64::new(0),
                failure: Arc::new(watch::Sender::new(None)),
            }),
        }
    }

    /// Is cancelled when the tasks shall end. Tasks that have something to finish watch it.
    #[must_use]
    pub fn stop_token(&self) -> CancellationToken {
        self.inner.stop.clone()
    }

    /// Runs a task that may end when it wants. A panic is a [`failure`](Self::failure).
    pub fn spawn(&self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, task, false);
    }

    /// Runs a task that the process cannot do without: ending before shutdown is a failure too.
    pub fn spawn_critical(&self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, task, true);
    }

    fn start(&self, name: &str, task: impl Future<Output = ()> + Send + 'static, critical: bool) {
        let id = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let name = name.to_owned();
        self.inner.running.lock().insert(
            id,
            Running {
                name: name.clone(),
                task: None,
            },
        );
        let running = Arc::clone(&self.inner.running);
        let failure = Arc::clone(&self.inner.failure);
        let stop = self.inner.stop.clone();
        let handle = self.inner.tracker.spawn(async move {
            let reason = match AssertUnwindSafe(task).catch_unwind().await {
                Ok(()) if critical && !stop.is_cancelled() => {
                    Some("it ended before shutdown".to_owned())
                }
                Ok(()) => None,
                Err(panic) => Some(panic_text(panic.as_ref())),
            };
            if let Some(reason) = reason {
                tracing::error!(task = name, reason, "a task failed");
                failure.send_if_modified(|first| {
                    let is_first = first.is_none();
                    first.get_or_insert(TaskFailure { name, reason });
                    is_first
                });
            }
            // Detached, since aborting itself would be the last thing it does.
            let ended = running.lock().remove(&id);
            if let Some(handle) = ended.and_then(|ended| ended.task) {
                handle.detach();
            }
        });
        if let Some(entry) = self.inner.running.lock().get_mut(&id) {
            entry.task = Some(AbortOnDropHandle::new(handle));
        }
    }

    /// Names of the running tasks, in the order they started.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let running = self.inner.running.lock();
        running.values().map(|task| task.name.clone()).collect()
    }

    /// Waits until a task has failed. Never ends if none does.
    pub async fn failure(&self) -> TaskFailure {
        let mut receiver = self.inner.failure.subscribe();
        loop {
            if let Some(failure) = receiver.borrow_and_update().clone() {
                return failure;
            }
            if receiver.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Cancels the [stop token](Self::stop_token), waits up to `grace`, and aborts what still runs.
    /// Returns the names of the aborted tasks.
    pub async fn shutdown(&self, grace: Duration) -> Vec<String> {
        self.inner.stop.cancel();
        self.inner.tracker.close();
        if tokio::time::timeout(grace, self.inner.tracker.wait())
            .await
            .is_ok()
        {
            return Vec::new();
        }
        let left = std::mem::take(&mut *self.inner.running.lock());
        left.into_values().map(|task| task.name).collect()
    }
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
        let running = std::mem::take(&mut *self.running.lock());
        drop(running);
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tasks").field(&self.names()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn tasks_are_listed_and_end_at_shutdown() {
        let tasks = Tasks::new();
        let stop = tasks.stop_token();
        tasks.spawn("polite", async move { stop.cancelled().await });
        assert_eq!(tasks.names(), ["polite"]);
        assert_eq!(tasks.shutdown(LONG).await, Vec::<String>::new());
        assert_eq!(tasks.names(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_task_that_does_not_stop_is_aborted_and_named() {
        struct Dropped(CancellationToken);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.cancel();
            }
        }
        let tasks = Tasks::new();
        let dropped = CancellationToken::new();
        let guard = Dropped(dropped.clone());
        tasks.spawn("stubborn", async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        });
        assert_eq!(tasks.shutdown(Duration::ZERO).await, ["stubborn"]);
        dropped.cancelled().await;
    }

    #[tokio::test]
    async fn a_panic_and_an_early_end_are_failures() {
        let tasks = Tasks::new();
        tasks.spawn("fine", async {});
        tasks.spawn("bad", async { panic!("on purpose") });
        let failure = tasks.failure().await;
        assert_eq!(failure.to_string(), "task 'bad' failed: on purpose");

        let tasks = Tasks::new();
        tasks.spawn_critical("loop", async {});
        assert!(tasks.failure().await.reason.contains("ended"));
    }
}
