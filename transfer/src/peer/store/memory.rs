//! A store in memory, for agents of one process and for tests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{MetadataStore, StoreError};
use crate::clock::after;

/// A table in memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
}

#[derive(Debug)]
struct Entry {
    value: Vec<u8>,
    until: Option<Instant>,
}

impl Entry {
    fn over(&self) -> bool {
        self.until.is_some_and(|until| until <= Instant::now())
    }
}

impl MetadataStore for MemoryStore {
    fn put(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<(), StoreError> {
        let entry = Entry {
            value: value.to_vec(),
            until: ttl.map(after),
        };
        self.entries.lock().insert(key.to_owned(), entry);
        Ok(())
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let entries = self.entries.lock();
        let entry = entries.get(key).filter(|entry| !entry.over());
        Ok(entry.map(|entry| entry.value.clone()))
    }

    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let removed = self.entries.lock().remove(key);
        Ok(removed.is_some_and(|entry| !entry.over()))
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut entries = self.entries.lock();
        entries.retain(|_, entry| !entry.over());
        let from = entries.range(prefix.to_owned()..);
        let keys = from.map(|(key, _)| key.clone());
        Ok(keys.take_while(|key| key.starts_with(prefix)).collect())
    }
}
