//! Virtual links between tiers: what a move takes, in virtual time.

use std::time::Duration;

use blockplane_kvbm::tier::MoveKind;

/// Bandwidths; without one, moves take no time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkSpeeds {
    /// Between G1 and G2, in bytes per second, both directions together.
    pub host_bytes_per_s: Option<f64>,
    /// Between G2 and G3.
    pub disk_bytes_per_s: Option<f64>,
}

/// Each link moves one batch after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    speeds: LinkSpeeds,
    host_free: Duration,
    disk_free: Duration,
}

impl Links {
    pub(super) const fn new(speeds: LinkSpeeds) -> Self {
        Self {
            speeds,
            host_free: Duration::ZERO,
            disk_free: Duration::ZERO,
        }
    }

    /// When a move that starts now is going to end.
    pub(super) fn end(&mut self, now: Duration, kind: MoveKind, bytes: u64) -> Duration {
        let (speed, free) = match kind {
            MoveKind::DeviceToHost | MoveKind::HostToDevice => {
                (self.speeds.host_bytes_per_s, &mut self.host_free)
            }
            MoveKind::HostToDisk | MoveKind::DiskToHost => {
                (self.speeds.disk_bytes_per_s, &mut self.disk_free)
            }
            MoveKind::HostToRemote | MoveKind::RemoteToHost => return now,
        };
        let Some(speed) = speed else {
            return now;
        };
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
        let takes = Duration::from_secs_f64(bytes as f64 / speed);
        *free = now.max(*free) + takes;
        *free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_over_one_link_wait_for_each_other() {
        let mut links = Links::new(LinkSpeeds {
            host_bytes_per_s: None,
            disk_bytes_per_s: Some(100.0),
        });
        let second = Duration::from_secs;
        assert_eq!(links.end(second(1), MoveKind::HostToDisk, 200), second(3));
        assert_eq!(links.end(second(1), MoveKind::DiskToHost, 100), second(4));
        assert_eq!(links.end(second(1), MoveKind::DeviceToHost, 100), second(1));
        assert_eq!(links.end(second(9), MoveKind::DiskToHost, 100), second(10));
    }
}
