//! A bound on the requests in flight, with an estimate of when a refused one may come back.

use std::time::Duration;

use parking_lot::Mutex;

use crate::error::RouteError;

const WINDOW: Duration = Duration::from_secs(1);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_DEFAULT: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(crate) struct Admission {
    requests_max: usize,
    state: Mutex<State>,
}

/// Counters of a router's admission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdmissionStats {
    /// Requests in flight.
    pub in_flight: usize,
    /// The limit.
    pub requests_max: usize,
    /// Requests refused since start because of it.
    pub refused_total: u64,
}

#[derive(Debug, Default)]
struct State {
    in_flight: usize,
    refused_total: u64,
    window_start: Duration,
    finished_in_window: u32,
    /// Time between two requests that finish, smoothed; none before the first window with any.
    interval: Option<Duration>,
}

impl Admission {
    pub(crate) fn new(requests_max: usize) -> Self {
        Self {
            requests_max,
            state: Mutex::new(State::default()),
        }
    }

    pub(crate) fn enter(&self, now: Duration) -> Result<(), RouteError> {
        let mut state = self.state.lock();
        state.roll(now);
        if state.in_flight >= self.requests_max {
            state.refused_total += 1;
            return Err(RouteError::TooManyRequests {
                in_flight: state.in_flight,
                retry_after: state.retry_after(),
            });
        }
        state.in_flight += 1;
        Ok(())
    }

    /// A request that was admitted ended.
    pub(crate) fn leave(&self) {
        let mut state = self.state.lock();
        state.in_flight = state.in_flight.saturating_sub(1);
        state.finished_in_window = state.finished_in_window.saturating_add(1);
    }

    pub(crate) fn retry_after(&self) -> Duration {
        self.state.lock().retry_after()
    }

    pub(crate) fn stats(&self) -> AdmissionStats {
        let state = self.state.lock();
        AdmissionStats {
            in_flight: state.in_flight,
            requests_max: self.requests_max,
            refused_total: state.refused_total,
        }
    }
}

impl State {
    fn roll(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.window_start);
        if elapsed < WINDOW || self.finished_in_window == 0 {
            return;
        }
        let measured = elapsed / self.finished_in_window;
        self.interval = Some(
            self.interval
                .map_or(measured, |old| (old * 3 + measured) / 4),
        );
        self.window_start = now;
        self.finished_in_window = 0;
    }

    fn retry_after(&self) -> Duration {
        self.interval.map_or(RETRY_DEFAULT, |interval| {
            interval.clamp(RETRY_MIN, RETRY_MAX)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_follows_the_pace_at_which_requests_finish() {
        let admission = Admission::new(4);
        let at = Duration::from_secs;
        for _ in 0..4 {
            admission.enter(at(0)).unwrap();
        }
        let refused = admission.enter(at(0)).unwrap_err();
        assert_eq!(refused.retry_after(), Some(RETRY_DEFAULT));
        admission.leave();
        admission.leave();
        for _ in 0..2 {
            admission.enter(at(10)).unwrap();
        }
        let refused = admission.enter(at(10)).unwrap_err();
        assert_eq!(refused.retry_after(), Some(at(5)));
        assert!(refused.retryable());
        let stats = admission.stats();
        assert_eq!((stats.in_flight, stats.refused_total), (4, 2));
    }
}
