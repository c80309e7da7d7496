//! The RPC within one process, over loopback TCP.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use blockplane_protocol::{ErrorKind, GenerateError, RequestId};
use blockplane_runtime::rpc::{
    CallContext, CallOptions, ConnectionEvent, Handler, Responses, RpcClient, RpcClientConfig,
    RpcError, RpcServer, RpcServerConfig, handler_fn, unary_fn,
};
use bytes::Bytes;
use futures::{StreamExt, future::join_all, stream};
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
};

use crate::PATIENCE;

/// A deadline that has no part in what is tested.
fn long() -> CallOptions {
    CallOptions::new(PATIENCE * 20)
}

async fn server(config: RpcServerConfig, endpoints: &[(&str, Arc<dyn Handler>)]) -> RpcServer {
    let server = RpcServer::bind(RpcServer::LOOPBACK, config).await.unwrap();
    for (name, handler) in endpoints {
        server.handle(name, Arc::clone(handler));
    }
    server
}

fn client() -> RpcClient {
    RpcClient::new(RpcClientConfig::default())
}

fn echo() -> Arc<dyn Handler> {
    unary_fn(|_context, payload| async move { Ok(payload) })
}

/// Sends as many numbered messages as the request says.
fn count() -> Arc<dyn Handler> {
    handler_fn(|_context, request: Bytes| async move {
        let n = u64::from_le_bytes(request.as_ref().try_into().unwrap());
        Ok(stream::iter((0..n).map(|i| Ok(number(i)))).boxed())
    })
}

fn number(n: u64) -> Bytes {
    Bytes::copy_from_slice(&n.to_le_bytes())
}

/// How many calls of a handler have begun and how many of them were dropped.
#[derive(Clone)]
struct Watched {
    begun: Arc<watch::Sender<usize>>,
    dropped: Arc<watch::Sender<usize>>,
}

struct CountsDrop(Watched);

impl Drop for CountsDrop {
    fn drop(&mut self) {
        self.0.dropped.send_modify(|n| *n += 1);
    }
}

impl Watched {
    fn new() -> Self {
        Self {
            begun: Arc::new(watch::Sender::new(0)),
            dropped: Arc::new(watch::Sender::new(0)),
        }
    }

    fn begin(&self) -> CountsDrop {
        self.begun.send_modify(|n| *n += 1);
        CountsDrop(self.clone())
    }

    /// A handler that sends one message and then nothing.
    fn hang(&self) -> Arc<dyn Handler> {
        let watched = self.clone();
        handler_fn(move |_context, payload| {
            let guard = watched.begin();
            async move {
                let rest = stream::pending().map(move |item| {
                    let _held = &guard;
                    item
                });
                Ok(stream::iter([Ok(payload)]).chain(rest).boxed())
            }
        })
    }

    async fn wait_dropped(&self, n: usize) {
        tokio::time::timeout(
            PATIENCE,
            self.dropped.subscribe().wait_for(|dropped| *dropped >= n),
        )
        .await
        .expect("the handler was not dropped")
        .unwrap();
    }
}

async fn first(responses: &mut Responses) -> Bytes {
    responses.next().await.unwrap().unwrap()
}

fn remote_kind(error: &RpcError) -> ErrorKind {
    match error {
        RpcError::Remote(error) => error.kind,
        other => panic!("not an error of the handler: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_arrive_complete_and_in_order() {
    let server = server(
        RpcServerConfig::default(),
        &[("echo", echo()), ("count", count())],
    )
    .await;
    let address = server.local_addr().to_string();
    let client = client();
    let answer = client
        .call_unary(&address, "echo", Bytes::from_static(b"hello"), long())
        .await
        .unwrap();
    assert_eq!(answer, "hello");

    let n = 20_000;
    let mut responses = client
        .call(&address, "count", number(n), long())
        .await
        .unwrap();
    for i in 0..n {
        assert_eq!(first(&mut responses).await, number(i));
    }
    assert!(responses.next().await.is_none());
    assert!(
        responses.next().await.is_none(),
        "an ended stream stays ended"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_calls_at_once_share_one_connection() {
    let server = server(RpcServerConfig::default(), &[("count", count())]).await;
    let address = server.local_addr().to_string();
    let client = client();
    let mut events = client.connection_events();
    let calls = (0..1000u64).map(|n| {
        let client = client.clone();
        let address = address.clone();
        tokio::spawn(async move {
            let responses = client
                .call(&address, "count", number(n), long())
                .await
                .unwrap();
            let messages: Vec<Bytes> = responses.map(Result::unwrap).collect().await;
            assert_eq!(messages, (0..n).map(number).collect::<Vec<_>>());
        })
    });
    for call in join_all(calls).await {
        call.unwrap();
    }
    drop(client);
    let connected = ConnectionEvent::Connected { address };
    assert_eq!(events.recv().await, Some(connected));
    assert_eq!(events.recv().await, None, "there was one connection");
    assert_eq!(server.calls_running(), 0);
}

#[tokio::test]
async fn large_messages_go_both_ways_and_too_large_ones_fail_alone() {
    let reply_size = handler_fn(|_context, request: Bytes| async move {
        let bytes: usize = std::str::from_utf8(&request).unwrap().parse().unwrap();
        let small = Bytes::from_static(b"small");
        Ok(stream::iter([Ok(small), Ok(vec![7; bytes].into())]).boxed())
    });
    let limit = 3 << 20;
    let server = server(
        RpcServerConfig {
            message_bytes_max: limit,
            ..RpcServerConfig::default()
        },
        &[("echo", echo()), ("reply", reply_size)],
    )
    .await;
    let address = server.local_addr().to_string();
    let client = client();

    let message: Bytes = (0..limit).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let answer = client
        .call_unary(&address, "echo", message.clone(), long())
        .await
        .unwrap();
    assert!(answer == message, "the limit itself is accepted");

    let error = client
        .call_unary(&address, "echo", vec![0; limit + 1].into(), long())
        .await
        .unwrap_err();
    assert_eq!(remote_kind(&error), ErrorKind::InvalidRequest);
    assert!(error.to_string().contains(&limit.to_string()), "{error}");

    let too_large = (limit + 1).to_string();
    let mut responses = client
        .call(&address, "reply", too_large.into(), long())
        .await
        .unwrap();
    assert_eq!(first(&mut responses).await, "small");
    let error = responses.next().await.unwrap().unwrap_err();
    assert_eq!(remote_kind(&error), ErrorKind::Internal);

    let strict = RpcClient::new(RpcClientConfig {
        message_bytes_max: 1000,
        ..RpcClientConfig::default()
    });
    let refused = strict
        .call(&address, "echo", vec![0; 1001].into(), long())
        .await
        .unwrap_err();
    let expected = RpcError::MessageTooLarge {
        bytes: 1001,
        limit: 1000,
    };
    assert_eq!(refused, expected);
    let mut responses = strict
        .call(&address, "reply", "1000000".into(), long())
        .await
        .unwrap();
    assert_eq!(first(&mut responses).await, "small");
    let error = responses.next().await.unwrap().unwrap_err();
    assert!(matches!(
        error,
        RpcError::MessageTooLarge { limit: 1000, .. }
    ));
    // The connection is as good as before.
    let answer = strict
        .call_unary(&address, "echo", "again".into(), long())
        .await
        .unwrap();
    assert_eq!(answer, "again");
}

#[tokio::test]
async fn dropping_the_responses_cancels_the_handler() {
    let watched = Watched::new();
    let begun = Arc::new(Notify::new());
    let cancelled = Arc::new(Notify::new());
    let told = Arc::clone(&cancelled);
    let began = Arc::clone(&begun);
    let delegating = handler_fn(move |context: CallContext, _payload| {
        let told = Arc::clone(&told);
        let token = context.cancellation().clone();
        // Work that the handler gave away learns of it by the token.
        tokio::spawn(async move {
            token.cancelled().await;
            told.notify_one();
        });
        began.notify_one();
        std::future::pending()
    });
    let server = server(
        RpcServerConfig::default(),
        &[("hang", watched.hang()), ("delegate", delegating)],
    )
    .await;
    let address = server.local_addr().to_string();
    let client = client();
    let mut responses = client
        .call(&address, "hang", "x".into(), long())
        .await
        .unwrap();
    first(&mut responses).await;
    assert_eq!(*watched.dropped.borrow(), 0);
    drop(responses);
    watched.wait_dropped(1).await;

    let responses = client
        .call(&address, "delegate", Bytes::new(), long())
        .await
        .unwrap();
    begun.notified().await;
    drop(responses);
    tokio::time::timeout(PATIENCE, cancelled.notified())
        .await
        .expect("the token was not cancelled");
    tokio::time::timeout(PATIENCE, async {
        while server.calls_running() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("a cancelled call still counts");
}

#[tokio::test]
async fn dropping_the_client_and_its_calls_ends_them() {
    let watched = Watched::new();
    let server = server(RpcServerConfig::default(), &[("hang", watched.hang())]).await;
    let address = server.local_addr().to_string();
    let client = client();
    let mut kept = client
        .call(&address, "hang", "x".into(), long())
        .await
        .unwrap();
    let dropped = client
        .call(&address, "hang", "x".into(), long())
        .await
        .unwrap();
    drop(client);
    // A call that is open needs the connection; it can still be cancelled alone.
    assert_eq!(first(&mut kept).await, "x");
    drop(dropped);
    watched.wait_dropped(1).await;
    assert_eq!(server.calls_running(), 1);
    drop(kept);
    watched.wait_dropped(2).await;
}

#[tokio::test]
async fn a_deadline_ends_the_call_on_both_sides() {
    let watched = Watched::new();
    let (left, mut seen) = watch::channel(Duration::ZERO);
    let hang = watched.hang();
    let reporting = handler_fn(move |context: CallContext, payload| {
        left.send_replace(context.remaining());
        let hang = Arc::clone(&hang);
        async move { hang.call(context, payload).await }
    });
    let server = server(RpcServerConfig::default(), &[("hang", reporting)]).await;
    let address = server.local_addr().to_string();
    let limit = Duration::from_millis(300);
    let options = CallOptions::new(limit).request_id(RequestId("r-1".to_owned()));
    let mut responses = client()
        .call(&address, "hang", "x".into(), options)
        .await
        .unwrap();
    assert_eq!(first(&mut responses).await, "x");
    let error = responses.next().await.unwrap().unwrap_err();
    // Whichever side notices first.
    assert_eq!(GenerateError::from(error).kind, ErrorKind::DeadlineExceeded);
    assert!(responses.next().await.is_none());
    watched.wait_dropped(1).await;

    // The server keeps to it also when the client does not look.
    let unread = client()
        .call(&address, "hang", "x".into(), CallOptions::new(limit))
        .await
        .unwrap();
    watched.wait_dropped(2).await;
    drop(unread);
    let remaining = *seen.borrow_and_update();
    assert!(
        Duration::ZERO < remaining && remaining <= limit,
        "{remaining:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_consumer_holds_up_only_itself() {
    const MESSAGE_BYTES: usize = 1000;
    let produced = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&produced);
    let flood = handler_fn(move |_context, _payload| {
        let counter = Arc::clone(&counter);
        async move {
            Ok(stream::repeat_with(move || {
                let n = counter.fetch_add(1, Ordering::Relaxed) as u64;
                let mut message = vec![0; MESSAGE_BYTES];
                message[..8].copy_from_slice(&n.to_le_bytes());
                Ok(Bytes::from(message))
            })
            .boxed())
        }
    });
    let server = server(
        RpcServerConfig::default(),
        &[("flood", flood), ("count", count())],
    )
    .await;
    let address = server.local_addr().to_string();
    let window_bytes = 64 << 10;
    let client = RpcClient::new(RpcClientConfig {
        window_bytes,
        ..RpcClientConfig::default()
    });
    let mut slow = client
        .call(&address, "flood", Bytes::new(), long())
        .await
        .unwrap();
    // Others pass much more than a window, an outbox and the HTTP/2 windows hold.
    let n = 50_000;
    let quick = client
        .call(&address, "count", number(n), long())
        .await
        .unwrap();
    assert_eq!(quick.count().await as u64, n);

    let in_flight = window_bytes as usize / MESSAGE_BYTES + 2;
    let produced = produced.load(Ordering::Relaxed);
    assert!(
        produced <= in_flight,
        "{produced} messages were made for nobody"
    );
    // It was held up, not harmed.
    for i in 0..1000u64 {
        assert_eq!(first(&mut slow).await[..8], i.to_le_bytes());
    }
}

#[tokio::test]
async fn errors_of_handlers_reach_their_callers() {
    let failing = handler_fn(|_context, _payload| async {
        let error = GenerateError::new(ErrorKind::Overloaded, "no blocks left");
        Ok(stream::iter([Ok(Bytes::from_static(b"one")), Err(error)]).boxed())
    });
    let refusing = unary_fn(|_context, _payload| async {
        Err(GenerateError::new(
            ErrorKind::InvalidRequest,
            "prompt too long",
        ))
    });
    let panicking = unary_fn(|_context, _payload| async { panic!("on purpose") });
    let silent = handler_fn(|_context, _payload| async { Ok(stream::empty().boxed()) });
    let server = server(
        RpcServerConfig::default(),
        &[
            ("failing", failing),
            ("refusing", refusing),
            ("panicking", panicking),
            ("silent", silent),
        ],
    )
    .await;
    let address = server.local_addr().to_string();
    let client = client();
    let call = |endpoint| client.call_unary(&address, endpoint, Bytes::new(), long());

    let mut responses = client
        .call(&address, "failing", Bytes::new(), long())
        .await
        .unwrap();
    assert_eq!(first(&mut responses).await, "one");
    let error = responses.next().await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "no blocks left");
    assert!(error.retryable());
    assert!(responses.next().await.is_none());

    let error = call("refusing").await.unwrap_err();
    assert!(!error.retryable());
    assert_eq!(remote_kind(&error), ErrorKind::InvalidRequest);

    let error = call("panicking").await.unwrap_err();
    assert_eq!(remote_kind(&error), ErrorKind::Internal);
    assert!(error.to_string().contains("on purpose"), "{error}");

    let error = call("silent").await.unwrap_err();
    assert!(matches!(error, RpcError::Protocol { .. }), "{error}");

    let error = call("absent").await.unwrap_err();
    assert_eq!(remote_kind(&error), ErrorKind::Unavailable);
    assert!(
        error.to_string().contains("refusing"),
        "it names the endpoints: {error}"
    );
}

#[tokio::test]
async fn limits_of_open_calls_are_kept() {
    let watched = Watched::new();
    let server = server(
        RpcServerConfig {
            calls_max: 2,
            connections_max: 1,
            ..RpcServerConfig::default()
        },
        &[("hang", watched.hang())],
    )
    .await;
    let address = server.local_addr().to_string();
    let client = RpcClient::new(RpcClientConfig {
        calls_max: 3,
        ..RpcClientConfig::default()
    });
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut responses = client
            .call(&address, "hang", "x".into(), long())
            .await
            .unwrap();
        first(&mut responses).await;
        open.push(responses);
    }
    let mut third = client
        .call(&address, "hang", "x".into(), long())
        .await
        .unwrap();
    let fourth = client.call(&address, "hang", "x".into(), long()).await;
    assert!(matches!(
        fourth,
        Err(RpcError::TooManyCalls { limit: 3, .. })
    ));
    let error = third.next().await.unwrap().unwrap_err();
    assert_eq!(remote_kind(&error), ErrorKind::Overloaded);

    let other = RpcClient::new(RpcClientConfig::default());
    let error = other
        .call(&address, "hang", "x".into(), long())
        .await
        .unwrap_err();
    assert!(matches!(error, RpcError::CannotConnect { .. }), "{error}");
    assert!(error.to_string().contains("limit"), "{error}");
}

#[tokio::test]
async fn a_peer_that_is_not_there_or_not_ours_cannot_be_connected() {
    let client = RpcClient::new(RpcClientConfig {
        connect_timeout: Duration::from_millis(500),
        backoff_min: PATIENCE,
        backoff_max: PATIENCE,
        ..RpcClientConfig::default()
    });
    let free = TcpListener::bind(RpcServer::LOOPBACK).await.unwrap();
    let address = free.local_addr().unwrap().to_string();
    // Accepts and says nothing.
    let error = client
        .call(&address, "echo", Bytes::new(), long())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no answer within"), "{error}");
    drop(free);

    // Within the pause it fails at once, with the reason of the attempt.
    let again = client
        .call(&address, "echo", Bytes::new(), long())
        .await
        .unwrap_err();
    assert_eq!(again, error);
    assert!(again.retryable());

    for wrong in ["", "no port", "127.0.0.1:1", "host.invalid:80"] {
        let error = client
            .call(wrong, "echo", Bytes::new(), long())
            .await
            .unwrap_err();
        assert!(matches!(error, RpcError::CannotConnect { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_that_comes_back_on_its_address_is_called_again() {
    let first_server = server(RpcServerConfig::default(), &[("echo", echo())]).await;
    let local_addr = first_server.local_addr();
    let address = local_addr.to_string();
    let client = client();
    let mut events = client.connection_events();
    let call = || client.call_unary(&address, "echo", "x".into(), long());
    call().await.unwrap();
    first_server.shutdown(Duration::ZERO).await;
    drop(first_server);
    assert!(matches!(
        events.recv().await,
        Some(ConnectionEvent::Connected { .. })
    ));
    assert!(matches!(
        events.recv().await,
        Some(ConnectionEvent::Lost { .. })
    ));
    assert!(!client.is_connected(&address));
    let error = call().await.unwrap_err();
    assert!(matches!(error, RpcError::CannotConnect { .. }), "{error}");

    let second_server = RpcServer::bind(local_addr, RpcServerConfig::default())
        .await
        .unwrap();
    second_server.handle("echo", echo());
    tokio::time::timeout(PATIENCE, async {
        while call().await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the client did not connect again");
}

#[tokio::test]
async fn shutdown_lets_calls_finish_refuses_new_ones_and_cuts_off_the_rest() {
    let watched = Watched::new();
    let release = Arc::new(Notify::new());
    let released = Arc::clone(&release);
    let begun = watched.clone();
    let finishing = unary_fn(move |_context, payload| {
        let released = Arc::clone(&released);
        let _guard = begun.begin();
        async move {
            released.notified().await;
            Ok(payload)
        }
    });
    let server = server(
        RpcServerConfig::default(),
        &[("finish", finishing), ("hang", watched.hang())],
    )
    .await;
    let address = server.local_addr().to_string();
    let client = client();
    let finish = client
        .call(&address, "finish", "done".into(), long())
        .await
        .unwrap();
    let mut stubborn = client
        .call(&address, "hang", "x".into(), long())
        .await
        .unwrap();
    first(&mut stubborn).await;

    // Long enough for the steps below, which all happen within it.
    let grace = Duration::from_secs(2);
    let shutdown = tokio::spawn({
        let server = server.clone();
        async move { server.shutdown(grace).await }
    });
    // Draining begins when the new task runs.
    let refused = tokio::time::timeout(grace, async {
        loop {
            let mut responses = client
                .call(&address, "hang", "x".into(), long())
                .await
                .unwrap();
            if let Err(error) = responses.next().await.unwrap() {
                break error;
            }
        }
    })
    .await
    .expect("new calls were not refused");
    assert_eq!(remote_kind(&refused), ErrorKind::WorkerLost);
    assert!(refused.retryable());
    release.notify_one();
    assert_eq!(finish.only().await.unwrap(), "done");

    let cut_off = stubborn.next().await.unwrap().unwrap_err();
    assert_eq!(remote_kind(&cut_off), ErrorKind::WorkerLost);
    let report = shutdown.await.unwrap();
    assert_eq!(report.cancelled, 1);
    assert!(report.running >= 2);
    let error = client
        .call(&address, "hang", "x".into(), long())
        .await
        .unwrap_err();
    assert!(error.retryable(), "{error}");
}

#[tokio::test]
async fn a_dropped_server_loses_its_callers_at_once() {
    let watched = Watched::new();
    let server = server(RpcServerConfig::default(), &[("hang", watched.hang())]).await;
    let address = server.local_addr().to_string();
    let client = client();
    let mut responses = client
        .call(&address, "hang", "x".into(), long())
        .await
        .unwrap();
    first(&mut responses).await;
    drop(server);
    let error = responses.next().await.unwrap().unwrap_err();
    assert_eq!(GenerateError::from(error).kind, ErrorKind::WorkerLost);
    watched.wait_dropped(1).await;
}
