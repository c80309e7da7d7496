//! Checks of an operation before it is planned.

use super::request::Op;
use super::work::SetPair;
use crate::agent::{RemoteMemory, Session};
use crate::config::RemoteAccess;
use crate::error::{PrepareError, Side};
use crate::plan::{BlockSet, LayoutError, for_each_segment};
use crate::window::Grant;

pub(super) fn check_range(
    side: Side,
    offset: u64,
    bytes: u64,
    region_bytes: u64,
) -> Result<(), PrepareError> {
    let end = offset.saturating_add(bytes);
    let source = if bytes == 0 {
        LayoutError::EmptyRange { start: offset, end }
    } else if end > region_bytes {
        LayoutError::OutOfRegion { end, region_bytes }
    } else {
        return Ok(());
    };
    Err(PrepareError::Layout { side, source })
}

pub(super) fn check_set(set: &SetPair) -> Result<(), PrepareError> {
    let SetPair { local, remote, .. } = set;
    for (what, l, r) in [
        (
            "number of blocks",
            local.ids.len() as u64,
            remote.ids.len() as u64,
        ),
        ("number of layers", layers(local), layers(remote)),
        (
            "bytes per run",
            local.layout.run_bytes,
            remote.layout.run_bytes,
        ),
    ] {
        if l != r {
            return Err(PrepareError::Mismatch {
                what,
                local: l,
                remote: r,
            });
        }
    }
    let limit = crate::plan::IDS_MAX;
    if local.ids.len() > limit {
        return Err(PrepareError::TooLarge {
            what: "number of blocks",
            got: local.ids.len() as u64,
            limit: limit as u64,
        });
    }
    let layout = |side, source| PrepareError::Layout { side, source };
    local
        .validate(set.local_region.len as u64)
        .map_err(|e| layout(Side::Local, e))?;
    remote
        .validate(set.remote_region.len)
        .map_err(|e| layout(Side::Remote, e))
}

fn layers(set: &BlockSet) -> u64 {
    u64::from(set.layers.end.saturating_sub(set.layers.start))
}

pub(super) fn check_window(
    session: &Session,
    set: &SetPair,
    op: Op,
    grant: Option<&Grant>,
) -> Result<(), PrepareError> {
    let region = set.remote_region.id;
    match grant {
        None => match set.remote_region.access {
            RemoteAccess::Open => Ok(()),
            RemoteAccess::WindowOnly => {
                let peer = session.peer_name().to_owned();
                Err(PrepareError::WindowRequired { peer, region })
            }
            RemoteAccess::None => {
                let peer = session.peer_name().to_owned();
                Err(PrepareError::AccessDenied { peer, region })
            }
        },
        Some(grant) => {
            let outside = |reason| PrepareError::OutsideWindow {
                window: grant.id,
                reason,
            };
            if grant.spec.region != region {
                return Err(outside(format!("region {region} is not the window's")));
            }
            if !grant.spec.access.allows(op == Op::Write) {
                return Err(outside(format!("it is open for {:?}", grant.spec.access)));
            }
            grant.spec.scope.covers(&set.remote).map_err(outside)
        }
    }
}

/// No destination byte may be named twice, nor be a source byte at another place.
pub(super) fn check_overlap(op: Op, sets: &[SetPair]) -> Result<(), PrepareError> {
    // One set of a layout without overlap needs its ids to differ, nothing more.
    if let [set] = sets {
        let to = if op == Op::Write {
            &set.remote
        } else {
            &set.local
        };
        let disjoint_layout = to.layout.block_stride >= to.layout.run_bytes;
        if disjoint_layout && !self_copy(set) {
            let mut seen = vec![0u64; (to.layout.blocks as usize).div_ceil(64)];
            for &id in to.ids.iter() {
                let (word, bit) = (id as usize / 64, 1u64 << (id % 64));
                if seen[word] & bit != 0 {
                    let offset = to
                        .layout
                        .run_offset(id, to.layers.start)
                        .unwrap_or_default();
                    return Err(PrepareError::Overlap { offset });
                }
                seen[word] |= bit;
            }
            return Ok(());
        }
    }
    // The general case: sort the pieces of the destination and of the source. A piece is (address
    // space, address, bytes, offset in its region); space 0 is this process.
    let mut to = Vec::new();
    let mut from = Vec::new();
    for set in sets {
        let local = set.local_region.base() as u64;
        let (space, remote) = match &set.remote_region.memory {
            RemoteMemory::Mapped(mapped) => (0, mapped.base() as u64),
            RemoteMemory::Streamed(_) => (set.remote_region.id.0.wrapping_add(1), 0),
        };
        for_each_segment(
            &set.local,
            &set.remote,
            set.order,
            0..set.local.bytes(),
            |l, r, bytes| {
                let l = (0, local.wrapping_add(l), bytes, l);
                let r = (space, remote.wrapping_add(r), bytes, r);
                let (source, destination) = if op == Op::Write { (l, r) } else { (r, l) };
                to.push(destination);
                from.push(source);
            },
        );
    }
    let end = |piece: &(u64, u64, u64, u64)| (piece.0, piece.1.saturating_add(piece.2));
    to.sort_unstable();
    for pair in to.windows(2) {
        if end(&pair[0]) > (pair[1].0, pair[1].1) {
            return Err(PrepareError::Overlap { offset: pair[1].3 });
        }
    }
    from.sort_unstable();
    let mut sources = from.iter().peekable();
    for piece in &to {
        while sources
            .next_if(|source| end(source) <= (piece.0, piece.1))
            .is_some()
        {}
        if sources
            .peek()
            .is_some_and(|source| (source.0, source.1) < end(piece))
        {
            return Err(PrepareError::Overlap { offset: piece.3 });
        }
    }
    Ok(())
}

/// Whether both sides of a set lie in the same memory of this process.
fn self_copy(set: &SetPair) -> bool {
    match &set.remote_region.memory {
        RemoteMemory::Mapped(mapped) => {
            let local = set.local_region.base() as usize;
            let remote = mapped.base() as usize;
            let remote_len = usize::try_from(set.remote_region.len).unwrap_or(usize::MAX);
            local < remote.saturating_add(remote_len)
                && remote < local.saturating_add(set.local_region.len)
        }
        RemoteMemory::Streamed(_) => false,
    }
}
