//! Device memory and staging memory: the near half of staged operations.

use std::sync::Arc;

use super::device::Device;
use super::stream::DeviceEvent;
use super::work::DeviceWork;
use crate::agent::Core;
use crate::error::{DeviceFailure, PrepareError, TransferError};
use crate::memory::Region;
use crate::op::{Op, Path, SetPair, TransferState};
use crate::stage::Near;

/// The GPUs of this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Devices;

impl Near for Devices {
    fn device_of(&self, region: &Region) -> Option<u32> {
        region.device().map(|range| range.device.ordinal())
    }

    fn plan(
        &self,
        core: &Core,
        op: Op,
        sets: &[SetPair],
    ) -> Result<(Path, u32, String), PrepareError> {
        let (work, how) = DeviceWork::prepare(core, op, sets, &[])?;
        let parts = work.parts();
        Ok((Path::Device(Arc::new(work)), parts, how))
    }

    fn start(&self, half: &Arc<TransferState>) {
        half.start_here();
    }

    fn stop(&self, half: &Arc<TransferState>) {
        half.stop_here();
    }

    fn is_past(&self, region: &Region, event: DeviceEvent) -> Result<bool, TransferError> {
        let Some(device) = region.device().map(|range| range.device) else {
            return Ok(true);
        };
        let past = device.enter().and_then(|_entered| event.is_past());
        past.map_err(|error| {
            device.note(&error);
            TransferError::Device(failure(device, error))
        })
    }
}

fn failure(device: &Device, error: super::CudaError) -> DeviceFailure {
    DeviceFailure {
        device: device.ordinal(),
        poisoned: device.lost().is_some(),
        error,
    }
}
