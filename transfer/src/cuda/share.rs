//! How transfers share the multiprocessors of a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Multiprocessors of one device that transfers of this process occupy.
#[derive(Clone, Debug, Default)]
pub(super) struct Occupied(Arc<AtomicU32>);

/// Some of them, until this is dropped.
#[derive(Debug)]
pub(super) struct SmShare {
    of: Occupied,
    sms: u32,
}

impl Occupied {
    /// Exactly `sms`, whatever else is occupied.
    pub(super) fn take(&self, sms: u32) -> SmShare {
        self.0.fetch_add(sms, Ordering::Relaxed);
        SmShare {
            of: self.clone(),
            sms,
        }
    }

    /// `wanted`, or what is left of `total`, but at least `least` (or `wanted`, if that is less).
    pub(super) fn share(&self, wanted: u32, total: u32, least: u32) -> SmShare {
        let share = |occupied: u32| {
            let left = total.saturating_sub(occupied);
            wanted.min(left.max(least))
        };
        let mut occupied = self.0.load(Ordering::Relaxed);
        loop {
            let sms = share(occupied);
            match self.0.compare_exchange_weak(
                occupied,
                occupied.saturating_add(sms),
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    return SmShare {
                        of: self.clone(),
                        sms,
                    };
                }
                Err(now) => occupied = now,
            }
        }
    }
}

impl SmShare {
    pub(super) const fn sms(&self) -> u32 {
        self.sms
    }
}

impl Drop for SmShare {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.sms, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_transfers_get_what_is_left_and_give_it_back() {
        let occupied = Occupied::default();
        let first = occupied.share(16, 40, 4);
        let second = occupied.share(16, 40, 4);
        let third = occupied.share(16, 40, 4);
        let fourth = occupied.share(16, 40, 4);
        let small = occupied.share(2, 40, 4);
        let shares = [&first, &second, &third, &fourth, &small];
        assert_eq!(shares.map(SmShare::sms), [16, 16, 8, 4, 2]);
        let explicit = occupied.take(64);
        drop((first, second, third, explicit));
        assert_eq!(occupied.share(16, 40, 4).sms(), 16);
        drop((fourth, small));
        assert_eq!(occupied.0.load(Ordering::Relaxed), 0);
    }
}
