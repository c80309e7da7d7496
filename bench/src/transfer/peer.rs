//! The other side of a transfer: an agent that does what it is told, in another process or in
//! another thread.

use std::{
    io::{self, BufRead, BufReader, Write},
    process::{Child, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, Metadata, Notifications, Peer, RegionId, Registration,
};
use serde::{Deserialize, Serialize};

use super::{case::LaneName, memory};

/// Bound on every answer of the other side and on every transfer.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What the other side is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub(super) enum Command {
    /// Start an agent with one arena; an earlier one goes.
    Start {
        lane: LaneName,
        arena_bytes: usize,
        settings: Settings,
    },
    /// Connect back to the agent with this metadata (hexadecimal).
    Connect { metadata: String },
    /// Fill blocks with a pattern.
    Fill {
        block_bytes: usize,
        ids: Vec<u32>,
        seed: u64,
    },
    /// Clear blocks.
    Clear { block_bytes: usize, ids: Vec<u32> },
    /// Compare blocks with a pattern.
    Verify {
        block_bytes: usize,
        ids: Vec<u32>,
        seed: u64,
    },
    /// Answer this many notifications with one each.
    Echo { count: u32 },
    /// Tell the processor time used so far.
    Cpu,
    /// Stop the agent.
    Stop,
}

/// Settings that both agents share.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) tcp_streams: Option<usize>,
    pub(super) copy_threads: Option<usize>,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub(super) enum Reply {
    Started { metadata: String, region: u64 },
    Done,
    Mismatches { blocks: usize },
    Cpu { nanos: u64 },
    Failed { message: String },
}

/// Commands out, answers in.
#[derive(Debug)]
pub(super) struct Link {
    commands: Commands,
    replies: Receiver<anyhow::Result<Reply>>,
}

#[derive(Debug)]
enum Commands {
    Process(Child),
    Thread(SyncSender<Command>),
}

#[derive(Debug, Default)]
struct Target {
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    agent: Agent,
    arena: Registration,
    notifications: Notifications,
    back: Option<Peer>,
}

impl Link {
    /// Starts this program again as the other side.
    pub(super) fn process() -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("the path of this program is not known")?;
        let mut child = std::process::Command::new(&program)
            .args(["bench", "transfer-peer"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let output = child.stdout.take().context("the child has no output")?;
        let (sender, replies) = sync_channel(1);
        thread::Builder::new()
            .name("bench-replies".to_owned())
            .spawn(move || {
                for line in BufReader::new(output).lines() {
                    let reply = line
                        .map_err(anyhow::Error::from)
                        .and_then(|line| Ok(serde_json::from_str(&line)?));
                    if sender.send(reply).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            commands: Commands::Process(child),
            replies,
        })
    }

    /// Starts a thread of this process as the other side.
    pub(super) fn thread() -> anyhow::Result<Self> {
        let (commands, inbox) = sync_channel::<Command>(1);
        let (sender, replies) = sync_channel(1);
        thread::Builder::new()
            .name("bench-peer".to_owned())
            .spawn(move || {
                let mut target = Target::default();
                for command in inbox {
                    if sender.send(Ok(target.handle(command))).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            commands: Commands::Thread(commands),
            replies,
        })
    }

    /// Sends a command whose answer is taken later by [`Self::answer`].
    pub(super) fn send(&mut self, command: Command) -> anyhow::Result<()> {
        match &mut self.commands {
            Commands::Thread(commands) => commands.send(command).ok().context("the peer is gone"),
            Commands::Process(child) => {
                let input = child.stdin.as_mut().context("the child has no input")?;
                serde_json::to_writer(&mut *input, &command)?;
                input.write_all(b"\n")?;
                input.flush().context("the peer process is gone")
            }
        }
    }

    /// Waits for the answer to the last command.
    pub(super) fn answer(&self) -> anyhow::Result<Reply> {
        match self.replies.recv_timeout(PATIENCE) {
            Ok(Ok(Reply::Failed { message })) => bail!("the peer failed: {message}"),
            Ok(reply) => reply,
            Err(RecvTimeoutError::Timeout) => bail!("no answer from the peer in {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the peer ended"),
        }
    }

    pub(super) fn ask(&mut self, command: Command) -> anyhow::Result<Reply> {
        self.send(command)?;
        self.answer()
    }

    /// A command that is answered by nothing more than that it is done.
    pub(super) fn tell(&mut self, command: Command) -> anyhow::Result<()> {
        match self.ask(command)? {
            Reply::Done => Ok(()),
            other => bail!("unexpected answer {other:?}"),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Commands::Process(child) = &mut self.commands {
            // It ends by itself when its input ends; it has nothing to save if it does not.
            drop(child.stdin.take());
            if !matches!(child.try_wait(), Ok(Some(_))) {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// The main function of the other process: commands on standard input, answers on standard output.
///
/// # Errors
/// When a line is not a command or the output is closed.
pub fn run_peer() -> anyhow::Result<()> {
    let mut target = Target::default();
    let mut out = io::stdout();
    for line in io::stdin().lock().lines() {
        let command = serde_json::from_str(&line?).context("not a command")?;
        serde_json::to_writer(&mut out, &target.handle(command))?;
        writeln!(out)?;
        out.flush()?;
    }
    Ok(())
}

/// Starts an agent that offers one lane only.
pub(super) fn agent(name: &str, lane: LaneName, settings: Settings) -> anyhow::Result<Agent> {
    let mut config = AgentConfig::new(name).with_lanes([lane.lane()]);
    config.tcp_streams = settings.tcp_streams.unwrap_or(config.tcp_streams);
    config.copy_threads = settings.copy_threads.unwrap_or(config.copy_threads);
    Ok(Agent::new(config)?)
}

pub(super) fn process_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl Target {
    fn handle(&mut self, command: Command) -> Reply {
        self.try_handle(command)
            .unwrap_or_else(|error| Reply::Failed {
                message: format!("{error:#}"),
            })
    }

    fn try_handle(&mut self, command: Command) -> anyhow::Result<Reply> {
        match command {
            Command::Start {
                lane,
                arena_bytes,
                settings,
            } => {
                self.active = None;
                let agent = agent("bench-target", lane, settings)?;
                let arena = agent.allocate(ArenaConfig::new(arena_bytes, "bench-target"))?;
                let reply = Reply::Started {
                    metadata: to_hex(&agent.metadata().to_bytes()),
                    region: arena.id().0,
                };
                self.active = Some(Active {
                    notifications: agent.notifications(),
                    agent,
                    arena,
                    back: None,
                });
                return Ok(reply);
            }
            Command::Stop => self.active = None,
            Command::Cpu => {
                let nanos = u64::try_from(process_cpu().as_nanos())?;
                return Ok(Reply::Cpu { nanos });
            }
            Command::Connect { metadata } => {
                let active = self.active()?;
                let metadata = Metadata::from_bytes(&from_hex(&metadata)?)?;
                active.back = Some(active.agent.connect(&metadata, PATIENCE)?);
            }
            Command::Fill {
                block_bytes,
                ids,
                seed,
            } => memory::fill(&self.active()?.arena, block_bytes, &ids, seed),
            Command::Clear { block_bytes, ids } => {
                memory::clear(&self.active()?.arena, block_bytes, &ids);
            }
            Command::Verify {
                block_bytes,
                ids,
                seed,
            } => {
                let blocks = memory::mismatches(&self.active()?.arena, block_bytes, &ids, seed);
                return Ok(Reply::Mismatches { blocks });
            }
            Command::Echo { count } => {
                let active = self.active()?;
                let back = active.back.as_ref().context("not connected")?;
                for _ in 0..count {
                    let ping = active.notifications.recv_timeout(PATIENCE)?;
                    active.agent.notify(back, ping.payload, PATIENCE)?.detach();
                }
            }
        }
        Ok(Reply::Done)
    }

    fn active(&mut self) -> anyhow::Result<&mut Active> {
        self.active.as_mut().context("no agent was started")
    }
}

/// What the started agent is reached by.
pub(super) fn started(reply: &Reply) -> anyhow::Result<(Metadata, RegionId)> {
    let Reply::Started { metadata, region } = reply else {
        bail!("unexpected answer {reply:?}");
    };
    Ok((
        Metadata::from_bytes(&from_hex(metadata)?)?,
        RegionId(*region),
    ))
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    ensure!(
        text.len().is_multiple_of(2) && text.is_ascii(),
        "not hexadecimal"
    );
    (0..text.len())
        .step_by(2)
        .map(|at| Ok(u8::from_str_radix(&text[at..at + 2], 16)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_goes_both_ways() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)).unwrap(), bytes);
        assert!(from_hex("0").is_err() && from_hex("zz").is_err());
    }
}
