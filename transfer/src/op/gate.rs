//! The one lock-free piece of a transfer: which parts are handed out, which are finished, and
//! whether the rest is called off.
//!
//! One 64-bit word: bit 63 says "stopped", bits 32..63 hold the next part to hand out, bits 0..32
//! the parts that are not finished. Parts are claimed by any number of threads; a stop takes back
//! all parts that nobody claimed. Exactly one call of [`Gate::finish`] or [`Gate::stop`] reports
//! that nothing is left, and after that report no part is being worked on.

use crate::sync::{AtomicU64, Ordering};

const STOPPED: u64 = 1 << 63;
const NEXT_SHIFT: u32 = 32;
const LOW: u64 = (1 << NEXT_SHIFT) - 1;
const NEXT_MASK: u64 = (1 << 31) - 1;

/// Most parts that one transfer is cut into.
pub(crate) const PARTS_MAX: u32 = i32::MAX as u32;

pub(crate) struct Gate {
    word: AtomicU64,
    parts: u32,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("parts", &self.parts)
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// A gate over `parts` parts, at most [`PARTS_MAX`].
    pub(crate) fn new(parts: u32) -> Self {
        debug_assert!(parts <= PARTS_MAX);
        Self {
            word: AtomicU64::new(u64::from(parts)),
            parts,
        }
    }

    /// The next part, or `None` when all are handed out or the rest is called off. Each part that
    /// was claimed must be reported by one [`Gate::finish`].
    pub(crate) fn claim(&self) -> Option<u32> {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            let next = next(word);
            if word & STOPPED != 0 || next >= self.parts {
                return None;
            }
            let claimed = word + (1 << NEXT_SHIFT);
            match self.word.compare_exchange_weak(
                word,
                claimed,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(next),
                Err(now) => word = now,
            }
        }
    }

    /// Reports one claimed part as finished; true for the call after which nothing is left.
    ///
    /// Release on this side and acquire in the last call order every part's bytes before whatever
    /// the last finisher does next.
    pub(crate) fn finish(&self) -> bool {
        let before = self.word.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before & LOW > 0, "a part finished twice");
        before & LOW == 1
    }

    /// Calls off all parts that nobody claimed; true when nothing is left because of this call.
    pub(crate) fn stop(&self) -> bool {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            if word & STOPPED != 0 || word & LOW == 0 {
                return false;
            }
            let unclaimed = u64::from(self.parts - next(word));
            let left = (word & LOW) - unclaimed;
            let stopped = STOPPED | (u64::from(self.parts) << NEXT_SHIFT) | left;
            match self.word.compare_exchange_weak(
                word,
                stopped,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return left == 0,
                Err(now) => word = now,
            }
        }
    }

    /// Whether the rest was called off: a long part may end early.
    pub(crate) fn stopped(&self) -> bool {
        self.word.load(Ordering::Acquire) & STOPPED != 0
    }
}

fn next(word: u64) -> u32 {
    // The mask leaves 31 bits.
    u32::try_from((word >> NEXT_SHIFT) & NEXT_MASK).unwrap_or(u32::MAX)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_handed_out_once_and_the_last_finish_reports() {
        let gate = Gate::new(3);
        assert_eq!(
            [gate.claim(), gate.claim(), gate.claim()],
            [Some(0), Some(1), Some(2)]
        );
        assert_eq!(gate.claim(), None);
        assert!(!gate.finish());
        assert!(!gate.finish());
        assert!(gate.finish());
    }

    #[test]
    fn stop_takes_back_what_nobody_claimed() {
        let gate = Gate::new(3);
        assert_eq!(gate.claim(), Some(0));
        assert!(!gate.stop());
        assert!(gate.stopped());
        assert_eq!(gate.claim(), None);
        assert!(gate.finish());
        assert!(!gate.stop());

        let idle = Gate::new(2);
        assert!(idle.stop());
        assert!(!idle.stop());
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p blockplane-transfer --lib --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU64, Ordering};
    use loom::thread;

    use super::*;

    /// Stands for the bytes of the two parts: loom reports any access that is not ordered.
    struct Shared {
        gate: Gate,
        bytes: [UnsafeCell<u32>; 2],
        reports: AtomicU64,
    }

    impl Shared {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                gate: Gate::new(2),
                bytes: [UnsafeCell::new(0), UnsafeCell::new(0)],
                reports: AtomicU64::new(0),
            })
        }

        fn work(&self) {
            while let Some(part) = self.gate.claim() {
                // SAFETY: what the model checks: a claimed part belongs to one thread.
                self.bytes[part as usize].with_mut(|bytes| unsafe { *bytes += 1 });
                if self.gate.finish() {
                    self.quiet();
                }
            }
        }

        /// Nothing is left: the bytes have another owner.
        fn quiet(&self) {
            for bytes in &self.bytes {
                // SAFETY: what the model checks: nobody works on a part any more.
                bytes.with_mut(|bytes| unsafe { *bytes += 10 });
            }
            self.reports.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn model(run: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(run);
    }

    #[test]
    fn loom_cancel_races_with_a_worker() {
        model(|| {
            let shared = Shared::new();
            let worker = {
                let shared = shared.clone();
                thread::spawn(move || shared.work())
            };
            if shared.gate.stop() {
                shared.quiet();
            }
            worker.join().unwrap();
            assert_eq!(shared.reports.load(Ordering::Relaxed), 1);
        });
    }

    #[test]
    fn loom_two_workers_share_the_parts() {
        model(|| {
            let shared = Shared::new();
            let worker = {
                let shared = shared.clone();
                thread::spawn(move || shared.work())
            };
            shared.work();
            worker.join().unwrap();
            assert_eq!(shared.reports.load(Ordering::Relaxed), 1);
            for bytes in &shared.bytes {
                // SAFETY: both threads are done.
                bytes.with(|bytes| assert_eq!(unsafe { *bytes }, 11));
            }
        });
    }
}
