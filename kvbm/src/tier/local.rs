//! Copies within one worker: G1 and G2 by memory or CUDA, G2 and G3 by the slot store.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_protocol::DpRank;
use blockplane_transfer::{
    Agent, BlockLayout, ConnectError, LocalBlocks, Op, Peer, PostOptions, RegionId, RemoteBlocks,
    TransferError, Window, WindowAccess, WindowError, WindowScope,
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
    region: RegionId,
    layout: BlockLayout,
    window: Window,
    /// Its memory stays while it is reached.
    _arena: Arc<KvArena>,
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
        let window = agent
            .open_window(
                arena.registration(),
                WindowScope::Region,
                WindowAccess::ReadWrite,
            )
            .map_err(|source| AttachError::Window {
                rank: rank.0,
                source,
            })?;
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
            region: arena.registration().id(),
            layout: arena.transfer_layout(),
            window,
            _arena: Arc::clone(arena),
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
        let layers = 0..rank.layout.layers;
        let local = LocalBlocks {
            registration: self.host.registration(),
            layout: self.host.transfer_layout(),
            ids: host.into(),
            layers: layers.clone(),
        };
        let remote = RemoteBlocks {
            peer: &rank.peer,
            region: rank.region,
            layout: rank.layout,
            ids: device.into(),
            layers,
            window: Some(rank.window.id()),
        };
        let prepared = match self.agent.prepare(op, local, remote) {
            Ok(prepared) => prepared,
            Err(error) => return MoveReport::failed(count, &error.to_string()),
        };
        let transfer = match prepared.post(PostOptions::within(spec.time)) {
            Ok(transfer) => transfer,
            Err(error) => return MoveReport::failed(count, &error.to_string()),
        };
        match transfer.wait(spec.time.saturating_add(CALL_OFF)) {
            Ok(()) => MoveReport::moved(
                count,
                count as u64 * self.host.layout().block_bytes() as u64,
            ),
            Err(error) => {
                let mut report = MoveReport::failed(count, &error.to_string());
                if matches!(error, TransferError::StillInFlight { .. }) {
                    // The rank's memory stays until then as well.
                    report.pending = Some(Pending::new(move || {
                        transfer.cancel();
                        drop(rank);
                    }));
                }
                report
            }
        }
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
