//! From paired descriptors to operations of the layer below.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use blockplane_transfer::{
    BlockLayout, Descriptor, FileRanges, LocalBlocks, Op, Peer, Prepared as Operation, RegionId,
    RemoteBlocks, RemoteDescriptor,
};

use super::core::{Core, Prepared, Side};
use super::error::Fault;
use super::input::Row;
use super::kinds::{Direction, Memory};
use super::list::{List, Paired, Pairing, Piece, Run, pair, pair_all};
use super::memory::Held;
use super::request::Request;
use super::rows::Strided;
use super::table::Table;

/// Bytes of each region that a connection is tried with.
const PROBE_BYTES: u64 = 1;

/// What a caller gives as descriptors.
pub(super) enum Rows<'a> {
    Plain(&'a [Row]),
    /// What it gave as such.
    Strided(&'a [Strided]),
    /// What its rows come to.
    Runs(&'a [Strided]),
}

impl Rows<'_> {
    fn resolve<T: Clone>(
        &self,
        memory: Memory,
        table: &Table<T>,
        owner: &str,
    ) -> Result<List<T>, Fault> {
        match self {
            Self::Plain(rows) => List::of_rows(memory, rows, table, owner),
            Self::Strided(rows) => List::of_strided(memory, rows, table, owner),
            Self::Runs(runs) => List::of_runs(memory, runs, table, owner),
        }
    }
}

/// The other side of an operation.
enum Far<'a> {
    Peer(&'a [RegionId]),
    Own(Vec<Arc<Held>>),
}

impl Core {
    /// Resolves descriptors of this agent (`""` for the initiator's side, its own name for the other
    /// side) or of another one.
    pub(super) fn prepare_list(
        &self,
        agent: &str,
        memory: Memory,
        rows: &Rows<'_>,
        backends: &[u64],
    ) -> Result<Prepared, Fault> {
        self.backends(backends)?;
        let side = if agent.is_empty() || agent == self.agent.name() {
            let list = rows.resolve(memory, &self.memory(), "this agent")?;
            let list = list.map(|held| Arc::downgrade(&held));
            if agent.is_empty() {
                Side::Local(list)
            } else {
                Side::Own(list)
            }
        } else {
            let remote = self.remote(agent)?;
            let list = rows.resolve(memory, &remote.table(), &format!("agent {agent:?}"))?;
            Side::Remote(remote, list)
        };
        let prepared = Prepared { memory, side };
        self.warm(&prepared);
        Ok(prepared)
    }

    /// Connects to the owner of a list and meets its regions now, so that the first request does not
    /// wait for that. What does not work here is an error there.
    fn warm(&self, prepared: &Prepared) {
        let Side::Remote(remote, list) = &prepared.side else {
            return;
        };
        let tried = remote
            .connect(&self.agent, self.options.connect_timeout)
            .and_then(|()| {
                let memory = self.memory();
                let mut sections = memory.sections().iter();
                let Some(local) = sections.find(|section| section.memory == prepared.memory) else {
                    return Ok(());
                };
                let Some(registration) = local.target.region() else {
                    return Ok(());
                };
                let layout = BlockLayout::contiguous(1, PROBE_BYTES);
                let sets = list.targets.iter().map(|&region| {
                    (
                        LocalBlocks {
                            registration,
                            layout,
                            ids: [0].into(),
                            layers: 0..1,
                        },
                        RemoteBlocks {
                            peer: remote.peer(),
                            region,
                            layout,
                            ids: [0].into(),
                            layers: 0..1,
                            window: None,
                        },
                    )
                });
                // Only prepared: nothing is written.
                self.agent.prepare_sets(Op::Write, sets)?;
                Ok(())
            });
        if let Err(fault) = tried {
            tracing::debug!(peer = remote.name(), %fault, "the first request will have to connect");
        }
    }

    /// A request from indices into two prepared lists.
    pub(super) fn make(
        &self,
        direction: Direction,
        local: (u64, &[u32]),
        remote: (u64, &[u32]),
        message: Vec<u8>,
        backends: &[u64],
    ) -> Result<Request, Fault> {
        let (here, there) = (self.list(local.0)?, self.list(remote.0)?);
        let select = (local.1, remote.1);
        self.request_of(direction, &here, &there, Some(select), message, backends)
    }

    /// A request from two whole lists.
    pub(super) fn create(
        &self,
        direction: Direction,
        (local_memory, local): (Memory, &[Row]),
        (remote_memory, remote): (Memory, &[Row]),
        agent: &str,
        message: Vec<u8>,
        backends: &[u64],
    ) -> Result<Request, Fault> {
        if agent.is_empty() {
            return Err(Fault::Invalid("the remote agent has no name".to_owned()));
        }
        if local.len() != remote.len() {
            return Err(Fault::Invalid(format!(
                "{} local and {} remote descriptors; accepted: equally many",
                local.len(),
                remote.len()
            )));
        }
        let here = self.prepare_list("", local_memory, &Rows::Plain(local), backends)?;
        let there = self.prepare_list(agent, remote_memory, &Rows::Plain(remote), backends)?;
        self.request_of(direction, &here, &there, None, message, backends)
    }

    fn request_of(
        &self,
        direction: Direction,
        here: &Prepared,
        there: &Prepared,
        select: Option<(&[u32], &[u32])>,
        message: Vec<u8>,
        backends: &[u64],
    ) -> Result<Request, Fault> {
        let Side::Local(local) = &here.side else {
            return Err(Fault::Invalid(
                "the local side was prepared as a remote one; accepted: a list of NIXL_INIT_AGENT"
                    .to_owned(),
            ));
        };
        let backend = self.backend_for(backends, here.memory, there.memory)?;
        let op = match direction {
            Direction::Read => Op::Read,
            Direction::Write => Op::Write,
        };
        let own;
        let (pairing, far) = match &there.side {
            Side::Local(_) => {
                return Err(Fault::Invalid(
                    "the remote side was prepared as the local one; accepted: a list of an agent's name"
                        .to_owned(),
                ));
            }
            Side::Own(list) => {
                own = self.own()?;
                (
                    paired(local, list, select)?,
                    Far::Own(alive(&list.targets)?),
                )
            }
            Side::Remote(remote, list) => {
                remote.connect(&self.agent, self.options.connect_timeout)?;
                own = remote.peer().clone();
                (paired(local, list, select)?, Far::Peer(&list.targets))
            }
        };
        let held = alive(&local.targets)?;
        let operations = match (here.memory, there.memory) {
            (Memory::File, _) => {
                let Far::Own(memory) = &far else {
                    return Err(files_are_local());
                };
                // Seen from the memory, the file is the other side.
                let turned = match op {
                    Op::Read => Op::Write,
                    Op::Write => Op::Read,
                };
                let pieces = pieces(&pairing.paired).map(|(l, r)| (r, l));
                self.with_files(turned, memory, &held, pieces)?
            }
            (_, Memory::File) => {
                let Far::Own(files) = &far else {
                    return Err(files_are_local());
                };
                self.with_files(op, &held, files, pieces(&pairing.paired))?
            }
            _ => vec![self.between(op, &held, &own, &far, &pairing.paired)?],
        };
        let uses = held.iter().filter_map(|held| held.id());
        let uses = match &far {
            Far::Own(there) => uses
                .chain(there.iter().filter_map(|held| held.id()))
                .collect(),
            Far::Peer(..) => uses.collect(),
        };
        let size = (pairing.count, pairing.bytes);
        Ok(Request::new(backend, operations, uses, message, size))
    }

    /// An operation between regions.
    fn between(
        &self,
        op: Op,
        held: &[Arc<Held>],
        peer: &Peer,
        far: &Far<'_>,
        paired: &Paired,
    ) -> Result<Operation, Fault> {
        let regions: Vec<RegionId> = match far {
            Far::Peer(regions) => regions.to_vec(),
            Far::Own(held) => held.iter().map(region_id).collect::<Result<_, _>>()?,
        };
        let registrations = held
            .iter()
            .map(|held| held.region().ok_or_else(files_are_local));
        let registrations = registrations.collect::<Result<Vec<_>, _>>()?;
        let prepared = match paired {
            Paired::Sets(sets) => self.agent.prepare_sets(
                op,
                sets.iter().map(|set| {
                    (
                        LocalBlocks {
                            registration: registrations[set.local.target as usize],
                            layout: layout(&set.local),
                            ids: set.local_ids.as_slice().into(),
                            layers: 0..1,
                        },
                        RemoteBlocks {
                            peer,
                            region: regions[set.remote.target as usize],
                            layout: layout(&set.remote),
                            ids: set.remote_ids.as_slice().into(),
                            layers: 0..1,
                            window: None,
                        },
                    )
                }),
            ),
            Paired::Pieces(pieces) => {
                let local: Vec<_> = pieces
                    .iter()
                    .map(|(piece, _)| Descriptor {
                        registration: registrations[piece.target as usize],
                        offset: piece.offset,
                        bytes: piece.bytes,
                    })
                    .collect();
                let remote: Vec<_> = pieces
                    .iter()
                    .map(|(_, piece)| RemoteDescriptor {
                        region: regions[piece.target as usize],
                        offset: piece.offset,
                        window: None,
                    })
                    .collect();
                self.agent.prepare_descriptors(op, &local, peer, &remote)
            }
        };
        Ok(prepared?)
    }

    /// Operations between memory and files, one for each file.
    fn with_files(
        &self,
        op: Op,
        memory: &[Arc<Held>],
        files: &[Arc<Held>],
        pairs: impl Iterator<Item = (Piece, Piece)>,
    ) -> Result<Vec<Operation>, Fault> {
        let mut by_file: HashMap<u32, (Vec<Descriptor<'_>>, Vec<u64>)> = HashMap::new();
        for (near, stored) in pairs {
            let registration = memory[near.target as usize].region();
            let (descriptors, offsets) = by_file.entry(stored.target).or_default();
            descriptors.push(Descriptor {
                registration: registration.ok_or_else(files_are_local)?,
                offset: near.offset,
                bytes: near.bytes,
            });
            offsets.push(stored.offset);
        }
        let operation = |(target, (descriptors, offsets)): (u32, (Vec<_>, Vec<u64>))| {
            let Held::File(file) = &*files[target as usize] else {
                return Err(files_are_local());
            };
            let ranges = FileRanges {
                file,
                offsets: &offsets,
                durable: false,
            };
            Ok(self
                .agent
                .prepare_file_descriptors(op, &descriptors, ranges)?)
        };
        by_file.into_iter().map(operation).collect()
    }
}

fn paired<R>(
    local: &List<Weak<Held>>,
    remote: &List<R>,
    select: Option<(&[u32], &[u32])>,
) -> Result<Pairing, Fault> {
    match select {
        Some((here, there)) => pair(local, here, remote, there),
        None => pair_all(local, remote),
    }
}

/// The descriptors of a pairing one by one.
fn pieces(paired: &Paired) -> Box<dyn Iterator<Item = (Piece, Piece)> + '_> {
    let one = |run: &Run, id: u32| Piece {
        target: run.target,
        offset: run.offset + u64::from(id) * run.step,
        bytes: run.bytes,
    };
    match paired {
        Paired::Pieces(pieces) => Box::new(pieces.iter().copied()),
        Paired::Sets(sets) => Box::new(sets.iter().flat_map(move |set| {
            let ids = set.local_ids.iter().zip(&set.remote_ids);
            ids.map(move |(&l, &r)| (one(&set.local, l), one(&set.remote, r)))
        })),
    }
}

const fn layout(run: &Run) -> BlockLayout {
    BlockLayout {
        offset: run.offset,
        blocks: run.count,
        block_stride: run.step,
        layers: 1,
        layer_stride: run.bytes,
        run_bytes: run.bytes,
    }
}

/// The memory of a list, all of which has to be registered still.
fn alive(targets: &[Weak<Held>]) -> Result<Vec<Arc<Held>>, Fault> {
    let gone = || {
        Fault::NotFound("memory of the prepared list was deregistered; prepare it again".to_owned())
    };
    targets
        .iter()
        .map(|held| held.upgrade().ok_or_else(gone))
        .collect()
}

fn region_id(held: &Arc<Held>) -> Result<RegionId, Fault> {
    held.id().ok_or_else(files_are_local)
}

fn files_are_local() -> Fault {
    Fault::NotSupported(
        "bytes of a file move between it and memory of the same agent; the remote side is prepared \
         under this agent's own name"
            .to_owned(),
    )
}
