//! Discovery through a directory: one file per instance, kept alive by its modification time.
//!
//! A worker writes `NAMESPACE.COMPONENT.ENDPOINT.WORKER.json` (atomically, by rename) and touches it
//! every third of the lease time. A watcher drops an instance when
//! * its file was renamed to `.left`, which is how a worker leaves: within about 100 ms;
//! * its modification time has not changed for a lease time, as the watcher's own monotonic clock
//!   counts: the worker has crashed.
//!
//! Losing the store loses nothing that runs (invariant 6). While the directory cannot be read, or
//! cannot be written when a lease seems to expire, nothing expires. A file that vanished without a
//! `.left` was not removed by its worker: the instance stays until its lease ends, and its worker
//! writes the file again, recreating the directory if need be. Faults are logged when they begin and
//! when they end.
//!
//! All file operations happen on one thread of the store, so that a slow disk blocks no task.

mod directory;
mod keeper;
mod notify;
mod record;
mod view;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use self::{
    directory::{Directory, Fault},
    keeper::Keeper,
    notify::Wake,
    record::Record,
};
use super::{Discovery, DiscoveryError, Instance, InstanceWatch, Instances, Lease, LeaseBackend};

/// How a change of the directory is noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChangeDetection {
    /// By inotify, or by polling where that is not to be had.
    #[default]
    Auto,
    /// By listing the directory every [`poll_interval`](FileDiscoveryConfig::poll_interval). For
    /// network file systems, which do not report what other machines change.
    Poll,
}

/// Settings of a [`FileDiscovery`].
#[derive(Clone, Debug)]
pub struct FileDiscoveryConfig {
    /// The directory. It is created when it is missing.
    pub dir: PathBuf,
    /// An instance whose worker has given no sign of life for this long is gone. Default 10 s. All
    /// who share the directory should use the same value.
    pub lease_ttl: Duration,
    /// How changes are noticed. Default [`ChangeDetection::Auto`].
    pub change_detection: ChangeDetection,
    /// How often to look where there is no inotify. Default 100 ms.
    pub poll_interval: Duration,
    /// How long a caller waits for the disk. Default 5 s.
    pub io_timeout: Duration,
}

impl FileDiscoveryConfig {
    /// The defaults for this directory.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            lease_ttl: Duration::from_secs(10),
            change_detection: ChangeDetection::Auto,
            poll_interval: Duration::from_millis(100),
            io_timeout: Duration::from_secs(5),
        }
    }
}

/// A store in a directory. Clones are the same store. Its thread ends when the last clone, lease and
/// watch are gone.
#[derive(Clone, Debug)]
pub struct FileDiscovery {
    handle: Arc<Handle>,
}

impl FileDiscovery {
    /// Opens the store.
    ///
    /// # Errors
    /// When the directory cannot be created or written, or the thread cannot be started.
    pub fn new(config: FileDiscoveryConfig) -> Result<Self, DiscoveryError> {
        let path = config.dir.clone();
        let error = |action| {
            let path = path.clone();
            move |source| DiscoveryError::Store {
                path,
                action,
                source,
            }
        };
        let directory = Directory::new(config.dir.clone());
        directory.probe().map_err(error("write"))?;
        let shared = Arc::new(Shared {
            wake: Wake::new().map_err(error("watch"))?,
            state: Mutex::default(),
            config,
        });
        let keeper = Keeper::new(Arc::clone(&shared), directory);
        std::thread::Builder::new()
            .name("discovery".to_owned())
            .spawn(move || keeper.run())
            .map_err(error("start the thread for"))?;
        Ok(Self {
            handle: Arc::new(Handle { shared }),
        })
    }

    async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<T, DiscoveryError>>,
    ) -> Result<T, DiscoveryError> {
        let limit = self.handle.shared.config.io_timeout;
        tokio::time::timeout(limit, answer)
            .await
            .unwrap_or(Err(DiscoveryError::Timeout { limit }))
    }
}

#[async_trait]
impl Discovery for FileDiscovery {
    async fn register(&self, instance: Instance) -> Result<Lease, DiscoveryError> {
        let key = instance.key();
        let shared = &self.handle.shared;
        let registration = Arc::new(Registration {
            record: Record::new(instance)?,
            status: watch::Sender::new(Status::Pending),
            revoke: AtomicBool::new(false),
        });
        // From here on, dropping this future revokes the registration.
        let lease = Lease::new(
            key,
            Box::new(FileLease {
                handle: Arc::clone(&self.handle),
                registration: Arc::clone(&registration),
            }),
        );
        shared
            .state
            .lock()
            .new_registrations
            .push(Arc::clone(&registration));
        shared.wake.wake();
        self.answer(async {
            let mut status = registration.status.subscribe();
            let settled = status
                .wait_for(|status| !matches!(status, Status::Pending))
                .await
                .map_err(|_closed| DiscoveryError::Stopped)?;
            match &*settled {
                Status::Failed(fault) => Err(shared.error(fault)),
                Status::Pending | Status::Active | Status::Revoked => Ok(()),
            }
        })
        .await?;
        Ok(lease)
    }

    async fn watch(&self, namespace: &str) -> Result<InstanceWatch, DiscoveryError> {
        let shared = &self.handle.shared;
        let (reply, answer) = oneshot::channel();
        shared
            .state
            .lock()
            .new_watches
            .push((namespace.to_owned(), reply));
        shared.wake.wake();
        let receiver = self
            .answer(async {
                answer
                    .await
                    .map_err(|_closed| DiscoveryError::Stopped)?
                    .map_err(|fault| shared.error(&fault))
            })
            .await?;
        Ok(InstanceWatch::new(receiver, self.handle.clone()))
    }
}

/// Held by whoever needs the thread.
#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.wake.wake();
    }
}

#[derive(Debug)]
struct Shared {
    config: FileDiscoveryConfig,
    state: Mutex<State>,
    wake: Wake,
}

type WatchReply = oneshot::Sender<Result<watch::Receiver<Arc<Instances>>, Fault>>;

/// What callers ask of the thread. Each entry belongs to a caller that waits for it.
#[derive(Debug, Default)]
struct State {
    new_registrations: Vec<Arc<Registration>>,
    new_watches: Vec<(String, WatchReply)>,
    stop: bool,
}

impl Shared {
    fn error(&self, fault: &Fault) -> DiscoveryError {
        DiscoveryError::Store {
            path: self.config.dir.clone(),
            action: fault.action,
            source: std::io::Error::new(fault.kind, fault.text.clone()),
        }
    }
}

/// One registration, from the call to its revocation.
#[derive(Debug)]
struct Registration {
    record: Record,
    status: watch::Sender<Status>,
    revoke: AtomicBool,
}

#[derive(Clone, Debug)]
enum Status {
    /// Not written yet.
    Pending,
    /// Kept alive.
    Active,
    /// The first write or the revocation failed.
    Failed(Fault),
    /// Gone, by its lease or by a later registration under the same key.
    Revoked,
}

struct FileLease {
    handle: Arc<Handle>,
    registration: Arc<Registration>,
}

impl LeaseBackend for FileLease {
    fn start_revoke(&self) {
        self.registration.revoke.store(true, Ordering::Release);
        self.handle.shared.wake.wake();
    }

    fn revoked(&self) -> BoxFuture<'static, Result<(), DiscoveryError>> {
        let mut status = self.registration.status.subscribe();
        let handle = Arc::clone(&self.handle);
        async move {
            let limit = handle.shared.config.io_timeout;
            let settled =
                status.wait_for(|status| matches!(status, Status::Revoked | Status::Failed(_)));
            match tokio::time::timeout(limit, settled).await {
                Err(_elapsed) => Err(DiscoveryError::Timeout { limit }),
                Ok(Err(_closed)) => Err(DiscoveryError::Stopped),
                Ok(Ok(status)) => match &*status {
                    Status::Failed(fault) => Err(handle.shared.error(fault)),
                    Status::Pending | Status::Active | Status::Revoked => Ok(()),
                },
            }
        }
        .boxed()
    }
}
