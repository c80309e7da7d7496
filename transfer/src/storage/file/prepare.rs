//! Preparing operations on files.

use std::fmt::Write;
use std::sync::Arc;

use super::open::StoredFile;
use super::plan::{REQUESTS_MAX, Requests, Rules, Summary};
use super::work::FileWork;
use super::{FileBlocks, FileRanges, FileStore};
use crate::agent::{Core, RemoteMemory, RemoteRegion, Session};
use crate::config::{Lane, RemoteAccess};
use crate::error::{PrepareError, Side};
use crate::memory::{Region, RegionId};
use crate::op::{
    Descriptor, LocalBlocks, Op, Path, Plan, Prepared, SetPair, Work, check_range, own_region,
    pair_blocks,
};
use crate::plan::{BlockSet, DescriptorList, DescriptorPair, Order, Table};
use crate::stage::{Far, Staged};
use crate::storage::StorageConfig;
use crate::storage::measure::{Measured, measure};

/// Files have no end to be checked against before the transfer: reads behind it fail then, writes
/// make it longer.
const FILE_BYTES_MAX: u64 = i64::MAX.unsigned_abs();

/// A file takes the place of a peer's region.
fn region() -> Arc<RemoteRegion> {
    Arc::new(RemoteRegion::new(
        RegionId(0),
        FILE_BYTES_MAX,
        RemoteAccess::Open,
        RemoteMemory::Stored,
    ))
}

fn check_store(core: &Arc<Core>, file: &FileStore, op: Op) -> Result<(), PrepareError> {
    if !Arc::ptr_eq(core, &file.core) {
        return Err(PrepareError::ForeignStore {
            store: file.name().to_owned(),
        });
    }
    if op == Op::Write && file.file.read_only() {
        return Err(PrepareError::ReadOnlyStore {
            store: file.name().to_owned(),
        });
    }
    Ok(())
}

pub(crate) fn prepare_blocks(
    core: &Arc<Core>,
    op: Op,
    local: LocalBlocks<'_>,
    blocks: FileBlocks<'_>,
) -> Result<Prepared, PrepareError> {
    check_store(core, blocks.file, op)?;
    let set = BlockSet::new(blocks.layout, blocks.ids, blocks.layers);
    let pair = pair_blocks(core, local, || Ok(region()), set)?;
    finish(core, blocks.file, op, vec![pair], blocks.durable)
}

pub(crate) fn prepare_descriptors(
    core: &Arc<Core>,
    op: Op,
    local: &[Descriptor<'_>],
    ranges: FileRanges<'_>,
) -> Result<Prepared, PrepareError> {
    check_store(core, ranges.file, op)?;
    if local.len() != ranges.offsets.len() {
        return Err(PrepareError::Mismatch {
            what: "number of descriptors",
            local: local.len() as u64,
            remote: ranges.offsets.len() as u64,
        });
    }
    let remote_region = region();
    let mut regions: Vec<Arc<Region>> = Vec::new();
    let mut known = Table::with_capacity(64);
    let mut pairs = DescriptorList::with_capacity(local.len());
    for (l, &remote_offset) in local.iter().zip(ranges.offsets) {
        let registration = l.registration.region();
        let local_region = known.number_of([Arc::as_ptr(registration) as u64]);
        if local_region == regions.len() {
            regions.push(own_region(core, l.registration)?);
        }
        let len = regions[local_region].len as u64;
        check_range(Side::Local, l.offset, l.bytes, len)?;
        check_range(Side::Remote, remote_offset, l.bytes, FILE_BYTES_MAX)?;
        pairs.push(DescriptorPair {
            local_region,
            local_offset: l.offset,
            remote_region: 0,
            remote_offset,
            bytes: l.bytes,
        });
    }
    let sets = pairs.compress(|set| SetPair {
        local_region: regions[set.local_region].clone(),
        local: set.local,
        remote_region: remote_region.clone(),
        remote: set.remote,
        order: Order::BlockMajor,
    });
    finish(core, ranges.file, op, sets, ranges.durable)
}

fn finish(
    core: &Arc<Core>,
    file: &FileStore,
    op: Op,
    sets: Vec<SetPair>,
    durable: bool,
) -> Result<Prepared, PrepareError> {
    let measured = measure(op, &sets)?;
    if core.stage.takes(&sets)? {
        return finish_staged(core, file, op, sets, measured, durable);
    }
    let rules = Rules::new(
        file.file.direct_use(),
        core.config.storage.file_request_bytes,
    );
    let requests = Requests::new(&sets, &rules).map_err(|_| PrepareError::TooLarge {
        what: "number of requests",
        got: measured.pieces,
        limit: REQUESTS_MAX as u64,
    })?;
    let durable = durable && op == Op::Write;
    let summary = requests.summary();
    let work = FileWork {
        file: file.file.clone(),
        requests,
        durable,
    };
    let parts = work.requests() + u32::from(durable);
    let reason = reason(file, &summary, rules.direct.is_some(), durable);
    let path = (Path::File(Arc::new(work)), parts);
    let work = measured.work(op, sets, Lane::File, path, reason);
    Ok(file.prepared(core, work))
}

/// Device memory: the requests are made part by part, for staging memory.
fn finish_staged(
    core: &Arc<Core>,
    file: &FileStore,
    op: Op,
    sets: Vec<SetPair>,
    measured: Measured,
    durable: bool,
) -> Result<Prepared, PrepareError> {
    let durable = durable && op == Op::Write;
    let staged = Staged {
        op,
        sets: &sets,
        starts: &measured.starts,
        bytes: measured.bytes,
        why: "devices do not reach files",
    };
    let far = StagedFile {
        file: file.file.clone(),
        durable,
    };
    let (work, how) = core.stage.plan(core, &staged, Far::File(far))?;
    let mut reason = file.session.lane().reason.clone();
    reason.push_str("; ");
    reason.push_str(&how);
    if durable {
        reason.push_str("; then fdatasync");
    }
    let parts = work.parts();
    let path = (Path::Staged(Arc::new(work)), parts);
    let work = measured.work(op, sets, Lane::File, path, reason);
    Ok(file.prepared(core, work))
}

impl FileStore {
    fn prepared(&self, core: &Arc<Core>, work: Work) -> Prepared {
        Prepared::new(core.clone(), self.session.clone(), Arc::new(work))
    }
}

/// The file of a staged operation.
#[derive(Debug)]
pub(crate) struct StagedFile {
    file: Arc<StoredFile>,
    /// Whether a sync follows the parts.
    pub(crate) durable: bool,
}

impl StagedFile {
    /// The requests of a part, from or to host memory.
    pub(crate) fn route(
        &self,
        config: &StorageConfig,
        sets: &[SetPair],
    ) -> Result<(Path, u32), PrepareError> {
        let rules = Rules::new(self.file.direct_use(), config.file_request_bytes);
        let requests = Requests::new(sets, &rules).map_err(|_| PrepareError::TooLarge {
            what: "number of requests of a part",
            got: sets.len() as u64,
            limit: REQUESTS_MAX as u64,
        })?;
        let work = FileWork {
            file: self.file.clone(),
            requests,
            durable: false,
        };
        let parts = work.requests();
        Ok((Path::File(Arc::new(work)), parts))
    }

    /// What makes all parts durable.
    pub(crate) fn sync(&self, session: &Session) -> Work {
        sync_work(&self.file, session)
    }
}

fn reason(file: &FileStore, summary: &Summary, direct: bool, durable: bool) -> String {
    let mut reason = file.session.lane().reason.clone();
    let requests = summary.direct + summary.buffered;
    // Writing to a string does not fail.
    let _ = write!(reason, "; {requests} requests");
    if summary.vectored > 0 {
        let _ = write!(reason, ", {} of them vectored", summary.vectored);
    }
    if direct && summary.buffered > 0 {
        let _ = write!(
            reason,
            "; {} requests of {} bytes are not aligned and go through the page cache",
            summary.buffered, summary.buffered_bytes
        );
    }
    if durable {
        reason.push_str("; then fdatasync");
    }
    reason
}

/// An operation without bytes that makes durable what was written before.
pub(super) fn sync_work(file: &Arc<StoredFile>, session: &Session) -> Work {
    let plan = Plan {
        op: Op::Write,
        bytes: 0,
        runs: 0,
        pieces: 0,
        sets: 0,
        parts: 1,
        lane: Lane::File,
        reason: format!("{}; fdatasync", session.lane().reason),
    };
    Work {
        op: Op::Write,
        sets: Vec::new(),
        tensors: Vec::new(),
        starts: Vec::new(),
        path: Path::File(Arc::new(FileWork {
            file: file.clone(),
            requests: Requests::default(),
            durable: true,
        })),
        parts: 1,
        grant: None,
        plan,
    }
}
