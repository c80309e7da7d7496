//! A store as its session sees it.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::agent::{RemoteRegion, Session};
use crate::backend::{Backend, Refusal};
use crate::error::TransferError;
use crate::memory::RegionId;
use crate::op::TransferState;
use crate::window::{Grant, WindowId};

/// What moves the bytes of stores.
pub(crate) trait Moves: fmt::Debug + Send + Sync {
    /// Starts moving; claimed parts are given back one by one.
    fn transfer(&self, transfer: &Arc<TransferState>);

    /// The transfer is called off.
    fn stop(&self, transfer: &Arc<TransferState>);
}

#[derive(Debug)]
pub(crate) struct StoreBackend<E> {
    engine: Arc<E>,
}

impl<E: Moves> StoreBackend<E> {
    pub(crate) const fn new(engine: Arc<E>) -> Self {
        Self { engine }
    }
}

impl<E: Moves> Backend for StoreBackend<E> {
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
