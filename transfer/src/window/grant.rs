//! The initiator's side of a window: its scope, and the transfers that use it.

use std::sync::Arc;

use super::usage::{Acknowledge, Usage};
use super::{Scope, WindowAccess, WindowId};
use crate::memory::RegionId;

/// What the owner says about one of its windows.
#[derive(Debug)]
pub(crate) struct GrantSpec {
    pub(crate) region: RegionId,
    pub(crate) scope: Scope,
    pub(crate) access: WindowAccess,
}

/// A window as this agent sees it.
#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) id: WindowId,
    pub(crate) spec: GrantSpec,
    pub(crate) usage: Usage,
}

impl Grant {
    pub(crate) fn new(id: WindowId, spec: GrantSpec, acknowledge: Acknowledge) -> Arc<Self> {
        Arc::new(Self {
            id,
            spec,
            usage: Usage::new(acknowledge),
        })
    }
}
