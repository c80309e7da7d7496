//! The content and the name of an instance's file.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::discovery::{DiscoveryError, Instance};

/// Version of the content.
const VERSION: u32 = 1;
/// Largest file that is written or read.
pub(super) const RECORD_BYTES_MAX: usize = 1 << 20;
/// Longest file name; what is added for a temporary file fits in the 255 bytes of common file systems.
const NAME_BYTES_MAX: usize = 180;

/// Suffix of a registered instance.
const ALIVE: &str = ".json";
/// Suffix of an instance whose worker has taken it back.
const LEFT: &str = ".left";
/// Suffix of a file that is being written.
const TEMPORARY: &str = ".tmp";

/// What a file of the store is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    Alive,
    Left,
    Temporary,
}

impl FileKind {
    /// The kind of a file and the stem of its name; `None` for a file that is not the store's.
    pub(super) fn of(name: &str) -> Option<(Self, &str)> {
        if let Some(stem) = name.strip_suffix(TEMPORARY) {
            return stem.starts_with('.').then_some((Self::Temporary, stem));
        }
        name.strip_suffix(ALIVE)
            .map(|stem| (Self::Alive, stem))
            .or_else(|| name.strip_suffix(LEFT).map(|stem| (Self::Left, stem)))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// Tells registrations under the same key apart.
    pub(super) nonce: String,
    pub(super) instance: Instance,
}

impl Record {
    /// A new registration of this instance.
    pub(super) fn new(instance: Instance) -> Result<Self, DiscoveryError> {
        let record = Self {
            version: VERSION,
            nonce: nonce(),
            instance,
        };
        let error = |reason| DiscoveryError::Instance {
            worker: record.instance.id,
            endpoint: record.instance.endpoint.clone(),
            reason,
        };
        let name_bytes = record.stem().len();
        if name_bytes > NAME_BYTES_MAX {
            return Err(error(format!(
                "its file name would have {name_bytes} bytes; at most {NAME_BYTES_MAX} are accepted"
            )));
        }
        let bytes = record.to_bytes().len();
        if bytes > RECORD_BYTES_MAX {
            return Err(error(format!(
                "it has {bytes} bytes with its metadata; at most {RECORD_BYTES_MAX} are accepted"
            )));
        }
        Ok(record)
    }

    /// The record in a file whose name has this stem, or what is wrong with it.
    pub(super) fn parse(stem: &str, bytes: &[u8]) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if record.version != VERSION {
            return Err(format!(
                "it has version {}; this build reads version {VERSION}",
                record.version
            ));
        }
        if record.stem() != stem {
            return Err(format!(
                "its name does not fit its content, which belongs to {}{ALIVE}",
                record.stem()
            ));
        }
        Ok(record)
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self)
            .expect("writing to memory does not fail and all map keys are strings")
    }

    fn stem(&self) -> String {
        let endpoint = &self.instance.endpoint;
        format!(
            "{}.{}.{}.{}",
            endpoint.namespace(),
            endpoint.component(),
            endpoint.endpoint(),
            self.instance.id
        )
    }

    pub(super) fn alive_name(&self) -> String {
        self.stem() + ALIVE
    }

    pub(super) fn left_name(&self) -> String {
        self.stem() + LEFT
    }
}

/// A name for a file that is being written, which no other process uses.
pub(super) fn temporary_name() -> String {
    format!(".{}{TEMPORARY}", nonce())
}

/// Unique among processes and machines that share a directory, for all practical purposes.
fn nonce() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    format!("{:x}-{nanos:x}-{count:x}", std::process::id())
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::WorkerId;

    use super::*;

    fn instance() -> Instance {
        Instance {
            id: WorkerId(0xabc),
            endpoint: "dyn://n.prefill.generate".parse().unwrap(),
            address: "127.0.0.1:7000".to_owned(),
            metadata: serde_json::json!({"model": "m"}),
        }
    }

    #[test]
    fn a_record_comes_back_from_its_file() {
        let record = Record::new(instance()).unwrap();
        let name = record.alive_name();
        assert_eq!(name, "n.prefill.generate.0000000000000abc.json");
        let (kind, stem) = FileKind::of(&name).unwrap();
        assert_eq!(kind, FileKind::Alive);
        assert_eq!(Record::parse(stem, &record.to_bytes()).unwrap(), record);
    }

    #[test]
    fn malformed_files_say_what_is_wrong() {
        let record = Record::new(instance()).unwrap();
        assert!(Record::parse("x", b"").unwrap_err().contains("EOF"));
        assert!(
            Record::parse("n.other.generate.0", &record.to_bytes())
                .unwrap_err()
                .contains("n.prefill.generate.0000000000000abc.json")
        );
        let newer = String::from_utf8(record.to_bytes())
            .unwrap()
            .replace("\"version\": 1", "\"version\": 2");
        assert!(
            Record::parse("n.prefill.generate.0000000000000abc", newer.as_bytes())
                .unwrap_err()
                .contains("version 2")
        );
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        let mut long = instance();
        long.endpoint = format!("dyn://{}.b.c", "a".repeat(300)).parse().unwrap();
        assert!(Record::new(long).is_err());
        let mut large = instance();
        large.metadata = "x".repeat(RECORD_BYTES_MAX).into();
        assert!(Record::new(large).is_err());
    }

    #[test]
    fn files_of_others_are_not_ours() {
        assert_eq!(FileKind::of("README.md"), None);
        assert_eq!(FileKind::of("notes.tmp"), None);
        assert_eq!(
            FileKind::of(&temporary_name()).map(|(kind, _)| kind),
            Some(FileKind::Temporary)
        );
        assert_ne!(nonce(), nonce());
    }
}
