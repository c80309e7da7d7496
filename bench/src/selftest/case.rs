//! Copies to be checked: random block sets and lists of pieces, and a plain reference of what they move.

use std::{ops::Range, sync::Arc};

use blockplane_transfer::{BlockIds, BlockLayout};

use super::random::Random;

/// Bytes that are moved as one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) local: u64,
    pub(super) remote: u64,
    pub(super) bytes: u64,
}

/// One side of a copy of block sets.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    pub(super) layout: BlockLayout,
    pub(super) ids: BlockIds,
    pub(super) layers: Range<u32>,
}

/// How the pieces are said.
#[derive(Clone, Debug)]
pub(super) enum How {
    /// Block sets.
    Blocks(Blocks, Blocks),
    /// One descriptor for each piece.
    Descriptors,
}

/// A copy.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) what: &'static str,
    pub(super) how: How,
    /// What is moved, block by block.
    pub(super) pieces: Vec<Piece>,
    /// Whether the peer's blocks are reached through a window.
    pub(super) window: bool,
}

/// Copies of many forms within regions of `room` bytes.
pub(super) fn all(random: &mut Random, room: u64) -> Vec<Case> {
    let r = random;
    let run = 16 * r.between(32, 1024);
    let layers = r.count(2, 5);
    let fits =
        |run: u64, layers: u32| u32::try_from(room * 9 / 10 / run / u64::from(layers)).unwrap_or(1);
    let blocks = fits(run, layers).min(40);
    let count = r.count(1, blocks.max(2));
    let first = layer_range(r, layers);
    let mut cases = vec![
        sets(
            "block-first to layer-first",
            (
                block_first(0, blocks, layers, run, 0),
                scattered(r, blocks, count),
                0..layers,
            ),
            (
                layer_first(16, blocks, layers, run, 0),
                scattered(r, blocks, count),
                0..layers,
            ),
        ),
        sets(
            "layer-first to padded, some layers",
            (
                layer_first(0, blocks, layers, run, 0),
                scattered(r, blocks, count),
                first.clone(),
            ),
            (
                block_first(48, blocks, layers, run, 0),
                scattered(r, blocks, count),
                first.clone(),
            ),
        ),
    ];
    let large = 16 * r.between(16 << 10, 64 << 10);
    cases.push(one(
        "one block",
        large,
        16 * r.between(0, 1000),
        16 * r.between(0, 1000),
    ));
    // One byte to 1 MiB, anywhere.
    for bytes in [
        1,
        r.between(2, 64),
        r.between(64, 20_000),
        (1 << 20) - r.between(0, 40),
    ] {
        cases.push(one(
            "one block of odd length",
            bytes,
            r.between(0, 3000),
            r.between(0, 3000),
        ));
    }
    let page = 4096;
    let pages = fits(page, 1);
    let some = r.count(1, pages);
    let flat = |offset, blocks, run| block_first(offset, blocks, 1, run, 0);
    cases.push(sets(
        "consecutive ids",
        (flat(0, pages, page), span(r, pages, some), 0..1),
        (flat(4096 - 16, pages, page), span(r, pages, some), 0..1),
    ));
    cases.push(sets(
        "consecutive ids into scattered ones",
        (flat(0, pages, page), span(r, pages, some), 0..1),
        (flat(0, pages, page), scattered(r, pages, some), 0..1),
    ));
    cases.push(sets(
        "scattered ids",
        (flat(64, pages, page), scattered(r, pages, pages / 2), 0..1),
        (flat(0, pages, page), scattered(r, pages, pages / 2), 0..1),
    ));
    let small = 16 * r.between(1, 24);
    cases.push(sets(
        "small blocks",
        (
            block_first(0, 2000, 1, small, 32),
            scattered(r, 2000, 1500),
            0..1,
        ),
        (
            block_first(16, 2000, 1, small, 16),
            scattered(r, 2000, 1500),
            0..1,
        ),
    ));
    let odd = r.between(1, 3000);
    let (a, b) = (r.between(0, 99), r.between(0, 99));
    let blocks = fits(odd + 99, layers).min(50);
    let count = r.count(1, blocks.max(2));
    cases.push(sets(
        "unaligned blocks and layers",
        (
            block_first(a, blocks, layers, odd, b),
            scattered(r, blocks, count),
            first.clone(),
        ),
        (
            layer_first(b, blocks, layers, odd, a),
            scattered(r, blocks, count),
            first,
        ),
    ));
    let blocks = 30;
    let run = 16 * r.between(256, 4096);
    cases.push(Case {
        window: true,
        ..sets(
            "through a window",
            (flat(0, blocks, run), scattered(r, blocks, 20), 0..1),
            (flat(256, blocks, run), scattered(r, blocks, 20), 0..1),
        )
    });
    cases.push(descriptors("descriptors, aligned", r, room, 16));
    cases.push(descriptors("descriptors, unaligned", r, room, 1));
    cases
}

/// Bytes for bytes onto `to` what a copy moves, from `from`.
pub(super) fn apply(from: &[u8], to: &mut [u8], pieces: impl Iterator<Item = (u64, u64, u64)>) {
    for (source, target, bytes) in pieces {
        let (source, target) = (index(source), index(target));
        let bytes = index(bytes);
        to[target..target + bytes].copy_from_slice(&from[source..source + bytes]);
    }
}

/// Where bytes are not what they should be, in words; none when they are. `pieces` are where something was
/// to be written, and how much.
pub(super) fn difference(expected: &[u8], found: &[u8], pieces: &[(u64, u64)]) -> Option<String> {
    let differ = |&at: &usize| expected.get(at) != found.get(at);
    let first = (0..expected.len().max(found.len())).find(differ)?;
    let count = (0..expected.len().max(found.len())).filter(differ).count();
    let last = (first..expected.len().max(found.len())).rev().find(differ);
    let place = (0..)
        .zip(pieces)
        .find(|(_, (start, bytes))| (*start..start + bytes).contains(&(first as u64)))
        .map_or_else(
            || "which nothing was to touch".to_owned(),
            |(index, (start, bytes)): (usize, _)| {
                let within = first as u64 - start;
                format!(
                    "byte {within} of piece {index} of {} ({bytes} bytes at {start})",
                    pieces.len()
                )
            },
        );
    let show = |bytes: &[u8]| {
        let end = bytes.len().min(first + 16);
        super::link::to_hex(&bytes[first.min(end)..end])
    };
    Some(format!(
        "{count} bytes differ, the first at {first}, {place}, the last at {}; there {} instead of {}",
        last.unwrap_or(first),
        show(found),
        show(expected)
    ))
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX)
}

type Side = (BlockLayout, BlockIds, Range<u32>);

fn sets(what: &'static str, local: Side, remote: Side) -> Case {
    let side = |(layout, ids, layers)| Blocks {
        layout,
        ids,
        layers,
    };
    let (local, remote) = (side(local), side(remote));
    let mut pieces = Vec::new();
    for (here, there) in local.ids.iter().zip(remote.ids.iter()) {
        for (mine, theirs) in local.layers.clone().zip(remote.layers.clone()) {
            let at = |layout: &BlockLayout, block: u32, layer: u32| {
                layout.offset
                    + u64::from(block) * layout.block_stride
                    + u64::from(layer) * layout.layer_stride
            };
            pieces.push(Piece {
                local: at(&local.layout, here, mine),
                remote: at(&remote.layout, there, theirs),
                bytes: local.layout.run_bytes,
            });
        }
    }
    Case {
        what,
        how: How::Blocks(local, remote),
        pieces,
        window: false,
    }
}

fn one(what: &'static str, bytes: u64, local: u64, remote: u64) -> Case {
    let at = |offset| (block_first(offset, 1, 1, bytes, 0), [0].into(), 0..1);
    sets(what, at(local), at(remote))
}

/// Pieces of irregular length in irregular places, paired at random.
fn descriptors(what: &'static str, random: &mut Random, room: u64, unit: u64) -> Case {
    let count = random.between(20, 60);
    let most = room / count / unit / 2;
    let mut place = |bytes: u64, at: &mut u64| {
        let start = *at + unit * random.between(0, most / 2);
        *at = start + bytes;
        start
    };
    let mut lengths = Vec::new();
    let mut local_end = 0;
    for _ in 0..count {
        // The length is chosen by the same numbers as the gaps.
        let mut bytes = 0;
        place(0, &mut bytes);
        lengths.push(bytes.max(unit));
    }
    let locals: Vec<u64> = lengths
        .iter()
        .map(|&bytes| place(bytes, &mut local_end))
        .collect();
    let order = random.ids(
        u32::try_from(count).unwrap_or(1),
        u32::try_from(count).unwrap_or(1),
    );
    let mut place = |bytes: u64, at: &mut u64| {
        let start = *at + unit * random.between(0, most / 2);
        *at = start + bytes;
        start
    };
    let mut remote_end = 0;
    let pieces = order
        .iter()
        .map(|&index| {
            let index = index as usize;
            Piece {
                local: locals[index],
                remote: place(lengths[index], &mut remote_end),
                bytes: lengths[index],
            }
        })
        .collect();
    Case {
        what,
        how: How::Descriptors,
        pieces,
        window: false,
    }
}

fn block_first(offset: u64, blocks: u32, layers: u32, run_bytes: u64, gap: u64) -> BlockLayout {
    BlockLayout {
        offset,
        blocks,
        block_stride: run_bytes * u64::from(layers) + gap,
        layers,
        layer_stride: run_bytes,
        run_bytes,
    }
}

fn layer_first(offset: u64, blocks: u32, layers: u32, run_bytes: u64, gap: u64) -> BlockLayout {
    BlockLayout {
        offset,
        blocks,
        block_stride: run_bytes,
        layers,
        layer_stride: run_bytes * u64::from(blocks) + gap,
        run_bytes,
    }
}

fn scattered(random: &mut Random, of: u32, count: u32) -> BlockIds {
    let ids: Arc<[u32]> = random.ids(of, count).into();
    ids.into()
}

fn span(random: &mut Random, of: u32, count: u32) -> BlockIds {
    let first = random.count(0, of - count + 1);
    (first..first + count).into()
}

fn layer_range(random: &mut Random, layers: u32) -> Range<u32> {
    let first = random.count(0, layers);
    first..random.count(first + 1, layers + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_every_seed_lie_in_their_regions_and_write_no_byte_twice() {
        for seed in 0..200 {
            let room = (4 << 20) + 77;
            for case in all(&mut Random::new(seed, "case"), room) {
                for (mine, side) in [(true, "local"), (false, "remote")] {
                    let at = |piece: &Piece| if mine { piece.local } else { piece.remote };
                    let mut ranges: Vec<_> = case
                        .pieces
                        .iter()
                        .map(|piece| at(piece)..at(piece) + piece.bytes)
                        .collect();
                    ranges.sort_by_key(|range| range.start);
                    assert!(!ranges.is_empty(), "{}", case.what);
                    for pair in ranges.windows(2) {
                        assert!(
                            pair[0].end <= pair[1].start,
                            "seed {seed}: {side} {}",
                            case.what
                        );
                    }
                    assert!(
                        ranges
                            .iter()
                            .all(|range| range.end <= room && !range.is_empty())
                    );
                }
                if let How::Blocks(local, remote) = &case.how {
                    local.layout.validate(room).unwrap();
                    remote.layout.validate(room).unwrap();
                }
            }
        }
    }

    #[test]
    fn differences_are_named() {
        let expected = vec![0u8; 100];
        let mut found = expected.clone();
        assert_eq!(difference(&expected, &found, &[]), None);
        found[40] = 1;
        let text = difference(&expected, &found, &[(32, 16)]).unwrap();
        assert!(text.contains("byte 8 of piece 0"), "{text}");
        let text = difference(&expected, &found, &[(0, 16)]).unwrap();
        assert!(text.contains("nothing was to touch"), "{text}");
    }
}
