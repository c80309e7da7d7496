//! The flags of the tiers below G1: one for each setting of [`SETTINGS`], read by
//! [`blockplane_kvbm::settings::resolve`] together with file and variables.

use std::sync::LazyLock;

use blockplane_kvbm::settings::{
    Described, KvbmFile, KvbmFlags, KvbmSettings, KvbmTable, SETTINGS, SettingError, Shape, resolve,
};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, error::Error};

/// Hands a worker the tables of its deployment file.
pub(crate) const TABLE_FLAG: &str = "kvbm-table";

/// `--kvbm-*`, as text: what it means is decided with all other sources.
#[derive(Clone, Debug, Default)]
pub(crate) struct KvbmArgs {
    flags: KvbmFlags,
    file: KvbmFile,
}

impl KvbmArgs {
    /// The settings of this process: defaults, file, variables, flags.
    ///
    /// # Errors
    /// Everything that is wrong with them, a line each.
    pub(crate) fn settings(&self) -> anyhow::Result<KvbmSettings> {
        self.resolve(None).map_err(|errors| one_message(&errors))
    }

    /// The same with the tables of a file besides those that were handed over.
    ///
    /// # Errors
    /// Everything that is wrong with them.
    pub(crate) fn resolve(
        &self,
        file: Option<&KvbmFile>,
    ) -> Result<KvbmSettings, Vec<SettingError>> {
        let tables = file.iter().flat_map(|file| &file.0).chain(&self.file.0);
        let file = KvbmFile(tables.cloned().collect());
        resolve(variables(), Some(&file), &self.flags)
    }

    /// The same without variables, so that a test does not depend on where it runs.
    #[cfg(test)]
    pub(crate) fn settings_without_variables(&self) -> anyhow::Result<KvbmSettings> {
        settings_from(std::iter::empty(), &self.file, &self.flags)
    }
}

/// Settings that are checked without looking at the environment of this process.
pub(crate) fn settings_of_file(file: &KvbmFile) -> anyhow::Result<KvbmSettings> {
    settings_from(std::iter::empty(), file, &KvbmFlags::new())
}

fn settings_from(
    variables: impl Iterator<Item = (String, String)>,
    file: &KvbmFile,
    flags: &KvbmFlags,
) -> anyhow::Result<KvbmSettings> {
    resolve(variables, Some(file), flags).map_err(|errors| one_message(&errors))
}

fn one_message(errors: &[SettingError]) -> anyhow::Error {
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    anyhow::anyhow!(
        "settings of the KV tiers:
  {}",
        lines.join(
            "
  "
        )
    )
}

/// The environment as text; what is not text cannot be a name or a value of ours.
fn variables() -> impl Iterator<Item = (String, String)> {
    let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
    std::env::vars_os().map(move |(name, value)| (text(name), text(value)))
}

/// The settings that have a flag, and its name.
fn flags() -> impl Iterator<Item = (&'static Described, &'static str)> {
    static NAMES: LazyLock<Vec<String>> =
        LazyLock::new(|| SETTINGS.iter().map(Described::flag).collect());
    let all = SETTINGS.iter().zip(NAMES.iter().map(String::as_str));
    all.filter(|(setting, _)| setting.shape != Shape::Secret)
}

impl Args for KvbmArgs {
    fn augment_args(command: Command) -> Command {
        let args = flags().map(|(setting, flag)| {
            let help = if setting.unit.is_empty() {
                format!("{} [env: {}]", setting.help.trim(), setting.variable())
            } else {
                format!(
                    "{} In {}. [env: {}]",
                    setting.help.trim(),
                    setting.unit,
                    setting.variable()
                )
            };
            let arg = Arg::new(setting.key)
                .long(flag)
                .help(help)
                .help_heading("KV tiers below the engine's own")
                .hide_short_help(true)
                .action(ArgAction::Set);
            match setting.shape {
                Shape::Switch => arg
                    .value_name("true|false")
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("true"),
                Shape::Value | Shape::Secret => {
                    arg.value_name("VALUE").allow_negative_numbers(true)
                }
            }
        });
        command.args(args).arg(
            Arg::new(TABLE_FLAG)
                .long(TABLE_FLAG)
                .hide(true)
                .action(ArgAction::Append)
                .value_parser(|text: &str| serde_json::from_str::<KvbmTable>(text)),
        )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for KvbmArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        for (setting, _) in flags() {
            if let Some(text) = matches.get_one::<String>(setting.key) {
                self.flags.insert(setting.key, text.clone());
            }
        }
        if let Some(tables) = matches.get_many::<KvbmTable>(TABLE_FLAG) {
            self.file = KvbmFile(tables.cloned().collect());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        kvbm: KvbmArgs,
    }

    fn line(args: &[&str]) -> KvbmArgs {
        let args = std::iter::once("x").chain(args.iter().copied());
        Line::try_parse_from(args).unwrap().kvbm
    }

    #[test]
    fn every_setting_but_secrets_has_a_flag() {
        let args = line(&[
            "--kvbm-cpu-cache-gb",
            "2",
            "--kvbm-metrics",
            "--kvbm-promote=false",
        ]);
        let expected = [
            ("cpu_cache_gb", "2"),
            ("metrics", "true"),
            ("promote", "false"),
        ];
        assert_eq!(
            args.flags,
            expected.map(|(key, value)| (key, value.to_owned())).into()
        );
        let settings = settings_from(std::iter::empty(), &args.file, &args.flags).unwrap();
        assert!(settings.metrics.value && !settings.promote.value);
        assert!(Line::try_parse_from(["x", "--kvbm-object-secret-key", "s"]).is_err());
    }

    #[test]
    fn tables_of_a_file_come_along_as_they_are() {
        let args = line(&[
            "--kvbm-table",
            r#"{"source":"d.toml [kvbm]","values":{"cpu_cache_gb":1.5,"metrics":true}}"#,
            "--kvbm-table",
            r#"{"source":"role","values":{"cpu_cache_gb":3}}"#,
        ]);
        let settings = settings_of_file(&args.file).unwrap();
        assert_eq!(settings.cpu_cache_gb.value, 3.0);
        assert_eq!(settings.metrics.origin.to_string(), "file d.toml [kvbm]");
    }

    #[test]
    fn all_that_is_wrong_is_in_one_message() {
        let args = line(&["--kvbm-cpu-cache-gb", "-1", "--kvbm-metrics-port", "x"]);
        let error = settings_from(std::iter::empty(), &args.file, &args.flags)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("--kvbm-cpu-cache-gb is '-1'")
                && error.contains("--kvbm-metrics-port is 'x'"),
            "{error}"
        );
    }
}
