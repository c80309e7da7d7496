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

/// Whose a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// It is missing or damaged.
    Nobody,
    /// The registration that was asked about.
    Registration,
    /// A registration under the same key by another process.
    Another,
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
                    self.renew(&entry.name, record, entry.stamp.modified, now);
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

    /// The file of a registration is new or was touched.
    fn renew(&mut self, name: &str, record: &Record, modified: SystemTime, now: Now) {
        let touched = self
            .files
            .get(name)
            .and_then(|file| file.record.as_ref())
            .is_some_and(|before| before.nonce == record.nonce);
        let age = if touched {
            Duration::ZERO
        } else {
            // Only the first look at a file compares clocks; a time in the future counts as now.
            now.system
                .duration_since(modified)
                .unwrap_or(Duration::ZERO)
        };
        let key = record.instance.key();
        if age >= self.ttl {
            // Left over from a worker that crashed. Should it live, it will touch the file.
            self.seen.remove(&key);
            return;
        }
        self.seen.insert(
            key,
            Seen {
                record: record.clone(),
                until: now.instant + (self.ttl - age),
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

    /// Whose the file of this registration is, as it was last seen.
    pub(super) fn holder(&self, record: &Record) -> Holder {
        let file = self.files.get(&record.alive_name());
        match file.and_then(|file| file.record.as_ref()) {
            None => Holder::Nobody,
            Some(found) if found.nonce == record.nonce => Holder::Registration,
            Some(_) => Holder::Another,
        }
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

#[cfg(test)]
mod tests {
    use std::{fs, time::UNIX_EPOCH};

    use blockplane_protocol::WorkerId;

    use super::*;
    use crate::discovery::{Instance, file::directory::Directory};

    const TTL: Duration = Duration::from_secs(10);

    /// A directory and a view of it at times that the test chooses.
    struct Scene {
        dir: tempfile::TempDir,
        view: View,
        start: Instant,
    }

    impl Scene {
        fn new() -> Self {
            Self {
                dir: tempfile::tempdir().unwrap(),
                view: View::new(TTL),
                start: Instant::now(),
            }
        }

        fn record(worker: u64) -> Record {
            Record::new(Instance {
                id: WorkerId(worker),
                endpoint: "dyn://n.c.e".parse().unwrap(),
                address: "a:1".to_owned(),
                metadata: serde_json::Value::Null,
            })
            .unwrap()
        }

        fn now(&self, second: u64) -> Now {
            Now {
                instant: self.start + Duration::from_secs(second),
                system: UNIX_EPOCH + Duration::from_secs(1000 + second),
            }
        }

        /// Gives a file a modification time `second`s after the start of the scene.
        fn touch(&self, name: &str, second: i64) {
            let time = UNIX_EPOCH + Duration::from_secs((1000 + second).try_into().unwrap());
            fs::File::options()
                .write(true)
                .open(self.dir.path().join(name))
                .unwrap()
                .set_modified(time)
                .unwrap();
        }

        /// Looks and expires at `second`; returns the workers that are there.
        fn look(&mut self, second: u64) -> Vec<u64> {
            let directory = Directory::new(self.dir.path().to_owned());
            let now = self.now(second);
            self.view.look(directory.list().unwrap(), now, &mut |name| {
                directory.read(name).map_err(|error| error.to_string())
            });
            self.view.expire(now.instant);
            let instances = self.view.instances();
            instances.keys().map(|(worker, _)| worker.0).collect()
        }

        fn write(&self, record: &Record, second: i64) {
            let directory = Directory::new(self.dir.path().to_owned());
            directory.write(record).unwrap();
            self.touch(&record.alive_name(), second);
        }
    }

    #[test]
    fn a_lease_lasts_as_long_as_the_file_is_touched() {
        let mut scene = Scene::new();
        let record = Scene::record(1);
        scene.write(&record, 0);
        assert_eq!(scene.look(0), [1]);
        assert_eq!(scene.look(9), [1]);
        scene.touch(&record.alive_name(), 9);
        assert_eq!(scene.look(9), [1]);
        assert_eq!(scene.look(18), [1]);
        assert!(scene.look(19).is_empty());
        // A process that was stopped goes on.
        scene.touch(&record.alive_name(), 25);
        assert_eq!(scene.look(26), [1]);
    }

    #[test]
    fn clocks_that_differ_between_machines_do_no_harm() {
        let mut scene = Scene::new();
        let (behind, ahead) = (Scene::record(1), Scene::record(2));
        scene.write(&behind, -500);
        scene.write(&ahead, 500);
        assert_eq!(scene.look(0), [2], "the first may be a leftover");
        scene.touch(&behind.alive_name(), -497);
        assert_eq!(scene.look(3), [1, 2]);
        assert_eq!(scene.look(10), [1]);
        assert!(scene.look(13).is_empty());
    }

    #[test]
    fn a_file_that_vanishes_is_missed_only_when_its_lease_ends() {
        let mut scene = Scene::new();
        let record = Scene::record(1);
        scene.write(&record, 0);
        assert_eq!(scene.look(0), [1]);
        fs::remove_file(scene.dir.path().join(record.alive_name())).unwrap();
        assert_eq!(scene.look(9), [1]);
        scene.view.renew_all(scene.now(9).instant);
        assert_eq!(scene.look(18), [1]);
        assert!(scene.look(19).is_empty());
    }

    #[test]
    fn leaving_counts_at_once_and_only_for_the_registration_that_left() {
        let mut scene = Scene::new();
        let (first, second) = (Scene::record(1), Scene::record(1));
        let directory = Directory::new(scene.dir.path().to_owned());
        scene.write(&first, 0);
        assert_eq!(scene.look(0), [1]);
        directory.leave(&first).unwrap();
        assert!(scene.look(1).is_empty());
        scene.write(&second, 1);
        assert_eq!(scene.look(1), [1]);
        directory.leave(&first).unwrap();
        assert_eq!(scene.look(2), [1]);
    }

    #[test]
    fn files_of_the_dead_are_stale_after_three_leases() {
        let mut scene = Scene::new();
        let record = Scene::record(1);
        scene.write(&record, 0);
        fs::write(scene.dir.path().join(".x.tmp"), "").unwrap();
        fs::write(scene.dir.path().join("broken.json"), "").unwrap();
        scene.look(0);
        assert_eq!(
            scene.view.stale_files(scene.now(30).instant),
            Vec::<String>::new()
        );
        let mut stale = scene.view.stale_files(scene.now(31).instant);
        stale.sort();
        assert_eq!(stale, [".x.tmp".to_owned(), record.alive_name()]);
    }
}
