//! Device memory through staging memory: to files, objects and peers over tcp, and back.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockIds, BlockLayout, CancelOutcome, Descriptor,
    DeviceArenaConfig, FileBlocks, FileConfig, FileRanges, FileStore, KernelConfig, Lane,
    LocalBlocks, ObjectBlocks, ObjectConfig, ObjectLocation, ObjectStore, Op, Peer, PostOptions,
    Prepared, Registration, RemoteBlocks, RemoteDescriptor, TransferError,
};

use super::{
    case::{self, Case, How, Piece},
    random::{Random, contents},
    raw::{Gate, Stream},
    world::{Outcome, WAIT, World},
};

/// Odd, so that the ends of regions are not aligned.
const ROOM: usize = (4 << 20) + 77;
/// Small, so that every copy takes several of them.
const SLOT: u64 = 256 << 10;
/// What a byte is set to that nothing is to touch.
const CANARY: u8 = 0xa5;
/// A transfer that waits for an event has not ended after this time.
const NOT_YET: Duration = Duration::from_millis(30);

/// A place that devices do not reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Far {
    File,
    Tcp,
}

/// What such a place is made of.
enum There {
    File {
        store: FileStore,
        path: PathBuf,
    },
    Tcp {
        peer: Peer,
        region: Registration,
        /// Kept: it is the peer.
        _agent: Agent,
    },
}

impl Drop for There {
    fn drop(&mut self) {
        if let Self::File { path, .. } = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Memory on both sides.
struct Scene {
    // In this order: registrations end before their agents.
    memory: Registration,
    there: There,
    agent: Agent,
    staged: bool,
}

fn agent(kernels: &KernelConfig, lane: Lane, slot_bytes: Option<u64>) -> anyhow::Result<Agent> {
    let name = format!("selftest-stage-{}", std::process::id());
    let mut config = AgentConfig::new(name).with_lanes([lane]);
    config.cuda.kernels = kernels.clone();
    if let Some(bytes) = slot_bytes {
        config.cuda.staging.slots = 4;
        config.cuda.staging.slot_bytes = bytes;
    }
    Ok(Agent::new(config)?)
}

fn memory(agent: &Agent, device: Option<u32>, bytes: usize) -> anyhow::Result<Registration> {
    Ok(match device {
        Some(device) => agent.allocate_device(DeviceArenaConfig::new(device, bytes, "stage"))?,
        None => agent.allocate(ArenaConfig::new(bytes, "stage"))?,
    })
}

impl Scene {
    /// `device`: none for host memory, which is not staged.
    fn new(
        world: &World,
        far: Far,
        device: Option<u32>,
        bytes: usize,
        slot_bytes: Option<u64>,
    ) -> anyhow::Result<Self> {
        world.teller.doing("make regions");
        let agent = agent(&world.kernels, Lane::Tcp, slot_bytes)?;
        let there = match far {
            Far::File => {
                let name = format!("blockplane-selftest-stage-{}", std::process::id());
                let path = std::env::temp_dir().join(name);
                let store = agent.open_file(FileConfig::new(&path).create(bytes as u64))?;
                There::File { store, path }
            }
            Far::Tcp => {
                let name = format!("selftest-stage-{}-other", std::process::id());
                let other = Agent::new(AgentConfig::new(name).with_lanes([Lane::Tcp]))?;
                There::Tcp {
                    peer: agent.connect(&other.metadata(), WAIT)?,
                    region: other.allocate(ArenaConfig::new(bytes, "stage"))?,
                    _agent: other,
                }
            }
        };
        Ok(Self {
            memory: memory(&agent, device, bytes)?,
            there,
            agent,
            staged: device.is_some(),
        })
    }

    fn here(&self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; self.memory.len()];
        self.memory.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    fn set_there(&self, bytes: &[u8]) -> anyhow::Result<()> {
        match &self.there {
            There::File { path, .. } => std::fs::write(path, bytes)?,
            There::Tcp { region, .. } => region.write_at(0, bytes)?,
        }
        Ok(())
    }

    fn over_there(&self) -> anyhow::Result<Vec<u8>> {
        Ok(match &self.there {
            There::File { path, .. } => std::fs::read(path)?,
            There::Tcp { region, .. } => {
                let mut bytes = vec![0; region.len()];
                region.read_at(0, &mut bytes)?;
                bytes
            }
        })
    }

    fn blocks(
        &self,
        op: Op,
        (layout, ids): (BlockLayout, BlockIds),
        (far_layout, far_ids): (BlockLayout, BlockIds),
        layers: [std::ops::Range<u32>; 2],
    ) -> anyhow::Result<Prepared> {
        let [here, there] = layers;
        let local = LocalBlocks {
            registration: &self.memory,
            layout,
            ids,
            layers: here,
        };
        let prepared = match &self.there {
            There::File { store, .. } => {
                let blocks = FileBlocks {
                    file: store,
                    layout: far_layout,
                    ids: far_ids,
                    layers: there,
                    durable: false,
                };
                self.agent.prepare_file(op, local, blocks)?
            }
            There::Tcp { peer, region, .. } => {
                let remote = RemoteBlocks {
                    peer,
                    region: region.id(),
                    layout: far_layout,
                    ids: far_ids,
                    layers: there,
                    window: None,
                };
                self.agent.prepare(op, local, remote)?
            }
        };
        self.planned(prepared)
    }

    fn pieces(&self, op: Op, pieces: &[Piece]) -> anyhow::Result<Prepared> {
        let descriptor = |piece: &Piece| Descriptor {
            registration: &self.memory,
            offset: piece.local,
            bytes: piece.bytes,
        };
        let local: Vec<_> = pieces.iter().map(descriptor).collect();
        let prepared = match &self.there {
            There::File { store, .. } => {
                let offsets: Vec<_> = pieces.iter().map(|piece| piece.remote).collect();
                let ranges = FileRanges {
                    file: store,
                    offsets: &offsets,
                    durable: true,
                };
                self.agent.prepare_file_descriptors(op, &local, ranges)?
            }
            There::Tcp { peer, region, .. } => {
                let remote = |piece: &Piece| RemoteDescriptor {
                    region: region.id(),
                    offset: piece.remote,
                    window: None,
                };
                let remote: Vec<_> = pieces.iter().map(remote).collect();
                self.agent.prepare_descriptors(op, &local, peer, &remote)?
            }
        };
        self.planned(prepared)
    }

    fn planned(&self, prepared: Prepared) -> anyhow::Result<Prepared> {
        let reason = &prepared.plan().reason;
        ensure!(
            reason.contains("staged through") == self.staged,
            "planned as: {reason}"
        );
        Ok(prepared)
    }

    fn prepare(&self, op: Op, case: &Case) -> anyhow::Result<Prepared> {
        match &case.how {
            How::Blocks(local, remote) => self.blocks(
                op,
                (local.layout, local.ids.clone()),
                (remote.layout, remote.ids.clone()),
                [local.layers.clone(), remote.layers.clone()],
            ),
            How::Descriptors => self.pieces(op, &case.pieces),
        }
    }

    /// All blocks of a megabyte, scattered on the far side.
    fn whole(&self, op: Op) -> anyhow::Result<Prepared> {
        let blocks = u32::try_from(self.memory.len() >> 16)?;
        let layout = BlockLayout::contiguous(blocks, 1 << 16);
        let far: Vec<u32> = (0..blocks).rev().collect();
        let layers = [0..1, 0..1];
        self.blocks(
            op,
            (layout, (0..blocks).into()),
            (layout, far.into()),
            layers,
        )
    }
}

/// Copies of every form, compared byte for byte with a plain reference; then transfers that are called
/// off, and how fast a large one is.
pub(super) fn check(
    world: &World,
    name: &str,
    far: Far,
    device: Option<u32>,
) -> anyhow::Result<Outcome> {
    if let Some(skipped) = world.lacks(device.map_or(0, |device| device + 1)) {
        return Ok(skipped);
    }
    let mut random = Random::new(world.seed, name);
    let scene = Scene::new(world, far, device, ROOM, Some(SLOT))?;
    let mut transfers = 0;
    for case in case::all(&mut random, ROOM as u64) {
        for op in [Op::Write, Op::Read] {
            let what = format!("{op:?}, {}, {} pieces", case.what, case.pieces.len());
            world.teller.doing(&*what);
            copy(&scene, op, &case, random.next()).context(what)?;
            transfers += 1;
        }
    }
    world.teller.doing("cancel");
    for op in [Op::Write, Op::Read] {
        cancelled(&scene, op).with_context(|| format!("{op:?}, called off"))?;
    }
    drop(scene);
    world.teller.doing("a large transfer");
    let speeds = speeds(world, far, device)?;
    Ok(Outcome::Passed(format!("{transfers} transfers; {speeds}")))
}

fn copy(scene: &Scene, op: Op, case: &Case, seed: u64) -> anyhow::Result<()> {
    let mut here = contents(seed, 0, ROOM);
    let mut there = contents(seed ^ 1, 0, ROOM);
    scene.memory.write_at(0, &here)?;
    scene.set_there(&there)?;
    let prepared = scene.prepare(op, case)?;
    let how = || format!("seed {seed}, planned as: {}", prepared.plan().reason);
    let outcome = prepared.post(PostOptions::within(WAIT))?.wait(WAIT);
    outcome.with_context(how)?;
    let pieces = case.pieces.iter();
    let forth = |piece: &Piece| (piece.local, piece.remote, piece.bytes);
    let back = |piece: &Piece| (piece.remote, piece.local, piece.bytes);
    let mut written = [Vec::new(), Vec::new()];
    match op {
        Op::Write => {
            case::apply(&here, &mut there, pieces.clone().map(forth));
            written[1] = pieces.map(|piece| (piece.remote, piece.bytes)).collect();
        }
        Op::Read => {
            case::apply(&there, &mut here, pieces.clone().map(back));
            written[0] = pieces.map(|piece| (piece.local, piece.bytes)).collect();
        }
    }
    if let Some(text) = case::difference(&here, &scene.here()?, &written[0]) {
        bail!("memory of this side: {text}; {}", how());
    }
    if let Some(text) = case::difference(&there, &scene.over_there()?, &written[1]) {
        bail!("the other side: {text}; {}", how());
    }
    Ok(())
}

/// What is called off never lands later.
fn cancelled(scene: &Scene, op: Op) -> anyhow::Result<()> {
    let whole = scene.whole(op)?;
    let canary = vec![CANARY; ROOM];
    for round in 0..20u32 {
        let transfer = whole.post(PostOptions::within(WAIT))?;
        std::thread::park_timeout(Duration::from_micros(100) * round);
        match transfer.cancel() {
            CancelOutcome::Cancelled | CancelOutcome::Completed => {}
            CancelOutcome::Failed(error) => bail!("round {round}: {error}"),
        }
        let set = |here: &[u8], there: &[u8]| -> anyhow::Result<()> {
            scene.memory.write_at(0, here)?;
            scene.set_there(there)
        };
        set(&canary, &canary)?;
        std::thread::park_timeout(Duration::from_millis(2));
        let found = match op {
            Op::Write => scene.over_there()?,
            Op::Read => scene.here()?,
        };
        if let Some(text) = case::difference(&canary, &found, &[]) {
            bail!("round {round}: something landed after the cancel: {text}");
        }
    }
    // The slots are free again.
    whole.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    Ok(())
}

/// GB/s of a large WRITE and READ with the default slots.
fn speeds(world: &World, far: Far, device: Option<u32>) -> anyhow::Result<String> {
    let bytes: usize = if device.is_some() { 256 << 20 } else { 8 << 20 };
    let scene = Scene::new(world, far, device, bytes, None)?;
    let mut out = Vec::new();
    for op in [Op::Write, Op::Read] {
        let whole = scene.whole(op)?;
        let mut best = Duration::MAX;
        for _ in 0..4 {
            let began = Instant::now();
            whole.post(PostOptions::within(WAIT))?.wait(WAIT)?;
            best = best.min(began.elapsed());
        }
        let rate = bytes as f64 / best.as_secs_f64() / 1e9;
        out.push(format!("{op:?} {rate:.1} GB/s"));
    }
    Ok(out.join(", "))
}

/// Blocks into objects and back, whole and in part.
pub(super) fn objects(world: &World, name: &str, device: Option<u32>) -> anyhow::Result<Outcome> {
    if let Some(skipped) = world.lacks(device.map_or(0, |device| device + 1)) {
        return Ok(skipped);
    }
    let mut random = Random::new(world.seed, name);
    let agent = agent(&world.kernels, Lane::Loopback, Some(SLOT))?;
    let memory = memory(&agent, device, ROOM)?;
    let store = agent.open_objects(&ObjectConfig::new(ObjectLocation::Memory))?;
    let mut transfers = 0;
    for run_bytes in [16, 4096, 10_001, SLOT / 3] {
        let blocks = u32::try_from(ROOM as u64 / run_bytes / 3)?.min(60);
        let layout = BlockLayout {
            offset: 0,
            blocks,
            block_stride: run_bytes,
            layers: 3,
            layer_stride: run_bytes * u64::from(blocks),
            run_bytes,
        };
        let ids = random.ids(blocks, blocks * 2 / 3);
        let keys: Vec<_> = ids.iter().map(|id| format!("{run_bytes}/{id}")).collect();
        let before = contents(random.next(), 0, ROOM);
        let mut after = contents(random.next(), 0, ROOM);
        world
            .teller
            .doing(format!("{} objects of {} bytes", keys.len(), run_bytes * 3));
        let post = |op, store: &ObjectStore| -> anyhow::Result<()> {
            let local = LocalBlocks {
                registration: &memory,
                layout,
                ids: ids.as_slice().into(),
                layers: 0..3,
            };
            let objects = ObjectBlocks {
                store,
                keys: &keys,
                range: None,
                create_only: false,
            };
            let prepared = agent.prepare_objects(op, local, objects)?;
            let reason = &prepared.plan().reason;
            let staged = reason.contains("staged through");
            ensure!(staged == device.is_some(), "planned as: {reason}");
            prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
            Ok(())
        };
        memory.write_at(0, &before)?;
        post(Op::Write, &store)?;
        memory.write_at(0, &after)?;
        post(Op::Read, &store)?;
        let runs = ids
            .iter()
            .flat_map(|&id| (0..3).map(move |layer| (id, layer)));
        let runs: Option<Vec<_>> = runs
            .map(|(id, layer)| layout.run_offset(id, layer).map(|at| (at, at, run_bytes)))
            .collect();
        case::apply(
            &before,
            &mut after,
            runs.context("a run outside")?.into_iter(),
        );
        let mut found = vec![0; ROOM];
        memory.read_at(0, &mut found)?;
        if let Some(text) = case::difference(&after, &found, &[]) {
            bail!("objects of {} bytes: {text}", run_bytes * 3);
        }
        transfers += 2;
    }
    Ok(Outcome::Passed(format!("{transfers} transfers")))
}

/// A staged transfer that is posted after an event touches nothing before, and holds nobody up.
pub(super) fn event(world: &World) -> anyhow::Result<Outcome> {
    if let Some(skipped) = world.lacks(1) {
        return Ok(skipped);
    }
    let scene = Scene::new(world, Far::Tcp, Some(0), ROOM, Some(SLOT))?;
    let write = scene.whole(Op::Write)?;
    write.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    let (stream, gate) = (Stream::new(0)?, Gate::new(0)?);
    gate.hold(&stream)?;
    let event = stream.record()?;
    // SAFETY: every transfer that is posted after it ends below.
    let after = unsafe { event.for_transfers() };
    let before = vec![1; ROOM];
    let bytes = contents(world.seed, 0, ROOM);
    scene.set_there(&before)?;
    world.teller.doing("post after an event that is not past");
    let waiting: Vec<_> = (0..8)
        .map(|_| write.post(PostOptions::within(WAIT).after(after)))
        .collect::<Result<_, _>>()?;
    std::thread::park_timeout(NOT_YET);
    let early = scene.over_there()? != before;
    scene.memory.write_at(0, &bytes)?;
    world.teller.doing("post one without an event");
    let other = write.post(PostOptions::within(WAIT))?.wait(WAIT);
    scene.set_there(&before)?;
    world.teller.doing("let the event pass");
    gate.open();
    for transfer in waiting {
        transfer.wait(WAIT)?;
    }
    ensure!(!early, "bytes were there before the event");
    match other {
        Ok(()) => {}
        Err(TransferError::DeadlineExceeded { .. }) => {
            bail!("transfers that wait for an event held up another one")
        }
        Err(error) => return Err(error.into()),
    }
    let found = scene.over_there()?;
    ensure!(found != before, "nothing came after the event");
    Ok(Outcome::Passed("8 transfers".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftest::world::Teller;

    /// The checks themselves, where there is no GPU and nothing is staged.
    #[test]
    fn checks_of_staging_pass_with_host_memory() {
        let kernels = KernelConfig::default();
        let world = World::new(3, kernels, Vec::new(), Teller::default());
        for far in [Far::File, Far::Tcp] {
            let outcome = check(&world, "test", far, None).unwrap();
            assert!(matches!(outcome, Outcome::Passed(_)), "{outcome:?}");
        }
        let outcome = objects(&world, "test", None).unwrap();
        assert!(matches!(outcome, Outcome::Passed(_)), "{outcome:?}");
    }
}
