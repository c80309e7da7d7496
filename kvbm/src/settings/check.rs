//! What is wrong or odd about settings on a machine, before anything is allocated.

use serde::Serialize;

use super::{KvbmSettings, Sizes};
use crate::admit::AdmissionKind;

/// What has to be known of a machine. A figure that the system does not tell is `None`, and what
/// depends on it is not checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Bytes of memory that can be had without swapping.
    pub memory_available: Option<u64>,
    /// Bytes left below the limit of this process's control group; `None` without a limit.
    pub memory_limit_left: Option<u64>,
    /// Bytes this process may lock; `None` when that is unlimited.
    pub memlock: Option<u64>,
    /// Whether host memory is pinned for a device.
    pub pinned: bool,
    /// Blocks of G1, over all data-parallel ranks.
    pub device_blocks: Option<u32>,
    /// Where G3's file would be.
    pub folder: Folder,
    /// Bytes free there for this user.
    pub folder_free: Option<u64>,
    /// Bytes there that stores of an earlier run already have.
    pub folder_reusable: u64,
    /// Whether the folder is memory and empty after a reboot.
    pub folder_volatile: bool,
    /// The block device that holds G3, if one was named: its length, or why there is none.
    pub device: Option<Result<u64, String>>,
}

/// A folder for files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Folder {
    /// Files can be made in it.
    #[default]
    Writable,
    /// It is not there, and can be made.
    Absent,
    /// It cannot be used, for this reason.
    Unusable(String),
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The worker would not start, or not stay.
    Error,
    /// It works, and probably not as meant.
    Warning,
}

/// Something about the settings that somebody should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, with its numbers, and what to do.
    pub text: String,
}

impl KvbmSettings {
    /// Everything that is wrong or odd, errors first.
    #[must_use]
    pub fn check(&self, sizes: &Sizes, facts: &HostFacts) -> Vec<Finding> {
        let mut check = Check {
            settings: self,
            sizes,
            facts,
            findings: Vec::new(),
        };
        check.rounding();
        check.ports();
        check.memory();
        check.disk();
        check.writes();
        check.objects();
        check.peers();
        check.order();
        check
            .findings
            .sort_by_key(|finding| finding.severity != Severity::Error);
        check.findings
    }
}

struct Check<'a> {
    settings: &'a KvbmSettings,
    sizes: &'a Sizes,
    facts: &'a HostFacts,
    findings: Vec<Finding>,
}

impl Check<'_> {
    fn error(&mut self, text: String) {
        let severity = Severity::Error;
        self.findings.push(Finding { severity, text });
    }

    fn warning(&mut self, text: String) {
        let severity = Severity::Warning;
        self.findings.push(Finding { severity, text });
    }

    /// Sizes that are less than one block.
    fn rounding(&mut self) {
        let (settings, sizes) = (self.settings, self.sizes);
        for (name, gb, blocks) in [
            (
                "DYN_KVBM_CPU_CACHE_GB",
                settings.cpu_cache_gb.value,
                sizes.host_blocks,
            ),
            (
                "DYN_KVBM_DISK_CACHE_GB",
                settings.disk_cache_gb.value,
                sizes.disk_blocks,
            ),
        ] {
            if gb > 0.0 && blocks == 0 {
                self.error(format!(
                    "{name} is {gb} GB, less than one block of {}: raise it, or set it to 0",
                    bytes(sizes.block_bytes)
                ));
            }
        }
    }

    fn ports(&mut self) {
        let publish = self.settings.leader_zmq_pub_port.value;
        if publish == self.settings.leader_zmq_ack_port.value {
            self.error(format!(
                "DYN_KVBM_LEADER_ZMQ_PUB_PORT and DYN_KVBM_LEADER_ZMQ_ACK_PORT are both {publish}: give them \
                 different ports"
            ));
        }
    }

    fn memory(&mut self) {
        let (sizes, facts) = (self.sizes, self.facts);
        let needed = sizes.host_bytes;
        if needed == 0 {
            return;
        }
        let what = if sizes.host_blocks > 0 {
            format!("G2 takes {} ({} blocks)", bytes(needed), sizes.host_blocks)
        } else {
            format!(
                "{} blocks to pass through take {}",
                sizes.bounce_blocks,
                bytes(needed)
            )
        };
        let advice = "lower DYN_KVBM_CPU_CACHE_GB";
        for (have, of) in [
            (facts.memory_available, "of memory are available"),
            (
                facts.memory_limit_left,
                "are left below the memory limit of this control group",
            ),
        ] {
            if let Some(have) = have.filter(|have| *have < needed) {
                self.error(format!("{what}, and only {} {of}: {advice}", bytes(have)));
            }
        }
        if let Some(limit) = facts
            .memlock
            .filter(|limit| facts.pinned && *limit < needed)
        {
            self.error(format!(
                "{what} of pinned memory, and this process may lock {}: raise the limit ('ulimit -l unlimited', \
                 container: --ulimit memlock=-1), or {advice}",
                bytes(limit)
            ));
        }
    }

    fn disk(&mut self) {
        let (settings, sizes, facts) = (self.settings, self.sizes, self.facts);
        if sizes.disk_blocks == 0 {
            let given = [
                ("DYN_KVBM_DISK_CACHE_DIR", settings.disk_cache_dir.given()),
                ("DYN_KVBM_DISK_DEVICE", settings.disk_device.given()),
                (
                    "DYN_KVBM_DISK_ALLOCATOR_TYPE",
                    settings.disk_allocator_type.given(),
                ),
                ("DYN_KVBM_G3_ADMISSION", settings.g3_admission.given()),
                ("DYN_KVBM_DISK_EVICTION", settings.disk_eviction.given()),
                (
                    "DYN_KVBM_DISK_WRITE_BYTES_PER_S",
                    settings.disk_write_bytes_per_s.given(),
                ),
                ("DYN_KVBM_DISK_DWPD", settings.disk_dwpd.given()),
            ];
            let given: Vec<&str> = given
                .iter()
                .filter(|(_, given)| *given)
                .map(|(name, _)| *name)
                .collect();
            if !given.is_empty() {
                self.warning(format!(
                    "without DYN_KVBM_DISK_CACHE_GB there is no G3, and {} has no effect",
                    given.join(", ")
                ));
            }
            return;
        }
        let needed = sizes.disk_bytes;
        let what = format!("G3 takes {} ({} blocks)", bytes(needed), sizes.disk_blocks);
        if let Some(path) = &settings.disk_device.value {
            let path = path.display();
            match &facts.device {
                Some(Err(why)) => {
                    self.error(format!("DYN_KVBM_DISK_DEVICE {path} cannot be used: {why}"));
                }
                Some(Ok(length)) if *length < needed => self.error(format!(
                    "{what}, and {path} has {}: lower DYN_KVBM_DISK_CACHE_GB",
                    bytes(*length)
                )),
                Some(Ok(_)) | None => {}
            }
            if settings.disk_cache_dir.given() {
                self.warning(format!(
                    "G3 is on {path} (DYN_KVBM_DISK_DEVICE), and DYN_KVBM_DISK_CACHE_DIR has no effect"
                ));
            }
            if sizes.ranks > 1 {
                self.error(format!(
                    "{} ranks cannot share the device {path}: use DYN_KVBM_DISK_CACHE_DIR, in which each has a file",
                    sizes.ranks
                ));
            }
            return;
        }
        let folder = settings.disk_cache_dir.value.display().to_string();
        if let Folder::Unusable(why) = &facts.folder {
            self.error(format!(
                "DYN_KVBM_DISK_CACHE_DIR {folder} cannot be used: {why}"
            ));
            return;
        }
        let room = facts
            .folder_free
            .map(|free| free.saturating_add(facts.folder_reusable));
        if let Some(room) = room.filter(|room| *room < needed) {
            let reusable = if facts.folder_reusable > 0 {
                format!(
                    ", {} in files of earlier runs included",
                    bytes(facts.folder_reusable)
                )
            } else {
                String::new()
            };
            self.error(format!(
                "{what}, and {folder} has room for {}{reusable}: lower DYN_KVBM_DISK_CACHE_GB, or choose another \
                 DYN_KVBM_DISK_CACHE_DIR",
                bytes(room)
            ));
        }
        if facts.folder_volatile {
            self.warning(format!(
                "{folder} is memory: what G3 keeps there takes RAM and is gone after a reboot; set \
                 DYN_KVBM_DISK_CACHE_DIR to a directory on a drive"
            ));
        }
    }

    /// Admission and write budget.
    fn writes(&mut self) {
        let (settings, sizes) = (self.settings, self.sizes);
        if sizes.disk_blocks == 0 {
            return;
        }
        if settings.disable_disk_offload_filter.value
            && settings.g3_admission.given()
            && settings.g3_admission.value != AdmissionKind::All
        {
            self.warning(format!(
                "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER ({}) writes every block, so DYN_KVBM_G3_ADMISSION '{}' ({}) \
                 has no effect: unset one of them",
                settings.disable_disk_offload_filter.origin,
                settings.g3_admission.value,
                settings.g3_admission.origin
            ));
        }
        let budget = settings.write_budget(sizes);
        match budget.rate() {
            Err(error) => self.error(format!("the write budget of G3: {error}")),
            Ok(None) if settings.admission() == AdmissionKind::All => self.warning(
                "every block is written to G3 and nothing limits how much: that wears the drive; set \
                 DYN_KVBM_DISK_DWPD to its rating"
                    .to_owned(),
            ),
            Ok(_) => {}
        }
        if settings.admission() == AdmissionKind::None {
            self.warning(
                "DYN_KVBM_G3_ADMISSION is 'none': nothing is written to G3, only what is in it is read"
                    .to_owned(),
            );
        }
    }

    fn objects(&mut self) {
        let settings = self.settings;
        if !settings.object_enabled.value {
            if settings.object_bucket.given() || settings.object_endpoint.given() {
                self.warning(
                    "an object store is described and not used: set DYN_KVBM_OBJECT_ENABLED=true"
                        .to_owned(),
                );
            }
            return;
        }
        if settings.object_bucket.value.is_none() {
            self.error(
                "DYN_KVBM_OBJECT_ENABLED is true and DYN_KVBM_OBJECT_BUCKET is not set".to_owned(),
            );
        }
        let keys = (
            &settings.object_access_key.value,
            &settings.object_secret_key.value,
        );
        if keys.0.is_some() != keys.1.is_some() {
            self.error(
                "DYN_KVBM_OBJECT_ACCESS_KEY and DYN_KVBM_OBJECT_SECRET_KEY are only useful together: set both or \
                 none"
                    .to_owned(),
            );
        }
    }

    fn peers(&mut self) {
        let (settings, sizes) = (self.settings, self.sizes);
        if settings.peers_enabled.value && !sizes.peers {
            self.warning(
                "DYN_KVBM_PEERS_ENABLED is true and there is no G2 (DYN_KVBM_CPU_CACHE_GB is 0): no blocks are \
                 exchanged with other workers"
                    .to_owned(),
            );
        }
        if settings.peers_lend_blocks.given() && !settings.peers_enabled.value {
            self.warning(
                "DYN_KVBM_PEERS_LEND_BLOCKS has no effect: set DYN_KVBM_PEERS_ENABLED=true"
                    .to_owned(),
            );
        }
        // The default is only a bound.
        let lend = &settings.peers_lend_blocks;
        if sizes.peers && lend.given() && lend.value > sizes.lend_blocks {
            self.warning(format!(
                "at most half of G2 is lent to other workers: {} blocks and not {}",
                sizes.lend_blocks, lend.value
            ));
        }
    }

    /// Whether each tier is larger than the one above it.
    fn order(&mut self) {
        let (sizes, facts) = (self.sizes, self.facts);
        if let Some(device) = facts
            .device_blocks
            .filter(|n| sizes.host_blocks > 0 && sizes.host_blocks < *n)
        {
            self.warning(format!(
                "G2 has {} blocks and G1 has {device}: a G2 that is smaller than G1 mostly holds what G1 holds too; \
                 {} for DYN_KVBM_CPU_CACHE_GB would be as large",
                sizes.host_blocks,
                bytes(sizes.block_bytes.saturating_mul(device.into()))
            ));
        }
        if sizes.disk_blocks > 0 && sizes.disk_blocks < sizes.host_blocks {
            self.warning(format!(
                "G3 has {} blocks and G2 has {}: a G3 that is smaller than G2 is overwritten before it is of use; raise \
                 DYN_KVBM_DISK_CACHE_GB above {}, or leave G3 out",
                sizes.disk_blocks,
                sizes.host_blocks,
                bytes(sizes.host_bytes)
            ));
        }
        if sizes.host_blocks == 0 && (sizes.disk_blocks > 0 || sizes.object_blocks > 0) {
            self.warning(format!(
                "there is no G2 (DYN_KVBM_CPU_CACHE_GB is 0): blocks pass through {} blocks of host memory, and \
                 nothing read from below stays in memory",
                sizes.bounce_blocks
            ));
        }
    }
}

/// An amount for people: as it is up to 10 kB, in GB of 10^9 bytes above 0.1 GB.
#[must_use]
pub(super) fn bytes(amount: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits or so")]
    let value = amount as f64;
    match amount {
        0..10_000 => format!("{amount} bytes"),
        10_000..10_000_000 => format!("{:.1} kB", value / 1e3),
        10_000_000..100_000_000 => format!("{:.1} MB", value / 1e6),
        100_000_000.. => format!("{:.2} GB", value / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{KvbmFlags, resolve};

    const GB: u64 = 1_000_000_000;

    fn roomy() -> HostFacts {
        HostFacts {
            memory_available: Some(64 * GB),
            folder_free: Some(1000 * GB),
            ..HostFacts::default()
        }
    }

    fn findings(given: &[(&'static str, &str)], facts: &HostFacts) -> Vec<(Severity, String)> {
        let flags: KvbmFlags = given
            .iter()
            .map(|(key, value)| (*key, (*value).to_owned()))
            .collect();
        let settings = resolve(std::iter::empty(), None, &flags).unwrap();
        let found = settings.check(&settings.sizes(1_000_000, 1), facts);
        found
            .into_iter()
            .map(|finding| (finding.severity, finding.text))
            .collect()
    }

    type Given<'a> = &'a [(&'static str, &'a str)];

    const BOTH: [(&str, &str); 2] = [("cpu_cache_gb", "10"), ("disk_cache_gb", "100")];

    #[test]
    fn a_sound_hierarchy_and_nothing_at_all_have_no_findings() {
        let facts = HostFacts {
            device_blocks: Some(5000),
            ..roomy()
        };
        assert_eq!(findings(&BOTH, &facts), []);
        assert_eq!(findings(&[], &HostFacts::default()), []);
    }

    #[test]
    fn every_fault_is_found_with_its_numbers() {
        use Severity::{Error, Warning};
        let with = |change: fn(&mut HostFacts)| {
            let mut facts = roomy();
            change(&mut facts);
            facts
        };
        let device = [BOTH[0], BOTH[1], ("disk_device", "/dev/x")];
        let cases: Vec<(Given<'_>, HostFacts, Severity, &str)> = vec![
            (
                &BOTH,
                with(|f| f.memory_available = Some(4 * GB)),
                Error,
                "G2 takes 10.00 GB (10000 blocks), and only 4.00 GB of memory are available",
            ),
            (
                &BOTH,
                with(|f| f.memory_limit_left = Some(GB)),
                Error,
                "only 1.00 GB are left below the memory limit",
            ),
            (
                &BOTH,
                with(|f| {
                    f.memlock = Some(65_536);
                    f.pinned = true;
                }),
                Error,
                "10.00 GB (10000 blocks) of pinned memory, and this process may lock 65.5 kB",
            ),
            (
                &BOTH,
                with(|f| f.folder_free = Some(99 * GB)),
                Error,
                "and /tmp/ has room for 99.00 GB: lower DYN_KVBM_DISK_CACHE_GB",
            ),
            (
                &BOTH,
                with(|f| {
                    f.folder_free = Some(GB);
                    f.folder_reusable = 2 * GB;
                }),
                Error,
                "room for 3.00 GB, 2.00 GB in files of earlier runs included",
            ),
            (
                &BOTH,
                with(|f| f.folder = Folder::Unusable("permission denied".to_owned())),
                Error,
                "DYN_KVBM_DISK_CACHE_DIR /tmp/ cannot be used: permission denied",
            ),
            (
                &BOTH,
                with(|f| f.folder_volatile = true),
                Warning,
                "/tmp/ is memory",
            ),
            (
                &BOTH,
                with(|f| f.device_blocks = Some(20_000)),
                Warning,
                "G2 has 10000 blocks and G1 has 20000",
            ),
            (
                &device,
                with(|f| f.device = Some(Ok(GB))),
                Error,
                "and /dev/x has 1.00 GB",
            ),
            (
                &device,
                with(|f| f.device = Some(Err("no such device".to_owned()))),
                Error,
                "DYN_KVBM_DISK_DEVICE /dev/x cannot be used: no such device",
            ),
            (
                &[("cpu_cache_gb", "10"), ("disk_cache_gb", "5")],
                roomy(),
                Warning,
                "G3 has 5000 blocks and G2 has 10000",
            ),
            (
                &[("cpu_cache_gb", "0.0001")],
                roomy(),
                Error,
                "DYN_KVBM_CPU_CACHE_GB is 0.0001 GB, less than one block of 1000.0 kB",
            ),
            (
                &[("disk_cache_gb", "5")],
                roomy(),
                Warning,
                "there is no G2 (DYN_KVBM_CPU_CACHE_GB is 0)",
            ),
            (
                &[("disk_cache_dir", "/srv")],
                roomy(),
                Warning,
                "DYN_KVBM_DISK_CACHE_DIR has no effect",
            ),
            (
                &[
                    BOTH[0],
                    BOTH[1],
                    ("disable_disk_offload_filter", "1"),
                    ("g3_admission", "seen-2"),
                ],
                roomy(),
                Warning,
                "so DYN_KVBM_G3_ADMISSION 'seen-2' (flag --kvbm-g3-admission) has no effect",
            ),
            (
                &[BOTH[0], BOTH[1], ("g3_admission", "all")],
                roomy(),
                Warning,
                "set DYN_KVBM_DISK_DWPD",
            ),
            (
                &[BOTH[0], BOTH[1], ("g3_admission", "none")],
                roomy(),
                Warning,
                "nothing is written to G3",
            ),
            (
                &[BOTH[0], BOTH[1], ("disk_dwpd", "0.0000001")],
                roomy(),
                Error,
                "the write budget of G3: ",
            ),
            (
                &[("object_enabled", "1")],
                roomy(),
                Error,
                "DYN_KVBM_OBJECT_BUCKET is not set",
            ),
            (
                &[("object_bucket", "kv")],
                roomy(),
                Warning,
                "set DYN_KVBM_OBJECT_ENABLED=true",
            ),
            (
                &[("peers_enabled", "1")],
                roomy(),
                Warning,
                "no blocks are exchanged with other workers",
            ),
            (
                &[BOTH[0], ("peers_lend_blocks", "9")],
                roomy(),
                Warning,
                "set DYN_KVBM_PEERS_ENABLED=true",
            ),
            (
                &[
                    BOTH[0],
                    ("peers_enabled", "1"),
                    ("peers_lend_blocks", "4000000000"),
                ],
                roomy(),
                Warning,
                "at most half of G2 is lent",
            ),
            (
                &[("leader_zmq_pub_port", "56002")],
                roomy(),
                Error,
                "are both 56002",
            ),
        ];
        for (given, facts, severity, text) in cases {
            let found = findings(given, &facts);
            assert!(
                found
                    .iter()
                    .any(|(s, t)| *s == severity && t.contains(text)),
                "{severity:?} {text}: {found:#?}"
            );
        }
    }

    #[test]
    fn errors_come_first() {
        let mut facts = roomy();
        facts.memory_available = Some(0);
        let found = findings(&[("disk_cache_gb", "0.1"), ("cpu_cache_gb", "1")], &facts);
        assert_eq!(found.len(), 2, "{found:#?}");
        assert_eq!(
            (found[0].0, found[1].0),
            (Severity::Error, Severity::Warning)
        );
    }

    #[test]
    fn files_of_earlier_runs_are_room() {
        let mut facts = roomy();
        facts.folder_free = Some(GB);
        facts.folder_reusable = 100 * GB;
        assert_eq!(findings(&BOTH, &facts), []);
    }
}
