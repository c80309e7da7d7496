//! What can go wrong with CUDA: it is not there, or one of its calls failed.

use std::fmt;

/// Why this process has no CUDA. An ordinary state: everything else works without it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaUnavailable {
    /// The driver's library is not on the loader's path.
    #[error(
        "libcuda.so.1 was not found; install the NVIDIA driver (in a container: start it with GPU access)"
    )]
    NoDriver,
    /// The driver is there and does not start.
    #[error("the CUDA driver does not start: {0}")]
    Refused(CudaError),
    /// The driver works and shows no device.
    #[error("the CUDA driver shows no device (is CUDA_VISIBLE_DEVICES empty?)")]
    NoDevice,
    /// No such device.
    #[error("there is no device cuda:{device}; there are {devices}, numbered from 0")]
    UnknownDevice {
        /// The number asked for.
        device: u32,
        /// Devices that are visible.
        devices: u32,
    },
    /// Agents of this configuration do not use CUDA.
    #[error("CUDA is switched off for this agent (`AgentConfig::cuda`)")]
    Off,
    /// The device failed earlier and this process cannot use it any more.
    #[error("cuda:{device} is lost for this process, start it again: {error}")]
    Lost {
        /// The device.
        device: u32,
        /// The first error.
        error: CudaError,
    },
}

/// A failed call of the CUDA driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaError {
    /// What was tried.
    pub what: &'static str,
    /// The driver's number of the error (`CUresult`).
    pub code: u32,
    /// The driver's name of the error, such as `CUDA_ERROR_OUT_OF_MEMORY`.
    pub name: String,
    /// The driver's sentence about it.
    pub description: String,
}

impl std::error::Error for CudaError {}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            code,
            name,
            description,
        } = self;
        write!(f, "cannot {what}: {name} ({code}), {description}")
    }
}

impl CudaError {
    pub(super) const OUT_OF_MEMORY: u32 = 2;
    pub(super) const NOT_READY: u32 = 600;
    pub(super) const PEER_ACCESS_ALREADY_ENABLED: u32 = 704;

    /// Whether the device's memory is used up.
    #[must_use]
    pub const fn is_out_of_memory(&self) -> bool {
        self.code == Self::OUT_OF_MEMORY
    }

    /// Whether the context of the device is beyond use after it: every later call on the device
    /// fails with the same error until the process ends. Memory faults, failed kernels, and
    /// hardware errors of memory or links.
    #[must_use]
    pub const fn poisons(&self) -> bool {
        matches!(
            self.code,
            // Deinitialised; device unavailable; ECC, NVLink, contained and invalid-page errors.
            4 | 46 | 201 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=720
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_poison_and_refusals_do_not() {
        let error = |code| CudaError {
            what: "test",
            code,
            name: String::new(),
            description: String::new(),
        };
        for code in [214, 220, 700, 716, 719] {
            assert!(error(code).poisons(), "{code}");
        }
        for code in [1, 2, 101, 600, 704, 712, 801] {
            assert!(!error(code).poisons(), "{code}");
        }
        assert!(error(2).is_out_of_memory());
    }
}
