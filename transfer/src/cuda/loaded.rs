//! The kernels, loaded into the context of a device.

use std::ffi::{CStr, c_void};
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute};

use super::device::Device;
use super::driver::{attribute, check, driver, handle};
use super::error::CudaError;
use super::kernels::shape::{Limits, SHARED_BYTES_MAX, SHARED_BYTES_STATIC, Shape};
use super::kernels::{self, CAPABILITY_BULK, KernelError};
use crate::config::CudaConfig;

/// Kernels of one device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels {
    /// For aligned blocks and few multiprocessors, on devices that have bulk copies.
    pub(super) bulk: Option<Function>,
    /// For all blocks on all devices.
    pub(super) lanes: Function,
    /// For what one CTA copies at once.
    pub(super) small: Function,
    /// For blocks whose order of bytes changes.
    pub(super) permute: Function,
    /// What they may be launched with.
    pub(super) limits: Limits,
}

/// A kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function(CUfunction);

// SAFETY: the driver takes its handles from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Why a device has no kernels.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum KernelTrouble {
    #[error(transparent)]
    Kernel(#[from] Arc<KernelError>),
    #[error(transparent)]
    Device(#[from] CudaError),
}

impl Kernels {
    pub(super) fn load(device: &Device, config: &CudaConfig) -> Result<Self, KernelTrouble> {
        let started = Instant::now();
        let cuda_major = driver_major();
        let image =
            kernels::load(&config.kernels, device.info.capability, cuda_major).map_err(Arc::new)?;
        let _entered = device.enter()?;
        let module = module(&image.bytes)?;
        let shared = attribute(
            handle(i32::try_from(device.ordinal()).unwrap_or(i32::MAX))?,
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?;
        let limits = Limits {
            bulk: device.info.capability >= CAPABILITY_BULK,
            shared_bytes: SHARED_BYTES_MAX.min(shared.saturating_sub(SHARED_BYTES_STATIC)),
        };
        let find = |name| Function::find(module, name)?.with_shared(limits.shared_bytes);
        let kernels = Self {
            bulk: limits.bulk.then(|| find(c"bp_copy_bulk")).transpose()?,
            lanes: find(c"bp_copy_lanes")?,
            small: Function::find(module, c"bp_copy_small")?,
            permute: find(c"bp_permute")?,
            limits,
        };
        tracing::info!(
            device = device.ordinal(),
            origin = %image.origin,
            bulk = kernels.bulk.is_some(),
            elapsed = ?started.elapsed(),
            "kernels loaded"
        );
        Ok(kernels)
    }
}

/// The CUDA version that the driver loads images of.
fn driver_major() -> Option<u32> {
    driver().ok().map(|report| report.driver_version / 1000)
}

fn module(image: &[u8]) -> Result<sys::CUmodule, CudaError> {
    let mut module = std::ptr::null_mut();
    // SAFETY: an image that NVRTC made, and that is alive; the module lives as long as the context.
    check("load a kernel", unsafe {
        sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast())
    })?;
    Ok(module)
}

impl Function {
    fn find(module: sys::CUmodule, name: &CStr) -> Result<Self, CudaError> {
        let mut function = std::ptr::null_mut();
        // SAFETY: writes one handle; a name that is not there is an error.
        check("find a kernel", unsafe {
            sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr())
        })?;
        Ok(Self(function))
    }

    fn with_shared(self, bytes: u32) -> Result<Self, CudaError> {
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        // SAFETY: a function of this context.
        check("give a kernel its shared memory", unsafe {
            sys::cuFuncSetAttribute(self.0, attribute, bytes)
        })?;
        Ok(self)
    }

    /// Launches the kernel. The context of its device is current.
    ///
    /// # Safety
    /// `parameter` is what the kernel takes, and everything it points to stays valid until the launch
    /// has ended.
    pub(super) unsafe fn launch<P>(
        self,
        stream: sys::CUstream,
        shape: Shape,
        parameter: &P,
    ) -> Result<(), CudaError> {
        let mut parameters = [std::ptr::from_ref(parameter).cast_mut().cast::<c_void>()];
        // SAFETY: one parameter, which the driver copies; the rest by the contract of this function.
        check("launch a kernel", unsafe {
            sys::cuLaunchKernel(
                self.0,
                shape.ctas,
                1,
                1,
                shape.threads,
                1,
                1,
                shape.shared_bytes,
                stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }
}
