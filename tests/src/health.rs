//! What `/health` says, and what must hold of it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use blockplane_protocol::LoadReport;
use serde_json::Value;

use crate::{client::Client, wait};

/// Limit of one look at `/health`.
const LOOK: Duration = Duration::from_secs(5);
/// How long the same reports must show an idle deployment. Workers report a change of their load within
/// 250 ms.
const SETTLED: Duration = Duration::from_secs(1);

/// The body of `/health`.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    /// Whether a request would be served.
    pub ready: bool,
    /// Why not.
    pub reasons: String,
    /// The workers that the frontend knows.
    pub workers: Vec<Worker>,
}

/// A worker in `/health`.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    /// Its id.
    pub id: String,
    /// `prefill`, `decode` or `aggregated`.
    pub role: String,
    /// Its state.
    pub state: String,
    /// Load per rank.
    pub load: Vec<LoadReport>,
}

/// Blocks of the pool of each rank of each worker.
pub type Pools = BTreeMap<(String, u32), u32>;

impl Health {
    /// Reads `/health`. A server that is not ready answers too, with another status.
    ///
    /// # Errors
    /// No answer, or one of another form.
    pub fn read(client: &Client) -> Result<Self> {
        let value = client.get("/health", LOOK)?.json()?;
        let workers = value
            .get("workers")
            .and_then(Value::as_array)
            .with_context(|| format!("/health has no workers: {value}"))?;
        Ok(Self {
            ready: value.get("status").is_some_and(|status| status == "ready"),
            reasons: text(&value, "reasons"),
            workers: workers
                .iter()
                .map(Worker::from_json)
                .collect::<Result<_>>()?,
        })
    }

    /// Sizes of the pools, or who still holds what.
    fn idle_pools(&self) -> Result<Pools, String> {
        let mut pools = Pools::new();
        for worker in &self.workers {
            if worker.load.is_empty() {
                return Err(format!("no load from {worker:?}"));
            }
            for load in &worker.load {
                let held = load.blocks_active
                    + load.blocks_quarantined
                    + load.requests_running
                    + load.requests_waiting;
                if held > 0 {
                    return Err(format!("{} {} {load:?}", worker.role, worker.id));
                }
                pools.insert((worker.id.clone(), load.rank.0), load.blocks_total);
            }
        }
        Ok(pools)
    }

    /// Workers of this role that are ready.
    #[must_use]
    pub fn count(&self, role: &str) -> usize {
        let ready = |worker: &&Worker| worker.role == role && worker.state == "ready";
        self.workers.iter().filter(ready).count()
    }
}

impl Worker {
    fn from_json(value: &Value) -> Result<Self> {
        let load = value.get("load").cloned().unwrap_or(Value::Null);
        Ok(Self {
            id: text(value, "id"),
            role: text(value, "role"),
            state: text(value, "state"),
            load: serde_json::from_value(load)
                .with_context(|| format!("load of a worker in /health: {value}"))?,
        })
    }
}

/// Waits until a request would be served, and `condition` holds too.
///
/// # Errors
/// Not within `limit`.
pub fn wait_ready(
    client: &Client,
    limit: Duration,
    what: &str,
    condition: impl Fn(&Health) -> bool,
) -> Result<Health> {
    wait::until(what, limit, || match Health::read(client) {
        Ok(health) if health.ready && condition(&health) => Ok(health),
        Ok(health) => Err(format!("{health:?}")),
        Err(error) => Err(format!("{error:#}")),
    })
}

/// Waits until no rank of any worker has a block in use or in quarantine, nor a request, and returns
/// the sizes of the pools. Blocks in the cache are not leaked: they can be evicted.
///
/// # Errors
/// A block or a request is still held after `limit`: it is leaked.
pub fn wait_idle(client: &Client, limit: Duration) -> Result<Pools> {
    let mut idle: Option<(Instant, Health)> = None;
    wait::until("pools without a block in use", limit, || {
        let health = Health::read(client).map_err(|error| format!("{error:#}"))?;
        let pools = match health.idle_pools() {
            Ok(pools) => pools,
            Err(reason) => {
                idle = None;
                return Err(reason);
            }
        };
        // The reports follow the work, so an idle one may be from before it.
        match &idle {
            Some((since, same)) if *same == health => {
                if since.elapsed() >= SETTLED {
                    return Ok(pools);
                }
            }
            _ => idle = Some((Instant::now(), health)),
        }
        Err("idle, and not yet for long enough".to_owned())
    })
}

fn text(value: &Value, key: &str) -> String {
    match value.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}
