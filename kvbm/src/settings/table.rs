//! The settings: names, units, defaults, meanings. The one list that variables, file keys, flags,
//! printed tables and documentation follow from.

use std::path::PathBuf;

use super::{
    Origin, Setting,
    form::{self, ConsolidatorMode, DiskAllocator, Plain, Secret, Shown},
};
use crate::{
    admit::AdmissionKind,
    evict::EvictionKind,
    tier::{DiskConfig, TierConfig},
};

/// What every setting's variable begins with.
pub const PREFIX: &str = "DYN_KVBM_";

/// A setting, without its value.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    /// Its key in a file. The variable is this in capitals after [`PREFIX`], the flag this with
    /// dashes after `--kvbm-`.
    pub key: &'static str,
    /// What its number counts; empty where it is no amount.
    pub unit: &'static str,
    /// What it does.
    pub help: &'static str,
    /// What it has to look like to be a switch, a secret, or neither.
    pub shape: Shape,
}

/// How a setting may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// With a value, anywhere.
    Value,
    /// As a flag also without a value.
    Switch,
    /// In a variable only: command lines and files can be read by others.
    Secret,
}

impl Described {
    /// Its variable.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("{PREFIX}{}", self.key.to_ascii_uppercase())
    }

    /// Its flag, without the two dashes before it.
    #[must_use]
    pub fn flag(&self) -> String {
        format!("kvbm-{}", self.key.replace('_', "-"))
    }
}

macro_rules! settings {
    ($($(#[doc = $help:literal])+ $shape:ident $key:ident: $kind:ty = $default:expr, $unit:literal, $form:expr;)+) => {
        /// All settings of the tiers below G1 of one worker, each with where it comes from.
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub struct KvbmSettings {
            $($(#[doc = $help])+ pub $key: Setting<$kind>,)+
            /// What was given and has no effect, or another one than it had: for people to read.
            pub notes: Vec<String>,
        }

        /// All settings, in the order in which they are shown.
        pub const SETTINGS: &[Described] = &[$(Described {
            key: stringify!($key),
            unit: $unit,
            help: concat!($($help),+),
            shape: Shape::$shape,
        }),+];

        impl Default for KvbmSettings {
            fn default() -> Self {
                Self {
                    $($key: Setting { value: $default, origin: Origin::Default },)+
                    notes: Vec::new(),
                }
            }
        }

        impl KvbmSettings {
            /// Sets what `key` names; the accepted form if `text` is not of it. Nothing if there is no
            /// such key.
            pub(super) fn assign(&mut self, key: &str, text: &str, origin: Origin) -> Result<(), String> {
                match key {
                    $(stringify!($key) => {
                        let value = $form(text)?;
                        self.$key = Setting { value, origin };
                    })+
                    _ => {}
                }
                Ok(())
            }

            /// Each setting with its value and where that comes from, in the order of [`SETTINGS`].
            #[must_use]
            pub fn values(&self) -> Vec<(&'static Described, Plain, &Origin)> {
                let values = vec![$((self.$key.value.plain(), &self.$key.origin)),+];
                let shown = SETTINGS.iter().zip(values);
                shown.map(|(setting, (value, origin))| (setting, value, origin)).collect()
            }
        }
    };
}

settings! {
    /// Host memory for G2, over all ranks of the worker. 0: no G2 by this setting.
    Value cpu_cache_gb: f64 = 0.0, "GB", form::gigabytes;
    /// Blocks of G2; above 0 it replaces the size in GB.
    Value cpu_cache_override_num_blocks: u32 = 0, "blocks", form::count::<u32, 0, BLOCKS_MAX>;
    /// Disk for G3, over all ranks of the worker. 0: no G3 by this setting.
    Value disk_cache_gb: f64 = 0.0, "GB", form::gigabytes;
    /// Blocks of G3; above 0 it replaces the size in GB.
    Value disk_cache_override_num_blocks: u32 = 0, "blocks", form::count::<u32, 0, BLOCKS_MAX>;
    /// Blocks of host memory that blocks pass through where there is no G2.
    Value bounce_blocks: u32 = 64, "blocks", form::count::<u32, 2, 65536>;

    /// Directory of G3's file, which stays there for the next start.
    Value disk_cache_dir: PathBuf = PathBuf::from("/tmp/"), "", form::path;
    /// Block device that holds G3 instead of a file. All that is on it is overwritten.
    Value disk_device: Option<PathBuf> = None, "", form::path_given;
    /// How G3's file is opened: `default` turns O_DIRECT on after opening, `open-direct` opens with it (for
    /// file systems that need that, such as IBM Storage Scale).
    Value disk_allocator_type: DiskAllocator = DiskAllocator::Default, "", form::disk_allocator;
    /// Read and write G3 through the page cache.
    Switch disk_disable_o_direct: bool = false, "", form::switch;
    /// Write zeros over the whole file where the file system cannot reserve space; without it the file is
    /// sparse there.
    Switch disk_zerofill_fallback: bool = false, "", form::switch;

    /// Which block of G1 is overwritten first: lru, multi-lru, s3-fifo, lineage.
    Value device_eviction: EvictionKind = EvictionKind::Lru, "", form::eviction;
    /// Which block of G2 is overwritten first.
    Value host_eviction: EvictionKind = TierConfig::default().host_eviction, "", form::eviction;
    /// Which block of G3 is overwritten first.
    Value disk_eviction: EvictionKind = DiskConfig::new(1).eviction, "", form::eviction;
    /// Which blocks are written to G3: tail-N (of requests with at most N new tokens), frequency (KVBM's filter), frequency+hits, seen-K (as in seen-2),
    /// on-evict, all, none.
    Value g3_admission: AdmissionKind = AdmissionKind::default(), "", form::admission;
    /// Write every block that reaches G2 to G3, whatever the admission says.
    Switch disable_disk_offload_filter: bool = false, "", form::switch;
    /// Most bytes written to G3 in a second. 0: no such limit.
    Value disk_write_bytes_per_s: u64 = 0, "bytes/s", form::count::<u64, 0, { u64::MAX }>;
    /// Most whole writes of the drive in a day. 0: no such limit.
    Value disk_dwpd: f64 = 0.0, "1/day", form::rate;
    /// Size of the drive that the limit on drive writes speaks of. 0: the size of G3.
    Value disk_drive_gb: f64 = 0.0, "GB", form::gigabytes;

    /// Blocks of requests with a lower priority, and those after them in the same request, stay in G1.
    /// Requests without a priority are not concerned.
    Value host_offload_prefix_min_priority: u32 = 0, "0..100", form::count::<u32, 0, 100>;
    /// Keep what was read from G3 or G4 in G2.
    Switch promote: bool = true, "", form::switch;
    /// Transfers between tiers at a time.
    Value max_concurrent_transfers: u32 = 4, "transfers", form::count::<u32, 1, 64>;
    /// Blocks in one transfer between tiers.
    Value max_transfer_batch_size: u32 = 16, "blocks", form::count::<u32, 1, 4096>;
    /// Blocks that may wait in each queue to a lower tier; what does not fit stays where it is.
    Value queue_blocks: u32 = 16_384, "blocks", form::count::<u32, 1, { 1 << 24 }>;
    /// Requests that may wait for blocks of lower tiers; more compute theirs.
    Value queue_requests: u32 = 256, "requests", form::count::<u32, 1, 65536>;
    /// Time for one transfer to a lower tier.
    Value offload_timeout_ms: u64 = 10_000, "ms", form::count::<u64, 1, 3_600_000>;
    /// Time for one transfer towards G1; what is not there then is computed.
    Value onboard_timeout_ms: u64 = 5_000, "ms", form::count::<u64, 1, 3_600_000>;

    /// Time for all ranks of a worker to find each other at start.
    Value leader_worker_init_timeout_secs: u64 = 1_800, "s", form::count::<u64, 1, 86_400>;
    /// Address at which the leader of a worker's ranks listens.
    Value leader_zmq_host: String = "127.0.0.1".to_owned(), "", form::host;
    /// Port at which the leader of a worker's ranks listens.
    Value leader_zmq_pub_port: u16 = 56_001, "port", form::count::<u16, 1, 65535>;
    /// Second port of the leader in KVBM; here answers come over the same connection.
    Value leader_zmq_ack_port: u16 = 56_002, "port", form::count::<u16, 1, 65535>;

    /// Merge the KV events of all tiers into one stream.
    Switch kv_events_enable_consolidator: bool = true, "", form::switch;
    /// How they are merged: dedup (stored with the first tier, removed with the last) or passthrough.
    Value kv_events_consolidator_mode: ConsolidatorMode = ConsolidatorMode::Dedup, "", form::consolidator_mode;

    /// Serve metrics of the tiers at http://HOST:PORT/metrics.
    Switch metrics: bool = false, "", form::switch;
    /// Address for metrics. KVBM listens on all (0.0.0.0).
    Value metrics_host: String = "127.0.0.1".to_owned(), "", form::host;
    /// Port for metrics.
    Value metrics_port: u16 = 6_880, "port", form::count::<u16, 1, 65535>;
    /// Requests over which hit rates are taken.
    Value cache_stats_max_requests: u32 = 1_000, "requests", form::count::<u32, 1, 1_000_000>;
    /// Seconds between lines about hit rates in the log. 0: none.
    Value cache_stats_log_interval_secs: u64 = 5, "s", form::count::<u64, 0, 86_400>;

    /// Record the blocks of every request, for `blockplane kvbm replay`.
    Switch enable_record: bool = false, "", form::switch;
    /// File that the record is appended to.
    Value record_path: PathBuf = PathBuf::from("kvbm-record.jsonl"), "", form::path;

    /// Exchange blocks with other workers of the same model: read what their G2 has, as G4, and lend
    /// what the own G2 has. Needs a G2.
    Switch peers_enabled: bool = false, "", form::switch;
    /// Blocks of G2 that are lent to other workers at a time, which cannot be overwritten meanwhile; at
    /// most half of G2 is. 0: only read.
    Value peers_lend_blocks: u32 = 1024, "blocks", form::count::<u32, 0, BLOCKS_MAX>;

    /// Keep blocks in an object store, as G4.
    Switch object_enabled: bool = false, "", form::switch;
    /// Its bucket; `{worker_id}` in it stands for the worker.
    Value object_bucket: Option<String> = None, "", form::bucket;
    /// Its address; the one that follows from the region when it is not given.
    Value object_endpoint: Option<String> = None, "", form::endpoint;
    /// Its region.
    Value object_region: Option<String> = None, "", form::text_given;
    /// Name of the credentials for it.
    Secret object_access_key: Option<Secret> = None, "", form::secret;
    /// The credentials for it.
    Secret object_secret_key: Option<Secret> = None, "", form::secret;
    /// Blocks that are known to be in it at most.
    Value object_num_blocks: u32 = 100_000, "blocks", form::count::<u32, 1, BLOCKS_MAX>;
    /// Write blocks to it when they reach G2.
    Switch object_write_through: bool = true, "", form::switch;
}

/// Most blocks of a tier: their numbers have 32 bits.
const BLOCKS_MAX: u64 = u32::MAX as u64 - 1;
