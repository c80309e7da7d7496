//! Kinds of memory that blocks lie in.

use std::fmt;

use anyhow::Context;
use blockplane_transfer::{
    Agent, ArenaConfig, DeviceArenaConfig, DeviceMemory, DeviceSharing, PinConfig, Registration,
    RemoteAccess,
};
use serde::{Deserialize, Serialize};

use super::raw::Allocation;

/// Where a region that the caller allocated begins in its allocation.
const FOREIGN_OFFSET: usize = 256 << 10;

/// A kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Place {
    /// An arena on a device, shared by a file descriptor.
    File(u32),
    /// An arena on a device, shared by a handle of the driver.
    Handle(u32),
    /// The middle of an allocation of the caller's.
    Foreign(u32),
    /// A host arena, pinned from the start.
    Pinned,
    /// A host arena that is pinned when it is first used.
    Plain,
}

impl Place {
    /// All that are combined with each other.
    pub(super) const ALL: [Self; 7] = [
        Self::File(0),
        Self::Handle(0),
        Self::Foreign(0),
        Self::File(1),
        Self::Handle(1),
        Self::Pinned,
        Self::Plain,
    ];

    /// The device that it lies on.
    pub(super) const fn device(self) -> Option<u32> {
        match self {
            Self::File(device) | Self::Handle(device) | Self::Foreign(device) => Some(device),
            Self::Pinned | Self::Plain => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(device) => write!(f, "cuda{device}-file"),
            Self::Handle(device) => write!(f, "cuda{device}-handle"),
            Self::Foreign(device) => write!(f, "cuda{device}-foreign"),
            Self::Pinned => f.write_str("pinned"),
            Self::Plain => f.write_str("plain"),
        }
    }
}

/// Registered memory, and the allocation behind it where that is the caller's.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) registration: Registration,
    /// After the registration, to be freed after it.
    pub(super) allocation: Option<Allocation>,
}

impl Held {
    pub(super) fn make(agent: &Agent, place: Place, bytes: usize) -> anyhow::Result<Self> {
        let arena = |device, sharing| {
            let config = DeviceArenaConfig::new(device, bytes, "selftest").shared_by(sharing);
            agent.allocate_device(config)
        };
        let made = || -> anyhow::Result<Self> {
            let registration = match place {
                Place::File(device) => arena(device, DeviceSharing::FileDescriptor)?,
                Place::Handle(device) => arena(device, DeviceSharing::Handle)?,
                Place::Foreign(device) => {
                    let allocation = Allocation::new(device, bytes + 2 * FOREIGN_OFFSET)?;
                    let address = allocation.address + FOREIGN_OFFSET as u64;
                    // SAFETY: the allocation is freed after the registration has ended (`Node::remove`).
                    let memory = unsafe { DeviceMemory::from_raw(device, address, bytes) };
                    return Ok(Self {
                        registration: agent.register_device(memory, RemoteAccess::Open)?,
                        allocation: Some(allocation),
                    });
                }
                Place::Pinned => {
                    let config = ArenaConfig::new(bytes, "selftest").pinned(PinConfig::near(0));
                    agent.allocate(config)?
                }
                Place::Plain => agent.allocate(ArenaConfig::new(bytes, "selftest"))?,
            };
            Ok(Self {
                registration,
                allocation: None,
            })
        };
        made().with_context(|| format!("cannot make {bytes} bytes of {place}"))
    }
}
