//! CUDA: blocks between GPUs, host memory and processes.

mod kernels;

pub use kernels::{
    ImageOrigin, KernelConfig, KernelError, KernelImage, NvrtcInfo, compile_kernels, find_nvrtc,
};
