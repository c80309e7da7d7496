//! Leader and ranks: joined outcomes, bad links, and real processes that are killed.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: a panic is the report, and numbers are small"
)]

#[path = "ranks/links.rs"]
mod links;
#[path = "ranks/process.rs"]
mod process;

use std::time::Duration;

use blockplane_kvbm::{
    Fingerprint, MoveKind, MoveSpec, RankShape,
    tier::{MoveId, MovedBlock},
};
use blockplane_protocol::{DType, DpRank, KvLayout, SaltHash, TokenSequence};

const BLOCKS: u32 = 16;

fn layout() -> KvLayout {
    KvLayout::dense(2, 2, 8, 4, DType::F16)
}

fn shape(rank: u32, size: u32) -> RankShape {
    RankShape {
        fingerprint: Fingerprint::of(7, &layout(), rank, size),
        device_blocks: BLOCKS,
        host_blocks: BLOCKS,
        disk_blocks: BLOCKS,
    }
}

/// A move of `count` blocks of one sequence, from ids `from..` to ids `to..`.
fn spec(kind: MoveKind, from: u32, to: u32, count: u32, time: Duration) -> MoveSpec {
    let tokens: Vec<u32> = (0..count * 4).collect();
    let names = TokenSequence::from_tokens(&tokens, 4, SaltHash::default());
    let names = names.blocks();
    let parents = std::iter::once(None).chain(names.iter().map(|name| Some(name.sequence)));
    MoveSpec {
        id: MoveId(u64::from(from)),
        kind,
        rank: DpRank(0),
        blocks: (0..)
            .zip(names.iter().zip(parents))
            .map(|(at, (name, parent))| MovedBlock {
                from: from + at,
                to: to + at,
                name: *name,
                parent,
            })
            .collect(),
        time,
    }
}
