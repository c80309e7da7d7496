//! Metadata through a key-value store.

mod folder;
mod memory;

use std::error::Error;
use std::time::Duration;

pub use folder::FolderStore;
pub use memory::MemoryStore;

/// A key-value store that agents publish themselves in: a folder, a table in memory, or a service
/// behind an implementation of this trait. Calls may block; each must be bounded by the store.
pub trait MetadataStore: Send + Sync {
    /// Sets a key. With `ttl` the key is gone after that time unless it is set again.
    ///
    /// # Errors
    /// The store cannot do it; nothing or all of it is done.
    fn put(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<(), StoreError>;

    /// The value of a key, `None` when it is not set or its time is over.
    ///
    /// # Errors
    /// The store cannot tell.
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError>;

    /// Removes a key; false when it was not set.
    ///
    /// # Errors
    /// The store cannot do it.
    fn delete(&self, key: &str) -> Result<bool, StoreError>;

    /// All keys that begin with `prefix`, sorted.
    ///
    /// # Errors
    /// The store cannot tell.
    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError>;
}

/// Why a store could not do something.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} key {key:?}: {source}")]
pub struct StoreError {
    /// What was tried.
    pub what: &'static str,
    /// The key or prefix.
    pub key: String,
    /// Why not.
    pub source: Box<dyn Error + Send + Sync>,
}

impl StoreError {
    /// An error of an implementation.
    pub fn new(
        what: &'static str,
        key: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self {
            what,
            key: key.into(),
            source: source.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What every store does.
    fn conformance(store: &dyn MetadataStore) {
        assert_eq!(store.get("agents/a").unwrap(), None);
        store.put("agents/a", b"one", None).unwrap();
        store.put("agents/a", b"two", None).unwrap();
        store.put("agents/\u{e4} b%2f/../..", b"", None).unwrap();
        store.put("other", &[0, 255], None).unwrap();
        assert_eq!(store.get("agents/a").unwrap().unwrap(), b"two");
        assert_eq!(store.get("agents").unwrap(), None);
        assert_eq!(store.get("other").unwrap().unwrap(), [0, 255]);
        let agents = ["agents/a", "agents/\u{e4} b%2f/../.."];
        assert_eq!(store.list("agents/").unwrap(), agents);
        assert_eq!(store.list("").unwrap().len(), 3);
        assert!(store.delete("agents/a").unwrap() && !store.delete("agents/a").unwrap());
        // Time that is over already, and time that is not.
        store.put("short", b"x", Some(Duration::ZERO)).unwrap();
        store
            .put("long", b"x", Some(Duration::from_secs(3600)))
            .unwrap();
        store.put("endless", b"x", Some(Duration::MAX)).unwrap();
        assert_eq!(store.get("short").unwrap(), None);
        assert_eq!(store.list("s").unwrap(), [""; 0]);
        assert!(!store.delete("short").unwrap());
        assert_eq!(store.list("long").unwrap(), ["long"]);
        assert!(store.get("endless").unwrap().is_some());
    }

    #[test]
    fn stores_are_alike() {
        conformance(&MemoryStore::default());
        let folder = std::env::temp_dir().join(format!(
            "bp-store-{:x}",
            crate::agent::random_u64().unwrap()
        ));
        conformance(&FolderStore::new(&folder).unwrap());
        let names = std::fs::read_dir(&folder).unwrap().flatten();
        let drafts = names.filter(|entry| entry.file_name().to_string_lossy().ends_with("draft"));
        assert_eq!(drafts.count(), 0);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_damaged_entry_is_an_error_that_names_it() {
        let folder = std::env::temp_dir().join(format!(
            "bp-store-{:x}",
            crate::agent::random_u64().unwrap()
        ));
        let store = FolderStore::new(&folder).unwrap();
        store.put("k", b"value", None).unwrap();
        for bytes in [&b""[..], b"BPKV", b"something else entirely"] {
            let file = std::fs::read_dir(&folder).unwrap().next().unwrap();
            std::fs::write(file.unwrap().path(), bytes).unwrap();
            let error = store.get("k").unwrap_err();
            assert_eq!((error.what, error.key.as_str()), ("read", "k"));
        }
        assert!(store.put(&"k".repeat(300), b"", None).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
