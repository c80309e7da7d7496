//! The other side of a check: what it is told, what it answers, and how both travel.

use std::{
    io::Write,
    path::PathBuf,
    process::Child,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use blockplane_transfer::Metadata;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::{node::Node, place::Place};
use crate::child;

/// Bound on every answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the other side is told. Regions are named by keys of the asking side.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub(super) enum Command {
    /// Start an agent; an earlier one goes.
    Start {
        name: String,
        peer_loss_ms: u64,
        pull: bool,
    },
    /// Make a region.
    Make {
        key: u32,
        place: Place,
        bytes: usize,
    },
    /// End a region and wait until nobody uses it.
    Remove { key: u32 },
    /// Tell how to reach the agent.
    Describe,
    /// Fill a region with the contents of a seed.
    Fill { key: u32, seed: u64 },
    /// Tell the digest of a region.
    Digest { key: u32 },
    /// Write a region to a file.
    Dump { key: u32, path: PathBuf },
    /// Open a window over ranges of a region.
    Window { key: u32, ranges: Vec<(u64, u64)> },
    /// Close it.
    CloseWindow,
    /// Connect to the agent of the asking side.
    Connect { metadata: String },
    /// Take so many notifications, each of which tells what was copied to where; look whether the end of it
    /// is there, and answer each with a notification.
    Watch {
        key: u32,
        slot_bytes: usize,
        seed: u64,
        count: u32,
    },
    /// READ a region of the asking side into a new one.
    Reach {
        metadata: String,
        region: u64,
        bytes: usize,
        key: u32,
        into: Place,
    },
    /// Write from a region of this kind to memory that was freed; it costs this process its device.
    BadPointer { place: Place },
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub(super) enum Reply {
    Done,
    Made { region: u64 },
    Described { metadata: String },
    Digest { digest: u64 },
    Window { window: u64 },
    Reached,
    NotReached { unreachable: bool, text: String },
    Told { text: String },
    Failed { message: String },
}

/// The other side: in this process, or in another.
#[derive(Debug)]
pub(super) enum Link {
    Here(Box<Node>),
    Process(Other),
}

/// Another process.
#[derive(Debug)]
pub(super) struct Other {
    child: Child,
    replies: Receiver<anyhow::Result<Reply>>,
}

impl Link {
    /// Starts this program again, with other variables in its environment.
    pub(super) fn process(variables: &[(&str, &str)]) -> anyhow::Result<Self> {
        let (child, replies) = child::start(&["selftest", "gpu-node"], variables)?;
        Ok(Self::Process(Other { child, replies }))
    }

    /// Sends a command and waits for its answer.
    pub(super) fn ask(&mut self, command: Command) -> anyhow::Result<Reply> {
        match self {
            Self::Here(node) => refused(node.handle(command)),
            Self::Process(other) => {
                other.send(&command)?;
                other.answer(PATIENCE)
            }
        }
    }

    /// A command that is answered by nothing more than that it is done.
    pub(super) fn tell(&mut self, command: Command) -> anyhow::Result<()> {
        match self.ask(command)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn make(&mut self, key: u32, place: Place, bytes: usize) -> anyhow::Result<u64> {
        match self.ask(Command::Make { key, place, bytes })? {
            Reply::Made { region } => Ok(region),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn digest(&mut self, key: u32) -> anyhow::Result<u64> {
        match self.ask(Command::Digest { key })? {
            Reply::Digest { digest } => Ok(digest),
            other => Err(unexpected(&other)),
        }
    }

    /// The other process, for commands whose answer is taken later.
    pub(super) fn other(&mut self) -> anyhow::Result<&mut Other> {
        match self {
            Self::Process(other) => Ok(other),
            Self::Here(_) => bail!("the other side is in this process"),
        }
    }

    pub(super) fn describe(&mut self) -> anyhow::Result<Metadata> {
        match self.ask(Command::Describe)? {
            Reply::Described { metadata } => Ok(Metadata::from_bytes(&from_hex(&metadata)?)?),
            other => Err(unexpected(&other)),
        }
    }
}

impl Other {
    /// Sends a command whose answer is taken later.
    pub(super) fn send(&mut self, command: &Command) -> anyhow::Result<()> {
        let input = self
            .child
            .stdin
            .as_mut()
            .context("the child has no input")?;
        serde_json::to_writer(&mut *input, command)?;
        input.write_all(b"\n")?;
        input.flush().context("the other process is gone")
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().context("cannot kill the other process")
    }

    pub(super) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let process = Pid::from_child(&self.child);
        kill_process(process, signal).context("cannot signal the other process")
    }

    /// Waits for the answer to the last command.
    pub(super) fn answer(&mut self, patience: Duration) -> anyhow::Result<Reply> {
        match self.replies.recv_timeout(patience) {
            Ok(reply) => refused(reply?),
            Err(RecvTimeoutError::Timeout) => {
                bail!("no answer from the other process within {patience:?}")
            }
            Err(RecvTimeoutError::Disconnected) => match self.child.wait() {
                Ok(status) => bail!("the other process ended: {status}"),
                Err(error) => bail!("the other process ended: {error}"),
            },
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It has nothing to save.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn refused(reply: Reply) -> anyhow::Result<Reply> {
    match reply {
        Reply::Failed { message } => bail!("the other side says: {message}"),
        reply => Ok(reply),
    }
}

pub(super) fn unexpected(reply: &Reply) -> anyhow::Error {
    anyhow::anyhow!("unexpected answer {reply:?}")
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn from_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    ensure!(
        text.len().is_multiple_of(2) && text.is_ascii(),
        "not hexadecimal"
    );
    (0..text.len())
        .step_by(2)
        .map(|at| Ok(u8::from_str_radix(&text[at..at + 2], 16)?))
        .collect()
}
