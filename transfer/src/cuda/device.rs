//! A device of this process: its context, its kernels, its streams, and small tables on it.
//!
//! A device is opened when it is first used and stays open until the process ends: its primary context is
//! shared with whatever else uses CUDA in this process, and memory of peers may be mapped in it at
//! any time. An error that poisons the context is kept, and every later use is refused with it.

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUcontext, CUstream};
use parking_lot::Mutex;

use super::driver::{CudaDevice, check, driver, handle};
use super::error::{CudaError, CudaUnavailable};
use super::loaded::{KernelTrouble, Kernels};
use super::pace::Paces;
use super::share::Occupied;
use super::slots::SlotPool;
use super::stream::Streams;
use crate::config::CudaConfig;

/// Blocks of device memory for tables come in powers of two from this size on.
const TABLE_BYTES_MIN: usize = 4 << 10;

/// Devices that were opened.
static OPEN: Mutex<Vec<&'static Device>> = Mutex::new(Vec::new());

pub(crate) struct Device {
    pub(crate) info: &'static CudaDevice,
    context: CUcontext,
    pub(super) streams: Streams,
    /// How long launches take.
    pub(super) paces: Paces,
    /// Multiprocessors that transfers occupy.
    pub(super) occupied: Occupied,
    /// Where the ends of launches show, and the counters for that on this device.
    pub(super) slots: OnceLock<(&'static SlotPool, u64)>,
    /// For small copies that are waited for.
    side: Mutex<RawStream>,
    kernels: OnceLock<Result<Kernels, KernelTrouble>>,
    lost: OnceLock<CudaError>,
    /// Devices whose ordinary allocations this one may touch.
    reached: Mutex<HashSet<u32>>,
    tables: Mutex<HashMap<usize, Vec<u64>>>,
}

/// A stream of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawStream(pub(super) CUstream);

// SAFETY: the driver takes its handles from any thread.
unsafe impl Send for RawStream {}
// SAFETY: as above.
unsafe impl Sync for RawStream {}

// SAFETY: the driver takes its handles from any thread; everything else is behind locks.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{}", self.info.ordinal)
    }
}

/// The context of a device is current on this thread until this is dropped; then the one before is.
///
/// On a thread that had none it stays current, as it would after a call of the CUDA runtime: the next
/// entry costs nothing.
pub(super) struct Entered<'a> {
    pushed: bool,
    device: PhantomData<&'a Device>,
    thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if !self.pushed {
            return;
        }
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what `Device::enter` pushed on this thread.
        let popped = check("leave the context", unsafe {
            sys::cuCtxPopCurrent_v2(&raw mut popped)
        });
        if let Err(error) = popped {
            tracing::warn!(%error, "the thread keeps a context of ours");
        }
    }
}

impl Device {
    /// The device with that number, opened if it is not.
    pub(crate) fn open(ordinal: u32) -> Result<&'static Self, CudaUnavailable> {
        let report = driver()?;
        let mut open = OPEN.lock();
        let known = open.iter().find(|device| device.info.ordinal == ordinal);
        if let Some(device) = known {
            return match device.lost.get() {
                Some(error) => Err(CudaUnavailable::Lost {
                    device: ordinal,
                    error: error.clone(),
                }),
                None => Ok(device),
            };
        }
        let found = report.devices.iter().find(|info| info.ordinal == ordinal);
        let info = found.ok_or_else(|| CudaUnavailable::UnknownDevice {
            device: ordinal,
            devices: u32::try_from(report.devices.len()).unwrap_or(u32::MAX),
        })?;
        let device: &'static Self = Box::leak(Box::new(
            Self::start(info).map_err(CudaUnavailable::Refused)?,
        ));
        open.push(device);
        Ok(device)
    }

    /// Any device that is open and works, or else the one with that number: for calls that need some
    /// context and do not care which.
    pub(super) fn open_or_any(ordinal: u32) -> Result<&'static Self, CudaUnavailable> {
        let open = OPEN.lock();
        let works = open.iter().find(|device| device.lost.get().is_none());
        if let Some(device) = works {
            return Ok(device);
        }
        drop(open);
        Self::open(ordinal)
    }

    fn start(info: &'static CudaDevice) -> Result<Self, CudaError> {
        let handle = handle(i32::try_from(info.ordinal).unwrap_or(i32::MAX))?;
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle; the context stays retained until the process ends.
        check("open the device", unsafe {
            sys::cuDevicePrimaryCtxRetain(&raw mut context, handle)
        })?;
        let device = Self {
            info,
            context,
            streams: Streams::default(),
            paces: Paces::default(),
            occupied: Occupied::default(),
            slots: OnceLock::new(),
            side: Mutex::new(RawStream(std::ptr::null_mut())),
            kernels: OnceLock::new(),
            lost: OnceLock::new(),
            reached: Mutex::default(),
            tables: Mutex::default(),
        };
        let side = device.new_stream()?;
        *device.side.lock() = side;
        tracing::info!(
            device = info.ordinal,
            name = %info.name,
            capability = ?info.capability,
            "CUDA device opened"
        );
        Ok(device)
    }

    pub(crate) const fn ordinal(&self) -> u32 {
        self.info.ordinal
    }

    /// Makes the context current on this thread.
    pub(super) fn enter(&self) -> Result<Entered<'_>, CudaError> {
        if let Some(error) = self.lost.get() {
            return Err(error.clone());
        }
        let mut current = std::ptr::null_mut();
        // SAFETY: writes one handle.
        check("ask for the current context", unsafe {
            sys::cuCtxGetCurrent(&raw mut current)
        })?;
        let pushed = !current.is_null() && current != self.context;
        if pushed {
            // SAFETY: a context that is retained until the process ends.
            check("enter the context", unsafe {
                sys::cuCtxPushCurrent_v2(self.context)
            })?;
        } else if current.is_null() {
            // SAFETY: as above.
            check("enter the context", unsafe {
                sys::cuCtxSetCurrent(self.context)
            })?;
        }
        Ok(Entered {
            pushed,
            device: PhantomData,
            thread: PhantomData,
        })
    }

    /// Keeps an error that poisons the context.
    pub(super) fn note(&self, error: &CudaError) {
        if error.poisons() && self.lost.set(error.clone()).is_ok() {
            tracing::error!(device = self.ordinal(), %error, "the device is lost for this process");
        }
    }

    /// The error that poisoned the context.
    pub(super) fn lost(&self) -> Option<&CudaError> {
        self.lost.get()
    }

    /// The kernels, compiled and loaded when they are first asked for.
    pub(super) fn kernels(&self, config: &CudaConfig) -> Result<&Kernels, KernelTrouble> {
        let load = || Kernels::load(self, config);
        self.kernels
            .get_or_init(load)
            .as_ref()
            .map_err(Clone::clone)
    }

    /// A stream that neither waits for the default stream nor makes it wait. Its kernels come before
    /// those of ordinary streams when both wait for multiprocessors.
    pub(super) fn new_stream(&self) -> Result<RawStream, CudaError> {
        let _entered = self.enter()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: writes two integers.
        check("ask for priorities of streams", unsafe {
            sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)
        })?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle.
        check("make a stream", unsafe {
            sys::cuStreamCreateWithPriority(&raw mut stream, flags, greatest)
        })?;
        Ok(RawStream(stream))
    }

    /// Lets kernels of this device touch ordinary allocations of another one.
    pub(super) fn reach(&self, other: &Self) -> Result<(), CudaError> {
        if std::ptr::eq(self, other) {
            return Ok(());
        }
        let mut reached = self.reached.lock();
        if reached.contains(&other.ordinal()) {
            return Ok(());
        }
        let _entered = self.enter()?;
        // SAFETY: both contexts are retained; flags must be 0.
        let enabled = check("let the devices reach each other", unsafe {
            sys::cuCtxEnablePeerAccess(other.context, 0)
        });
        match enabled {
            // Somebody else in this process has done it before.
            Err(error) if error.code == CudaError::PEER_ACCESS_ALREADY_ENABLED => {}
            other => other?,
        }
        reached.insert(other.ordinal());
        Ok(())
    }

    /// Copies between any two addresses that this device reaches, and waits for it. The default
    /// stream is not involved.
    ///
    /// # Safety
    /// Both ranges are valid for the copy, and no reference into `to` is live.
    pub(super) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        let side = self.side.lock();
        let _entered = self.enter()?;
        // SAFETY: by the contract of this function.
        let copied = check("copy", unsafe {
            sys::cuMemcpyAsync(to, from, bytes, side.0)
        });
        // SAFETY: a stream of this device.
        let ended = check("wait for a copy", unsafe {
            sys::cuStreamSynchronize(side.0)
        });
        copied.and(ended).inspect_err(|error| self.note(error))
    }

    /// Puts a table on the device.
    pub(super) fn upload(&'static self, table: &[u8]) -> Result<Table, CudaError> {
        let bytes = table.len().next_power_of_two().max(TABLE_BYTES_MIN);
        let kept = self.tables.lock().get_mut(&bytes).and_then(Vec::pop);
        let address = match kept {
            Some(address) => address,
            None => self.allocate(bytes)?,
        };
        let kept = Table {
            device: self,
            address,
            bytes,
        };
        // SAFETY: the table is a Rust slice, the target a block of at least its size of our own.
        unsafe { self.copy(address, table.as_ptr() as u64, table.len()) }?;
        Ok(kept)
    }

    /// Ordinary device memory.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64, CudaError> {
        let _entered = self.enter()?;
        let mut address = 0;
        // SAFETY: writes one address.
        check("allocate device memory", unsafe {
            sys::cuMemAlloc_v2(&raw mut address, bytes)
        })?;
        Ok(address)
    }

    /// Frees what [`Self::allocate`] gave. Waits for the device, as the driver does it.
    pub(super) fn free(&self, address: u64) {
        let freed = self.enter().and_then(|_entered| {
            // SAFETY: allocated by `allocate` and not used any more.
            check("free device memory", unsafe { sys::cuMemFree_v2(address) })
        });
        if let Err(error) = freed {
            tracing::warn!(device = self.ordinal(), %error, "device memory is lost until the process ends");
        }
    }

    /// Fills ordinary device memory with zeros.
    pub(super) fn clear(&self, address: u64, bytes: usize) -> Result<(), CudaError> {
        let side = self.side.lock();
        let _entered = self.enter()?;
        // SAFETY: memory of the caller's on this device.
        check("clear device memory", unsafe {
            sys::cuMemsetD8Async(address, 0, bytes, side.0)
        })?;
        // SAFETY: a stream of this device.
        check("wait for the clearing", unsafe {
            sys::cuStreamSynchronize(side.0)
        })
    }
}

/// A table on a device; its memory is kept for the next one.
#[derive(Debug)]
pub(super) struct Table {
    device: &'static Device,
    pub(super) address: u64,
    bytes: usize,
}

impl Drop for Table {
    fn drop(&mut self) {
        let mut tables = self.device.tables.lock();
        tables.entry(self.bytes).or_default().push(self.address);
    }
}

/// Host memory that every device of the process reaches, at one address for all of them.
pub(super) fn pinned_bytes(device: &Device, bytes: usize) -> Result<*mut u8, CudaError> {
    let _entered = device.enter()?;
    let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
    let mut memory: *mut c_void = std::ptr::null_mut();
    // SAFETY: writes one address.
    check("allocate pinned memory", unsafe {
        sys::cuMemHostAlloc(&raw mut memory, bytes, flags)
    })?;
    // SAFETY: fresh memory of that length.
    unsafe { memory.cast::<u8>().write_bytes(0, bytes) };
    Ok(memory.cast())
}
