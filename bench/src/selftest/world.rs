//! What checks have: devices, a pair of agents in one process and one in two, and a way to say what they do.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, ensure};
use blockplane_transfer::{CudaDevice, KernelConfig, Peer};
use serde::{Deserialize, Serialize};

use super::{
    link::{Command, Link},
    node::Node,
};

/// Bound on every transfer that is to succeed.
pub(super) const WAIT: Duration = Duration::from_secs(10);
/// Silence after which a peer is lost, where a check is not about that.
pub(super) const PEER_LOSS: Duration = Duration::from_secs(5);

/// What the process of the checks tells the one that watches it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Event {
    /// What there is, in words.
    Machine { text: String },
    /// There is no device to check.
    Unavailable { reason: String },
    /// A check begins.
    Begin { name: String },
    /// What it does now.
    Doing { text: String },
    /// It has ended. `fresh`: the next one wants another process.
    End {
        name: String,
        outcome: Outcome,
        fresh: bool,
    },
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "detail", rename_all = "snake_case")]
pub(super) enum Outcome {
    /// With what it did, in a few words.
    Passed(String),
    Failed(String),
    /// With the reason.
    Skipped(String),
}

/// Tells the process that watches what goes on.
#[derive(Clone, Debug, Default)]
pub(super) struct Teller(Arc<Mutex<()>>);

impl Teller {
    pub(super) fn tell(&self, event: &Event) {
        let _whole_lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = io::stdout();
        // Whoever watches has gone, and this process with it soon.
        let _ = serde_json::to_writer(&mut out, event)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out))
            .and_then(|()| out.flush());
    }

    /// Says what a check does now, for the case that it never ends.
    pub(super) fn doing(&self, text: impl Into<String>) {
        self.tell(&Event::Doing { text: text.into() });
    }
}

/// Two agents, one of them ours.
#[derive(Debug)]
pub(super) struct Pair {
    /// The connection to the other one.
    pub(super) peer: Peer,
    pub(super) me: Node,
    pub(super) other: Link,
}

/// How many processes a pair of agents lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Processes {
    One,
    Two,
}

/// How the agents of a pair are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) processes: Processes,
    /// The side that is written to does the work of a WRITE.
    pub(super) pull: bool,
}

impl From<Processes> for Way {
    fn from(processes: Processes) -> Self {
        Self {
            processes,
            pull: false,
        }
    }
}

/// Everything that checks share.
#[derive(Debug)]
pub(super) struct World {
    pub(super) seed: u64,
    pub(super) kernels: KernelConfig,
    pub(super) devices: Vec<CudaDevice>,
    pub(super) teller: Teller,
    pairs: Vec<(Way, Pair)>,
}

impl World {
    pub(super) const fn new(
        seed: u64,
        kernels: KernelConfig,
        devices: Vec<CudaDevice>,
        teller: Teller,
    ) -> Self {
        Self {
            seed,
            kernels,
            devices,
            teller,
            pairs: Vec::new(),
        }
    }

    /// Why a check that needs so many devices cannot run; nothing when it can.
    pub(super) fn lacks(&self, devices: u32) -> Option<Outcome> {
        let there = self.devices.len();
        let reason = || format!("needs {devices} devices, there is {there}");
        (there < devices as usize).then(|| Outcome::Skipped(reason()))
    }

    /// A connected pair that checks share until one of them fails.
    pub(super) fn pair(&mut self, way: impl Into<Way>) -> anyhow::Result<&mut Pair> {
        let way = way.into();
        let known = self.pairs.iter().position(|(known, _)| *known == way);
        let index = match known {
            Some(index) => index,
            None => {
                let pair = self.make_pair(way, PEER_LOSS, &[])?;
                self.pairs.push((way, pair));
                self.pairs.len() - 1
            }
        };
        let (_, pair) = self.pairs.get_mut(index).context("no such pair")?;
        Ok(pair)
    }

    /// A pair of its own, for a check that breaks it.
    pub(super) fn fresh_pair(
        &self,
        processes: Processes,
        peer_loss: Duration,
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Pair> {
        self.make_pair(processes.into(), peer_loss, variables)
    }

    fn make_pair(
        &self,
        Way { processes, pull }: Way,
        peer_loss: Duration,
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Pair> {
        self.teller.doing("start and connect two agents");
        let mut me = Node::new(self.kernels.clone());
        let (name, mut other) = match processes {
            Processes::One => ("one", Link::Here(Box::new(Node::new(self.kernels.clone())))),
            Processes::Two => ("two", Link::process(variables)?),
        };
        let turn = if pull { "pull" } else { "push" };
        let own = format!("selftest-{name}-{turn}-{}", std::process::id());
        me.start(&own, peer_loss, pull)?;
        other.tell(Command::Start {
            name: format!("{own}-other"),
            peer_loss_ms: u64::try_from(peer_loss.as_millis())?,
            pull,
        })?;
        let peer = me.agent()?.connect(&other.describe()?, WAIT)?;
        Ok(Pair { peer, me, other })
    }

    /// Forgets the pairs: one of them may be broken.
    pub(super) fn reset(&mut self) {
        self.pairs.clear();
    }

    /// Whether every device still does a small transfer in this process.
    pub(super) fn devices_usable(&self) -> anyhow::Result<()> {
        for device in &self.devices {
            let ordinal = device.ordinal;
            self.plain_transfer(ordinal)
                .with_context(|| format!("cuda:{ordinal} is not usable any more"))?;
        }
        Ok(())
    }

    /// A transfer within one device, between agents that nobody else uses.
    fn plain_transfer(&self, device: u32) -> anyhow::Result<()> {
        use super::place::Place;
        use blockplane_transfer::{
            BlockLayout, LocalBlocks, Op, PostOptions, RegionId, RemoteBlocks,
        };
        const BYTES: usize = 64 << 10;
        let mut pair = self.fresh_pair(Processes::One, PEER_LOSS, &[])?;
        let Pair { peer, me, other } = &mut pair;
        me.make(0, Place::File(device), BYTES)?;
        let region = RegionId(other.make(0, Place::File(device), BYTES)?);
        let source = me.fill(0, self.seed)?;
        let layout = BlockLayout::contiguous(1, BYTES as u64);
        let prepared = me.agent()?.prepare(
            Op::Write,
            LocalBlocks {
                registration: me.region(0)?,
                layout,
                ids: [0].into(),
                layers: 0..1,
            },
            RemoteBlocks {
                peer,
                region,
                layout,
                ids: [0].into(),
                layers: 0..1,
                window: None,
            },
        )?;
        prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
        // It keeps the regions.
        drop(prepared);
        ensure!(
            other.digest(0)? == super::random::digest(&source),
            "a plain transfer brings other bytes"
        );
        me.remove(0)?;
        other.tell(Command::Remove { key: 0 })
    }
}
