//! What callers see of their transfers: completions, telemetry, counters, traces.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockplane_transfer::{Op, PostError, PostOptions, Prepared, Registration, TransferError};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::support::{Blocks, Pair, Setup, WAIT, arena, block_on, scattered};

/// A WRITE of 20 scattered blocks of 1000 bytes, and the memory of the peer.
fn some_write(pair: &Pair) -> (Prepared, Registration) {
    let (local, remote) = (arena(&pair.a, 40_000), arena(&pair.b, 40_000));
    let side = |seed| Blocks {
        ids: scattered(40, 20, seed),
        ..Blocks::flat(40, 1000, &[])
    };
    let prepared = pair
        .prepare(Op::Write, (&local, &side(1)), (&remote, &side(2)), None)
        .unwrap();
    (prepared, remote)
}

/// Waits until the descriptor is readable, as any event loop does.
fn poll_readable(fd: &impl AsFd) {
    let mut poll = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let millis = i32::try_from(WAIT.as_millis()).unwrap();
    // SAFETY: one descriptor, valid during the call.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, millis) }, 1);
}

pub(crate) fn completions_come_to_an_event_loop(setup: &Setup) {
    let pair = setup.pair();
    let (prepared, _remote) = some_write(&pair);
    let queue = pair.a.completion_queue(64).unwrap();
    for token in 0..64 {
        let options = PostOptions::within(WAIT).complete_to(&queue, token);
        prepared.post(options).unwrap().detach();
    }
    let refused = prepared.post(PostOptions::default().complete_to(&queue, 64));
    let full = PostError::CompletionQueueFull { limit: 64 };
    assert_eq!(refused.err(), Some(full));
    let mut tokens = Vec::new();
    let mut batch = Vec::new();
    while tokens.len() < 64 {
        poll_readable(&queue);
        queue.drain(&mut batch);
        for completion in batch.drain(..) {
            assert_eq!((completion.outcome, completion.bytes), (Ok(()), 20_000));
            tokens.push(completion.token);
        }
    }
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..64));
    assert!(queue.is_empty() && queue.pop().is_none());
    // There is room again.
    let options = PostOptions::within(WAIT).complete_to(&queue, 7);
    pair.a
        .notify_with(&pair.peer, "note", options)
        .unwrap()
        .detach();
    let completion = queue.wait_timeout(WAIT).unwrap();
    assert_eq!((completion.token, completion.bytes), (7, 0));
}

pub(crate) fn every_post_completes_once_also_when_the_peer_goes(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 1 << 20), arena(&pair.b, 1 << 20));
    let all: Vec<u32> = (0..256).rev().collect();
    let side = Blocks::flat(256, 4096, &all);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let queue = pair.a.completion_queue(1000).unwrap();
    let mut posted = 0;
    for token in 0..200 {
        if token == 100 {
            pair.peer.disconnect();
        }
        let options = PostOptions::within(WAIT).complete_to(&queue, token);
        match prepared.post(options) {
            // Dropping the handle cancels, and that is an end as well.
            Ok(transfer) if token % 3 == 0 => drop(transfer),
            Ok(transfer) => transfer.detach(),
            Err(PostError::PeerLost(_)) => continue,
            Err(error) => panic!("{error}"),
        }
        posted += 1;
    }
    assert_eq!(posted, 100);
    let mut seen = [false; 100];
    for _ in 0..posted {
        let completion = queue.wait_timeout(WAIT).unwrap();
        let seen = &mut seen[usize::try_from(completion.token).unwrap()];
        assert!(!std::mem::replace(seen, true));
        assert!(matches!(
            completion.outcome,
            Ok(()) | Err(TransferError::Cancelled | TransferError::PeerLost(_))
        ));
    }
    // Refused posts took no place: all of them are free.
    assert!(queue.is_empty());
    assert_eq!(pair.a.stats().in_flight, 0);
}

pub(crate) fn telemetry_adds_up(setup: &Setup) {
    let pair = setup.pair();
    let (prepared, _remote) = some_write(&pair);
    let options = PostOptions::within(WAIT)
        .notify("done")
        .request_id("request 17");
    let mut transfer = prepared.post(options).unwrap();
    block_on(&mut transfer).unwrap();
    let told = transfer.telemetry().unwrap();
    assert_eq!(told.request_id.as_deref(), Some("request 17"));
    assert_eq!((&*told.peer, told.lane), ("b", setup.lane));
    assert_eq!(
        (told.op, told.bytes, told.runs),
        (Some(Op::Write), 20_000, 20)
    );
    assert_eq!(told.pieces, prepared.plan().pieces);
    assert_eq!(
        (told.parts, &told.reason),
        (prepared.plan().parts, &prepared.plan().reason)
    );
    assert_eq!(told.outcome, Ok(()));
    assert_eq!(told.bytes_phase + told.notification_phase, told.total);
    assert!(told.until_first_part.unwrap() <= told.bytes_phase);
    assert!(told.notification_phase > Duration::ZERO);

    let cancelled = prepared.post(PostOptions::within(Duration::ZERO)).unwrap();
    // It may have been done before its deadline was looked at; either way both must agree.
    let outcome = cancelled.wait(WAIT);
    assert_eq!(cancelled.telemetry().unwrap().outcome, outcome);

    let note = pair.a.notify(&pair.peer, "alone", WAIT).unwrap();
    note.wait(WAIT).unwrap();
    let told = note.telemetry().unwrap();
    assert_eq!(
        (told.op, told.bytes, told.until_first_part),
        (None, 0, None)
    );

    let (agent, peer) = (pair.a.stats(), pair.peer.stats());
    assert_eq!(agent.flows, peer.flows);
    let bytes = 20_000 + 20_000 * u64::from(outcome.is_ok());
    assert_eq!((agent.bytes_done, peer.bytes_done), (bytes, bytes));
    assert_eq!((agent.notifications_sent, peer.notifications_sent), (2, 2));
    let writes = peer
        .flows
        .iter()
        .find(|flow| flow.op == Some(Op::Write))
        .unwrap();
    assert_eq!(
        (writes.lane, writes.operations + writes.failed),
        (setup.lane, 2)
    );
    assert_eq!(writes.latency.count(), writes.operations);
    assert!(writes.latency.quantile(0.5).unwrap() <= writes.latency.max());
    assert_eq!((peer.in_flight, agent.in_flight), (0, 0));
    assert!(peer.in_flight_max >= 1 && agent.in_flight_max >= 1);
}

/// Keeps the fields of "transfer" spans.
#[derive(Clone, Default)]
struct Spans {
    seen: Arc<Mutex<Vec<BTreeMap<&'static str, String>>>>,
    ids: Arc<AtomicU64>,
}

struct Fields<'a>(&'a mut BTreeMap<&'static str, String>);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

impl Subscriber for Spans {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target() == "blockplane_transfer"
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        assert_eq!(span.metadata().name(), "transfer");
        let mut fields = BTreeMap::new();
        span.record(&mut Fields(&mut fields));
        self.seen.lock().unwrap().push(fields);
        Id::from_u64(self.ids.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

pub(crate) fn spans_name_the_request(setup: &Setup) {
    let pair = setup.pair();
    let (prepared, _remote) = some_write(&pair);
    let spans = Spans::default();
    tracing::subscriber::with_default(spans.clone(), || {
        let options = PostOptions::within(WAIT).request_id("request 17");
        prepared.post(options).unwrap().wait(WAIT).unwrap();
    });
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    let seen = spans.seen.lock().unwrap();
    assert_eq!(
        seen.len(),
        1,
        "one transfer was posted while anybody listened"
    );
    let lane = setup.lane.to_string();
    for (field, value) in [
        ("request_id", "\"request 17\""),
        ("peer", "\"b\""),
        ("lane", lane.as_str()),
        ("op", "\"write\""),
        ("bytes", "20000"),
    ] {
        assert_eq!(
            seen[0].get(field).map(String::as_str),
            Some(value),
            "{field}"
        );
    }
}
