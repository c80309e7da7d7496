//! Flow control of one call: the server sends what the client has granted, so that a slow consumer
//! holds up its own call and no other.

use std::sync::atomic::{AtomicI64, Ordering};

use tokio::sync::Notify;

/// The sender's side: what may still be sent.
#[derive(Debug)]
pub(crate) struct Credits {
    /// Goes below 0 by at most one frame, so that a window need not be as large as a frame.
    available: AtomicI64,
    granted: Notify,
}

impl Credits {
    pub(crate) fn new(window: u32) -> Self {
        Self {
            available: AtomicI64::new(i64::from(window)),
            granted: Notify::new(),
        }
    }

    /// Waits until something may be sent and takes `cost`. Only one task waits at a time.
    pub(crate) async fn take(&self, cost: u32) {
        while self.available.load(Ordering::Acquire) <= 0 {
            // `notify_one` keeps a permit when it comes between the load and this wait.
            self.granted.notified().await;
        }
        self.available.fetch_sub(i64::from(cost), Ordering::AcqRel);
    }

    /// The receiver has room for `amount` more.
    pub(crate) fn grant(&self, amount: u32) {
        self.available
            .fetch_add(i64::from(amount), Ordering::AcqRel);
        self.granted.notify_one();
    }
}

/// The receiver's side: collects what was consumed and says when it is worth a credit frame.
#[derive(Debug)]
pub(crate) struct Consumed {
    window: u32,
    since_grant: u32,
}

impl Consumed {
    pub(crate) const fn new(window: u32) -> Self {
        Self {
            window,
            since_grant: 0,
        }
    }

    /// Counts a consumed frame; returns the credit to send, if it is time.
    pub(crate) fn add(&mut self, cost: u32) -> Option<u32> {
        self.since_grant = self.since_grant.saturating_add(cost);
        (self.since_grant >= self.window / 2).then(|| std::mem::take(&mut self.since_grant))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_sender_stops_at_the_window_and_goes_on_after_a_grant() {
        let credits = Credits::new(1000);
        assert!(credits.take(600).now_or_never().is_some());
        assert!(
            credits.take(600).now_or_never().is_some(),
            "one frame may overdraw"
        );
        assert!(credits.take(1).now_or_never().is_none());
        credits.grant(100);
        assert!(credits.take(1).now_or_never().is_none(), "still overdrawn");
        credits.grant(101);
        assert!(credits.take(1).now_or_never().is_some());
    }

    proptest! {
        /// Sender and receiver never deadlock, and the receiver never holds more than a window and a frame.
        #[test]
        fn the_window_bounds_what_is_in_flight(
            window in 1u32..5000,
            costs in proptest::collection::vec(1u32..3000, 1..200),
        ) {
            let credits = Credits::new(window);
            let mut consumed = Consumed::new(window);
            let mut in_flight = std::collections::VecDeque::new();
            for &cost in &costs {
                while credits.take(cost).now_or_never().is_none() {
                    let received = in_flight.pop_front().expect("a blocked sender has frames in flight");
                    if let Some(grant) = consumed.add(received) {
                        credits.grant(grant);
                    }
                }
                in_flight.push_back(cost);
                prop_assert!(in_flight.iter().sum::<u32>() <= window + 3000);
            }
        }
    }
}
