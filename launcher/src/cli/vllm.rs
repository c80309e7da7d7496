//! The flags of `--engine vllm`, and what goes behind `--`.

use std::{path::PathBuf, time::Duration};

use anyhow::ensure;
use blockplane_engine::vllm::arguments::Connector;
use clap::{Args, Parser, ValueEnum};

use super::{Cli, Command, EngineArg, WorkerArgs, worker::seconds};

#[derive(Clone, Debug, Args)]
pub(crate) struct VllmArgs {
    /// vLLM's program.
    #[arg(
        help_heading = "vLLM",
        long,
        value_name = "PROGRAM",
        default_value = "vllm"
    )]
    pub(crate) vllm_program: PathBuf,
    /// Use a vLLM server that somebody else started, and keeps.
    #[arg(help_heading = "vLLM", long, value_name = "http://HOST:PORT")]
    pub(crate) attach: Option<String>,
    /// Where the server of `--attach` publishes KV events, and where it answers who missed some; asked of
    /// the server when absent.
    #[arg(
        help_heading = "vLLM",
        long,
        value_name = "ENDPOINT[,REPLAY]",
        requires = "attach"
    )]
    pub(crate) attach_kv_events: Option<String>,
    /// What vLLM's KV cache is connected to: `kvbm` are our tiers (set by `DYN_KVBM_*`; vLLM needs the
    /// Python package blockplane), `nixl` other vLLMs; both may be given.
    #[arg(help_heading = "vLLM", long, value_name = "kvbm|nixl", num_args = 1..=2, value_delimiter = ' ')]
    pub(crate) connector: Vec<ConnectorArg>,
    /// Time for the server to start, in seconds.
    #[arg(help_heading = "vLLM", long, value_name = "SECONDS", value_parser = seconds, default_value = "1800")]
    pub(crate) vllm_start_timeout: Duration,
    /// What is asked of the server when no token came for a while, as JSON or `@FILE`: `token_ids`,
    /// `sampling_options`, `stop_conditions`.
    #[arg(
        help_heading = "vLLM",
        long,
        env = "DYN_HEALTH_CHECK_PAYLOAD",
        value_name = "JSON|@FILE"
    )]
    pub(crate) health_check_payload: Option<String>,
    /// Time without a token before the server is asked for one, in seconds.
    #[arg(help_heading = "vLLM", long, env = "DYN_CANARY_WAIT_TIME", value_name = "SECONDS", value_parser = seconds, default_value = "10")]
    pub(crate) canary_wait: Duration,
    /// Time for that token to come before the server is taken for hung, in seconds.
    #[arg(help_heading = "vLLM", long, value_name = "SECONDS", value_parser = seconds, default_value = "60")]
    pub(crate) canary_timeout: Duration,
    /// Arguments of `vllm serve`.
    #[arg(help_heading = "vLLM", last = true, value_name = "VLLM ARGUMENTS")]
    pub(crate) vllm_args: Vec<String>,
}

/// `--connector`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConnectorArg {
    /// Host memory, disk and objects, in our tiers.
    Kvbm,
    /// Prefill and decode apart.
    Nixl,
}

impl VllmArgs {
    /// What vLLM's KV cache is connected to, if that was said.
    pub(crate) fn connector(&self) -> Option<Connector> {
        let has = |which| self.connector.contains(&which);
        match (has(ConnectorArg::Kvbm), has(ConnectorArg::Nixl)) {
            (true, true) => Some(Connector::KvbmAndNixl),
            (true, false) => Some(Connector::Kvbm),
            (false, true) => Some(Connector::Nixl),
            (false, false) => None,
        }
    }
}

/// Runs a program in a process group that ends with our standard input.
#[derive(Clone, Debug, Args)]
pub(crate) struct GuardArgs {
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) argv: Vec<std::ffi::OsString>,
}

impl WorkerArgs {
    /// Refuses flags that the engine has no use for: each would be a setting that does nothing.
    pub(crate) fn check_engine(&self) -> anyhow::Result<()> {
        let defaults = defaults()?;
        if self.engine != EngineArg::Vllm {
            let given = [
                ("--attach", self.vllm.attach.is_some()),
                (
                    "--vllm-program",
                    self.vllm.vllm_program != defaults.vllm.vllm_program,
                ),
                ("--connector", !self.vllm.connector.is_empty()),
                ("what is behind '--'", !self.vllm.vllm_args.is_empty()),
            ];
            for (flag, given) in given {
                ensure!(!given, "{flag} is for --engine vllm");
            }
            return Ok(());
        }
        for (flag, instead, given) in self.not_for_vllm(&defaults) {
            ensure!(
                !given,
                "{flag} is not for --engine vllm{}",
                if instead.is_empty() {
                    ": vLLM computes, and moves KV by its own connector".to_owned()
                } else {
                    format!("; give {instead} behind '--'")
                }
            );
        }
        let vllm = &self.vllm;
        if vllm.attach.is_some() {
            ensure!(
                vllm.vllm_args.is_empty(),
                "--attach uses a server that runs already: nobody reads the arguments behind '--'"
            );
            ensure!(
                vllm.connector.is_empty(),
                "--connector is for a server that we start; that of --attach has its connector"
            );
            ensure!(
                self.data_parallel_size.is_none(),
                "--data-parallel-size is read from the server of --attach"
            );
        }
        Ok(())
    }

    /// Flags of the other engines: what vLLM calls it, and whether it was given.
    fn not_for_vllm(&self, defaults: &Self) -> [(&'static str, &'static str, bool); 13] {
        let differs = |ours: f64, default: f64| ours.to_bits() != default.to_bits();
        [
            ("--compute", "--dtype", self.compute != defaults.compute),
            ("--isa", "", self.isa.is_some()),
            ("--threads", "", self.threads.is_some()),
            (
                "--blocks",
                "--num-gpu-blocks-override",
                self.blocks.is_some(),
            ),
            (
                "--kv-gb",
                "--gpu-memory-utilization",
                differs(self.kv_gb, defaults.kv_gb),
            ),
            (
                "--max-num-seqs",
                "--max-num-seqs",
                self.max_num_seqs != defaults.max_num_seqs,
            ),
            (
                "--max-num-batched-tokens",
                "--max-num-batched-tokens",
                self.max_num_batched_tokens != defaults.max_num_batched_tokens,
            ),
            (
                "--max-waiting",
                "",
                self.max_waiting != defaults.max_waiting,
            ),
            (
                "--no-prefix-caching",
                "--no-enable-prefix-caching",
                self.no_prefix_caching,
            ),
            ("--lane", "", self.lanes != defaults.lanes),
            (
                "--mock-prefill-tokens-per-s",
                "",
                differs(
                    self.mock_prefill_tokens_per_s,
                    defaults.mock_prefill_tokens_per_s,
                ),
            ),
            (
                "--mock-decode-tokens-per-s",
                "",
                differs(
                    self.mock_decode_tokens_per_s,
                    defaults.mock_decode_tokens_per_s,
                ),
            ),
            (
                "--mock-speedup",
                "",
                differs(self.mock_speedup, defaults.mock_speedup),
            ),
        ]
    }
}

/// The worker that nobody said anything to.
fn defaults() -> anyhow::Result<WorkerArgs> {
    match Cli::try_parse_from(["blockplane", "worker"])?.command {
        Command::Worker(args) => Ok(*args),
        other => anyhow::bail!("'worker' was read as {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str) -> anyhow::Result<()> {
        let words = ["blockplane", "worker"].into_iter();
        match Cli::try_parse_from(words.chain(line.split_whitespace()))?.command {
            Command::Worker(args) => args.check_engine(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_that_would_do_nothing_are_refused() {
        check("--engine vllm --block-size 32 --data-parallel-size 2 -- --max-model-len 5 -O3")
            .unwrap();
        check("--engine vllm --attach http://h:1 --attach-kv-events tcp://h:2").unwrap();
        check("--threads 2 --kv-gb 3").unwrap();
        check("--engine vllm --connector kvbm nixl -- -O3").unwrap();
        for (line, expected) in [
            (
                "--engine vllm --threads 2",
                "--threads is not for --engine vllm",
            ),
            (
                "--engine vllm --max-num-seqs 8",
                "give --max-num-seqs behind '--'",
            ),
            (
                "--engine vllm --kv-gb 2",
                "--gpu-memory-utilization behind '--'",
            ),
            ("--engine vllm --lane tcp", "its own connector"),
            ("--engine vllm --attach http://h:1 -- -O3", "nobody reads"),
            ("--attach http://h:1", "--attach is for --engine vllm"),
            ("--connector kvbm", "--connector is for --engine vllm"),
            (
                "--engine vllm --attach http://h:1 --connector nixl",
                "a server that we start",
            ),
            ("--engine mock -- --port 1", "'--' is for --engine vllm"),
        ] {
            let error = check(line).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
