//! Checks of an operation before it is planned.

use super::request::Op;
use super::work::SetPair;
use crate::agent::Session;
use crate::config::RemoteAccess;
use crate::error::{PrepareError, Side};
use crate::plan::{BlockSet, LayoutError};
use crate::window::Grant;

pub(crate) fn check_range(
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

pub(crate) fn check_set(set: &SetPair) -> Result<(), PrepareError> {
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
