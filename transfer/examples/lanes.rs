//! Measures the lanes between two processes of this machine: `cargo run --release -p
//! blockplane-transfer --example lanes`. The other process is this program again.

#![expect(clippy::print_stdout, reason = "its output is its purpose")]
#![expect(clippy::unwrap_used, reason = "a measurement that fails ends")]

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockLayout, Lane, LocalBlocks, Metadata, Op, Peer,
    PostOptions, RegionId, Registration, RemoteAccess, RemoteBlocks,
};

const ARENA: u64 = 512 << 20;
const WAIT: Duration = Duration::from_secs(60);

fn main() {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("--other") => other(arguments.next().as_deref()),
        only => {
            for (lane, host) in [
                (Lane::Loopback, false),
                (Lane::Shm, false),
                (Lane::Shm, true),
                (Lane::Tcp, false),
            ] {
                let name = name(lane, host);
                if only.is_none_or(|only| only == name) {
                    measure(lane, host);
                }
            }
        }
    }
}

/// How a case is called: `host` is memory that is not an arena.
fn name(lane: Lane, host: bool) -> String {
    format!("{lane}{}", if host { "-host" } else { "" })
}

/// The target: an arena, and an echo of every notification.
fn other(lane: Option<&str>) {
    let host = lane == Some("shm-host");
    let lane = if host || lane == Some("shm") {
        Lane::Shm
    } else {
        Lane::Tcp
    };
    let agent = Agent::new(AgentConfig::new("other").with_lanes([lane])).unwrap();
    let bytes = usize::try_from(ARENA).unwrap();
    let region = if host {
        agent.register(vec![0; bytes], RemoteAccess::Open).unwrap()
    } else {
        agent.allocate(ArenaConfig::new(bytes, "target")).unwrap()
    };
    touch(&region);
    print_blob(&agent);
    let mut blob = String::new();
    std::io::stdin().lock().read_line(&mut blob).unwrap();
    let back = agent.connect(&read_blob(&blob), WAIT).unwrap();
    let notifications = agent.notifications();
    std::thread::spawn(move || {
        let mut end = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut end);
        std::process::abort();
    });
    while let Ok(got) = notifications.recv_timeout(Duration::from_secs(600)) {
        agent.notify(&back, got.payload, WAIT).unwrap().detach();
    }
}

fn measure(lane: Lane, host: bool) {
    let name = name(lane, host);
    let agent = Agent::new(AgentConfig::new("me").with_lanes([lane])).unwrap();
    let local = agent
        .allocate(ArenaConfig::new(usize::try_from(ARENA).unwrap(), "source"))
        .unwrap();
    touch(&local);
    let mut child = None;
    let (metadata, keep) = if lane == Lane::Loopback {
        let region = agent
            .allocate(ArenaConfig::new(usize::try_from(ARENA).unwrap(), "target"))
            .unwrap();
        touch(&region);
        let mut metadata = agent.metadata().regions().to_vec();
        metadata.retain(|known| known.id == region.id());
        (agent.metadata(), Some((region, metadata)))
    } else {
        let mut other = Command::new(std::env::current_exe().unwrap())
            .args(["--other", &name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(other.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let blob: String = agent
            .metadata()
            .to_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        writeln!(other.stdin.as_mut().unwrap(), "{blob}").unwrap();
        child = Some(other);
        (read_blob(&line), None)
    };
    let started = Instant::now();
    let peer = agent.connect(&metadata, WAIT).unwrap();
    println!(
        "{name}: connect {:.0} us; {}",
        micros(started),
        peer.lane().reason
    );
    let region = keep
        .as_ref()
        .map_or_else(|| metadata.regions()[0].id, |(region, _)| region.id());
    for op in [Op::Write, Op::Read] {
        for (block, count) in [
            (4 << 10, 1u32),
            (4 << 10, 128),
            (16 << 10, 128),
            (16 << 10, 1024),
            (64 << 10, 1),
            (64 << 10, 128),
            (256 << 10, 128),
            (1 << 20, 1),
            (1 << 20, 16),
            (1 << 20, 128),
        ] {
            let blocks = u32::try_from(ARENA / block).unwrap();
            let layout = BlockLayout::contiguous(blocks, block);
            let prepared = agent
                .prepare(
                    op,
                    LocalBlocks {
                        registration: &local,
                        layout,
                        ids: scattered(blocks, count, 1).into(),
                        layers: 0..1,
                    },
                    RemoteBlocks {
                        peer: &peer,
                        region,
                        layout,
                        ids: scattered(blocks, count, 2).into(),
                        layers: 0..1,
                        window: None,
                    },
                )
                .unwrap();
            let post = || prepared.post(PostOptions::within(WAIT)).unwrap();
            for _ in 0..3 {
                post().wait(WAIT).unwrap();
            }
            let (mut waits, mut posts) = (Vec::new(), Vec::new());
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(400) && waits.len() < 4000 {
                let started = Instant::now();
                let transfer = post();
                posts.push(micros(started));
                transfer.wait(WAIT).unwrap();
                waits.push(micros(started));
            }
            let (median, post) = (median(&mut waits), median(&mut posts));
            let bytes = f64::from(count) * f64::from(u32::try_from(block).unwrap());
            println!(
                "{name} {op:?} {:>4} KiB x {count:<4} {:>7.2} GB/s  p50 {median:>8.1} us  post {post:>5.1} us",
                block >> 10,
                bytes / median / 1e3,
            );
        }
    }
    if child.is_some() {
        let (local, remote) = ((&local, region), &peer);
        notifications(&agent, lane, local, remote);
    }
    if let Some(mut other) = child {
        drop(other.stdin.take());
        other.wait().unwrap();
    }
}

/// Half of a round trip, with and without bytes before the first half.
fn notifications(
    agent: &Agent,
    lane: Lane,
    (local, region): (&Registration, RegionId),
    peer: &Peer,
) {
    let layout = BlockLayout::contiguous(8, 4096);
    let prepared = agent
        .prepare(
            Op::Write,
            LocalBlocks {
                registration: local,
                layout,
                ids: (0..1).into(),
                layers: 0..1,
            },
            RemoteBlocks {
                peer,
                region,
                layout,
                ids: (0..1).into(),
                layers: 0..1,
                window: None,
            },
        )
        .unwrap();
    let received = agent.notifications();
    for (what, bytes) in [("notification", false), ("4 KiB and notification", true)] {
        for pause in [Duration::ZERO, Duration::from_millis(2)] {
            let mut trips = Vec::new();
            for _ in 0..300 {
                let until = Instant::now() + pause;
                while Instant::now() < until {
                    std::thread::park_timeout(until - Instant::now());
                }
                let started = Instant::now();
                if bytes {
                    let options = PostOptions::within(WAIT).notify("ping");
                    prepared.post(options).unwrap().detach();
                } else {
                    agent.notify(peer, "ping", WAIT).unwrap().detach();
                }
                received.recv_timeout(WAIT).unwrap();
                trips.push(micros(started) / 2.0);
            }
            println!(
                "{lane} {what}, one way, {pause:?} apart: p50 {:.1} us",
                median(&mut trips)
            );
        }
    }
}

fn touch(region: &Registration) {
    let chunk = vec![1; 1 << 20];
    for at in (0..ARENA).step_by(1 << 20) {
        region.write_at(at, &chunk).unwrap();
    }
}

fn print_blob(agent: &Agent) {
    let hex: String = agent
        .metadata()
        .to_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    println!("{hex}");
}

fn read_blob(hex: &str) -> Metadata {
    let hex = hex.trim();
    let blob: Vec<u8> = (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect();
    Metadata::from_bytes(&blob).unwrap()
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn scattered(of: u32, count: u32, seed: u64) -> Arc<[u32]> {
    let mut ids: Vec<u32> = (0..of).collect();
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    for i in (1..ids.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let bound = u64::try_from(i + 1).unwrap();
        ids.swap(i, usize::try_from((state >> 33) % bound).unwrap());
    }
    ids.truncate(usize::try_from(count).unwrap());
    ids.into()
}
