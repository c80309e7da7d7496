//! Keeps a vLLM server serving: looks after it, tells whether it does, and starts it again.
//!
//! * **Dead**: its process ends, or `/health` says so or does not answer three times in a row.
//! * **Hung**: `/health` may go on answering while no token comes. When none came for
//!   [`HealthConfig::canary_wait`], a request of its own (the *canary*) asks for one; if it gets none in
//!   [`HealthConfig::canary_timeout`], and nobody else does, the server hangs.
//!
//! A server that was started is killed, with its process group, and started again with back-off; one
//! that it was only attached to is waited for. Its requests end with
//! [`ErrorKind::WorkerLost`](blockplane_protocol::ErrorKind::WorkerLost), so that they go on elsewhere.

use std::{sync::Arc, time::Duration};

use blockplane_protocol::{DpRank, GenerateRequest};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use super::{
    Shared, VllmError,
    client::{Http, HttpError, malformed},
    facts::ServerFacts,
    metrics::Samples,
    request::{self, Purpose},
    server::{Server, ServerCommand},
};

/// How the health of a server is watched.
#[derive(Clone, Debug)]
pub struct HealthConfig {
    /// Between looks at `/health`. Default 2 s.
    pub interval: Duration,
    /// For an answer of `/health`. Default 5 s.
    pub timeout: Duration,
    /// Looks in a row that may fail but for the last. Default 3.
    pub failures_max: u32,
    /// Without a token for so long, the canary asks for one. Default 10 s.
    pub canary_wait: Duration,
    /// For the canary's token. Default 60 s: it may wait behind long prompts.
    pub canary_timeout: Duration,
    /// What the canary asks for; a single token after token 1, greedily, when absent.
    pub canary: Option<GenerateRequest>,
}

/// Whether requests are sent to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Serving {
    Ready,
    Down(String),
    /// It will not come back.
    GivenUp(String),
    Stopped,
}

/// What the keeper is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Keep,
    Stop,
}

/// Looks at metrics are rarer than at health: they cost vLLM some milliseconds.
const LOOKS_PER_METRICS: u32 = 5;
const READY_POLL: Duration = Duration::from_millis(250);
/// How often it is said that a server is not ready yet.
const WAITING_TOLD: Duration = Duration::from_secs(15);
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Starts in a row that may fail before the engine gives up.
const STARTS_MAX: u32 = 8;
/// A server that served this long starts again without delay debt.
const STABLE_AFTER: Duration = Duration::from_secs(60);

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
            failures_max: 3,
            canary_wait: Duration::from_secs(10),
            canary_timeout: Duration::from_secs(60),
            canary: None,
        }
    }
}

/// Starts a server and waits until it answers.
pub(super) async fn start(command: &ServerCommand, http: &Http) -> Result<Server, VllmError> {
    let mut server = Server::spawn(command)?;
    let began = Instant::now();
    let mut told = began;
    loop {
        tokio::select! {
            end = server.ended() => return Err(VllmError::Ended { end }),
            ready = http.get("/health", READY_POLL * 8) => {
                if ready.is_ok() {
                    return Ok(server);
                }
            }
        }
        if began.elapsed() > command.start_timeout {
            server.kill().await;
            return Err(VllmError::StartTimeout {
                limit: command.start_timeout,
            });
        }
        if told.elapsed() > WAITING_TOLD {
            told = Instant::now();
            tracing::info!(seconds = began.elapsed().as_secs(), "vLLM is not ready yet");
        }
        sleep(READY_POLL).await;
    }
}

/// Keeps the server of `shared` until it is told to stop.
pub(super) async fn keep(
    shared: Arc<Shared>,
    mut server: Option<Server>,
    mut orders: watch::Receiver<Order>,
) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let since = Instant::now();
        let reason = tokio::select! {
            reason = look_after(&shared, server.as_mut()) => reason,
            () = told_to_stop(&mut orders) => break,
        };
        tracing::error!("vLLM does not serve: {reason}");
        shared.serving.send_replace(Serving::Down(reason));
        if let Some(server) = &mut server {
            // What still runs on it ends with its connections.
            server.kill().await;
        }
        if since.elapsed() > STABLE_AFTER {
            backoff = BACKOFF_MIN;
        }
        server = tokio::select! {
            revived = revive(&shared, &mut backoff) => match revived {
                Ok(server) => server,
                Err(error) => {
                    let reason = format!("it was started {STARTS_MAX} times in vain: {error}");
                    shared.serving.send_replace(Serving::GivenUp(reason));
                    return;
                }
            },
            () = told_to_stop(&mut orders) => break,
        };
        tracing::info!("vLLM serves again");
        shared.load.begin_anew();
        shared.serving.send_replace(Serving::Ready);
    }
    shared.serving.send_replace(Serving::Stopped);
    if let (Some(mut server), Some(command)) = (server, &shared.command) {
        server.stop(command.stop_timeout).await;
    }
}

/// Sends the canary to a rank; its error says what is wrong.
pub(super) async fn canary(
    shared: &Shared,
    rank: DpRank,
    limit: Duration,
) -> Result<(), HttpError> {
    let target = shared.target();
    let mut asked = shared.canary.clone();
    asked.route.rank = rank;
    asked.request_id = shared.name("canary");
    let path = target.route.path();
    let body = request::body(&asked, &target, Purpose::Canary);
    let headers = shared.headers(&asked);
    let exchange = async {
        let response = shared.http.post(path, &headers, body).await?;
        let body = shared.http.body(response).await?;
        let answer: serde_json::Value = super::client::parse(&body)?;
        let tokens = answer["choices"][0]["token_ids"].as_array();
        if tokens.is_some_and(|tokens| !tokens.is_empty()) {
            Ok(())
        } else {
            Err(malformed(&"a health check without a token"))
        }
    };
    shared.http.within(path, limit, exchange).await?;
    shared.load.made_progress(rank);
    Ok(())
}

/// Returns why the server does not serve any more.
async fn look_after(shared: &Shared, server: Option<&mut Server>) -> String {
    let died = async {
        match server {
            Some(server) => server.ended().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        end = died => end,
        reason = answers(shared) => reason,
        reason = generates(shared) => reason,
    }
}

/// Returns when `/health` fails for good.
async fn answers(shared: &Shared) -> String {
    let health = &shared.health;
    let mut ticks = interval(health.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failures = 0;
    for look in 0u32.. {
        tokio::select! {
            _ = ticks.tick() => {}
            // A request failed in a way that a server which is about to end has.
            () = shared.look_now.notified() => {}
        }
        match shared.http.get("/health", health.timeout).await {
            Ok(_) => failures = 0,
            Err(error) => {
                failures += 1;
                // vLLM says 503 when its engine is dead; there is nothing to wait for.
                let dead = matches!(error, HttpError::Status { status: 503, .. });
                tracing::warn!(failures, %error, "vLLM's health check failed");
                if dead || failures >= health.failures_max {
                    return error.to_string();
                }
            }
        }
        if look % LOOKS_PER_METRICS == 0
            && let Ok(text) = shared.http.get("/metrics", health.timeout).await
        {
            let samples = Samples::parse(&String::from_utf8_lossy(&text));
            shared.load.observe(&samples);
        }
    }
    unreachable!("2^32 looks take 200 years")
}

/// Returns when no token comes any more.
async fn generates(shared: &Shared) -> String {
    let health = &shared.health;
    let mut failed = false;
    loop {
        let (rank, quiet) = shared.load.quietest();
        if quiet < health.canary_wait {
            sleep(health.canary_wait - quiet).await;
            continue;
        }
        match canary(shared, rank, health.canary_timeout).await {
            Ok(()) => failed = false,
            // Somebody else got a token.
            Err(_) if shared.load.quiet(rank) < health.canary_wait => {}
            Err(error @ HttpError::Timeout { .. }) => {
                let active = shared.load.active();
                return format!("rank {rank} hangs with {active} requests in the server: {error}");
            }
            Err(error) if failed => return format!("it does not generate: {error}"),
            Err(error) => {
                tracing::warn!(%error, "vLLM's canary request failed");
                failed = true;
                sleep(health.interval).await;
            }
        }
    }
}

/// Returns when the server serves again: one that was started anew, or the one attached to. An error is
/// that of the last start when too many were in vain.
async fn revive(shared: &Shared, backoff: &mut Duration) -> Result<Option<Server>, VllmError> {
    let mut failures = 0;
    loop {
        tracing::info!(delay = ?*backoff, "vLLM is waited for or started again after this delay");
        sleep(*backoff).await;
        *backoff = (*backoff * 2).min(BACKOFF_MAX);
        match try_again(shared).await {
            Ok(server) => return Ok(server),
            Err(error) => {
                tracing::error!("vLLM does not serve yet: {error}");
                shared
                    .serving
                    .send_replace(Serving::Down(error.to_string()));
                failures += 1;
                // To wait for somebody else's server costs nothing.
                if shared.command.is_some() && failures == STARTS_MAX {
                    return Err(error);
                }
            }
        }
    }
}

async fn try_again(shared: &Shared) -> Result<Option<Server>, VllmError> {
    let server = match &shared.command {
        Some(command) => Some(start(command, &shared.http).await?),
        None => {
            shared.http.get("/health", shared.health.timeout).await?;
            None
        }
    };
    let facts = ServerFacts::read(&shared.http).await?;
    shared.facts.same_as(&facts)?;
    for rank in (0..facts.dp_size).map(DpRank) {
        canary(shared, rank, shared.health.canary_timeout).await?;
    }
    Ok(server)
}

async fn told_to_stop(orders: &mut watch::Receiver<Order>) {
    // An engine that is gone has said it, too.
    let _ = orders.wait_for(|order| *order == Order::Stop).await;
}
