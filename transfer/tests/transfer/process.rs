//! Faults between real processes: this binary starts itself again as the peer.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, Lane, LossCause, Metadata, Op, Peer, PostError, PostOptions,
    PrepareError, RegionId, RemoteAccess, TransferError, WindowAccess, WindowId, WindowScope,
};

use crate::support::{Blocks, WAIT, arena, bytes, fill, fill_byte, scattered};

const LOSS: Duration = Duration::from_secs(2);
const BLOCK: u64 = 1 << 16;
const BLOCKS: u32 = 256;

fn config(name: &str, lane: Lane) -> AgentConfig {
    let mut config = AgentConfig::new(name).with_lanes([lane]);
    config.peer_loss_timeout = LOSS;
    if lane == Lane::Verbs {
        config.rdma.device = Some(if name == "me" { "rxe0" } else { "rxe1" }.to_owned());
    }
    config
}

/// The other process: an agent with one open arena of 16 MiB that runs until its standard input closes.
pub(crate) struct Other {
    child: Child,
    stdin: ChildStdin,
    lines: BufReader<std::process::ChildStdout>,
    pub(crate) metadata: Metadata,
    pub(crate) region: RegionId,
}

impl Other {
    pub(crate) fn start(lane: Lane) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "--ignored",
                "--exact",
                "process::other_process",
                "--nocapture",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            // A group of its own: signals to this test's group do not reach it.
            .process_group(0);
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        writeln!(stdin, "lane {lane}").unwrap();
        let hex = line(&mut lines, "metadata ");
        let blob: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect();
        let metadata = Metadata::from_bytes(&blob).unwrap();
        let region = metadata.regions()[0].id;
        Self {
            child,
            stdin,
            lines,
            metadata,
            region,
        }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.stdin, "{what}").unwrap();
    }

    fn hear(&mut self, prefix: &str) -> String {
        line(&mut self.lines, prefix)
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The rest of the next line that starts with `prefix`; the test harness prints others.
fn line(lines: &mut impl BufRead, prefix: &str) -> String {
    loop {
        let mut line = String::new();
        assert!(
            lines.read_line(&mut line).unwrap() > 0,
            "the other process ended"
        );
        if let Some((_, rest)) = line.split_once(prefix) {
            return rest.trim().to_owned();
        }
    }
}

/// Not a test: the other process. Commands come on standard input.
#[test]
#[ignore = "started by the tests of this file"]
fn other_process() {
    let stdin = std::io::stdin();
    let mut lines = stdin.lock();
    let lane = match line(&mut lines, "lane ").as_str() {
        "shm" => Lane::Shm,
        "verbs" => Lane::Verbs,
        _ => Lane::Tcp,
    };
    let agent = Agent::new(config("other", lane)).unwrap();
    let region = arena(&agent, BLOCK * u64::from(BLOCKS));
    let hex: String = agent
        .metadata()
        .to_bytes()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    say(&format!("metadata {hex}"));
    let mut command = String::new();
    while lines.read_line(&mut command).unwrap() > 0 {
        match command.trim().split_once(' ') {
            Some(("sum", _)) => {
                let sum: u64 = bytes(&region).iter().map(|b| u64::from(*b)).sum();
                say(&format!("sum {sum}"));
            }
            // Connect back and keep writing through a window until told otherwise.
            Some(("write", rest)) => write_for_ever(&agent, rest),
            _ => {}
        }
        command.clear();
    }
}

/// Tells the test that started this process.
fn say(what: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{what}").and_then(|()| out.flush()).unwrap();
}

fn write_for_ever(agent: &Agent, rest: &str) {
    let words: Vec<&str> = rest.split(' ').collect();
    let blob: Vec<u8> = (0..words[0].len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&words[0][at..at + 2], 16).unwrap())
        .collect();
    let metadata = Metadata::from_bytes(&blob).unwrap();
    let window = WindowId(words[1].parse().unwrap());
    let local = arena(agent, BLOCK * u64::from(BLOCKS));
    fill_byte(&local, 0xee);
    let peer = agent.connect(&metadata, WAIT).unwrap();
    let side = Blocks {
        ids: scattered(BLOCKS, BLOCKS, 5),
        ..Blocks::flat(BLOCKS, BLOCK, &[])
    };
    let prepared = agent
        .prepare(
            Op::Write,
            side.local(&local),
            side.remote(&peer, metadata.regions()[0].id, Some(window)),
        )
        .unwrap();
    say("writing now");
    while let Ok(transfer) = prepared.post(PostOptions::within(WAIT)) {
        if transfer.wait(WAIT).is_err() {
            break;
        }
    }
    say("stopped now");
}

/// Keeps posting until the peer is lost; returns how, and how long the slowest call took.
fn post_until_lost(
    prepared: &blockplane_transfer::Prepared,
    agent: &Agent,
    peer: &Peer,
) -> LossCause {
    loop {
        // The copy lane alone never meets the peer: the notification does.
        let lost = match prepared.post(PostOptions::within(WAIT).notify("x")) {
            Ok(transfer) => match transfer.wait(WAIT) {
                Ok(()) => continue,
                // The peer does not empty its queue, or has just died with an answer on the way.
                Err(TransferError::Rejected(_)) => continue,
                Err(TransferError::PeerLost(lost)) => lost,
                Err(error) => panic!("{error}"),
            },
            Err(PostError::PeerLost(lost)) => lost,
            Err(error) => panic!("{error}"),
        };
        assert!(!peer.is_connected());
        assert!(matches!(
            agent.notify(peer, "x", WAIT),
            Err(PostError::PeerLost(_))
        ));
        return lost.cause;
    }
}

fn killed(lane: Lane) {
    let agent = Agent::new(config("me", lane)).unwrap();
    kill_and_lose(&agent, lane);
}

/// Connects to a process, kills it, and sees everything end.
fn kill_and_lose(agent: &Agent, lane: Lane) {
    let local = arena(agent, BLOCK * u64::from(BLOCKS));
    fill(&local, 1);
    let side = Blocks {
        ids: scattered(BLOCKS, BLOCKS, 1),
        ..Blocks::flat(BLOCKS, BLOCK, &[])
    };
    let other = Other::start(lane);
    let peer = agent.connect(&other.metadata, WAIT).unwrap();
    let prepare = |op| {
        agent
            .prepare(
                op,
                side.local(&local),
                side.remote(&peer, other.region, None),
            )
            .unwrap()
    };
    for op in [Op::Read, Op::Write] {
        prepare(op)
            .post(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
    }
    let prepared = prepare(Op::Write);
    other.signal(rustix::process::Signal::KILL);
    let cause = post_until_lost(&prepared, agent, &peer);
    assert!(
        matches!(
            cause,
            LossCause::Closed | LossCause::Broken(_) | LossCause::ProcessExited
        ) || lane == Lane::Verbs && matches!(cause, LossCause::Rdma { .. }),
        "{cause}"
    );
}

#[test]
fn no_descriptor_leaks_when_peers_die() {
    // In a process of its own: other tests of this binary open descriptors as well.
    let status = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "process::descriptors_alone",
            "--nocapture",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

/// The body of the test above.
#[test]
#[ignore = "started by no_descriptor_leaks_when_peers_die"]
fn descriptors_alone() {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/self/{what}"))
            .unwrap()
            .count()
    };
    let shrinks_to = |what: &str, before: usize, when: &str| {
        let started = Instant::now();
        while count(what) > before {
            assert!(
                started.elapsed() < WAIT,
                "{when}: {what} {before} -> {}",
                count(what)
            );
            std::thread::yield_now();
        }
    };
    for lane in [Lane::Shm, Lane::Tcp] {
        let (threads, descriptors) = (count("task"), count("fd"));
        let agent = Agent::new(config("me", lane)).unwrap();
        let with_agent = count("fd");
        for round in 0..3 {
            kill_and_lose(&agent, lane);
            shrinks_to("fd", with_agent, &format!("{lane} round {round}"));
        }
        drop(agent);
        shrinks_to("task", threads, "agent dropped");
        shrinks_to("fd", descriptors, "agent dropped");
    }
}

fn stopped(lane: Lane) {
    let agent = Agent::new(config("me", lane)).unwrap();
    let local = arena(&agent, BLOCK * u64::from(BLOCKS));
    let side = Blocks {
        ids: scattered(BLOCKS, BLOCKS, 1),
        ..Blocks::flat(BLOCKS, BLOCK, &[])
    };
    let other = Other::start(lane);
    let peer = agent.connect(&other.metadata, WAIT).unwrap();
    let prepare = |op| {
        agent
            .prepare(
                op,
                side.local(&local),
                side.remote(&peer, other.region, None),
            )
            .unwrap()
    };
    let (write, read) = (prepare(Op::Write), prepare(Op::Read));
    write
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    other.signal(rustix::process::Signal::STOP);
    // A READ that is cancelled is quiet at once, stopped peer or not.
    let reading = read.post(PostOptions::within(WAIT)).unwrap();
    reading.cancel();
    fill_byte(&local, 0x77);
    let cause = post_until_lost(&write, &agent, &peer);
    assert!(
        matches!(cause, LossCause::Silent(silent) if silent <= LOSS * 2),
        "{cause}"
    );
    assert!(
        bytes(&local).iter().all(|b| *b == 0x77),
        "a late byte landed"
    );
    other.signal(rustix::process::Signal::CONT);
    // It lives again, in the same epoch: a new connection works.
    let again = agent.connect(&other.metadata, WAIT).unwrap();
    agent
        .notify(&again, "again", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap();
}

/// Somebody waits for an answer of a stopped process when the connection ends.
fn a_question_ends_with_the_connection(lane: Lane) {
    let mut config = config("me", lane);
    config.peer_loss_timeout = Duration::from_secs(60);
    config.connect_timeout = Duration::from_secs(60);
    let agent = Agent::new(config).unwrap();
    let local = arena(&agent, BLOCK);
    let other = Other::start(lane);
    let peer = agent.connect(&other.metadata, WAIT).unwrap();
    other.signal(rustix::process::Signal::STOP);
    let side = Blocks::flat(1, BLOCK, &[0]);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let remote = side.remote(&peer, other.region, Some(WindowId(1)));
            agent
                .prepare(Op::Write, side.local(&local), remote)
                .map(|_| ())
        });
        // Whether the question is asked before or after makes no difference.
        peer.disconnect();
        let started = Instant::now();
        let answer = asking.join().unwrap();
        assert!(
            started.elapsed() < WAIT,
            "it waits although nobody can answer"
        );
        match answer {
            Err(PrepareError::PeerLost(lost)) => assert_eq!(lost.cause, LossCause::Disconnected),
            other => panic!("{other:?}"),
        }
    });
}

/// A WRITE is called off, and the connection ends before the stopped peer has said that it places
/// no more bytes. What is in its sockets lands when it goes on: nobody may be told that it is quiet.
#[test]
fn called_off_and_lost_is_lost() {
    let lane = Lane::Tcp;
    let mut config = config("me", lane);
    config.peer_loss_timeout = Duration::from_secs(60);
    let agent = Agent::new(config).unwrap();
    let local = arena(&agent, BLOCK * u64::from(BLOCKS));
    let side = Blocks {
        ids: scattered(BLOCKS, BLOCKS, 1),
        ..Blocks::flat(BLOCKS, BLOCK, &[])
    };
    for late in [false, true] {
        let other = Other::start(lane);
        let peer = agent.connect(&other.metadata, WAIT).unwrap();
        let remote = side.remote(&peer, other.region, None);
        let prepared = agent
            .prepare(Op::Write, side.local(&local), remote)
            .unwrap();
        other.signal(rustix::process::Signal::STOP);
        let deadline = if late {
            Duration::from_millis(20)
        } else {
            WAIT * 2
        };
        let transfer = prepared.post(PostOptions::within(deadline)).unwrap();
        if late {
            // More than the sockets take: it cannot end before the connection does.
            let waiting = transfer.wait(deadline * 3);
            assert!(
                matches!(waiting, Err(TransferError::StillInFlight { .. })),
                "{waiting:?}"
            );
        } else {
            transfer.request_cancel();
        }
        peer.disconnect();
        match transfer.wait(WAIT) {
            Err(TransferError::PeerLost(lost)) => assert_eq!(lost.cause, LossCause::Disconnected),
            other => panic!("{other:?}"),
        }
    }
}

/// The target's side: the process that writes into its window is stopped, then killed.
fn writer_stopped_and_killed(lane: Lane) {
    let agent = Agent::new(config("me", lane)).unwrap();
    let size = BLOCK * u64::from(BLOCKS);
    let config = ArenaConfig::new(size as usize, "target").with_access(RemoteAccess::WindowOnly);
    let region = agent.allocate(config).unwrap();
    let window = agent
        .open_window(&region, WindowScope::Region, WindowAccess::Write)
        .unwrap();
    let mut other = Other::start(lane);
    let hex: String = agent
        .metadata()
        .to_bytes()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    other.tell(&format!("write {hex} {}", window.id()));
    other.hear("writing");
    other.signal(rustix::process::Signal::STOP);
    let window = match (lane, window.close(LOSS)) {
        // The receiver places the bytes itself: closing does not need the writer.
        (Lane::Tcp, Ok(())) => None,
        // It may be in the middle of a copy: its blocks stay out of use.
        (Lane::Shm, Err(busy)) => Some(busy.window),
        // It may have been stopped between two copies and have answered before.
        (Lane::Shm, Ok(())) => None,
        // Its device goes on writing while it is stopped, until it has been silent for so long that we
        // shut it out. Its process need not end for that.
        (Lane::Verbs, Ok(())) => None,
        (Lane::Verbs, Err(busy)) => {
            busy.window.close(WAIT).unwrap();
            fill_byte(&region, 0x44);
            agent.notifications().recv_timeout(LOSS / 4).unwrap_err();
            assert!(
                bytes(&region).iter().all(|b| *b == 0x44),
                "a stopped process writes"
            );
            None
        }
        (lane, other) => panic!("{lane}: {other:?}"),
    };
    other.signal(rustix::process::Signal::KILL);
    if let Some(window) = window {
        window.close(WAIT).unwrap();
    }
    fill_byte(&region, 0x44);
    assert!(
        bytes(&region).iter().all(|b| *b == 0x44),
        "a dead process writes"
    );
}

/// A window closes while another process writes through it as fast as it can.
fn closed_under_a_writer(lane: Lane) {
    let agent = Agent::new(config("me", lane)).unwrap();
    let size = BLOCK * u64::from(BLOCKS);
    let config = ArenaConfig::new(size as usize, "target").with_access(RemoteAccess::WindowOnly);
    let region = agent.allocate(config).unwrap();
    let mut other = Other::start(lane);
    let hex: String = agent
        .metadata()
        .to_bytes()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    for _ in 0..5 {
        let window = agent
            .open_window(&region, WindowScope::Region, WindowAccess::Write)
            .unwrap();
        other.tell(&format!("write {hex} {}", window.id()));
        other.hear("writing");
        window.close(WAIT).unwrap();
        fill_byte(&region, 0x55);
        other.hear("stopped");
        assert!(
            bytes(&region).iter().all(|b| *b == 0x55),
            "a byte landed behind the window"
        );
    }
    other.tell("sum now");
    other.hear("sum");
}

macro_rules! processes {
    ($($name:ident),* $(,)?) => {
        mod shm {
            $(#[test] fn $name() { super::$name(super::Lane::Shm); })*
        }
        mod tcp {
            $(#[test] fn $name() { super::$name(super::Lane::Tcp); })*
        }
        mod verbs { $(
            #[test]
            #[ignore = "needs two RDMA devices: tests/run rdma"]
            fn $name() { super::$name(super::Lane::Verbs); }
        )* }
    };
}

processes! {
    killed,
    stopped,
    a_question_ends_with_the_connection,
    writer_stopped_and_killed,
    closed_under_a_writer,
}
