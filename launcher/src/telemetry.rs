//! Logging: `tracing` events to standard error, filtered by `--log` / `DYN_LOG`.

use anyhow::Context;
use tracing_subscriber::EnvFilter;

/// Starts logging for this process.
pub(crate) fn init(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| {
        format!(
            "log filter '{filter}' is not valid; accepted: a level (error, warn, info, debug, trace) or \
             'target=level' pairs separated by commas"
        )
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init()
        .map_err(|error| anyhow::anyhow!("logging could not be started: {error}"))
}
