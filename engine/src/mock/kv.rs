//! What a mock keeps in its blocks: for each token a name of the whole sequence up to it.
//!
//! In each layer a token has one cell in the key plane and one in the value plane:
//!
//! ```text
//! chain, u64 | token, u32 | tag, u32      little-endian
//! chain[p] = mix(chain[p - 1], p, token)  so it names all tokens up to p, and their places
//! tag      = mix(chain, layer, plane)     so a cell is valid only where it was written for
//! ```

use blockplane_kvbm::KvArena;
use blockplane_protocol::{BlockId, DType, KvLayout, TokenId};
use blockplane_transfer::BlockLayout;
use xxhash_rust::xxh3::xxh3_64;

use crate::model::{ForwardError, SequenceSlice};

const PLANES: usize = 2;
const CELL_BYTES: usize = 16;

/// The chain before the first token.
pub(super) const START: u64 = 0x6d6f_636b_5f6b_7631;

/// Layout of blocks in which each token has one cell per layer and plane.
pub(super) fn layout(layers: u32, block_tokens: u32) -> KvLayout {
    KvLayout::dense(layers, 1, 4, block_tokens, DType::F32)
}

pub(super) fn fingerprint(model_name: &str, vocab_size: u32) -> u64 {
    xxh3_64(format!("mock {model_name} {vocab_size}").as_bytes())
}

/// The chain after one more token.
pub(super) fn extend(chain: u64, position: u32, token: TokenId) -> u64 {
    mix(chain ^ mix(u64::from(position) << 32 | u64::from(token)))
}

/// The cells of one sequence.
pub(super) struct Cells<'a> {
    arena: &'a KvArena,
    strides: BlockLayout,
    /// For error messages: the place of the sequence in its batch.
    sequence: usize,
    blocks: &'a [BlockId],
}

impl<'a> Cells<'a> {
    /// The cells of `slice`, if its block table covers it.
    pub(super) fn of(
        arena: &'a KvArena,
        sequence: usize,
        slice: &SequenceSlice<'a>,
    ) -> Result<Self, ForwardError> {
        let end = slice.position as usize + slice.tokens.len();
        let needed = end.div_ceil(arena.layout().block_tokens as usize);
        if slice.blocks.len() < needed {
            return Err(ForwardError::BlockTable {
                sequence,
                found: slice.blocks.len(),
                needed,
            });
        }
        if let Some(&block) = slice.blocks.iter().find(|block| block.0 >= arena.blocks()) {
            return Err(ForwardError::Block {
                sequence,
                block,
                blocks: arena.blocks(),
            });
        }
        Ok(Self {
            arena,
            strides: arena.transfer_layout(),
            sequence,
            blocks: slice.blocks,
        })
    }

    /// The chain of the first `count` tokens, after a check of all their cells in all layers.
    pub(super) fn verified_chain(&self, count: u32) -> Result<u64, ForwardError> {
        let layout = self.arena.layout();
        let mut run = vec![0; layout.layer_bytes()];
        (0..layout.layers).try_fold(START, |_, layer| {
            let mut chain = START;
            for first in (0..count).step_by(layout.block_tokens as usize) {
                self.read(self.run_offset(layer, first), &mut run);
                let end = count.min(first.saturating_add(layout.block_tokens));
                let (keys, values) = run.split_at(layout.plane_bytes());
                let cells = keys.as_chunks().0.iter().zip(values.as_chunks().0);
                for (position, (key, value)) in (first..end).zip(cells) {
                    let cell = self.cell(key, value, layer, position)?;
                    if cell.chain != extend(chain, position, cell.token) {
                        let found = "the KV of another sequence or place";
                        return Err(self.wrong(layer, position, found));
                    }
                    chain = cell.chain;
                }
            }
            Ok(chain)
        })
    }

    /// The chain of the first `count` tokens, after a check of the last one's cells in the first
    /// layer only.
    pub(super) fn last_chain(&self, count: u32) -> Result<u64, ForwardError> {
        let Some(position) = count.checked_sub(1) else {
            return Ok(START);
        };
        let [mut key, mut value] = [[0; CELL_BYTES]; PLANES];
        self.read(self.cell_offset(0, 0, position), &mut key);
        self.read(self.cell_offset(0, 1, position), &mut value);
        self.cell(&key, &value, 0, position).map(|cell| cell.chain)
    }

    /// Writes the cells of the tokens from `position` on in one layer. `chains` holds the chain
    /// after each of them.
    pub(super) fn write(&self, layer: u32, position: u32, tokens: &[TokenId], chains: &[u64]) {
        for ((position, &token), &chain) in (position..).zip(tokens).zip(chains) {
            for plane in 0..PLANES {
                let cell = Cell { chain, token }.to_bytes(layer, plane);
                let offset = self.cell_offset(layer, plane, position);
                let written = self.arena.registration().write_at(offset, &cell);
                written.expect("cells are inside the arena");
            }
        }
    }

    /// A token's cell, which both planes must agree on.
    fn cell(
        &self,
        key: &[u8; CELL_BYTES],
        value: &[u8; CELL_BYTES],
        layer: u32,
        position: u32,
    ) -> Result<Cell, ForwardError> {
        let read = |bytes: &_, plane| {
            Cell::from_bytes(bytes, layer, plane)
                .ok_or_else(|| self.wrong(layer, position, "bytes that were not written for it"))
        };
        let (key, value) = (read(key, 0)?, read(value, 1)?);
        if key == value {
            Ok(key)
        } else {
            Err(self.wrong(layer, position, "keys and values of different tokens"))
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        let read = self.arena.registration().read_at(offset, into);
        read.expect("runs are inside the arena");
    }

    /// Where the run of a token's block starts in the arena.
    fn run_offset(&self, layer: u32, position: u32) -> u64 {
        let run = self.strides.run_offset(self.block(position).0, layer);
        run.expect("blocks and layers are in range")
    }

    fn cell_offset(&self, layer: u32, plane: usize, position: u32) -> u64 {
        let layout = self.arena.layout();
        let slot = (position % layout.block_tokens) as usize;
        let in_run = plane * layout.plane_bytes() + slot * CELL_BYTES;
        self.run_offset(layer, position) + in_run as u64
    }

    fn block(&self, position: u32) -> BlockId {
        self.blocks[(position / self.arena.layout().block_tokens) as usize]
    }

    fn wrong(&self, layer: u32, position: u32, found: &'static str) -> ForwardError {
        ForwardError::Contents {
            sequence: self.sequence,
            block: self.block(position),
            position,
            layer,
            found,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    chain: u64,
    token: TokenId,
}

impl Cell {
    fn to_bytes(self, layer: u32, plane: usize) -> [u8; CELL_BYTES] {
        let mut bytes = [0; CELL_BYTES];
        bytes[..8].copy_from_slice(&self.chain.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.token.to_le_bytes());
        bytes[12..].copy_from_slice(&self.tag(layer, plane).to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; CELL_BYTES], layer: u32, plane: usize) -> Option<Self> {
        let (chain, rest) = bytes.split_first_chunk()?;
        let (token, tag) = rest.split_first_chunk()?;
        let cell = Self {
            chain: u64::from_le_bytes(*chain),
            token: u32::from_le_bytes(*token),
        };
        (tag == cell.tag(layer, plane).to_le_bytes()).then_some(cell)
    }

    fn tag(self, layer: u32, plane: usize) -> u32 {
        let place = u64::from(layer) << 1 | plane as u64;
        let mixed = mix(self.chain ^ mix(place << 32 | u64::from(self.token)));
        u32::try_from(mixed >> 32).expect("32 bits are left")
    }
}

/// The finaliser of `SplitMix64`.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
