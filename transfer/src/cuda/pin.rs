//! Pinned host memory: locked in place and known to the devices, so that their kernels and copy
//! engines move its bytes at the speed of the bus.
//!
//! Pinning touches every page. It is done in chunks by several threads, near the
//! device, and whoever needs only the first chunks need not wait for the last.

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use cudarc::driver::sys;
use parking_lot::{Condvar, Mutex};
use rustix::thread::CpuSet;

use super::device::Device;
use super::driver::check;
use super::error::CudaError;

/// How a host arena is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PinConfig {
    /// The device that is to use it: the memory is taken from the NUMA node next to it, where the system
    /// tells which that is. Every device of the process can use it all the same.
    pub device: u32,
    /// Bytes pinned at one time by one thread. Default 256 MiB; a multiple of 2 MiB.
    pub chunk_bytes: usize,
    /// Threads that pin. Default 4, at most 64.
    pub threads: usize,
}

impl PinConfig {
    /// The defaults, near `device`.
    #[must_use]
    pub const fn near(device: u32) -> Self {
        Self {
            device,
            chunk_bytes: 256 << 20,
            threads: 4,
        }
    }
}

/// How far pinning has come.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PinProgress {
    /// Bytes that are pinned.
    pub pinned_bytes: u64,
    /// Bytes of the region.
    pub total_bytes: u64,
    /// Why it ended early, if it did.
    pub failed: Option<CudaError>,
}

/// Memory that is being pinned, or is; until this is dropped.
#[derive(Debug)]
pub(crate) struct Pin(Arc<Inner>);

struct Inner {
    device: &'static Device,
    base: NonNull<u8>,
    bytes: usize,
    chunk_bytes: usize,
    /// The next chunk that no thread has taken.
    next: AtomicUsize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Chunks that are pinned.
    done: Vec<bool>,
    threads: usize,
    failed: Option<CudaError>,
}

// SAFETY: an address range without thread affinity, used for its address only.
unsafe impl Send for Inner {}
// SAFETY: as above; the state is behind a lock.
unsafe impl Sync for Inner {}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin")
            .field("device", &self.device)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// Why a range is not pinned.
#[derive(Clone, Debug)]
pub(crate) enum Unpinned {
    Failed(CudaError),
    TimedOut,
}

impl Pin {
    /// Starts to pin `bytes` from `base` on.
    ///
    /// # Safety
    /// They stay mapped until the result is dropped.
    pub(crate) unsafe fn start(
        device: &'static Device,
        base: NonNull<u8>,
        bytes: usize,
        config: &PinConfig,
    ) -> Self {
        let chunk_bytes = config.chunk_bytes.max(2 << 20).next_multiple_of(2 << 20);
        let chunks = bytes.div_ceil(chunk_bytes);
        let threads = config.threads.clamp(1, 64).min(chunks);
        let pin = Arc::new(Inner {
            device,
            base,
            bytes,
            chunk_bytes,
            next: AtomicUsize::new(0),
            state: Mutex::new(State {
                done: vec![false; chunks],
                threads,
                failed: None,
            }),
            changed: Condvar::new(),
        });
        let cpus = device.info.numa_node.and_then(cpus_of);
        for index in 0..threads {
            let worker = pin.clone();
            let started = std::thread::Builder::new()
                .name(format!("bp-pin-{index}"))
                .spawn(move || worker.run(cpus));
            if started.is_err() {
                // The others take its chunks; without any, this thread does it all.
                if index == 0 {
                    pin.run(None);
                } else {
                    pin.leave();
                }
            }
        }
        Self(pin)
    }

    /// Waits until a range of bytes is pinned.
    pub(crate) fn wait(&self, range: Range<u64>, until: Instant) -> Result<(), Unpinned> {
        self.0.wait(range, until)
    }

    /// How far it has come.
    pub(crate) fn progress(&self) -> PinProgress {
        self.0.progress()
    }

    /// Its addresses, for those who must not cross from one chunk to the next.
    pub(crate) fn span(&self) -> PinnedSpan {
        let start = self.0.base.as_ptr() as u64;
        PinnedSpan {
            start,
            end: start + self.0.bytes as u64,
            chunk_bytes: self.0.chunk_bytes as u64,
        }
    }
}

/// Addresses that are pinned in chunks. One copy of a copy engine must not span two of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PinnedSpan {
    start: u64,
    end: u64,
    chunk_bytes: u64,
}

impl PinnedSpan {
    /// Bytes from an address in the span to the end of its chunk.
    pub(crate) fn until_seam(&self, address: u64) -> Option<u64> {
        (self.start..self.end)
            .contains(&address)
            .then(|| self.chunk_bytes - (address - self.start) % self.chunk_bytes)
    }
}

impl Inner {
    /// Pins chunks until none is left.
    fn run(&self, cpus: Option<CpuSet>) {
        if let Some(cpus) = cpus {
            // Best effort: pages come from the node of the thread that touches them first.
            let _ = rustix::thread::sched_setaffinity(None, &cpus);
        }
        while self.state.lock().failed.is_none() {
            let chunk = self.next.fetch_add(1, Ordering::Relaxed);
            let start = chunk.saturating_mul(self.chunk_bytes);
            if start >= self.bytes {
                break;
            }
            let pinned = self.pin(start, self.chunk_bytes.min(self.bytes - start));
            let mut state = self.state.lock();
            match pinned {
                Ok(()) => state.done[chunk] = true,
                Err(error) => state.failed = Some(error),
            }
            drop(state);
            self.changed.notify_all();
        }
        self.leave();
    }

    fn leave(&self) {
        self.state.lock().threads -= 1;
        self.changed.notify_all();
    }

    fn pin(&self, start: usize, bytes: usize) -> Result<(), CudaError> {
        let base = self.base.as_ptr().wrapping_add(start);
        populate(base, bytes);
        let _entered = self.device.enter()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: mapped memory that stays so until `drop` has undone this.
        let pinned = check("pin host memory", unsafe {
            sys::cuMemHostRegister_v2(base.cast::<c_void>(), bytes, flags)
        });
        pinned.inspect_err(|error| self.device.note(error))
    }

    fn wait(&self, range: Range<u64>, until: Instant) -> Result<(), Unpinned> {
        let chunk = |at: u64| usize::try_from(at).unwrap_or(usize::MAX) / self.chunk_bytes;
        let (first, last) = (chunk(range.start), chunk(range.end.saturating_sub(1)));
        let mut state = self.state.lock();
        loop {
            let last = last.min(state.done.len().saturating_sub(1));
            if state.done[first.min(last)..=last].iter().all(|&done| done) {
                return Ok(());
            }
            if let Some(error) = &state.failed {
                return Err(Unpinned::Failed(error.clone()));
            }
            if self.changed.wait_until(&mut state, until).timed_out() {
                return Err(Unpinned::TimedOut);
            }
        }
    }

    fn progress(&self) -> PinProgress {
        let state = self.state.lock();
        let pinned: usize = (0..)
            .zip(&state.done)
            .filter(|&(_, &done)| done)
            .map(|(chunk, _): (usize, _)| {
                self.chunk_bytes.min(self.bytes - chunk * self.chunk_bytes)
            })
            .sum();
        PinProgress {
            pinned_bytes: pinned as u64,
            total_bytes: self.bytes as u64,
            failed: state.failed.clone(),
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let pin = &*self.0;
        // No thread starts another chunk, and what they have in hand is short.
        pin.next
            .store(usize::MAX / pin.chunk_bytes, Ordering::Relaxed);
        let mut state = pin.state.lock();
        while state.threads > 0 {
            pin.changed.wait(&mut state);
        }
        for (chunk, _) in (0..).zip(&state.done).filter(|&(_, &done)| done) {
            let chunk: usize = chunk;
            let base = pin.base.as_ptr().wrapping_add(chunk * pin.chunk_bytes);
            let freed = pin.device.enter().and_then(|_entered| {
                // SAFETY: pinned by `pin`, and no copy that uses it is under way.
                check("unpin host memory", unsafe {
                    sys::cuMemHostUnregister(base.cast::<c_void>())
                })
            });
            if let Err(error) = freed {
                tracing::warn!(%error, "host memory stays pinned");
                return;
            }
        }
    }
}

/// Makes the pages exist, from the memory next to this thread. Best effort: the driver does it
/// otherwise, one by one.
fn populate(base: *mut u8, bytes: usize) {
    let page = rustix::param::page_size();
    let skip = base.align_offset(page).min(bytes);
    let whole = (bytes - skip) / page * page;
    if whole > 0 {
        let first = base.wrapping_add(skip).cast::<c_void>();
        // SAFETY: whole pages of mapped memory; populating changes no contents.
        let _ = unsafe { libc::madvise(first, whole, libc::MADV_POPULATE_WRITE) };
    }
}

/// The processors of a NUMA node.
fn cpus_of(node: u32) -> Option<CpuSet> {
    let path = format!("/sys/devices/system/node/node{node}/cpulist");
    let list = std::fs::read_to_string(path).ok()?;
    let mut cpus = CpuSet::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        for cpu in first.parse::<usize>().ok()?..=last.parse().ok()? {
            if cpu < CpuSet::MAX_CPU {
                cpus.set(cpu);
            }
        }
    }
    (cpus.count() > 0).then_some(cpus)
}
