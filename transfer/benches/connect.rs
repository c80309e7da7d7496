//! What meeting a peer costs: `cargo bench -p blockplane-transfer --bench connect`.
//!
//! Both agents live in this process and talk through their sockets: asking for metadata, and
//! connecting, which includes the first answer of the peer.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints its result and stops at the first failure"
)]

use std::time::{Duration, Instant};

use blockplane_transfer::{Agent, AgentConfig, ArenaConfig, ConnectOptions, Lane};

const ROUNDS: usize = 200;
const WAIT: Duration = Duration::from_secs(10);

fn main() {
    let a = Agent::new(AgentConfig::new("a")).unwrap();
    let b = Agent::new(AgentConfig::new("b")).unwrap();
    let _arena = b.allocate(ArenaConfig::new(1 << 20, "kv")).unwrap();
    let metadata = b.metadata();
    let tcp = metadata.tcp_address().unwrap();
    let socket = metadata.unix_socket().unwrap();

    report("metadata over tcp", || {
        a.fetch_metadata(tcp, WAIT).unwrap();
    });
    report("metadata over the Unix socket", || {
        a.fetch_metadata(socket, WAIT).unwrap();
    });
    for lane in [Lane::Loopback, Lane::Shm, Lane::Tcp] {
        let options = ConnectOptions::within(WAIT).with_lanes([lane]);
        report(&format!("connect, {lane}"), || {
            let peer = a.connect_with(&metadata, &options).unwrap();
            // The next round connects again.
            peer.disconnect();
        });
        report(&format!("connect and first notification, {lane}"), || {
            let peer = a.connect_with(&metadata, &options).unwrap();
            a.notify(&peer, "hello", WAIT).unwrap().wait(WAIT).unwrap();
            b.notifications().recv_timeout(WAIT).unwrap();
            peer.disconnect();
        });
    }
}

fn report(name: &str, mut round: impl FnMut()) {
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        round();
        times.push(start.elapsed());
    }
    times.sort_unstable();
    println!(
        "{name:<45} {:>10.1?} median, {:>10.1?} best, {:>10.1?} worst",
        times[times.len() / 2],
        times[0],
        times[times.len() - 1],
    );
}
