//! A peer's memory as this agent sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::RemoteAccess;
use crate::memory::{Mapping, Region, RegionId};

/// A region of a peer.
#[derive(Debug)]
pub(crate) struct RemoteRegion {
    pub(crate) id: RegionId,
    pub(crate) len: u64,
    pub(crate) access: RemoteAccess,
    pub(crate) memory: RemoteMemory,
    /// The peer has said that the region is gone.
    gone: AtomicBool,
}

/// How its bytes are reached.
#[derive(Debug)]
pub(crate) enum RemoteMemory {
    /// They are mapped in this process.
    Mapped(MappedMemory),
    /// Through the connection, and why not otherwise.
    Streamed(&'static str),
    /// In a file or in objects; the operation knows which.
    Stored,
}

/// What keeps mapped memory of a peer in place.
#[derive(Debug)]
pub(crate) enum MappedMemory {
    /// A region of an agent in this process.
    InProcess(Arc<Region>),
    /// A mapping of the peer's memory file.
    Shared(Mapping),
}

impl MappedMemory {
    pub(crate) fn base(&self) -> *mut u8 {
        match self {
            Self::InProcess(region) => region.base(),
            Self::Shared(mapping) => mapping.base().as_ptr(),
        }
    }
}

impl RemoteRegion {
    pub(crate) const fn new(
        id: RegionId,
        len: u64,
        access: RemoteAccess,
        memory: RemoteMemory,
    ) -> Self {
        Self {
            id,
            len,
            access,
            memory,
            gone: AtomicBool::new(false),
        }
    }

    pub(crate) fn mark_released(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub(crate) fn released(&self) -> bool {
        let in_process = match &self.memory {
            RemoteMemory::Mapped(MappedMemory::InProcess(region)) => region.released(),
            RemoteMemory::Mapped(MappedMemory::Shared(_))
            | RemoteMemory::Streamed(_)
            | RemoteMemory::Stored => false,
        };
        in_process || self.gone.load(Ordering::Acquire)
    }
}
