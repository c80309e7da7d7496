//! The RPC between real processes that are killed, stopped and started again.

use std::{sync::Arc, time::Duration};

use blockplane_protocol::{ErrorKind, GenerateError};
use blockplane_runtime::rpc::{
    CallOptions, ConnectionEvent, Handler, Responses, RpcClient, RpcClientConfig, RpcError,
    RpcServer, RpcServerConfig, handler_fn,
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use rustix::process::Signal;
use tokio::sync::watch;

use crate::{
    PATIENCE,
    role::{Role, listen, say},
};

/// Much longer than [`PATIENCE`]: what ends before is not ended by its deadline.
const FAR: Duration = Duration::from_secs(600);

/// Sends `x` for ever.
fn endless() -> Arc<dyn Handler> {
    handler_fn(|_context, _payload| async {
        Ok(stream::repeat_with(|| Ok(Bytes::from_static(b"x"))).boxed())
    })
}

/// Sends one message and then nothing.
fn quiet() -> Arc<dyn Handler> {
    handler_fn(|_context, payload| async {
        Ok(stream::iter([Ok(payload)]).chain(stream::pending()).boxed())
    })
}

#[test]
#[ignore = "a role that other tests start"]
fn role_server() {
    let address = listen().parse().unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let server = RpcServer::bind(address, RpcServerConfig::default())
            .await
            .unwrap();
        server.handle("endless", endless());
        server.handle("quiet", quiet());
        say(&server.local_addr().to_string());
        tokio::task::spawn_blocking(listen).await.unwrap();
    });
}

/// Calls `quiet` at the address and waits.
#[test]
#[ignore = "a role that other tests start"]
fn role_client() {
    let address = listen();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let client = RpcClient::new(RpcClientConfig::default());
        let mut responses = client
            .call(&address, "quiet", Bytes::new(), CallOptions::new(FAR))
            .await
            .unwrap();
        responses.next().await.unwrap().unwrap();
        say("called");
        tokio::task::spawn_blocking(listen).await.unwrap();
        drop(responses);
    });
}

fn start_server() -> (Role, String) {
    let mut role = Role::start("processes::role_server", &RpcServer::LOOPBACK.to_string());
    let address = role.heard();
    (role, address)
}

async fn call(client: &RpcClient, address: &str, endpoint: &str) -> Responses {
    let mut responses = client
        .call(address, endpoint, "x".into(), CallOptions::new(FAR))
        .await
        .unwrap();
    assert_eq!(responses.next().await.unwrap().unwrap(), "x");
    responses
}

/// The error that ends a stream, waiting no longer than is sensible.
async fn end_of(mut responses: Responses) -> RpcError {
    tokio::time::timeout(PATIENCE, async {
        loop {
            if let Err(error) = responses
                .next()
                .await
                .expect("the stream ended without an error")
            {
                return error;
            }
        }
    })
    .await
    .expect("the loss of the peer was not noticed")
}

#[tokio::test]
async fn calls_of_a_killed_server_fail_at_once() {
    let (mut role, address) = start_server();
    // The pings are so slow that only the reset of the connection can tell.
    let client = RpcClient::new(RpcClientConfig {
        peer_loss_timeout: FAR,
        ..RpcClientConfig::default()
    });
    let mut events = client.connection_events();
    let busy = call(&client, &address, "endless").await;
    let waiting = call(&client, &address, "quiet").await;
    role.kill();
    for responses in [waiting, busy] {
        let error = end_of(responses).await;
        assert!(matches!(error, RpcError::PeerLost { .. }), "{error:?}");
        assert!(error.retryable());
        assert_eq!(GenerateError::from(error).kind, ErrorKind::WorkerLost);
    }
    let connected = ConnectionEvent::Connected {
        address: address.clone(),
    };
    assert_eq!(events.recv().await, Some(connected));
    let lost = events.recv().await.unwrap();
    assert!(
        matches!(&lost, ConnectionEvent::Lost { address: of, .. } if *of == address),
        "{lost:?}"
    );
}

#[tokio::test]
async fn a_stopped_server_is_lost_and_found_again() {
    let (role, address) = start_server();
    let client = RpcClient::new(RpcClientConfig::default());
    let waiting = call(&client, &address, "quiet").await;
    let busy = call(&client, &address, "endless").await;
    role.signal(Signal::STOP);
    for responses in [waiting, busy] {
        let error = end_of(responses).await;
        assert!(matches!(error, RpcError::PeerLost { .. }), "{error:?}");
    }
    // A stopped process still accepts connections, in the kernel.
    let error = client
        .call(&address, "quiet", Bytes::new(), CallOptions::new(FAR))
        .await
        .unwrap_err();
    assert!(matches!(error, RpcError::CannotConnect { .. }), "{error:?}");

    role.signal(Signal::CONT);
    let found = async {
        loop {
            let options = CallOptions::new(FAR);
            if let Ok(mut responses) = client.call(&address, "quiet", "x".into(), options).await {
                return responses.next().await.unwrap().unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, found).await.unwrap(), "x");
}

#[tokio::test]
async fn a_server_started_again_on_its_address_serves_the_old_client() {
    let (mut role, address) = start_server();
    let client = RpcClient::new(RpcClientConfig::default());
    let responses = call(&client, &address, "quiet").await;
    role.kill();
    end_of(responses).await;
    let mut role = Role::start("processes::role_server", &address);
    assert_eq!(role.heard(), address);
    drop(call(&client, &address, "quiet").await);
}

#[tokio::test]
async fn handlers_of_a_killed_or_stopped_client_are_dropped() {
    struct CountsDrop(watch::Sender<u32>);
    impl Drop for CountsDrop {
        fn drop(&mut self) {
            self.0.send_modify(|n| *n += 1);
        }
    }
    let (dropped, mut seen) = watch::channel(0);
    let server = RpcServer::bind(RpcServer::LOOPBACK, RpcServerConfig::default())
        .await
        .unwrap();
    server.handle(
        "quiet",
        handler_fn(move |_context, payload| {
            let guard = CountsDrop(dropped.clone());
            async move {
                let held = stream::pending().map(move |item| {
                    let _held = &guard;
                    item
                });
                Ok(stream::iter([Ok(payload)]).chain(held).boxed())
            }
        }),
    );
    let address = server.local_addr().to_string();
    let start = || {
        let address = address.clone();
        tokio::task::spawn_blocking(move || {
            let mut role = Role::start("processes::role_client", &address);
            assert_eq!(role.heard(), "called");
            role
        })
    };
    let mut killed = start().await.unwrap();
    let stopped = start().await.unwrap();
    assert_eq!(server.calls_running(), 2);
    killed.kill();
    let wait = |n| {
        let mut seen = seen.clone();
        async move {
            tokio::time::timeout(PATIENCE, seen.wait_for(|dropped| *dropped >= n))
                .await
                .expect("the loss of the client was not noticed")
                .unwrap();
        }
    };
    wait(1).await;
    stopped.signal(Signal::STOP);
    wait(2).await;
    assert_eq!(*seen.borrow_and_update(), 2);
}
