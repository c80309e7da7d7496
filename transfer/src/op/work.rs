//! What a posted operation does: checked pairs of block sets, and how their bytes move.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::request::{Op, Plan};
use crate::agent::{ForeignMemory, MappedMemory, RemoteMemory, RemoteRegion};
use crate::cuda::DeviceWork;
use crate::error::PostError;
use crate::memory::{Batch, Region, Stores, copy_piece, copy_row, publish};
use crate::plan::{BlockSet, Order, Row, TensorPair, for_each_segment, part_range, stripes};
use crate::stage::StagedWork;
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
    /// By RDMA, in parts of this many bytes.
    Rdma { part_bytes: u64 },
    /// Through the streams of the connection.
    Stream { stripes: Vec<Stripe> },
    /// By a device.
    Device(Arc<DeviceWork>),
    /// From or to a device through staging memory, part by part.
    Staged(Arc<StagedWork>),
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

/// A copy that rearranges blocks on the way: what [`SetPair`] is for copies that do not.
#[derive(Debug)]
pub(crate) struct TensorCopy {
    pub(crate) local_region: Arc<Region>,
    pub(crate) remote_region: Arc<RemoteRegion>,
    /// From the local region for a WRITE, from the remote one for a READ.
    pub(crate) pair: TensorPair,
}

/// What a posted operation does; shared by all postings.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) op: Op,
    /// Pairs of block sets, or `tensors`.
    pub(crate) sets: Vec<SetPair>,
    /// Copies that rearrange, for paths that take them as they are. All of them are between the
    /// same two regions, and have runs of one length. Other paths have them as `sets`.
    pub(crate) tensors: Vec<TensorCopy>,
    /// Logical offset at which each set or tensor begins.
    pub(crate) starts: Vec<u64>,
    pub(crate) path: Path,
    pub(crate) parts: u32,
    pub(crate) grant: Option<Arc<Grant>>,
    pub(crate) plan: Plan,
}

impl Work {
    /// The launches of an operation that a device does.
    pub(crate) fn device(&self) -> Option<&DeviceWork> {
        if let Path::Device(work) = &self.path {
            Some(work)
        } else {
            None
        }
    }

    /// How an operation goes through staging memory.
    pub(crate) fn staged(&self) -> Option<&Arc<StagedWork>> {
        if let Path::Staged(work) = &self.path {
            Some(work)
        } else {
            None
        }
    }

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
        for (index, region) in self.regions().enumerate() {
            if !region.begin_use() {
                self.end_use_of(index);
                return Err(PostError::RegionReleased { region: region.id });
            }
        }
        Ok(())
    }

    /// The memory of the peer, once for each time that it is in use by one posting.
    fn regions(&self) -> impl Iterator<Item = &Arc<RemoteRegion>> {
        let tensors = self.tensors.iter().take(1).map(|copy| &copy.remote_region);
        tensors.chain(self.sets.iter().map(|set| &set.remote_region))
    }

    /// None of the bytes of that posting moves any more.
    pub(crate) fn end_use(&self) {
        self.end_use_of(usize::MAX);
    }

    fn end_use_of(&self, regions: usize) {
        if let Some(grant) = &self.grant {
            grant.usage.end();
        }
        for region in self.regions().take(regions) {
            region.end_use();
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
        let within = |start: u64, bytes: u64| {
            range.start.saturating_sub(start)..range.end.saturating_sub(start).min(bytes)
        };
        let starts = self.starts[first..]
            .iter()
            .take_while(|start| **start < range.end);
        if self.tensors.is_empty() {
            for (set, &start) in self.sets[first..].iter().zip(starts) {
                let within = within(start, set.local.bytes());
                match &set.remote_region.memory {
                    RemoteMemory::Mapped(at) => set.copy_mapped(at, self.op, within, stores),
                    RemoteMemory::Foreign(at) => set.copy_foreign(at, self.op, within)?,
                    RemoteMemory::Device(_)
                    | RemoteMemory::Rdma(_)
                    | RemoteMemory::Streamed(_)
                    | RemoteMemory::Stored
                    | RemoteMemory::Unreachable(_) => {}
                }
            }
        } else {
            for (copy, &start) in self.tensors[first..].iter().zip(starts) {
                let within = within(start, copy.pair.bytes());
                match &copy.remote_region.memory {
                    RemoteMemory::Mapped(at) => copy.copy_mapped(at, self.op, within, stores),
                    RemoteMemory::Foreign(at) => copy.copy_foreign(at, self.op, within)?,
                    RemoteMemory::Device(_)
                    | RemoteMemory::Rdma(_)
                    | RemoteMemory::Streamed(_)
                    | RemoteMemory::Stored
                    | RemoteMemory::Unreachable(_) => {}
                }
            }
        }
        publish(stores);
        Ok(())
    }
}

impl Work {
    /// Calls `f(local region, remote region, offset here, offset there, bytes)` for the contiguous
    /// pieces of part `part` of an operation that goes by RDMA.
    pub(crate) fn for_each_piece(
        &self,
        part: u32,
        mut f: impl FnMut(&Region, &RemoteRegion, u64, u64, u64),
    ) {
        let Path::Rdma { part_bytes } = self.path else {
            return;
        };
        let range = part_range(self.plan.bytes, part_bytes, u64::from(part));
        let first = self.starts.partition_point(|start| *start <= range.start) - 1;
        let within = |start: u64, bytes: u64| {
            range.start.saturating_sub(start)..range.end.saturating_sub(start).min(bytes)
        };
        let starts = self.starts[first..]
            .iter()
            .take_while(|start| **start < range.end);
        if self.tensors.is_empty() {
            for (set, &start) in self.sets[first..].iter().zip(starts) {
                let within = within(start, set.local.bytes());
                let (local, remote) = set.ends();
                for_each_segment(&set.local, &set.remote, set.order, within, |l, r, bytes| {
                    f(local, remote, l, r, bytes);
                });
            }
        } else {
            for (copy, &start) in self.tensors[first..].iter().zip(starts) {
                let within = within(start, copy.pair.bytes());
                let (local, remote) = copy.ends();
                copy.pair.for_each_row(within, |row| {
                    for run in 0..row.count {
                        let from = row.from + run * row.from_step;
                        let to = row.to + run * row.to_step;
                        let (l, r) = match self.op {
                            Op::Write => (from, to),
                            Op::Read => (to, from),
                        };
                        f(local, remote, l, r, row.bytes);
                    }
                });
            }
        }
    }
}

impl TensorCopy {
    /// The regions of both sides.
    pub(crate) fn ends(&self) -> (&Region, &RemoteRegion) {
        (&self.local_region, &self.remote_region)
    }

    fn copy_mapped(&self, remote: &MappedMemory, op: Op, within: Range<u64>, stores: Stores) {
        let (from, to) = match op {
            Op::Write => (self.local_region.base(), remote.base()),
            Op::Read => (remote.base(), self.local_region.base()),
        };
        self.pair.for_each_row(within, |row| {
            // SAFETY: the pair was planned for these regions, which `self` keeps alive: its rows
            // lie in them. The crate forms no references into regions.
            unsafe { copy_row(from, to, row, stores) };
        });
    }

    /// One call of the kernel for many runs.
    fn copy_foreign(&self, remote: &ForeignMemory, op: Op, within: Range<u64>) -> io::Result<()> {
        let mut calls = KernelCopy::new(remote, op);
        self.pair.for_each_row(within, |row| {
            let Row {
                from,
                to,
                count,
                from_step,
                to_step,
                bytes,
            } = row;
            for run in 0..count {
                let (from, to) = (from + run * from_step, to + run * to_step);
                let (l, r) = if op == Op::Write {
                    (from, to)
                } else {
                    (to, from)
                };
                // SAFETY: the pair was planned for these regions, which `self` keeps alive.
                unsafe { calls.add(&self.local_region, l, r, bytes) };
            }
        });
        calls.end()
    }
}

/// Copies by the kernel, many pieces a call.
struct KernelCopy<'a> {
    remote: &'a ForeignMemory,
    write: bool,
    batch: Batch,
    result: io::Result<()>,
}

impl<'a> KernelCopy<'a> {
    fn new(remote: &'a ForeignMemory, op: Op) -> Self {
        Self {
            remote,
            write: op == Op::Write,
            batch: Batch::default(),
            result: Ok(()),
        }
    }

    /// Adds a piece, unless an earlier one failed.
    ///
    /// # Safety
    /// Both ranges lie in their regions, which outlive `self`; the crate forms no references into
    /// regions.
    unsafe fn add(&mut self, local: &Region, l: u64, r: u64, bytes: u64) {
        if self.result.is_err() {
            return;
        }
        // Offsets lie inside regions, whose lengths are usize.
        let [l, bytes] = [l, bytes].map(|v| usize::try_from(v).unwrap_or(usize::MAX));
        // SAFETY: by the contract of this function.
        let l = unsafe { local.base().add(l) };
        self.batch.push(l, self.remote.base.wrapping_add(r), bytes);
        if self.batch.full() {
            self.flush();
        }
    }

    fn flush(&mut self) {
        // SAFETY: the pieces lie in regions that outlive `self`, by the contract of `add`.
        self.result = unsafe { self.remote.process.copy(&self.batch, self.write) };
        self.batch.clear();
    }

    fn end(mut self) -> io::Result<()> {
        if self.result.is_ok() && !self.batch.is_empty() {
            self.flush();
        }
        self.result
    }
}

impl SetPair {
    /// The regions of both sides.
    pub(crate) fn ends(&self) -> (&Region, &RemoteRegion) {
        (&self.local_region, &self.remote_region)
    }

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
        let mut calls = KernelCopy::new(remote, op);
        for_each_segment(
            &self.local,
            &self.remote,
            self.order,
            within,
            |l, r, bytes| {
                // SAFETY: both sets are validated against these regions, which `self` keeps alive.
                unsafe { calls.add(&self.local_region, l, r, bytes) };
            },
        );
        calls.end()
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
