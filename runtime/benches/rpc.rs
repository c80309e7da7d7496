//! Speed of the RPC between two processes over loopback: `cargo bench -p blockplane-runtime`.
//!
//! Prints a table. Each process has two worker threads. The physical bound beside the latency is a
//! ping-pong of the same bytes over a plain TCP connection between two threads.
#![expect(clippy::print_stdout, reason = "the table is what it is for")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_runtime::rpc::{
    CallOptions, RpcClient, RpcClientConfig, RpcError, RpcServer, RpcServerConfig, handler_fn,
    unary_fn,
};
use bytes::Bytes;
use futures::{StreamExt, future::join_all, stream};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;

const PAYLOAD_BYTES: usize = 64;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads can be started")
}

fn main() {
    if std::env::args().any(|argument| argument == "serve") {
        runtime().block_on(serve());
        return;
    }
    let mut server = start_server();
    let address = server.address.clone();
    runtime().block_on(async {
        measure(&address).await;
        cancellation(&address).await;
        loss(&address, "noticing a killed server", || {
            server.child.kill().expect("it is running");
        })
        .await;
        let mut stopped = start_server();
        loss(
            &stopped.address,
            "noticing a stopped server (bound 2 s)",
            || {
                kill_process(Pid::from_child(&stopped.child), Signal::STOP).expect("it is running");
            },
        )
        .await;
        stopped.child.kill().expect("it is stopped");
        stopped.child.wait().expect("it was killed");
    });
    server.child.wait().expect("it was killed");
    tcp_ping_pong();
}

struct ServerProcess {
    child: Child,
    address: String,
}

fn start_server() -> ServerProcess {
    let mut child = Command::new(std::env::current_exe().expect("this program has a path"))
        .arg("serve")
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program can be started again");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("it is piped"))
        .read_line(&mut line)
        .expect("the server says its address");
    ServerProcess {
        child,
        address: line.trim_end().to_owned(),
    }
}

async fn serve() {
    let server = RpcServer::bind(RpcServer::LOOPBACK, RpcServerConfig::default())
        .await
        .expect("loopback has free ports");
    server.handle(
        "echo",
        unary_fn(|_context, payload| async move { Ok(payload) }),
    );
    server.handle(
        "stream",
        handler_fn(|_context, request: Bytes| async move {
            let text = String::from_utf8_lossy(&request);
            let (count, bytes) = text.split_once(' ').expect("two numbers");
            let count: usize = count.parse().expect("a number");
            let message = Bytes::from(vec![7; bytes.parse().expect("a number")]);
            Ok(stream::repeat_with(move || Ok(message.clone()))
                .take(count)
                .boxed())
        }),
    );
    let dropped = Arc::new(watch::Sender::new(0u64));
    let counter = Arc::clone(&dropped);
    server.handle(
        "hold",
        handler_fn(move |_context, _request| {
            let guard = CountsDrop(Arc::clone(&counter));
            async move {
                let held = stream::pending().map(move |item| {
                    let _held = &guard;
                    item
                });
                Ok(stream::iter([Ok(Bytes::new())]).chain(held).boxed())
            }
        }),
    );
    server.handle(
        "next_drop",
        handler_fn(move |_context, _request| {
            let mut seen = dropped.subscribe();
            async move {
                let waits = stream::once(async move {
                    let _changed = seen.changed().await;
                    Ok(Bytes::new())
                });
                Ok(stream::iter([Ok(Bytes::new())]).chain(waits).boxed())
            }
        }),
    );
    println!("{}", server.local_addr());
    std::future::pending::<()>().await;
}

fn options() -> CallOptions {
    CallOptions::new(Duration::from_secs(60))
}

async fn measure(address: &str) {
    let client = RpcClient::new(RpcClientConfig::default());
    let payload = Bytes::from(vec![1; PAYLOAD_BYTES]);
    let echo = || client.call_unary(address, "echo", payload.clone(), options());
    for _ in 0..2000 {
        echo().await.expect("the server is up");
    }
    let mut times = Vec::new();
    for _ in 0..20_000 {
        let start = Instant::now();
        echo().await.expect("the server is up");
        times.push(start.elapsed());
    }
    latency("unary round trip, 64 B", &mut times);

    let start = Instant::now();
    let per_task = 2000;
    let tasks = (0..64).map(|_| async {
        for _ in 0..per_task {
            echo().await.expect("the server is up");
        }
    });
    join_all(tasks).await;
    rate(
        "unary calls, 64 at a time",
        64 * per_task,
        start.elapsed(),
        "calls/s",
    );

    for (streams, count, bytes) in [(1, 1_000_000, 64), (64, 20_000, 64), (1, 2_000, 1 << 20)] {
        let start = Instant::now();
        let tasks = (0..streams).map(|_| async {
            let request = Bytes::from(format!("{count} {bytes}"));
            let responses = client
                .call(address, "stream", request, options())
                .await
                .expect("the server is up");
            let received = responses
                .fold(0usize, |received, message| async move {
                    received + message.expect("the server is up").len()
                })
                .await;
            assert_eq!(received, count * bytes);
        });
        join_all(tasks).await;
        let took = start.elapsed();
        let name = format!("streamed messages, {bytes} B, {streams} streams");
        rate(&name, streams * count, took, "messages/s");
        if bytes >= 1 << 20 {
            let gigabytes = (streams * count * bytes) as f64 / 1e9;
            println!("{:<44} {:>12.2} GB/s", "", gigabytes / took.as_secs_f64());
        }
    }
}

/// Time from dropping the responses to the answer that tells of the handler's drop.
async fn cancellation(address: &str) {
    let client = RpcClient::new(RpcClientConfig::default());
    let call = async |endpoint| {
        let mut responses = client
            .call(address, endpoint, Bytes::new(), options())
            .await
            .expect("the server is up");
        let first = responses.next().await.expect("it sends one");
        first.expect("the server is up");
        responses
    };
    let mut times = Vec::new();
    for _ in 0..1000 {
        let held = call("hold").await;
        let mut next_drop = call("next_drop").await;
        let start = Instant::now();
        drop(held);
        let told = next_drop.next().await.expect("the handler is dropped");
        told.expect("the server is up");
        times.push(start.elapsed());
    }
    latency("cancel and answer of its effect", &mut times);
}

/// Time from `strike` to the error of an open call.
async fn loss(address: &str, name: &str, strike: impl FnOnce()) {
    let client = RpcClient::new(RpcClientConfig::default());
    let mut held = client
        .call(address, "hold", Bytes::new(), options())
        .await
        .expect("the server is up");
    let first = held.next().await.expect("it sends one");
    first.expect("the server is up");
    let start = Instant::now();
    strike();
    let lost = held.next().await.expect("an error ends it");
    assert!(matches!(lost, Err(RpcError::PeerLost { .. })));
    println!(
        "{name:<44} {:>12.1} ms",
        start.elapsed().as_secs_f64() * 1e3
    );
}

struct CountsDrop(Arc<watch::Sender<u64>>);

impl Drop for CountsDrop {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n += 1);
    }
}

fn tcp_ping_pong() {
    let listener = TcpListener::bind(RpcServer::LOOPBACK).expect("loopback has free ports");
    let address = listener.local_addr().expect("it is bound");
    std::thread::spawn(move || {
        let (mut stream, _peer) = listener.accept().expect("the other thread connects");
        stream.set_nodelay(true).expect("it is a TCP socket");
        let mut buffer = [0; PAYLOAD_BYTES];
        while stream.read_exact(&mut buffer).is_ok() {
            stream.write_all(&buffer).expect("the other thread reads");
        }
    });
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_nodelay(true).expect("it is a TCP socket");
    let mut buffer = [0; PAYLOAD_BYTES];
    let mut times = Vec::new();
    for _ in 0..20_000 {
        let start = Instant::now();
        stream.write_all(&buffer).expect("the other thread reads");
        stream
            .read_exact(&mut buffer)
            .expect("the other thread writes");
        times.push(start.elapsed());
    }
    latency("bound: plain TCP ping-pong, 64 B", &mut times);
}

fn latency(name: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e6;
    println!("{name:<44} p50 {:>7.1} us  p99 {:>7.1} us", at(50), at(99));
}

fn rate(name: &str, count: usize, took: Duration, unit: &str) {
    println!(
        "{name:<44} {:>12.0} {unit}",
        count as f64 / took.as_secs_f64()
    );
}
