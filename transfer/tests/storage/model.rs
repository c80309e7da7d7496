//! Random operations against a plain model of the file and the memory.

use blockplane_transfer::{Descriptor, DirectIo, FileRanges, Op};
use proptest::prelude::*;

use crate::support::{ENGINES, agent, arena, bytes, disk, file_bytes, fill, open, pattern, run};

const BYTES: usize = 200_000;

/// Ranges that share no byte, as `(offset in memory, offset in file, length)`, in any order.
fn ranges() -> impl Strategy<Value = Vec<(usize, usize, usize)>> {
    proptest::collection::vec(
        (0usize..3, 0usize..6000, 0usize..6000, 1usize..30_000),
        1..8,
    )
    .prop_flat_map(|steps| {
        let (mut memory, mut file, mut out) = (0, 0, Vec::new());
        for (kind, gap_memory, gap_file, bytes) in steps {
            // Touching, aligned, or anywhere.
            let (gap_memory, gap_file, bytes) = match kind {
                0 => (0, 0, bytes),
                1 => (
                    (gap_memory + memory).next_multiple_of(4096) - memory,
                    (gap_file + file).next_multiple_of(4096) - file,
                    bytes.next_multiple_of(4096),
                ),
                _ => (gap_memory, gap_file, bytes),
            };
            memory += gap_memory;
            file += gap_file;
            if memory + bytes > BYTES || file + bytes > BYTES {
                break;
            }
            out.push((memory, file, bytes));
            memory += bytes;
            file += bytes;
        }
        Just(out).prop_shuffle()
    })
    .prop_filter("at least one range", |ranges| !ranges.is_empty())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn memory_and_file_are_what_the_model_says(
        operations in proptest::collection::vec((any::<bool>(), ranges()), 1..4),
        engine in prop::sample::select(&ENGINES[..]),
        direct in prop::sample::select(vec![DirectIo::On, DirectIo::Off]),
        salt in 0u64..1000,
    ) {
        let folder = disk();
        let path = folder.path().join("model");
        let mut file_model = pattern(BYTES, salt);
        std::fs::write(&path, &file_model).unwrap();
        let agent = agent(engine);
        let file = open(&agent, &path, direct);
        let memory = arena(&agent, BYTES);
        let mut memory_model = fill(&memory, salt + 1);
        for (write, ranges) in &operations {
            let local: Vec<_> = ranges
                .iter()
                .map(|&(offset, _, bytes)| Descriptor {
                    registration: &memory,
                    offset: offset as u64,
                    bytes: bytes as u64,
                })
                .collect();
            let offsets: Vec<u64> = ranges.iter().map(|range| range.1 as u64).collect();
            let stored = FileRanges { file: &file, offsets: &offsets, durable: false };
            let op = if *write { Op::Write } else { Op::Read };
            run(&agent.prepare_file_descriptors(op, &local, stored).unwrap()).unwrap();
            for &(m, f, bytes) in ranges {
                if *write {
                    file_model[f..f + bytes].copy_from_slice(&memory_model[m..m + bytes]);
                } else {
                    memory_model[m..m + bytes].copy_from_slice(&file_model[f..f + bytes]);
                }
            }
        }
        prop_assert!(bytes(&memory) == memory_model);
        prop_assert!(file_bytes(&path) == file_model);
    }
}
