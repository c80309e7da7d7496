//! The processes of a benchmark: what they are told, what they answer, and how both travel.

use std::{
    cell::{Cell, RefCell},
    io::{self, BufRead, Write},
    process::Child,
    rc::Rc,
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{KernelConfig, Metadata, RegionId};
use serde::{Deserialize, Serialize};

use super::{
    beside::{Beside, Shared},
    case::{LaneName, Memory, Side, Turn},
    job::{Job, Ran},
    memory::Allocated,
    node::Node,
    ping::Pings,
};
use crate::child;

/// Bound on every answer of another process and on every transfer.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What a process is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub(super) enum Command {
    /// Start an agent with one region; an earlier one goes.
    Start {
        name: String,
        lane: LaneName,
        memory: Memory,
        bytes: usize,
        settings: Settings,
    },
    /// Tell how to reach the agent.
    Describe,
    /// Connect to these agents, in this order.
    Connect { peers: Vec<Address> },
    /// Fill blocks with a pattern.
    Fill { side: Side, seed: u64 },
    /// Clear blocks.
    Clear { side: Side },
    /// Compare blocks with a pattern.
    Verify {
        side: Side,
        seed: u64,
        turn: Option<Turn>,
    },
    /// Post transfers and measure them.
    Run(Job),
    /// Run transfers and a matrix product side by side.
    Beside(Beside),
    /// Allocate memory of a kind a few times, without an agent that lasts, to see how long it takes.
    Allocate {
        memory: Memory,
        bytes: usize,
        times: u32,
        settings: Settings,
    },
    /// Measure round trips of notifications; the other side is told to echo.
    Ping(Pings),
    /// Answer every notification with one.
    Echo(Pings),
    /// Begin to take notifications and count them.
    Drain,
    /// End that.
    Drained,
    /// Tell the processor time used so far.
    Cpu,
    /// Stop the agent.
    Stop,
    /// For the other agent of this process.
    Partner { order: Box<Self> },
}

impl Command {
    /// What it is called in errors.
    const fn name(&self) -> &'static str {
        match self {
            Self::Start { .. } => "start an agent with its memory",
            Self::Describe => "describe",
            Self::Connect { .. } => "connect",
            Self::Fill { .. } => "fill blocks",
            Self::Clear { .. } => "clear blocks",
            Self::Verify { .. } => "compare blocks",
            Self::Run(_) => "run transfers",
            Self::Beside(_) => "run transfers beside a matrix product",
            Self::Allocate { .. } => "allocate memory",
            Self::Ping(_) => "send notifications",
            Self::Echo(_) => "answer notifications",
            Self::Drain | Self::Drained => "take notifications",
            Self::Cpu => "tell the processor time",
            Self::Stop => "stop the agent",
            Self::Partner { order } => order.name(),
        }
    }
}

/// Settings that all agents share.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) tcp_streams: Option<usize>,
    pub(super) copy_threads: Option<usize>,
    pub(super) device: DeviceSettings,
}

/// Settings of agents that move device memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct DeviceSettings {
    /// Give even small contiguous pieces to the copy engines: what they can do is the limit.
    pub(super) engine: bool,
    /// The side that is written to does the work of a WRITE.
    pub(super) pull_writes: bool,
    pub(super) sharing: Sharing,
    /// How long a thread that waits looks without sleeping, instead of the agent's default.
    pub(super) spin_us: Option<u64>,
}

/// How processes get at each other's device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// Memory of `cuMemCreate`, shared as a file descriptor.
    #[default]
    FileDescriptor,
    /// Memory of `cuMemAlloc`, shared by a handle of the driver.
    Handle,
}

/// What an agent is reached by.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Address {
    /// Its metadata, hexadecimal.
    metadata: String,
    region: u64,
    /// Process and address of its region, for the limits.
    pub(super) process: u32,
    pub(super) base: usize,
}

/// What a process answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub(super) enum Reply {
    Started {
        address: Address,
    },
    Connected {
        reasons: Vec<String>,
    },
    Done,
    Mismatches {
        runs: usize,
    },
    Ran(Ran),
    Shared(Shared),
    Allocated(Allocated),
    RoundTrips {
        micros: Vec<f64>,
    },
    /// When each was taken, by the clock that all processes share.
    Notifications {
        nanos: Vec<u64>,
    },
    Cpu {
        nanos: u64,
    },
    Failed {
        message: String,
    },
}

/// Commands out, answers in.
#[derive(Debug)]
pub(super) struct Link {
    way: Rc<RefCell<Way>>,
    /// It leads to the second agent of a process.
    partner: bool,
    /// No answer is waited for after this.
    until: Option<Instant>,
    /// Who is at the other end, for errors.
    label: String,
    /// The last command.
    asked: Cell<&'static str>,
}

#[derive(Debug)]
enum Way {
    /// This very thread; an answer waits to be taken.
    Here(Box<Node>, Option<Reply>),
    Thread(SyncSender<Command>, Receiver<anyhow::Result<Reply>>),
    Process(Child, Receiver<anyhow::Result<Reply>>),
}

impl Link {
    fn new(way: Way) -> Self {
        Self {
            way: Rc::new(RefCell::new(way)),
            partner: false,
            until: None,
            label: String::new(),
            asked: Cell::new("nothing"),
        }
    }

    /// A way to a second agent of the same process; commands to one must be answered before the
    /// other is told something.
    pub(super) fn partner(&self) -> Self {
        Self {
            way: self.way.clone(),
            partner: true,
            until: self.until,
            label: String::new(),
            asked: Cell::new("nothing"),
        }
    }

    /// Names who is at the other end.
    pub(super) fn set_label(&mut self, label: String) {
        self.label = label;
    }

    /// Waits for no answer after this moment, however long the command may take.
    pub(super) const fn set_deadline(&mut self, until: Option<Instant>) {
        self.until = until;
    }

    /// No other thread: a command is carried out when it is sent.
    pub(super) fn here(kernels: &KernelConfig) -> Self {
        Self::new(Way::Here(Box::new(Node::new(kernels)), None))
    }

    /// Starts this program again.
    pub(super) fn process() -> anyhow::Result<Self> {
        let (child, replies) = child::start(&["bench", "transfer-peer"], &[])?;
        Ok(Self::new(Way::Process(child, replies)))
    }

    /// Starts a thread of this process.
    pub(super) fn thread(kernels: &KernelConfig) -> anyhow::Result<Self> {
        let mut node = Node::new(kernels);
        let (commands, inbox) = sync_channel::<Command>(1);
        let (sender, replies) = sync_channel(1);
        thread::Builder::new()
            .name("bench-node".to_owned())
            .spawn(move || {
                for command in inbox {
                    if sender.send(Ok(node.handle(command))).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self::new(Way::Thread(commands, replies)))
    }

    /// Sends a command whose answer is taken later by [`Self::answer`].
    pub(super) fn send(&self, command: Command) -> anyhow::Result<()> {
        self.asked.set(command.name());
        let command = if self.partner {
            Command::Partner {
                order: Box::new(command),
            }
        } else {
            command
        };
        match &mut *self.way.borrow_mut() {
            Way::Here(node, reply) => {
                *reply = Some(node.handle(command));
                Ok(())
            }
            Way::Thread(commands, _) => commands.send(command).ok().context("the peer is gone"),
            Way::Process(child, _) => {
                let input = child.stdin.as_mut().context("the child has no input")?;
                let line = serde_json::to_vec(&command)?;
                let sent = input
                    .write_all(&line)
                    .and_then(|()| input.write_all(b"\n"))
                    .and_then(|()| input.flush());
                sent.with_context(|| {
                    format!("{} is gone, before '{}'", self.label, self.asked.get())
                })
            }
        }
    }

    /// Waits for the answer to the last command, which itself may take `longer`.
    pub(super) fn answer_after(&self, longer: Duration) -> anyhow::Result<Reply> {
        let mut patience = PATIENCE + longer;
        if let Some(until) = self.until {
            patience = patience.min(until.saturating_duration_since(Instant::now()));
        }
        let reply = match &mut *self.way.borrow_mut() {
            Way::Here(_, reply) => reply.take().context("nothing was asked")?,
            Way::Thread(_, replies) | Way::Process(_, replies) => {
                match replies.recv_timeout(patience) {
                    Ok(reply) => reply?,
                    Err(RecvTimeoutError::Timeout) => {
                        bail!(
                            "{} did not answer to '{}' in {:.1} s",
                            self.label,
                            self.asked.get(),
                            patience.as_secs_f64()
                        )
                    }
                    Err(RecvTimeoutError::Disconnected) => {
                        bail!("{} ended during '{}'", self.label, self.asked.get())
                    }
                }
            }
        };
        match reply {
            Reply::Failed { message } => {
                bail!("{} failed at '{}': {message}", self.label, self.asked.get())
            }
            reply => Ok(reply),
        }
    }

    /// Waits for the answer to the last command.
    pub(super) fn answer(&self) -> anyhow::Result<Reply> {
        self.answer_after(Duration::ZERO)
    }

    pub(super) fn ask(&self, command: Command) -> anyhow::Result<Reply> {
        self.send(command)?;
        self.answer()
    }

    /// A command that is answered by nothing more than that it is done.
    pub(super) fn tell(&self, command: Command) -> anyhow::Result<()> {
        match self.ask(command)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        if let Self::Process(child, _) = self {
            // It ends by itself when its input ends; it has nothing to save if it does not.
            drop(child.stdin.take());
            if !matches!(child.try_wait(), Ok(Some(_))) {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// The main function of the other processes: commands on standard input, answers on standard
/// output.
///
/// # Errors
/// When a line is not a command or the output is closed.
pub fn run_peer(kernels: &KernelConfig) -> anyhow::Result<()> {
    // Whoever ends the benchmark in the middle of a command ends this process too.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .context("cannot be bound to the benchmark's process")?;
    let mut node = Node::new(kernels);
    let mut out = io::stdout();
    for line in io::stdin().lock().lines() {
        let command = serde_json::from_str(&line?).context("not a command")?;
        serde_json::to_writer(&mut out, &node.handle(command))?;
        writeln!(out)?;
        out.flush()?;
    }
    Ok(())
}

pub(super) fn unexpected(reply: &Reply) -> anyhow::Error {
    anyhow::anyhow!("unexpected answer {reply:?}")
}

impl Address {
    pub(super) fn new(metadata: &Metadata, region: RegionId, base: usize) -> Self {
        let bytes = metadata.to_bytes();
        Self {
            metadata: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
            region: region.0,
            process: std::process::id(),
            base,
        }
    }

    pub(super) fn metadata(&self) -> anyhow::Result<Metadata> {
        Ok(Metadata::from_bytes(&from_hex(&self.metadata)?)?)
    }

    pub(super) const fn region(&self) -> RegionId {
        RegionId(self.region)
    }
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
    fn hexadecimal_is_read() {
        assert_eq!(from_hex("00ff7a").unwrap(), [0, 255, 0x7a]);
        assert!(from_hex("0").is_err() && from_hex("zz").is_err());
    }
}
