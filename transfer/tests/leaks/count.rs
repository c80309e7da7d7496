//! What a process holds: descriptors, mappings, threads, and every byte of its heap.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the bytes that live.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: hands everything on to the system's allocator and only counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: by the contract of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: by the contract of the caller.
        unsafe { System.dealloc(at, layout) };
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_add(size, Ordering::Relaxed);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: by the contract of the caller.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// What a process holds at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    descriptors: usize,
    mappings: usize,
    threads: usize,
    heap_bytes: usize,
    resident_bytes: usize,
}

/// What may be more after ten thousand rounds than before: tables keep the size that they once
/// had, and the system's allocator keeps pages. A leak of 8 bytes a round is above it.
const HEAP_SLACK: usize = 64 << 10;
const RESIDENT_SLACK: usize = 12 << 20;
/// The system keeps some stacks of threads that have ended, and arenas of the allocator.
const MAPPING_SLACK: usize = 64;

impl Held {
    pub(crate) fn now() -> Self {
        let entries = |what: &str| {
            std::fs::read_dir(format!("/proc/self/{what}"))
                .unwrap()
                .count()
        };
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let resident: usize = pages.split(' ').nth(1).unwrap().parse().unwrap();
        Self {
            descriptors: entries("fd"),
            mappings: maps.lines().count(),
            threads: entries("task"),
            heap_bytes: LIVE.load(Ordering::Relaxed),
            resident_bytes: resident * rustix::param::page_size(),
        }
    }

    /// Whether this is what was held before, as far as that can be said.
    pub(crate) fn is_back_to(&self, before: &Self) -> bool {
        self.descriptors <= before.descriptors
            && self.threads <= before.threads
            && self.mappings <= before.mappings + MAPPING_SLACK
            && self.heap_bytes <= before.heap_bytes + HEAP_SLACK
            && self.resident_bytes <= before.resident_bytes + RESIDENT_SLACK
    }

    pub(crate) fn parse(text: &str) -> Self {
        let mut numbers = text.split(' ').map(|number| number.parse().unwrap());
        let mut next = || numbers.next().unwrap();
        Self {
            descriptors: next(),
            mappings: next(),
            threads: next(),
            heap_bytes: next(),
            resident_bytes: next(),
        }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            descriptors,
            mappings,
            threads,
            heap_bytes,
            resident_bytes,
        } = self;
        write!(
            f,
            "{descriptors} {mappings} {threads} {heap_bytes} {resident_bytes}"
        )
    }
}
