//! The arena of a pool and its two addressings: pointers for the engine, strides for transfers.

use blockplane_kvbm::{ArenaError, ArenaPlace, BlockPool, KvArena, PoolConfig};
use blockplane_protocol::{BlockId, DType, KvLayout, LayerIndex, LayoutError, LayoutOrder};
use blockplane_transfer::{Agent, AgentConfig};
use proptest::prelude::*;

fn agent() -> Agent {
    Agent::new(AgentConfig::new("arena-test")).expect("an agent on this host")
}

fn layout(order: LayoutOrder, layers: u32, block_tokens: u32) -> KvLayout {
    KvLayout {
        order,
        ..KvLayout::dense(layers, 2, 4, block_tokens, DType::Bf16)
    }
}

#[test]
fn pointers_and_strides_name_the_same_bytes_and_tile_the_region() {
    let agent = agent();
    proptest!(ProptestConfig::with_cases(20), |(
        block_first: bool, layers in 1..5u32, block_tokens in 1..9u32, blocks in 1..6u32,
    )| {
        let order = if block_first { LayoutOrder::BlockFirst } else { LayoutOrder::LayerFirst };
        let layout = layout(order, layers, block_tokens);
        let arena = KvArena::allocate(&agent, layout.clone(), blocks, "kv").unwrap();
        let region = arena.registration();
        prop_assert_eq!(region.len(), layout.pool_bytes(blocks));
        let strides = arena.transfer_layout();
        strides.validate(region.len() as u64).unwrap();

        let mut starts = Vec::new();
        for block in 0..blocks {
            for layer in 0..layers {
                let start = arena.run_ptr(BlockId(block), LayerIndex(layer));
                let offset = start.addr().get() - region.base_ptr().addr().get();
                prop_assert_eq!(strides.run_offset(block, layer), Some(offset as u64));
                starts.push(offset);
            }
        }
        // `[plane][head][token]` in each run, two planes of two heads.
        let tensor = arena.tensor_layout();
        tensor.validate(region.len() as u64).unwrap();
        let head = usize::try_from(tensor.head_bytes).unwrap();
        for (block, layer) in (0..blocks).flat_map(|block| (0..layers).map(move |layer| (block, layer))) {
            let run = strides.run_offset(block, layer).unwrap();
            let heads = (0..2).flat_map(|plane| (0..2).map(move |head| (plane, head)));
            let tokens = heads.flat_map(|(plane, head)| {
                (0..block_tokens).map(move |token| tensor.head_offset(block, layer, plane, token, head))
            });
            prop_assert!(tokens.eq((run..).step_by(head).take(4 * block_tokens as usize).map(Some)));
        }
        let same = tensor.block_layout().unwrap();
        prop_assert_eq!(u64::from(same.layers) * same.run_bytes, layout.block_bytes() as u64);
        prop_assert_eq!(same.run_offset(blocks - 1, 0), strides.run_offset(blocks - 1, 0));

        starts.sort_unstable();
        let tiles = (0..).step_by(layout.layer_bytes()).take(starts.len());
        prop_assert!(starts.into_iter().eq(tiles));
    });
}

#[test]
fn what_is_written_into_a_run_is_at_its_pointer_and_nowhere_else() {
    let arena =
        KvArena::allocate(&agent(), layout(LayoutOrder::LayerFirst, 3, 4), 4, "kv").unwrap();
    let strides = arena.transfer_layout();
    let run = vec![0xa5; arena.layout().layer_bytes()];
    let offset = strides.run_offset(2, 1).unwrap();
    arena.registration().write_at(offset, &run).unwrap();
    for block in 0..4 {
        for layer in 0..3 {
            let mut bytes = run.clone();
            let offset = strides.run_offset(block, layer).unwrap();
            arena.registration().read_at(offset, &mut bytes).unwrap();
            assert_eq!(bytes == run, (block, layer) == (2, 1));
        }
    }
}

#[test]
#[should_panic(expected = "block 4 layer 0 of an arena of 4 blocks")]
fn a_block_out_of_range_has_no_address() {
    let arena =
        KvArena::allocate(&agent(), layout(LayoutOrder::BlockFirst, 1, 1), 4, "kv").unwrap();
    let _ = arena.run_ptr(BlockId(4), LayerIndex(0));
}

#[test]
fn a_bad_layout_is_refused_by_name() {
    let error = KvArena::allocate(&agent(), layout(LayoutOrder::BlockFirst, 0, 1), 4, "kv-7");
    let error = error.unwrap_err();
    assert!(matches!(
        &error,
        ArenaError::Layout {
            source: LayoutError::Zero("layers"),
            ..
        }
    ));
    assert!(error.to_string().contains("kv-7"), "{error}");
}

/// A handle keeps its pool and the arena alive, whoever else is gone (invariant 3).
#[test]
fn a_block_outlives_everything_else_that_names_its_memory() {
    let agent = agent();
    let arena = KvArena::allocate(&agent, layout(LayoutOrder::BlockFirst, 1, 4), 2, "kv").unwrap();
    let pool = BlockPool::new(arena.clone(), PoolConfig::default());
    assert_eq!(pool.stats().total, 2);
    let block = pool.allocate(1).unwrap().remove(0);
    let registration = arena.registration().clone();
    let weak = std::sync::Arc::downgrade(&arena);
    drop((pool, arena, agent));
    assert!(weak.upgrade().is_some());
    drop(block);
    assert!(weak.upgrade().is_none());
    registration.write_at(0, &[1; 16]).unwrap();
}

#[test]
fn memory_of_a_device_that_is_not_there_is_an_error() {
    let agent = Agent::new(AgentConfig::new("no-such-device")).expect("an agent");
    let layout = KvLayout::dense(2, 2, 8, 4, DType::Bf16);
    let place = ArenaPlace::Device(1_000);
    let error = KvArena::allocate_in(&agent, layout, 4, "g1", place).expect_err("no such device");
    let text = error.to_string();
    assert!(text.starts_with("2048 bytes for arena 'g1': "), "{text}");
}
