//! A peer's memory as this agent sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::RemoteAccess;
use crate::memory::{Mapping, PeerProcess, Region, RegionId};
use crate::window::Usage;

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
    /// The kernel copies into or out of the peer's process.
    Foreign(ForeignMemory),
    /// Through the connection, and why not otherwise.
    Streamed(Arc<str>),
    /// In a file or in objects; the operation knows which.
    Stored,
}

/// Memory of the peer's process that is not mapped here.
#[derive(Debug)]
pub(crate) struct ForeignMemory {
    pub(crate) process: Arc<PeerProcess>,
    /// Address of its first byte in that process.
    pub(crate) base: u64,
    /// Transfers that copy there: the peer frees the memory when none is left.
    pub(crate) usage: Usage,
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
        if let RemoteMemory::Foreign(foreign) = &self.memory {
            foreign.usage.revoke();
        }
    }

    /// A transfer is going to use the memory; false when the peer has released it.
    pub(crate) fn begin_use(&self) -> bool {
        match &self.memory {
            RemoteMemory::Foreign(foreign) => foreign.usage.begin(),
            RemoteMemory::Mapped(_) | RemoteMemory::Streamed(_) | RemoteMemory::Stored => {
                !self.released()
            }
        }
    }

    /// None of the bytes of that transfer moves any more.
    pub(crate) fn end_use(&self) {
        if let RemoteMemory::Foreign(foreign) = &self.memory {
            foreign.usage.end();
        }
    }

    pub(crate) fn released(&self) -> bool {
        let in_process = match &self.memory {
            RemoteMemory::Mapped(MappedMemory::InProcess(region)) => region.released(),
            RemoteMemory::Mapped(MappedMemory::Shared(_))
            | RemoteMemory::Foreign(_)
            | RemoteMemory::Streamed(_)
            | RemoteMemory::Stored => false,
        };
        in_process || self.gone.load(Ordering::Acquire)
    }
}
