//! Memory of this process that was registered: host memory, device memory, files.

use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, DeviceMemory, FileAccess, FileConfig, FileCreation, FileStore, HostMemory, RegionId,
    Registration, RemoteAccess,
};

use super::error::Fault;
use super::input::Row;
use super::kinds::Memory;

/// What a registered range is.
#[derive(Debug)]
pub(super) enum Held {
    Region(Registration),
    File(FileStore),
}

impl Held {
    /// Registers one descriptor.
    pub(super) fn register(
        agent: &Agent,
        memory: Memory,
        row: Row,
        info: &[u8],
    ) -> Result<Self, Fault> {
        let [address, bytes, device] = row;
        match memory {
            Memory::Dram => {
                let base = mapped(address, bytes)?;
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                // SAFETY: the caller registers memory that it keeps until it deregisters it, as this
                // interface demands; the first and the last byte of it are mapped.
                let memory = unsafe { HostMemory::from_raw(base, bytes) };
                Ok(Self::Region(agent.register(memory, RemoteAccess::Open)?))
            }
            Memory::Vram => {
                let device = ordinal(device)?;
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                // SAFETY: as above; the driver is asked whether it is memory of that device.
                let memory = unsafe { DeviceMemory::from_raw(device, address, bytes) };
                Ok(Self::Region(
                    agent.register_device(memory, RemoteAccess::Open)?,
                ))
            }
            Memory::File => {
                let config = file(device, info)?;
                let store = agent.open_file(config);
                Ok(Self::File(
                    store.map_err(|error| Fault::Backend(error.to_string()))?,
                ))
            }
            Memory::Block | Memory::Object => Err(unsupported(memory)),
        }
    }

    pub(super) fn region(&self) -> Option<&Registration> {
        match self {
            Self::Region(registration) => Some(registration),
            Self::File(_) => None,
        }
    }

    pub(super) fn id(&self) -> Option<RegionId> {
        self.region().map(Registration::id)
    }

    /// Ends the registration, and waits until nobody uses the memory.
    pub(super) fn close(self, until: Instant) -> Result<(), Fault> {
        let Self::Region(registration) = self else {
            return Ok(());
        };
        let left = until.saturating_duration_since(Instant::now());
        registration.close(left).map_err(|busy| {
            Fault::Backend(format!(
                "{busy}: a transfer or a peer has not let go of it in time; keep it until they have"
            ))
        })
    }
}

/// How long ending a registration waits for those who still use the memory.
pub(super) const CLOSE_MAX: Duration = Duration::from_secs(5);

pub(super) fn unsupported(memory: Memory) -> Fault {
    Fault::NotSupported(format!(
        "memory of kind {}; accepted: DRAM, VRAM, FILE",
        memory.label()
    ))
}

pub(super) fn ordinal(device: u64) -> Result<u32, Fault> {
    u32::try_from(device).map_err(|_| {
        Fault::Invalid(format!(
            "device {device}; accepted: numbers of CUDA devices"
        ))
    })
}

/// The first byte of a range whose first and last byte are readable: an address that is not mapped is
/// refused here and not found by a copy.
fn mapped(address: u64, bytes: u64) -> Result<NonNull<u8>, Fault> {
    let range = usize::try_from(address)
        .ok()
        .zip(usize::try_from(bytes).ok())
        .filter(|(address, bytes)| *bytes > 0 && address.checked_add(*bytes).is_some())
        .and_then(|(address, bytes)| {
            let base = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(address))?;
            Some((base, address, bytes))
        });
    let Some((base, first, bytes)) = range else {
        return Err(Fault::Invalid(format!(
            "{bytes} bytes at {address:#x}; accepted: at least one byte, below the end of all addresses"
        )));
    };
    let mut byte = 0u8;
    for at in [first, first + (bytes - 1)] {
        let here = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let there = libc::iovec {
            iov_base: std::ptr::without_provenance_mut(at),
            iov_len: 1,
        };
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        // SAFETY: writes one byte of this stack frame; the kernel checks the other address.
        let copied =
            unsafe { libc::process_vm_readv(own, &raw const here, 1, &raw const there, 1, 0) };
        let error = std::io::Error::last_os_error();
        if copied < 0 && error.raw_os_error() == Some(libc::EFAULT) {
            return Err(Fault::Backend(format!(
                "{bytes} bytes at {first:#x}: no memory of this process is mapped at {at:#x}"
            )));
        }
    }
    Ok(base)
}

/// A file by its descriptor (the device of the descriptor), or by the path in what the owner says,
/// with or without "MODES:" in front of it.
fn file(device: u64, info: &[u8]) -> Result<FileConfig, Fault> {
    if let Some((modes, path)) = path_of(info) {
        let mut config = FileConfig::new(path);
        if !modes.is_empty() && !modes.contains('w') {
            config.access = FileAccess::ReadOnly;
        }
        if modes.contains('c') {
            config.creation = FileCreation::IfMissing;
        }
        return Ok(config);
    }
    let bad = || Fault::Invalid(format!("file descriptor {device}; accepted: an open one"));
    let number = RawFd::try_from(device).map_err(|_| bad())?;
    if number < 0 {
        return Err(bad());
    }
    // SAFETY: not -1, and only used to duplicate it, which fails if it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(FileConfig::descriptor(
        borrowed.try_clone_to_owned().map_err(|_| bad())?,
    ))
}

/// Modes and path; none when it is no path.
pub(super) fn path_of(info: &[u8]) -> Option<(&str, PathBuf)> {
    let text = str::from_utf8(info).ok()?;
    if let Some((modes, path)) = text.split_once(':')
        && modes.len() <= 8
        && modes.bytes().all(|byte| byte.is_ascii_lowercase())
        && !path.is_empty()
    {
        return Some((modes, path.into()));
    }
    text.starts_with('/').then(|| ("", text.into()))
}
