//! An object store as the session sees it.

use std::sync::Arc;
use std::time::Instant;

use super::engine::Engine;
use crate::agent::{RemoteRegion, Session};
use crate::backend::{Backend, Refusal};
use crate::error::TransferError;
use crate::memory::RegionId;
use crate::op::TransferState;
use crate::window::{Grant, WindowId};

#[derive(Debug)]
pub(super) struct ObjectBackend {
    engine: Arc<Engine>,
}

impl ObjectBackend {
    pub(super) const fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

impl Backend for ObjectBackend {
    fn attach(&self, _session: &Arc<Session>) {}

    fn region(&self, _id: RegionId, _until: Instant) -> Result<RemoteRegion, Refusal> {
        // A store is no peer: it has no regions to ask for.
        Err(Refusal::Unknown)
    }

    fn window(
        &self,
        _session: &Arc<Session>,
        _id: WindowId,
        _until: Instant,
    ) -> Result<Arc<Grant>, Refusal> {
        Err(Refusal::Unknown)
    }

    fn start(&self, transfer: &Arc<TransferState>) {
        self.engine.transfer(transfer);
    }

    fn stop(&self, transfer: &Arc<TransferState>) {
        self.engine.stop(transfer);
    }

    fn notify(&self, transfer: &Arc<TransferState>) -> Option<Result<(), TransferError>> {
        Some(crate::storage::notify_self(transfer))
    }

    fn abandon(&self) {
        // Each transfer in flight was stopped before this.
    }

    fn close(&self) {}
}
