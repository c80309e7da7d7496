//! Files: regions of bytes on a disk, moved by io_uring.

mod engine;
mod open;
mod plan;
mod prepare;
mod ring;
mod threads;
mod work;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::backend::StoreBackend;
use super::config::{DirectUse, FileConfig, FileInfo};
use super::error::{OpenError, StorageError};
use crate::agent::{Core, LaneChoice, LaneInfo, Session};
use crate::config::Lane;
use crate::error::{LossCause, PostError};
use crate::op::{PostOptions, Transfer};
use crate::plan::{BlockIds, BlockLayout};
use crate::stats::PeerStats;

use self::open::StoredFile;

pub(crate) use self::engine::Engine;
pub(crate) use self::prepare::{StagedFile, prepare_blocks, prepare_descriptors};
pub(crate) use self::work::FileWork;

/// An open file. Clones share it; it is closed when the last clone and the last operation that
/// names it are gone.
#[derive(Clone)]
pub struct FileStore {
    file: Arc<StoredFile>,
    session: Arc<Session>,
    core: Arc<Core>,
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore")
            .field("name", &self.name())
            .field("read_only", &self.file.read_only())
            .field("direct", self.file.direct_use())
            .field("lane", &self.session.lane().reason)
            .finish_non_exhaustive()
    }
}

impl FileStore {
    pub(crate) fn open(core: &Arc<Core>, config: FileConfig) -> Result<Self, OpenError> {
        if core.is_stopped() {
            return Err(OpenError::AgentStopped);
        }
        let engine = core.storage.file_engine(&core.name, &core.config.storage)?;
        let file = Arc::new(StoredFile::open(config, engine.clone())?);
        let reason = format!("{}, {}", engine.describe(), file.direct_use());
        tracing::info!(
            agent = %core.name, file = file.name(), lane = %Lane::File, %reason, "file opened"
        );
        let backend = Arc::new(StoreBackend::new(engine));
        let backend = crate::backend::with_faults(core, backend);
        let choice = LaneChoice::new(Lane::File, &reason, &[], 1);
        let session = Session::stored(core, file.name(), choice, backend);
        core.storage.watch(&session);
        if core.is_stopped() {
            session.lose(LossCause::Disconnected);
            return Err(OpenError::AgentStopped);
        }
        Ok(Self {
            file,
            session,
            core: core.clone(),
        })
    }

    /// Path of the file, or what is known of its descriptor.
    #[must_use]
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// What moves the bytes (io_uring or threads) and whether around the page cache, with reasons.
    #[must_use]
    pub fn lane(&self) -> LaneInfo {
        self.session.lane().clone()
    }

    /// Whether requests go around the page cache, and why not.
    #[must_use]
    pub fn direct(&self) -> &DirectUse {
        self.file.direct_use()
    }

    /// What is known of the file at this moment. Asks the file system.
    ///
    /// # Errors
    /// What the file system says.
    pub fn query(&self) -> Result<FileInfo, StorageError> {
        self.file.query()
    }

    /// Makes durable what transfers that are complete have written (`fdatasync`).
    ///
    /// # Errors
    /// Nothing was started; the error says why.
    pub fn sync(&self, options: PostOptions) -> Result<Transfer, PostError> {
        let work = Arc::new(prepare::sync_work(&self.file, &self.session));
        crate::op::post(&self.core, &self.session, Some(&work), options)
    }

    /// Counters since the file was opened.
    #[must_use]
    pub fn stats(&self) -> PeerStats {
        self.session.counters().of_peer()
    }
}

/// Blocks of a file.
#[derive(Clone, Debug)]
pub struct FileBlocks<'a> {
    /// The file.
    pub file: &'a FileStore,
    /// How blocks lie in it: offsets count from its first byte.
    pub layout: BlockLayout,
    /// Block ids; the i-th pairs with the i-th local id.
    pub ids: BlockIds,
    /// Layers; the k-th pairs with the k-th local layer.
    pub layers: Range<u32>,
    /// Whether a write is complete only when its bytes are durable: one `fdatasync` behind the last
    /// of them, before the notification. Costs a flush of the device. No effect on reads.
    pub durable: bool,
}

/// Ranges of a file, by their first bytes; the i-th is as long as the i-th local descriptor.
#[derive(Clone, Copy, Debug)]
pub struct FileRanges<'a> {
    /// The file.
    pub file: &'a FileStore,
    /// First bytes.
    pub offsets: &'a [u64],
    /// As in [`FileBlocks::durable`].
    pub durable: bool,
}
