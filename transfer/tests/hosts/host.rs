//! A process on one of the hosts: this executable, started again inside the namespace.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockLayout, Lane, LocalBlocks, Metadata, Op, Peer, PostError,
    PostOptions, RemoteBlocks, TransferError,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::net::{Net, Side};
use crate::{LOSS, WAIT};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 128;

/// Whether a host sees the folder of the Unix sockets of the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Folder {
    Shared,
    Own,
}

pub(crate) struct Host {
    child: Child,
    stdin: ChildStdin,
    lines: BufReader<ChildStdout>,
}

impl Host {
    pub(crate) fn start(net: &Net, side: Side, folder: Folder) -> Self {
        let binary = std::env::current_exe().unwrap();
        let hide = match folder {
            Folder::Shared => "true",
            Folder::Own => "mount -t tmpfs none \"$1\"",
        };
        // `ip netns exec` gives the command a mount namespace of its own.
        let script = format!("{hide} && exec \"$0\" --ignored --exact host_process --nocapture");
        let mut child = Command::new("ip")
            .args(["netns", "exec", &net.namespace(side), "sh", "-c", &script])
            .arg(binary)
            .arg(&net.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            stdin,
            lines,
        }
    }

    pub(crate) fn say(&mut self, what: &str) {
        writeln!(self.stdin, "{what}").unwrap();
    }

    /// The next answer.
    pub(crate) fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            let read = self.lines.read_line(&mut line).unwrap();
            assert!(read > 0, "the host ended");
            if let Some((_, answer)) = line.split_once("> ") {
                return answer.trim().to_owned();
            }
        }
    }

    pub(crate) fn ask(&mut self, what: &str) -> String {
        self.say(what);
        self.hear()
    }

    /// Starts an agent that listens on `bind` and returns its metadata.
    pub(crate) fn agent(&mut self, net: &Net, bind: &str, advertise: &str) -> String {
        let folder = net.folder.display();
        self.ask(&format!("agent {bind} {advertise} {folder}"))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two hosts with an agent each, and the metadata of both.
pub(crate) fn two_agents(net: &Net, folder: Folder) -> ([Host; 2], [String; 2]) {
    let mut hosts = [Side::A, Side::B].map(|side| Host::start(net, side, folder));
    let metadata = [Side::A, Side::B].map(|side| {
        let bind = side.address();
        hosts[side as usize].agent(net, bind, "-")
    });
    (hosts, metadata)
}

/// The body of the process.
pub(crate) fn run() {
    let mut stdin = std::io::stdin().lock();
    let mut agent: Option<Agent> = None;
    let mut connected: Option<(Peer, Metadata)> = None;
    let mut served = Vec::new();
    let mut line = String::new();
    while stdin.read_line(&mut line).unwrap() > 0 {
        let words: Vec<&str> = line.trim().split(' ').collect();
        let answer = match words[..] {
            ["agent", bind, advertise, folder] => {
                let bind: IpAddr = bind.parse().unwrap();
                let mut config = AgentConfig::new(format!("agent {bind}"));
                config.lanes = vec![Lane::Shm, Lane::Tcp];
                config.tcp_bind = SocketAddr::from((bind, 0));
                config.advertise_host = (advertise != "-").then(|| advertise.to_owned());
                config.socket_dir = folder.into();
                config.peer_loss_timeout = LOSS;
                let started = Agent::new(config).unwrap();
                let bytes = BLOCK as usize * BLOCKS as usize;
                served.push(started.allocate(ArenaConfig::new(bytes, "served")).unwrap());
                let blob = started.metadata().to_bytes();
                agent = Some(started);
                hex(&blob)
            }
            ["connect", blob] => {
                let metadata = Metadata::from_bytes(&from_hex(blob)).unwrap();
                match agent.as_ref().unwrap().connect(&metadata, WAIT) {
                    Ok(peer) => {
                        let lane = peer.lane();
                        connected = Some((peer, metadata));
                        format!("{}: {}", lane.lane, lane.reason)
                    }
                    Err(error) => format!("error: {error}"),
                }
            }
            // Fails at once or within a short time: the link is cut.
            ["try", blob] => {
                let metadata = Metadata::from_bytes(&from_hex(blob)).unwrap();
                let tried = agent
                    .as_ref()
                    .unwrap()
                    .connect(&metadata, Duration::from_millis(300));
                tried.map_or_else(
                    |error| format!("error: {error}"),
                    |_| "connected".to_owned(),
                )
            }
            ["move", rounds] => {
                let (peer, metadata) = connected.as_ref().unwrap();
                move_bytes(
                    agent.as_ref().unwrap(),
                    peer,
                    metadata,
                    rounds.parse().unwrap(),
                )
            }
            ["lose", op] => {
                let (peer, metadata) = connected.as_ref().unwrap();
                let op = if op == "write" { Op::Write } else { Op::Read };
                lose(agent.as_ref().unwrap(), peer, metadata, op)
            }
            ["peers"] => agent.as_ref().unwrap().stats().peers.to_string(),
            _ => panic!("unknown: {line:?}"),
        };
        say(&answer);
        line.clear();
    }
}

fn say(what: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "> {what}")
        .and_then(|()| out.flush())
        .unwrap();
}

fn blocks(metadata: &Metadata) -> (BlockLayout, blockplane_transfer::RegionId) {
    (
        BlockLayout::contiguous(BLOCKS, BLOCK),
        metadata.regions()[0].id,
    )
}

/// Writes, reads back and compares, as often as asked.
fn move_bytes(agent: &Agent, peer: &Peer, metadata: &Metadata, rounds: u32) -> String {
    let (layout, region) = blocks(metadata);
    let bytes = BLOCK as usize * BLOCKS as usize;
    let own = agent.allocate(ArenaConfig::new(bytes, "own")).unwrap();
    let back = agent.allocate(ArenaConfig::new(bytes, "back")).unwrap();
    for round in 0..rounds {
        let pattern: Vec<u8> = (0..bytes)
            .map(|at| {
                ((at as u64 + u64::from(round)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
            })
            .collect();
        own.write_at(0, &pattern).unwrap();
        let there: Vec<u32> = (0..BLOCKS).rev().collect();
        for (op, local) in [(Op::Write, &own), (Op::Read, &back)] {
            let local = LocalBlocks {
                registration: local,
                layout,
                ids: (0..BLOCKS).collect::<Vec<u32>>().into(),
                layers: 0..1,
            };
            let remote = RemoteBlocks {
                peer,
                region,
                layout,
                ids: there.clone().into(),
                layers: 0..1,
                window: None,
            };
            let moved = agent
                .prepare(op, local, remote)
                .unwrap()
                .post(PostOptions::within(WAIT).notify("moved"))
                .unwrap()
                .wait(WAIT);
            if let Err(error) = moved {
                return format!("error: {error}");
            }
        }
        let mut got = vec![0; bytes];
        back.read_at(0, &mut got).unwrap();
        if got != pattern {
            return "the bytes differ".to_owned();
        }
    }
    "moved".to_owned()
}

/// Keeps moving until the peer is lost, and says how that was noticed.
fn lose(agent: &Agent, peer: &Peer, metadata: &Metadata, op: Op) -> String {
    let (layout, region) = blocks(metadata);
    let bytes = BLOCK as usize * BLOCKS as usize;
    let own = agent.allocate(ArenaConfig::new(bytes, "own")).unwrap();
    let prepared = {
        let local = LocalBlocks {
            registration: &own,
            layout,
            ids: (0..BLOCKS).collect::<Vec<u32>>().into(),
            layers: 0..1,
        };
        let remote = RemoteBlocks {
            peer,
            region,
            layout,
            ids: (0..BLOCKS).collect::<Vec<u32>>().into(),
            layers: 0..1,
            window: None,
        };
        agent.prepare(op, local, remote).unwrap()
    };
    say("moving");
    let lost = loop {
        match prepared
            .post(PostOptions::within(WAIT * 2))
            .map(|transfer| transfer.wait(WAIT))
        {
            Ok(Ok(())) => {}
            Ok(Err(TransferError::PeerLost(lost))) | Err(PostError::PeerLost(lost)) => break lost,
            other => return format!("error: {other:?}"),
        }
    };
    // What was local is ours again: nothing of the lost connection lands later.
    own.write_at(0, &vec![0x5a; bytes]).unwrap();
    let mut canary = vec![0; bytes];
    own.read_at(0, &mut canary).unwrap();
    if canary.iter().any(|byte| *byte != 0x5a) {
        return "a late byte landed".to_owned();
    }
    format!("lost: {:?}", lost.cause)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}
