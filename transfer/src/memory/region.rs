//! Regions and their registrations.

use std::fmt;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::arena;
use super::mapping::Mapping;
use crate::clock::after;
use crate::config::{ArenaConfig, DeviceArenaConfig, RemoteAccess};
use crate::cuda::{
    CudaError, Device, DeviceMemory, DeviceRange, DeviceSharing, Pin, PinConfig, PinProgress,
};
use crate::error::{AccessError, RegisterError};
use crate::plan::LayoutError;
use crate::rdma::{Adapter, Key};

/// Names a region of one agent in one epoch; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a region is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionKind {
    /// A memory file that peers on this host can map.
    Arena {
        /// What became of the wish for huge pages.
        huge_pages: HugePageUse,
    },
    /// Ordinary memory of this process; peers reach it through a socket.
    Host,
    /// Memory of a GPU; other devices and peers on this host map it.
    Device {
        /// The device, as this process numbers it.
        device: u32,
        /// How peers get at it; none for memory that the caller allocated, where the driver decides.
        sharing: Option<DeviceSharing>,
    },
}

/// What became of the wish for huge pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HugePageUse {
    /// None were asked for.
    NotAsked,
    /// The kernel was asked and its policy allows them.
    Advised,
    /// They come from the reserved pool.
    Reserved,
    /// Ordinary pages, and why.
    Unavailable(String),
}

/// Memory of this process to be registered.
#[derive(Debug)]
pub struct HostMemory {
    base: NonNull<u8>,
    bytes: usize,
    /// It was a boxed slice, and is freed as one.
    owned: bool,
}

impl HostMemory {
    /// Memory that somebody else owns.
    ///
    /// # Safety
    /// `base..base + bytes` must stay valid for reads and writes until [`Registration::close`] has
    /// returned `Ok` (dropping the registration does not wait for peers), and no reference into it may be live while a transfer or a
    /// peer can touch it.
    #[must_use]
    pub const unsafe fn from_raw(base: NonNull<u8>, bytes: usize) -> Self {
        Self {
            base,
            bytes,
            owned: false,
        }
    }
}

impl From<Vec<u8>> for HostMemory {
    fn from(memory: Vec<u8>) -> Self {
        memory.into_boxed_slice().into()
    }
}

impl From<Box<[u8]>> for HostMemory {
    fn from(memory: Box<[u8]>) -> Self {
        let bytes = memory.len();
        // A raw pointer from here on: no reference to these bytes exists until they are freed.
        let base = NonNull::from(Box::leak(memory)).cast::<u8>();
        // Fewer and larger pages make copies through the kernel cheaper.
        super::advise_huge_pages(base, bytes);
        Self {
            base,
            bytes,
            owned: true,
        }
    }
}

// SAFETY: an address range without thread affinity; all access is through raw pointers.
unsafe impl Send for HostMemory {}
// SAFETY: as above; the struct itself is never mutated.
unsafe impl Sync for HostMemory {}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.owned {
            let slice = std::ptr::slice_from_raw_parts_mut(self.base.as_ptr(), self.bytes);
            // SAFETY: this is the pointer and length of the boxed slice that was leaked when the
            // memory came in, and the last user of the region is gone.
            drop(unsafe { Box::from_raw(slice) });
        }
    }
}

/// Where the bytes of a region live, and who frees them.
#[derive(Debug)]
enum Backing {
    Arena {
        fd: Arc<OwnedFd>,
        #[expect(dead_code, reason = "kept to be unmapped with the region")]
        mapping: Mapping,
        huge_pages: HugePageUse,
    },
    Host(#[expect(dead_code, reason = "kept to be freed with the region")] HostMemory),
    Device {
        range: DeviceRange,
        sharing: Option<DeviceSharing>,
    },
}

/// Registered memory. Lives as long as anything names it.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) id: RegionId,
    pub(crate) label: Box<str>,
    pub(crate) access: RemoteAccess,
    pub(crate) len: usize,
    base: NonNull<u8>,
    /// Before the memory, so that it is unpinned before it goes.
    pin: OnceLock<Pin>,
    /// Likewise, and gone before anybody is told that the region is.
    rdma: OnceLock<Key>,
    backing: Backing,
    released: AtomicBool,
    gone: Arc<Gone>,
}

/// Tells when a region is gone.
#[derive(Debug, Default)]
struct Gone {
    gone: Mutex<bool>,
    changed: Condvar,
}

impl Gone {
    fn wait(&self, timeout: Duration) -> bool {
        let until = after(timeout);
        let mut gone = self.gone.lock();
        while !*gone {
            if self.changed.wait_until(&mut gone, until).timed_out() {
                return *gone;
            }
        }
        true
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        drop(self.rdma.take());
        *self.gone.gone.lock() = true;
        self.gone.changed.notify_all();
    }
}

// SAFETY: `base` points into `backing`, which may be used from any thread.
unsafe impl Send for Region {}
// SAFETY: as above; interior state is atomic.
unsafe impl Sync for Region {}

impl Region {
    pub(crate) fn host(
        id: RegionId,
        memory: HostMemory,
        access: RemoteAccess,
    ) -> Result<Self, RegisterError> {
        let (base, len) = (memory.base, memory.bytes);
        Self::new(id, "host", access, len, |_| {
            Ok((base, Backing::Host(memory)))
        })
    }

    pub(crate) fn arena(id: RegionId, config: &ArenaConfig) -> Result<Self, RegisterError> {
        let ArenaConfig {
            bytes,
            ref label,
            huge_pages,
            access,
            pin,
        } = *config;
        let near = pin.map(|pin| Device::open(pin.device)).transpose();
        let near = near.map_err(|error| RegisterError::cuda(label, error))?;
        let region = Self::new(id, label, access, bytes, |label| {
            let (fd, mapping, huge_pages) =
                arena::create(label, bytes, huge_pages).map_err(|(what, source)| {
                    RegisterError::Memory {
                        what,
                        label: label.to_owned(),
                        bytes,
                        source,
                    }
                })?;
            let fd = Arc::new(fd);
            Ok((
                mapping.base(),
                Backing::Arena {
                    fd,
                    mapping,
                    huge_pages,
                },
            ))
        })?;
        if let (Some(device), Some(config)) = (near, pin) {
            region.pin_with(device, &config);
        }
        Ok(region)
    }

    pub(crate) fn device_arena(
        id: RegionId,
        config: &DeviceArenaConfig,
    ) -> Result<Self, RegisterError> {
        let DeviceArenaConfig {
            device,
            bytes,
            ref label,
            access,
            sharing,
        } = *config;
        let device = Device::open(device).map_err(|error| RegisterError::cuda(label, error))?;
        Self::on_device(id, label, access, bytes, Some(sharing), || {
            DeviceRange::allocate(device, bytes, sharing)
        })
    }

    pub(crate) fn device_memory(
        id: RegionId,
        memory: DeviceMemory,
        access: RemoteAccess,
    ) -> Result<Self, RegisterError> {
        let label = "device";
        let device =
            Device::open(memory.device).map_err(|error| RegisterError::cuda(label, error))?;
        Self::on_device(id, label, access, memory.bytes, None, || {
            DeviceRange::foreign(device, memory.address, memory.bytes)
        })
    }

    fn on_device(
        id: RegionId,
        label: &str,
        access: RemoteAccess,
        bytes: usize,
        sharing: Option<DeviceSharing>,
        make: impl FnOnce() -> Result<DeviceRange, CudaError>,
    ) -> Result<Self, RegisterError> {
        Self::new(id, label, access, bytes, |label| {
            let range = make().map_err(|source| RegisterError::Device {
                label: label.to_owned(),
                bytes,
                source,
            })?;
            let address = usize::try_from(range.address).ok().and_then(|address| {
                // Device addresses share one space with those of the host; nobody follows this one.
                NonNull::new(std::ptr::without_provenance_mut(address))
            });
            let base = address.ok_or_else(|| RegisterError::Empty {
                label: label.to_owned(),
            })?;
            Ok((base, Backing::Device { range, sharing }))
        })
    }

    /// Checks what all regions have in common, then takes the memory.
    fn new(
        id: RegionId,
        label: &str,
        access: RemoteAccess,
        len: usize,
        make: impl FnOnce(&str) -> Result<(NonNull<u8>, Backing), RegisterError>,
    ) -> Result<Self, RegisterError> {
        if label.len() > 255 {
            return Err(RegisterError::LabelTooLong { bytes: label.len() });
        }
        if len == 0 {
            return Err(RegisterError::Empty {
                label: label.to_owned(),
            });
        }
        let (base, backing) = make(label)?;
        Ok(Self {
            id,
            label: label.into(),
            access,
            len,
            base,
            pin: OnceLock::new(),
            rdma: OnceLock::new(),
            backing,
            released: AtomicBool::new(false),
            gone: Arc::default(),
        })
    }

    /// The first byte of host memory. Device memory has none that this process could touch:
    /// whoever calls this has checked that [`Self::device`] is none.
    pub(crate) fn base(&self) -> *mut u8 {
        debug_assert!(self.device().is_none(), "device memory is not touched here");
        self.base.as_ptr()
    }

    pub(crate) fn kind(&self) -> RegionKind {
        match &self.backing {
            Backing::Arena { huge_pages, .. } => RegionKind::Arena {
                huge_pages: huge_pages.clone(),
            },
            Backing::Host(_) => RegionKind::Host,
            Backing::Device { range, sharing } => RegionKind::Device {
                device: range.device.ordinal(),
                sharing: *sharing,
            },
        }
    }

    /// The memory file, if peers can map this region.
    pub(crate) fn file(&self) -> Option<&Arc<OwnedFd>> {
        match &self.backing {
            Backing::Arena { fd, .. } => Some(fd),
            Backing::Host(_) | Backing::Device { .. } => None,
        }
    }

    /// The device memory that it is, if it is.
    pub(crate) const fn device(&self) -> Option<&DeviceRange> {
        match &self.backing {
            Backing::Device { range, .. } => Some(range),
            Backing::Arena { .. } | Backing::Host(_) => None,
        }
    }

    /// Where the memory begins: for a peer that copies through the kernel, and for devices.
    pub(crate) fn address(&self) -> u64 {
        super::address_of(self.base)
    }

    /// Host memory, pinned for `device` and all others if it is not yet.
    pub(crate) fn pin(&self, device: &'static Device) -> &Pin {
        self.pin_with(device, &PinConfig::near(device.ordinal()))
    }

    fn pin_with(&self, device: &'static Device, config: &PinConfig) -> &Pin {
        // SAFETY: the memory stays until `backing` is dropped, which is after `pin`.
        let start = || unsafe { Pin::start(device, self.base, self.len, config) };
        self.pin.get_or_init(start)
    }

    /// Registers host memory at an RDMA device: it is locked in place from now on. Device memory stays
    /// out of its reach.
    pub(crate) fn register_for_rdma(&self, adapter: &Arc<Adapter>) -> Result<(), RegisterError> {
        if self.device().is_some() {
            return Ok(());
        }
        let open = self.access != RemoteAccess::None;
        // SAFETY: the memory stays until `backing` is dropped, which is after the key.
        let key = unsafe { adapter.register(self.base.as_ptr(), self.len, open) };
        let key = key.map_err(|source| RegisterError::Rdma {
            label: self.label.to_string(),
            bytes: self.len,
            device: adapter.name.clone(),
            limit: rustix::process::getrlimit(rustix::process::Resource::Memlock).current,
            source,
        })?;
        // A region is registered once, before anybody else knows it.
        let _ = self.rdma.set(key);
        Ok(())
    }

    /// Its keys at the agent's RDMA device.
    pub(crate) fn rdma(&self) -> Option<&Key> {
        self.rdma.get()
    }

    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::Release);
    }

    pub(crate) fn released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }
}

/// Who is told when a registration ends.
pub(crate) trait RegionOwner: Send + Sync {
    fn release(&self, region: &Region);
}

/// Memory whose registration has ended but that is still in use.
#[derive(Debug, thiserror::Error)]
#[error("the memory of region {region} is still in use")]
pub struct RegionBusy {
    /// The region.
    pub region: RegionId,
    gone: Arc<Gone>,
}

impl RegionBusy {
    /// Waits again.
    ///
    /// # Errors
    /// It is still in use after `timeout`.
    pub fn wait(self, timeout: Duration) -> Result<(), Self> {
        if self.gone.wait(timeout) {
            Ok(())
        } else {
            Err(self)
        }
    }
}

/// Registered memory. Cloning shares it; peers can name it until the last clone is gone, and the
/// memory itself stays until the last transfer that names it is gone as well.
#[derive(Clone)]
pub struct Registration {
    inner: Arc<RegistrationInner>,
}

struct RegistrationInner {
    region: Arc<Region>,
    owner: Arc<dyn RegionOwner>,
}

impl Registration {
    pub(crate) fn new(region: Arc<Region>, owner: Arc<dyn RegionOwner>) -> Self {
        Self {
            inner: Arc::new(RegistrationInner { region, owner }),
        }
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.inner.region
    }

    /// Whether `owner` made this registration.
    pub(crate) fn owned_by(&self, owner: *const ()) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.inner.owner).cast::<()>(), owner)
    }

    /// How peers name this region.
    #[must_use]
    pub fn id(&self) -> RegionId {
        self.region().id
    }

    /// Ends the registration and waits until nothing uses the memory any more: no transfer or prepared
    /// operation of this agent, no peer that copies into or out of it through the kernel, and none that
    /// has device memory open by handle. After `Ok`, memory that
    /// was registered with [`HostMemory::from_raw`] may be freed.
    ///
    /// # Errors
    /// Something still uses it: another clone of the registration, a prepared operation, a transfer, or a peer that
    /// neither answers nor is dead. The memory must stay; wait again with [`RegionBusy::wait`].
    pub fn close(self, timeout: Duration) -> Result<(), RegionBusy> {
        let busy = RegionBusy {
            region: self.id(),
            gone: self.region().gone.clone(),
        };
        drop(self);
        busy.wait(timeout)
    }

    /// Length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.region().len
    }

    /// How far pinning of host memory has come; none if nobody has asked for it yet, and for device
    /// memory.
    #[must_use]
    pub fn pinned(&self) -> Option<PinProgress> {
        self.region().pin.get().map(Pin::progress)
    }

    /// The device and the address there, for device memory.
    #[must_use]
    pub fn device(&self) -> Option<(u32, u64)> {
        let range = self.region().device()?;
        Some((range.device.ordinal(), range.address))
    }

    /// First byte of host memory. For device memory, its address on the device, which must not be
    /// followed on the host. Peers and transfers may write behind it at any time: use raw pointers, and form
    /// references only to parts that nothing else can touch (blocks outside of every open window).
    #[must_use]
    pub fn base_ptr(&self) -> NonNull<u8> {
        self.region().base
    }

    /// Name in logs.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.region().label
    }

    /// What the region is made of.
    #[must_use]
    pub fn kind(&self) -> RegionKind {
        self.region().kind()
    }

    /// What peers may do.
    #[must_use]
    pub fn access(&self) -> RemoteAccess {
        self.region().access
    }

    /// Copies bytes out of the region, whatever memory it is. Bytes that a transfer or a peer writes
    /// at the same moment come out unspecified.
    ///
    /// # Errors
    /// The range is not in the region, or the device fails.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), AccessError> {
        let at = self.checked(offset, into.len())?;
        if let Some(range) = self.region().device() {
            // SAFETY: in bounds; `into` is a Rust slice of its own.
            unsafe { range.fetch(offset, into.as_mut_ptr(), into.len()) }?;
            return Ok(());
        }
        // SAFETY: in bounds, so the result stays inside (or one past) the region.
        let from = unsafe { self.region().base().add(at) };
        // SAFETY: in bounds of a region that `self` keeps mapped; `into` is a Rust slice of its own.
        unsafe { super::copy_bytes(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes into the region, whatever memory it is. Bytes that a transfer or a peer touches
    /// at the same moment are unspecified there.
    ///
    /// # Errors
    /// The range is not in the region, or the device fails.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), AccessError> {
        let at = self.checked(offset, from.len())?;
        if let Some(range) = self.region().device() {
            // SAFETY: in bounds; `from` is a Rust slice.
            unsafe { range.fill(offset, from.as_ptr(), from.len()) }?;
            return Ok(());
        }
        // SAFETY: in bounds, so the result stays inside (or one past) the region.
        let to = unsafe { self.region().base().add(at) };
        // SAFETY: in bounds of a region that `self` keeps mapped; `from` is a Rust slice of its own.
        unsafe { super::copy_bytes(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// First byte of a range of host memory; none in device memory.
    pub(super) fn host_range(
        &self,
        offset: u64,
        bytes: usize,
    ) -> Result<Option<*const u8>, LayoutError> {
        let at = self.checked(offset, bytes)?;
        if self.region().device().is_some() {
            return Ok(None);
        }
        // SAFETY: in bounds, so the result stays inside (or one past) the region.
        let first = unsafe { self.region().base().add(at) };
        Ok(Some(first))
    }

    fn checked(&self, offset: u64, bytes: usize) -> Result<usize, LayoutError> {
        let region_bytes = self.len() as u64;
        let end = offset.saturating_add(bytes as u64);
        if end > region_bytes {
            return Err(LayoutError::OutOfRegion { end, region_bytes });
        }
        Ok(usize::try_from(offset).unwrap_or(usize::MAX))
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("id", &self.id())
            .field("label", &self.label())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl Drop for RegistrationInner {
    fn drop(&mut self) {
        self.region.release();
        self.owner.release(&self.region);
    }
}
