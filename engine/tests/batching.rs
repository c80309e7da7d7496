//! A token gets the same bits alone, in a batch, in one chunk or in several (invariant 5).

#[expect(
    dead_code,
    reason = "shared with other test files, which use other parts"
)]
mod common;

use blockplane_engine::model::SequenceSlice;
use blockplane_engine::ops::{Compute, Isa};
use blockplane_protocol::{BlockId, TokenId};
use common::{COMMITTED, HeapKv, Reference, Runner, committed};
use proptest::prelude::*;

/// Every way of computing that this machine has.
fn ways() -> Vec<(Compute, Isa)> {
    [Compute::F32, Compute::Bf16]
        .into_iter()
        .flat_map(|compute| Isa::available().into_iter().map(move |isa| (compute, isa)))
        .collect()
}

fn slice<'a>(tokens: &'a [TokenId], position: usize, blocks: &'a [BlockId]) -> SequenceSlice<'a> {
    SequenceSlice {
        tokens,
        position: u32::try_from(position).expect("short"),
        blocks,
        logits: true,
    }
}

/// Bits, so that a difference in the last place shows.
fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn chunks_of_any_size_give_the_same_bits() {
    for name in COMMITTED {
        let folder = committed(name);
        let prompt = &Reference::read(&folder).prompts[2].ids;
        for (compute, isa) in ways() {
            let mut runner = Runner::new(&folder, compute, 2, Some(isa));
            let blocks = HeapKv::table(0, 1);
            let whole = bits(&runner.step(prompt, 0, &blocks));
            for chunk in [1, 5, 13, 16, 64, 100] {
                let mut logits = Vec::new();
                for (index, tokens) in prompt.chunks(chunk).enumerate() {
                    logits = runner.step(tokens, index * chunk, &blocks);
                }
                assert_eq!(
                    bits(&logits),
                    whole,
                    "{name} {compute:?} {isa} chunk {chunk}"
                );
            }
        }
    }
}

#[test]
fn a_batch_gives_each_sequence_the_bits_that_it_gets_alone() {
    for name in COMMITTED {
        let folder = committed(name);
        let prompts: Vec<Vec<TokenId>> = Reference::read(&folder)
            .prompts
            .into_iter()
            .map(|prompt| prompt.ids)
            .collect();
        for (compute, isa) in ways() {
            let mut runner = Runner::new(&folder, compute, 2, Some(isa));
            let alone: Vec<_> = prompts
                .iter()
                .map(|prompt| bits(&runner.step(prompt, 0, &HeapKv::table(0, 1))))
                .collect();
            // A whole prompt, the last chunk of another, and a decode step, in one batch.
            let tables: Vec<_> = (0..3).map(|index| HeapKv::table(index, 3)).collect();
            runner.step(&prompts[1][..10], 0, &tables[1]);
            let last = prompts[2].len() - 1;
            runner.step(&prompts[2][..last], 0, &tables[2]);
            let batch = [
                slice(&prompts[0], 0, &tables[0]),
                slice(&prompts[1][10..], 10, &tables[1]),
                slice(&prompts[2][last..], last, &tables[2]),
            ];
            let logits = runner
                .executor
                .forward(&batch, &runner.kv, &mut |_| {})
                .expect("a valid batch");
            assert_eq!(logits.rows(), 3);
            for (index, alone) in alone.iter().enumerate() {
                assert_eq!(
                    &bits(logits.row(index)),
                    alone,
                    "{name} {compute:?} {isa} sequence {index}"
                );
            }
        }
    }
}

#[test]
fn threads_do_not_change_the_bits() {
    let folder = committed("llama");
    let prompt = &Reference::read(&folder).prompts[2].ids;
    for compute in [Compute::F32, Compute::Bf16] {
        let of = |threads: usize| {
            let mut runner = Runner::new(&folder, compute, threads, None);
            bits(&runner.step(prompt, 0, &HeapKv::table(0, 1)))
        };
        let one = of(1);
        for threads in [2, 3, 7] {
            assert_eq!(of(threads), one, "{compute:?} with {threads} threads");
        }
    }
}

#[test]
fn every_layer_is_announced_once_and_its_keys_and_values_are_in_place() {
    let folder = committed("qwen3");
    let prompt = &Reference::read(&folder).prompts[0].ids;
    let mut runner = Runner::new(&folder, Compute::F32, 2, None);
    let blocks = HeapKv::table(0, 1);
    let layout = runner.executor.model().kv_layout(common::BLOCK_TOKENS);
    let mut announced = Vec::new();
    let kv = &runner.kv;
    runner
        .executor
        .forward(&[slice(prompt, 0, &blocks)], kv, &mut |layer| {
            // The memory began as NaN: no slot of the prompt may be left so.
            for position in 0..prompt.len() {
                for plane in kv.slots(blocks[position / 16], layer, position % 16) {
                    assert!(plane.iter().all(|x| x.is_finite()), "{layer:?} {position}");
                }
            }
            announced.push(layer.0);
        })
        .expect("a valid batch");
    assert_eq!(announced, (0..layout.layers).collect::<Vec<_>>());
}

#[test]
fn sequences_without_logits_still_write_their_blocks() {
    let folder = committed("llama");
    let prompt = &Reference::read(&folder).prompts[2].ids;
    let mut runner = Runner::new(&folder, Compute::F32, 2, None);
    let blocks = HeapKv::table(0, 1);
    let expected = bits(&runner.step(prompt, 0, &blocks));
    let mut runner = Runner::new(&folder, Compute::F32, 2, None);
    let (first, rest) = prompt.split_at(40);
    let silent = SequenceSlice {
        logits: false,
        ..slice(first, 0, &blocks)
    };
    let logits = runner
        .executor
        .forward(&[silent], &runner.kv, &mut |_| {})
        .expect("a valid batch");
    assert_eq!(logits.rows(), 0);
    assert_eq!(bits(&runner.step(rest, 40, &blocks)), expected);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Random prompts cut at random places beside random neighbours.
    #[test]
    fn random_schedules_give_the_same_bits(
        prompt in prop::collection::vec(0_u32..512, 2..90),
        neighbour in prop::collection::vec(0_u32..512, 1..40),
        cuts in prop::collection::vec(1_usize..30, 1..12),
        fixture in 0..COMMITTED.len(),
        wide in any::<bool>(),
    ) {
        let compute = if wide { Compute::F32 } else { Compute::Bf16 };
        let mut runner = Runner::new(&committed(COMMITTED[fixture]), compute, 2, None);
        let tables: Vec<_> = (0..2).map(|index| HeapKv::table(index, 2)).collect();
        let whole = bits(&runner.step(&prompt, 0, &tables[0]));
        let mut last = Vec::new();
        let (mut at, mut cuts) = (0, cuts.iter().cycle());
        while at < prompt.len() {
            let end = prompt.len().min(at + cuts.next().expect("cycles"));
            let batch = [
                slice(&neighbour, 0, &tables[1]),
                slice(&prompt[at..end], at, &tables[0]),
            ];
            let logits = runner.executor.forward(&batch, &runner.kv, &mut |_| {}).expect("valid");
            last = bits(logits.row(1));
            at = end;
        }
        prop_assert_eq!(last, whole);
    }
}
