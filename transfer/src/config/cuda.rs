//! Configuration of the CUDA backend.

use std::time::Duration;

use crate::cuda::KernelConfig;
use crate::error::AgentError;

/// How an agent uses GPUs. Nothing of CUDA is touched before the first region of device memory, or
/// the first region that is to be pinned.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CudaConfig {
    /// Whether this agent may use CUDA at all. Default true.
    pub enabled: bool,
    /// Streaming multiprocessors that a transfer may occupy while it runs, unless its
    /// [`PostOptions::sms`](crate::PostOptions::sms) says otherwise. More is faster up to the speed
    /// of the link and takes more from compute kernels that run beside it; the tuning guide has
    /// measured figures. Default 16; at least 1.
    pub sms: u32,
    /// Multiprocessors that all transfers in flight on one device occupy together. A transfer that is
    /// posted while there are fewer left gets fewer, but at least `sms_min`; one that names its own budget
    /// gets that. Default 64.
    pub sms_total: u32,
    /// Least multiprocessors of a transfer, as far as it is large enough to use them. Default 4.
    pub sms_min: u32,
    /// Contiguous pieces of at least this size go to the copy engines, which occupy no
    /// multiprocessor, if a transfer has no more than `engine_pieces_max` of them. Default 16 MiB.
    pub engine_bytes_min: u64,
    /// Most pieces that a transfer gives to the copy engines: each is a call of the driver (2 to 3 us
    /// of the posting thread). Default 8; 0 leaves everything to kernels.
    pub engine_pieces_max: u32,
    /// Whether peers on this host may run the copy of a WRITE on this agent's devices, pulling
    /// instead of pushing. Pulling needs fewer multiprocessors for the same speed, but takes them from
    /// the device that is written to, in turn with this process's own kernels. Default false.
    pub peers_pull: bool,
    /// Whether this agent pulls where the peer allows it. Default false: the device that holds the
    /// bytes pushes them.
    pub pull_writes: bool,
    /// How long a thread that waits for a transfer looks for its end before it sleeps between looks.
    /// Default 200 us, at most 10 ms.
    pub spin: Duration,
    /// Transfers of one device that run side by side; each has a stream of its own, further ones
    /// share them. Default 8, at most 64.
    pub streams: usize,
    /// How kernels are compiled when a device is first used, and where they are kept.
    pub kernels: KernelConfig,
}

impl Default for CudaConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            sms: 16,
            sms_total: 64,
            sms_min: 4,
            engine_bytes_min: 16 << 20,
            engine_pieces_max: 8,
            peers_pull: false,
            pull_writes: false,
            spin: Duration::from_micros(200),
            streams: 8,
            kernels: KernelConfig::default(),
        }
    }
}

impl CudaConfig {
    pub(super) fn validate(&self) -> Result<(), AgentError> {
        let invalid = |field, got: String, accepted| {
            Err(AgentError::InvalidConfig {
                field,
                got,
                accepted,
            })
        };
        for (field, sms) in [
            ("cuda.sms", self.sms),
            ("cuda.sms_total", self.sms_total),
            ("cuda.sms_min", self.sms_min),
        ] {
            if sms == 0 {
                return invalid(field, "0".to_owned(), "at least 1");
            }
        }
        if self.spin > Duration::from_millis(10) {
            return invalid("cuda.spin", format!("{:?}", self.spin), "up to 10 ms");
        }
        if !(1..=64).contains(&self.streams) {
            return invalid("cuda.streams", self.streams.to_string(), "1 to 64");
        }
        Ok(())
    }
}
