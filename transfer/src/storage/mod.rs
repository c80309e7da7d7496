//! Stored blocks: files and objects. They are no peers, but operations on them are prepared, posted,
//! awaited and cancelled like all others.
//!
//! Each open store is one internal session whose backend hands claimed parts to an engine of the
//! agent: the io_uring thread (or its substitute) for files, a small runtime for objects. Engines
//! start with the first store.

mod backend;
mod config;
mod error;
mod file;
mod measure;
#[cfg(feature = "object")]
mod object;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

pub use config::{
    DirectIo, DirectUse, FileAccess, FileConfig, FileCreation, FileEngine, FileInfo, FileSource,
    StorageConfig,
};
pub use error::{OpenError, StorageAction, StorageError, StorageErrorKind};
pub use file::{FileBlocks, FileRanges, FileStore};
#[cfg(feature = "object")]
pub use object::{
    AzureConfig, AzureCredentials, GcsConfig, GcsCredentials, ObjectBlocks, ObjectConfig,
    ObjectInfo, ObjectList, ObjectLocation, ObjectStore, S3Config, S3Credentials, Secret,
};

pub(crate) use backend::{Moves, StoreBackend};
pub(crate) use file::{
    FileWork, StagedFile, prepare_blocks as prepare_file_blocks,
    prepare_descriptors as prepare_file_descriptors,
};

#[cfg(feature = "object")]
pub(crate) use object::{ObjectWork, prepare_objects};

use crate::agent::Session;
use crate::error::{LossCause, Rejection, TransferError};
use crate::memory::RegionId;
use crate::op::{Notification, TransferState};

/// Everything about stored blocks that one agent has.
#[derive(Debug, Default)]
pub(crate) struct Storage {
    files: Mutex<Option<Arc<file::Engine>>>,
    #[cfg(feature = "object")]
    objects: Mutex<Option<Arc<object::Engine>>>,
    sessions: Mutex<Vec<Weak<Session>>>,
}

impl Storage {
    /// The engine for files, started now if it is the first time.
    fn file_engine(
        &self,
        agent: &str,
        config: &StorageConfig,
    ) -> Result<Arc<file::Engine>, OpenError> {
        let mut files = self.files.lock();
        if let Some(engine) = &*files {
            return Ok(engine.clone());
        }
        let engine = Arc::new(file::Engine::start(agent, config)?);
        *files = Some(engine.clone());
        Ok(engine)
    }

    /// The engine for objects, started now if it is the first time.
    #[cfg(feature = "object")]
    fn object_engine(&self, config: &StorageConfig) -> Result<Arc<object::Engine>, OpenError> {
        let mut objects = self.objects.lock();
        if let Some(engine) = &*objects {
            return Ok(engine.clone());
        }
        let engine =
            object::Engine::start(config.object_concurrency).map_err(|source| OpenError::Io {
                what: "start a runtime",
                name: "for objects".to_owned(),
                source,
            })?;
        let engine = Arc::new(engine);
        *objects = Some(engine.clone());
        Ok(engine)
    }

    /// Remembers an open store, to end its operations when the agent stops.
    fn watch(&self, session: &Arc<Session>) {
        let mut sessions = self.sessions.lock();
        // Amortised: the list at most doubles between two sweeps.
        if sessions.len() == sessions.capacity() {
            sessions.retain(|known| known.strong_count() > 0);
        }
        sessions.push(Arc::downgrade(session));
    }

    /// The registration of a region has ended.
    pub(crate) fn forget_region(&self, region: RegionId) {
        let files = self.files.lock().clone();
        if let Some(files) = files {
            files.forget_region(region);
        }
    }

    /// The agent stops: everything in flight ends; the engines end when nothing needs them.
    pub(crate) fn stop(&self) {
        let sessions = std::mem::take(&mut *self.sessions.lock());
        for session in sessions.iter().filter_map(Weak::upgrade) {
            session.lose(LossCause::Disconnected);
        }
        let files = self.files.lock().take();
        drop(files);
        #[cfg(feature = "object")]
        {
            let objects = self.objects.lock().take();
            drop(objects);
        }
    }
}

/// Delivers the notification of an operation on a store to the agent that posted it.
fn notify_self(transfer: &TransferState) -> Result<(), TransferError> {
    let Some(payload) = transfer.notification.clone() else {
        return Ok(());
    };
    let core = &transfer.core;
    let notification = Notification {
        from: core.name.clone(),
        epoch: core.epoch,
        payload,
    };
    if core.receive(notification) {
        Ok(())
    } else {
        Err(TransferError::Rejected(Rejection::NotificationQueueFull))
    }
}
