//! Streams of a device, lent to transfers.

use cudarc::driver::sys::{self, CUevent};
use parking_lot::Mutex;

use super::device::{Device, RawStream};
use super::driver::check;
use super::error::CudaError;

/// Streams that were made so far.
#[derive(Default)]
pub(super) struct Streams(Mutex<Vec<Entry>>);

struct Entry {
    stream: RawStream,
    users: usize,
    /// What is on it waits for an event of the caller's.
    ordered: usize,
}

/// A stream that a launch was put on.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) device: &'static Device,
    pub(super) stream: RawStream,
    index: usize,
    ordered: bool,
}

impl Streams {
    /// The stream with the least on it; a fresh one while there are fewer than `most`. Launches that
    /// wait for an event keep to themselves as long as there are streams left.
    pub(super) fn lend(
        device: &'static Device,
        most: usize,
        ordered: bool,
    ) -> Result<Lease, CudaError> {
        let mut entries = device.streams.0.lock();
        let idle = entries.iter().position(|entry| entry.users == 0);
        let index = match idle {
            Some(index) => index,
            None if entries.len() < most => {
                let stream = device.new_stream()?;
                entries.push(Entry {
                    stream,
                    users: 0,
                    ordered: 0,
                });
                entries.len() - 1
            }
            None => {
                let load = |&index: &usize| (entries[index].ordered, entries[index].users);
                (0..entries.len()).min_by_key(load).unwrap_or(0)
            }
        };
        let entry = &mut entries[index];
        entry.users += 1;
        entry.ordered += usize::from(ordered);
        Ok(Lease {
            device,
            stream: entry.stream,
            index,
            ordered,
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut entries = self.device.streams.0.lock();
        if let Some(entry) = entries.get_mut(self.index) {
            entry.users -= 1;
            entry.ordered -= usize::from(self.ordered);
        }
    }
}

/// An event of the caller's: a place in one of its streams.
///
/// A transfer that is posted [after](crate::PostOptions::after) an event touches no byte before the
/// work that the event was recorded behind is done. So the KV of a layer can be sent as soon as that
/// layer has run, while the next ones run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceEvent(usize);

impl DeviceEvent {
    /// An event of the CUDA driver (`CUevent`, which is also the runtime's `cudaEvent_t`), recorded
    /// before it is used.
    ///
    /// # Safety
    /// It is a valid event of a device of this process and is destroyed only after every transfer
    /// that was posted after it has ended.
    #[must_use]
    pub unsafe fn from_raw(event: *mut std::ffi::c_void) -> Self {
        Self(event as usize)
    }

    /// Whether the work that it was recorded behind is done.
    pub(super) fn is_past(self) -> Result<bool, CudaError> {
        // SAFETY: an event that is valid by the promise of its maker.
        past("look at an event", unsafe { sys::cuEventQuery(self.raw()) })
    }

    pub(super) fn raw(self) -> CUevent {
        self.0 as CUevent
    }
}

impl Lease {
    /// What is put on the stream from now on waits for the event.
    pub(super) fn wait_for(&self, event: DeviceEvent) -> Result<(), CudaError> {
        // SAFETY: a stream of ours and an event that is valid by the promise of its maker.
        check("order a transfer after an event", unsafe {
            sys::cuStreamWaitEvent(self.stream.0, event.raw(), 0)
        })
    }

    /// Waits until nothing of the stream moves any more.
    pub(super) fn drain(&self) {
        // SAFETY: a stream of ours.
        let drained = check("wait for a stream", unsafe {
            sys::cuStreamSynchronize(self.stream.0)
        });
        if let Err(error) = drained {
            self.device.note(&error);
        }
    }

    /// Whether everything on the stream is done; an error of the device otherwise.
    pub(super) fn done(&self) -> Result<bool, CudaError> {
        // SAFETY: a stream of ours.
        past("look at a stream", unsafe {
            sys::cuStreamQuery(self.stream.0)
        })
    }
}

/// What a question whether something is over was answered.
fn past(what: &'static str, code: sys::CUresult) -> Result<bool, CudaError> {
    match check(what, code) {
        Ok(()) => Ok(true),
        Err(error) if error.code == CudaError::NOT_READY => Ok(false),
        Err(error) => Err(error),
    }
}
