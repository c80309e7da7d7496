//! The model against what transformers computed for the fixture checkpoints.

#[expect(
    dead_code,
    reason = "shared with other test files, which use other parts"
)]
mod common;

use blockplane_engine::ops::{Compute, Isa};
use common::{
    HeapKv, Prompt, Reference, Runner, all_fixtures, argmax, max_difference, relative_error,
};

const THREADS: usize = 2;

/// Logits after every position of a prompt, each computed as the end of one prefill.
fn logits_of(runner: &mut Runner, prompt: &Prompt) -> Vec<Vec<f32>> {
    let blocks = HeapKv::table(0, 1);
    (1..=prompt.ids.len())
        .map(|end| runner.step(&prompt.ids[..end], 0, &blocks))
        .collect()
}

#[test]
fn float32_logits_are_those_of_transformers() {
    for (name, folder) in all_fixtures() {
        let reference = Reference::read(&folder);
        for isa in [Isa::Portable, Isa::best()] {
            let mut runner = Runner::new(&folder, Compute::F32, THREADS, Some(isa));
            let mut worst = 0.0_f32;
            for prompt in &reference.prompts {
                let logits = logits_of(&mut runner, prompt);
                for (ours, theirs) in logits.iter().zip(&prompt.logits) {
                    worst = worst.max(max_difference(ours, theirs));
                }
            }
            println!("{name} {isa}: largest difference {worst:.2e}");
            assert!(worst < 1e-4, "{name} {isa}: {worst}");
        }
    }
}

#[test]
fn long_prompts_are_as_exact() {
    for (name, folder) in all_fixtures() {
        let long = Reference::read(&folder).long;
        let first = long.ids.len() - long.logits.len();
        for (compute, tolerance) in [(Compute::F32, 1e-4), (Compute::Bf16, f32::MAX)] {
            let mut runner = Runner::new(&folder, compute, THREADS, None);
            let blocks = HeapKv::table(0, 1);
            for (index, theirs) in long.logits.iter().enumerate() {
                // The first in two large chunks, the others as decode steps.
                let end = first + index + 1;
                let ours = if index == 0 {
                    runner.step(&long.ids[..1234], 0, &blocks);
                    runner.step(&long.ids[1234..end], 1234, &blocks)
                } else {
                    runner.step(&long.ids[end - 1..end], end - 1, &blocks)
                };
                let (difference, relative) =
                    (max_difference(&ours, theirs), relative_error(&ours, theirs));
                println!(
                    "{name} {compute:?} position {}: {difference:.2e} {relative:.2e}",
                    end - 1
                );
                assert!(difference < tolerance, "{name} {compute:?}: {difference}");
                assert!(relative < 2e-2, "{name} {compute:?}: {relative}");
            }
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for (name, folder) in all_fixtures() {
        let reference = Reference::read(&folder);
        let mut runner = Runner::new(&folder, Compute::F32, THREADS, None);
        for (index, prompt) in reference.prompts.iter().enumerate() {
            for chunk in [usize::MAX, 7] {
                let steps = prompt.greedy.len();
                let tokens = runner.greedy(&prompt.ids, chunk, steps, &HeapKv::table(0, 1));
                assert_eq!(tokens, prompt.greedy, "{name} prompt {index} chunk {chunk}");
            }
        }
    }
}

#[test]
fn bfloat16_logits_are_near() {
    for (name, folder) in all_fixtures() {
        let reference = Reference::read(&folder);
        for isa in Isa::available() {
            let mut runner = Runner::new(&folder, Compute::Bf16, THREADS, Some(isa));
            let mut worst = 0.0_f32;
            for prompt in &reference.prompts {
                let logits = logits_of(&mut runner, prompt);
                for (ours, theirs) in logits.iter().zip(&prompt.logits) {
                    worst = worst.max(relative_error(ours, theirs));
                }
            }
            println!("{name} {isa}: largest relative error {worst:.2e}");
            assert!(worst < 2e-2, "{name} {isa}: {worst}");
        }
    }
}

#[test]
fn best_token_of_every_position_agrees() {
    // A coarser look than the logits, and one that says what a fault would mean to a user.
    let (name, folder) = all_fixtures().remove(0);
    let reference = Reference::read(&folder);
    let mut runner = Runner::new(&folder, Compute::F32, 1, None);
    for prompt in &reference.prompts {
        for (ours, theirs) in logits_of(&mut runner, prompt).iter().zip(&prompt.logits) {
            assert_eq!(argmax(ours), argmax(theirs), "{name}");
        }
    }
}
