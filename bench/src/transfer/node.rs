//! One participant: an agent with one region that does what it is told.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, ensure};
use blockplane_transfer::{
    Agent, AgentConfig, KernelConfig, KvBlockLayout, KvOrder, KvShape, KvSlice, LocalBlocks,
    LocalTensor, Notifications, Op, Peer, Prepared, RecvError, RegionId, Registration,
    RemoteBlocks, RemoteTensor,
};

use super::{
    beside,
    case::{LaneName, Lot, Side, Turn},
    job,
    link::{Address, Command, PATIENCE, Reply, Settings},
    memory, ping,
};

use crate::gpu::matmul::Product;

/// Longest that an agent may be told to look for the end of a transfer without sleeping.
const SPIN_MAX: Duration = Duration::from_millis(10);

/// A participant; it has nothing before it is told to start.
#[derive(Debug)]
pub(super) struct Node {
    kernels: KernelConfig,
    active: Option<Active>,
    partner: Option<Box<Self>>,
    /// The matrix product that ran last, and where.
    product: Option<(u32, Product)>,
}

/// One that was started.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) agent: Agent,
    pub(super) memory: Registration,
    pub(super) notifications: Notifications,
    lane: LaneName,
    pub(super) peers: Vec<Remote>,
    drain: Option<Drain>,
}

/// Another participant, as this one sees it.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) peer: Peer,
    pub(super) region: RegionId,
}

/// A thread that takes notifications.
#[derive(Debug)]
struct Drain {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<u64>>,
}

impl Node {
    pub(super) fn new(kernels: &KernelConfig) -> Self {
        Self {
            kernels: kernels.clone(),
            active: None,
            partner: None,
            product: None,
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
                lane,
                memory,
                bytes,
                settings,
            } => {
                self.active = None;
                let agent = agent(&name, lane, &settings, &self.kernels)?;
                let sharing = settings.device.sharing;
                let memory = memory::register(&agent, &memory, bytes, sharing)?;
                let active = self.active.insert(Active {
                    notifications: agent.notifications(),
                    agent,
                    memory,
                    lane,
                    peers: Vec::new(),
                    drain: None,
                });
                let address = active.address();
                return Ok(Reply::Started { address });
            }
            Command::Stop => self.active = None,
            Command::Partner { order } => {
                let partner = self
                    .partner
                    .get_or_insert_with(|| Box::new(Self::new(&self.kernels)));
                return Ok(partner.handle(*order));
            }
            Command::Beside(beside) => {
                let active = self.active.as_ref().context("no agent was started")?;
                let shared = beside::run(active, &mut self.product, &beside)?;
                return Ok(Reply::Shared(shared));
            }
            Command::Allocate {
                memory,
                bytes,
                times,
                settings,
            } => {
                let agent = Agent::new(config("bench-allocate", &settings, &self.kernels))?;
                let sharing = settings.device.sharing;
                let found = memory::allocate(&agent, &memory, bytes, times, sharing)?;
                return Ok(Reply::Allocated(found));
            }
            Command::Cpu => {
                let nanos = u64::try_from(process_cpu().as_nanos())?;
                return Ok(Reply::Cpu { nanos });
            }
            other => return self.active()?.handle(other),
        }
        Ok(Reply::Done)
    }

    fn active(&mut self) -> anyhow::Result<&mut Active> {
        self.active.as_mut().context("no agent was started")
    }
}

impl Active {
    /// What it is reached by.
    fn address(&self) -> Address {
        let base = self.memory.base_ptr().addr().get();
        Address::new(&self.agent.metadata(), self.memory.id(), base)
    }

    fn handle(&mut self, command: Command) -> anyhow::Result<Reply> {
        match command {
            Command::Connect { peers } => {
                let reasons = peers
                    .iter()
                    .map(|address| self.connect(address))
                    .collect::<anyhow::Result<_>>()?;
                return Ok(Reply::Connected { reasons });
            }
            Command::Describe => {
                let address = self.address();
                return Ok(Reply::Started { address });
            }
            Command::Fill { side, seed } => memory::fill(&self.memory, &side, seed)?,
            Command::Clear { side } => memory::clear(&self.memory, &side)?,
            Command::Verify { side, seed, turn } => {
                let runs = memory::mismatches(&self.memory, &side, seed, turn)?;
                return Ok(Reply::Mismatches { runs });
            }
            Command::Run(job) => return Ok(Reply::Ran(job::run(self, &job)?)),
            Command::Ping(pings) => {
                let micros = ping::ping(self, &pings)?;
                return Ok(Reply::RoundTrips { micros });
            }
            Command::Echo(pings) => ping::echo(self, &pings)?,
            Command::Drain => self.drain = Some(Drain::start(&self.notifications)?),
            Command::Drained => {
                let drain = self.drain.take().context("nothing is drained")?;
                let nanos = drain.end(&self.notifications)?;
                return Ok(Reply::Notifications { nanos });
            }
            Command::Start { .. }
            | Command::Stop
            | Command::Cpu
            | Command::Beside(_)
            | Command::Allocate { .. }
            | Command::Partner { .. } => {
                anyhow::bail!("not a command for an agent")
            }
        }
        Ok(Reply::Done)
    }

    fn connect(&mut self, address: &Address) -> anyhow::Result<String> {
        let lane = self.lane;
        let peer = self
            .agent
            .connect(&address.metadata()?, PATIENCE)
            .with_context(|| format!("cannot connect over {}", lane.as_str()))?;
        let info = peer.lane();
        ensure!(
            info.lane == lane.lane(),
            "asked for {}, got {}: {}",
            lane.as_str(),
            info.lane,
            info.reason
        );
        self.peers.push(Remote {
            peer,
            region: address.region(),
        });
        Ok(info.reason)
    }

    /// Prepares one lot, some of its layers.
    pub(super) fn prepare(
        &self,
        op: Op,
        lot: &Lot,
        layers: std::ops::Range<u32>,
    ) -> anyhow::Result<Prepared> {
        let remote = self
            .peers
            .get(lot.peer)
            .with_context(|| format!("not connected to peer {}", lot.peer))?;
        if let Some(turn) = lot.turn {
            return self.prepare_turned(op, lot, remote, turn);
        }
        Ok(self.agent.prepare(
            op,
            LocalBlocks {
                registration: &self.memory,
                layout: lot.local.shape.layout(),
                ids: lot.local.block_ids(),
                layers: layers.clone(),
            },
            RemoteBlocks {
                peer: &remote.peer,
                region: remote.region,
                layout: lot.remote.shape.layout(),
                ids: lot.remote.block_ids(),
                layers,
                window: None,
            },
        )?)
    }
}

impl Active {
    /// Prepares a lot whose heads lie in another order on the other side.
    fn prepare_turned(
        &self,
        op: Op,
        lot: &Lot,
        remote: &Remote,
        turn: Turn,
    ) -> anyhow::Result<Prepared> {
        // Keys and values are layers of the lot's shape.
        let layout = |side: &Side, order| {
            KvBlockLayout::dense(
                KvShape {
                    blocks: side.shape.blocks,
                    layers: side.shape.layers,
                    planes: 1,
                    tokens: turn.outer,
                    heads: turn.inner,
                    head_bytes: turn.bytes,
                },
                order,
            )
        };
        Ok(self.agent.prepare_tensors(
            op,
            LocalTensor {
                registration: &self.memory,
                layout: layout(&lot.local, KvOrder::LAYER_FIRST_NHD)?,
                ids: lot.local.block_ids(),
                slice: KvSlice::ALL,
            },
            RemoteTensor {
                peer: &remote.peer,
                region: remote.region,
                layout: layout(&lot.remote, KvOrder::LAYER_FIRST_HND)?,
                ids: lot.remote.block_ids(),
                slice: KvSlice::ALL,
                window: None,
            },
        )?)
    }
}

impl Drain {
    fn start(notifications: &Notifications) -> anyhow::Result<Self> {
        const LOOK: Duration = Duration::from_millis(50);
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let notifications = notifications.clone();
        let thread = std::thread::Builder::new()
            .name("bench-drain".to_owned())
            .spawn(move || {
                let mut nanos = Vec::new();
                loop {
                    match notifications.recv_timeout(LOOK) {
                        Ok(_) => nanos.push(shared_clock_nanos()),
                        Err(RecvError::TimedOut) if !seen.load(Ordering::Acquire) => {}
                        Err(RecvError::TimedOut | RecvError::Stopped(_)) => return nanos,
                    }
                }
            })?;
        Ok(Self { stop, thread })
    }

    fn end(self, notifications: &Notifications) -> anyhow::Result<Vec<u64>> {
        self.stop.store(true, Ordering::Release);
        let taken = self
            .thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thread that takes notifications failed"))?;
        ensure!(
            matches!(notifications.try_recv(), Ok(None)),
            "a notification arrived late"
        );
        Ok(taken)
    }
}

/// Starts an agent that offers one lane only.
pub(super) fn agent(
    name: &str,
    lane: LaneName,
    settings: &Settings,
    kernels: &KernelConfig,
) -> anyhow::Result<Agent> {
    Ok(Agent::new(
        config(name, settings, kernels).with_lanes([lane.lane()]),
    )?)
}

/// The configuration of an agent.
pub(super) fn config(name: &str, settings: &Settings, kernels: &KernelConfig) -> AgentConfig {
    let mut config = AgentConfig::new(name);
    config.tcp_streams = settings.tcp_streams.unwrap_or(config.tcp_streams);
    config.copy_threads = settings.copy_threads.unwrap_or(config.copy_threads);
    let device = &settings.device;
    if device.engine {
        config.cuda.engine_bytes_min = 0;
        // A limit ends when the device has ended, not when a sleeper has woken.
        config.cuda.spin = SPIN_MAX;
    } else if let Some(micros) = device.spin_us {
        config.cuda.spin = Duration::from_micros(micros);
    }
    config.cuda.peers_pull = device.pull_writes;
    config.cuda.pull_writes = device.pull_writes;
    config.cuda.kernels = kernels.clone();
    config
}

/// Processor time of this process.
pub(crate) fn process_cpu() -> Duration {
    cpu(rustix::time::ClockId::ProcessCPUTime)
}

/// Processor time of this thread.
pub(super) fn thread_cpu() -> Duration {
    cpu(rustix::time::ClockId::ThreadCPUTime)
}

fn cpu(clock: rustix::time::ClockId) -> Duration {
    let time = rustix::time::clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Nanoseconds of the clock that all processes of this machine share.
pub(super) fn shared_clock_nanos() -> u64 {
    let now = cpu(rustix::time::ClockId::Monotonic);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
