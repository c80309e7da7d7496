//! Ten thousand of everything, and not a descriptor, mapping, thread or byte more than before, in
//! either process.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed unwrap is a failed test, and sizes here are small"
)]

mod count;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockLayout, Lane, LocalBlocks, Metadata, Op, Peer,
    PostOptions, RegionId, Registration, RemoteAccess, RemoteBlocks, WindowAccess, WindowId,
    WindowScope,
};

use count::Held;

const WAIT: Duration = Duration::from_secs(20);
const ROUNDS: usize = 10_000;
/// Rounds before anything is counted: tables and pools get their size.
const WARM_UP: usize = 1_000;
const BLOCK: u64 = 4096;

/// What is counted is counted for the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn config(name: &str, lane: Lane) -> AgentConfig {
    let mut config = AgentConfig::new(name).with_lanes([lane]);
    // What a connection leaves to a timer is gone soon after it.
    config.connect_timeout = Duration::from_secs(1);
    config.peer_loss_timeout = Duration::from_secs(10);
    config.tcp_streams = 1;
    config
}

/// A process with one agent, an arena that needs a window, and a window that stays open.
struct Target {
    child: Child,
    stdin: ChildStdin,
    lines: BufReader<ChildStdout>,
    metadata: Metadata,
    region: RegionId,
    window: WindowId,
}

impl Target {
    fn start(lane: Lane) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "target_process", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        writeln!(stdin, "{lane}").unwrap();
        let blob = line(&mut lines, "metadata ");
        let blob: Vec<u8> = blob.split(' ').map(|byte| byte.parse().unwrap()).collect();
        let window = WindowId(line(&mut lines, "window ").parse().unwrap());
        let metadata = Metadata::from_bytes(&blob).unwrap();
        let region = metadata.regions()[0].id;
        Self {
            child,
            stdin,
            lines,
            metadata,
            region,
            window,
        }
    }

    fn held(&mut self) -> Held {
        writeln!(self.stdin, "held").unwrap();
        Held::parse(&line(&mut self.lines, "held "))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn line(lines: &mut impl BufRead, prefix: &str) -> String {
    loop {
        let mut line = String::new();
        let read = lines.read_line(&mut line).unwrap();
        assert!(read > 0, "the other process ended");
        if let Some((_, rest)) = line.split_once(prefix) {
            return rest.trim().to_owned();
        }
    }
}

/// Not a test: the target of the connections.
#[test]
#[ignore = "started by the other tests"]
fn target_process() {
    let mut input = std::io::stdin().lock();
    let lane = match line(&mut input, "").as_str() {
        "shm" => Lane::Shm,
        _ => Lane::Tcp,
    };
    let agent = Agent::new(config("target", lane)).unwrap();
    let arena = ArenaConfig::new(BLOCK as usize, "served").with_access(RemoteAccess::WindowOnly);
    let region = agent.allocate(arena).unwrap();
    let window = agent
        .open_window(&region, WindowScope::Region, WindowAccess::ReadWrite)
        .unwrap();
    let say = |what: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{what}").and_then(|()| out.flush()).unwrap();
    };
    let blob = agent.metadata().to_bytes();
    let blob: Vec<String> = blob.iter().map(u8::to_string).collect();
    say(format!("metadata {}", blob.join(" ")));
    say(format!("window {}", window.id()));
    let notes = agent.notifications();
    std::thread::scope(|scope| {
        let emptied = notes.clone();
        scope.spawn(move || while emptied.recv_timeout(WAIT * 1000).is_ok() {});
        let mut command = String::new();
        while input.read_line(&mut command).unwrap() > 0 {
            say(format!("held {}", Held::now()));
            command.clear();
        }
        drop((window, region));
        drop(agent);
    });
}

/// Runs `round` so often that a leak shows, and compares. What a thread of the agent still has to
/// do after the last round is waited for.
fn repeat(mut target: Option<&mut Target>, mut round: impl FnMut(usize)) {
    (0..WARM_UP).for_each(&mut round);
    settle();
    let before = (Held::now(), target.as_mut().map(|target| target.held()));
    (0..ROUNDS).for_each(&mut round);
    let started = Instant::now();
    loop {
        settle();
        let here = Held::now();
        let there = target.as_mut().map(|target| target.held());
        let same = here.is_back_to(&before.0)
            && there
                .iter()
                .zip(&before.1)
                .all(|(now, before)| now.is_back_to(before));
        if same {
            return;
        }
        assert!(
            started.elapsed() < WAIT,
            "before {before:?}\nafter ({here:?}, {there:?})"
        );
    }
}

/// Timers of connections run out meanwhile; a channel that nobody sends on waits without spinning.
fn settle() {
    let (_sender, never) = std::sync::mpsc::channel::<()>();
    let _ = never.recv_timeout(Duration::from_millis(1200));
}

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One WRITE of a block, with a notification.
fn write(agent: &Agent, local: &Registration, peer: &Peer, region: RegionId, window: WindowId) {
    let layout = BlockLayout::contiguous(1, BLOCK);
    let local = LocalBlocks {
        registration: local,
        layout,
        ids: [0].into(),
        layers: 0..1,
    };
    let remote = RemoteBlocks {
        peer,
        region,
        layout,
        ids: [0].into(),
        layers: 0..1,
        window: Some(window),
    };
    agent
        .prepare(Op::Write, local, remote)
        .unwrap()
        .post(PostOptions::within(WAIT).notify("x"))
        .unwrap()
        .wait(WAIT)
        .unwrap();
}

/// Connect, find the region and the window, write, notify, disconnect.
fn connections(lane: Lane) {
    let _alone = alone();
    let mut target = Target::start(lane);
    let agent = Agent::new(config("initiator", lane)).unwrap();
    let local = agent
        .allocate(ArenaConfig::new(BLOCK as usize, "own"))
        .unwrap();
    let (metadata, region, window) = (target.metadata.clone(), target.region, target.window);
    repeat(Some(&mut target), |_| {
        let peer = agent.connect(&metadata, WAIT).unwrap();
        write(&agent, &local, &peer, region, window);
        peer.disconnect();
    });
    assert_eq!(agent.stats().in_flight, 0);
}

#[test]
fn connections_shm() {
    connections(Lane::Shm);
}

#[test]
fn connections_tcp() {
    connections(Lane::Tcp);
}

/// Memory, windows and prepared operations come and go while a connection lives.
fn memory(lane: Lane) {
    let _alone = alone();
    let mut target = Target::start(lane);
    let agent = Agent::new(config("initiator", lane)).unwrap();
    let other = Agent::new(config("other", lane)).unwrap();
    let peer = agent.connect(&target.metadata, WAIT).unwrap();
    let here = agent.connect(&other.metadata(), WAIT).unwrap();
    let own = agent
        .allocate(ArenaConfig::new(BLOCK as usize, "own"))
        .unwrap();
    let (region, window) = (target.region, target.window);
    let notes = other.notifications();
    repeat(Some(&mut target), |round| {
        // Memory of this side, towards the other process.
        let local = if round % 2 == 0 {
            agent.allocate(ArenaConfig::new(BLOCK as usize, "temporary"))
        } else {
            agent.register(vec![0; BLOCK as usize], RemoteAccess::None)
        };
        write(&agent, &local.unwrap(), &peer, region, window);
        // Memory and windows of the other side, in this process to be released there.
        let remote = other
            .allocate(ArenaConfig::new(BLOCK as usize, "temporary"))
            .unwrap();
        let access = WindowAccess::Write;
        let window = other
            .open_window(&remote, WindowScope::Region, access)
            .unwrap();
        write(&agent, &own, &here, remote.id(), window.id());
        notes.recv_timeout(WAIT).unwrap();
        if round % 3 == 0 {
            window.close(WAIT).unwrap();
        }
    });
}

#[test]
fn memory_shm() {
    memory(Lane::Shm);
}

#[test]
fn memory_tcp() {
    memory(Lane::Tcp);
}

/// Whole agents, connected to one that stays.
#[test]
fn agents() {
    let _alone = alone();
    let lanes = [Lane::Loopback, Lane::Shm, Lane::Tcp];
    let hubs = lanes.map(|lane| Agent::new(config("hub", lane)).unwrap());
    repeat(None, |round| {
        // A tenth is enough of these: each starts threads.
        if round % 10 != 0 {
            return;
        }
        let lane = round / 10 % lanes.len();
        let hub = &hubs[lane];
        let guest = Agent::new(config("guest", lanes[lane])).unwrap();
        guest
            .allocate(ArenaConfig::new(BLOCK as usize, "own"))
            .unwrap();
        let there = guest.connect(&hub.metadata(), WAIT).unwrap();
        guest.notify(&there, "x", WAIT).unwrap().wait(WAIT).unwrap();
        hub.notifications().recv_timeout(WAIT).unwrap();
        let back = hub.connect(&guest.metadata(), WAIT).unwrap();
        hub.notify(&back, "y", WAIT).unwrap().wait(WAIT).unwrap();
    });
}
