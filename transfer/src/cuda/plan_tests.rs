//! Plans of copies against plain loops: expanded as the kernels do it, they move every byte once, from
//! and to the right place.

use proptest::prelude::*;

use super::kernels::abi::{AXES_MAX, BpPermute, BpSet, CONSECUTIVE};
use super::permute;
use super::plan::{Blocks, Copies, IdTable, Pair, lay_out};
use crate::plan::{
    BlockIds, BlockLayout, KvBlockLayout, KvOrder, KvShape, KvSlice, Order, TensorPair,
};

/// Where a byte goes to, and where it comes from.
type Moved = Vec<(u64, u64)>;

const SRC: u64 = 1 << 40;
const DST: u64 = 1 << 44;
/// Between the regions of two sets.
const APART: u64 = 1 << 32;

fn run(moved: &mut Moved, src: u64, dst: u64, bytes: u64) {
    moved.extend((0..bytes).map(|byte| (dst + byte, src + byte)));
}

fn id(ids: &[u32], table: u32, first: u32, block: u32) -> u64 {
    u64::from(match table {
        CONSECUTIVE => first + block,
        table => ids[(table + block) as usize],
    })
}

/// What the kernels make of a plan, launch by launch and chunk by chunk.
fn chunks(copies: &Copies) -> Moved {
    let mut moved = Moved::new();
    for launch in copies.launches() {
        for chunk in launch {
            let sets = copies.sets.iter();
            let set: &BpSet = sets.rev().find(|set| set.first_chunk <= chunk).unwrap();
            let piece = (chunk - set.first_chunk) / set.chunks_per_piece;
            let within = (chunk - set.first_chunk) % set.chunks_per_piece;
            let (block, layer) = if set.layer_major == 0 {
                (piece / set.layers, piece % set.layers)
            } else {
                (piece % set.blocks, piece / set.blocks)
            };
            assert!(block < set.blocks && layer < set.layers, "{set:?}");
            let offset = u64::from(within) * u64::from(copies.chunk_bytes);
            let bytes = (set.piece_bytes - offset).min(copies.chunk_bytes.into());
            let at = |start, ids, first, by_block, by_layer| {
                let of_block = id(&copies.ids, ids, first, block) * by_block;
                start + of_block + u64::from(layer) * by_layer + offset
            };
            let (s, src_ids, dst_ids) = (set, set.src_ids, set.dst_ids);
            let src = at(s.src, src_ids, s.src_first, s.src_block, s.src_layer);
            let dst = at(s.dst, dst_ids, s.dst_first, s.dst_block, s.dst_layer);
            if copies.aligned {
                assert_eq!((src | dst | bytes) % 16, 0, "{set:?}");
            }
            run(&mut moved, src, dst, bytes);
        }
    }
    moved.sort_unstable();
    moved
}

/// What the permuting kernel makes of a parameter.
fn units(parameter: &BpPermute, ids: &[u32]) -> Moved {
    let p = parameter;
    let axes = &p.axis[..p.axes as usize];
    let mut moved = Moved::new();
    for unit in p.unit_begin..p.unit_end {
        let (mut rest, mut src, mut dst) = (unit, p.src, p.dst);
        for axis in axes.iter().rev() {
            let index = rest % u64::from(axis.count);
            rest /= u64::from(axis.count);
            src += index * axis.src_stride;
            dst += index * axis.dst_stride;
        }
        let block = u32::try_from(rest).unwrap();
        assert!(block < p.blocks);
        src += id(ids, p.src_ids, p.src_first, block) * p.src_block;
        dst += id(ids, p.dst_ids, p.dst_first, block) * p.dst_block;
        let bytes = u64::from(p.run_bytes);
        assert_eq!((src | dst | bytes) % u64::from(p.vector_bytes), 0);
        run(&mut moved, src, dst, bytes);
    }
    moved.sort_unstable();
    moved
}

#[derive(Clone, Debug)]
struct SetCase {
    layouts: [BlockLayout; 2],
    ids: [BlockIds; 2],
    first_layers: [u32; 2],
    layers: u32,
    layer_major: bool,
}

/// A layout with random gaps, block by block or layer by layer.
fn layout(
    blocks: u32,
    layers: u32,
    run_bytes: u64,
    unit: u64,
) -> impl Strategy<Value = BlockLayout> {
    (0u64..4, 0u64..4, 0u64..4, any::<bool>()).prop_map(move |(offset, a, b, block_first)| {
        let (near, far) = (run_bytes + a / 2 * unit, b / 2 * unit);
        let (block_stride, layer_stride) = if block_first {
            (near * u64::from(layers) + far, near)
        } else {
            (near, near * u64::from(blocks) + far)
        };
        BlockLayout {
            offset: offset * unit,
            blocks,
            block_stride,
            layers,
            layer_stride,
            run_bytes,
        }
    })
}

fn block_ids(of: u32, count: u32) -> impl Strategy<Value = BlockIds> {
    let span = (0..=of - count).prop_map(move |first| (first..first + count).into());
    let list = Just((0..of).collect::<Vec<_>>())
        .prop_shuffle()
        .prop_map(move |mut ids| {
            ids.truncate(count as usize);
            std::sync::Arc::<[u32]>::from(ids).into()
        });
    prop_oneof![span, list]
}

fn set_case() -> impl Strategy<Value = SetCase> {
    let shape = (
        1u32..8,
        1u32..5,
        prop_oneof![Just(1u64), Just(16)],
        1u64..300,
    );
    shape.prop_flat_map(|(of, all_layers, unit, runs)| {
        let run_bytes = runs * unit;
        let parts = (1..=of, 1..=all_layers);
        parts.prop_flat_map(move |(count, layers)| {
            let first = 0..=all_layers - layers;
            (
                [
                    layout(of, all_layers, run_bytes, unit),
                    layout(of, all_layers, run_bytes, unit),
                ],
                [block_ids(of, count), block_ids(of, count)],
                [first.clone(), first],
                any::<bool>(),
            )
                .prop_map(move |(layouts, ids, first_layers, layer_major)| SetCase {
                    layouts,
                    ids,
                    first_layers,
                    layers,
                    layer_major,
                })
        })
    })
}

fn kv_side(shape: KvShape, count: u32) -> impl Strategy<Value = (KvBlockLayout, BlockIds)> {
    let orders = prop_oneof![
        Just(KvOrder::LAYER_FIRST_NHD),
        Just(KvOrder::LAYER_FIRST_HND),
        Just(KvOrder::LAYER_FIRST_PAIRED_NHD),
        Just(KvOrder::LAYER_FIRST_PAIRED_HND),
        Just(KvOrder::BLOCK_FIRST_NHD),
        Just(KvOrder::BLOCK_FIRST_HND),
    ];
    let ids = block_ids(shape.blocks, count);
    (orders, 0u64..20, ids).prop_map(move |(order, offset, ids)| {
        let layout = KvBlockLayout::dense(shape, order).unwrap();
        (layout.at(offset), ids)
    })
}

type KvCase = [(KvBlockLayout, BlockIds); 2];

fn kv_case() -> impl Strategy<Value = KvCase> {
    let head_bytes = prop_oneof![1u64..40, Just(64), Just(256), Just(4096), Just(6000)];
    let shape = (1u32..5, 1u32..4, 1u32..3, 1u32..4, 1u32..4, head_bytes);
    shape.prop_flat_map(|(blocks, layers, planes, tokens, heads, head_bytes)| {
        let shape = KvShape {
            blocks,
            layers,
            planes,
            tokens,
            heads,
            head_bytes,
        };
        (1..=blocks).prop_flat_map(move |count| [kv_side(shape, count), kv_side(shape, count)])
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn block_sets_move_every_byte_once(
        cases in proptest::collection::vec(set_case(), 1..5),
        sms in 1u32..140,
    ) {
        let mut expected = Moved::new();
        let mut pairs = Vec::new();
        for (region, case) in (0..).zip(&cases) {
            let [src, dst] = [SRC, DST].map(|start| start + region * APART);
            let [from, to] = &case.layouts;
            for (a, b) in case.ids[0].iter().zip(case.ids[1].iter()) {
                for layer in 0..case.layers {
                    let [i, k] = case.first_layers.map(|first| first + layer);
                    let a = from.run_offset(a, i).unwrap();
                    let b = to.run_offset(b, k).unwrap();
                    run(&mut expected, src + a, dst + b, from.run_bytes);
                }
            }
            let blocks = |end: usize, region| Blocks {
                region,
                layout: case.layouts[end],
                ids: &case.ids[end],
                first_layer: case.first_layers[end],
            };
            pairs.push(Pair {
                src: blocks(0, src),
                dst: blocks(1, dst),
                layers: case.layers,
                order: if case.layer_major { Order::LayerMajor } else { Order::BlockMajor },
            });
        }
        expected.sort_unstable();
        let copies = lay_out(&pairs, sms).unwrap();
        prop_assert_eq!(copies.bytes(), expected.len() as u64);
        prop_assert!(chunks(&copies) == expected, "{:?}", copies);
        let mut pieces = Moved::new();
        for (src, dst, bytes) in copies.each_piece() {
            run(&mut pieces, src, dst, bytes);
        }
        pieces.sort_unstable();
        prop_assert!(pieces == expected, "pieces of {:?}", copies);
    }

    #[test]
    fn rearranging_moves_every_byte_once(case in kv_case()) {
        let [(from, src_ids), (to, dst_ids)] = &case;
        let shape = |axis| from.axis(axis).count;
        use crate::plan::KvAxis::{Heads, Layers, Planes, Tokens};
        let mut expected = Moved::new();
        for (a, b) in src_ids.iter().zip(dst_ids.iter()) {
            for layer in 0..shape(Layers) {
                for plane in 0..shape(Planes) {
                    for token in 0..shape(Tokens) {
                        for head in 0..shape(Heads) {
                            let a = from.head_offset(a, layer, plane, token, head).unwrap();
                            let b = to.head_offset(b, layer, plane, token, head).unwrap();
                            run(&mut expected, SRC + a, DST + b, from.head_bytes);
                        }
                    }
                }
            }
        }
        expected.sort_unstable();
        let select = |layout: &KvBlockLayout, ids: &BlockIds| {
            layout.select(&KvSlice::ALL, ids.clone()).unwrap()
        };
        let pair = TensorPair::new(&select(from, src_ids), &select(to, dst_ids));
        let mut ids = IdTable::default();
        let parameter = permute::lay_out(&pair, SRC, DST, &mut ids).unwrap();
        prop_assert!((1..=AXES_MAX).contains(&(parameter.axes as usize)));
        prop_assert!(units(&parameter, &ids.ids) == expected, "{:?}", parameter);
    }
}

#[test]
fn what_is_contiguous_on_both_sides_becomes_one_piece() {
    let layout = BlockLayout::contiguous(100, 4096);
    let ids: BlockIds = (0..100).into();
    let blocks = |region| Blocks {
        region,
        layout,
        ids: &ids,
        first_layer: 0,
    };
    let pair = Pair {
        src: blocks(SRC),
        dst: blocks(DST),
        layers: 1,
        order: Order::BlockMajor,
    };
    let copies = lay_out(&[pair], 16).unwrap();
    assert_eq!((copies.pieces, copies.piece_bytes_max), (1, 409_600));
    assert!(copies.aligned && copies.ids.is_empty());
}

#[test]
fn large_copies_are_several_launches() {
    let layout = BlockLayout::contiguous(3 << 10, 1 << 20);
    let ids: BlockIds = (0..3 << 10).into();
    let blocks = |region| Blocks {
        region,
        layout,
        ids: &ids,
        first_layer: 0,
    };
    let pair = Pair {
        src: blocks(SRC),
        dst: blocks(DST),
        layers: 1,
        order: Order::BlockMajor,
    };
    let copies = lay_out(&[pair], 16).unwrap();
    let launches: Vec<_> = copies.launches().collect();
    assert_eq!(launches.len(), 3);
    assert_eq!((launches[0].start, launches[2].end), (0, copies.chunks));
    assert!(launches.windows(2).all(|pair| pair[0].end == pair[1].start));
}
