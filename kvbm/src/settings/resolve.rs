//! From text in variables, files and flags to settings, strictly: everything that is wrong is
//! reported, and at once.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    KvbmSettings, Origin, form,
    names::{ALIASES, NIXL_BACKEND, WITHOUT_EFFECT, concerns_us, nearest_key, nearest_variable},
    table::{Described, SETTINGS, Shape},
};

/// The settings of a deployment file that concern one worker: tables, the more special one later.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KvbmFile(pub Vec<KvbmTable>);

/// One `[kvbm]` table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvbmTable {
    /// File and place in it, for messages.
    pub source: String,
    /// What the table says.
    pub values: FileValues,
}

/// The contents of a `[kvbm]` table: keys as in [`SETTINGS`].
pub type FileValues = BTreeMap<String, FileValue>;

/// A value of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FileValue {
    /// `true` or `false`.
    Switch(bool),
    /// A whole number.
    Whole(i64),
    /// Any number.
    Number(f64),
    /// Text.
    Text(String),
}

/// Values of flags by the key of their setting, as text.
pub type KvbmFlags = BTreeMap<&'static str, String>;

/// Something given that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SettingError {
    /// A variable that does not exist.
    #[error("variable {name} is not known; the nearest is {nearest}")]
    UnknownVariable {
        /// The variable.
        name: String,
        /// What was probably meant.
        nearest: String,
    },
    /// A key of a file that does not exist.
    #[error("key '{key}' of {source_name} is not known; the nearest is '{nearest}'")]
    UnknownKey {
        /// The key.
        key: String,
        /// The file, and the table in it.
        source_name: String,
        /// What was probably meant.
        nearest: String,
    },
    /// A value that is not of the form.
    #[error("{name} is '{value}'; accepted: {accepted}")]
    Value {
        /// Variable, flag, or key and file.
        name: String,
        /// What was given.
        value: String,
        /// What would do.
        accepted: String,
    },
    /// Credentials in a file or on a command line.
    #[error("{name} would let others read a secret; set the variable {variable} instead")]
    Secret {
        /// Where it was given.
        name: String,
        /// Where it belongs.
        variable: String,
    },
    /// Two names of one setting with two values.
    #[error("{name} is '{value}' and its older name {alias} is '{alias_value}'; set one of them")]
    TwoNames {
        /// The name.
        name: String,
        /// Its value.
        value: String,
        /// The older name.
        alias: String,
        /// The older name's value.
        alias_value: String,
    },
}

/// Settings from all sources: defaults, then what the file says, then variables, then flags.
///
/// `variables` may be the whole environment: what is not of KVBM is passed over. A variable that is
/// set to nothing counts as not set.
///
/// # Errors
/// Everything that is wrong, in the order file, variables (by name), flags. A wrong value is an
/// error also where another source replaces it.
pub fn resolve(
    variables: impl Iterator<Item = (String, String)>,
    file: Option<&KvbmFile>,
    flags: &KvbmFlags,
) -> Result<KvbmSettings, Vec<SettingError>> {
    let mut resolver = Resolver::default();
    for table in file.iter().flat_map(|file| &file.0) {
        resolver.table(table);
    }
    let ours = variables
        .map(|(name, value)| (name, value.trim().to_owned()))
        .filter(|(name, value)| !value.is_empty() && concerns_us(name));
    resolver.variables(&ours.collect());
    for (key, value) in flags {
        resolver.flag(key, value);
    }
    if resolver.errors.is_empty() {
        Ok(resolver.settings)
    } else {
        Err(resolver.errors)
    }
}

#[derive(Default)]
struct Resolver {
    settings: KvbmSettings,
    errors: Vec<SettingError>,
}

impl Resolver {
    fn table(&mut self, table: &KvbmTable) {
        for (key, value) in &table.values {
            let name = format!("'{key}' of {}", table.source);
            let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
                self.errors.push(SettingError::UnknownKey {
                    key: key.clone(),
                    source_name: table.source.clone(),
                    nearest: nearest_key(key),
                });
                continue;
            };
            let text = match value {
                FileValue::Switch(value) => value.to_string(),
                FileValue::Whole(value) => value.to_string(),
                FileValue::Number(value) => value.to_string(),
                FileValue::Text(value) => value.clone(),
            };
            self.assign(setting, name, &text, Origin::File(table.source.clone()));
        }
    }

    fn variables(&mut self, given: &BTreeMap<String, String>) {
        for (name, value) in given {
            let setting = SETTINGS.iter().find(|setting| setting.variable() == *name);
            if let Some(setting) = setting {
                self.assign(setting, name.clone(), value, Origin::Variable(name.clone()));
            } else if let Some((alias, key)) = ALIASES.iter().find(|(alias, _)| alias == name) {
                self.alias(alias, key, value, given);
            } else if let Some((_, why)) = WITHOUT_EFFECT.iter().find(|(known, _)| known == name) {
                self.note(format!("{name} has no effect: {why}"));
            } else if let Some(backend) = name.strip_prefix(NIXL_BACKEND).filter(|b| !b.is_empty())
            {
                self.nixl(name, backend, value);
            } else {
                self.errors.push(SettingError::UnknownVariable {
                    name: name.clone(),
                    nearest: nearest_variable(name).0,
                });
            }
        }
    }

    /// An older name of a setting. The newer one may be given too, with the same value.
    fn alias(&mut self, alias: &str, key: &str, value: &str, given: &BTreeMap<String, String>) {
        let setting = SETTINGS
            .iter()
            .find(|setting| setting.key == key)
            .expect("aliases are of settings, as a test holds");
        let name = setting.variable();
        match given.get(&name) {
            Some(newer) if newer != value => self.errors.push(SettingError::TwoNames {
                name,
                value: newer.clone(),
                alias: alias.to_owned(),
                alias_value: value.to_owned(),
            }),
            Some(_) => {}
            None => {
                self.note(format!("{alias} is an older name of {name}"));
                self.assign(
                    setting,
                    alias.to_owned(),
                    value,
                    Origin::Variable(alias.to_owned()),
                );
            }
        }
    }

    fn nixl(&mut self, name: &str, backend: &str, value: &str) {
        match form::switch(value) {
            Ok(_) => self.note(format!(
                "{name} has no effect: blocks are not moved by NIXL's {backend}, but by blockplane's own \
                 backends (shared memory, tcp, io_uring, CUDA, object stores), chosen by where the memory is"
            )),
            Err(accepted) => self.refuse(name.to_owned(), value, accepted),
        }
    }

    fn flag(&mut self, key: &str, value: &str) {
        if let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) {
            let name = format!("--{}", setting.flag());
            self.assign(setting, name.clone(), value, Origin::Flag(name));
        }
    }

    fn assign(&mut self, setting: &Described, name: String, text: &str, origin: Origin) {
        if setting.shape == Shape::Secret && !matches!(origin, Origin::Variable(_)) {
            self.errors.push(SettingError::Secret {
                name,
                variable: setting.variable(),
            });
        } else if let Err(accepted) = self.settings.assign(setting.key, text, origin) {
            self.refuse(name, text, accepted);
        }
    }

    fn refuse(&mut self, name: String, value: &str, accepted: String) {
        self.errors.push(SettingError::Value {
            name,
            value: value.to_owned(),
            accepted,
        });
    }

    fn note(&mut self, text: String) {
        self.settings.notes.push(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{ConsolidatorMode, DiskAllocator, Plain};

    fn variables(given: &[(&str, &str)]) -> Result<KvbmSettings, Vec<SettingError>> {
        let given = given
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        resolve(given, None, &KvbmFlags::new())
    }

    /// What the only error says.
    fn refused(name: &str, value: &str) -> String {
        let errors = variables(&[(name, value)]).expect_err(name);
        assert_eq!(errors.len(), 1, "{errors:?}");
        errors[0].to_string()
    }

    fn table(source: &str, values: &[(&str, FileValue)]) -> KvbmTable {
        let values = values
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()));
        KvbmTable {
            source: source.to_owned(),
            values: values.collect(),
        }
    }

    #[test]
    fn every_variable_of_kvbm_is_known() {
        let settings = variables(&[
            ("DYN_KVBM_CPU_CACHE_GB", "0.5"),
            ("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "12"),
            ("DYN_KVBM_DISK_CACHE_GB", "7.5"),
            ("DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS", "13"),
            ("DYN_KVBM_DISK_CACHE_DIR", "/srv/kv"),
            ("DYN_KVBM_DISK_ALLOCATOR_TYPE", "open-direct"),
            ("DYN_KVBM_DISK_DISABLE_O_DIRECT", "1"),
            ("DYN_KVBM_DISK_ZEROFILL_FALLBACK", "true"),
            ("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", "True"),
            ("DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY", "35"),
            ("DYN_KVBM_MAX_CONCURRENT_TRANSFERS", "8"),
            ("DYN_KVBM_MAX_TRANSFER_BATCH_SIZE", "32"),
            ("DYN_KVBM_TRANSFER_BATCH_SIZE", "32"),
            ("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "120"),
            ("DYN_KVBM_LEADER_ZMQ_HOST", "10.0.0.1"),
            ("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "56003"),
            ("DYN_KVBM_LEADER_ZMQ_ACK_PORT", "56004"),
            ("DYN_KVBM_TRTLLM_ZMQ_PORT", "20081"),
            ("DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR", "off"),
            ("DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE", "passthrough"),
            ("DYN_KVBM_METRICS", "yes"),
            ("DYN_KVBM_METRICS_PORT", "6881"),
            ("DYN_KVBM_ENABLE_RECORD", "on"),
            ("DYN_KVBM_CACHE_STATS_MAX_REQUESTS", "10"),
            ("DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS", "9"),
            ("DYN_KVBM_NCCL_MLA_MODE", "true"),
            ("DYN_KVBM_NCCL_MAX_CTAS", "4"),
            ("DYN_KVBM_ENABLE_NUMA", "1"),
            ("DYN_KVBM_DISABLE_WRITE_COMBINED", "1"),
            ("DYN_KVBM_NIXL_BACKEND_UCX", "false"),
            ("DYN_KVBM_NIXL_BACKEND_GDS_MT", "on"),
            ("DYN_RUNTIME_ENABLED_KVBM", "1"),
            ("DYN_KVBM_OBJECT_ENABLED", "1"),
            ("DYN_KVBM_OBJECT_BUCKET", "kv-{worker_id}"),
            ("DYN_KVBM_OBJECT_ENDPOINT", "http://127.0.0.1:9000"),
            ("DYN_KVBM_OBJECT_REGION", "us-east-1"),
            ("DYN_KVBM_OBJECT_ACCESS_KEY", "a"),
            ("DYN_KVBM_OBJECT_SECRET_KEY", "s"),
            ("DYN_KVBM_OBJECT_NUM_BLOCKS", "5"),
            ("DYN_KVBM_OBJECT_WRITE_THROUGH", "0"),
            ("DYN_KVBM_G3PB_ADMISSION_POLICY", "eager"),
            ("DYN_REGISTRY_ENABLE", "0"),
        ])
        .unwrap();
        assert_eq!(settings.cpu_cache_gb.value, 0.5);
        assert_eq!(settings.disk_cache_gb.value, 7.5);
        assert_eq!(
            settings.disk_allocator_type.value,
            DiskAllocator::OpenDirect
        );
        assert_eq!(
            settings.kv_events_consolidator_mode.value,
            ConsolidatorMode::Passthrough
        );
        assert_eq!(settings.metrics_port.value, 6881);
        assert!(settings.disable_disk_offload_filter.value && settings.enable_record.value);
        assert!(!settings.object_write_through.value);
        let secret = settings.object_secret_key.value.as_ref().unwrap();
        assert_eq!(secret.reveal(), "s");
        let without_effect = settings
            .notes
            .iter()
            .filter(|note| note.contains("has no effect"));
        assert_eq!(without_effect.count(), 10, "{:#?}", settings.notes);
    }

    #[test]
    fn nothing_given_is_kvbms_defaults() {
        let settings = variables(&[
            ("PATH", "/bin"),
            ("DYN_LOG", "info"),
            ("DYN_KVBM_CPU_CACHE_GB", " "),
        ])
        .unwrap();
        assert_eq!(settings, KvbmSettings::default());
        assert!(
            settings
                .values()
                .iter()
                .all(|(_, _, origin)| **origin == Origin::Default)
        );
        let expected = [
            ("cpu_cache_gb", "0"),
            ("disk_cache_dir", "/tmp/"),
            ("max_concurrent_transfers", "4"),
            ("max_transfer_batch_size", "16"),
            ("leader_worker_init_timeout_secs", "1800"),
            ("metrics_port", "6880"),
            ("cache_stats_max_requests", "1000"),
            ("cache_stats_log_interval_secs", "5"),
            ("object_num_blocks", "100000"),
        ];
        for (key, text) in expected {
            let values = settings.values();
            let (_, value, _) = values.iter().find(|(s, _, _)| s.key == key).unwrap();
            assert_eq!(value.to_string(), text, "{key}");
        }
    }

    #[test]
    fn switches_that_say_no_are_off() {
        for setting in SETTINGS.iter().filter(|s| s.shape == Shape::Switch) {
            for (text, expected) in [
                ("false", false),
                ("False", false),
                ("0", false),
                ("off", false),
                ("no", false),
                ("true", true),
                ("1", true),
                ("ON", true),
                ("yes", true),
            ] {
                let settings = variables(&[(&setting.variable(), text)]).unwrap();
                let values = settings.values();
                let (_, value, origin) = values
                    .iter()
                    .find(|(s, _, _)| s.key == setting.key)
                    .unwrap();
                assert_eq!(*value, Plain::Switch(expected), "{}={text}", setting.key);
                assert_eq!(**origin, Origin::Variable(setting.variable()));
            }
        }
    }

    #[test]
    fn a_bad_value_is_named_with_what_would_do() {
        for (name, value, expected) in [
            (
                "DYN_KVBM_CPU_CACHE_GB",
                "abc",
                "DYN_KVBM_CPU_CACHE_GB is 'abc'; accepted: GB of 10^9 bytes",
            ),
            (
                "DYN_KVBM_DISK_CACHE_GB",
                "-3",
                "accepted: GB of 10^9 bytes, 0 or more",
            ),
            ("DYN_KVBM_DISK_CACHE_GB", "NaN", "accepted: GB"),
            ("DYN_KVBM_DISK_CACHE_GB", "inf", "accepted: GB"),
            (
                "DYN_KVBM_DISK_ALLOCATOR_TYPE",
                "direct",
                "accepted: default or open-direct",
            ),
            (
                "DYN_KVBM_DISK_DISABLE_O_DIRECT",
                "maybe",
                "accepted: true, 1, on, yes, or false, 0, off, no",
            ),
            (
                "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY",
                "101",
                "a whole number from 0 to 100",
            ),
            (
                "DYN_KVBM_MAX_CONCURRENT_TRANSFERS",
                "0",
                "a whole number from 1 to 64",
            ),
            (
                "DYN_KVBM_METRICS_PORT",
                "70000",
                "a whole number from 1 to 65535",
            ),
            ("DYN_KVBM_METRICS_HOST", "a b", "a host name or an address"),
            ("DYN_KVBM_OBJECT_BUCKET", "kv-{rank}", "{worker_id}"),
            (
                "DYN_KVBM_OBJECT_ENDPOINT",
                "http://me:secret@host",
                "without credentials",
            ),
            ("DYN_KVBM_G3_ADMISSION", "lfu", "frequency, frequency+hits"),
            (
                "DYN_KVBM_NIXL_BACKEND_UCX",
                "2",
                "DYN_KVBM_NIXL_BACKEND_UCX is '2'; accepted: true",
            ),
            (
                "ENABLE_KVBM_RECORD",
                "2",
                "ENABLE_KVBM_RECORD is '2'; accepted: true",
            ),
        ] {
            let message = refused(name, value);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn an_unknown_name_comes_with_the_nearest() {
        for (name, nearest) in [
            ("DYN_KVBM_CPU_CACH_GB", "DYN_KVBM_CPU_CACHE_GB"),
            ("DYN_KVBM_CPU_CACHE_BG", "DYN_KVBM_CPU_CACHE_GB"),
            ("dyn_kvbm_metrics", "DYN_KVBM_METRICS"),
            ("DYN_KVMB_METRICS_PORT", "DYN_KVBM_METRICS_PORT"),
            ("DYN_KVBM_NIXL_BACKEND_", "DYN_KVBM_"),
        ] {
            let message = refused(name, "1");
            assert!(
                message.contains(&format!("variable {name} is not known")),
                "{message}"
            );
            assert!(
                message.contains(&format!("the nearest is {nearest}")),
                "{message}"
            );
        }
        let file = KvbmFile(vec![table(
            "d.toml [kvbm]",
            &[("cpu_gb", FileValue::Whole(1))],
        )]);
        let errors = resolve(std::iter::empty(), Some(&file), &KvbmFlags::new()).unwrap_err();
        assert_eq!(
            errors[0].to_string(),
            "key 'cpu_gb' of d.toml [kvbm] is not known; the nearest is 'cpu_cache_gb'"
        );
    }

    #[test]
    fn everything_wrong_is_said_at_once() {
        let file = KvbmFile(vec![table(
            "d.toml [kvbm]",
            &[
                ("disk_cache_gb", FileValue::Text("much".to_owned())),
                ("object_secret_key", FileValue::Text("hunter2".to_owned())),
            ],
        )]);
        let flags = KvbmFlags::from([("metrics_port", "x".to_owned())]);
        let given = [("DYN_KVBM_X", "1"), ("DYN_KVBM_DISK_CACHE_GB", "1")];
        let given = given
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let errors = resolve(given, Some(&file), &flags).unwrap_err();
        let said: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 4, "{said:#?}");
        assert!(
            said[0].starts_with("'disk_cache_gb' of d.toml [kvbm] is 'much'"),
            "{}",
            said[0]
        );
        assert!(said[1].contains("DYN_KVBM_OBJECT_SECRET_KEY") && !said[1].contains("hunter2"));
        assert!(said[2].contains("DYN_KVBM_X"));
        assert!(
            said[3].starts_with("--kvbm-metrics-port is 'x'"),
            "{}",
            said[3]
        );
    }

    #[test]
    fn later_sources_win_and_origins_stay() {
        let file = KvbmFile(vec![
            table(
                "d.toml [kvbm]",
                &[
                    ("cpu_cache_gb", FileValue::Whole(1)),
                    ("disk_cache_gb", FileValue::Number(2.5)),
                    ("metrics", FileValue::Switch(true)),
                    ("metrics_port", FileValue::Whole(7000)),
                ],
            ),
            table("d.toml role", &[("disk_cache_gb", FileValue::Whole(3))]),
        ]);
        let given = [
            ("DYN_KVBM_METRICS".to_owned(), "false".to_owned()),
            ("DYN_KVBM_METRICS_PORT".to_owned(), "7001".to_owned()),
        ];
        let flags = KvbmFlags::from([("metrics_port", "7002".to_owned())]);
        let settings = resolve(given.into_iter(), Some(&file), &flags).unwrap();
        let origin = |place: &str| Origin::File(place.to_owned());
        assert_eq!(
            settings.cpu_cache_gb,
            crate::settings::Setting {
                value: 1.0,
                origin: origin("d.toml [kvbm]")
            }
        );
        assert_eq!(settings.disk_cache_gb.value, 3.0);
        assert_eq!(settings.disk_cache_gb.origin, origin("d.toml role"));
        assert!(!settings.metrics.value);
        assert_eq!(settings.metrics_port.value, 7002);
        assert_eq!(
            settings.metrics_port.origin.to_string(),
            "flag --kvbm-metrics-port"
        );
    }

    #[test]
    fn two_names_of_one_setting_must_agree() {
        let older = variables(&[("DYN_KVBM_TRANSFER_BATCH_SIZE", "8")]).unwrap();
        assert_eq!(older.max_transfer_batch_size.value, 8);
        assert!(older.notes[0].contains("older name of DYN_KVBM_MAX_TRANSFER_BATCH_SIZE"));
        let both = |newer| {
            variables(&[
                ("DYN_KVBM_TRANSFER_BATCH_SIZE", "8"),
                ("DYN_KVBM_MAX_TRANSFER_BATCH_SIZE", newer),
            ])
        };
        assert_eq!(both("8").unwrap().max_transfer_batch_size.value, 8);
        assert!(
            both("9").unwrap_err()[0]
                .to_string()
                .contains("set one of them")
        );
    }

    #[test]
    fn secrets_are_not_shown() {
        let given = [
            ("DYN_KVBM_OBJECT_ACCESS_KEY", "AKIA"),
            ("DYN_KVBM_OBJECT_SECRET_KEY", "hunter2"),
        ];
        let settings = variables(&given).unwrap();
        let shown = format!("{settings:?} {:?}", settings.values());
        assert!(
            !shown.contains("AKIA") && !shown.contains("hunter2"),
            "{shown}"
        );
    }

    #[test]
    fn names_are_of_the_table() {
        let mut flags: Vec<String> = SETTINGS.iter().map(Described::flag).collect();
        flags.sort();
        flags.dedup();
        assert_eq!(flags.len(), SETTINGS.len());
        for (alias, key) in ALIASES {
            assert!(SETTINGS.iter().any(|setting| setting.key == *key), "{key}");
            assert!(SETTINGS.iter().all(|setting| setting.variable() != *alias));
        }
        for setting in SETTINGS {
            assert!(
                !setting.help.trim().is_empty() && setting.help.trim().ends_with('.'),
                "{}",
                setting.key
            );
            let default = KvbmSettings::default();
            let values = default.values();
            let (_, value, _) = values
                .iter()
                .find(|(s, _, _)| s.key == setting.key)
                .unwrap();
            if *value == Plain::None {
                continue;
            }
            // What is printed can be given.
            let again = variables(&[(&setting.variable(), &value.to_string())]).unwrap();
            let again = again.values();
            let (_, same, _) = again.iter().find(|(s, _, _)| s.key == setting.key).unwrap();
            assert_eq!(same, value, "{}", setting.key);
        }
    }
    /// What the documents say is what there is.
    #[test]
    fn every_setting_is_documented_with_its_default() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kvbm-settings.md");
        let text = std::fs::read_to_string(path).unwrap();
        for (setting, default, _) in KvbmSettings::default().values() {
            let row = format!(
                "| `{}` | {default} | {} |",
                setting.variable(),
                setting.unit
            );
            assert!(text.contains(&row), "{path} has no row {row}");
        }
        let others = WITHOUT_EFFECT.iter().chain(ALIASES);
        for (name, _) in others {
            assert!(
                text.contains(&format!("`{name}`")),
                "{path} does not name {name}"
            );
        }
    }
}
