//! Device memory: allocated here, named by the caller, or mapped from a peer's process.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use cudarc::driver::sys::{self, CUmemAllocationHandleType as HandleType};
use parking_lot::Mutex;

use super::device::Device;
use super::driver::{CudaDevice, check};
use super::error::{CudaError, CudaUnavailable};

/// How processes on this host get at an arena of device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceSharing {
    /// By a file descriptor (memory made by `cuMemCreate`): it travels over the Unix socket of the
    /// connection, and the memory stays until the last process that mapped it lets go of it.
    #[default]
    FileDescriptor,
    /// By a handle (memory made by `cuMemAlloc`, as frameworks do): the owner keeps the memory until
    /// every peer has said that it is done with it.
    Handle,
}

/// Memory of a device to be registered.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMemory {
    pub(crate) device: u32,
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

impl DeviceMemory {
    /// Memory that somebody else allocated on a device of this process, such as a tensor.
    ///
    /// # Safety
    /// `address..address + bytes` must stay allocated on that device until
    /// [`Registration::close`](crate::Registration::close) has returned `Ok`.
    #[must_use]
    pub const unsafe fn from_raw(device: u32, address: u64, bytes: usize) -> Self {
        Self {
            device,
            address,
            bytes,
        }
    }
}

/// Bytes on a device that a region is made of.
pub(crate) struct DeviceRange {
    pub(crate) device: &'static Device,
    pub(crate) address: u64,
    origin: Origin,
}

enum Origin {
    /// Mapped here; shared by a file descriptor.
    Mapped(Mapped),
    /// An ordinary allocation of ours.
    Allocated,
    /// The caller's.
    Foreign,
}

impl fmt::Debug for DeviceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:#x}", self.device, self.address)
    }
}

/// What another process needs to map a range.
pub(crate) enum Share {
    /// A file descriptor that stands for the memory.
    File(OwnedFd),
    /// A handle of the driver for the allocation, and where in it the range begins.
    Handle(ShareHandle),
}

/// A handle of the driver for an allocation, and where in it a range begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShareHandle {
    pub(crate) handle: [u8; 64],
    pub(crate) offset: u64,
}

impl DeviceRange {
    pub(crate) fn allocate(
        device: &'static Device,
        bytes: usize,
        sharing: DeviceSharing,
    ) -> Result<Self, CudaError> {
        let range = match sharing {
            DeviceSharing::FileDescriptor => {
                let mapped = Mapped::create(device, bytes)?;
                Self {
                    device,
                    address: mapped.address,
                    origin: Origin::Mapped(mapped),
                }
            }
            DeviceSharing::Handle => Self {
                device,
                address: device.allocate(bytes)?,
                origin: Origin::Allocated,
            },
        };
        // Bytes of whoever had the memory before are nobody's business.
        range.device.clear(range.address, bytes)?;
        Ok(range)
    }

    /// Memory of the caller's. The driver is asked whether it is what the caller says.
    pub(crate) fn foreign(
        device: &'static Device,
        address: u64,
        bytes: usize,
    ) -> Result<Self, CudaError> {
        let (base, size) = allocation(device, address)?;
        let inside = address
            .checked_add(bytes as u64)
            .is_some_and(|end| end <= base + size);
        let mut ordinal = 0i32;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        // SAFETY: writes one integer; the address is only looked up.
        check("look up the address", unsafe {
            sys::cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address)
        })?;
        let described = |description: String| CudaError {
            what: "register the memory",
            code: 1,
            name: "CUDA_ERROR_INVALID_VALUE".to_owned(),
            description,
        };
        if !inside {
            let left = base + size - address;
            return Err(described(format!(
                "{bytes} bytes at {address:#x} reach behind the end of their allocation, which has {left} from there"
            )));
        }
        if u32::try_from(ordinal) != Ok(device.ordinal()) {
            return Err(described(format!(
                "{address:#x} is memory of cuda:{ordinal}, not of {device:?}"
            )));
        }
        Ok(Self {
            device,
            address,
            origin: Origin::Foreign,
        })
    }

    /// The address for kernels and copies that `executor` runs.
    pub(crate) fn address_on(&self, executor: &'static Device) -> Result<u64, CudaError> {
        match &self.origin {
            // Every device that can reach it was given access when it was made.
            Origin::Mapped(_) => {}
            Origin::Allocated | Origin::Foreign => executor.reach(self.device)?,
        }
        Ok(self.address)
    }

    /// What another process needs to map it.
    pub(crate) fn share(&self) -> Result<Share, CudaError> {
        match &self.origin {
            Origin::Mapped(mapped) => mapped.export().map(Share::File),
            Origin::Allocated | Origin::Foreign => {
                let (base, _) = allocation(self.device, self.address)?;
                let _entered = self.device.enter()?;
                let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
                // SAFETY: writes one handle; the address is the start of an allocation.
                check("make a handle for other processes", unsafe {
                    sys::cuIpcGetMemHandle(&raw mut handle, base)
                })?;
                Ok(Share::Handle(ShareHandle {
                    handle: handle.reserved.map(i8::cast_unsigned),
                    offset: self.address - base,
                }))
            }
        }
    }

    /// Copies from the host, and waits.
    ///
    /// # Safety
    /// `from` is valid for `bytes`, and `offset + bytes` lies in the range.
    pub(crate) unsafe fn fill(
        &self,
        offset: u64,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe { self.device.copy(self.address + offset, from as u64, bytes) }
    }

    /// Copies to the host, and waits.
    ///
    /// # Safety
    /// `to` is valid for `bytes` and nobody else uses it, and `offset + bytes` lies in the range.
    pub(crate) unsafe fn fetch(
        &self,
        offset: u64,
        to: *mut u8,
        bytes: usize,
    ) -> Result<(), CudaError> {
        // SAFETY: by the contract of this function.
        unsafe { self.device.copy(to as u64, self.address + offset, bytes) }
    }
}

impl Drop for DeviceRange {
    fn drop(&mut self) {
        if let Origin::Allocated = self.origin {
            self.device.free(self.address);
        }
    }
}

/// Start and length of the allocation that an address lies in.
fn allocation(device: &Device, address: u64) -> Result<(u64, u64), CudaError> {
    let _entered = device.enter()?;
    let (mut base, mut size) = (0, 0usize);
    // SAFETY: writes two integers; the address is only looked up.
    check("look up the allocation", unsafe {
        sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut size, address)
    })?;
    Ok((base, size as u64))
}

/// Physical memory of a device, mapped into this process for every device that can reach it.
struct Mapped {
    handle: u64,
    address: u64,
    bytes: usize,
}

impl Mapped {
    fn create(device: &'static Device, bytes: usize) -> Result<Self, CudaError> {
        let properties = shareable(device.ordinal());
        let _entered = device.enter()?;
        let bytes = whole_units(&properties, bytes)?;
        let mut handle = 0;
        // SAFETY: writes one handle.
        check("allocate device memory", unsafe {
            sys::cuMemCreate(&raw mut handle, bytes, &raw const properties, 0)
        })?;
        Self::map(device.info, handle, bytes)
    }

    /// Maps what a peer's file descriptor stands for.
    fn import(
        device: &'static Device,
        owner: &'static CudaDevice,
        file: &OwnedFd,
        bytes: u64,
    ) -> Result<Self, CudaError> {
        let _entered = device.enter()?;
        let mut handle = 0;
        // The driver takes the number itself in place of an address.
        let number = usize::try_from(file.as_raw_fd()).unwrap_or(usize::MAX);
        let descriptor: *mut c_void = std::ptr::without_provenance_mut(number);
        let kind = HandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        // SAFETY: the driver takes the descriptor by value and duplicates what it needs.
        check("import the peer's device memory", unsafe {
            sys::cuMemImportFromShareableHandle(&raw mut handle, descriptor, kind)
        })?;
        // What the peer allocated: its region is as long as it asked for.
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let bytes = whole_units(&shareable(owner.ordinal), bytes)?;
        Self::map(owner, handle, bytes)
    }

    /// Takes a handle over and maps it for the devices that can reach `owner`.
    fn map(owner: &'static CudaDevice, handle: u64, bytes: usize) -> Result<Self, CudaError> {
        // Undoes what was done when a later step fails.
        let mut mapped = Self {
            handle,
            address: 0,
            bytes: 0,
        };
        let mut address = 0;
        // SAFETY: writes one address.
        check("reserve addresses", unsafe {
            sys::cuMemAddressReserve(&raw mut address, bytes, 0, 0, 0)
        })?;
        // SAFETY: addresses that were just reserved, a handle of at least that size.
        let done = check("map device memory", unsafe {
            sys::cuMemMap(address, bytes, 0, handle, 0)
        });
        if let Err(error) = done {
            // SAFETY: reserved above, and nothing is mapped there.
            let _ = check("give addresses back", unsafe {
                sys::cuMemAddressFree(address, bytes)
            });
            return Err(error);
        }
        mapped.address = address;
        mapped.bytes = bytes;
        let reachable = std::iter::once(&owner.ordinal).chain(&owner.peers);
        let access: Vec<_> = reachable
            .map(|&ordinal| sys::CUmemAccessDesc {
                location: on_device(ordinal),
                flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
            })
            .collect();
        // SAFETY: the range that was just mapped, and a list of that length.
        check("give devices access", unsafe {
            sys::cuMemSetAccess(address, bytes, access.as_ptr(), access.len())
        })?;
        Ok(mapped)
    }

    fn export(&self) -> Result<OwnedFd, CudaError> {
        let mut descriptor = -1i32;
        let kind = HandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        // SAFETY: writes one descriptor.
        check("make a file descriptor for device memory", unsafe {
            sys::cuMemExportToShareableHandle((&raw mut descriptor).cast(), self.handle, kind, 0)
        })?;
        // SAFETY: a fresh descriptor that nobody else has.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}

/// Memory of a device that a file descriptor can stand for.
fn shareable(ordinal: u32) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: HandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        location: on_device(ordinal),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// A length in the unit that such memory comes in.
fn whole_units(properties: &sys::CUmemAllocationProp, bytes: usize) -> Result<usize, CudaError> {
    let flag = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    let mut unit = 0usize;
    // SAFETY: writes one integer.
    check("ask for the unit of device memory", unsafe {
        sys::cuMemGetAllocationGranularity(&raw mut unit, std::ptr::from_ref(properties), flag)
    })?;
    Ok(bytes.checked_next_multiple_of(unit.max(1)).unwrap_or(bytes))
}

fn on_device(ordinal: u32) -> sys::CUmemLocation {
    sys::CUmemLocation {
        type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        id: i32::try_from(ordinal).unwrap_or(i32::MAX),
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: mapped by `map`; whoever used it held this object.
            let unmapped = check("unmap device memory", unsafe {
                sys::cuMemUnmap(self.address, self.bytes)
            });
            // SAFETY: reserved by `map`, and nothing is mapped there any more.
            let freed = check("give addresses back", unsafe {
                sys::cuMemAddressFree(self.address, self.bytes)
            });
            if let Err(error) = unmapped.and(freed) {
                tracing::warn!(%error, bytes = self.bytes, "device memory stays mapped");
            }
        }
        // SAFETY: created or imported once, released once.
        let released = check("release device memory", unsafe {
            sys::cuMemRelease(self.handle)
        });
        if let Err(error) = released {
            tracing::warn!(%error, "device memory is not released");
        }
    }
}

/// Device memory of a peer's process.
pub(crate) enum Imported {
    /// Mapped for every device that can reach it.
    Mapped(MappedPeer),
    /// Opened for each device that runs copies.
    Handle(OpenedHandles),
}

/// The peer's memory, mapped here.
pub(crate) struct MappedPeer(Mapped);

/// The peer's allocation as each of our devices sees it.
pub(crate) struct OpenedHandles {
    share: ShareHandle,
    open: Mutex<HashMap<u32, (&'static Device, u64)>>,
}

impl fmt::Debug for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mapped(_) => "mapped device memory",
            Self::Handle(_) => "device memory by handle",
        })
    }
}

impl Imported {
    /// Maps memory that lies on `owner`.
    pub(crate) fn mapped(
        owner: &'static CudaDevice,
        file: &OwnedFd,
        bytes: u64,
    ) -> Result<Self, CudaUnavailable> {
        let device = Device::open_or_any(owner.ordinal)?;
        Mapped::import(device, owner, file, bytes)
            .map(|mapped| Self::Mapped(MappedPeer(mapped)))
            .map_err(CudaUnavailable::Refused)
    }

    /// An allocation that is opened for each device that is to run copies.
    pub(crate) fn handle(share: ShareHandle) -> Self {
        Self::Handle(OpenedHandles {
            share,
            open: Mutex::default(),
        })
    }

    /// The address for kernels and copies that `executor` runs.
    pub(crate) fn address_on(&self, executor: &'static Device) -> Result<u64, CudaError> {
        match self {
            Self::Mapped(MappedPeer(mapped)) => Ok(mapped.address),
            Self::Handle(handles) => handles.address_on(executor),
        }
    }
}

impl OpenedHandles {
    fn address_on(&self, executor: &'static Device) -> Result<u64, CudaError> {
        let mut open = self.open.lock();
        if let Some(&(_, base)) = open.get(&executor.ordinal()) {
            return Ok(base + self.share.offset);
        }
        let _entered = executor.enter()?;
        let handle = sys::CUipcMemHandle {
            reserved: self.share.handle.map(u8::cast_signed),
        };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut base = 0;
        // SAFETY: writes one address; a handle that is not one is an error.
        check("open the peer's device memory", unsafe {
            sys::cuIpcOpenMemHandle_v2(&raw mut base, handle, flags)
        })?;
        open.insert(executor.ordinal(), (executor, base));
        Ok(base + self.share.offset)
    }
}

impl Drop for OpenedHandles {
    fn drop(&mut self) {
        for (executor, base) in self.open.get_mut().values() {
            let closed = executor.enter().and_then(|_entered| {
                // SAFETY: opened once in this context; no copy that uses it is under way.
                check("close the peer's device memory", unsafe {
                    sys::cuIpcCloseMemHandle(*base)
                })
            });
            if let Err(error) = closed {
                tracing::warn!(%error, "the peer's device memory stays open");
            }
        }
    }
}
