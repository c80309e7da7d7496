//! Device memory through places that devices do not reach: files, object stores, peers over a network,
//! memory of other processes.
//!
//! The operation is cut into parts of its logical bytes, each at most a slot of pinned staging memory.
//! A part is filled into its slot and drained out of it by two ordinary operations on host memory, one
//! of them by a device: nothing here copies a byte. Several parts are under way at a time, so that both
//! halves overlap. To the caller it is one transfer: its parts are claimed before they are filled and
//! given back when they are drained, or when both halves are quiet after an error or a cancel.
//!
//! * `slots`, `progress`: who gets the next slot, and what follows the end of a half. Pure.
//! * `part`: the halves of a part as operations. `driver`: the thread that posts them.
//! * `near`: the device's half behind a trait, so that all of it runs without a device as well.

mod driver;
mod near;
mod part;
mod progress;
mod slots;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use self::driver::{Driver, Event, Mail};
use self::near::NearMoves;
use crate::agent::{Core, LaneChoice, MappedMemory, RemoteMemory, RemoteRegion, Session};
use crate::config::{ArenaConfig, Lane, RemoteAccess, StagingConfig};
use crate::cuda::Devices;
use crate::error::{PrepareError, Side, TransferError};
use crate::memory::{Region, RegionId};
use crate::op::{Op, SetPair, TransferState};
use crate::plan::parts_of;
use crate::storage::StoreBackend;

pub(crate) use self::near::Near;
pub(crate) use self::part::{Far, StagedWork};

/// Names a part of a posted operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) operation: u64,
    pub(crate) part: u32,
}

/// Pieces that a part may have: requests, segments and chunks of kernels are counted in 32 bits and
/// less.
const PIECES_MAX: u64 = 1 << 20;

/// Most parts of an operation.
const PARTS_MAX: u64 = 1 << 30;

/// What an agent has for staging; nothing before the first operation is prepared.
#[derive(Default)]
pub(crate) struct Stage {
    near: OnceLock<Arc<dyn Near>>,
    memory: Mutex<Option<Arc<Memory>>>,
    mail: Arc<Mail>,
}

/// Staging memory.
#[derive(Debug)]
pub(crate) struct Memory {
    region: Arc<Region>,
    /// The same as the other side of the copies of devices.
    beside: Arc<RemoteRegion>,
    /// Where those are posted.
    session: Arc<Session>,
    slots: u32,
    slot_bytes: u64,
}

/// A checked operation that is to be staged.
pub(crate) struct Staged<'a> {
    pub(crate) op: Op,
    pub(crate) sets: &'a [SetPair],
    pub(crate) starts: &'a [u64],
    pub(crate) bytes: u64,
    /// Why devices do not reach the other side.
    pub(crate) why: &'a str,
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage")
            .field("memory", &*self.memory.lock())
            .finish_non_exhaustive()
    }
}

impl Stage {
    /// Puts something else in the place of the devices; before anything is prepared.
    #[cfg(test)]
    fn stand_in(&self, near: Arc<dyn Near>) {
        assert!(
            self.near.set(near).is_ok(),
            "the devices are in use already"
        );
    }

    fn near(&self) -> &Arc<dyn Near> {
        self.near.get_or_init(|| Arc::new(Devices))
    }

    /// Whether the sets lie in device memory, all of them on one device.
    pub(crate) fn takes(&self, sets: &[SetPair]) -> Result<bool, PrepareError> {
        let near = self.near();
        let mut devices = sets.iter().map(|set| near.device_of(&set.local_region));
        let first = devices.next().flatten();
        if devices.all(|device| device == first) {
            Ok(first.is_some())
        } else {
            Err(PrepareError::MixedMemory { side: Side::Local })
        }
    }

    /// Whether a region is device memory.
    pub(crate) fn is_near(&self, region: &Region) -> bool {
        self.near().device_of(region).is_some()
    }

    /// Plans an operation of which [`Self::takes`] is true; says in words how and why.
    pub(crate) fn plan(
        &self,
        core: &Arc<Core>,
        staged: &Staged<'_>,
        far: Far,
    ) -> Result<(StagedWork, String), PrepareError> {
        let memory = self.memory(core)?;
        let Staged { op, sets, .. } = *staged;
        let unit = far.unit();
        let larger = || PrepareError::LargerThanSlot {
            bytes: unit.unwrap_or(0),
            slot_bytes: memory.slot_bytes,
        };
        let chunk_bytes = chunk_bytes(memory.slot_bytes, sets, unit).ok_or_else(larger)?;
        let chunks = parts_of(staged.bytes, chunk_bytes);
        let Some(narrow) = u32::try_from(chunks).ok().filter(|_| chunks <= PARTS_MAX) else {
            return Err(PrepareError::TooLarge {
                what: "number of staged parts (`cuda.staging.slot_bytes`)",
                got: chunks,
                limit: PARTS_MAX,
            });
        };
        let work = StagedWork::new(memory.clone(), chunk_bytes, narrow, far);
        // What can be missing for a device to take part is missing for the first part.
        let first = work.near_sets(sets, staged.starts, staged.bytes, 0, 0);
        let (_, _, how) = self.near().plan(core, op, &first)?;
        let Memory {
            slots, slot_bytes, ..
        } = *memory;
        let why = staged.why;
        let reason = format!(
            "staged through {slots} slots of {slot_bytes} bytes of pinned memory, because {why}: {chunks} parts of up to {chunk_bytes} bytes; {how}"
        );
        Ok((work, reason))
    }

    /// The staging memory, and the thread that serves it, had now if it is the first time.
    fn memory(&self, core: &Arc<Core>) -> Result<Arc<Memory>, PrepareError> {
        let mut memory = self.memory.lock();
        if let Some(memory) = &*memory {
            return Ok(memory.clone());
        }
        if core.is_stopped() {
            return Err(PrepareError::AgentStopped);
        }
        let StagingConfig { slots, slot_bytes } = core.config.cuda.staging;
        let bytes = u64::from(slots) * slot_bytes;
        let refused = |reason: String| PrepareError::Staging { bytes, reason };
        let whole = usize::try_from(bytes).map_err(|error| refused(error.to_string()))?;
        let mut config = ArenaConfig::new(whole, "staging");
        config.access = RemoteAccess::None;
        let id = RegionId(core.next_name());
        let region = Region::arena(id, &config).map_err(|error| refused(error.to_string()))?;
        let region = Arc::new(region);
        let near = self.near().clone();
        Driver::start(&self.mail, &near, slots).map_err(|error| refused(error.to_string()))?;
        let backend = Arc::new(StoreBackend::new(Arc::new(NearMoves(near))));
        let choice = LaneChoice::new(Lane::Cuda, "staging memory", &[], 1);
        let beside = RemoteMemory::Mapped(MappedMemory::InProcess(region.clone()));
        let access = RemoteAccess::Open;
        let made = Arc::new(Memory {
            beside: Arc::new(RemoteRegion::new(id, bytes, access, beside)),
            session: Session::stored(core, "staging", choice, backend),
            region,
            slots,
            slot_bytes,
        });
        tracing::info!(agent = %core.name, slots, slot_bytes, "staging memory taken");
        *memory = Some(made.clone());
        Ok(made)
    }

    /// Takes up a posted operation. Bounded by operations in flight.
    pub(crate) fn start(&self, transfer: &Arc<TransferState>) {
        self.mail.push(Event::Start(transfer.clone()));
    }

    /// An operation is called off.
    pub(crate) fn stop(&self, operation: u64) {
        self.mail.push(Event::Stop(operation));
    }

    /// A half of a part has ended.
    pub(crate) fn ended(&self, part: Part, outcome: Result<(), TransferError>) {
        self.mail.push(Event::Ended(part, outcome));
    }

    /// Starts no copies on devices any more; the thread ends when nothing is under way. Every
    /// operation was stopped before.
    pub(crate) fn stop_all(&self) {
        self.mail.close();
        let memory = self.memory.lock().take();
        drop(memory);
    }
}

/// Bytes of a part: as much as a slot takes, in whole units if there are such, else in whole runs, of
/// which each part then needs no more requests than there are runs; whole pages of both if that is
/// possible. `None` when a slot does not take one unit.
fn chunk_bytes(slot_bytes: u64, sets: &[SetPair], unit: Option<u64>) -> Option<u64> {
    let whole = |unit: u64| slot_bytes / unit * unit;
    if let Some(unit) = unit {
        return Some(whole(unit)).filter(|&bytes| bytes > 0);
    }
    let mut runs = sets.iter().map(|set| set.local.layout.run_bytes);
    let first = runs.next()?;
    let (least, most) = runs.fold((first, first), |(least, most), run| {
        (least.min(run), most.max(run))
    });
    let room = slot_bytes.min(least.saturating_mul(PIECES_MAX));
    if least < most || least > room {
        return Some(room);
    }
    let pages = least
        .is_multiple_of(4096)
        .then_some(least)
        .or_else(|| least.checked_mul(4096 >> least.trailing_zeros().min(12)));
    let unit = pages.filter(|&unit| unit <= room).unwrap_or(least);
    Some(room / unit * unit)
}
