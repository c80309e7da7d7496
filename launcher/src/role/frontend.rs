//! `blockplane frontend`: HTTP in front, router in the middle, RPC to the workers behind.

use std::{process::ExitCode, sync::Arc};

use anyhow::Context;
use blockplane_frontend::{Frontend, FrontendConfig};
use blockplane_router::{DisaggPolicy, RouterConfig, RouterMode};
use blockplane_runtime::{
    discovery::{Discovery, FileDiscovery, FileDiscoveryConfig},
    rpc::{RpcClient, RpcClientConfig},
};
use tokio::net::TcpListener;

use super::{Reporter, finish, runtime, stop_requested};
use crate::{
    cli::{FrontendArgs, RouterModeArg},
    supervise::Report,
    wiring::{fleet::Fleet, service::RoutedService},
};

/// Runs a frontend until it is told to stop.
pub(crate) fn run(args: FrontendArgs) -> anyhow::Result<ExitCode> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(serve(args));
    finish(runtime);
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn serve(args: FrontendArgs) -> anyhow::Result<()> {
    let discovery = FileDiscovery::new(FileDiscoveryConfig::new(args.discovery.discovery.clone()))?;
    let watch = discovery.watch(&args.namespace).await?;
    let client = RpcClient::new(RpcClientConfig::default());
    let fleet = Arc::new(Fleet::start(client, watch, router_config(&args)));
    let service = RoutedService::new(Arc::clone(&fleet), args.migration_limit, args.seed);

    let address = (args.http_host.as_str(), args.http_port);
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {}:{}; give another --http-port, or 0 for a free one",
            args.http_host, args.http_port
        )
    })?;
    let url = format!("http://{}", listener.local_addr()?);
    let reporter = Reporter::start(args.exit_with_parent);
    reporter.report(&Report::Ready {
        detail: format!("listening on {url}"),
    });
    tokio::spawn(announce(fleet, reporter, url));

    let exit_with_parent = args.exit_with_parent;
    let stop = async move {
        match stop_requested(exit_with_parent).await {
            Ok(reason) => tracing::info!(reason, "stopping"),
            Err(error) => tracing::error!("stopping: {error:#}"),
        }
    };
    Frontend::new(frontend_config(&args), Arc::new(service))
        .context("the tokenising threads cannot be started")?
        .serve(listener, stop)
        .await
        .context("the HTTP server failed")
}

/// Reports each model once it can be served.
async fn announce(fleet: Arc<Fleet>, reporter: Reporter, url: String) {
    let mut changes = fleet.changes();
    let mut announced = String::new();
    loop {
        if let Some(card) = fleet.models().first()
            && card.name != announced
        {
            announced.clone_from(&card.name);
            reporter.report(&Report::Serving {
                model: card.name.clone(),
                url: url.clone(),
            });
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

fn router_config(args: &FrontendArgs) -> RouterConfig {
    RouterConfig {
        mode: match args.router_mode {
            RouterModeArg::Kv => RouterMode::Kv,
            RouterModeArg::RoundRobin => RouterMode::RoundRobin,
            RouterModeArg::Random => RouterMode::Random,
        },
        overlap_score_credit: args.router_kv_overlap_score_credit,
        temperature: args.router_temperature,
        requests_max: args.requests_max,
        disagg: DisaggPolicy {
            local_prefill_tokens_max: args.remote_prefill_min_tokens.saturating_sub(1),
            prefill_requests_max: args.prefill_requests_max,
            ..DisaggPolicy::default()
        },
        ..RouterConfig::default()
    }
}

fn frontend_config(args: &FrontendArgs) -> FrontendConfig {
    let mut config = FrontendConfig::default();
    config.request_timeout = args.request_timeout;
    config.request_timeout_max = config.request_timeout_max.max(args.request_timeout);
    config.body_bytes_max = args.body_limit_mb << 20;
    config.requests_max = args.requests_max;
    config.shutdown_grace = args.grace;
    config
}
