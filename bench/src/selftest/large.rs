//! Large regions and large transfers: places behind 4 GiB, copy engines, several launches.

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{
    BlockLayout, LocalBlocks, Op, PostOptions, Prepared, RegionId, RemoteBlocks,
};

use super::{
    link::{Command, Link},
    place::Place,
    random::{Random, contents},
    world::{Outcome, PEER_LOSS, Pair, Processes, WAIT, World},
};

const SOURCE: u32 = 30;
const TARGET: u32 = 31;
/// Bytes that are looked at beside a contiguous copy.
const GUARD: usize = 4096;

fn place(world: &World) -> Place {
    Place::File(u32::from(world.devices.len() > 1))
}

/// Blocks behind 4 GiB, a few of which move.
pub(super) fn far(world: &World, name: &str) -> anyhow::Result<Outcome> {
    const BLOCK: usize = 1 << 20;
    const BLOCKS: u32 = 5 << 10;
    let mut random = Random::new(world.seed, name);
    let room = BLOCK * BLOCKS as usize;
    let layout = BlockLayout::contiguous(BLOCKS, BLOCK as u64);
    let target = place(world);
    let run = Run::new(world, target, room)?;
    let mut ids = random.ids(BLOCKS, 64);
    ids.extend([BLOCKS - 1, 0, 4095, 4096]);
    ids.sort_unstable();
    ids.dedup();
    let mut to: Vec<u32> = ids.iter().map(|id| id ^ 1).collect();
    to.reverse();
    for op in [Op::Write, Op::Read] {
        for &id in &ids {
            let at = u64::from(id) * BLOCK as u64;
            run.fill_source(op, at, &contents(random.next() ^ u64::from(id), 0, BLOCK))?;
        }
        run.copy(op, layout, (&ids, &to), |plan| {
            ensure!(!plan.contains("copy engines"), "planned as: {plan}");
            Ok(())
        })?;
        for (&from, &to) in ids.iter().zip(&to) {
            let (from, to) = (u64::from(from), u64::from(to));
            run.compare(op, (from * BLOCK as u64, to * BLOCK as u64), BLOCK)
                .with_context(|| format!("{op:?}, block {from} to {to}"))?;
        }
    }
    run.end()?;
    Ok(Outcome::Passed(format!(
        "{} blocks of 1 MiB in 5 GiB",
        ids.len()
    )))
}

/// One contiguous copy, for the copy engines.
pub(super) fn engine(world: &World, name: &str, target: Place) -> anyhow::Result<Outcome> {
    const BYTES: usize = (96 << 20) + 5;
    if let Some(skipped) = world.lacks(target.device().map_or(1, |device| device + 1)) {
        return Ok(skipped);
    }
    let mut random = Random::new(world.seed, name);
    let run = Run::new(world, target, BYTES + 2 * GUARD)?;
    let layout = BlockLayout {
        offset: GUARD as u64 + 3,
        ..BlockLayout::contiguous(1, BYTES as u64 - 16)
    };
    for op in [Op::Write, Op::Read] {
        run.fill_source(op, layout.offset, &contents(random.next(), 0, BYTES - 16))?;
        run.copy(op, layout, (&[0], &[0]), |plan| {
            ensure!(plan.contains("copy engines"), "planned as: {plan}");
            Ok(())
        })?;
        run.compare(op, (layout.offset, layout.offset), BYTES - 16)
            .with_context(|| format!("{op:?}"))?;
        if op == Op::Write {
            // New arenas are full of zeros.
            let end = layout.offset + layout.run_bytes;
            let before = run.target(op, 0, GUARD + 3)?;
            let behind = run.target(op, end, GUARD)?;
            let touched = before.iter().chain(&behind).any(|&byte| byte != 0);
            ensure!(!touched, "bytes beside the copy were written");
        }
    }
    run.end()?;
    Ok(Outcome::Passed("96 MiB".to_owned()))
}

/// More than one launch: scattered blocks of 1.25 GiB.
pub(super) fn launches(world: &World, name: &str) -> anyhow::Result<Outcome> {
    const BLOCK: usize = 256 << 10;
    const BLOCKS: u32 = 5 << 10;
    let mut random = Random::new(world.seed, name);
    let layout = BlockLayout::contiguous(BLOCKS, BLOCK as u64);
    let target = place(world);
    let run = Run::new(world, target, BLOCK * BLOCKS as usize)?;
    let whole = contents(random.next(), 0, BLOCK * BLOCKS as usize);
    run.fill_source(Op::Write, 0, &whole)?;
    let (from, to) = (random.ids(BLOCKS, BLOCKS), random.ids(BLOCKS, BLOCKS));
    let parts = run.copy(Op::Write, layout, (&from, &to), |_| Ok(()))?;
    ensure!(parts > 1, "one launch only");
    run.teller.doing("compare");
    let found = run.target(Op::Write, 0, whole.len())?;
    for (&from, &to) in from.iter().zip(&to) {
        let at = |id: u32| id as usize * BLOCK..(id as usize + 1) * BLOCK;
        if whole[at(from)] != found[at(to)] {
            bail!("block {to} does not have the bytes of block {from}");
        }
    }
    run.end()?;
    Ok(Outcome::Passed(format!("{parts} launches")))
}

/// A pair with two regions of one size.
struct Run {
    pair: Pair,
    region: RegionId,
    teller: super::world::Teller,
}

impl Run {
    fn new(world: &World, target: Place, room: usize) -> anyhow::Result<Self> {
        let teller = world.teller.clone();
        let mut pair = world.fresh_pair(Processes::One, PEER_LOSS, &[])?;
        teller.doing(format!("make two regions of {room} bytes"));
        pair.me.make(SOURCE, Place::File(0), room)?;
        let region = RegionId(pair.other.make(TARGET, target, room)?);
        Ok(Self {
            pair,
            region,
            teller,
        })
    }

    fn regions(&self, op: Op) -> anyhow::Result<[&blockplane_transfer::Registration; 2]> {
        let Link::Here(other) = &self.pair.other else {
            bail!("the other side is to be in this process");
        };
        let (mine, theirs) = (self.pair.me.region(SOURCE)?, other.region(TARGET)?);
        Ok(match op {
            Op::Write => [mine, theirs],
            Op::Read => [theirs, mine],
        })
    }

    fn fill_source(&self, op: Op, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        let [source, _] = self.regions(op)?;
        Ok(source.write_at(at, bytes)?)
    }

    fn target(&self, op: Op, at: u64, bytes: usize) -> anyhow::Result<Vec<u8>> {
        let [_, target] = self.regions(op)?;
        let mut found = vec![0; bytes];
        target.read_at(at, &mut found)?;
        Ok(found)
    }

    /// Moves blocks; returns the number of parts.
    fn copy(
        &self,
        op: Op,
        layout: BlockLayout,
        (from, to): (&[u32], &[u32]),
        planned: impl Fn(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<u32> {
        self.teller
            .doing(format!("{op:?} of {} blocks", from.len()));
        let ids = |ids: &[u32]| std::sync::Arc::<[u32]>::from(ids).into();
        let (mine, theirs) = match op {
            Op::Write => (from, to),
            Op::Read => (to, from),
        };
        let local = LocalBlocks {
            registration: self.pair.me.region(SOURCE)?,
            layout,
            ids: ids(mine),
            layers: 0..1,
        };
        let remote = RemoteBlocks {
            peer: &self.pair.peer,
            region: self.region,
            layout,
            ids: ids(theirs),
            layers: 0..1,
            window: None,
        };
        let prepared: Prepared = self.pair.me.agent()?.prepare(op, local, remote)?;
        planned(&prepared.plan().reason)?;
        prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
        Ok(prepared.plan().parts)
    }

    fn compare(&self, op: Op, (from, to): (u64, u64), bytes: usize) -> anyhow::Result<()> {
        let [source, _] = self.regions(op)?;
        let mut expected = vec![0; bytes];
        source.read_at(from, &mut expected)?;
        let found = self.target(op, to, bytes)?;
        match super::case::difference(&expected, &found, &[(0, bytes as u64)]) {
            Some(text) => bail!("{text}"),
            None => Ok(()),
        }
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.teller.doing("close regions");
        self.pair.me.remove(SOURCE)?;
        self.pair.other.tell(Command::Remove { key: TARGET })
    }
}
