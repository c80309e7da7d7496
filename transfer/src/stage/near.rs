//! The half of a staged operation between device memory and staging memory, as the stage sees it.

use std::fmt;
use std::sync::Arc;

use crate::agent::Core;
use crate::cuda::DeviceEvent;
use crate::error::{PrepareError, TransferError};
use crate::memory::Region;
use crate::op::{Op, Path, SetPair, TransferState};
use crate::storage::Moves;

/// What copies between memory that files, stores and sockets cannot take and memory that they can.
pub(crate) trait Near: fmt::Debug + Send + Sync {
    /// The device that holds a region; none for memory of the host.
    fn device_of(&self, region: &Region) -> Option<u32>;

    /// Plans copies between device memory, the local side, and staging memory, the remote side; says
    /// in words how.
    fn plan(
        &self,
        core: &Core,
        op: Op,
        sets: &[SetPair],
    ) -> Result<(Path, u32, String), PrepareError>;

    /// Starts such copies. Returns at once; claimed parts are given back when their bytes are quiet.
    fn start(&self, half: &Arc<TransferState>);

    /// They are called off.
    fn stop(&self, half: &Arc<TransferState>);

    /// Whether the work of the caller's on the device of `region`, behind which `event` was recorded,
    /// is done.
    fn is_past(&self, region: &Region, event: DeviceEvent) -> Result<bool, TransferError>;
}

/// Moves the bytes of halves.
#[derive(Debug)]
pub(super) struct NearMoves(pub(super) Arc<dyn Near>);

impl Moves for NearMoves {
    fn transfer(&self, half: &Arc<TransferState>) {
        self.0.start(half);
    }

    fn stop(&self, half: &Arc<TransferState>) {
        self.0.stop(half);
    }
}
