//! Transfers after events of the caller's: nothing moves before, the default stream is not stopped, and what
//! is called off while it waits never moves.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use blockplane_transfer::{
    BlockLayout, CancelOutcome, LocalBlocks, Op, PostOptions, Prepared, RegionId, RemoteBlocks,
    Transfer, TransferError,
};

use super::{
    link::Command,
    place::Place,
    raw::{Gate, Stream},
    world::{Outcome, PEER_LOSS, Pair, Processes, WAIT, World},
};

const SOURCE: u32 = 5;
const TARGET: u32 = 6;
const OTHER: u32 = 7;
const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = 64;
const ROOM: usize = 4 << 20;
/// A transfer that waits for an event has not ended after this time.
const NOT_YET: Duration = Duration::from_millis(30);
/// What does not wait for an event takes less than this.
const SOON: Duration = Duration::from_millis(500);

/// Agents with a source on device 0, a target, and a second source.
struct Scene {
    pair: Pair,
    region: RegionId,
    source: u64,
}

impl Scene {
    fn new(world: &World, target: Place) -> anyhow::Result<Self> {
        let mut pair = world.fresh_pair(Processes::One, PEER_LOSS, &[])?;
        pair.me.make(SOURCE, Place::File(0), ROOM)?;
        pair.me.make(OTHER, Place::Handle(0), ROOM)?;
        let region = RegionId(pair.other.make(TARGET, target, ROOM)?);
        pair.me.fill(SOURCE, world.seed)?;
        let device = pair.me.region(SOURCE)?.device();
        let (_, source) = device.context("the source lies on no device")?;
        let scene = Self {
            pair,
            region,
            source,
        };
        // The first transfer compiles, pins and makes streams; none of it is to be measured.
        scene
            .whole(OTHER)?
            .post(PostOptions::within(WAIT))?
            .wait(WAIT)?;
        Ok(scene)
    }

    /// WRITE of all blocks.
    fn whole(&self, from: u32) -> anyhow::Result<Prepared> {
        self.blocks(from, BlockLayout::contiguous(BLOCKS, BLOCK))
    }

    fn blocks(&self, from: u32, layout: BlockLayout) -> anyhow::Result<Prepared> {
        let agent = self.pair.me.agent()?;
        // In reverse, so that the blocks do not merge.
        let ids: Vec<u32> = (0..layout.blocks).rev().collect();
        let ids: std::sync::Arc<[u32]> = ids.into();
        let local = LocalBlocks {
            registration: self.pair.me.region(from)?,
            layout,
            ids: ids.clone().into(),
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
        Ok(agent.prepare(Op::Write, local, remote)?)
    }

    fn target(&self) -> anyhow::Result<Vec<u8>> {
        // Both sides are in this process.
        match &self.pair.other {
            super::link::Link::Here(node) => node.bytes(TARGET),
            super::link::Link::Process(_) => anyhow::bail!("the target is in another process"),
        }
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.pair.me.remove(SOURCE)?;
        self.pair.me.remove(OTHER)?;
        self.pair.other.tell(Command::Remove { key: TARGET })
    }
}

/// Work on a stream of the caller's writes the source; transfers posted after it carry the new bytes.
pub(super) fn order(world: &World, target: Place) -> anyhow::Result<Outcome> {
    if let Some(skipped) = world.lacks(target.device().map_or(1, |device| device + 1)) {
        return Ok(skipped);
    }
    let teller = world.teller.clone();
    let scene = Scene::new(world, target)?;
    let (stream, default) = (Stream::new(0)?, Stream::default_of(0));
    let second = world.devices.len() > 1;
    // All forms of a copy, each of its own part of the source.
    let layouts = [
        ("aligned", BlockLayout::contiguous(16, BLOCK)),
        (
            "unaligned",
            BlockLayout {
                offset: 16 * BLOCK + 1,
                run_bytes: 1023,
                block_stride: 1025,
                layer_stride: 1023,
                ..BlockLayout::contiguous(16, 1)
            },
        ),
        (
            "contiguous",
            BlockLayout {
                offset: 32 * BLOCK,
                ..BlockLayout::contiguous(1, 32 * BLOCK)
            },
        ),
    ];
    let before = scene.target()?;
    let gate = Gate::new(0)?;
    gate.hold(&stream)?;
    // SAFETY: the source region, which stays until the end.
    unsafe { stream.set(scene.source, 0xb7, ROOM) }?;
    let event = stream.record()?;
    teller.doing("post transfers after an event that has not fired");
    let mut posted: Vec<(&str, Transfer)> = Vec::new();
    for (what, layout) in layouts {
        // SAFETY: the event lives until the end of this function, where all of them have ended.
        let after = unsafe { event.for_transfers() };
        let options = PostOptions::within(WAIT).after(after);
        posted.push((what, scene.blocks(SOURCE, layout)?.post(options)?));
    }
    for (what, transfer) in &posted {
        let early = transfer.wait(NOT_YET);
        ensure!(
            matches!(early, Err(TransferError::StillInFlight { .. })),
            "{what}: it ended before the event: {early:?}"
        );
    }
    teller.doing("use the default stream meanwhile");
    let began = Instant::now();
    let other = scene
        .pair
        .me
        .region(OTHER)?
        .device()
        .context("no device")?
        .1;
    // SAFETY: a region of this device that nobody else uses now.
    unsafe { default.set(other, 0x11, ROOM) }?;
    default.wait()?;
    let took = began.elapsed();
    ensure!(took < SOON, "the default stream was stopped for {took:?}");
    teller.doing("do other transfers meanwhile");
    let began = Instant::now();
    let aside = BlockLayout {
        offset: 31 * BLOCK,
        ..BlockLayout::contiguous(1, BLOCK)
    };
    let aside = scene.blocks(OTHER, aside)?;
    aside.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    let took = began.elapsed();
    ensure!(took < SOON, "another transfer was held up for {took:?}");
    teller.doing("let the event fire");
    gate.open();
    for (what, transfer) in &posted {
        transfer.wait(WAIT).with_context(|| (*what).to_owned())?;
    }
    let mut expected = before;
    for (_, layout) in layouts {
        for block in 0..layout.blocks {
            let at = layout.run_offset(block, 0).context("no such block")?;
            let (at, bytes) = (usize::try_from(at)?, usize::try_from(layout.run_bytes)?);
            expected[at..at + bytes].fill(0xb7);
        }
    }
    let (at, bytes) = (usize::try_from(31 * BLOCK)?, usize::try_from(BLOCK)?);
    expected[at..at + bytes].fill(0x11);
    if let Some(text) = super::case::difference(&expected, &scene.target()?, &[]) {
        anyhow::bail!("after the event: {text}");
    }
    drop((posted, aside));
    stream.wait()?;
    scene.end()?;
    let peers = if second { "" } else { ", one device only" };
    Ok(Outcome::Passed(format!("{} forms{peers}", layouts.len())))
}

/// The same after a kernel that computes on every multiprocessor.
pub(super) fn after_work(world: &World) -> anyhow::Result<Outcome> {
    const NANOS: u64 = 60_000_000;
    let teller = world.teller.clone();
    let scene = Scene::new(world, Place::File(0))?;
    let stream = Stream::new(0)?;
    let whole = scene.whole(SOURCE)?;
    for round in 0..5u8 {
        teller.doing(format!("round {round}: compute"));
        let value = u32::from(round + 1) * 0x0101_0101;
        let began = Instant::now();
        // SAFETY: the source region, which stays until the end.
        unsafe { stream.work(scene.source, value, ROOM as u64 / 4, NANOS) }?;
        let event = stream.record()?;
        // SAFETY: the event outlives the transfer, which has ended at the end of this round.
        let after = unsafe { event.for_transfers() };
        let transfer = whole.post(PostOptions::within(WAIT).after(after))?;
        teller.doing(format!("round {round}: wait"));
        transfer.wait(WAIT)?;
        let took = began.elapsed();
        ensure!(
            took >= Duration::from_nanos(NANOS),
            "it ended after {took:?}, before the kernel"
        );
        let expected = vec![round + 1; ROOM];
        if let Some(text) = super::case::difference(&expected, &scene.target()?, &[]) {
            anyhow::bail!("round {round}: {text}");
        }
    }
    drop(whole);
    scene.end()?;
    Ok(Outcome::Passed("5 kernels".to_owned()))
}

/// What waits for an event that does not fire misses its deadline or is cancelled, at once, and moves nothing
/// when the event fires after all.
pub(super) fn never(world: &World, target: Place) -> anyhow::Result<Outcome> {
    const DEADLINE: Duration = Duration::from_millis(100);
    if let Some(skipped) = world.lacks(target.device().map_or(1, |device| device + 1)) {
        return Ok(skipped);
    }
    let teller = world.teller.clone();
    let scene = Scene::new(world, target)?;
    let stream = Stream::new(0)?;
    let gate = Gate::new(0)?;
    gate.hold(&stream)?;
    let event = stream.record()?;
    // SAFETY: the event lives until the end of this function, where all of them have ended.
    let after = || unsafe { event.for_transfers() };
    let whole = scene.whole(SOURCE)?;

    teller.doing("miss a deadline");
    let began = Instant::now();
    let late = whole.post(PostOptions::within(DEADLINE).after(after()))?;
    let outcome = late.wait(WAIT);
    let took = began.elapsed();
    ensure!(
        outcome == Err(TransferError::DeadlineExceeded { deadline: DEADLINE }),
        "at its deadline: {outcome:?}"
    );
    ensure!(
        took >= DEADLINE && took < DEADLINE + SOON,
        "the deadline came after {took:?}"
    );

    teller.doing("cancel");
    let transfer = whole.post(PostOptions::within(WAIT).after(after()))?;
    let early = transfer.wait(NOT_YET);
    ensure!(
        matches!(early, Err(TransferError::StillInFlight { .. })),
        "it ended before the event: {early:?}"
    );
    let began = Instant::now();
    let outcome = transfer.cancel();
    let took = began.elapsed();
    ensure!(
        outcome == CancelOutcome::Cancelled,
        "cancelled: {outcome:?}"
    );
    ensure!(took < SOON, "cancelling took {took:?}");
    teller.doing("drop");
    drop(whole.post(PostOptions::within(WAIT).after(after()))?);

    teller.doing("use the blocks for something else");
    let other = scene.pair.me.fill(OTHER, world.seed + 1)?;
    let began = Instant::now();
    scene
        .whole(OTHER)?
        .post(PostOptions::within(WAIT))?
        .wait(WAIT)?;
    let took = began.elapsed();
    ensure!(took < SOON, "another transfer was held up for {took:?}");
    scene.pair.me.fill(SOURCE, world.seed + 2)?;
    if let Some(text) = super::case::difference(&other, &scene.target()?, &[]) {
        anyhow::bail!("before the event: {text}");
    }
    teller.doing("let the event fire");
    gate.open();
    stream.wait()?;
    std::thread::park_timeout(NOT_YET);
    // Behind everything that was called off.
    whole.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    scene
        .whole(OTHER)?
        .post(PostOptions::within(WAIT))?
        .wait(WAIT)?;
    std::thread::park_timeout(NOT_YET);
    if let Some(text) = super::case::difference(&other, &scene.target()?, &[]) {
        anyhow::bail!("after the event: {text}");
    }
    drop((late, whole));
    scene.end()?;
    Ok(Outcome::Passed("deadline, cancel, drop".to_owned()))
}
