//! Preparing operations on objects.

use std::collections::HashSet;
use std::sync::Arc;

use super::{ObjectBlocks, ObjectWork};
use crate::agent::{Core, RemoteMemory, RemoteRegion};
use crate::config::{Lane, RemoteAccess};
use crate::error::{PrepareError, Side};
use crate::memory::RegionId;
use crate::op::{LocalBlocks, Op, Path, Prepared, SetPair, own_region};
use crate::plan::{BlockIds, BlockLayout, BlockSet, IDS_MAX, Order};
use crate::stage::{Far, Staged};
use crate::storage::measure::measure;

pub(crate) fn prepare_objects(
    core: &Arc<Core>,
    op: Op,
    local: LocalBlocks<'_>,
    blocks: ObjectBlocks<'_>,
) -> Result<Prepared, PrepareError> {
    let ObjectBlocks {
        store,
        keys,
        range,
        create_only,
    } = blocks;
    if !Arc::ptr_eq(core, &store.core) {
        return Err(PrepareError::ForeignStore {
            store: store.name().to_owned(),
        });
    }
    if keys.len() != local.ids.len() {
        return Err(PrepareError::Mismatch {
            what: "number of blocks",
            local: local.ids.len() as u64,
            remote: keys.len() as u64,
        });
    }
    let Some(count) = u32::try_from(keys.len())
        .ok()
        .filter(|_| keys.len() <= IDS_MAX)
    else {
        return Err(PrepareError::TooLarge {
            what: "number of blocks",
            got: keys.len() as u64,
            limit: IDS_MAX as u64,
        });
    };
    let invalid = |key: &str, reason: String| PrepareError::InvalidKey {
        key: key.to_owned(),
        reason,
    };
    let mut paths = Vec::with_capacity(keys.len());
    let mut seen = HashSet::with_capacity(keys.len());
    for key in keys {
        if op == Op::Write && !seen.insert(key) {
            return Err(invalid(key, "it is written twice".to_owned()));
        }
        paths.push(
            store
                .client
                .path(key)
                .map_err(|reason| invalid(key, reason))?,
        );
    }
    let local_region = own_region(core, local.registration)?;
    local
        .layout
        .validate(local_region.len as u64)
        .map_err(|source| PrepareError::Layout {
            side: Side::Local,
            source,
        })?;
    let layers = local.layers.end.saturating_sub(local.layers.start);
    let run_bytes = local.layout.run_bytes;
    // Layers of one block lie in one region, so their bytes fit.
    let object_bytes = u64::from(layers).saturating_mul(run_bytes);
    if let Some(range) = &range {
        if op == Op::Write {
            return Err(PrepareError::RangeOfWrite);
        }
        let bytes = range.end.saturating_sub(range.start);
        if bytes != object_bytes {
            return Err(PrepareError::Mismatch {
                what: "bytes per block",
                local: object_bytes,
                remote: bytes,
            });
        }
    }
    // To all checks the objects are one region of blocks.
    let layout = BlockLayout {
        offset: 0,
        blocks: count,
        block_stride: object_bytes,
        layers,
        layer_stride: run_bytes,
        run_bytes,
    };
    let set = SetPair {
        local_region,
        local: BlockSet::new(local.layout, local.ids, local.layers),
        remote_region: Arc::new(RemoteRegion::new(
            RegionId(0),
            i64::MAX.unsigned_abs(),
            RemoteAccess::Open,
            RemoteMemory::Stored,
        )),
        remote: BlockSet::new(
            layout,
            BlockIds::span(0, count).ok_or(PrepareError::Empty)?,
            0..layers,
        ),
        order: Order::BlockMajor,
    };
    let measured = measure(op, std::slice::from_ref(&set))?;
    let part_bytes = core.config.storage.object_part_bytes;
    let mut reason = format!(
        "{}; {count} objects of {object_bytes} bytes",
        store.session.lane().reason
    );
    match (op, &range) {
        (Op::Read, Some(range)) => {
            reason.push_str(&format!(", bytes {}..{} of each", range.start, range.end));
        }
        (Op::Read, None) => {}
        (Op::Write, _) if create_only => reason.push_str(", none of which may exist"),
        (Op::Write, _) if object_bytes > part_bytes => {
            let parts = object_bytes.div_ceil(part_bytes);
            reason.push_str(&format!(", each in {parts} parts"));
        }
        (Op::Write, _) => {}
    }
    let objects = Arc::new(ObjectWork {
        client: store.client.clone(),
        paths,
        object_bytes,
        range,
        create_only,
        part_bytes,
    });
    let sets = vec![set];
    let path = if core.stage.takes(&sets)? {
        let staged = Staged {
            op,
            sets: &sets,
            starts: &measured.starts,
            bytes: measured.bytes,
            why: "devices do not reach objects",
        };
        let (work, how) = core.stage.plan(core, &staged, Far::Objects(objects))?;
        reason.push_str("; ");
        reason.push_str(&how);
        let parts = work.parts();
        (Path::Staged(Arc::new(work)), parts)
    } else {
        (Path::Objects(objects), count)
    };
    let work = measured.work(op, sets, Lane::Object, path, reason);
    Ok(Prepared::new(
        core.clone(),
        store.session.clone(),
        Arc::new(work),
    ))
}
