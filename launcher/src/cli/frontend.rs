//! `blockplane frontend`.

use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::worker::{DiscoveryArgs, seconds};

/// How requests are spread over workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RouterModeArg {
    /// By cached prefix and load.
    #[default]
    Kv,
    /// In turn.
    RoundRobin,
    /// At random.
    Random,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct FrontendArgs {
    #[command(flatten)]
    pub(crate) discovery: DiscoveryArgs,
    /// Namespace whose workers are served.
    #[arg(
        help_heading = "Place in the deployment",
        long,
        env = "DYN_NAMESPACE",
        default_value = "blockplane"
    )]
    pub(crate) namespace: String,
    /// Address to listen on.
    #[arg(
        help_heading = "HTTP",
        long,
        env = "DYN_HTTP_HOST",
        default_value = "127.0.0.1"
    )]
    pub(crate) http_host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(
        help_heading = "HTTP",
        long,
        env = "DYN_HTTP_PORT",
        default_value_t = 8000
    )]
    pub(crate) http_port: u16,
    /// How requests are spread over workers.
    #[arg(
        help_heading = "Router",
        long,
        env = "DYN_ROUTER_MODE",
        value_enum,
        default_value_t
    )]
    pub(crate) router_mode: RouterModeArg,
    /// Weight of cached prefix blocks against load; 0 ignores the cache.
    #[arg(help_heading = "Router", long, default_value_t = 1.0)]
    pub(crate) router_kv_overlap_score_credit: f64,
    /// 0 picks the cheapest worker; above 0 spreads by softmax over the cost.
    #[arg(help_heading = "Router", long, default_value_t = 0.0)]
    pub(crate) router_temperature: f64,
    /// Prompts with fewer uncached tokens are prefilled by the decode worker itself.
    #[arg(help_heading = "Router", long, default_value_t = 32)]
    pub(crate) remote_prefill_min_tokens: u32,
    /// Requests on every prefill rank from which on decode workers prefill themselves.
    #[arg(help_heading = "Router", long, default_value_t = 16)]
    pub(crate) prefill_requests_max: u32,
    /// Times a request whose worker was lost is continued on another one.
    #[arg(
        help_heading = "Router",
        long,
        env = "DYN_MIGRATION_LIMIT",
        default_value_t = 1
    )]
    pub(crate) migration_limit: u32,
    /// Requests in flight at most; more are answered 429.
    #[arg(help_heading = "HTTP", long, default_value_t = 4096)]
    pub(crate) requests_max: usize,
    /// Longest request body, in MiB.
    #[arg(
        help_heading = "HTTP",
        long,
        env = "DYN_HTTP_BODY_LIMIT_MB",
        default_value_t = 32
    )]
    pub(crate) body_limit_mb: usize,
    /// Longest time for one request, in seconds; clients can ask for less by X-Request-Timeout-Ms.
    #[arg(help_heading = "HTTP", long, value_parser = seconds, default_value = "600")]
    pub(crate) request_timeout: Duration,
    /// Time for running requests to finish on shutdown, in seconds.
    #[arg(help_heading = "HTTP", long, env = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", value_parser = seconds, default_value = "5")]
    pub(crate) grace: Duration,
    /// Seed of the router's random choices and of requests that bring none; random when absent.
    #[arg(help_heading = "Router", long)]
    pub(crate) seed: Option<u64>,
    /// Stop when standard input closes (set by the launcher for its children).
    #[arg(long, hide = true)]
    pub(crate) exit_with_parent: bool,
}
