//! Faults: processes that are killed or stopped, memory that goes, devices that refuse. Each ends as a typed
//! error within its bound, and the devices are usable afterwards.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{
    BlockLayout, CancelOutcome, DeviceArenaConfig, DeviceMemory, DeviceSharing, LocalBlocks,
    LossCause, Op, PostError, PostOptions, PrepareError, Prepared, RegionId, RegisterError,
    RemoteAccess, RemoteBlocks, Transfer, TransferError,
};
use rustix::process::Signal;

use super::{
    copies::compare_remote,
    link::{Command, Reply, to_hex, unexpected},
    place::Place,
    random::{contents, digest},
    raw::{Unshareable, free_bytes},
    world::{Outcome, PEER_LOSS, Pair, Processes, WAIT, World},
};

const MINE: u32 = 40;
const THEIRS: u32 = 41;
const BLOCK: u64 = 64 << 10;
/// On one multiprocessor it takes some 20 ms or more.
const SLOW_BYTES: usize = 512 << 20;
/// Time for a transfer to get going.
const UNDER_WAY: Duration = Duration::from_millis(4);
/// Errors that need no silence come within this.
const SOON: Duration = Duration::from_secs(3);

/// The peer goes while transfers run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    Killed,
    Stopped,
}

/// Agents in two processes with a large region each.
struct Scene {
    pair: Pair,
    region: RegionId,
    bytes: usize,
}

impl Scene {
    fn new(
        world: &World,
        (mine, theirs): (Place, Place),
        bytes: usize,
        peer_loss: Duration,
    ) -> anyhow::Result<Self> {
        let mut pair = world.fresh_pair(Processes::Two, peer_loss, &[])?;
        world.teller.doing("make regions");
        pair.me.make(MINE, mine, bytes)?;
        let region = RegionId(pair.other.make(THEIRS, theirs, bytes)?);
        Ok(Self {
            pair,
            region,
            bytes,
        })
    }

    fn prepare(&self, op: Op) -> Result<Prepared, anyhow::Error> {
        let blocks = u32::try_from(self.bytes as u64 / BLOCK)?;
        let layout = BlockLayout::contiguous(blocks, BLOCK);
        // Neighbours change places, so that blocks do not merge.
        let ids: std::sync::Arc<[u32]> = (0..blocks).map(|id| id ^ 1).collect();
        let local = LocalBlocks {
            registration: self.pair.me.region(MINE)?,
            layout,
            ids: (0..blocks).into(),
            layers: 0..1,
        };
        let remote = RemoteBlocks {
            peer: &self.pair.peer,
            region: self.region,
            layout,
            ids: ids.into(),
            layers: 0..1,
            window: None,
        };
        Ok(self.pair.me.agent()?.prepare(op, local, remote)?)
    }

    /// Four of them, each on one multiprocessor.
    fn slow(&self, prepared: &Prepared) -> anyhow::Result<Vec<Transfer>> {
        let options = || PostOptions::within(WAIT).sms(1).notify("done");
        (0..4).map(|_| Ok(prepared.post(options())?)).collect()
    }
}

/// A peer that is killed or stopped while it is written to or read from.
pub(super) fn peer_lost(
    world: &World,
    loss: Loss,
    op: Op,
    place: Place,
) -> anyhow::Result<Outcome> {
    if let Some(skipped) = world.lacks(place.device().map_or(1, |device| device + 1)) {
        return Ok(skipped);
    }
    let teller = world.teller.clone();
    let silence = Duration::from_millis(500);
    let mut scene = Scene::new(world, (Place::File(0), place), SLOW_BYTES, silence)?;
    let prepared = scene.prepare(op)?;
    // Kernels are there and memory is pinned before it matters.
    prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    teller.doing("transfers run");
    let transfers = scene.slow(&prepared)?;
    std::thread::park_timeout(UNDER_WAY);
    let under_way = transfers
        .iter()
        .filter(|transfer| transfer.telemetry().is_none())
        .count();
    match loss {
        Loss::Killed => scene.pair.other.other()?.kill()?,
        Loss::Stopped => scene.pair.other.other()?.signal(Signal::STOP)?,
    }
    let began = Instant::now();
    let mut lost = 0;
    for (index, transfer) in transfers.iter().enumerate() {
        teller.doing(format!(
            "wait for transfer {index} after the loss of the peer"
        ));
        match transfer.wait(WAIT) {
            Ok(()) => {}
            Err(TransferError::PeerLost(_)) => lost += 1,
            Err(error) => {
                return Err(error).context(format!("transfer {index}, the peer is {loss:?}"));
            }
        }
    }
    let took = began.elapsed();
    ensure!(
        took < silence + SOON,
        "transfers ended {took:?} after the loss"
    );
    teller.doing("wait until the loss is known");
    while scene.pair.peer.lost().is_none() {
        ensure!(began.elapsed() < silence + SOON, "the loss was not noticed");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let cause = scene.pair.peer.lost().map(|lost| lost.cause);
    match (loss, &cause) {
        (Loss::Killed, _) | (Loss::Stopped, Some(LossCause::Silent(_))) => {}
        (Loss::Stopped, cause) => bail!("a stopped peer is lost because: {cause:?}"),
    }
    let later = prepared.post(PostOptions::within(WAIT)).map(drop);
    ensure!(
        matches!(later, Err(PostError::PeerLost(_))),
        "a post to a lost peer: {later:?}"
    );
    drop(transfers);
    drop(prepared);
    if loss == Loss::Stopped {
        teller.doing("let it go on, and connect again");
        scene.pair.other.other()?.signal(Signal::CONT)?;
        let metadata = scene.pair.other.describe()?;
        scene.pair.peer = scene.pair.me.agent()?.connect(&metadata, WAIT)?;
        again(&mut scene, world.seed)?;
        scene.pair.other.tell(Command::Remove { key: THEIRS })?;
    }
    teller.doing("close our region");
    scene.pair.me.remove(MINE)?;
    drop(scene);
    teller.doing("see whether devices are usable");
    world.devices_usable()?;
    let mut scene = Scene::new(world, (Place::File(0), place), 1 << 20, PEER_LOSS)?;
    again(&mut scene, world.seed + 1)?;
    Ok(Outcome::Passed(format!(
        "{under_way} of 4 under way, {lost} lost: {}",
        cause.map_or_else(String::new, |cause| cause.to_string())
    )))
}

/// A WRITE of everything, compared.
fn again(scene: &mut Scene, seed: u64) -> anyhow::Result<()> {
    let source = scene.pair.me.fill(MINE, seed)?;
    let prepared = scene
        .prepare(Op::Write)
        .context("prepare after the fault")?;
    let transfer = prepared.post(PostOptions::within(WAIT))?;
    transfer.wait(WAIT).context("a transfer after the fault")?;
    let block = usize::try_from(BLOCK)?;
    let mut expected = vec![0; source.len()];
    for (index, bytes) in source.chunks(block).enumerate() {
        expected[(index ^ 1) * block..][..bytes.len()].copy_from_slice(bytes);
    }
    compare_remote(&mut scene.pair, THEIRS, &expected, &[])
}

/// The peer ends its registration while we write to it.
pub(super) fn freed_early(world: &World, place: Place) -> anyhow::Result<Outcome> {
    if let Some(skipped) = world.lacks(place.device().map_or(1, |device| device + 1)) {
        return Ok(skipped);
    }
    let teller = world.teller.clone();
    let mut scene = Scene::new(world, (Place::File(0), place), SLOW_BYTES, PEER_LOSS)?;
    let prepared = scene.prepare(Op::Write)?;
    prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    teller.doing("the peer frees its arena under transfers");
    let transfers = scene.slow(&prepared)?;
    std::thread::park_timeout(UNDER_WAY);
    scene.pair.other.tell(Command::Remove { key: THEIRS })?;
    let mut whole = 0;
    for (index, transfer) in transfers.iter().enumerate() {
        teller.doing(format!("wait for transfer {index}"));
        match transfer.wait(WAIT) {
            Ok(()) => whole += 1,
            Err(TransferError::Rejected(_) | TransferError::Inaccessible { .. }) => {}
            Err(error) => return Err(error).context(format!("transfer {index}")),
        }
    }
    teller.doing("use what was freed");
    let began = Instant::now();
    let refused = loop {
        // The peer's word may still be on its way.
        match prepared.post(PostOptions::within(WAIT)) {
            Err(error) => break error,
            Ok(transfer) => drop(transfer.wait(WAIT)),
        }
        ensure!(
            began.elapsed() < SOON,
            "a freed region can still be posted to"
        );
    };
    ensure!(
        matches!(refused, PostError::RegionReleased { .. }),
        "a post to a freed region: {refused}"
    );
    drop((transfers, prepared));
    teller.doing("use another region");
    scene.pair.me.remove(MINE)?;
    scene.bytes = 1 << 20;
    scene.pair.me.make(MINE, Place::File(0), scene.bytes)?;
    scene.region = RegionId(scene.pair.other.make(THEIRS, place, scene.bytes)?);
    again(&mut scene, world.seed)?;
    drop(scene);
    world.devices_usable()?;
    Ok(Outcome::Passed(format!("{whole} of 4 ended well")))
}

/// Cancelled while it runs: when that is over, the blocks can be used for something else.
pub(super) fn cancelled(world: &World, op: Op, place: Place) -> anyhow::Result<Outcome> {
    if let Some(skipped) = world.lacks(place.device().map_or(1, |device| device + 1)) {
        return Ok(skipped);
    }
    let teller = world.teller.clone();
    const BYTES: usize = SLOW_BYTES / 2;
    let mut scene = Scene::new(world, (Place::File(0), place), BYTES, PEER_LOSS)?;
    let prepared = scene.prepare(op)?;
    prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    let mut longest = Duration::ZERO;
    let mut called_off = 0;
    for time in 0..2u64 {
        teller.doing(format!("cancel, time {time}"));
        let transfers = scene.slow(&prepared)?;
        std::thread::park_timeout(UNDER_WAY / 4);
        let began = Instant::now();
        for transfer in transfers {
            match transfer.cancel() {
                CancelOutcome::Completed => {}
                CancelOutcome::Cancelled => called_off += 1,
                CancelOutcome::Failed(error) => return Err(error).context("cancelled"),
            }
        }
        longest = longest.max(began.elapsed());
        ensure!(longest < SOON, "cancelling took {longest:?}");
        teller.doing(format!("use the blocks for something else, time {time}"));
        let seed = world.seed + time;
        match op {
            Op::Write => scene.pair.other.tell(Command::Fill { key: THEIRS, seed })?,
            Op::Read => drop(scene.pair.me.fill(MINE, seed)?),
        }
        std::thread::park_timeout(Duration::from_millis(80));
        let expected = digest(&contents(seed, 0, BYTES));
        let found = match op {
            Op::Write => scene.pair.other.digest(THEIRS)?,
            Op::Read => digest(&scene.pair.me.bytes(MINE)?),
        };
        ensure!(found == expected, "bytes landed after the end of a cancel");
    }
    ensure!(
        called_off > 0,
        "everything had ended before it was cancelled"
    );
    again(&mut scene, world.seed)?;
    Ok(Outcome::Passed(format!(
        "{called_off} of 8 called off, within {longest:?}"
    )))
}

/// More memory than the device has.
pub(super) fn out_of_memory(world: &World) -> anyhow::Result<Outcome> {
    let pair = world.fresh_pair(Processes::One, PEER_LOSS, &[])?;
    let total = world.devices.first().context("no device")?.memory_bytes;
    for sharing in [DeviceSharing::FileDescriptor, DeviceSharing::Handle] {
        for bytes in [free_bytes(0)? + (1 << 30), 4 * total] {
            world
                .teller
                .doing(format!("ask for {bytes} bytes, {sharing:?}"));
            let config = DeviceArenaConfig::new(0, usize::try_from(bytes)?, "too large");
            match pair.me.agent()?.allocate_device(config.shared_by(sharing)) {
                Err(RegisterError::Device { source, .. }) if source.is_out_of_memory() => {}
                Err(error) => bail!("{bytes} bytes, {sharing:?}: {error}"),
                Ok(_) => bail!("{bytes} bytes, {sharing:?}: the device gave them"),
            }
            world.devices_usable()?;
        }
    }
    Ok(Outcome::Passed("4 refusals".to_owned()))
}

/// A process that does not see the device cannot reach its memory, and says so; it reaches that of the device
/// that it sees, whatever its number there.
pub(super) fn unseen_device(world: &World) -> anyhow::Result<Outcome> {
    if let Some(skipped) = world.lacks(2) {
        return Ok(skipped);
    }
    const BYTES: usize = 1 << 20;
    let uuid = uuid(&world.devices[1].uuid);
    let mut pair = world.fresh_pair(
        Processes::Two,
        PEER_LOSS,
        &[("CUDA_VISIBLE_DEVICES", &uuid)],
    )?;
    pair.me.make(MINE, Place::File(0), BYTES)?;
    pair.me.make(THEIRS, Place::File(1), BYTES)?;
    let source = pair.me.fill(THEIRS, world.seed)?;
    let unseen = reach(&mut pair, MINE, Place::Plain)?;
    ensure!(
        unseen.as_ref().is_some_and(|(unreachable, _)| *unreachable),
        "memory of a device that the other process does not see: {unseen:?}"
    );
    let seen = reach(&mut pair, THEIRS, Place::File(0))?;
    ensure!(seen.is_none(), "memory of a device that it sees: {seen:?}");
    ensure!(
        pair.other.digest(THEIRS)? == digest(&source),
        "it got other bytes"
    );
    let handle = {
        pair.me.make(THEIRS, Place::Handle(1), BYTES)?;
        let source = pair.me.fill(THEIRS, world.seed + 1)?;
        let seen = reach(&mut pair, THEIRS, Place::Handle(0))?;
        ensure!(seen.is_none(), "by a handle: {seen:?}");
        digest(&source)
    };
    ensure!(
        pair.other.digest(THEIRS)? == handle,
        "it got other bytes by a handle"
    );
    drop(pair);
    world.devices_usable()?;
    Ok(Outcome::Passed(
        unseen.map_or_else(String::new, |(_, text)| text),
    ))
}

/// Memory that cannot be shared: the peer says why it cannot reach it.
pub(super) fn unshareable(world: &World) -> anyhow::Result<Outcome> {
    const BYTES: usize = 2 << 20;
    let memory = Unshareable::new(0, BYTES)?;
    let mut pair = world.fresh_pair(Processes::Two, PEER_LOSS, &[])?;
    // SAFETY: `memory` lives until the registration has ended.
    let named = unsafe { DeviceMemory::from_raw(0, memory.address, BYTES) };
    let registration = pair
        .me
        .agent()?
        .register_device(named, RemoteAccess::Open)?;
    pair.me.hold(MINE, registration);
    let reached = reach(&mut pair, MINE, Place::Plain)?;
    pair.me.remove(MINE)?;
    drop(memory);
    let Some((unreachable, text)) = reached else {
        bail!("another process reached memory that cannot be shared");
    };
    ensure!(unreachable, "not said to be unreachable: {text}");
    drop(pair);
    world.devices_usable()?;
    Ok(Outcome::Passed(text))
}

/// Lets the other process READ one of our regions: none when it could, else whether it says that it is
/// unreachable, and what it says.
fn reach(pair: &mut Pair, key: u32, into: Place) -> anyhow::Result<Option<(bool, String)>> {
    let region = pair.me.region(key)?;
    let command = Command::Reach {
        metadata: to_hex(&pair.me.agent()?.metadata().to_bytes()),
        region: region.id().0,
        bytes: region.len(),
        key: THEIRS,
        into,
    };
    match pair.other.ask(command)? {
        Reply::Reached => Ok(None),
        Reply::NotReached { unreachable, text } => Ok(Some((unreachable, text))),
        other => Err(unexpected(&other)),
    }
}

/// The other side of [`reach`].
pub(super) fn reach_for(
    node: &mut super::node::Node,
    metadata: &blockplane_transfer::Metadata,
    (region, bytes): (u64, usize),
    (key, into): (u32, Place),
) -> anyhow::Result<Reply> {
    node.make(key, into, bytes)?;
    let peer = node.agent()?.connect(metadata, WAIT)?;
    let layout = BlockLayout::contiguous(1, bytes as u64);
    let local = LocalBlocks {
        registration: node.region(key)?,
        layout,
        ids: [0].into(),
        layers: 0..1,
    };
    let remote = RemoteBlocks {
        peer: &peer,
        region: RegionId(region),
        layout,
        ids: [0].into(),
        layers: 0..1,
        window: None,
    };
    match node.agent()?.prepare(Op::Read, local, remote) {
        Ok(prepared) => {
            prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
            Ok(Reply::Reached)
        }
        Err(error) => Ok(Reply::NotReached {
            unreachable: matches!(error, PrepareError::Unreachable { .. }),
            text: error.to_string(),
        }),
    }
}

/// A pointer to memory that was freed, in a process of its own.
pub(super) fn bad_pointer(world: &World, place: Place) -> anyhow::Result<Outcome> {
    world
        .teller
        .doing("a process uses memory that it has freed");
    let mut pair = world.fresh_pair(Processes::Two, PEER_LOSS, &[])?;
    let text = match pair.other.ask(Command::BadPointer { place })? {
        Reply::Told { text } => text,
        other => return Err(unexpected(&other)),
    };
    drop(pair);
    world.teller.doing("see whether devices are usable");
    world.devices_usable()?;
    Ok(Outcome::Passed(text))
}

/// The other side of [`bad_pointer`]: in the end its device is lost for it.
pub(super) fn use_freed(node: &mut super::node::Node, place: Place) -> anyhow::Result<Reply> {
    const BYTES: usize = 64 << 20;
    node.make(MINE, place, BYTES)?;
    node.make(THEIRS, Place::Foreign(0), BYTES)?;
    let itself = node.agent()?.metadata();
    let peer = node.agent()?.connect(&itself, WAIT)?;
    let region = node.region(THEIRS)?.id();
    let layout = BlockLayout::contiguous(1024, 64 << 10);
    let ids: std::sync::Arc<[u32]> = (0..1024).map(|id| id ^ 1).collect();
    let prepare = |node: &super::node::Node| {
        let local = LocalBlocks {
            registration: node.region(MINE)?,
            layout,
            ids: (0..1024).into(),
            layers: 0..1,
        };
        let remote = RemoteBlocks {
            peer: &peer,
            region,
            layout,
            ids: ids.clone().into(),
            layers: 0..1,
            window: None,
        };
        anyhow::Ok(node.agent()?.prepare(Op::Write, local, remote))
    };
    let prepared = prepare(node)??;
    prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    node.free_under(THEIRS)?;
    let began = Instant::now();
    let outcome = prepared.post(PostOptions::within(WAIT))?.wait(WAIT);
    let took = began.elapsed();
    let failure = match outcome {
        Err(TransferError::Device(failure)) => failure,
        other => bail!("a transfer into freed memory: {other:?}"),
    };
    ensure!(
        failure.poisoned,
        "the device is not said to be lost: {failure}"
    );
    ensure!(took < SOON, "it was noticed after {took:?}");
    // Everything later is refused, and soon.
    let began = Instant::now();
    let again = prepared.post(PostOptions::within(WAIT))?.wait(WAIT);
    ensure!(
        matches!(again, Err(TransferError::Device(_))),
        "a later transfer: {again:?}"
    );
    let later = prepare(node)?.map(drop);
    ensure!(
        matches!(
            later,
            Err(PrepareError::Cuda(_) | PrepareError::Device { .. } | PrepareError::Kernels { .. })
        ),
        "a later prepare: {later:?}"
    );
    let config = DeviceArenaConfig::new(0, 4096, "later");
    let later = node.agent()?.allocate_device(config).map(drop);
    ensure!(
        matches!(later, Err(RegisterError::Cuda { .. })),
        "a later arena: {later:?}"
    );
    let took = began.elapsed();
    ensure!(took < SOON, "later refusals took {took:?}");
    Ok(Reply::Told {
        text: failure.error.name,
    })
}

/// As `CUDA_VISIBLE_DEVICES` takes it.
fn uuid(bytes: &[u8; 16]) -> String {
    let hex = to_hex(bytes);
    format!(
        "GPU-{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}
