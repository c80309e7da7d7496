//! Copies within one worker: G1 and G2 by memory or CUDA, G2 and G3 by the slot store.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_protocol::DpRank;
use blockplane_transfer::{
    Agent, BlockIds, BlockLayout, ConnectError, LocalBlocks, Op, Peer, PostOptions, Registration,
    RemoteBlocks, TransferError, Window, WindowAccess, WindowError, WindowScope,
};
use parking_lot::RwLock;
use thiserror::Error;

use super::moves::{BlockOutcome, MoveKind, MoveReport, MoveSpec, Mover, Pending, TierFault};
use crate::{
    arena::KvArena,
    store::{SlotRead, SlotStore, SlotWrite, StoreHealth, StoreMemory, StoreReport},
};

/// How much longer than its time a transfer may take to be called off before its bytes count as
/// pending.
const CALL_OFF: Duration = Duration::from_millis(200);

/// Time to reach an agent of this process.
const CONNECT: Duration = Duration::from_secs(5);

/// The mover of one worker: G2 is an arena of its own agent, G1 of each rank is reached through a
/// window that the rank's agent opens. Which lane is used follows from where the memory is.
pub struct LocalMover {
    agent: Agent,
    host: Arc<KvArena>,
    store: Option<Arc<SlotStore>>,
    ranks: RwLock<Vec<Arc<RankMemory>>>,
}

/// G1 of one rank, as this agent reaches it.
struct RankMemory {
    rank: DpRank,
    peer: Peer,
    segments: Vec<Segment>,
}

/// One region of a G1, and the part of each block of G2 that it holds.
struct Segment {
    device: BlockLayout,
    host: BlockLayout,
    window: Window,
    /// Its memory stays while it is reached.
    region: Registration,
}

/// The memory of a G1 whose books another engine keeps. A block lies in pieces, which follow each
/// other in a block below G1: segment by segment, and in each layer by layer.
#[derive(Clone, Debug)]
pub struct ExternalMemory {
    /// The regions, at least one.
    pub segments: Vec<ExternalSegment>,
}

/// A region that holds the same part of each block.
#[derive(Clone, Debug)]
pub struct ExternalSegment {
    /// Registered with the agent of the rank.
    pub registration: Registration,
    /// Where the parts lie in it. What counts as a layer need not be one of the model: a layer whose
    /// keys and values lie apart is two.
    pub layout: BlockLayout,
}

/// Why the G1 of a rank cannot be used.
#[derive(Debug, Error)]
pub enum AttachError {
    /// Its blocks are others than those of G2.
    #[error("rank {rank} has KV layout {got}, that of G2 is {expected}")]
    Layout {
        /// The rank.
        rank: u32,
        /// Its layout.
        got: String,
        /// Accepted, in any order.
        expected: String,
    },
    /// The pool has no memory.
    #[error("the pool of rank {rank} has no arena")]
    NoArena {
        /// The rank.
        rank: u32,
    },
    /// The regions do not make up blocks of G2.
    #[error("the memory of rank {rank}: {reason}")]
    Memory {
        /// The rank.
        rank: u32,
        /// What does not fit.
        reason: String,
    },
    /// Its agent does not open the memory.
    #[error("a window over the G1 of rank {rank}: {source}")]
    Window {
        /// The rank.
        rank: u32,
        /// Why.
        source: WindowError,
    },
    /// Its agent is not reached.
    #[error("the agent of rank {rank}: {source}")]
    Connect {
        /// The rank.
        rank: u32,
        /// Why.
        source: ConnectError,
    },
}

impl LocalMover {
    /// A mover between `host`, an arena of `agent`, and what is attached. `store` must have been
    /// opened on the same agent.
    #[must_use]
    pub fn new(agent: Agent, host: Arc<KvArena>, store: Option<Arc<SlotStore>>) -> Self {
        Self {
            agent,
            host,
            store,
            ranks: RwLock::default(),
        }
    }

    /// Reaches the G1 of a rank through its own agent, in the place of an earlier one.
    ///
    /// # Errors
    /// Its layout is another one, or its agent is not reached.
    pub fn attach(
        &self,
        rank: DpRank,
        agent: &Agent,
        arena: &Arc<KvArena>,
    ) -> Result<(), AttachError> {
        if !arena.layout().exchangeable_with(self.host.layout()) {
            return Err(AttachError::Layout {
                rank: rank.0,
                got: format!("{:?}", arena.layout()),
                expected: format!("{:?}", self.host.layout()),
            });
        }
        let parts = [(
            arena.registration(),
            arena.transfer_layout(),
            self.host.transfer_layout(),
        )];
        self.attach_parts(rank, agent, &parts)
    }

    /// The same for a G1 whose books another engine keeps.
    ///
    /// # Errors
    /// The parts of a block do not add up to one of G2, or its agent is not reached.
    pub fn attach_external(
        &self,
        rank: DpRank,
        agent: &Agent,
        memory: &ExternalMemory,
    ) -> Result<(), AttachError> {
        memory.blocks(rank)?;
        let whole = self.host.transfer_layout();
        let mut parts = Vec::with_capacity(memory.segments.len());
        let mut at = 0;
        for segment in &memory.segments {
            let device = segment.layout;
            parts.push((
                &segment.registration,
                device,
                BlockLayout {
                    offset: whole.offset.saturating_add(at),
                    layers: device.layers,
                    layer_stride: device.run_bytes,
                    run_bytes: device.run_bytes,
                    ..whole
                },
            ));
            at = at.saturating_add(device.run_bytes.saturating_mul(device.layers.into()));
        }
        let expected = self.host.layout().block_bytes() as u64;
        if at != expected || whole.layer_stride != whole.run_bytes {
            return Err(AttachError::Memory {
                rank: rank.0,
                reason: format!("its blocks have {at} bytes, those of G2 {expected} in one piece"),
            });
        }
        self.attach_parts(rank, agent, &parts)
    }

    /// Reaches each region through a window of its own.
    fn attach_parts(
        &self,
        rank: DpRank,
        agent: &Agent,
        parts: &[(&Registration, BlockLayout, BlockLayout)],
    ) -> Result<(), AttachError> {
        let mut segments = Vec::with_capacity(parts.len());
        for &(region, device, host) in parts {
            let window = agent.open_window(region, WindowScope::Region, WindowAccess::ReadWrite);
            segments.push(Segment {
                device,
                host,
                window: window.map_err(|source| AttachError::Window {
                    rank: rank.0,
                    source,
                })?,
                region: region.clone(),
            });
        }
        let peer = self
            .agent
            .connect(&agent.metadata(), CONNECT)
            .map_err(|source| AttachError::Connect {
                rank: rank.0,
                source,
            })?;
        let memory = Arc::new(RankMemory {
            rank,
            peer,
            segments,
        });
        let mut ranks = self.ranks.write();
        ranks.retain(|known| known.rank != rank);
        ranks.push(memory);
        Ok(())
    }

    /// Between G1 and G2. G2 is the local side.
    fn device(&self, op: Op, spec: &MoveSpec) -> MoveReport {
        let count = spec.blocks.len();
        let rank = self
            .ranks
            .read()
            .iter()
            .find(|r| r.rank == spec.rank)
            .cloned();
        let Some(rank) = rank else {
            return MoveReport::failed(count, "the rank is not attached");
        };
        let from = || spec.blocks.iter().map(|block| block.from);
        let to = || spec.blocks.iter().map(|block| block.to);
        let (host, device): (Vec<u32>, Vec<u32>) = match op {
            Op::Read => (to().collect(), from().collect()),
            Op::Write => (from().collect(), to().collect()),
        };
        let (host, device) = (BlockIds::from(host), BlockIds::from(device));
        let mut transfers = Vec::with_capacity(rank.segments.len());
        let mut failed = None;
        for segment in &rank.segments {
            let layers = 0..segment.device.layers;
            let local = LocalBlocks {
                registration: self.host.registration(),
                layout: segment.host,
                ids: host.clone(),
                layers: layers.clone(),
            };
            let remote = RemoteBlocks {
                peer: &rank.peer,
                region: segment.region.id(),
                layout: segment.device,
                ids: device.clone(),
                layers,
                window: Some(segment.window.id()),
            };
            let posted = self.agent.prepare(op, local, remote).map_or_else(
                |error| Err(error.to_string()),
                |prepared| {
                    let posted = prepared.post(PostOptions::within(spec.time));
                    posted.map_err(|error| error.to_string())
                },
            );
            match posted {
                Ok(transfer) => transfers.push(transfer),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        let until = Instant::now() + spec.time.saturating_add(CALL_OFF);
        let mut open = Vec::new();
        for transfer in transfers {
            if failed.is_some() {
                transfer.request_cancel();
            }
            let left = until.saturating_duration_since(Instant::now());
            if let Err(error) = transfer.wait(left) {
                failed.get_or_insert_with(|| error.to_string());
                if matches!(error, TransferError::StillInFlight { .. }) {
                    open.push(transfer);
                }
            }
        }
        let Some(error) = failed else {
            let bytes = self.host.layout().block_bytes() as u64;
            return MoveReport::moved(count, count as u64 * bytes);
        };
        let mut report = MoveReport::failed(count, &error);
        if !open.is_empty() {
            // The rank's memory stays until then as well.
            report.pending = Some(Pending::new(move || {
                for transfer in open {
                    transfer.cancel();
                }
                drop(rank);
            }));
        }
        report
    }

    fn disk(&self, write: bool, spec: &MoveSpec) -> MoveReport {
        let count = spec.blocks.len();
        let Some(store) = &self.store else {
            return MoveReport::failed(count, "there is no store");
        };
        let memory = StoreMemory {
            registration: self.host.registration(),
            layout: self.host.transfer_layout(),
        };
        let deadline = Instant::now() + spec.time;
        let StoreReport { outcomes, pending } = if write {
            let blocks = spec.blocks.iter().map(|block| SlotWrite {
                slot: block.to,
                block: block.from,
                name: block.name,
                parent: block.parent,
            });
            store.write(&memory, &blocks.collect::<Vec<_>>(), deadline)
        } else {
            let blocks = spec.blocks.iter().map(|block| SlotRead {
                slot: block.from,
                block: block.to,
                name: block.name,
            });
            store.read(&memory, &blocks.collect::<Vec<_>>(), deadline)
        };
        let moved = outcomes
            .iter()
            .filter(|o| **o == BlockOutcome::Moved)
            .count();
        MoveReport {
            outcomes,
            pending,
            bytes: moved as u64 * store.block_bytes(),
            fault: fault_of(store),
        }
    }
}

impl ExternalMemory {
    /// How many blocks all segments have.
    pub(super) fn blocks(&self, rank: DpRank) -> Result<u32, AttachError> {
        let error = |reason: String| AttachError::Memory {
            rank: rank.0,
            reason,
        };
        let Some(first) = self.segments.first() else {
            return Err(error("it has no region".to_owned()));
        };
        let blocks = first.layout.blocks;
        for (
            at,
            ExternalSegment {
                registration,
                layout,
            },
        ) in self.segments.iter().enumerate()
        {
            if layout.blocks != blocks {
                let got = layout.blocks;
                return Err(error(format!(
                    "region {at} has {got} blocks, the first one {blocks}"
                )));
            }
            let checked = layout.validate(registration.len() as u64);
            checked.map_err(|source| error(format!("region {at}: {source}")))?;
        }
        Ok(blocks)
    }
}

/// What is wrong with G3 as a whole.
pub(super) fn fault_of(store: &SlotStore) -> Option<TierFault> {
    match store.health() {
        StoreHealth::On | StoreHealth::Shrunk { .. } => None,
        StoreHealth::ReadOnly { reason } => Some(TierFault::ReadOnly(reason)),
        StoreHealth::Off { reason } => Some(TierFault::Off(reason)),
    }
}

impl Mover for LocalMover {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        match spec.kind {
            MoveKind::DeviceToHost => self.device(Op::Read, spec),
            MoveKind::HostToDevice => self.device(Op::Write, spec),
            MoveKind::HostToDisk => self.disk(true, spec),
            MoveKind::DiskToHost => self.disk(false, spec),
            MoveKind::HostToRemote | MoveKind::RemoteToHost => {
                MoveReport::failed(spec.blocks.len(), "there is no remote tier")
            }
        }
    }
}

impl fmt::Debug for LocalMover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalMover")
            .field("host", &self.host)
            .field(
                "store",
                &self.store.as_ref().map(|store| store.path().to_owned()),
            )
            .finish_non_exhaustive()
    }
}
