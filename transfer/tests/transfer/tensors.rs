//! Copies that rearrange KV blocks, on every lane.

use std::ops::Range;
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, BlockIds, BlockLayout, CancelOutcome, KvAxis, KvBlockLayout, KvOrder,
    KvShape, KvSlice, Lane, LayoutError, LocalBlocks, LocalTensor, Op, Peer, PostOptions,
    PrepareError, Prepared, Registration, RemoteAccess, RemoteBlocks, RemoteTensor, Side,
    WindowAccess, WindowId, WindowScope,
};

use crate::process::Other;
use crate::support::{
    Blocks, Pair, Setup, WAIT, arena, arena_with, bytes, fill, fill_byte, scattered,
};

const SHAPE: KvShape = KvShape {
    blocks: 12,
    layers: 3,
    planes: 2,
    tokens: 4,
    heads: 8,
    head_bytes: 96,
};

/// One side of an operation.
#[derive(Clone, Debug)]
struct Part {
    layout: KvBlockLayout,
    ids: BlockIds,
    slice: KvSlice,
}

impl Part {
    fn whole(shape: KvShape, order: KvOrder, ids: impl Into<BlockIds>) -> Self {
        Self {
            layout: KvBlockLayout::dense(shape, order).unwrap(),
            ids: ids.into(),
            slice: KvSlice::ALL,
        }
    }

    fn slice(mut self, slice: KvSlice) -> Self {
        self.slice = slice;
        self
    }

    fn end(&self) -> u64 {
        self.layout.end().unwrap()
    }

    /// Where each head of each token lies: token after token of all blocks, and of each its layers,
    /// planes and heads.
    fn heads(&self) -> Vec<usize> {
        let range = |part: &Option<Range<u32>>, axis| {
            part.clone()
                .unwrap_or_else(|| 0..self.layout.axis(axis).count)
        };
        let mut out = Vec::new();
        for block in self.ids.iter() {
            for token in range(&self.slice.tokens, KvAxis::Tokens) {
                for layer in range(&self.slice.layers, KvAxis::Layers) {
                    for plane in range(&self.slice.planes, KvAxis::Planes) {
                        for head in range(&self.slice.heads, KvAxis::Heads) {
                            let at = self.layout.head_offset(block, layer, plane, token, head);
                            out.push(at.unwrap() as usize);
                        }
                    }
                }
            }
        }
        out
    }

    fn local<'a>(&self, registration: &'a Registration) -> LocalTensor<'a> {
        LocalTensor {
            registration,
            layout: self.layout,
            ids: self.ids.clone(),
            slice: self.slice.clone(),
        }
    }

    fn remote<'a>(
        &self,
        peer: &'a Peer,
        region: &Registration,
        window: Option<WindowId>,
    ) -> RemoteTensor<'a> {
        RemoteTensor {
            peer,
            region: region.id(),
            layout: self.layout,
            ids: self.ids.clone(),
            slice: self.slice.clone(),
            window,
        }
    }
}

/// Moves head after head. The side with more room stays as it is behind the other's end.
fn oracle(from: &[u8], a: &Part, to: &mut [u8], b: &Part) {
    let head = a.layout.head_bytes as usize;
    for (x, y) in a.heads().into_iter().zip(b.heads()) {
        to[y..y + head].copy_from_slice(&from[x..x + head]);
    }
}

fn run(prepared: &Prepared) {
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
}

impl Pair {
    fn tensors(
        &self,
        op: Op,
        local: (&Registration, &Part),
        remote: (&Registration, &Part),
        window: Option<WindowId>,
    ) -> Result<Prepared, PrepareError> {
        let there = remote.1.remote(&self.peer, remote.0, window);
        self.a.prepare_tensors(op, local.1.local(local.0), there)
    }

    /// Runs one operation and compares every byte of both regions with the oracle.
    fn check_tensors(
        &self,
        op: Op,
        local: (&Registration, &Part),
        remote: (&Registration, &Part),
    ) -> Prepared {
        fill(local.0, 1);
        fill(remote.0, 2);
        let (mut l, mut r) = (bytes(local.0), bytes(remote.0));
        let prepared = self.tensors(op, local, remote, None).unwrap();
        run(&prepared);
        match op {
            Op::Write => oracle(&l, local.1, &mut r, remote.1),
            Op::Read => oracle(&r, remote.1, &mut l, local.1),
        }
        let case = || format!("{op:?} {:?} {:?} {:?}", local.1, remote.1, prepared.plan());
        assert!(bytes(local.0) == l, "local bytes differ: {}", case());
        assert!(bytes(remote.0) == r, "remote bytes differ: {}", case());
        let head_bytes = local.1.layout.head_bytes;
        let heads = local.1.heads().len().min(remote.1.heads().len()) as u64;
        let plan = prepared.plan();
        assert_eq!(plan.bytes, heads * head_bytes);
        assert!(plan.pieces <= plan.runs, "{plan:?}");
        prepared
    }
}

const ORDERS: [KvOrder; 6] = [
    KvOrder::LAYER_FIRST_NHD,
    KvOrder::LAYER_FIRST_HND,
    KvOrder::LAYER_FIRST_PAIRED_NHD,
    KvOrder::LAYER_FIRST_PAIRED_HND,
    KvOrder::BLOCK_FIRST_NHD,
    KvOrder::BLOCK_FIRST_HND,
];

pub(crate) fn every_arrangement_becomes_every_other(setup: &Setup) {
    let pair = setup.pair();
    let room = Part::whole(SHAPE, ORDERS[0], 0..1).end() + 64;
    let (local, remote) = (arena(&pair.a, room), arena(&pair.b, room));
    for (i, from) in ORDERS.into_iter().enumerate() {
        for (k, to) in ORDERS.into_iter().enumerate() {
            let seed = (i * 6 + k) as u64;
            let mut l = Part::whole(SHAPE, from, scattered(12, 7, seed));
            let mut r = Part::whole(SHAPE, to, scattered(12, 7, seed + 50));
            if seed.is_multiple_of(2) {
                (l.ids, r.ids) = ((2..9).into(), (4..11).into());
            }
            r.layout.offset = 24;
            for op in [Op::Write, Op::Read] {
                let prepared = pair.check_tensors(op, (&local, &l), (&remote, &r));
                assert_eq!(prepared.plan().runs % 7, 0);
            }
        }
    }
}

pub(crate) fn there_and_back_is_what_it_was(setup: &Setup) {
    let pair = setup.pair();
    let nhd = Part::whole(SHAPE, KvOrder::LAYER_FIRST_NHD, 0..12);
    let hnd = Part::whole(SHAPE, KvOrder::BLOCK_FIRST_HND, scattered(12, 12, 3));
    let (first, last) = (arena(&pair.a, nhd.end()), arena(&pair.a, nhd.end()));
    let remote = arena(&pair.b, hnd.end());
    fill(&first, 4);
    run(&pair
        .tensors(Op::Write, (&first, &nhd), (&remote, &hnd), None)
        .unwrap());
    assert!(bytes(&remote) != bytes(&first));
    run(&pair
        .tensors(Op::Read, (&last, &nhd), (&remote, &hnd), None)
        .unwrap());
    assert!(bytes(&last) == bytes(&first));
}

pub(crate) fn parts_of_blocks_pair_up(setup: &Setup) {
    let pair = setup.pair();
    let room = Part::whole(SHAPE, ORDERS[0], 0..1).end();
    let (local, remote) = (arena(&pair.a, room), arena(&pair.b, room));
    let cases = [
        (KvSlice::ALL.heads(0..3), KvSlice::ALL.heads(5..8)),
        (
            KvSlice::ALL.layers(0..1).tokens(1..4),
            KvSlice::ALL.layers(2..3).tokens(0..3),
        ),
        (KvSlice::ALL.planes(0..1), KvSlice::ALL.planes(1..2)),
        (
            KvSlice::ALL.layers(1..3).tokens(2..3).heads(7..8),
            KvSlice::ALL.layers(0..2).tokens(3..4).heads(0..1),
        ),
    ];
    for (i, (mine, theirs)) in cases.into_iter().enumerate() {
        for (from, to) in [(0, 1), (1, 4), (5, 2), (3, 3)] {
            let seed = (i * 4 + from) as u64;
            let l = Part::whole(SHAPE, ORDERS[from], scattered(12, 5, seed)).slice(mine.clone());
            let r =
                Part::whole(SHAPE, ORDERS[to], scattered(12, 5, seed + 9)).slice(theirs.clone());
            for op in [Op::Write, Op::Read] {
                pair.check_tensors(op, (&local, &l), (&remote, &r));
            }
        }
    }
}

/// Two ranks with half of the heads each fill one worker with all of them, and it gives each its
/// half back.
pub(crate) fn ranks_merge_and_split(setup: &Setup) {
    let pair = setup.pair();
    let second = Agent::new(setup.config("second")).unwrap();
    let to_second = second.connect(&pair.b.metadata(), WAIT).unwrap();
    let half = KvShape { heads: 4, ..SHAPE };
    let ids = || scattered(12, 9, 1);
    for (narrow, wide) in [
        (KvOrder::LAYER_FIRST_NHD, KvOrder::BLOCK_FIRST_HND),
        (KvOrder::LAYER_FIRST_NHD, KvOrder::LAYER_FIRST_NHD),
        (KvOrder::BLOCK_FIRST_HND, KvOrder::BLOCK_FIRST_HND),
    ] {
        let mine = Part::whole(half, narrow, ids());
        let theirs = Part::whole(SHAPE, wide, scattered(12, 9, 2));
        let remote = arena(&pair.b, theirs.end());
        fill(&remote, 9);
        let mut expected = bytes(&remote);
        let ranks = [(&pair.a, &pair.peer, 0..4), (&second, &to_second, 4..8)];
        let mut posted = Vec::new();
        for (seed, (agent, peer, heads)) in ranks.iter().enumerate() {
            let source = arena(agent, mine.end());
            fill(&source, seed as u64);
            let part = theirs.clone().slice(KvSlice::ALL.heads(heads.clone()));
            oracle(&bytes(&source), &mine, &mut expected, &part);
            let remote = part.remote(peer, &remote, None);
            let prepared = agent
                .prepare_tensors(Op::Write, mine.local(&source), remote)
                .unwrap();
            let transfer = prepared.post(PostOptions::within(WAIT)).unwrap();
            posted.push((transfer, source, part));
        }
        for (transfer, ..) in &posted {
            transfer.wait(WAIT).unwrap();
        }
        assert!(bytes(&remote) == expected, "{narrow:?} into {wide:?}");
        for ((agent, peer, _), (_, source, part)) in ranks.iter().zip(&posted) {
            let back = arena(agent, mine.end());
            fill(&back, 77);
            let mut same = bytes(&back);
            oracle(&bytes(source), &mine, &mut same, &mine);
            let remote = part.remote(peer, &remote, None);
            let prepared = agent
                .prepare_tensors(Op::Read, mine.local(&back), remote)
                .unwrap();
            run(&prepared);
            assert!(bytes(&back) == same, "{narrow:?} out of {wide:?}");
        }
    }
}

/// Blocks of 4 tokens and blocks of 12, of which the last one is filled in part.
pub(crate) fn blocks_of_different_length(setup: &Setup) {
    let pair = setup.pair();
    let coarse_shape = KvShape {
        tokens: 12,
        ..SHAPE
    };
    for (fine_blocks, coarse_blocks) in [(9, 3), (7, 3), (2, 1)] {
        for (i, k) in [(0, 0), (1, 4), (5, 3), (4, 5)] {
            let fine = Part::whole(SHAPE, ORDERS[i], scattered(12, fine_blocks, 1));
            let coarse = Part::whole(coarse_shape, ORDERS[k], scattered(12, coarse_blocks, 2));
            let (small, large) = (arena(&pair.a, fine.end()), arena(&pair.b, coarse.end()));
            for op in [Op::Write, Op::Read] {
                pair.check_tensors(op, (&small, &fine), (&large, &coarse));
            }
            let (large, small) = (arena(&pair.a, coarse.end()), arena(&pair.b, fine.end()));
            for op in [Op::Write, Op::Read] {
                pair.check_tensors(op, (&large, &coarse), (&small, &fine));
            }
        }
    }
}

pub(crate) fn windows_cover_parts_of_blocks(setup: &Setup) {
    let pair = setup.pair();
    let l = Part::whole(SHAPE, KvOrder::LAYER_FIRST_NHD, [1, 5, 2]);
    let local = arena(&pair.a, l.end());
    fill(&local, 3);
    for order in ORDERS {
        let r = Part::whole(SHAPE, order, [4, 9, 8]);
        let blocks = arena_with(&pair.b, r.end(), RemoteAccess::WindowOnly);
        let lower = r.clone().slice(KvSlice::ALL.heads(0..4));
        let mine = l.clone().slice(KvSlice::ALL.heads(4..8));
        let prepare =
            |part: &Part, window| pair.tensors(Op::Write, (&local, &mine), (&blocks, part), window);
        assert!(matches!(
            prepare(&lower, None),
            Err(PrepareError::WindowRequired { .. })
        ));
        // Blocks.
        let scope = WindowScope::Blocks {
            layout: r.layout.block_layout().unwrap(),
            ids: vec![4, 8, 9],
        };
        let window = pair
            .b
            .open_window(&blocks, scope, WindowAccess::Write)
            .unwrap();
        let prepared = prepare(&lower, Some(window.id())).unwrap();
        let mut expected = bytes(&blocks);
        run(&prepared);
        oracle(&bytes(&local), &mine, &mut expected, &lower);
        assert!(bytes(&blocks) == expected, "{order:?}");
        let other = Part {
            ids: [4, 9, 7].into(),
            ..lower.clone()
        };
        let refused = prepare(&other, Some(window.id())).unwrap_err();
        assert!(
            matches!(refused, PrepareError::OutsideWindow { .. }),
            "{refused}"
        );
        // The last head reaches over the end of the block.
        let mut shifted = r.clone().slice(KvSlice::ALL.heads(4..8));
        shifted.layout.blocks.count -= 1;
        shifted.layout.offset += 96;
        let refused = prepare(&shifted, Some(window.id())).unwrap_err();
        assert!(
            matches!(refused, PrepareError::OutsideWindow { .. }),
            "{refused}"
        );
        let read = pair.tensors(
            Op::Read,
            (&local, &mine),
            (&blocks, &lower),
            Some(window.id()),
        );
        assert!(matches!(read, Err(PrepareError::OutsideWindow { .. })));
        window.close(WAIT).unwrap();
        // Exactly the bytes of these heads.
        let ranges = |part: &Part| {
            let at = part.heads().into_iter();
            WindowScope::Ranges(at.map(|at| at as u64..at as u64 + 96).collect())
        };
        let window = pair
            .b
            .open_window(&blocks, ranges(&lower), WindowAccess::Write)
            .unwrap();
        run(&prepare(&lower, Some(window.id())).unwrap());
        assert!(bytes(&blocks) == expected, "{order:?}");
        let upper = r.clone().slice(KvSlice::ALL.heads(1..5));
        let refused = prepare(&upper, Some(window.id())).unwrap_err();
        assert!(
            matches!(refused, PrepareError::OutsideWindow { .. }),
            "{refused}"
        );
        window.close(WAIT).unwrap();
    }
}

pub(crate) fn tensors_that_do_not_fit_are_named(setup: &Setup) {
    let pair = setup.pair();
    let l = Part::whole(SHAPE, KvOrder::LAYER_FIRST_NHD, [1, 2]);
    let r = Part::whole(SHAPE, KvOrder::BLOCK_FIRST_HND, [3, 4]);
    let (local, remote) = (arena(&pair.a, l.end()), arena(&pair.b, r.end()));
    let refused = |l: &Part, r: &Part| {
        let sides = ((&local, l), (&remote, r));
        pair.tensors(Op::Write, sides.0, sides.1, None).unwrap_err()
    };
    let mismatch = |what, local, remote| PrepareError::Mismatch {
        what,
        local,
        remote,
    };
    for (slice, what, got, of) in [
        (KvSlice::ALL.heads(0..4), "number of heads", 4, 8),
        (KvSlice::ALL.layers(1..2), "number of layers", 1, 3),
        (KvSlice::ALL.planes(1..2), "number of planes", 1, 2),
        (
            KvSlice::ALL.tokens(0..2),
            "number of tokens per block",
            2,
            4,
        ),
    ] {
        assert_eq!(
            refused(&l.clone().slice(slice), &r),
            mismatch(what, got, of)
        );
    }
    let three = Part {
        ids: [1, 2, 3].into(),
        ..l.clone()
    };
    assert_eq!(refused(&three, &r), mismatch("number of blocks", 3, 2));
    let mut wide = l.clone();
    wide.layout.head_bytes = 48;
    assert_eq!(refused(&wide, &r), mismatch("bytes per head", 48, 96));
    let none = |part: &Part| Part {
        ids: [0u32; 0].into(),
        ..part.clone()
    };
    assert_eq!(refused(&none(&l), &none(&r)), PrepareError::Empty);
    let mut odd = r.clone();
    odd.layout.tokens.count = 3;
    assert_eq!(
        refused(&l, &odd),
        mismatch("number of tokens per block", 4, 3)
    );
    let layout = |side, source| PrepareError::Layout { side, source };
    assert_eq!(
        refused(&l, &r.clone().slice(KvSlice::ALL.heads(4..12))),
        layout(
            Side::Remote,
            LayoutError::Slice {
                axis: KvAxis::Heads,
                start: 4,
                end: 12,
                count: 8
            }
        )
    );
    let mut tight = l.clone();
    tight.layout.blocks.stride = 97;
    assert_eq!(
        refused(&tight, &r),
        layout(
            Side::Local,
            LayoutError::AxisOverlap {
                axis: KvAxis::Blocks,
                stride: 97,
                needed: 8 * 96
            }
        )
    );
    let mut long = r.clone();
    long.layout.blocks.count += 1;
    assert!(matches!(
        refused(&l, &long),
        PrepareError::Layout {
            side: Side::Remote,
            source: LayoutError::OutOfRegion { .. }
        }
    ));
    // A block named twice may be read twice, not written.
    let twice = Part {
        ids: [3, 3].into(),
        ..r.clone()
    };
    assert_eq!(
        refused(&l, &twice),
        PrepareError::Overlap {
            offset: 3 * r.layout.blocks.stride
        }
    );
    assert!(
        pair.tensors(Op::Read, (&local, &l), (&remote, &twice), None)
            .is_ok()
    );
}

/// A cache that is rearranged into other blocks of itself, and refused where they are the same.
pub(crate) fn an_agent_rearranges_its_own_memory(setup: &Setup) {
    let pair = setup.pair();
    let own = pair.a.connect(&pair.a.metadata(), WAIT).unwrap();
    let itself = Pair {
        a: pair.a.clone(),
        b: pair.a,
        peer: own,
    };
    let from = Part::whole(SHAPE, KvOrder::BLOCK_FIRST_NHD, [1, 6]);
    let to = Part::whole(SHAPE, KvOrder::BLOCK_FIRST_HND, [7, 2]);
    let region = arena(&itself.a, from.end());
    fill(&region, 1);
    let before = bytes(&region);
    let mut expected = before.clone();
    let prepare = |a: &Part, b: &Part| itself.tensors(Op::Write, (&region, a), (&region, b), None);
    run(&prepare(&from, &to).unwrap());
    oracle(&before, &from, &mut expected, &to);
    assert!(bytes(&region) == expected);
    let same = Part {
        ids: [2, 1].into(),
        ..to
    };
    // The other lanes do not see that both sides are the same memory.
    if setup.lane == Lane::Loopback {
        assert!(matches!(
            prepare(&from, &same),
            Err(PrepareError::Overlap { .. })
        ));
    }
    // Other heads of the same blocks are other bytes.
    let lower = from.clone().slice(KvSlice::ALL.heads(0..4));
    let upper = from.slice(KvSlice::ALL.heads(4..8));
    let before = bytes(&region);
    let mut expected = before.clone();
    run(&prepare(&lower, &upper).unwrap());
    oracle(&before, &lower, &mut expected, &upper);
    assert!(bytes(&region) == expected);
}

/// Memory that is not an arena: copied by the kernel on the shm lane.
pub(crate) fn ordinary_memory_is_rearranged(setup: &Setup) {
    let pair = setup.pair();
    let l = Part::whole(SHAPE, KvOrder::LAYER_FIRST_NHD, scattered(12, 8, 1));
    let r = Part::whole(SHAPE, KvOrder::LAYER_FIRST_HND, scattered(12, 8, 2));
    let room = l.end() as usize;
    let mine = pair.a.register(vec![0; room], RemoteAccess::None).unwrap();
    let theirs = pair.b.register(vec![0; room], RemoteAccess::Open).unwrap();
    for op in [Op::Write, Op::Read] {
        let prepared = pair.check_tensors(op, (&mine, &l), (&theirs, &r));
        let reason = &prepared.plan().reason;
        assert!(
            reason.contains("rearranged in pieces of 96 bytes"),
            "{reason}"
        );
    }
}

/// Layouts that are equal on both sides are moved as `prepare` moves their blocks.
pub(crate) fn equal_layouts_are_planned_as_blocks(setup: &Setup) {
    let pair = setup.pair();
    for order in ORDERS {
        let l = Part::whole(SHAPE, order, scattered(12, 8, 1));
        let r = Part::whole(SHAPE, order, scattered(12, 8, 2));
        let (local, remote) = (arena(&pair.a, l.end()), arena(&pair.b, r.end()));
        let tensors = pair.check_tensors(Op::Write, (&local, &l), (&remote, &r));
        let layout = l.layout.block_layout().unwrap();
        let side = |ids: u64| Blocks {
            layout,
            ids: scattered(12, 8, ids),
            layers: 0..layout.layers,
        };
        let blocks = pair
            .prepare(Op::Write, (&local, &side(1)), (&remote, &side(2)), None)
            .unwrap();
        assert_eq!(tensors.plan(), blocks.plan(), "{order:?}");
    }
}

/// Bytes of a transfer that was called off stay where they are once it has ended.
pub(crate) fn a_rearranging_copy_is_called_off(setup: &Setup) {
    let pair = setup.pair();
    let shape = KvShape {
        blocks: 64,
        layers: 12,
        ..SHAPE
    };
    let l = Part::whole(shape, KvOrder::LAYER_FIRST_NHD, 0..64);
    let r = Part::whole(shape, KvOrder::BLOCK_FIRST_HND, scattered(64, 64, 1));
    let (local, remote) = (arena(&pair.a, l.end()), arena(&pair.b, r.end()));
    fill(&local, 1);
    let prepared = pair
        .tensors(Op::Write, (&local, &l), (&remote, &r), None)
        .unwrap();
    let probe = Blocks::flat(1, 1, &[0]);
    let tail = pair
        .prepare(Op::Write, (&local, &probe), (&remote, &probe), None)
        .unwrap();
    for round in 0..20 {
        fill(&remote, 2);
        let transfer = prepared.post(PostOptions::within(WAIT)).unwrap();
        // Some of it happens: a different amount each time.
        let spin = Instant::now();
        while spin.elapsed() < Duration::from_micros(round * 20) {
            std::hint::spin_loop();
        }
        if matches!(transfer.cancel(), CancelOutcome::Completed) {
            fill(&remote, 2);
            let mut expected = bytes(&remote);
            run(&prepared);
            oracle(&bytes(&local), &l, &mut expected, &r);
            assert!(bytes(&remote) == expected);
        }
        fill_byte(&remote, 0x22);
        // What is still in a socket comes before these.
        for _ in 0..4 {
            run(&tail);
        }
        assert!(bytes(&remote)[1..].iter().all(|byte| *byte == 0x22));
    }
    run(&prepared);
}

/// The other process has nothing to do: its bytes are looked at by reading them back as they are.
fn between_processes(lane: Lane) {
    let other = Other::start(lane);
    let agent = Agent::new(AgentConfig::new("me").with_lanes([lane])).unwrap();
    let peer = agent.connect(&other.metadata, WAIT).unwrap();
    let shape = KvShape {
        blocks: 40,
        layers: 6,
        planes: 2,
        tokens: 16,
        heads: 4,
        head_bytes: 256,
    };
    let wide = KvShape { heads: 8, ..shape };
    let l = Part::whole(shape, KvOrder::LAYER_FIRST_NHD, scattered(40, 33, 1));
    let r = Part::whole(wide, KvOrder::BLOCK_FIRST_HND, scattered(40, 33, 2))
        .slice(KvSlice::ALL.heads(4..8));
    let (source, copy) = (arena(&agent, l.end()), arena(&agent, r.end()));
    let whole = || {
        let all = BlockLayout::contiguous(1, r.end());
        let local = LocalBlocks {
            registration: &copy,
            layout: all,
            ids: [0].into(),
            layers: 0..1,
        };
        let remote = RemoteBlocks {
            peer: &peer,
            region: other.region,
            layout: all,
            ids: [0].into(),
            layers: 0..1,
            window: None,
        };
        run(&agent.prepare(Op::Read, local, remote).unwrap());
        bytes(&copy)
    };
    let remote = || RemoteTensor {
        peer: &peer,
        region: other.region,
        layout: r.layout,
        ids: r.ids.clone(),
        slice: r.slice.clone(),
        window: None,
    };
    fill(&source, 5);
    let sent = bytes(&source);
    let mut expected = whole();
    let write = agent.prepare_tensors(Op::Write, l.local(&source), remote());
    run(&write.unwrap());
    oracle(&sent, &l, &mut expected, &r);
    assert!(whole() == expected);
    fill(&source, 6);
    let mut expected = bytes(&source);
    let read = agent.prepare_tensors(Op::Read, l.local(&source), remote());
    run(&read.unwrap());
    oracle(&sent, &l, &mut expected, &l);
    assert!(bytes(&source) == expected);
}

#[test]
fn between_processes_over_shm() {
    between_processes(Lane::Shm);
}

#[test]
fn between_processes_over_tcp() {
    between_processes(Lane::Tcp);
}
