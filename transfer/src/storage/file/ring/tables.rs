//! Memory and files registered with the ring: looked up, registered at first use, forgotten.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::RawFd;

use io_uring::IoUring;

use super::super::plan::Via;
use crate::memory::{Region, RegionId};

/// Files registered at one time; others are named by their descriptor.
const FILES: u32 = 1024;

/// Pieces of memory registered at one time.
const BUFFERS: u32 = 4096;

/// Memory is registered in pieces of this size: pinning one takes a few milliseconds at most, and
/// only what is used is pinned.
const SLICE_BYTES: u64 = 64 << 20;

/// Free places of a table.
#[derive(Debug, Default)]
struct Places {
    free: Vec<u32>,
}

impl Places {
    fn new(count: u32) -> Self {
        Self {
            free: (0..count).rev().collect(),
        }
    }
}

/// Registered files.
#[derive(Debug)]
pub(super) struct Files {
    places: Places,
    known: HashMap<(u64, bool), Option<u32>>,
}

impl Files {
    pub(super) fn new(ring: &IoUring) -> Self {
        let places = match ring.submitter().register_files_sparse(FILES) {
            Ok(()) => Places::new(FILES),
            Err(error) => {
                tracing::debug!(%error, "no registered files");
                Places::default()
            }
        };
        Self {
            places,
            known: HashMap::new(),
        }
    }

    pub(super) fn usable(&self) -> bool {
        !self.places.free.is_empty() || !self.known.is_empty()
    }

    /// The place of a file, if it has one.
    pub(super) fn place(&mut self, ring: &IoUring, file: u64, via: Via, fd: RawFd) -> Option<u32> {
        match self.known.entry((file, via == Via::Direct)) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                let place = self.places.free.pop();
                let place = place.filter(|&place| {
                    let placed = ring.submitter().register_files_update(place, &[fd]);
                    if placed.is_err() {
                        self.places.free.push(place);
                    }
                    placed.is_ok()
                });
                *new.insert(place)
            }
        }
    }

    pub(super) fn forget(&mut self, ring: &IoUring, file: u64) {
        for direct in [true, false] {
            if let Some(Some(place)) = self.known.remove(&(file, direct)) {
                match ring.submitter().register_files_update(place, &[-1]) {
                    Ok(_) => self.places.free.push(place),
                    // The place stays taken, its file open until the ring ends.
                    Err(error) => tracing::warn!(%error, "cannot unregister a file"),
                }
            }
        }
    }
}

/// What became of a piece of a region.
#[derive(Clone, Copy, Debug)]
enum Slice {
    Refused,
    At { place: u32, bytes: u64 },
}

/// Registered memory.
#[derive(Debug)]
pub(super) struct Buffers {
    places: Places,
    known: HashMap<RegionId, HashMap<u64, Slice>>,
    bytes: u64,
    bytes_max: u64,
    refused: bool,
}

impl Buffers {
    pub(super) fn new(ring: &IoUring, bytes_max: u64) -> Self {
        let places = if bytes_max == 0 {
            Places::default()
        } else {
            match ring.submitter().register_buffers_sparse(BUFFERS) {
                Ok(()) => Places::new(BUFFERS),
                Err(error) => {
                    tracing::debug!(%error, "no registered memory");
                    Places::default()
                }
            }
        };
        Self {
            places,
            known: HashMap::new(),
            bytes: 0,
            bytes_max,
            refused: false,
        }
    }

    pub(super) fn usable(&self) -> bool {
        !self.places.free.is_empty() || !self.known.is_empty()
    }

    /// The place of `bytes` at `offset` of a region, if they are or can be registered as a whole.
    pub(super) fn place(
        &mut self,
        ring: &IoUring,
        region: &Region,
        offset: u64,
        bytes: u64,
    ) -> Option<u16> {
        let slice = offset / SLICE_BYTES;
        if (offset + bytes - 1) / SLICE_BYTES != slice {
            return None;
        }
        let known = self.known.get(&region.id).and_then(|all| all.get(&slice));
        let at = match known {
            Some(known) => *known,
            // Its end may have been announced already; nobody would take it out again.
            None if region.released() => return None,
            None => {
                let at = self.register(ring, region, slice).unwrap_or(Slice::Refused);
                self.known.entry(region.id).or_default().insert(slice, at);
                at
            }
        };
        match at {
            Slice::At { place, .. } => u16::try_from(place).ok(),
            Slice::Refused => None,
        }
    }

    fn register(&mut self, ring: &IoUring, region: &Region, slice: u64) -> Option<Slice> {
        let start = slice * SLICE_BYTES;
        let bytes = SLICE_BYTES.min(region.len as u64 - start);
        if self.bytes + bytes > self.bytes_max {
            return None;
        }
        let place = self.places.free.pop()?;
        let [start, len] = [start, bytes].map(|v| usize::try_from(v).unwrap_or(usize::MAX));
        // SAFETY: `start` lies inside the region, `offset` of a checked request lies behind it.
        let base = unsafe { region.base().add(start) };
        let iovec = libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        };
        match self.update(ring, place, iovec) {
            Ok(()) => {
                self.bytes += bytes;
                Some(Slice::At { place, bytes })
            }
            Err(error) => {
                self.places.free.push(place);
                if !self.refused {
                    self.refused = true;
                    tracing::warn!(
                        %error,
                        registered = self.bytes,
                        "memory for files cannot be registered (limit of locked memory?); \
                         requests name plain memory, which costs some CPU"
                    );
                }
                None
            }
        }
    }

    fn update(&self, ring: &IoUring, place: u32, iovec: libc::iovec) -> io::Result<()> {
        // SAFETY: the kernel pins the pages itself. The memory is mapped now, because a request of
        // a live transfer names it (or it is the empty piece), and the place is found by the id of
        // its region, which is never used again: pages that outlive their mapping are not used.
        unsafe {
            ring.submitter()
                .register_buffers_update(place, &[iovec], None)
        }
    }

    pub(super) fn forget(&mut self, ring: &IoUring, region: RegionId) {
        for at in self.known.remove(&region).unwrap_or_default().into_values() {
            let Slice::At { place, bytes } = at else {
                continue;
            };
            let empty = libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            };
            match self.update(ring, place, empty) {
                Ok(()) => {
                    self.places.free.push(place);
                    self.bytes -= bytes;
                }
                // The place stays taken, its pages pinned until the ring ends.
                Err(error) => tracing::warn!(%error, "cannot unregister memory"),
            }
        }
    }
}
