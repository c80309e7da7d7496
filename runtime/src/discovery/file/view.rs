//! What a watcher believes about the instances: pure, given listings of the directory and the time.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant, SystemTime},
};

use super::{
    directory::{Entry, Stamp},
    record::{FileKind, Record},
};
use crate::discovery::{InstanceKey, Instances};

/// Lease times after which a file that does not change is removed.
const CLEAN_AFTER_TTLS: u32 = 3;

/// Reads one file; `Ok(None)` when it has gone.
pub(super) type ReadFile<'a> = dyn FnMut(&str) -> Result<Option<Vec<u8>>, String> + 'a;

#[derive(Debug)]
pub(super) struct View {
    ttl: Duration,
    /// By name: what is known of each file of the store.
    files: HashMap<String, File>,
    /// The instances that were seen, with their leases.
    seen: HashMap<InstanceKey, Seen>,
}

#[derive(Debug)]
struct File {
    stamp: Stamp,
    /// `None` when the content makes no sense, which has been reported.
    record: Option<Record>,
    /// When this stamp was first seen.
    since: Instant,
}

#[derive(Debug)]
struct Seen {
    record: Record,
    /// End of the lease unless it is renewed.
    until: Instant,
}

/// The moment of a look, by both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) instant: Instant,
    pub(super) system: SystemTime,
}

impl View {
    pub(super) fn new(ttl: Duration) -> Self {
        Self {
            ttl,
            files: HashMap::new(),
            seen: HashMap::new(),
        }
    }

    /// Takes in a listing of the directory. Nothing expires by that alone.
    pub(super) fn look(&mut self, entries: Vec<Entry>, now: Now, read: &mut ReadFile<'_>) {
        let mut listed = HashSet::with_capacity(entries.len());
        for entry in entries {
            let Some((kind, stem)) = FileKind::of(&entry.name) else {
                continue;
            };
            let unchanged = self
                .files
                .get(&entry.name)
                .is_some_and(|file| file.stamp == entry.stamp);
            if !unchanged {
                let was_malformed = self
                    .files
                    .get(&entry.name)
                    .is_some_and(|file| file.record.is_none());
                let record = if kind == FileKind::Temporary {
                    None
                } else {
                    match read(&entry.name) {
                        Ok(None) => continue,
                        Ok(Some(bytes)) => Record::parse(stem, &bytes),
                        Err(error) => Err(error),
                    }
                    .inspect_err(|reason| {
                        if !was_malformed {
                            tracing::warn!(
                                file = entry.name,
                                reason,
                                "ignoring a malformed file in the discovery store"
                            );
                        }
                    })
                    .ok()
                };
                if let (FileKind::Alive, Some(record)) = (kind, &record) {
                    self.renew(record, entry.stamp.modified, now);
                }
                self.files.insert(
                    entry.name.clone(),
                    File {
                        stamp: entry.stamp,
                        record,
                        since: now.instant,
                    },
                );
            }
            listed.insert(entry.name);
        }
        self.files.retain(|name, _| listed.contains(name));
        self.take_leavers();
    }

    fn renew(&mut self, record: &Record, modified: SystemTime, now: Now) {
        let key = record.instance.key();
        let known = self
            .seen
            .get(&key)
            .is_some_and(|seen| seen.record.nonce == record.nonce);
        let until = if known {
            now.instant + self.ttl
        } else {
            // Only the first look at a file compares clocks; a time in the future counts as now.
            let age = now
                .system
                .duration_since(modified)
                .unwrap_or(Duration::ZERO);
            now.instant + self.ttl.saturating_sub(age)
        };
        self.seen.insert(
            key,
            Seen {
                record: record.clone(),
                until,
            },
        );
    }

    /// Drops the instances whose workers have left.
    fn take_leavers(&mut self) {
        let left: HashSet<&str> = self
            .files
            .iter()
            .filter(|(name, _)| matches!(FileKind::of(name), Some((FileKind::Left, _))))
            .filter_map(|(_, file)| file.record.as_ref())
            .map(|record| record.nonce.as_str())
            .collect();
        self.seen
            .retain(|_, seen| !left.contains(seen.record.nonce.as_str()));
    }

    /// Whether a lease has ended, so that [`expire`](Self::expire) would drop an instance.
    pub(super) fn has_expired(&self, now: Instant) -> bool {
        self.seen.values().any(|seen| seen.until <= now)
    }

    /// Drops the instances whose leases have ended; returns them.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<InstanceKey> {
        let expired: Vec<InstanceKey> = self
            .seen
            .iter()
            .filter(|(_, seen)| seen.until <= now)
            .map(|(key, _)| key.clone())
            .collect();
        for key in &expired {
            self.seen.remove(key);
        }
        expired
    }

    /// Gives every instance a full lease: the store was out of reach, and nobody could renew.
    pub(super) fn renew_all(&mut self, now: Instant) {
        for seen in self.seen.values_mut() {
            seen.until = seen.until.max(now + self.ttl);
        }
    }

    /// When the next lease ends.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.seen.values().map(|seen| seen.until).min()
    }

    pub(super) fn instances(&self) -> Instances {
        self.seen
            .iter()
            .map(|(key, seen)| (key.clone(), seen.record.instance.clone()))
            .collect()
    }

    /// Whether the directory has the file of this registration.
    pub(super) fn has_file(&self, record: &Record) -> bool {
        self.files
            .get(&record.alive_name())
            .and_then(|file| file.record.as_ref())
            .is_some_and(|found| found.nonce == record.nonce)
    }

    /// Files whose processes are dead for sure. Malformed ones are left to whoever made them.
    pub(super) fn stale_files(&self, now: Instant) -> Vec<String> {
        self.files
            .iter()
            .filter(|(name, file)| {
                let ours = file.record.is_some()
                    || matches!(FileKind::of(name), Some((FileKind::Temporary, _)));
                ours && now.saturating_duration_since(file.since) > self.ttl * CLEAN_AFTER_TTLS
            })
            .map(|(name, _)| name.clone())
            .collect()
    }
}
