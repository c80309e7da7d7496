//! The bell of an agent: which rings have something, and how to wake who waits for it.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::memory::{Mapping, map_arena, small_file};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

const AT_BELL: usize = 0;
const AT_PARKED: usize = 4;
const AT_ALARM: usize = 8;
const AT_READY: usize = 64;

/// The words of a bell, wherever they live.
///
/// Whoever waits announces itself, looks once more, and sleeps unless the bell has rung meanwhile.
/// Whoever brings something makes it visible first and then looks for sleepers. Both sides put a
/// full barrier between their store and their load, so that one of them sees the other.
///
/// The bit of a ring works the same way: a receiver clears it and looks at the ring once more; a
/// sender writes its record and sets the bit unless it is set. A bit may stay set while its ring is
/// empty, which spares two processes that talk to each other the fight over its cache line.
#[derive(Clone, Copy, Debug)]
struct Words<'a> {
    bell: &'a AtomicU32,
    parked: &'a AtomicU32,
    alarm: &'a AtomicU32,
}

/// What has to be done after something was made visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Call {
    wake: bool,
    alarm: bool,
}

impl Words<'_> {
    /// A receiver is about to sleep; what it has to compare with.
    fn announce(&self) -> u32 {
        self.parked.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.bell.load(Ordering::SeqCst)
    }

    fn retract(&self) {
        self.parked.fetch_sub(1, Ordering::SeqCst);
    }

    /// An async receiver wants to be told through the connection, once.
    fn set_alarm(&self) {
        self.alarm.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Something was made visible, and a full barrier followed.
    fn ring(&self) -> Call {
        let wake = self.parked.load(Ordering::SeqCst) != 0;
        if wake {
            self.bell.fetch_add(1, Ordering::SeqCst);
        }
        let alarm =
            self.alarm.load(Ordering::SeqCst) != 0 && self.alarm.swap(0, Ordering::SeqCst) != 0;
        Call { wake, alarm }
    }
}

/// A bell in shared memory.
#[derive(Debug)]
struct Mapped {
    mapping: Mapping,
    words: usize,
}

impl Mapped {
    fn words(&self) -> Words<'_> {
        Words {
            bell: self.word32(AT_BELL),
            parked: self.word32(AT_PARKED),
            alarm: self.word32(AT_ALARM),
        }
    }

    fn word32(&self, at: usize) -> &AtomicU32 {
        // SAFETY: the first words of the mapping, which lives as long as `self`.
        let word = unsafe { self.mapping.base().as_ptr().add(at) };
        // SAFETY: aligned to 4 in a mapped page; every access by anybody is atomic.
        unsafe { &*word.cast::<AtomicU32>() }
    }

    fn ready(&self, word: usize) -> &AtomicU64 {
        debug_assert!(word < self.words);
        // SAFETY: `word` is below the number of words that the mapping was made for.
        let word = unsafe { self.mapping.base().as_ptr().add(AT_READY + word * 8) };
        // SAFETY: aligned to 8 in a mapped page; every access by anybody is atomic.
        unsafe { &*word.cast::<AtomicU64>() }
    }

    /// Something was made visible in this process: whether somebody sleeps.
    fn ring_local(&self) -> bool {
        fence(Ordering::SeqCst);
        self.words().ring().wake
    }

    /// Wakes `sleepers` receivers.
    fn wake(&self, sleepers: u32) {
        // It fails only for an address that is not mapped.
        #[cfg(not(loom))]
        let _ = rustix::thread::futex::wake(
            self.word32(AT_BELL),
            rustix::thread::futex::Flags::empty(),
            sleepers,
        );
        #[cfg(loom)]
        let _ = sleepers;
    }
}

/// The bell of this agent.
#[derive(Debug)]
pub(crate) struct Bell {
    mapped: Mapped,
    file: Arc<OwnedFd>,
}

impl Bell {
    /// A bell for at most `rings` rings.
    pub(crate) fn new(rings: usize) -> io::Result<Self> {
        let words = rings.div_ceil(64);
        let (file, mapping) = small_file("bell", AT_READY + words * 8)?;
        Ok(Self {
            mapped: Mapped { mapping, words },
            file: Arc::new(file),
        })
    }

    /// What peers map.
    pub(crate) const fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// The first of these rings that says it has something.
    pub(crate) fn next_ready(&self, rings: Range<usize>) -> Option<usize> {
        for word in rings.start / 64..rings.end.div_ceil(64) {
            let mut bits = self.mapped.ready(word).load(Ordering::Acquire);
            if word == rings.start / 64 {
                bits &= u64::MAX << (rings.start % 64);
            }
            if bits != 0 {
                let ring = word * 64 + bits.trailing_zeros() as usize;
                return (ring < rings.end).then_some(ring);
            }
        }
        None
    }

    /// The ring is empty, as it seems: look at it once more after this.
    pub(crate) fn clear(&self, ring: usize) {
        let word = self.mapped.ready(ring / 64);
        word.fetch_and(!(1 << (ring % 64)), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The ring has more.
    pub(crate) fn set(&self, ring: usize) {
        let word = self.mapped.ready(ring / 64);
        word.fetch_or(1 << (ring % 64), Ordering::SeqCst);
    }

    /// Wakes one receiver of this process if one sleeps: something is in the local queue.
    pub(crate) fn ring_local(&self) {
        if self.mapped.ring_local() {
            self.mapped.wake(1);
        }
    }

    /// Wakes all receivers.
    pub(crate) fn ring_all(&self) {
        if self.mapped.ring_local() {
            self.mapped.wake(i32::MAX.unsigned_abs());
        }
    }

    pub(crate) fn set_alarm(&self) {
        self.mapped.words().set_alarm();
    }

    /// Announces this thread as a sleeper; look once more, then [`Sleeper::sleep`].
    pub(crate) fn sleeper(&self) -> Sleeper<'_> {
        Sleeper {
            bell: self,
            seen: self.mapped.words().announce(),
        }
    }
}

/// A receiver that is about to sleep.
#[derive(Debug)]
pub(crate) struct Sleeper<'a> {
    bell: &'a Bell,
    seen: u32,
}

impl Sleeper<'_> {
    /// Sleeps until the bell rings after this sleeper was made, or until `until`, or for no reason.
    pub(crate) fn sleep(&self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        #[cfg(not(loom))]
        {
            let left = rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            // Whatever comes back, the caller looks again.
            let _ = rustix::thread::futex::wait(
                self.bell.mapped.word32(AT_BELL),
                rustix::thread::futex::Flags::empty(),
                self.seen,
                Some(&left),
            );
        }
        #[cfg(loom)]
        let _ = (left, self.seen);
    }
}

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        self.bell.mapped.words().retract();
    }
}

/// The bell of a peer, and which of its rings is ours.
#[derive(Debug)]
pub(crate) struct RemoteBell {
    mapped: Mapped,
    ring: usize,
}

impl RemoteBell {
    pub(crate) fn map(file: &OwnedFd, ring: usize) -> io::Result<Self> {
        let words = ring / 64 + 1;
        let mapping = map_arena(file, (AT_READY + words * 8) as u64)?;
        Ok(Self {
            mapped: Mapped { mapping, words },
            ring,
        })
    }

    /// Our ring has something. True when the peer wants to be told through the connection too.
    pub(crate) fn ring(&self) -> bool {
        fence(Ordering::SeqCst);
        let (word, bit) = (self.mapped.ready(self.ring / 64), 1 << (self.ring % 64));
        if word.load(Ordering::SeqCst) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
        let call = self.mapped.words().ring();
        if call.wake {
            self.mapped.wake(1);
        }
        call.alarm
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rings_take_turns() {
        let bell = Bell::new(200).unwrap();
        assert_eq!(bell.next_ready(0..200), None);
        for ring in [3, 70, 199] {
            bell.set(ring);
        }
        assert_eq!(bell.next_ready(0..200), Some(3));
        assert_eq!(bell.next_ready(4..200), Some(70));
        assert_eq!(bell.next_ready(71..200), Some(199));
        assert_eq!(bell.next_ready(71..199), None);
        assert_eq!(bell.next_ready(4..70), None);
        assert_eq!(bell.next_ready(200..200), None);
        bell.clear(199);
        assert_eq!(bell.next_ready(71..200), None);
    }

    #[test]
    fn a_ring_before_the_sleep_is_not_slept_through() {
        let bell = Bell::new(1).unwrap();
        let remote = RemoteBell::map(bell.file(), 0).unwrap();
        let far = Instant::now() + Duration::from_secs(600);
        let sleeper = bell.sleeper();
        assert!(!remote.ring());
        sleeper.sleep(far);
        drop(sleeper);
        bell.set_alarm();
        assert!(remote.ring());
        assert!(!remote.ring(), "an alarm rings once");
        std::thread::scope(|scope| {
            let asleep = scope.spawn(|| {
                let sleeper = bell.sleeper();
                sleeper.sleep(far);
            });
            while !asleep.is_finished() {
                remote.ring();
                std::thread::yield_now();
            }
        });
        assert_eq!(bell.mapped.words().parked.load(Ordering::SeqCst), 0);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p blockplane-transfer --lib --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    #[derive(Default)]
    struct Shared {
        ready: AtomicU64,
        bell: AtomicU32,
        parked: AtomicU32,
        alarm: AtomicU32,
    }

    impl Shared {
        fn words(&self) -> Words<'_> {
            Words {
                bell: &self.bell,
                parked: &self.parked,
                alarm: &self.alarm,
            }
        }
    }

    /// Another thread brings something and rings.
    fn send(shared: &Arc<Shared>) -> thread::JoinHandle<Call> {
        let shared = shared.clone();
        thread::spawn(move || {
            shared.ready.store(1, Ordering::Release);
            fence(Ordering::SeqCst);
            shared.words().ring()
        })
    }

    #[test]
    fn loom_no_ring_is_slept_through() {
        loom::model(|| {
            let shared = Arc::new(Shared::default());
            let sender = send(&shared);
            let seen = shared.words().announce();
            let found = shared.ready.load(Ordering::SeqCst) != 0;
            // The kernel compares and sleeps in one step.
            let slept = !found && shared.bell.load(Ordering::SeqCst) == seen;
            let call = sender.join().unwrap();
            assert!(!slept || call.wake, "asleep, and nobody wakes it");
        });
    }

    #[test]
    fn loom_no_alarm_is_missed() {
        loom::model(|| {
            let shared = Arc::new(Shared::default());
            let sender = send(&shared);
            shared.words().set_alarm();
            let found = shared.ready.load(Ordering::SeqCst) != 0;
            let call = sender.join().unwrap();
            assert!(found || call.alarm, "waits, and nobody tells it");
        });
    }

    /// The record and the bit of its ring: a sender that finds the bit set leaves it, a receiver
    /// that finds the ring empty clears it. A record without its bit is never seen.
    #[test]
    fn loom_no_record_is_left_without_its_bit() {
        loom::model(|| {
            let head = Arc::new(AtomicU64::new(0));
            let ready = Arc::new(AtomicU64::new(1));
            let sender = {
                let (head, ready) = (head.clone(), ready.clone());
                thread::spawn(move || {
                    head.store(1, Ordering::Release);
                    fence(Ordering::SeqCst);
                    if ready.load(Ordering::SeqCst) & 1 == 0 {
                        ready.fetch_or(1, Ordering::SeqCst);
                    }
                })
            };
            let mut found = head.load(Ordering::Acquire) != 0;
            if !found {
                ready.fetch_and(!1, Ordering::SeqCst);
                fence(Ordering::SeqCst);
                found = head.load(Ordering::Acquire) != 0;
            }
            sender.join().unwrap();
            assert!(found || ready.load(Ordering::SeqCst) & 1 != 0);
        });
    }
}
