//! Discovery inside one process.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use async_trait::async_trait;
use futures::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;

use super::{
    Discovery, DiscoveryError, Instance, InstanceKey, InstanceWatch, Instances, Lease,
    LeaseBackend, Watchers,
};

/// A store in memory. Clones are the same store.
#[derive(Clone, Debug, Default)]
pub struct MemoryDiscovery {
    store: Arc<Mutex<Store>>,
}

#[derive(Debug, Default)]
struct Store {
    instances: Instances,
    /// Which registration of a key is the valid one.
    registrations: BTreeMap<InstanceKey, u64>,
    next_registration: u64,
    watchers: Watchers,
}

impl MemoryDiscovery {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

#[async_trait]
impl Discovery for MemoryDiscovery {
    async fn register(&self, instance: Instance) -> Result<Lease, DiscoveryError> {
        let key = instance.key();
        let mut store = self.store.lock();
        store.next_registration += 1;
        let registration = store.next_registration;
        store.registrations.insert(key.clone(), registration);
        store.instances.insert(key.clone(), instance);
        store.publish();
        let lease = MemoryLease {
            store: Arc::downgrade(&self.store),
            key: key.clone(),
            registration,
        };
        Ok(Lease::new(key, Box::new(lease)))
    }

    async fn watch(&self, namespace: &str) -> Result<InstanceWatch, DiscoveryError> {
        let mut store = self.store.lock();
        let Store {
            instances,
            watchers,
            ..
        } = &mut *store;
        let receiver = watchers.subscribe(namespace, instances);
        Ok(InstanceWatch::new(receiver, self.store.clone()))
    }
}

impl Store {
    fn publish(&mut self) {
        self.watchers.publish(&self.instances);
    }
}

#[derive(Debug)]
struct MemoryLease {
    store: Weak<Mutex<Store>>,
    key: InstanceKey,
    registration: u64,
}

impl LeaseBackend for MemoryLease {
    fn start_revoke(&self) {
        let Some(store) = self.store.upgrade() else {
            return;
        };
        let mut store = store.lock();
        if store.registrations.get(&self.key) == Some(&self.registration) {
            store.registrations.remove(&self.key);
            store.instances.remove(&self.key);
            store.publish();
        }
    }

    fn revoked(&self) -> BoxFuture<'static, Result<(), DiscoveryError>> {
        std::future::ready(Ok(())).boxed()
    }
}
