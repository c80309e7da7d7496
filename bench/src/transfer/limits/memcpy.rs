//! Copies by this process.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::times;
use crate::{report::Samples, transfer::memory::Copies};

/// Tells the helper to end.
const END: u32 = u32::MAX;

/// Seconds of a copy by one thread.
///
/// # Safety
/// As for [`Copies::run`].
pub(super) unsafe fn one(copies: &Copies, budget: Duration) -> Samples {
    let copy = || {
        let start = Instant::now();
        // SAFETY: promised by the caller.
        unsafe { copies.run() };
        Ok(start.elapsed())
    };
    times(budget, copy).unwrap_or_default()
}

/// Seconds of a copy by two threads, each one half; neither has to be woken.
///
/// # Safety
/// As for [`Copies::run`].
pub(super) unsafe fn two(copies: &Copies, budget: Duration) -> anyhow::Result<Samples> {
    let [mine, other] = copies.halves();
    let (asked, done) = (AtomicU32::new(0), AtomicU32::new(0));
    let limit = budget * 8 + Duration::from_secs(5);
    thread::scope(|scope| {
        let helper = thread::Builder::new()
            .name("bench-memcpy".to_owned())
            .spawn_scoped(scope, || {
                let begin = Instant::now();
                let mut seen = 0;
                loop {
                    match asked.load(Ordering::Acquire) {
                        END => return,
                        now if now != seen => {
                            // SAFETY: promised by the caller; the halves share no byte.
                            unsafe { other.run() };
                            seen = now;
                            done.store(now, Ordering::Release);
                        }
                        _ if begin.elapsed() > limit => return,
                        _ => spin_loop(),
                    }
                }
            })?;
        let mut round = 0;
        let seconds = times(budget, || {
            round += 1;
            let start = Instant::now();
            asked.store(round, Ordering::Release);
            // SAFETY: promised by the caller; the halves share no byte.
            unsafe { mine.run() };
            while done.load(Ordering::Acquire) != round {
                ensure!(start.elapsed() < limit, "the second copying thread ended");
                spin_loop();
            }
            Ok(start.elapsed())
        });
        asked.store(END, Ordering::Release);
        helper.join().ok().context("the second copying thread")?;
        seconds
    })
}
