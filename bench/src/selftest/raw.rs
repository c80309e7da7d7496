//! Calls of the CUDA driver that a caller of the data plane makes: memory of its own, streams, and events.

use std::{
    collections::HashMap,
    ffi::{CStr, c_void},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::bail;
use blockplane_transfer::DeviceEvent;
use cudarc::driver::sys::{self, CUresult};

/// Fails with the driver's name of an error.
fn check(what: &str, code: CUresult) -> anyhow::Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: writes one pointer to a constant of the driver, or null.
    let found = unsafe { sys::cuGetErrorName(code, &raw mut text) };
    if found != CUresult::CUDA_SUCCESS || text.is_null() {
        bail!("cannot {what}: error {}", code as u32);
    }
    // SAFETY: a constant string of the driver that ends with a zero.
    let name = unsafe { CStr::from_ptr(text) };
    bail!("cannot {what}: {}", name.to_string_lossy())
}

/// Makes the context of a device, the one that everybody in this process shares, current on this thread.
pub(super) fn enter(device: u32) -> anyhow::Result<()> {
    static RETAINED: Mutex<Option<HashMap<u32, usize>>> = Mutex::new(None);
    let mut retained = RETAINED.lock().unwrap_or_else(PoisonError::into_inner);
    let retained = retained.get_or_insert_default();
    let context = match retained.get(&device) {
        Some(context) => *context,
        None => {
            let mut handle = 0;
            // SAFETY: writes one handle; an ordinal that does not exist is an error.
            check("find the device", unsafe {
                sys::cuDeviceGet(&raw mut handle, i32::try_from(device)?)
            })?;
            let mut context = std::ptr::null_mut();
            // SAFETY: writes one handle; the context stays retained until the process ends.
            check("open the device", unsafe {
                sys::cuDevicePrimaryCtxRetain(&raw mut context, handle)
            })?;
            retained.insert(device, context as usize);
            context as usize
        }
    };
    // SAFETY: a context that is retained until the process ends.
    check("enter the context", unsafe {
        sys::cuCtxSetCurrent(context as sys::CUcontext)
    })
}

/// Bytes of a device that nobody uses.
pub(super) fn free_bytes(device: u32) -> anyhow::Result<u64> {
    enter(device)?;
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: writes two integers.
    check("ask for free memory", unsafe {
        sys::cuMemGetInfo_v2(&raw mut free, &raw mut total)
    })?;
    Ok(free as u64)
}

/// Device memory that was made without a way to share it.
#[derive(Debug)]
pub(super) struct Unshareable {
    pub(super) address: u64,
    bytes: usize,
    handle: u64,
}

impl Unshareable {
    /// `bytes` is a multiple of 2 MiB.
    pub(super) fn new(device: u32, bytes: usize) -> anyhow::Result<Self> {
        enter(device)?;
        let location = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: i32::try_from(device)?,
        };
        let properties = sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location,
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        };
        let (mut handle, mut address) = (0, 0);
        // SAFETY: writes one handle.
        check("make device memory", unsafe {
            sys::cuMemCreate(&raw mut handle, bytes, &raw const properties, 0)
        })?;
        // SAFETY: writes one address.
        check("reserve addresses", unsafe {
            sys::cuMemAddressReserve(&raw mut address, bytes, 0, 0, 0)
        })?;
        // SAFETY: addresses that were just reserved, and memory of that size.
        check("map device memory", unsafe {
            sys::cuMemMap(address, bytes, 0, handle, 0)
        })?;
        let access = sys::CUmemAccessDesc {
            location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the range that was just mapped, and a list of one.
        check("give the device access", unsafe {
            sys::cuMemSetAccess(address, bytes, &raw const access, 1)
        })?;
        Ok(Self {
            address,
            bytes,
            handle,
        })
    }
}

impl Drop for Unshareable {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; whoever used it was told to be done with it.
        let _ = unsafe { sys::cuMemUnmap(self.address, self.bytes) };
        // SAFETY: reserved by `new`, and nothing is mapped there any more.
        let _ = unsafe { sys::cuMemAddressFree(self.address, self.bytes) };
        // SAFETY: made by `new`.
        let _ = unsafe { sys::cuMemRelease(self.handle) };
    }
}

/// Device memory of the caller's.
#[derive(Debug)]
pub(super) struct Allocation {
    device: u32,
    pub(super) address: u64,
}

impl Allocation {
    pub(super) fn new(device: u32, bytes: usize) -> anyhow::Result<Self> {
        enter(device)?;
        let mut address = 0;
        // SAFETY: writes one address.
        check("allocate device memory", unsafe {
            sys::cuMemAlloc_v2(&raw mut address, bytes)
        })?;
        Ok(Self { device, address })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if enter(self.device).is_ok() {
            // SAFETY: allocated by `new`; whoever used it was told to be done with it. After a failure
            // of the device there is nothing to give back.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// A stream of the caller's that neither waits for the default stream nor makes it wait.
#[derive(Debug)]
pub(super) struct Stream {
    device: u32,
    raw: sys::CUstream,
}

impl Stream {
    pub(super) fn new(device: u32) -> anyhow::Result<Self> {
        enter(device)?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle.
        check("make a stream", unsafe {
            sys::cuStreamCreate(&raw mut raw, flags)
        })?;
        Ok(Self { device, raw })
    }

    /// The default stream, which waits for all that were not made like the others here.
    pub(super) const fn default_of(device: u32) -> Self {
        let raw = std::ptr::null_mut();
        Self { device, raw }
    }

    /// Sets bytes when everything before on the stream is done.
    ///
    /// # Safety
    /// `bytes` bytes from `address` on are memory of this device, until the stream has done it.
    pub(super) unsafe fn set(&self, address: u64, value: u8, bytes: usize) -> anyhow::Result<()> {
        enter(self.device)?;
        // SAFETY: by the contract of this function.
        check("set memory", unsafe {
            sys::cuMemsetD8Async(address, value, bytes, self.raw)
        })
    }

    /// Waits until everything on the stream is done.
    pub(super) fn wait(&self) -> anyhow::Result<()> {
        enter(self.device)?;
        // SAFETY: a stream of this device.
        check("wait for a stream", unsafe {
            sys::cuStreamSynchronize(self.raw)
        })
    }

    /// An event behind everything on the stream.
    pub(super) fn record(&self) -> anyhow::Result<Event> {
        enter(self.device)?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes one handle.
        check("make an event", unsafe {
            sys::cuEventCreate(&raw mut raw, flags)
        })?;
        let event = Event { raw };
        // SAFETY: an event and a stream of this device.
        check("record an event", unsafe {
            sys::cuEventRecord(event.raw, self.raw)
        })?;
        Ok(event)
    }

    /// Runs a kernel that computes for so long on every multiprocessor and then sets words.
    ///
    /// # Safety
    /// As for [`Self::set`], with words of 4 bytes.
    pub(super) unsafe fn work(
        &self,
        address: u64,
        value: u32,
        words: u64,
        nanos: u64,
    ) -> anyhow::Result<()> {
        enter(self.device)?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a program with a final zero; the module stays until the process ends.
        check("load a program", unsafe {
            sys::cuModuleLoadData(&raw mut module, WORK.as_ptr().cast())
        })?;
        let mut function = std::ptr::null_mut();
        // SAFETY: writes one handle.
        check("find a kernel", unsafe {
            sys::cuModuleGetFunction(&raw mut function, module, c"work".as_ptr())
        })?;
        let mut parameters = [
            (&raw const address).cast_mut().cast::<c_void>(),
            (&raw const nanos).cast_mut().cast(),
            (&raw const value).cast_mut().cast(),
            (&raw const words).cast_mut().cast(),
        ];
        // SAFETY: the parameters that the kernel has; the rest by the contract of this function.
        check("launch a kernel", unsafe {
            sys::cuLaunchKernel(
                function,
                256,
                1,
                1,
                512,
                1,
                1,
                0,
                self.raw,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.raw.is_null() && enter(self.device).is_ok() {
            // SAFETY: made by `new`; what is on it still runs.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A place in a stream.
#[derive(Debug)]
pub(super) struct Event {
    raw: sys::CUevent,
}

impl Event {
    /// The same for the data plane.
    ///
    /// # Safety
    /// The event is dropped only when every transfer that was posted after it has ended.
    pub(super) unsafe fn for_transfers(&self) -> DeviceEvent {
        // SAFETY: a valid event; the rest by the contract of this function.
        unsafe { DeviceEvent::from_raw(self.raw.cast()) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

/// Stops a stream until it is opened.
#[derive(Debug)]
pub(super) struct Gate {
    device: u32,
    word: *mut AtomicU32,
}

impl Gate {
    pub(super) fn new(device: u32) -> anyhow::Result<Self> {
        enter(device)?;
        let mut memory: *mut c_void = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: writes one address.
        check("allocate pinned memory", unsafe {
            sys::cuMemHostAlloc(&raw mut memory, 4096, flags)
        })?;
        let gate = Self {
            device,
            word: memory.cast(),
        };
        gate.word().store(0, Ordering::SeqCst);
        Ok(gate)
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: pinned memory that lives as long as the gate; everybody uses it atomically.
        unsafe { &*self.word }
    }

    /// What is put on the stream from now on waits.
    pub(super) fn hold(&self, stream: &Stream) -> anyhow::Result<()> {
        enter(self.device)?;
        let flags = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: a word of pinned memory, which devices reach at the same address.
        check("stop a stream", unsafe {
            sys::cuStreamWaitValue32_v2(stream.raw, self.word as u64, 1, flags)
        })
    }

    pub(super) fn open(&self) {
        self.word().store(1, Ordering::SeqCst);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
        if enter(self.device).is_ok() {
            // SAFETY: allocated by `new`. The driver waits until no stream looks at it.
            let _ = unsafe { sys::cuMemFreeHost(self.word.cast()) };
        }
    }
}

/// Spins for `nanos` in every thread, then stores `value` to `words` words from `out` on.
const WORK: &CStr = c"
.version 7.0
.target sm_70
.address_size 64

.visible .entry work(.param .u64 out, .param .u64 nanos, .param .u32 value, .param .u64 words)
{
    .reg .pred %p<3>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<10>;
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [nanos];
    ld.param.u32 %r1, [value];
    ld.param.u64 %rd3, [words];
    cvta.to.global.u64 %rd1, %rd1;
    mov.u64 %rd4, %globaltimer;
    add.u64 %rd5, %rd4, %rd2;
SPIN:
    mov.u64 %rd6, %globaltimer;
    setp.lt.u64 %p1, %rd6, %rd5;
    @%p1 bra SPIN;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.u32 %r5, %r2, %r3, %r4;
    mov.u32 %r6, %nctaid.x;
    mul.lo.u32 %r7, %r6, %r3;
    cvt.u64.u32 %rd7, %r5;
    cvt.u64.u32 %rd8, %r7;
STORE:
    setp.ge.u64 %p2, %rd7, %rd3;
    @%p2 bra DONE;
    shl.b64 %rd9, %rd7, 2;
    add.u64 %rd9, %rd1, %rd9;
    st.global.u32 [%rd9], %r1;
    add.u64 %rd7, %rd7, %rd8;
    bra STORE;
DONE:
    ret;
}
";
