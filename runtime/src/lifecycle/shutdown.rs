//! Graceful shutdown: unregister, drain, tear down.
//!
//! ```text
//! Running ──begin──▶ Unregistering ──▶ Draining ──▶ TearingDown ──▶ Stopped
//! work is admitted   still admitted:   refused;     leftover work
//!                    routers may not   running work is cancelled
//!                    know yet          finishes
//! ```

use std::{fmt, future::Future, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// How far a shutdown has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No shutdown.
    Running,
    /// The worker is taken out of discovery. New work is still admitted.
    Unregistering,
    /// New work is refused, running work may finish.
    Draining,
    /// Leftover work is cancelled, resources are released.
    TearingDown,
    /// All done.
    Stopped,
}

/// The state that a process's shutdown and its work share. Clones are the same gate.
#[derive(Clone)]
pub struct ShutdownGate {
    inner: Arc<Inner>,
}

struct Inner {
    phase: watch::Sender<Phase>,
    work: TaskTracker,
    cancel: CancellationToken,
}

/// Counts as running work until it is dropped.
#[must_use = "the work counts only while the guard is held"]
pub struct WorkGuard {
    _token: TaskTrackerToken,
    cancellation: CancellationToken,
}

impl WorkGuard {
    /// Is cancelled when the work did not finish within the grace period.
    #[must_use]
    pub const fn cancellation(&self) -> &CancellationToken {
        &self.cancellation
    }
}

impl fmt::Debug for WorkGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WorkGuard")
    }
}

/// Times of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownPlan {
    /// For taking the worker out of discovery; a store that does not answer holds it up no longer.
    /// Default 2 s.
    pub unregister_timeout: Duration,
    /// After that, so that routers get to know before work is refused. Default 250 ms.
    pub settle: Duration,
    /// For running work to finish. Default 5 s.
    pub grace: Duration,
    /// For cancelled work to end and, separately, for the teardown. Default 5 s.
    pub teardown_timeout: Duration,
}

impl Default for ShutdownPlan {
    fn default() -> Self {
        Self {
            unregister_timeout: Duration::from_secs(2),
            settle: Duration::from_millis(250),
            grace: Duration::from_secs(5),
            teardown_timeout: Duration::from_secs(5),
        }
    }
}

/// How a shutdown went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Unregistering ended in time.
    pub unregistered: bool,
    /// Work that ran when draining began.
    pub running: usize,
    /// Work that had to be cancelled.
    pub cancelled: usize,
    /// The teardown ended in time.
    pub torn_down: bool,
    /// Time from begin to end.
    pub took: Duration,
}

impl ShutdownGate {
    /// A gate of a running process.
    #[must_use]
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                phase: watch::Sender::new(Phase::Running),
                work: TaskTracker::new(),
                cancel: CancellationToken::new(),
            }),
        }
    }

    /// The phase now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.inner.phase.borrow()
    }

    /// Waits until the shutdown has come at least this far. Never ends if it never does.
    pub async fn reached(&self, phase: Phase) {
        let mut receiver = self.inner.phase.subscribe();
        // The sender is held by `self`, so that the wait ends only by the phase.
        let _phase = receiver.wait_for(|now| *now >= phase).await;
    }

    /// Asks for shutdown; whoever runs [`run`](Self::run) wakes. Later calls have no effect.
    pub fn begin(&self) {
        self.advance(Phase::Unregistering);
    }

    /// Admits a piece of work, or `None` when the process is draining.
    pub fn admit(&self) -> Option<WorkGuard> {
        // Counted before the look, so that the drain cannot miss it.
        let token = self.inner.work.token();
        (self.phase() < Phase::Draining).then(|| WorkGuard {
            _token: token,
            cancellation: self.inner.cancel.child_token(),
        })
    }

    /// Pieces of work that are running.
    #[must_use]
    pub fn running(&self) -> usize {
        self.inner.work.len()
    }

    /// Waits for [`begin`](Self::begin), then goes through the phases. `unregister` and `teardown`
    /// run in theirs. Takes no longer than the times of the plan together.
    pub async fn run(
        &self,
        plan: ShutdownPlan,
        unregister: impl Future<Output = ()>,
        teardown: impl Future<Output = ()>,
    ) -> ShutdownReport {
        self.reached(Phase::Unregistering).await;
        let began = Instant::now();
        let unregistered = tokio::time::timeout(plan.unregister_timeout, unregister)
            .await
            .is_ok();
        tokio::time::sleep(plan.settle).await;

        self.advance(Phase::Draining);
        self.inner.work.close();
        let running = self.inner.work.len();
        let drained = tokio::time::timeout(plan.grace, self.inner.work.wait()).await;
        let cancelled = drained.map_or_else(|_elapsed| self.inner.work.len(), |()| 0);

        self.advance(Phase::TearingDown);
        self.inner.cancel.cancel();
        if tokio::time::timeout(plan.teardown_timeout, self.inner.work.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                left = self.inner.work.len(),
                "work does not react to its cancellation; leaving it behind"
            );
        }
        let torn_down = tokio::time::timeout(plan.teardown_timeout, teardown)
            .await
            .is_ok();
        self.advance(Phase::Stopped);
        ShutdownReport {
            unregistered,
            running,
            cancelled,
            torn_down,
            took: began.elapsed(),
        }
    }

    fn advance(&self, phase: Phase) {
        self.inner.phase.send_if_modified(|now| {
            let forward = *now < phase;
            if forward {
                *now = phase;
            }
            forward
        });
    }
}

impl Default for ShutdownGate {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ShutdownGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShutdownGate")
            .field("phase", &self.phase())
            .field("running", &self.running())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(grace: Duration) -> ShutdownPlan {
        ShutdownPlan {
            settle: Duration::ZERO,
            grace,
            ..ShutdownPlan::default()
        }
    }

    #[tokio::test]
    async fn work_is_admitted_until_draining_and_may_finish() {
        let gate = ShutdownGate::new();
        let early = gate.admit().expect("running");
        let unregistering = gate.clone();
        let finisher = gate.clone();
        let shutdown = gate.run(
            plan(Duration::from_secs(60)),
            async move {
                assert_eq!(unregistering.phase(), Phase::Unregistering);
                let late = unregistering.admit().expect("routers may not know yet");
                drop(late);
            },
            async {},
        );
        let work = async {
            finisher.begin();
            finisher.reached(Phase::Draining).await;
            assert!(finisher.admit().is_none());
            assert!(!early.cancellation().is_cancelled());
            drop(early);
        };
        let (report, ()) = tokio::join!(shutdown, work);
        assert_eq!((report.running, report.cancelled), (1, 0));
        assert!(report.unregistered && report.torn_down);
        assert_eq!(gate.phase(), Phase::Stopped);
    }

    #[tokio::test]
    async fn work_that_outlasts_the_grace_is_cancelled() {
        let gate = ShutdownGate::new();
        let guard = gate.admit().expect("running");
        tokio::spawn(async move {
            guard.cancellation().cancelled().await;
        });
        gate.begin();
        let report = gate.run(plan(Duration::ZERO), async {}, async {}).await;
        assert_eq!((report.running, report.cancelled), (1, 1));
        assert_eq!(gate.running(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn steps_that_hang_do_not_hold_it_up() {
        let gate = ShutdownGate::new();
        let _guard = gate.admit().expect("running");
        gate.begin();
        let plan = ShutdownPlan::default();
        let report = gate
            .run(plan, std::future::pending(), std::future::pending())
            .await;
        assert!(!report.unregistered && !report.torn_down);
        let longest =
            plan.unregister_timeout + plan.settle + plan.grace + plan.teardown_timeout * 2;
        assert!(report.took <= longest + Duration::from_millis(10));
    }
}
