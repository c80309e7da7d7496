//! A few small copies by every kernel, in one process: for tools that look at every access of a kernel and
//! slow it down a hundred times.

use anyhow::{Context, ensure};
use blockplane_transfer::{
    BlockLayout, Descriptor, KvBlockLayout, KvOrder, KvShape, KvSlice, LocalBlocks, LocalTensor,
    Op, PostOptions, Prepared, RegionId, RemoteBlocks, RemoteDescriptor, RemoteTensor,
};

use super::{
    link::Command,
    place::Place,
    raw::{Event, Stream},
    world::{Outcome, PEER_LOSS, Pair, Processes, WAIT, World},
};

const SOURCE: u32 = 50;
const TARGET: u32 = 51;
const ROOM: usize = 256 << 10;

/// One process, one device, and host memory.
pub(super) fn copies(world: &World, target: Place) -> anyhow::Result<Outcome> {
    let mut pair = world.fresh_pair(Processes::One, PEER_LOSS, &[])?;
    pair.me.make(SOURCE, Place::File(0), ROOM)?;
    let region = RegionId(pair.other.make(TARGET, target, ROOM)?);
    let stream = Stream::new(0)?;
    let event = stream.record()?;
    let mut count = 0;
    for op in [Op::Write, Op::Read] {
        for (what, prepared) in prepare(&pair, region, op)? {
            for guarded in [false, true] {
                for sms in [1, 4, 16] {
                    world
                        .teller
                        .doing(format!("{op:?}, {what}, {sms} SMs, guarded: {guarded}"));
                    let transfer = prepared.post(options(&event, guarded, sms))?;
                    // Tools make a launch take seconds.
                    transfer.wait(6 * WAIT).with_context(|| what.to_owned())?;
                    count += 1;
                }
            }
        }
    }
    // The last thing that was written whole.
    let source = pair.me.fill(SOURCE, world.seed)?;
    let whole = Side {
        layout: BlockLayout::contiguous(16, 16 << 10),
        ids: 0..16,
    };
    let prepared = blocks(&pair, region, Op::Write, &whole, &whole)?;
    prepared
        .post(PostOptions::within(6 * WAIT))?
        .wait(6 * WAIT)?;
    drop(prepared);
    ensure!(
        pair.other.digest(TARGET)? == super::random::digest(&source),
        "other bytes arrived"
    );
    pair.me.remove(SOURCE)?;
    pair.other.tell(Command::Remove { key: TARGET })?;
    Ok(Outcome::Passed(format!("{count} transfers")))
}

fn options(event: &Event, guarded: bool, sms: u32) -> PostOptions {
    let options = PostOptions::within(6 * WAIT).sms(sms);
    if guarded {
        // SAFETY: the event lives until the end of the check, when every transfer has ended.
        options.after(unsafe { event.for_transfers() })
    } else {
        options
    }
}

/// Blocks of one side, by falling ids there and rising ones here.
struct Side {
    layout: BlockLayout,
    ids: std::ops::Range<u32>,
}

fn blocks(
    pair: &Pair,
    region: RegionId,
    op: Op,
    mine: &Side,
    theirs: &Side,
) -> anyhow::Result<Prepared> {
    let layers = 0..mine.layout.layers;
    let local = LocalBlocks {
        registration: pair.me.region(SOURCE)?,
        layout: mine.layout,
        ids: mine.ids.clone().into(),
        layers: layers.clone(),
    };
    let remote = RemoteBlocks {
        peer: &pair.peer,
        region,
        layout: theirs.layout,
        ids: theirs.ids.clone().into(),
        layers,
        window: None,
    };
    Ok(pair.me.agent()?.prepare(op, local, remote)?)
}

/// A copy of every form.
fn prepare(pair: &Pair, region: RegionId, op: Op) -> anyhow::Result<Vec<(&'static str, Prepared)>> {
    let agent = pair.me.agent()?;
    let registration = pair.me.region(SOURCE)?;
    let layers = |offset, block_stride, layer_stride, run_bytes| Side {
        layout: BlockLayout {
            offset,
            blocks: 12,
            block_stride,
            layers: 2,
            layer_stride,
            run_bytes,
        },
        ids: 0..12,
    };
    let mut all = vec![
        (
            "aligned block sets",
            blocks(
                pair,
                region,
                op,
                &layers(0, 8192, 4096, 4096),
                &layers(16, 4096, 65536, 4096),
            )?,
        ),
        (
            "unaligned block sets",
            blocks(
                pair,
                region,
                op,
                &layers(1, 2100, 1050, 1003),
                &layers(3, 1003, 13001, 1003),
            )?,
        ),
        (
            "unaligned block sets, more than one CTA has room for",
            blocks(
                pair,
                region,
                op,
                &layers(1, 10_100, 5050, 5003),
                &layers(3, 5003, 61_001, 5003),
            )?,
        ),
    ];
    for (what, unit, odd) in [
        ("aligned descriptors", 16, 0),
        ("unaligned descriptors", 1, 1),
    ] {
        let piece = |index: u64| {
            (
                index * 12_000 + odd,
                (20 - index) * 12_000,
                (index * 500 + 40) / unit * unit,
            )
        };
        let pieces = (1..12).map(piece);
        let local: Vec<_> = pieces
            .clone()
            .map(|(offset, _, bytes)| Descriptor {
                registration,
                offset,
                bytes,
            })
            .collect();
        let remote: Vec<_> = pieces
            .map(|(_, offset, _)| RemoteDescriptor {
                region,
                offset,
                window: None,
            })
            .collect();
        all.push((
            what,
            agent.prepare_descriptors(op, &local, &pair.peer, &remote)?,
        ));
    }
    for (what, head_bytes) in [("heads of 64 bytes", 64), ("heads of 6 bytes", 6)] {
        let shape = KvShape {
            blocks: 4,
            layers: 2,
            planes: 2,
            tokens: 4,
            heads: 4,
            head_bytes,
        };
        let local = LocalTensor {
            registration,
            layout: KvBlockLayout::dense(shape, KvOrder::LAYER_FIRST_NHD)?,
            ids: [3, 0, 2].into(),
            slice: KvSlice::ALL,
        };
        let remote = RemoteTensor {
            peer: &pair.peer,
            region,
            layout: KvBlockLayout::dense(shape, KvOrder::BLOCK_FIRST_HND)?,
            ids: [1, 3, 0].into(),
            slice: KvSlice::ALL,
            window: None,
        };
        all.push((what, agent.prepare_tensors(op, local, remote)?));
    }
    Ok(all)
}
