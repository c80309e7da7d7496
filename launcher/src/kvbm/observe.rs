//! What a worker tells of its KV tiers: metrics over HTTP, and a line in the log now and then.

use std::{sync::Arc, time::Duration};

use blockplane_kvbm::{
    metrics::{DiskWear, MetricsServer, Observation},
    settings::KvbmSettings,
    tier::{TierManager, TierStats},
};
use tokio::task::JoinHandle;

use crate::wiring::tiers::Below;

/// Tells until it is dropped.
#[derive(Debug)]
pub(crate) struct Observed {
    _server: Option<MetricsServer>,
    log: Option<JoinHandle<()>>,
}

/// Starts what the settings ask for. `tiers` is `None` where there are none; hit rates of G1 are told
/// nevertheless.
///
/// # Errors
/// The port for metrics cannot be had.
pub(crate) fn observe(
    settings: &KvbmSettings,
    observation: &Arc<Observation>,
    tiers: Option<Below>,
) -> anyhow::Result<Observed> {
    let server = if settings.metrics.value {
        let told = Arc::clone(observation);
        let drive_gb = settings.disk_drive_gb.value;
        let text = move || {
            let (stats, wear) = tiers.as_ref().map_or_else(Default::default, |tiers| {
                look(&tiers.handle.manager, drive_gb)
            });
            let peers = tiers.as_ref().and_then(|tiers| tiers.peers.as_ref());
            let peers = peers.map(|peers| peers.tier.stats());
            told.text(&stats, wear, peers.as_ref())
        };
        let (host, port) = (&settings.metrics_host.value, settings.metrics_port.value);
        let server = MetricsServer::start(host, port, text)?;
        tracing::info!(
            "metrics of the KV tiers: http://{}/metrics",
            server.address()
        );
        Some(server)
    } else {
        None
    };
    let interval = settings.cache_stats_log_interval_secs.value;
    let log = (interval > 0 && tiers_asked_for(settings)).then(|| {
        let told = Arc::clone(observation);
        tokio::spawn(log(told, Duration::from_secs(interval)))
    });
    Ok(Observed {
        _server: server,
        log,
    })
}

impl Drop for Observed {
    fn drop(&mut self) {
        if let Some(log) = &self.log {
            log.abort();
        }
    }
}

fn tiers_asked_for(settings: &KvbmSettings) -> bool {
    !settings.sizes(1, 1).off()
}

/// A line each time that hit rates have changed.
async fn log(observation: Arc<Observation>, every: Duration) {
    let mut tick = tokio::time::interval(every);
    let mut last = None;
    loop {
        tick.tick().await;
        let line = observation.line();
        if line != last
            && let Some(line) = &line
        {
            tracing::info!("KV tiers: {line}");
        }
        last = line;
    }
}

fn look(tiers: &TierManager, drive_gb: f64) -> (TierStats, Option<DiskWear>) {
    let wear = tiers.store().map(|store| {
        let wear = store.wear();
        let own = store.block_bytes().saturating_mul(store.capacity().into());
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "settings are 0 to 10^9 GB"
        )]
        let drive = (drive_gb * 1e9) as u64;
        DiskWear {
            bytes_written: wear.bytes_written,
            blocks_written: wear.blocks_written,
            drive_bytes: if drive > 0 { drive } else { own },
        }
    });
    (tiers.stats(), wear)
}
