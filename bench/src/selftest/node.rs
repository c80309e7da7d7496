//! A participant of a check: an agent with regions that does what it is told.

use std::{
    collections::HashMap,
    io::{self, BufRead, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, anyhow};
use blockplane_transfer::{
    Agent, AgentConfig, KernelConfig, Lane, Metadata, Peer, Registration, Window, WindowAccess,
    WindowScope,
};

use super::{
    faults,
    link::{Command, Reply, from_hex, to_hex},
    notify,
    place::{Held, Place},
    random::{contents, digest},
};

/// Bound on waiting until nobody uses a region.
const QUIET: Duration = Duration::from_secs(5);

/// A participant.
#[derive(Debug)]
pub(super) struct Node {
    kernels: KernelConfig,
    window: Option<Window>,
    /// The asking side, where it was connected to.
    pub(super) peer: Option<Peer>,
    regions: HashMap<u32, Held>,
    agent: Option<Agent>,
}

impl Node {
    pub(super) fn new(kernels: KernelConfig) -> Self {
        Self {
            kernels,
            window: None,
            peer: None,
            regions: HashMap::new(),
            agent: None,
        }
    }

    pub(super) fn handle(&mut self, command: Command) -> Reply {
        self.try_handle(command)
            .unwrap_or_else(|error| Reply::Failed {
                message: format!("{error:#}"),
            })
    }

    fn try_handle(&mut self, command: Command) -> anyhow::Result<Reply> {
        match command {
            Command::Start {
                name,
                peer_loss_ms,
                pull,
            } => self.start(&name, Duration::from_millis(peer_loss_ms), pull)?,
            Command::Make { key, place, bytes } => {
                self.make(key, place, bytes)?;
                let region = self.region(key)?.id().0;
                return Ok(Reply::Made { region });
            }
            Command::Remove { key } => self.remove(key)?,
            Command::Describe => {
                let metadata = to_hex(&self.agent()?.metadata().to_bytes());
                return Ok(Reply::Described { metadata });
            }
            Command::Fill { key, seed } => self.fill(key, seed).map(drop)?,
            Command::Digest { key } => {
                let digest = digest(&self.bytes(key)?);
                return Ok(Reply::Digest { digest });
            }
            Command::Dump { key, path } => std::fs::write(&path, self.bytes(key)?)
                .with_context(|| format!("cannot write {}", path.display()))?,
            Command::Window { key, ranges } => {
                let scope = WindowScope::Ranges(ranges.iter().map(|&(a, b)| a..b).collect());
                let region = self.region(key)?;
                let window = self
                    .agent()?
                    .open_window(region, scope, WindowAccess::ReadWrite)?;
                let id = window.id().0;
                self.window = Some(window);
                return Ok(Reply::Window { window: id });
            }
            Command::CloseWindow => {
                let window = self.window.take().context("no window is open")?;
                let busy = |_| anyhow!("the window is still in use after {QUIET:?}");
                window.close(QUIET).map_err(busy)?;
            }
            Command::Connect { metadata } => {
                let metadata = Metadata::from_bytes(&from_hex(&metadata)?)?;
                self.peer = Some(self.agent()?.connect(&metadata, QUIET)?);
            }
            Command::Watch {
                key,
                slot_bytes,
                seed,
                count,
            } => notify::watch(self, key, slot_bytes, seed, count)?,
            Command::Reach {
                metadata,
                region,
                bytes,
                key,
                into,
            } => {
                let metadata = Metadata::from_bytes(&from_hex(&metadata)?)?;
                return faults::reach_for(self, &metadata, (region, bytes), (key, into));
            }
            Command::BadPointer { place } => return faults::use_freed(self, place),
        }
        Ok(Reply::Done)
    }

    /// Starts an agent; an earlier one goes with its regions.
    pub(super) fn start(
        &mut self,
        name: &str,
        peer_loss: Duration,
        pull: bool,
    ) -> anyhow::Result<()> {
        self.window = None;
        self.peer = None;
        let keys: Vec<_> = self.regions.keys().copied().collect();
        for key in keys {
            self.remove(key)?;
        }
        let mut config = AgentConfig::new(name).with_lanes([Lane::Loopback, Lane::Shm]);
        config.peer_loss_timeout = peer_loss;
        // Pinning and the first compilation count as preparing.
        config.connect_timeout = Duration::from_secs(10);
        config.cuda.kernels = self.kernels.clone();
        config.cuda.peers_pull = pull;
        config.cuda.pull_writes = pull;
        self.agent = Some(Agent::new(config)?);
        Ok(())
    }

    pub(super) fn agent(&self) -> anyhow::Result<&Agent> {
        self.agent.as_ref().context("no agent was started")
    }

    pub(super) fn make(&mut self, key: u32, place: Place, bytes: usize) -> anyhow::Result<()> {
        self.remove(key)?;
        let held = Held::make(self.agent()?, place, bytes)?;
        self.regions.insert(key, held);
        Ok(())
    }

    pub(super) fn region(&self, key: u32) -> anyhow::Result<&Registration> {
        let held = self.regions.get(&key);
        Ok(&held
            .with_context(|| format!("there is no region {key}"))?
            .registration)
    }

    /// Keeps a region that the caller has registered.
    pub(super) fn hold(&mut self, key: u32, registration: Registration) {
        let held = Held {
            registration,
            allocation: None,
        };
        self.regions.insert(key, held);
    }

    /// Frees the memory of a region that is still registered, against all rules.
    pub(super) fn free_under(&mut self, key: u32) -> anyhow::Result<()> {
        let held = self.regions.get_mut(&key);
        let allocation = held.and_then(|held| held.allocation.take());
        drop(allocation.context("it is not the caller's memory")?);
        Ok(())
    }

    /// Ends a region, if it is there, and waits until nobody uses its memory.
    pub(super) fn remove(&mut self, key: u32) -> anyhow::Result<()> {
        let Some(Held {
            registration,
            allocation,
        }) = self.regions.remove(&key)
        else {
            return Ok(());
        };
        let closed = registration.close(QUIET);
        closed.map_err(|busy| {
            // Somebody may still touch it, so it stays.
            Box::leak(Box::new(allocation));
            anyhow!("{busy} after {QUIET:?}")
        })
    }

    /// Fills a region with the contents of a seed and returns them.
    pub(super) fn fill(&self, key: u32, seed: u64) -> anyhow::Result<Vec<u8>> {
        let region = self.region(key)?;
        let bytes = contents(seed, 0, region.len());
        region.write_at(0, &bytes)?;
        Ok(bytes)
    }

    /// All bytes of a region.
    pub(super) fn bytes(&self, key: u32) -> anyhow::Result<Vec<u8>> {
        let region = self.region(key)?;
        let mut bytes = vec![0; region.len()];
        region.read_at(0, &mut bytes)?;
        Ok(bytes)
    }
}

/// The main function of the other processes: commands on standard input, answers on standard
/// output.
pub(super) fn run(kernels: KernelConfig) -> anyhow::Result<ExitCode> {
    super::worker::end_with_parent()?;
    let mut node = Node::new(kernels);
    let mut out = io::stdout();
    for line in io::stdin().lock().lines() {
        let command = serde_json::from_str(&line?).context("not a command")?;
        serde_json::to_writer(&mut out, &node.handle(command))?;
        writeln!(out)?;
        out.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}
