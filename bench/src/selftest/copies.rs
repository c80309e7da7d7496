//! Copies of every form between every two kinds of memory, compared byte for byte with a plain reference.

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{
    Descriptor, Lane, LocalBlocks, Op, PostOptions, PrepareError, Prepared, RegionId, RemoteBlocks,
    RemoteDescriptor, WindowId,
};

use super::{
    case::{self, Blocks, Case, How, Piece},
    link::{Command, Reply, unexpected},
    place::Place,
    random::{Random, contents, digest},
    world::{Outcome, Pair, WAIT, Way, World},
};

/// Odd, so that the ends of regions are not aligned.
pub(super) const ROOM: usize = (4 << 20) + 77;
pub(super) const LOCAL: u32 = 1;
pub(super) const REMOTE: u32 = 2;

/// All copies from and to `local`, to and from `remote`.
pub(super) fn check(
    world: &mut World,
    name: &str,
    way: Way,
    (local, remote): (Place, Place),
) -> anyhow::Result<Outcome> {
    let last = local.device().max(remote.device());
    let on_device = last.is_some();
    if let Some(skipped) = world.lacks(last.map_or(0, |device| device + 1)) {
        return Ok(skipped);
    }
    let mut random = Random::new(world.seed, name);
    let teller = world.teller.clone();
    let pair = world.pair(way)?;
    teller.doing("make regions");
    let (mut images, region) = Images::make(pair, (local, remote), &mut random)?;
    let mut transfers = 0;
    for case in case::all(&mut random, ROOM as u64) {
        for op in [Op::Write, Op::Read] {
            teller.doing(format!(
                "{op:?}, {}, {} pieces",
                case.what,
                case.pieces.len()
            ));
            let run = Run {
                case: &case,
                op,
                region,
                sms: (on_device && random.chance(30)).then(|| random.count(1, 133)),
                on_device,
                pulled: way.pull,
                seed: random.next(),
            };
            run.check(pair, &mut images)
                .with_context(|| format!("{op:?}, {}", case.what))?;
            transfers += 1;
        }
    }
    teller.doing("close regions");
    images.end(pair)?;
    Ok(Outcome::Passed(format!("{transfers} transfers")))
}

/// What the regions of a check hold: `LOCAL` here and `REMOTE` at the other side.
pub(super) struct Images {
    local: Vec<u8>,
    remote: Vec<u8>,
}

impl Images {
    /// Makes both regions, each with contents of its own.
    pub(super) fn make(
        pair: &mut Pair,
        (local, remote): (Place, Place),
        random: &mut Random,
    ) -> anyhow::Result<(Self, RegionId)> {
        pair.me.make(LOCAL, local, ROOM)?;
        let region = RegionId(pair.other.make(REMOTE, remote, ROOM)?);
        let (mine, seed) = (random.next(), random.next());
        pair.other.tell(Command::Fill { key: REMOTE, seed })?;
        let local = pair.me.fill(LOCAL, mine)?;
        let remote = contents(seed, 0, ROOM);
        Ok((Self { local, remote }, region))
    }

    /// Gives the source of an operation new contents.
    pub(super) fn refill(&mut self, pair: &mut Pair, op: Op, seed: u64) -> anyhow::Result<()> {
        match op {
            Op::Write => self.local = pair.me.fill(LOCAL, seed)?,
            Op::Read => {
                self.remote = contents(seed, 0, ROOM);
                pair.other.tell(Command::Fill { key: REMOTE, seed })?;
            }
        }
        Ok(())
    }

    /// Does what the operation was to do, plainly, and compares every byte of both regions.
    pub(super) fn compare(
        &mut self,
        pair: &mut Pair,
        op: Op,
        pieces: &[Piece],
    ) -> anyhow::Result<()> {
        let pieces = pieces.iter();
        let written: Vec<_> = match op {
            Op::Write => {
                let moved = |piece: &Piece| (piece.local, piece.remote, piece.bytes);
                case::apply(&self.local, &mut self.remote, pieces.clone().map(moved));
                pieces.map(|piece| (piece.remote, piece.bytes)).collect()
            }
            Op::Read => {
                let moved = |piece: &Piece| (piece.remote, piece.local, piece.bytes);
                case::apply(&self.remote, &mut self.local, pieces.clone().map(moved));
                pieces.map(|piece| (piece.local, piece.bytes)).collect()
            }
        };
        let (mine, theirs): (&[_], &[_]) = match op {
            Op::Write => (&[], &written),
            Op::Read => (&written, &[]),
        };
        if let Some(text) = case::difference(&self.local, &pair.me.bytes(LOCAL)?, mine) {
            bail!("memory of this side: {text}");
        }
        compare_remote(pair, REMOTE, &self.remote, theirs)
    }

    /// Ends both regions.
    pub(super) fn end(self, pair: &mut Pair) -> anyhow::Result<()> {
        pair.me.remove(LOCAL)?;
        pair.other.tell(Command::Remove { key: REMOTE })
    }
}

/// One transfer.
struct Run<'a> {
    case: &'a Case,
    op: Op,
    region: RegionId,
    sms: Option<u32>,
    /// A device takes part.
    on_device: bool,
    /// The device that is written to does the work.
    pulled: bool,
    /// Of the source's new contents.
    seed: u64,
}

impl Run<'_> {
    fn check(&self, pair: &mut Pair, images: &mut Images) -> anyhow::Result<()> {
        let case = self.case;
        images.refill(pair, self.op, self.seed)?;
        let window = if case.window {
            Some(self.open_window(pair)?)
        } else {
            None
        };
        let prepared = self.prepare(pair, window)?;
        let plan = prepared.plan();
        ensure!(
            !self.on_device || plan.lane == Lane::Cuda,
            "not moved by a device: {plan:?}"
        );
        if self.pulled && self.op == Op::Write {
            ensure!(plan.reason.contains("pulls"), "not pulled: {plan:?}");
        }
        let mut options = PostOptions::within(WAIT);
        options.sms = self.sms;
        let outcome = prepared.post(options)?.wait(WAIT);
        let how = || {
            format!(
                "seed {}, {:?} SMs, planned as: {}",
                self.seed, self.sms, plan.reason
            )
        };
        outcome.with_context(how)?;
        images
            .compare(pair, self.op, &case.pieces)
            .with_context(how)?;
        if let Some(window) = window {
            self.end_window(pair, window)?;
        }
        Ok(())
    }

    fn prepare(&self, pair: &Pair, window: Option<WindowId>) -> Result<Prepared, anyhow::Error> {
        let (agent, registration) = (pair.me.agent()?, pair.me.region(LOCAL)?);
        let region = self.region;
        Ok(match &self.case.how {
            How::Blocks(local, remote) => {
                let Blocks {
                    layout,
                    ids,
                    layers,
                } = local.clone();
                let local = LocalBlocks {
                    registration,
                    layout,
                    ids,
                    layers,
                };
                let Blocks {
                    layout,
                    ids,
                    layers,
                } = remote.clone();
                let peer = &pair.peer;
                let remote = RemoteBlocks {
                    peer,
                    region,
                    layout,
                    ids,
                    layers,
                    window,
                };
                agent.prepare(self.op, local, remote)?
            }
            How::Descriptors => {
                let pieces = self.case.pieces.iter();
                let local: Vec<_> = pieces
                    .clone()
                    .map(|piece| Descriptor {
                        registration,
                        offset: piece.local,
                        bytes: piece.bytes,
                    })
                    .collect();
                let remote: Vec<_> = pieces
                    .map(|piece| RemoteDescriptor {
                        region,
                        offset: piece.remote,
                        window,
                    })
                    .collect();
                agent.prepare_descriptors(self.op, &local, &pair.peer, &remote)?
            }
        })
    }

    /// A window over the blocks of the peer that the copy names.
    fn open_window(&self, pair: &mut Pair) -> anyhow::Result<WindowId> {
        let pieces = self.case.pieces.iter();
        let ranges = pieces.map(|piece| (piece.remote, piece.remote + piece.bytes));
        let ranges = ranges.collect();
        match pair.other.ask(Command::Window {
            key: REMOTE,
            ranges,
        })? {
            Reply::Window { window } => Ok(WindowId(window)),
            other => Err(unexpected(&other)),
        }
    }

    /// Blocks beside the window are refused, and all of them when it is closed.
    fn end_window(&self, pair: &mut Pair, window: WindowId) -> anyhow::Result<()> {
        let How::Blocks(local, remote) = &self.case.how else {
            bail!("windows are for block sets here");
        };
        let beside =
            (0..remote.layout.blocks).find(|id| !remote.ids.iter().any(|named| named == *id));
        let beside = beside.context("the window has all blocks")?;
        let one = |blocks: &Blocks, id: u32| Blocks {
            ids: [id].into(),
            ..blocks.clone()
        };
        let first = local.ids.iter().next().context("no blocks")?;
        let outside = Case {
            how: How::Blocks(one(local, first), one(remote, beside)),
            ..self.case.clone()
        };
        let refused = Run {
            case: &outside,
            ..*self
        }
        .prepare(pair, Some(window));
        let refused = refused
            .err()
            .and_then(|error| error.downcast::<PrepareError>().ok());
        ensure!(
            matches!(refused, Some(PrepareError::OutsideWindow { .. })),
            "a block beside the window: {refused:?}"
        );
        pair.other.tell(Command::CloseWindow)
    }
}

/// Compares a region of the other side with what it should hold.
pub(super) fn compare_remote(
    pair: &mut Pair,
    key: u32,
    expected: &[u8],
    written: &[(u64, u64)],
) -> anyhow::Result<()> {
    if pair.other.digest(key)? == digest(expected) {
        return Ok(());
    }
    let path = std::env::temp_dir().join(format!("blockplane-selftest-{}", std::process::id()));
    pair.other.tell(Command::Dump {
        key,
        path: path.clone(),
    })?;
    let found = std::fs::read(&path).context("cannot read the dump of a region")?;
    let _ = std::fs::remove_file(&path);
    match case::difference(expected, &found, written) {
        Some(text) => bail!("memory of the other side: {text}"),
        None => bail!("memory of the other side was wrong, and right when it was looked at again"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftest::world::{Processes, Teller};

    /// The checks themselves, where there is no GPU.
    #[test]
    fn copies_between_host_arenas_pass() {
        for seed in 0..2 {
            let kernels = blockplane_transfer::KernelConfig::default();
            let mut world = World::new(seed, kernels, Vec::new(), Teller::default());
            let places = (Place::Plain, Place::Plain);
            let outcome = check(&mut world, "test", Processes::One.into(), places).unwrap();
            assert!(matches!(outcome, Outcome::Passed(_)), "{outcome:?}");
        }
    }
}
