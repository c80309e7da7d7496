//! Our hashes are those of Dynamo's crates, case by case.

use blockplane_protocol::{PositionalHash, SaltHash, TokenSequence};
use serde::Deserialize;

/// One line of `hash_golden_vectors.jsonl`, recorded from `dynamo-tokens` and `dynamo-kv-hashing`
/// 1.6.1.
#[derive(Deserialize)]
struct Case {
    case: String,
    block_size: usize,
    salt: String,
    lora: String,
    salt_hash: u64,
    block_hashes: Vec<u64>,
    seq_hashes: Vec<u64>,
    plh: Vec<String>,
}

fn cases() -> Vec<Case> {
    include_str!("hash_golden_vectors.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).expect("each line is a case"))
        .collect()
}

/// The recorder hashed as many full blocks as the case lists: of the tokens 1, 2, 3, ... in the case
/// with blocks of 4, of zeros in the case of that name, of 0, 1, 2, ... in the others.
fn tokens(case: &Case) -> Vec<u32> {
    let count = case.block_hashes.len() * case.block_size;
    match case.case.as_str() {
        "zeros" => vec![0; count],
        "plain4" => (1..).take(count).collect(),
        _ => (0..).take(count).collect(),
    }
}

#[test]
fn every_recorded_case_is_reproduced() {
    let cases = cases();
    let names: Vec<&str> = cases.iter().map(|case| case.case.as_str()).collect();
    assert_eq!(
        names,
        [
            "plain16", "plain4", "lora", "salt", "both", "empty", "zeros"
        ]
    );
    for case in &cases {
        let name = &case.case;
        let salt = SaltHash::new(Some(&case.salt), Some(&case.lora));
        assert_eq!(salt.0, case.salt_hash, "{name}: salt");
        let sequence = TokenSequence::from_tokens(&tokens(case), case.block_size, salt);
        let blocks = sequence.blocks();
        let block_hashes: Vec<u64> = blocks.iter().map(|block| block.block.0).collect();
        assert_eq!(block_hashes, case.block_hashes, "{name}: block hashes");
        let sequence_hashes: Vec<u64> = blocks.iter().map(|block| block.sequence.0).collect();
        assert_eq!(sequence_hashes, case.seq_hashes, "{name}: sequence hashes");

        let mut parent = None;
        for ((position, block), expected) in (0..).zip(blocks).zip(&case.plh) {
            let positional = PositionalHash::new(position, block.sequence, parent);
            let positional = positional.expect("the position can be expressed");
            assert_eq!(
                &positional.to_string(),
                expected,
                "{name}: position {position}"
            );
            parent = Some(block.sequence);
        }
        assert_eq!(blocks.len(), case.plh.len(), "{name}: number of blocks");
    }
}

#[test]
fn absent_and_empty_salts_are_the_same() {
    assert_eq!(SaltHash::new(None, None), SaltHash::new(Some(""), Some("")));
    assert_eq!(SaltHash::new(None, None), SaltHash::default());
}

/// The layout of a positional hash changes at 256 and at 65,536 blocks; the fields must stay where
/// the definition puts them, and there is no hash past the last position.
#[test]
fn positional_hashes_keep_their_fields_apart() {
    let sequence = blockplane_protocol::SequenceHash(0x0123_4567_89ab_cdef);
    let parent = blockplane_protocol::SequenceHash(u64::MAX);
    for (position, mode, position_bits, parent_bits) in [
        (0, 0, 8, 54),
        (0xff, 0, 8, 54),
        (0x100, 1, 16, 46),
        (0xffff, 1, 16, 46),
        (0x1_0000, 2, 24, 38),
        (0xff_ffff, 2, 24, 38),
    ] {
        let hash = PositionalHash::new(position, sequence, Some(parent))
            .unwrap()
            .0;
        let field = |low: u32, bits: u32| (hash >> low) & ((1 << bits) - 1);
        assert_eq!(field(126, 2), mode);
        assert_eq!(field(64 + parent_bits, position_bits), u128::from(position));
        assert_eq!(field(parent_bits, 64), u128::from(sequence.0));
        assert_eq!(field(0, parent_bits), (1 << parent_bits) - 1);
    }
    assert_eq!(
        PositionalHash::new(PositionalHash::POSITION_END, sequence, None),
        None
    );
}
