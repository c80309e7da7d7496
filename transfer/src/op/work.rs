//! What a posted operation does: checked pairs of block sets, and how their bytes move.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::request::{Op, Plan};
use crate::agent::{ForeignMemory, MappedMemory, RemoteMemory, RemoteRegion};
use crate::error::PostError;
use crate::memory::{Batch, Region, Stores, copy_piece, publish};
use crate::plan::{BlockSet, Order, for_each_segment, part_range, stripes};
use crate::storage::FileWork;
#[cfg(feature = "object")]
use crate::storage::ObjectWork;
use crate::window::Grant;

/// A stream gets no stripe below this size: a stripe costs a frame, an answer, and the attention of
/// one more socket.
const STRIPE_BYTES_MIN: u64 = 512 << 10;

/// How the bytes move.
#[derive(Clone, Debug)]
pub(crate) enum Path {
    /// Both sides are within reach of this process or of the kernel: copy in parts of this many
    /// bytes.
    Copy { part_bytes: u64 },
    /// Through the streams of the connection.
    Stream { stripes: Vec<Stripe> },
    /// From or to a file.
    File(Arc<FileWork>),
    /// From or to objects.
    #[cfg(feature = "object")]
    Objects(Arc<ObjectWork>),
}

/// A stretch of one pair of sets, to go over one stream.
#[derive(Clone, Debug)]
pub(crate) struct Stripe {
    pub(crate) stream: usize,
    pub(crate) set: usize,
    pub(crate) range: Range<u64>,
}

/// A pair of validated block sets of one shape.
#[derive(Debug)]
pub(crate) struct SetPair {
    pub(crate) local_region: Arc<Region>,
    pub(crate) local: BlockSet,
    pub(crate) remote_region: Arc<RemoteRegion>,
    pub(crate) remote: BlockSet,
    pub(crate) order: Order,
}

/// What a posted operation does; shared by all postings.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) op: Op,
    pub(crate) sets: Vec<SetPair>,
    /// Logical offset at which each set begins.
    pub(crate) starts: Vec<u64>,
    pub(crate) path: Path,
    pub(crate) parts: u32,
    pub(crate) grant: Option<Arc<Grant>>,
    pub(crate) plan: Plan,
}

impl Work {
    /// The requests of an operation on a file.
    pub(crate) fn file(&self) -> Option<&FileWork> {
        if let Path::File(work) = &self.path {
            Some(work)
        } else {
            None
        }
    }

    /// The objects of an operation on an object store.
    #[cfg(feature = "object")]
    pub(crate) fn objects(&self) -> Option<&Arc<ObjectWork>> {
        if let Path::Objects(work) = &self.path {
            Some(work)
        } else {
            None
        }
    }

    /// A posting is going to use the window and the memory of the peer; what it finds taken away
    /// is the error, and nothing is in use then.
    pub(crate) fn begin_use(&self) -> Result<(), PostError> {
        if let Some(grant) = &self.grant
            && !grant.usage.begin()
        {
            return Err(PostError::WindowClosed { window: grant.id });
        }
        for (index, set) in self.sets.iter().enumerate() {
            if !set.remote_region.begin_use() {
                self.end_use_of(&self.sets[..index]);
                return Err(PostError::RegionReleased {
                    region: set.remote_region.id,
                });
            }
        }
        Ok(())
    }

    /// None of the bytes of that posting moves any more.
    pub(crate) fn end_use(&self) {
        self.end_use_of(&self.sets);
    }

    fn end_use_of(&self, sets: &[SetPair]) {
        if let Some(grant) = &self.grant {
            grant.usage.end();
        }
        for set in sets {
            set.remote_region.end_use();
        }
    }

    /// Copies part `part`.
    ///
    /// # Errors
    /// The kernel refuses to copy into or out of the peer's process.
    pub(crate) fn copy_part(&self, part: u32) -> io::Result<()> {
        let Path::Copy { part_bytes } = self.path else {
            return Ok(());
        };
        let range = part_range(self.plan.bytes, part_bytes, u64::from(part));
        let stores = Stores::for_transfer(self.plan.bytes);
        let first = self.starts.partition_point(|start| *start <= range.start) - 1;
        for (set, &start) in self.sets[first..].iter().zip(&self.starts[first..]) {
            if start >= range.end {
                break;
            }
            let within =
                range.start.saturating_sub(start)..(range.end - start).min(set.local.bytes());
            match &set.remote_region.memory {
                RemoteMemory::Mapped(remote) => set.copy_mapped(remote, self.op, within, stores),
                RemoteMemory::Foreign(remote) => set.copy_foreign(remote, self.op, within)?,
                RemoteMemory::Streamed(_) | RemoteMemory::Stored => {}
            }
        }
        publish(stores);
        Ok(())
    }
}

impl SetPair {
    fn copy_mapped(&self, remote: &MappedMemory, op: Op, within: Range<u64>, stores: Stores) {
        let local = self.local_region.base();
        let remote = remote.base();
        for_each_segment(
            &self.local,
            &self.remote,
            self.order,
            within,
            |l, r, bytes| {
                // Offsets lie inside regions, whose lengths are usize.
                let [l, r, bytes] = [l, r, bytes].map(|v| usize::try_from(v).unwrap_or(usize::MAX));
                // SAFETY: the local set is validated against this region, which `self` keeps alive.
                let l = unsafe { local.add(l) };
                // SAFETY: the remote set is validated against this mapping, which `self` keeps.
                let r = unsafe { remote.add(r) };
                let (from, to) = match op {
                    Op::Write => (l.cast_const(), r),
                    Op::Read => (r.cast_const(), l),
                };
                // SAFETY: both ranges are inside live mappings; the crate forms no references.
                unsafe { copy_piece(from, to, bytes, stores) };
            },
        );
    }

    /// One call of the kernel for many pieces.
    fn copy_foreign(&self, remote: &ForeignMemory, op: Op, within: Range<u64>) -> io::Result<()> {
        let local = self.local_region.base();
        let mut batch = Batch::default();
        let mut result = Ok(());
        let copy = |batch: &mut Batch| {
            // SAFETY: the pieces lie in a region that `self` keeps alive; the crate forms no
            // references into regions.
            let copied = unsafe { remote.process.copy(batch, op == Op::Write) };
            batch.clear();
            copied
        };
        for_each_segment(
            &self.local,
            &self.remote,
            self.order,
            within,
            |l, r, bytes| {
                if result.is_err() {
                    return;
                }
                // Offsets lie inside regions, whose lengths are usize.
                let [l, bytes] = [l, bytes].map(|v| usize::try_from(v).unwrap_or(usize::MAX));
                // SAFETY: the local set is validated against this region.
                let l = unsafe { local.add(l) };
                batch.push(l, remote.base.wrapping_add(r), bytes);
                if batch.full() {
                    result = copy(&mut batch);
                }
            },
        );
        if result.is_ok() && !batch.is_empty() {
            result = copy(&mut batch);
        }
        result
    }
}

/// Spreads the sets over the streams: one set is striped, several are dealt out by bytes.
pub(super) fn stripe_sets(sets: &[SetPair], bytes: u64, streams: usize) -> Vec<Stripe> {
    let mut out = Vec::new();
    let per_stream = bytes.div_ceil(streams.max(1) as u64).max(STRIPE_BYTES_MIN);
    let mut filled = 0u64;
    for (index, set) in sets.iter().enumerate() {
        if set.local.bytes() > per_stream {
            for (k, range) in stripes(set.local.bytes(), streams, STRIPE_BYTES_MIN).enumerate() {
                out.push(Stripe {
                    stream: k % streams.max(1),
                    set: index,
                    range,
                });
            }
        } else {
            let stream = usize::try_from(filled / per_stream).unwrap_or(0) % streams.max(1);
            out.push(Stripe {
                stream,
                set: index,
                range: 0..set.local.bytes(),
            });
            filled += set.local.bytes();
        }
    }
    out
}
