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
    /// Most pieces that a transfer gives to the copy engines: each is a call of the driver (some us
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
    /// Pinned memory between device memory and places that devices do not reach.
    pub staging: StagingConfig,
    /// How kernels are compiled when a device is first used, and where they are kept.
    pub kernels: KernelConfig,
}

/// Pinned memory of an agent through which blocks of its devices go to and come from files, object
/// stores and peers that no device reaches.
///
/// Taken when such an operation is first prepared, and kept until the agent stops:
/// `slots * slot_bytes`, 64 MiB with the defaults, for all operations of the agent together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StagingConfig {
    /// Parts of operations that are under way at one time. One operation gets half of them, so
    /// that one that does not come forward leaves the others room. Default 8: one or two slots
    /// keep the bus busy, the others the slower side. 2 to 1024.
    pub slots: u32,
    /// Bytes of one part, at most. Default 8 MiB: the bus needs 160 us for it, ten times as long
    /// as a copy takes to start, and the far side gets 8 requests or 16 stripes from it. Objects
    /// have to fit a slot whole. 4 KiB to 1 GiB, a multiple of 4096.
    pub slot_bytes: u64,
}

impl Default for StagingConfig {
    fn default() -> Self {
        Self {
            slots: 8,
            slot_bytes: 8 << 20,
        }
    }
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
            staging: StagingConfig::default(),
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
        let StagingConfig { slots, slot_bytes } = self.staging;
        if !(2..=1024).contains(&slots) {
            return invalid("cuda.staging.slots", slots.to_string(), "2 to 1024");
        }
        if !(4096..=1 << 30).contains(&slot_bytes) || !slot_bytes.is_multiple_of(4096) {
            let accepted = "4 KiB to 1 GiB, a multiple of 4096";
            return invalid("cuda.staging.slot_bytes", slot_bytes.to_string(), accepted);
        }
        Ok(())
    }
}
