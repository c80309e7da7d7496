//! Whether a tier can be relied on.

use std::time::Duration;

use blockplane_protocol::Tier;

use super::config::HealthConfig;

/// How a tier is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TierState {
    /// It works.
    #[default]
    On,
    /// It missed deadlines: it is left alone but for a probe now and then, which turns it on again
    /// when it succeeds.
    Slow,
    /// It works with fewer blocks than it had.
    Shrunk {
        /// Blocks out of use.
        blocks: u32,
    },
    /// Blocks are read, none is written any more; why.
    ReadOnly(String),
    /// It is not used any more; why.
    Off(String),
}

/// A tier became another state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateChange {
    /// The tier.
    pub tier: Tier,
    /// Its state from now on.
    pub state: TierState,
}

/// The record of one tier.
#[derive(Debug)]
pub(super) struct Health {
    state: TierState,
    bad_blocks: u32,
    read_only: Option<String>,
    late: u32,
    failed: u32,
    probe_at: Duration,
    probing: bool,
}

/// How a move ended, for the tier's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// At least one block was moved, or found invalid: the tier answers.
    Answered,
    /// None was, and the time was up.
    Late,
    /// None was, before the time was up.
    Failed,
}

impl Health {
    pub(super) const fn new() -> Self {
        Self {
            state: TierState::On,
            bad_blocks: 0,
            read_only: None,
            late: 0,
            failed: 0,
            probe_at: Duration::ZERO,
            probing: false,
        }
    }

    pub(super) const fn state(&self) -> &TierState {
        &self.state
    }

    /// Whether a move may start.
    pub(super) fn usable(&self, now: Duration) -> bool {
        match self.state {
            TierState::On | TierState::Shrunk { .. } | TierState::ReadOnly(_) => true,
            TierState::Slow => !self.probing && now >= self.probe_at,
            TierState::Off(_) => false,
        }
    }

    /// Whether blocks may be written to it.
    pub(super) fn writable(&self, now: Duration) -> bool {
        self.read_only.is_none() && !self.left_alone(now)
    }

    /// Whether nothing should wait for the tier.
    pub(super) fn left_alone(&self, now: Duration) -> bool {
        !self.probing && !self.usable(now)
    }

    /// A move starts.
    pub(super) fn started(&mut self) {
        self.probing = self.state == TierState::Slow;
    }

    /// A move ended. True when the state changed.
    pub(super) fn ended(&mut self, now: Duration, ended: Ended, config: &HealthConfig) -> bool {
        self.probing = false;
        match ended {
            Ended::Answered => {
                (self.late, self.failed) = (0, 0);
                let working = self.working();
                self.state == TierState::Slow && self.become_(working)
            }
            Ended::Late => {
                self.late += 1;
                self.probe_at = now + config.probe_every;
                self.late >= config.late_max
                    && !matches!(self.state, TierState::Off(_))
                    && self.become_(TierState::Slow)
            }
            Ended::Failed => {
                self.failed += 1;
                self.probe_at = now + config.probe_every;
                self.failed >= config.failed_max
                    && self.turn_off(format!("{} moves in a row failed", self.failed))
            }
        }
    }

    /// One more block is out of use. True when the state changed: it is told once, however many
    /// blocks follow.
    pub(super) fn lost_block(&mut self) -> bool {
        self.bad_blocks += 1;
        let first = self.state == TierState::On;
        if matches!(self.state, TierState::On | TierState::Shrunk { .. }) {
            self.state = self.working();
        }
        first
    }

    /// True when it was not off.
    pub(super) fn turn_off(&mut self, reason: String) -> bool {
        !matches!(self.state, TierState::Off(_)) && self.become_(TierState::Off(reason))
    }

    /// Nothing is written any more. True when the state changed.
    pub(super) fn stop_writes(&mut self, reason: String) -> bool {
        if self.read_only.is_some() || matches!(self.state, TierState::Off(_)) {
            return false;
        }
        self.read_only = Some(reason);
        let working = self.working();
        self.become_(working)
    }

    fn working(&self) -> TierState {
        match (&self.read_only, self.bad_blocks) {
            (Some(reason), _) => TierState::ReadOnly(reason.clone()),
            (None, 0) => TierState::On,
            (None, blocks) => TierState::Shrunk { blocks },
        }
    }

    fn become_(&mut self, state: TierState) -> bool {
        let changed = self.state != state;
        self.state = state;
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn deadlines_missed_in_a_row_make_it_slow_and_one_probe_brings_it_back() {
        let config = HealthConfig::default();
        let mut health = Health::new();
        for (ended, changed) in [
            (Ended::Late, false),
            (Ended::Late, false),
            (Ended::Answered, false),
            (Ended::Late, false),
            (Ended::Late, false),
            (Ended::Late, true),
        ] {
            assert_eq!(health.ended(at(1), ended, &config), changed);
        }
        assert_eq!(health.state(), &TierState::Slow);
        assert!(!health.usable(at(5)));
        assert!(health.usable(at(6)));
        health.started();
        assert!(!health.usable(at(7)), "one probe at a time");
        assert!(!health.ended(at(8), Ended::Late, &config));
        assert!(!health.usable(at(12)));
        assert!(health.usable(at(13)));
        assert!(health.ended(at(13), Ended::Answered, &config));
        assert_eq!(health.state(), &TierState::On);
    }

    #[test]
    fn lost_blocks_are_told_once_and_failures_turn_it_off_for_good() {
        let config = HealthConfig::default();
        let mut health = Health::new();
        assert!(health.lost_block());
        assert!(!health.lost_block());
        assert_eq!(health.state(), &TierState::Shrunk { blocks: 2 });
        assert!(health.usable(at(0)));
        let changes = (0..20).filter(|_| health.ended(at(0), Ended::Failed, &config));
        assert_eq!(changes.count(), 1);
        assert!(matches!(health.state(), TierState::Off(reason) if reason.contains("16 moves")));
        assert!(!health.ended(at(0), Ended::Answered, &config));
        assert!(!health.usable(at(1000)));
        assert!(!health.turn_off("again".to_owned()));
    }

    #[test]
    fn a_tier_that_cannot_be_written_is_still_read() {
        let mut health = Health::new();
        assert!(health.writable(at(0)));
        assert!(health.stop_writes("full".to_owned()));
        assert!(!health.stop_writes("full".to_owned()));
        assert!(health.usable(at(0)) && !health.writable(at(0)));
        assert_eq!(health.state(), &TierState::ReadOnly("full".to_owned()));
    }
}
