//! The halves of a part as operations on staging memory.

use std::sync::Arc;

use super::Memory;
use super::near::Near;
use super::progress::Half;
use crate::agent::{Core, Session};
use crate::config::Lane;
use crate::cuda::CudaUnavailable;
use crate::error::{DeviceFailure, PrepareError, TransferError};
use crate::op::{Op, Path, Plan, SetPair, TransferState, Work};
use crate::plan::{BlockSet, cuts, part_range};
#[cfg(feature = "object")]
use crate::storage::ObjectWork;
use crate::storage::StagedFile;

/// How an operation goes through staging memory.
#[derive(Debug)]
pub(crate) struct StagedWork {
    memory: Arc<Memory>,
    chunk_bytes: u64,
    chunks: u32,
    far: Far,
}

/// The place that devices do not reach.
#[derive(Debug)]
pub(crate) enum Far {
    /// A file.
    File(StagedFile),
    /// Whole objects.
    #[cfg(feature = "object")]
    Objects(Arc<ObjectWork>),
    /// Memory of a peer; through streams or by the kernel.
    Peer { streamed: bool },
}

impl Far {
    /// Bytes that have to go as a whole.
    pub(super) fn unit(&self) -> Option<u64> {
        match self {
            #[cfg(feature = "object")]
            Self::Objects(objects) => Some(objects.object_bytes()),
            Self::File(_) | Self::Peer { .. } => None,
        }
    }

    /// Whether something follows all parts.
    pub(super) const fn seals(&self) -> bool {
        match self {
            Self::File(file) => file.durable,
            #[cfg(feature = "object")]
            Self::Objects(_) => false,
            Self::Peer { .. } => false,
        }
    }
}

impl StagedWork {
    pub(super) const fn new(memory: Arc<Memory>, chunk_bytes: u64, chunks: u32, far: Far) -> Self {
        Self {
            memory,
            chunk_bytes,
            chunks,
            far,
        }
    }

    /// Parts that move bytes.
    pub(super) const fn chunks(&self) -> u32 {
        self.chunks
    }

    pub(super) const fn seals(&self) -> bool {
        self.far.seals()
    }

    /// Parts of the operation.
    pub(crate) const fn parts(&self) -> u32 {
        self.chunks + self.far.seals() as u32
    }

    /// Whether the peer's own threads place bytes.
    pub(crate) const fn streamed(&self) -> bool {
        matches!(self.far, Far::Peer { streamed: true })
    }

    /// The pairs of sets of a part, each with its place in the slot.
    fn cut(
        &self,
        sets: &[SetPair],
        starts: &[u64],
        bytes: u64,
        part: u32,
        slot: u32,
        pair: impl Fn(&SetPair, [BlockSet; 3]) -> SetPair,
    ) -> Vec<SetPair> {
        let mut out = Vec::new();
        let range = part_range(bytes, self.chunk_bytes, part.into());
        let mut at = u64::from(slot) * self.memory.slot_bytes;
        let first = starts.partition_point(|start| *start <= range.start) - 1;
        let begun = starts[first..]
            .iter()
            .take_while(|&&start| start < range.end);
        for (set, &start) in sets[first..].iter().zip(begun) {
            let from = range.start.saturating_sub(start);
            let to = (range.end - start).min(set.local.bytes());
            for cut in cuts(&set.local, set.order, from..to) {
                let packed = cut.packed(set.order, at);
                at += cut.bytes();
                out.push(pair(set, [cut.of(&set.local), packed, cut.of(&set.remote)]));
            }
        }
        out
    }

    /// Between device memory and a slot.
    pub(super) fn near_sets(
        &self,
        sets: &[SetPair],
        starts: &[u64],
        bytes: u64,
        part: u32,
        slot: u32,
    ) -> Vec<SetPair> {
        let pair = |set: &SetPair, [local, packed, _]: [BlockSet; 3]| SetPair {
            local_region: set.local_region.clone(),
            local,
            remote_region: self.memory.beside.clone(),
            remote: packed,
            order: set.order,
        };
        self.cut(sets, starts, bytes, part, slot, pair)
    }

    /// Between a slot and the far side.
    fn far_sets(
        &self,
        sets: &[SetPair],
        starts: &[u64],
        bytes: u64,
        part: u32,
        slot: u32,
    ) -> Vec<SetPair> {
        let pair = |set: &SetPair, [_, packed, remote]: [BlockSet; 3]| SetPair {
            local_region: self.memory.region.clone(),
            local: packed,
            remote_region: set.remote_region.clone(),
            remote,
            order: set.order,
        };
        self.cut(sets, starts, bytes, part, slot, pair)
    }

    /// What a half of a part does, and the session that it is posted to; whether a device does it.
    pub(super) fn half<'a>(
        &'a self,
        near: &dyn Near,
        transfer: &'a TransferState,
        work: &Work,
        part: u32,
        half: Half,
    ) -> Result<(Work, &'a Arc<Session>, bool), TransferError> {
        let Work {
            op, sets, starts, ..
        } = work;
        let (core, bytes) = (&transfer.core, work.plan.bytes);
        let (slot, by_device) = match (half, op) {
            (Half::Fill(slot), Op::Write) | (Half::Drain(slot), Op::Read) => (slot, true),
            (Half::Fill(slot), Op::Read) | (Half::Drain(slot), Op::Write) => (slot, false),
            (Half::Seal, _) => {
                let sealed = match &self.far {
                    Far::File(file) => Some(file.sync(&transfer.session)),
                    #[cfg(feature = "object")]
                    Far::Objects(_) => None,
                    Far::Peer { .. } => None,
                };
                let nothing = || TransferError::Staging {
                    reason: "nothing follows its parts".to_owned(),
                };
                let sealed = sealed.ok_or_else(nothing)?;
                return Ok((sealed, &transfer.session, false));
            }
        };
        if by_device {
            let sets = self.near_sets(sets, starts, bytes, part, slot);
            let (path, parts, _) = near.plan(core, *op, &sets).map_err(no_longer)?;
            let work = part_work(*op, sets, (path, parts), Lane::Cuda);
            return Ok((work, &self.memory.session, true));
        }
        let sets = self.far_sets(sets, starts, bytes, part, slot);
        let mut made = self.far_work(core, &transfer.session, *op, sets)?;
        made.grant = work.grant.clone();
        Ok((made, &transfer.session, false))
    }

    fn far_work(
        &self,
        core: &Core,
        session: &Arc<Session>,
        op: Op,
        sets: Vec<SetPair>,
    ) -> Result<Work, TransferError> {
        let lane = session.lane().lane;
        let routed = match &self.far {
            Far::File(file) => file.route(&core.config.storage, &sets).map_err(no_longer)?,
            #[cfg(feature = "object")]
            Far::Objects(objects) => {
                // Whole blocks of one set, numbered like the objects.
                let numbers = sets.first().and_then(|set| set.remote.ids.as_span());
                let (first, parts) = numbers.unwrap_or_default();
                let part = first as usize..first as usize + parts as usize;
                (Path::Objects(Arc::new(objects.part(part))), parts)
            }
            Far::Peer { streamed } => crate::op::route(core, session, &sets, *streamed),
        };
        Ok(part_work(op, sets, routed, lane))
    }
}

/// An operation that is a part of another.
fn part_work(op: Op, sets: Vec<SetPair>, (path, parts): (Path, u32), lane: Lane) -> Work {
    let mut bytes = 0;
    let mut starts = Vec::with_capacity(sets.len());
    for set in &sets {
        starts.push(bytes);
        bytes += set.local.bytes();
    }
    let plan = Plan {
        op,
        bytes,
        runs: 0,
        pieces: 0,
        sets: sets.len(),
        parts,
        lane,
        reason: String::new(),
    };
    Work {
        op,
        sets,
        tensors: Vec::new(),
        starts,
        path,
        parts,
        grant: None,
        plan,
    }
}

/// What was possible when the operation was prepared and is not any more.
fn no_longer(error: PrepareError) -> TransferError {
    match error {
        PrepareError::Device { device, error } => TransferError::Device(DeviceFailure {
            device,
            poisoned: error.poisons(),
            error,
        }),
        PrepareError::Cuda(CudaUnavailable::Lost { device, error }) => {
            TransferError::Device(DeviceFailure {
                device,
                error,
                poisoned: true,
            })
        }
        other => TransferError::Staging {
            reason: other.to_string(),
        },
    }
}
