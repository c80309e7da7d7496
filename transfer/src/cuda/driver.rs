//! The driver: found at run time, started once per process, and asked what is there.

use std::ffi::CStr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Attribute, CUresult};

use super::error::{CudaError, CudaUnavailable};

/// A device that the driver shows.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CudaDevice {
    /// Number in this process, from 0 (`CUDA_VISIBLE_DEVICES` decides which devices are numbered).
    pub ordinal: u32,
    /// The driver's name of it.
    pub name: String,
    /// Names the device on every host and in every process.
    pub uuid: [u8; 16],
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Where it sits on the PCI bus, as `domain:bus:device.function`.
    pub pci: String,
    /// NUMA node of the host memory next to it, where the system tells.
    pub numa_node: Option<u32>,
    /// Ordinals of the devices whose memory its kernels can reach.
    pub peers: Vec<u32>,
}

/// What CUDA looks like from this process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CudaReport {
    /// Version that the driver supports: 13000 for 13.0.
    pub driver_version: u32,
    /// The devices.
    pub devices: Vec<CudaDevice>,
}

/// Looks for CUDA and starts its driver, which takes a while the first time and nothing later. Makes no
/// context and takes no memory on any device.
///
/// # Errors
/// There is no driver or no device, or the driver does not start; the error says what to do.
pub fn probe_cuda() -> Result<CudaReport, CudaUnavailable> {
    driver().cloned()
}

/// The device with that identity, if this process sees it.
pub(crate) fn device_with(uuid: &[u8; 16]) -> Result<Option<&'static CudaDevice>, CudaUnavailable> {
    Ok(driver()?.devices.iter().find(|info| info.uuid == *uuid))
}

/// The driver of this process, started when first asked for.
pub(super) fn driver() -> Result<&'static CudaReport, CudaUnavailable> {
    static DRIVER: OnceLock<Result<CudaReport, CudaUnavailable>> = OnceLock::new();
    DRIVER.get_or_init(start).as_ref().map_err(Clone::clone)
}

fn start() -> Result<CudaReport, CudaUnavailable> {
    // SAFETY: looks for the library only; loading it runs its initialisers, which is its use.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaUnavailable::NoDriver);
    }
    // SAFETY: the first call of the driver; flags must be 0.
    check("start the driver", unsafe { sys::cuInit(0) }).map_err(|error| match error.code {
        100 => CudaUnavailable::NoDevice,
        _ => CudaUnavailable::Refused(error),
    })?;
    report()
        .map_err(CudaUnavailable::Refused)
        .and_then(|report| {
            if report.devices.is_empty() {
                Err(CudaUnavailable::NoDevice)
            } else {
                Ok(report)
            }
        })
}

fn report() -> Result<CudaReport, CudaError> {
    let mut version = 0;
    // SAFETY: writes one integer.
    check("ask for the driver's version", unsafe {
        sys::cuDriverGetVersion(&raw mut version)
    })?;
    let mut count = 0;
    // SAFETY: writes one integer.
    check("count devices", unsafe {
        sys::cuDeviceGetCount(&raw mut count)
    })?;
    let devices = (0..count)
        .map(|ordinal| describe(ordinal, count))
        .collect::<Result<_, _>>()?;
    Ok(CudaReport {
        driver_version: u32::try_from(version).unwrap_or(0),
        devices,
    })
}

/// The driver's handle of a device.
pub(super) fn handle(ordinal: i32) -> Result<CUdevice, CudaError> {
    let mut device = 0;
    // SAFETY: writes one handle; an ordinal that does not exist is an error.
    check("find the device", unsafe {
        sys::cuDeviceGet(&raw mut device, ordinal)
    })?;
    Ok(device)
}

fn describe(ordinal: i32, count: i32) -> Result<CudaDevice, CudaError> {
    let device = handle(ordinal)?;
    let mut name = [0u8; 128];
    // SAFETY: writes at most as many bytes as the buffer has, with a final zero.
    check("ask for the device's name", unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, device)
    })?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: writes one identifier.
    check("ask for the device's identity", unsafe {
        sys::cuDeviceGetUuid_v2(&raw mut uuid, device)
    })?;
    let mut bytes = 0usize;
    // SAFETY: writes one integer.
    check("ask for the device's memory", unsafe {
        sys::cuDeviceTotalMem_v2(&raw mut bytes, device)
    })?;
    let mut pci = [0u8; 32];
    // SAFETY: writes at most as many bytes as the buffer has, with a final zero.
    check("ask for the device's place", unsafe {
        sys::cuDeviceGetPCIBusId(pci.as_mut_ptr().cast(), 31, device)
    })?;
    let mut peers = Vec::new();
    for other in (0..count).filter(|&other| other != ordinal) {
        let mut can = 0;
        let peer = handle(other)?;
        // SAFETY: writes one integer.
        check("ask whether devices reach each other", unsafe {
            sys::cuDeviceCanAccessPeer(&raw mut can, device, peer)
        })?;
        if can != 0 {
            peers.push(unsigned(other));
        }
    }
    let pci = text(&pci).to_ascii_lowercase();
    Ok(CudaDevice {
        ordinal: unsigned(ordinal),
        name: text(&name),
        uuid: uuid.bytes.map(i8::cast_unsigned),
        capability: (
            attribute(
                device,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            )?,
            attribute(
                device,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )?,
        ),
        multiprocessors: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: bytes as u64,
        numa_node: numa_node(&pci),
        pci,
        peers,
    })
}

/// A number that the driver tells of a device; negative ones are 0.
pub(super) fn attribute(device: CUdevice, attribute: Attribute) -> Result<u32, CudaError> {
    let mut value = 0;
    // SAFETY: writes one integer.
    check("ask for an attribute of the device", unsafe {
        sys::cuDeviceGetAttribute(&raw mut value, attribute, device)
    })?;
    Ok(unsigned(value))
}

/// The node that the kernel gives for a device on the PCI bus.
fn numa_node(pci: &str) -> Option<u32> {
    let path = format!("/sys/bus/pci/devices/{pci}/numa_node");
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Turns what a call returned into a result.
pub(super) fn check(what: &'static str, code: CUresult) -> Result<(), CudaError> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let told = |ask: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: writes one pointer to a constant of the driver, or null.
        let found = unsafe { ask(code, &raw mut text) } == CUresult::CUDA_SUCCESS;
        if !found || text.is_null() {
            return "an error that the driver does not name".to_owned();
        }
        // SAFETY: a constant string of the driver that ends with a zero.
        let text = unsafe { CStr::from_ptr(text) };
        text.to_string_lossy().into_owned()
    };
    Err(CudaError {
        what,
        code: code as u32,
        name: told(sys::cuGetErrorName),
        description: told(sys::cuGetErrorString),
    })
}

fn unsigned(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

/// The text before the first zero.
fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}
