//! A peer's memory as this agent sees it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::config::RemoteAccess;
use crate::cuda::{CudaDevice, CudaError, Device, Imported, Pin, PinConfig};
use crate::memory::{Mapping, PeerProcess, Region, RegionId};
use crate::window::Usage;

/// A region of a peer.
#[derive(Debug)]
pub(crate) struct RemoteRegion {
    pub(crate) id: RegionId,
    pub(crate) len: u64,
    pub(crate) access: RemoteAccess,
    /// A mapping of the peer's memory, pinned for our devices. Before the mapping, to go first.
    pin: OnceLock<Pin>,
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
    /// It is device memory, mapped for the devices of this process.
    Device(DeviceOfPeer),
    /// An RDMA device of this host reaches into it.
    Rdma(RdmaMemory),
    /// Through the connection, and why not otherwise.
    Streamed(Arc<str>),
    /// In a file or in objects; the operation knows which.
    Stored,
    /// Not at all, and why.
    Unreachable(Arc<str>),
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

/// Memory that the peer has registered for RDMA.
#[derive(Debug)]
pub(crate) struct RdmaMemory {
    /// Address of its first byte in the peer's process.
    pub(crate) address: u64,
    /// Names it to the peer's device.
    pub(crate) key: u32,
    /// Transfers that reach into it: the peer frees the memory when none is left.
    pub(crate) usage: Usage,
}

/// Device memory of a peer.
#[derive(Debug)]
pub(crate) struct DeviceOfPeer {
    /// The device that it lies on.
    pub(crate) owner: &'static CudaDevice,
    /// Whether that device may run copies for us.
    pub(crate) pull: bool,
    pub(crate) memory: PeerDeviceMemory,
    /// Transfers that copy there, where the peer frees the memory when none is left.
    pub(crate) usage: Option<Usage>,
}

/// What keeps device memory of a peer in place.
#[derive(Debug)]
pub(crate) enum PeerDeviceMemory {
    /// A region of an agent in this process.
    InProcess(Arc<Region>),
    /// Memory of another process.
    Imported(Imported),
}

impl DeviceOfPeer {
    /// The address for kernels and copies that `executor` runs.
    pub(crate) fn address_on(&self, executor: &'static Device) -> Result<u64, CudaError> {
        match &self.memory {
            PeerDeviceMemory::InProcess(region) => match region.device() {
                Some(range) => range.address_on(executor),
                // Made from a region of device memory only.
                None => Ok(region.address()),
            },
            PeerDeviceMemory::Imported(imported) => imported.address_on(executor),
        }
    }
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
            pin: OnceLock::new(),
            memory,
            gone: AtomicBool::new(false),
        }
    }

    /// The mapping, which is this region's own, pinned for `device` and all others.
    pub(crate) fn pin(&self, device: &'static Device, mapping: &Mapping) -> &Pin {
        let config = PinConfig::near(device.ordinal());
        // SAFETY: the mapping stays until `memory` is dropped, which is after `pin`.
        let start = || unsafe { Pin::start(device, mapping.base(), mapping.bytes(), &config) };
        self.pin.get_or_init(start)
    }

    /// The books of who uses memory that the peer frees when nobody does.
    const fn usage(&self) -> Option<&Usage> {
        match &self.memory {
            RemoteMemory::Foreign(foreign) => Some(&foreign.usage),
            RemoteMemory::Rdma(memory) => Some(&memory.usage),
            RemoteMemory::Device(device) => device.usage.as_ref(),
            RemoteMemory::Mapped(_)
            | RemoteMemory::Streamed(_)
            | RemoteMemory::Stored
            | RemoteMemory::Unreachable(_) => None,
        }
    }

    pub(crate) fn mark_released(&self) {
        self.gone.store(true, Ordering::Release);
        if let Some(usage) = self.usage() {
            usage.revoke();
        }
    }

    /// A transfer is going to use the memory; false when the peer has released it.
    pub(crate) fn begin_use(&self) -> bool {
        match self.usage() {
            Some(usage) => usage.begin(),
            None => !self.released(),
        }
    }

    /// None of the bytes of that transfer moves any more.
    pub(crate) fn end_use(&self) {
        if let Some(usage) = self.usage() {
            usage.end();
        }
    }

    pub(crate) fn released(&self) -> bool {
        let in_process = match &self.memory {
            RemoteMemory::Mapped(MappedMemory::InProcess(region))
            | RemoteMemory::Device(DeviceOfPeer {
                memory: PeerDeviceMemory::InProcess(region),
                ..
            }) => region.released(),
            RemoteMemory::Mapped(MappedMemory::Shared(_))
            | RemoteMemory::Device(_)
            | RemoteMemory::Foreign(_)
            | RemoteMemory::Rdma(_)
            | RemoteMemory::Streamed(_)
            | RemoteMemory::Stored
            | RemoteMemory::Unreachable(_) => false,
        };
        in_process || self.gone.load(Ordering::Acquire)
    }
}
