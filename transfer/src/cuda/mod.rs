//! The cuda backend: blocks between GPUs, and between GPUs and host memory.
//!
//! A kernel gets layouts and block ids and computes addresses where the bytes are copied; a few
//! multiprocessors reach the speed of the link at every block size. The connection to a peer is the
//! same as for host memory (in this process, or a Unix socket of this host); this module only moves the
//! bytes, and says when they are there.
//!
//! * `driver`, `device`, `stream`: what the driver shows, and one context per device.
//! * `memory`, `pin`: device memory of this process and of peers, and host memory that devices reach.
//! * `kernels`, `loaded`: the kernels, compiled at run time.
//! * `plan`, `work`: from block sets to launches. `mover`: launches, and how their end is seen.

mod device;
mod driver;
mod error;
mod kernels;
mod loaded;
mod memory;
mod mover;
mod pace;
mod permute;
mod pin;
mod plan;
#[cfg(test)]
mod plan_tests;
mod share;
mod slots;
mod staging;
mod stream;
mod work;

pub use driver::{CudaDevice, CudaReport, probe_cuda};
pub use error::{CudaError, CudaUnavailable};
pub use kernels::{
    ImageOrigin, KernelConfig, KernelError, KernelImage, NvrtcInfo, compile_kernels, find_nvrtc,
};
pub use memory::{DeviceMemory, DeviceSharing};
pub use pin::{PinConfig, PinProgress};
pub use stream::DeviceEvent;

pub(crate) use device::Device;
pub(crate) use driver::device_with;
pub(crate) use memory::{DeviceRange, Imported, Share, ShareHandle};
pub(crate) use mover::Mover;
pub(crate) use pin::Pin;
pub(crate) use staging::Devices;
pub(crate) use work::DeviceWork;
