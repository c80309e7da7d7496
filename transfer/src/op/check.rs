//! Checks of an operation before it is planned.

use super::request::Op;
use super::work::SetPair;
use crate::agent::{RemoteRegion, Session};
use crate::config::RemoteAccess;
use crate::error::{PrepareError, Side};
use crate::plan::{BlockSet, LayoutError};
use crate::window::{Grant, Scope};

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
    check_layout(Side::Local, local, set.local_region.len as u64)?;
    check_layout(Side::Remote, remote, set.remote_region.len)
}

/// Ids, layers and bounds of one side.
pub(super) fn check_layout(
    side: Side,
    set: &BlockSet,
    region_bytes: u64,
) -> Result<(), PrepareError> {
    set.validate(region_bytes)
        .map_err(|source| PrepareError::Layout { side, source })
}

fn layers(set: &BlockSet) -> u64 {
    u64::from(set.layers.end.saturating_sub(set.layers.start))
}

pub(super) fn check_window(
    session: &Session,
    remote: &RemoteRegion,
    op: Op,
    grant: Option<&Grant>,
    covers: impl FnOnce(&Scope) -> Result<(), String>,
) -> Result<(), PrepareError> {
    let region = remote.id;
    match grant {
        None => match remote.access {
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
            covers(&grant.spec.scope).map_err(outside)
        }
    }
}
