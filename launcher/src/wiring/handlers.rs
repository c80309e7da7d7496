//! A worker's RPC endpoints over its engine.

use std::{sync::Arc, time::Duration};

use blockplane_engine::{Engine, Health};
use blockplane_kvbm::{EventFeed, KvBatch};
use blockplane_protocol::{
    DpRank, ErrorKind, GenerateError, GenerateRequest, LoadReport, PrefillJob, WorkerId, codec,
    feed::{FeedItem, FeedRequest},
};
use blockplane_runtime::{
    lifecycle::{ShutdownGate, WorkGuard},
    rpc::{Handler, ResponseStream, RpcServer, handler_fn, unary_fn},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::descriptor::{FEED, GENERATE, PREFILL};

/// How often a changed load is reported.
const LOAD_INTERVAL: Duration = Duration::from_millis(250);
/// How often an unchanged load is reported, as a sign of life.
const LOAD_REPEAT: Duration = Duration::from_secs(2);

/// Serves all endpoints of a worker.
pub(crate) fn serve(
    server: &RpcServer,
    worker: WorkerId,
    engine: &Arc<dyn Engine>,
    gate: &ShutdownGate,
) {
    server.handle(GENERATE, generate(Arc::clone(engine), gate.clone()));
    server.handle(PREFILL, prefill(Arc::clone(engine), gate.clone()));
    server.handle(FEED, feed(worker, Arc::clone(engine)));
}

fn generate(engine: Arc<dyn Engine>, gate: ShutdownGate) -> Arc<dyn Handler> {
    handler_fn(move |context, payload| {
        let started = admit(&gate).and_then(|guard| {
            let mut request: GenerateRequest = decode(&payload)?;
            request.deadline_ms = request.deadline_ms.min(millis(context.remaining()));
            Ok((engine.generate(request)?, guard))
        });
        async move {
            let (tokens, guard) = started?;
            let frames = tokens.map(move |frame| {
                let _counted_until_the_stream_ends = &guard;
                frame.map(|frame| Bytes::from(codec::encode(&frame)))
            });
            Ok(Box::pin(frames) as ResponseStream)
        }
    })
}

fn prefill(engine: Arc<dyn Engine>, gate: ShutdownGate) -> Arc<dyn Handler> {
    unary_fn(move |context, payload| {
        let started = admit(&gate).and_then(|guard| {
            let mut job: PrefillJob = decode(&payload)?;
            job.request.deadline_ms = job.request.deadline_ms.min(millis(context.remaining()));
            Ok((engine.prefill(job)?, guard))
        });
        async move {
            let (ticket, _guard) = started?;
            Ok(Bytes::from(codec::encode(&ticket.await?)))
        }
    })
}

fn admit(gate: &ShutdownGate) -> Result<WorkGuard, GenerateError> {
    gate.admit().ok_or_else(|| {
        GenerateError::new(
            ErrorKind::WorkerLost,
            "the worker is leaving and takes no new requests",
        )
    })
}

fn feed(worker: WorkerId, engine: Arc<dyn Engine>) -> Arc<dyn Handler> {
    handler_fn(move |_context, payload| {
        let engine = Arc::clone(&engine);
        async move {
            let request: FeedRequest = decode(&payload)?;
            if let Some(meant) = request.worker
                && meant != worker
            {
                let message = format!("worker {meant} has left; this is worker {worker}");
                return Err(GenerateError::new(ErrorKind::WorkerLost, message));
            }
            // A worker is routed to while its feed is followed.
            if let Some(error) = unhealthy(engine.as_ref()) {
                return Err(error);
            }
            let events: Vec<ResponseStream> = (0..engine.info().dp_size)
                .map(DpRank)
                .filter_map(|rank| {
                    let feed = engine.events(rank)?;
                    let from = request.from.iter().find(|(known, _)| *known == rank);
                    Some(rank_events(&feed, rank, from.map(|(_, last)| *last)))
                })
                .collect();
            let loads = load_reports(engine);
            Ok(Box::pin(stream::select(loads, stream::select_all(events))) as ResponseStream)
        }
    })
}

/// Why nothing shall be sent to a worker now, if so.
fn unhealthy(engine: &dyn Engine) -> Option<GenerateError> {
    match engine.health() {
        Health::Unhealthy { reason } => Some(GenerateError::new(ErrorKind::Unavailable, reason)),
        Health::Ready | Health::Draining | Health::Stopped => None,
    }
}

/// The events of one rank after number `last`, or a snapshot and what follows it.
fn rank_events(feed: &EventFeed, rank: DpRank, last: Option<u64>) -> ResponseStream {
    let subscription = feed.subscribe(last);
    let items = stream::unfold(subscription, move |mut subscription| async move {
        let items = match subscription.next().await? {
            KvBatch::Snapshot(snapshot) => {
                FeedItem::snapshot(rank, snapshot.last_event_id, &snapshot.blocks)
            }
            KvBatch::Events(events) => vec![FeedItem::Events(events)],
        };
        let messages = items
            .into_iter()
            .map(|item| Ok(Bytes::from(codec::encode(&item))));
        Some((stream::iter(messages.collect::<Vec<_>>()), subscription))
    });
    Box::pin(items.flatten())
}

/// The load of all ranks now, then on change, and from time to time as a sign of life. Ends the feed
/// when the engine does not work any more, so that nothing is sent to the worker until it does.
fn load_reports(engine: Arc<dyn Engine>) -> ResponseStream {
    struct Reporting {
        engine: Arc<dyn Engine>,
        ticks: tokio::time::Interval,
        last: Vec<LoadReport>,
        repeat_at: Instant,
    }
    let mut ticks = interval(LOAD_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let state = Reporting {
        engine,
        ticks,
        last: Vec::new(),
        repeat_at: Instant::now(),
    };
    Box::pin(stream::unfold(state, |mut state| async move {
        loop {
            let now = state.ticks.tick().await;
            if let Some(error) = unhealthy(state.engine.as_ref()) {
                return Some((Err(error), state));
            }
            let load = state.engine.load();
            if load != state.last || now >= state.repeat_at {
                state.repeat_at = now + LOAD_REPEAT;
                state.last.clone_from(&load);
                let message = codec::encode(&FeedItem::Load(load));
                return Some((Ok(Bytes::from(message)), state));
            }
        }
    }))
}

fn decode<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, GenerateError> {
    codec::decode(payload)
        .map_err(|error| GenerateError::new(ErrorKind::InvalidRequest, error.to_string()))
}

/// Whole milliseconds of a duration.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
