//! Another agent: how to reach it, and which of its memory it has told about.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockplane_transfer::{Agent, Metadata, Peer, RegionId};
use parking_lot::{Mutex, RwLock};

use super::error::Fault;
use super::metadata::Blob;
use super::table::Table;

/// After a connection failed, calls fail at once for this long: an engine that sends heartbeats to a
/// stopped peer does not wait for each of them.
const BACK_OFF: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Remote {
    /// The life that this is about.
    pub(super) epoch: u64,
    peer: Peer,
    metadata: Metadata,
    table: RwLock<Arc<Table<RegionId>>>,
    failed: Mutex<Option<(Instant, String)>>,
}

impl Remote {
    pub(super) fn new(peer: Peer, metadata: Metadata, blob: Blob) -> Self {
        Self {
            epoch: blob.epoch,
            peer,
            metadata,
            table: RwLock::new(Arc::new(Table::new(blob.sections))),
            failed: Mutex::default(),
        }
    }

    pub(super) const fn peer(&self) -> &Peer {
        &self.peer
    }

    pub(super) fn name(&self) -> &str {
        self.peer.name()
    }

    pub(super) fn table(&self) -> Arc<Table<RegionId>> {
        self.table.read().clone()
    }

    /// Takes newer metadata of the same life: all of it takes the place of what was known, a part is
    /// added.
    pub(super) fn extend(&self, blob: Blob) {
        let mut table = self.table.write();
        let mut sections = blob.sections;
        if !blob.complete {
            let known = table.sections().iter();
            let fresh: std::collections::HashSet<RegionId> =
                sections.iter().map(|section| section.target).collect();
            let kept = known.filter(|section| !fresh.contains(&section.target));
            sections.extend(kept.cloned().collect::<Vec<_>>());
        }
        *table = Arc::new(Table::new(sections));
    }

    /// Connects if there is no living connection.
    pub(super) fn connect(&self, agent: &Agent, timeout: Duration) -> Result<(), Fault> {
        if self.peer.is_connected() {
            return Ok(());
        }
        let mut failed = self.failed.lock();
        if let Some((at, why)) = &*failed
            && at.elapsed() < BACK_OFF
        {
            return Err(Fault::Disconnected(why.clone()));
        }
        match agent.connect(&self.metadata, timeout) {
            Ok(_) => {
                *failed = None;
                Ok(())
            }
            Err(error) => {
                let fault = Fault::from(error);
                *failed = Some((Instant::now(), fault.to_string()));
                Err(fault)
            }
        }
    }
}
