//! Following a worker's feed over the RPC, through gaps, restarts and errors.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use blockplane_protocol::{
    DpRank, ErrorKind, FeedItem, FeedRequest, GenerateError, KvEvent, KvEventData, LoadReport,
    WorkerId, codec,
};
use blockplane_runtime::{
    events::{FeedConfig, FeedFault, FeedSubscriber, FeedUpdate, feed_response},
    rpc::{RpcClient, RpcClientConfig, RpcServer, RpcServerConfig, handler_fn},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use parking_lot::Mutex;

use crate::PATIENCE;

const WORKER: WorkerId = WorkerId(0x77);

/// What a scripted worker does with each subscription in turn: the items, and whether the feed then
/// ends or stays silent.
type Script = VecDeque<(Vec<FeedItem>, bool)>;

struct Worker {
    server: RpcServer,
    requests: Arc<Mutex<Vec<FeedRequest>>>,
}

impl Worker {
    async fn start(script: Script) -> Self {
        let server = RpcServer::bind(RpcServer::LOOPBACK, RpcServerConfig::default())
            .await
            .unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let script = Arc::new(Mutex::new(script));
        let log = Arc::clone(&requests);
        server.handle(
            "kv_events",
            handler_fn(move |_context, request: Bytes| {
                log.lock().push(codec::decode(&request).unwrap());
                let next = script.lock().pop_front();
                async move {
                    let (items, ends) = next.ok_or_else(|| {
                        GenerateError::new(ErrorKind::Unavailable, "the script is over")
                    })?;
                    let items = stream::iter(items);
                    Ok(if ends {
                        feed_response(items)
                    } else {
                        feed_response(items.chain(stream::pending()))
                    })
                }
            }),
        );
        Self { server, requests }
    }

    fn subscriber(&self) -> FeedSubscriber {
        FeedSubscriber::new(
            RpcClient::new(RpcClientConfig::default()),
            &self.server.local_addr().to_string(),
            "kv_events",
            WORKER,
            FeedConfig {
                idle_timeout: Duration::from_millis(300),
                backoff_min: Duration::from_millis(1),
                ..FeedConfig::default()
            },
        )
    }

    fn asked_from(&self, subscription: usize) -> Vec<(DpRank, u64)> {
        let requests = self.requests.lock();
        assert_eq!(requests[subscription].worker, Some(WORKER));
        requests[subscription].from.clone()
    }
}

fn events(ids: std::ops::RangeInclusive<u64>) -> Vec<KvEvent> {
    ids.map(|event_id| KvEvent {
        event_id,
        rank: DpRank(0),
        data: KvEventData::Cleared,
    })
    .collect()
}

async fn next(subscriber: &mut FeedSubscriber) -> FeedUpdate {
    tokio::time::timeout(PATIENCE, subscriber.next())
        .await
        .expect("no update came")
}

#[tokio::test]
async fn a_gap_is_repaired_by_asking_again() {
    let load = vec![LoadReport {
        blocks_total: 5,
        ..LoadReport::default()
    }];
    let worker = Worker::start(
        [
            (
                vec![
                    FeedItem::Load(load.clone()),
                    FeedItem::Events(events(1..=3)),
                    FeedItem::Events(events(5..=6)),
                ],
                false,
            ),
            // It repeats one, which must not be applied again.
            (vec![FeedItem::Events(events(3..=6))], false),
        ]
        .into(),
    )
    .await;
    let mut subscriber = worker.subscriber();
    assert_eq!(next(&mut subscriber).await, FeedUpdate::Load(load));
    assert_eq!(
        next(&mut subscriber).await,
        FeedUpdate::Events(events(1..=3))
    );
    let gap = FeedFault::Gap {
        rank: DpRank(0),
        expected: 4,
        got: 5,
    };
    assert_eq!(next(&mut subscriber).await, FeedUpdate::Fault(gap));
    assert_eq!(
        next(&mut subscriber).await,
        FeedUpdate::Events(events(4..=6))
    );
    assert_eq!(worker.asked_from(0), []);
    assert_eq!(worker.asked_from(1), [(DpRank(0), 3)]);
}

#[tokio::test]
async fn an_ended_a_silent_and_a_refused_feed_are_asked_for_again() {
    let snapshot = FeedItem::snapshot(DpRank(0), 10, &[]);
    let worker = Worker::start(
        [
            (snapshot, true),
            (vec![FeedItem::Events(events(11..=12))], false),
            (vec![FeedItem::Events(events(13..=13))], true),
        ]
        .into(),
    )
    .await;
    let mut subscriber = worker.subscriber();
    let expected = FeedUpdate::Snapshot {
        rank: DpRank(0),
        last_event_id: 10,
        blocks: vec![],
    };
    assert_eq!(next(&mut subscriber).await, expected);
    let mut lost = Vec::new();
    let mut applied = Vec::new();
    while lost.len() < 4 {
        match next(&mut subscriber).await {
            FeedUpdate::Events(events) => applied.extend(events),
            FeedUpdate::Lost { reason, .. } => lost.push(reason),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(applied, events(11..=13));
    assert!(lost[0].contains("ended"), "{lost:?}");
    assert!(lost[1].contains("nothing came"), "{lost:?}");
    assert!(lost[2].contains("ended"), "{lost:?}");
    assert!(lost[3].contains("script is over"), "{lost:?}");
    assert_eq!(worker.asked_from(2), [(DpRank(0), 12)]);
    assert_eq!(worker.asked_from(3), [(DpRank(0), 13)]);
}

#[tokio::test]
async fn a_consumer_can_ask_for_a_snapshot() {
    let worker = Worker::start(
        [
            (vec![FeedItem::Events(events(1..=2))], false),
            (FeedItem::snapshot(DpRank(0), 2, &[]), false),
        ]
        .into(),
    )
    .await;
    let mut subscriber = worker.subscriber();
    next(&mut subscriber).await;
    subscriber.resync(DpRank(0));
    assert!(matches!(
        next(&mut subscriber).await,
        FeedUpdate::Snapshot {
            last_event_id: 2,
            ..
        }
    ));
    assert_eq!(worker.asked_from(1), [], "no position is claimed");
}
