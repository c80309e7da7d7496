//! Objects: blocks in S3-compatible stores, Google Cloud Storage, Azure, folders, memory.
//!
//! One object holds one block, its layers one after another. A small runtime on a thread of its own
//! talks to the stores; bytes are copied between its buffers and registered memory by that thread,
//! so that a transfer that is called off is quiet when its requests are dropped.

mod client;
mod config;
mod engine;
mod http;
mod moving;
mod prepare;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use object_store::path::Path;

use self::client::Client;
use super::backend::StoreBackend;
use super::error::{OpenError, StorageAction, StorageError, StorageErrorKind};
use crate::agent::{Core, LaneChoice, LaneInfo, Session};
use crate::config::Lane;
use crate::error::LossCause;
use crate::stats::PeerStats;

pub use self::config::{
    AzureConfig, AzureCredentials, GcsConfig, GcsCredentials, ObjectConfig, ObjectLocation,
    S3Config, S3Credentials, Secret,
};

pub(crate) use self::engine::Engine;
pub(crate) use self::prepare::prepare_objects;

/// An open object store. Clones share it.
#[derive(Clone)]
pub struct ObjectStore {
    client: Arc<Client>,
    engine: Arc<Engine>,
    session: Arc<Session>,
    core: Arc<Core>,
}

impl fmt::Debug for ObjectStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectStore")
            .field("name", &self.name())
            .field("lane", &self.session.lane().reason)
            .finish_non_exhaustive()
    }
}

impl ObjectStore {
    pub(crate) fn open(core: &Arc<Core>, config: &ObjectConfig) -> Result<Self, OpenError> {
        if core.is_stopped() {
            return Err(OpenError::AgentStopped);
        }
        let client = Arc::new(Client::open(config)?);
        let engine = core.storage.object_engine(&core.config.storage)?;
        let reason = format!(
            "{}: at most {} requests at a time over all stores, objects above {} MiB in parts",
            client.name,
            engine.concurrency(),
            core.config.storage.object_part_bytes >> 20,
        );
        tracing::info!(agent = %core.name, lane = %Lane::Object, %reason, "object store opened");
        let backend = Arc::new(StoreBackend::new(engine.clone()));
        let backend = crate::backend::with_faults(core, backend);
        let choice = LaneChoice::new(Lane::Object, &reason, &[], 1);
        let session = Session::stored(core, &client.name, choice, backend);
        core.storage.watch(&session);
        if core.is_stopped() {
            session.lose(LossCause::Disconnected);
            return Err(OpenError::AgentStopped);
        }
        Ok(Self {
            client,
            engine,
            session,
            core: core.clone(),
        })
    }

    /// Kind, bucket and prefix.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.client.name
    }

    /// How requests are made.
    #[must_use]
    pub fn lane(&self) -> LaneInfo {
        self.session.lane().clone()
    }

    /// Counters since the store was opened.
    #[must_use]
    pub fn stats(&self) -> PeerStats {
        self.session.counters().of_peer()
    }

    /// What is known of objects at this moment, in the order of `keys`; `None` where there is none.
    /// Waits for the store at most `timeout`.
    ///
    /// # Errors
    /// A key is invalid, the store refuses or does not answer.
    pub fn query(
        &self,
        keys: &[impl AsRef<str>],
        timeout: Duration,
    ) -> Result<Vec<Option<ObjectInfo>>, StorageError> {
        let action = StorageAction::Query;
        let paths = self.paths(keys, action)?;
        let client = self.client.clone();
        let found = self.engine.ask(paths, timeout, move |path| {
            let client = client.clone();
            async move { moving::head(&client, &path).await }
        });
        let found = found.ok_or_else(|| self.no_answer(action))?;
        let info = |meta: object_store::ObjectMeta| ObjectInfo {
            length: meta.size,
            etag: meta.e_tag,
            modified: meta.last_modified.into(),
        };
        found
            .into_iter()
            .map(|found| found.map(|meta| meta.map(info)))
            .collect()
    }

    /// Deletes objects; those that do not exist are deleted already. Waits for the store at most
    /// `timeout`.
    ///
    /// # Errors
    /// A key is invalid, the store refuses or does not answer. Some may be deleted then.
    pub fn delete(&self, keys: &[impl AsRef<str>], timeout: Duration) -> Result<(), StorageError> {
        let action = StorageAction::Delete;
        let paths = self.paths(keys, action)?;
        let client = self.client.clone();
        let deleted = self.engine.ask(paths, timeout, move |path| {
            let client = client.clone();
            async move { moving::delete(&client, &path).await }
        });
        let deleted = deleted.ok_or_else(|| self.no_answer(action))?;
        deleted.into_iter().collect()
    }

    /// Names and lengths of the objects below `folder` (whole parts of keys: `a/b` is not below
    /// `a/b2`), or of all objects below the prefix of the store: at most `limit` of them, in the
    /// order of the store, which is that of the keys for S3 and none for folders. Waits for the store
    /// at most `timeout`.
    ///
    /// # Errors
    /// The folder is not a key, the store refuses or does not answer.
    pub fn list(
        &self,
        folder: Option<&str>,
        limit: usize,
        timeout: Duration,
    ) -> Result<ObjectList, StorageError> {
        let action = StorageAction::List;
        let below = match folder {
            Some(folder) => self.paths(&[folder], action)?.pop(),
            None => self.client.prefix().cloned(),
        };
        let client = self.client.clone();
        let listed = self.engine.ask(vec![below], timeout, move |below| {
            let client = client.clone();
            async move { moving::list(&client, below.as_ref(), limit).await }
        });
        let listed = listed.and_then(|mut listed| listed.pop());
        listed.ok_or_else(|| self.no_answer(action))?
    }

    fn paths(
        &self,
        keys: &[impl AsRef<str>],
        action: StorageAction,
    ) -> Result<Vec<Path>, StorageError> {
        let path = |key: &str| {
            self.client.path(key).map_err(|message| StorageError {
                action,
                store: format!("{}/{key}", self.client.name),
                offset: 0,
                kind: StorageErrorKind::Other {
                    errno: None,
                    message: format!("not a key: {message}"),
                },
            })
        };
        keys.iter().map(|key| path(key.as_ref())).collect()
    }

    fn no_answer(&self, action: StorageAction) -> StorageError {
        StorageError {
            action,
            store: self.client.name.clone(),
            offset: 0,
            kind: StorageErrorKind::TimedOut,
        }
    }
}

/// What is known of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectInfo {
    /// Length in bytes.
    pub length: u64,
    /// Tag that changes with its contents, if the store has such tags.
    pub etag: Option<String>,
    /// Last change.
    pub modified: SystemTime,
}

/// Objects that a store has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ObjectList {
    /// Their keys, without the prefix of the store, and their lengths in bytes.
    pub objects: Vec<(String, u64)>,
    /// Whether there are no others.
    pub complete: bool,
}

/// Blocks in objects: the i-th local block pairs with the i-th key.
#[derive(Clone, Debug)]
pub struct ObjectBlocks<'a> {
    /// The store.
    pub store: &'a ObjectStore,
    /// Keys, without the prefix of the store: parts separated by single slashes. An object holds
    /// the layers of its block one after another and nothing else.
    pub keys: &'a [String],
    /// Reads only this range of each object, which is then as long as a block. Not for writes,
    /// which replace whole objects. Default none: an object of another length than its block is an
    /// error.
    pub range: Option<Range<u64>>,
    /// A write fails with [`StorageErrorKind::Precondition`] where an object exists already.
    pub create_only: bool,
}

/// The objects of a prepared operation; its parts.
#[derive(Debug)]
pub(crate) struct ObjectWork {
    client: Arc<Client>,
    paths: Vec<Path>,
    object_bytes: u64,
    range: Option<Range<u64>>,
    create_only: bool,
    part_bytes: u64,
}

impl ObjectWork {
    /// Bytes of an object, or of the range of it that is read.
    pub(crate) const fn object_bytes(&self) -> u64 {
        self.object_bytes
    }

    /// Some of the objects, as an operation of their own.
    pub(crate) fn part(&self, objects: Range<usize>) -> Self {
        Self {
            client: self.client.clone(),
            paths: self.paths.get(objects).unwrap_or_default().to_vec(),
            object_bytes: self.object_bytes,
            range: self.range.clone(),
            create_only: self.create_only,
            part_bytes: self.part_bytes,
        }
    }
}
