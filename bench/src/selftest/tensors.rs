//! Copies that rearrange KV blocks, between every two arrangements, compared with moving head after head.

use anyhow::{Context, ensure};
use blockplane_transfer::{
    BlockIds, KvAxis, KvBlockLayout, KvOrder, KvShape, KvSlice, Lane, LocalTensor, Op, PostOptions,
    RegionId, RemoteTensor,
};

use super::{
    case::Piece,
    copies::{Images, LOCAL, ROOM},
    place::Place,
    random::Random,
    world::{Outcome, Pair, Processes, WAIT, World},
};

/// Random copies of each check.
const COPIES: usize = 20;

const ORDERS: [KvOrder; 6] = [
    KvOrder::LAYER_FIRST_NHD,
    KvOrder::LAYER_FIRST_HND,
    KvOrder::LAYER_FIRST_PAIRED_NHD,
    KvOrder::LAYER_FIRST_PAIRED_HND,
    KvOrder::BLOCK_FIRST_NHD,
    KvOrder::BLOCK_FIRST_HND,
];

/// Rearranging copies of random shapes.
pub(super) fn check(
    world: &mut World,
    name: &str,
    processes: Processes,
    (local, remote): (Place, Place),
) -> anyhow::Result<Outcome> {
    let last = local.device().max(remote.device());
    if let Some(skipped) = world.lacks(last.map_or(0, |device| device + 1)) {
        return Ok(skipped);
    }
    let mut random = Random::new(world.seed, name);
    let teller = world.teller.clone();
    let pair = world.pair(processes)?;
    teller.doing("make regions");
    let (mut images, region) = Images::make(pair, (local, remote), &mut random)?;
    let mut rearranged = 0;
    for _ in 0..COPIES {
        let (here, there, shapes) = sides(&mut random)?;
        for op in [Op::Write, Op::Read] {
            teller.doing(format!("{op:?}, {shapes}"));
            let seed = random.next();
            let copy = Copy {
                here: &here,
                there: &there,
                op,
                region,
                on_device: last.is_some(),
                seed,
            };
            let by_rearranging = copy
                .check(pair, &mut images)
                .with_context(|| format!("{op:?}, {shapes}, seed {seed}"))?;
            rearranged += usize::from(by_rearranging);
        }
    }
    ensure!(
        rearranged > COPIES / 4,
        "only {rearranged} copies rearranged"
    );
    teller.doing("close regions");
    images.end(pair)?;
    Ok(Outcome::Passed(format!(
        "{} transfers, {rearranged} of them rearranged",
        2 * COPIES
    )))
}

/// A part of the blocks of a cache.
struct Part {
    layout: KvBlockLayout,
    ids: BlockIds,
    slice: KvSlice,
}

struct Copy<'a> {
    here: &'a Part,
    there: &'a Part,
    op: Op,
    region: RegionId,
    on_device: bool,
    seed: u64,
}

impl Copy<'_> {
    /// Runs it and compares; true when it was one that rearranges.
    fn check(&self, pair: &mut Pair, images: &mut Images) -> anyhow::Result<bool> {
        let (here, there) = (self.here, self.there);
        images.refill(pair, self.op, self.seed)?;
        let local = LocalTensor {
            registration: pair.me.region(LOCAL)?,
            layout: here.layout,
            ids: here.ids.clone(),
            slice: here.slice.clone(),
        };
        let remote = RemoteTensor {
            peer: &pair.peer,
            region: self.region,
            layout: there.layout,
            ids: there.ids.clone(),
            slice: there.slice.clone(),
            window: None,
        };
        let prepared = pair.me.agent()?.prepare_tensors(self.op, local, remote)?;
        let plan = prepared.plan();
        ensure!(
            !self.on_device || plan.lane == Lane::Cuda,
            "not moved by a device: {plan:?}"
        );
        let how = || format!("planned as: {}", plan.reason);
        let outcome = prepared.post(PostOptions::within(WAIT))?.wait(WAIT);
        outcome.with_context(how)?;
        images
            .compare(pair, self.op, &pieces(here, there)?)
            .with_context(how)?;
        Ok(plan.reason.contains("rearrange"))
    }
}

/// Both sides of a random copy, and what they are in words.
fn sides(random: &mut Random) -> anyhow::Result<(Part, Part, String)> {
    let pick = |random: &mut Random, of: &[u32]| {
        let index = random.next() % of.len() as u64;
        of[usize::try_from(index).unwrap_or(0)]
    };
    let shape = KvShape {
        blocks: random.count(3, 12),
        layers: random.count(1, 4),
        planes: random.count(1, 3),
        tokens: pick(random, &[1, 3, 4, 16]),
        heads: pick(random, &[1, 2, 4, 8]),
        head_bytes: pick(random, &[2, 6, 32, 64, 96, 128, 256]).into(),
    };
    let mut shape = shape;
    if u64::from(shape.tokens) * shape.head_bytes > 2048 {
        shape.heads = shape.heads.min(4);
    }
    let order = |random: &mut Random| ORDERS[random.count(0, 6) as usize];
    let (from, to) = (order(random), order(random));
    let count = random.count(1, shape.blocks + 1);
    let (mut mine, mut theirs) = (shape, shape);
    let (mut here, mut there) = (KvSlice::ALL, KvSlice::ALL);
    let mut their_count = count;
    let how = match random.next() % 4 {
        // This side has some of the heads of the other one, or the other way round.
        0 if shape.heads > 1 => {
            mine.heads = shape.heads / 2;
            let first = random.count(0, shape.heads - mine.heads + 1);
            there = there.heads(first..first + mine.heads);
            "some heads of theirs"
        }
        1 if shape.heads > 1 => {
            theirs.heads = shape.heads / 2;
            let first = random.count(0, shape.heads - theirs.heads + 1);
            here = here.heads(first..first + theirs.heads);
            "some heads of ours"
        }
        2 => {
            theirs.tokens = shape.tokens * 3;
            their_count = count.div_ceil(3);
            "longer blocks there"
        }
        _ => {
            let (first, theirs_first) =
                (random.count(0, shape.layers), random.count(0, shape.layers));
            let layers = shape.layers - first.max(theirs_first);
            here = here.layers(first..first + layers);
            there = there.layers(theirs_first..theirs_first + layers);
            "some layers"
        }
    };
    // Whole heads only are aligned to anything.
    let offset = |random: &mut Random| 16 * random.between(0, 50) + u64::from(random.chance(20));
    let part = |random: &mut Random, shape: KvShape, order, slice, count| {
        let layout = KvBlockLayout::dense(shape, order)?.at(offset(random));
        let fits = layout.end().is_some_and(|end| end <= ROOM as u64);
        ensure!(fits, "{shape:?} does not fit");
        let ids = random.ids(shape.blocks, count);
        anyhow::Ok(Part {
            layout,
            ids: std::sync::Arc::<[u32]>::from(ids).into(),
            slice,
        })
    };
    let text = format!("{count} blocks of {mine:?} {from:?} and {theirs:?} {to:?}, {how}");
    Ok((
        part(random, mine, from, here, count)?,
        part(random, theirs, to, there, their_count)?,
        text,
    ))
}

/// Head after head: token after token of all blocks, and of each its layers, planes and heads.
fn pieces(here: &Part, there: &Part) -> anyhow::Result<Vec<Piece>> {
    let (mine, theirs) = (heads(here)?, heads(there)?);
    Ok(mine
        .into_iter()
        .zip(theirs)
        .map(|(local, remote)| Piece {
            local,
            remote,
            bytes: here.layout.head_bytes,
        })
        .collect())
}

fn heads(part: &Part) -> anyhow::Result<Vec<u64>> {
    let KvSlice {
        layers,
        planes,
        tokens,
        heads,
    } = &part.slice;
    let range = |named: &Option<std::ops::Range<u32>>, axis| {
        let all = 0..part.layout.axis(axis).count;
        named.clone().unwrap_or(all)
    };
    let mut out = Vec::new();
    for block in part.ids.iter() {
        for token in range(tokens, KvAxis::Tokens) {
            for layer in range(layers, KvAxis::Layers) {
                for plane in range(planes, KvAxis::Planes) {
                    for head in range(heads, KvAxis::Heads) {
                        let at = part.layout.head_offset(block, layer, plane, token, head);
                        out.push(at.context("a head that the layout does not have")?);
                    }
                }
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftest::world::Teller;

    #[test]
    fn copies_that_rearrange_host_arenas_pass() {
        for seed in 0..2 {
            let kernels = blockplane_transfer::KernelConfig::default();
            let mut world = World::new(seed, kernels, Vec::new(), Teller::default());
            let places = (Place::Plain, Place::Plain);
            let outcome = check(&mut world, "test", Processes::One, places).unwrap();
            assert!(matches!(outcome, Outcome::Passed(_)), "{outcome:?}");
        }
    }
}
