//! What settings come to for blocks of a size: blocks and bytes of each tier, and the configuration
//! of the tiers themselves.

use std::time::Duration;

use serde::Serialize;

use super::KvbmSettings;
use crate::{
    admit::{AdmissionConfig, AdmissionKind, WriteBudgetConfig},
    store::file_bytes,
    tier::{DiskConfig, QueueConfig, RemoteConfig, TierConfig},
};

/// What the tiers of one worker take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Bytes of a block, over all ranks.
    pub block_bytes: u64,
    /// Ranks that each hold a part of every block.
    pub ranks: u32,
    /// Blocks of G2.
    pub host_blocks: u32,
    /// Blocks of host memory that others pass through where there is no G2.
    pub bounce_blocks: u32,
    /// Host memory of both.
    pub host_bytes: u64,
    /// Blocks of G3.
    pub disk_blocks: u32,
    /// Disk for them, with headers and padding to whole pages.
    pub disk_bytes: u64,
    /// Blocks that are known to be in G4 at most.
    pub object_blocks: u32,
    /// Whether G4 is other workers too.
    pub peers: bool,
    /// Blocks of G2 that are lent to other workers at a time.
    pub lend_blocks: u32,
}

impl Sizes {
    /// Whether there is no tier below G1.
    #[must_use]
    pub const fn off(&self) -> bool {
        self.host_blocks == 0 && self.disk_blocks == 0 && self.object_blocks == 0
    }
}

impl KvbmSettings {
    /// What these settings come to when each of `ranks` ranks holds `block_bytes` bytes of a block.
    /// Ranks that hold different sequences (data-parallel ones) count as one: they share the tiers.
    /// As in KVBM, sizes in GB are over all ranks and are rounded down to whole blocks, and counts of
    /// blocks above 0 replace them.
    #[must_use]
    pub fn sizes(&self, block_bytes: u64, ranks: u32) -> Sizes {
        let all = block_bytes.saturating_mul(ranks.into()).max(1);
        let blocks = |gb: f64, count: u32| {
            if count > 0 {
                count
            } else {
                whole_blocks(gb, all)
            }
        };
        let host_blocks = blocks(
            self.cpu_cache_gb.value,
            self.cpu_cache_override_num_blocks.value,
        );
        let disk_blocks = blocks(
            self.disk_cache_gb.value,
            self.disk_cache_override_num_blocks.value,
        );
        let object_blocks = if self.object_enabled.value {
            self.object_num_blocks.value
        } else {
            0
        };
        let below = disk_blocks > 0 || object_blocks > 0;
        let peers = self.peers_enabled.value && host_blocks > 0;
        let bounce_blocks = if host_blocks == 0 && below {
            self.bounce_blocks.value
        } else {
            0
        };
        let file = file_bytes(disk_blocks, block_bytes.max(1)).unwrap_or(u64::MAX);
        Sizes {
            block_bytes: all,
            ranks,
            host_blocks,
            bounce_blocks,
            host_bytes: all.saturating_mul((host_blocks.max(bounce_blocks)).into()),
            disk_blocks,
            disk_bytes: if disk_blocks == 0 {
                0
            } else {
                file.saturating_mul(ranks.into())
            },
            object_blocks,
            peers,
            lend_blocks: if peers {
                self.peers_lend_blocks.value.min(host_blocks / 2)
            } else {
                0
            },
        }
    }

    /// The tiers' own configuration; `None` without a tier.
    #[must_use]
    pub fn tier_config(&self, sizes: &Sizes) -> Option<TierConfig> {
        if sizes.off() {
            return None;
        }
        let disk = (sizes.disk_blocks > 0).then(|| DiskConfig {
            eviction: self.disk_eviction.value,
            admission: AdmissionConfig::from(self.admission()),
            budget: self.write_budget(sizes),
            ..DiskConfig::new(sizes.disk_blocks)
        });
        let objects = sizes.object_blocks > 0;
        // Nothing is written to peers.
        let remote = (objects || sizes.peers).then_some(RemoteConfig {
            write_through: objects && self.object_write_through.value,
        });
        Some(TierConfig {
            host_blocks: sizes.host_blocks,
            bounce_blocks: self.bounce_blocks.value,
            host_eviction: self.host_eviction.value,
            disk,
            remote,
            queues: QueueConfig {
                offload_blocks_max: self.queue_blocks.value,
                onboard_requests_max: self.queue_requests.value,
                batch_blocks: self.max_transfer_batch_size.value,
                concurrent: self.max_concurrent_transfers.value,
                offload_time: Duration::from_millis(self.offload_timeout_ms.value),
                onboard_time: Duration::from_millis(self.onboard_timeout_ms.value),
            },
            promote: self.promote.value,
            host_min_priority: self.host_offload_prefix_min_priority.value,
            ..TierConfig::default()
        })
    }

    /// What comes to G3, the switch of KVBM's filter included.
    #[must_use]
    pub fn admission(&self) -> AdmissionKind {
        if self.disable_disk_offload_filter.value {
            AdmissionKind::All
        } else {
            self.g3_admission.value
        }
    }

    pub(super) fn write_budget(&self, sizes: &Sizes) -> WriteBudgetConfig {
        let drive = bytes_of(self.disk_drive_gb.value);
        WriteBudgetConfig {
            bytes_per_s: Some(self.disk_write_bytes_per_s.value).filter(|rate| *rate > 0),
            drive_writes_per_day: Some(self.disk_dwpd.value).filter(|rate| *rate > 0.0),
            drive_bytes: if drive > 0 { drive } else { sizes.disk_bytes },
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the parser takes 0 to 10^9 GB, and 10^18 is below 2^64"
)]
const fn bytes_of(gb: f64) -> u64 {
    (gb * 1e9) as u64
}

fn whole_blocks(gb: f64, block_bytes: u64) -> u32 {
    u32::try_from(bytes_of(gb) / block_bytes).unwrap_or(u32::MAX - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{KvbmFlags, resolve};

    fn settings(given: &[(&'static str, &str)]) -> KvbmSettings {
        let flags: KvbmFlags = given
            .iter()
            .map(|(key, value)| (*key, (*value).to_owned()))
            .collect();
        resolve(std::iter::empty(), None, &flags).unwrap()
    }

    #[test]
    fn gigabytes_are_decimal_and_over_all_ranks() {
        let given = settings(&[("cpu_cache_gb", "0.5"), ("disk_cache_gb", "7.5")]);
        let one = given.sizes(1 << 20, 1);
        assert_eq!((one.host_blocks, one.disk_blocks), (476, 7152));
        assert_eq!(one.host_bytes, 476 << 20);
        assert!(one.disk_bytes > 7152 << 20, "{one:?}");
        assert_eq!(one.bounce_blocks, 0);
        let four = given.sizes(1 << 20, 4);
        assert_eq!((four.host_blocks, four.disk_blocks), (119, 1788));
        assert_eq!(four.host_bytes, 476 << 20);
    }

    #[test]
    fn counts_of_blocks_replace_gigabytes() {
        let given = settings(&[
            ("cpu_cache_gb", "1000"),
            ("cpu_cache_override_num_blocks", "3"),
            ("disk_cache_override_num_blocks", "5"),
        ]);
        let sizes = given.sizes(4096, 2);
        assert_eq!((sizes.host_blocks, sizes.disk_blocks), (3, 5));
        assert_eq!((sizes.block_bytes, sizes.host_bytes), (8192, 3 * 8192));
    }

    #[test]
    fn without_a_g2_blocks_pass_through_a_few() {
        let sizes = settings(&[("disk_cache_override_num_blocks", "5")]).sizes(4096, 1);
        assert_eq!((sizes.host_blocks, sizes.bounce_blocks), (0, 64));
        assert_eq!(sizes.host_bytes, 64 * 4096);
        assert!(!sizes.off());
        let nothing = KvbmSettings::default();
        let sizes = nothing.sizes(4096, 1);
        assert!(sizes.off() && nothing.tier_config(&sizes).is_none());
        assert_eq!((sizes.host_bytes, sizes.disk_bytes), (0, 0));
    }

    /// The defaults of the settings are those of the tiers.
    #[test]
    fn nothing_but_a_size_leaves_every_default() {
        let given = settings(&[
            ("cpu_cache_override_num_blocks", "9"),
            ("disk_cache_override_num_blocks", "10"),
        ]);
        let sizes = given.sizes(4096, 1);
        let mut expected = TierConfig {
            host_blocks: 9,
            disk: Some(DiskConfig::new(10)),
            ..TierConfig::default()
        };
        expected.disk.as_mut().unwrap().budget.drive_bytes = sizes.disk_bytes;
        assert_eq!(given.tier_config(&sizes), Some(expected));
    }

    #[test]
    fn every_setting_of_the_tiers_reaches_them() {
        let given = settings(&[
            ("disk_cache_override_num_blocks", "10"),
            ("bounce_blocks", "7"),
            ("host_eviction", "s3-fifo"),
            ("disk_eviction", "multi-lru"),
            ("g3_admission", "seen-3"),
            ("disk_write_bytes_per_s", "1000"),
            ("disk_dwpd", "0.5"),
            ("disk_drive_gb", "2"),
            ("promote", "false"),
            ("host_offload_prefix_min_priority", "3"),
            ("max_concurrent_transfers", "2"),
            ("max_transfer_batch_size", "4"),
            ("queue_blocks", "5"),
            ("queue_requests", "6"),
            ("offload_timeout_ms", "70"),
            ("onboard_timeout_ms", "80"),
            ("object_enabled", "true"),
            ("object_write_through", "false"),
        ]);
        let config = given.tier_config(&given.sizes(4096, 1)).unwrap();
        assert!(config.validate().is_ok(), "{config:?}");
        let disk = config.disk.as_ref().unwrap();
        assert_eq!((config.host_blocks, config.bounce_blocks), (0, 7));
        assert_eq!(config.host_eviction.to_string(), "s3-fifo");
        assert_eq!(disk.eviction.to_string(), "multi-lru");
        assert_eq!(disk.admission.kind, AdmissionKind::SeenK { k: 3 });
        let budget = WriteBudgetConfig {
            bytes_per_s: Some(1000),
            drive_writes_per_day: Some(0.5),
            drive_bytes: 2_000_000_000,
        };
        assert_eq!(disk.budget, budget);
        assert!(!config.promote);
        assert_eq!(config.host_min_priority, 3);
        let queues = QueueConfig {
            offload_blocks_max: 5,
            onboard_requests_max: 6,
            batch_blocks: 4,
            concurrent: 2,
            offload_time: Duration::from_millis(70),
            onboard_time: Duration::from_millis(80),
        };
        assert_eq!(config.queues, queues);
        assert_eq!(
            config.remote,
            Some(RemoteConfig {
                write_through: false
            })
        );
    }

    #[test]
    fn peers_need_a_g2_and_get_half_of_it_at_most() {
        let sizes = |given: &[(&'static str, &str)]| settings(given).sizes(4096, 1);
        let host = ("cpu_cache_override_num_blocks", "100");
        let (on, few) = (("peers_enabled", "true"), ("peers_lend_blocks", "7"));
        let lend = |sizes: Sizes| (sizes.peers, sizes.lend_blocks);
        assert_eq!(lend(sizes(&[host])), (false, 0));
        assert_eq!(lend(sizes(&[host, on])), (true, 50));
        assert_eq!(lend(sizes(&[host, on, few])), (true, 7));
        assert_eq!(lend(sizes(&[on, ("disk_cache_gb", "1")])), (false, 0));
        assert!(sizes(&[on]).off());
        let remote = |given: &[(&'static str, &str)]| {
            let given = settings(given);
            given.tier_config(&given.sizes(4096, 1)).unwrap().remote
        };
        let writes = |write_through| Some(RemoteConfig { write_through });
        assert_eq!(remote(&[host]), None);
        assert_eq!(remote(&[host, on]), writes(false));
        assert_eq!(remote(&[host, on, ("object_enabled", "1")]), writes(true));
    }

    #[test]
    fn kvbms_switch_of_the_filter_admits_all() {
        let given = settings(&[
            ("disable_disk_offload_filter", "1"),
            ("g3_admission", "frequency"),
        ]);
        assert_eq!(given.admission(), AdmissionKind::All);
    }
}
