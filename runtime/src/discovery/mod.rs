//! Who is there: instances register under a lease, watchers see them come, change and go.
//!
//! Behind the object-safe trait [`Discovery`] so that a deployment chooses its store at run time.
//! [`MemoryDiscovery`] serves one process, [`FileDiscovery`] a machine or a shared directory.
//!
//! Discovery says where to connect, not who is alive this instant: a broken connection
//! ([`connection_events`](crate::rpc::RpcClient::connection_events)) tells sooner than any lease.

mod file;
mod memory;

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use blockplane_protocol::{EndpointId, WorkerId};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

pub use file::{ChangeDetection, FileDiscovery, FileDiscoveryConfig};
pub use memory::MemoryDiscovery;

/// One endpoint of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The worker process.
    pub id: WorkerId,
    /// What it serves.
    pub endpoint: EndpointId,
    /// `host:port` of its RPC server.
    pub address: String,
    /// What else callers need to know, such as the model card.
    #[serde(default)]
    pub metadata: serde_json::Value,
}

/// Key of an [`Instance`].
pub type InstanceKey = (WorkerId, EndpointId);

/// All instances of a namespace.
pub type Instances = BTreeMap<InstanceKey, Instance>;

impl Instance {
    /// What names it among all instances.
    #[must_use]
    pub fn key(&self) -> InstanceKey {
        (self.id, self.endpoint.clone())
    }
}

/// A store of instances.
#[async_trait]
pub trait Discovery: Send + Sync + fmt::Debug {
    /// Makes an instance known for as long as the lease is held. A second registration under the same
    /// key replaces the first, whose lease then has no effect any more.
    async fn register(&self, instance: Instance) -> Result<Lease, DiscoveryError>;

    /// Follows the instances of a namespace. The first value is what is there now.
    async fn watch(&self, namespace: &str) -> Result<InstanceWatch, DiscoveryError>;
}

/// Why the store did not do what was asked.
#[derive(Debug, Error)]
pub enum DiscoveryError {
    /// The store cannot be reached or written.
    #[error("discovery store {path}: cannot {action}: {source}")]
    Store {
        /// Where.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The instance cannot be stored.
    #[error("instance {worker} of {endpoint} cannot be registered: {reason}")]
    Instance {
        /// The worker.
        worker: WorkerId,
        /// The endpoint.
        endpoint: EndpointId,
        /// What is wrong with it, and what is accepted.
        reason: String,
    },
    /// The store did not answer in time.
    #[error("the discovery store did not answer within {limit:?}")]
    Timeout {
        /// How long it was given.
        limit: Duration,
    },
    /// The store has stopped.
    #[error("the discovery store has stopped")]
    Stopped,
}

impl DiscoveryError {
    /// Whether trying again may help.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        matches!(self, Self::Store { .. } | Self::Timeout { .. })
    }
}

/// Keeps an instance registered. Dropping it revokes it in the background.
#[must_use = "dropping the lease revokes the registration"]
pub struct Lease {
    key: InstanceKey,
    backend: Option<Box<dyn LeaseBackend>>,
}

/// What a store does for a lease.
pub trait LeaseBackend: Send + Sync {
    /// Begins to revoke and does not wait.
    fn start_revoke(&self);

    /// Ends when the registration is gone, as far as the store can tell.
    fn revoked(&self) -> BoxFuture<'static, Result<(), DiscoveryError>>;
}

impl Lease {
    /// A lease of a store.
    pub fn new(key: InstanceKey, backend: Box<dyn LeaseBackend>) -> Self {
        Self {
            key,
            backend: Some(backend),
        }
    }

    /// What is registered.
    #[must_use]
    pub const fn key(&self) -> &InstanceKey {
        &self.key
    }

    /// Removes the registration and waits until that is done.
    ///
    /// # Errors
    /// When the store does not confirm it. The registration is then no longer kept alive and
    /// expires.
    pub async fn revoke(mut self) -> Result<(), DiscoveryError> {
        let Some(backend) = self.backend.take() else {
            return Ok(());
        };
        backend.start_revoke();
        backend.revoked().await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(backend) = &self.backend {
            backend.start_revoke();
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// The instances of a namespace as they change.
#[derive(Clone)]
pub struct InstanceWatch {
    instances: watch::Receiver<Arc<Instances>>,
    /// Keeps the store's work going while somebody watches.
    _keep: Arc<dyn Send + Sync>,
}

impl InstanceWatch {
    /// A watch of a store; `keep` is held as long as the watch.
    #[must_use]
    pub fn new(instances: watch::Receiver<Arc<Instances>>, keep: Arc<dyn Send + Sync>) -> Self {
        Self {
            instances,
            _keep: keep,
        }
    }

    /// The instances known now.
    #[must_use]
    pub fn current(&self) -> Arc<Instances> {
        Arc::clone(&self.instances.borrow())
    }

    /// Waits for a change since the last call of this method (or since the watch began) and returns
    /// the instances then; several changes may be seen as one.
    ///
    /// # Errors
    /// When the store has stopped; the last known instances stay readable.
    pub async fn changed(&mut self) -> Result<Arc<Instances>, DiscoveryError> {
        self.instances
            .changed()
            .await
            .map_err(|_closed| DiscoveryError::Stopped)?;
        Ok(Arc::clone(&self.instances.borrow_and_update()))
    }

    /// Waits until the instances are as `wanted` says; returns at once if they are now.
    ///
    /// # Errors
    /// When the store has stopped.
    pub async fn wait_for(
        &mut self,
        mut wanted: impl FnMut(&Instances) -> bool,
    ) -> Result<Arc<Instances>, DiscoveryError> {
        self.instances
            .wait_for(|instances| wanted(instances))
            .await
            .map(|instances| Arc::clone(&instances))
            .map_err(|_closed| DiscoveryError::Stopped)
    }
}

impl fmt::Debug for InstanceWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InstanceWatch")
            .field(&*self.instances.borrow())
            .finish()
    }
}

/// The namespaces that are watched, each with its last published value.
#[derive(Debug, Default)]
struct Watchers(BTreeMap<String, watch::Sender<Arc<Instances>>>);

impl Watchers {
    /// Follows a namespace of `all`.
    fn subscribe(&mut self, namespace: &str, all: &Instances) -> watch::Receiver<Arc<Instances>> {
        self.0
            .entry(namespace.to_owned())
            .or_insert_with(|| watch::Sender::new(Arc::new(of_namespace(namespace, all))))
            .subscribe()
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Tells watchers whose instances differ, by value, from what they were told last.
    fn publish(&mut self, all: &Instances) {
        self.0.retain(|namespace, sender| {
            let now = of_namespace(namespace, all);
            sender.send_if_modified(|last| {
                let differs = **last != now;
                if differs {
                    *last = Arc::new(now);
                }
                differs
            });
            sender.receiver_count() > 0
        });
    }
}

fn of_namespace(namespace: &str, all: &Instances) -> Instances {
    all.iter()
        .filter(|((_, endpoint), _)| endpoint.namespace() == namespace)
        .map(|(key, instance)| (key.clone(), instance.clone()))
        .collect()
}
