//! Brings each [`PrefillDone`] to the request that waits for it.

use std::{collections::HashMap, sync::Arc};

use blockplane_protocol::{PrefillDone, codec};
use blockplane_transfer::Notifications;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tracing::{debug, warn};

/// Requests that wait, by the window of their attempt.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    waiting: Mutex<HashMap<u64, oneshot::Sender<PrefillDone>>>,
}

/// One attempt's place among those who wait; leaves on drop.
#[derive(Debug)]
pub(crate) struct Expected {
    notices: Arc<Notices>,
    window: u64,
    done: oneshot::Receiver<PrefillDone>,
}

impl Notices {
    pub(crate) fn expect(self: &Arc<Self>, window: u64) -> Expected {
        let (sender, done) = oneshot::channel();
        self.waiting.lock().insert(window, sender);
        Expected {
            notices: Arc::clone(self),
            window,
            done,
        }
    }

    fn deliver(&self, done: PrefillDone) {
        let Some(waiting) = self.waiting.lock().remove(&done.window) else {
            // An attempt that was given up; its window is closed.
            debug!(request = %done.request_id, window = done.window, "late notification");
            return;
        };
        // The attempt may be given up at this very moment.
        let _ = waiting.send(done);
    }
}

impl Expected {
    /// Waits for the notification. Cancel safe.
    pub(crate) async fn done(&mut self) -> PrefillDone {
        match (&mut self.done).await {
            Ok(done) => done,
            // The sender stays in the table until it is used or `self` is dropped.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.notices.waiting.lock().remove(&self.window);
    }
}

/// Receives notifications until the agent stops or the sender of `ended` is dropped.
pub(super) async fn listen(
    notifications: Notifications,
    notices: Arc<Notices>,
    mut ended: oneshot::Receiver<()>,
) {
    loop {
        let received = tokio::select! {
            _ = &mut ended => return,
            received = notifications.recv() => received,
        };
        let Ok(notification) = received else {
            return;
        };
        match codec::decode::<PrefillDone>(&notification.payload) {
            Ok(done) => notices.deliver(done),
            Err(error) => {
                warn!(from = %notification.from, %error, "notification is not a PrefillDone");
            }
        }
    }
}
