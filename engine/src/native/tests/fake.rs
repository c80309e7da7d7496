//! A stand-in for a model that computes with nothing but the bytes of the arena: each layer's value
//! of a token depends on that layer's values of all earlier tokens, as in a transformer. A byte that
//! is missing, late or of another request changes the tokens that come out.

use std::sync::Arc;

use blockplane_kvbm::KvArena;
use blockplane_protocol::{BlockId, DType, KvLayout, LayerIndex, TokenId};

use crate::{
    model::{ForwardError, SequenceSlice},
    native::forward::Forward,
};

pub(super) const VOCAB: u32 = 97;
pub(super) const EOS: TokenId = 0;
pub(super) const BLOCK_TOKENS: u32 = 4;
const LAYERS: u32 = 3;
const VALUE_BYTES: usize = 8;

/// What a test wants to do between the layers of a step: called with the tokens of each slice.
pub(super) type Hook = Arc<dyn Fn(LayerIndex, &[SequenceSlice<'_>]) + Send + Sync>;

pub(super) struct Fake {
    pub(super) hook: Option<Hook>,
}

pub(super) fn layout() -> KvLayout {
    KvLayout::dense(LAYERS, 2, 4, BLOCK_TOKENS, DType::F32)
}

/// The tokens that a request gets, computed without arena, blocks or scheduler.
pub(super) fn reference(prompt: &[TokenId], max_tokens: usize) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    let mut values: Vec<Vec<u64>> = vec![Vec::new(); LAYERS as usize];
    let mut next = 0;
    while tokens.len() < prompt.len() + max_tokens {
        let computed = values[0].len();
        for (position, &token) in (0..).zip(&tokens).skip(computed) {
            let mut x = mix(u64::from(token), position);
            for layer in &mut values {
                layer.push(x);
                x = mix(x, layer.iter().fold(0, |sum, &value| mix(sum, value)));
            }
            next = next_token(x);
        }
        tokens.push(next);
        if next == EOS {
            break;
        }
    }
    tokens.split_off(prompt.len())
}

impl Forward for Fake {
    fn forward(
        &mut self,
        slices: &[SequenceSlice<'_>],
        arena: &KvArena,
        on_layer: &mut dyn FnMut(LayerIndex),
        on_logits: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ForwardError> {
        let mut states: Vec<Vec<u64>> = slices
            .iter()
            .map(|slice| {
                (u64::from(slice.position)..)
                    .zip(slice.tokens)
                    .map(|(position, &token)| mix(u64::from(token), position))
                    .collect()
            })
            .collect();
        for layer in (0..LAYERS).map(LayerIndex) {
            for (slice, state) in slices.iter().zip(&mut states) {
                let mut sum = (0..slice.position as usize).fold(0, |sum, position| {
                    mix(sum, read(arena, slice.blocks, layer, position))
                });
                for (position, x) in (slice.position as usize..).zip(state) {
                    write(arena, slice.blocks, layer, position, *x);
                    sum = mix(sum, *x);
                    *x = mix(*x, sum);
                }
            }
            if let Some(hook) = &self.hook {
                hook(layer, slices);
            }
            on_layer(layer);
        }
        let wanted = slices.iter().zip(&states).filter(|(slice, _)| slice.logits);
        for (row, (_, state)) in wanted.enumerate() {
            let mut logits = vec![0.0; VOCAB as usize];
            let last = state.last().expect("a slice has tokens");
            logits[next_token(*last) as usize] = 10.0;
            on_logits(row, &logits);
        }
        Ok(())
    }
}

fn mix(a: u64, b: u64) -> u64 {
    (a ^ b.rotate_left(29))
        .wrapping_add(0x9E37_79B9_7F4A_7C15)
        .wrapping_mul(0xBF58_476D_1CE4_E5B9)
        .rotate_left(31)
}

fn next_token(x: u64) -> TokenId {
    TokenId::try_from((x >> 17) % u64::from(VOCAB)).expect("below the vocabulary")
}

/// Writes a value into every byte that belongs to the token: all planes, heads and dimensions.
fn write(arena: &KvArena, table: &[BlockId], layer: LayerIndex, position: usize, value: u64) {
    for (salt, place) in places(arena, table, layer, position).enumerate() {
        let bytes = mix(value, salt as u64).to_le_bytes();
        // SAFETY: `places` yields addresses inside of the block's run, and the block is written by
        // the engine thread that called only.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), VALUE_BYTES) };
    }
}

/// What all the token's bytes say. Equal to the value of `write` only if none of them differs; the
/// value itself is kept in the first place, unmixed.
fn read(arena: &KvArena, table: &[BlockId], layer: LayerIndex, position: usize) -> u64 {
    let mut found = places(arena, table, layer, position).map(|place| {
        let mut bytes = [0; VALUE_BYTES];
        // SAFETY: as for `write`; nobody writes a token that is read.
        unsafe { place.copy_to_nonoverlapping(bytes.as_mut_ptr(), VALUE_BYTES) };
        u64::from_le_bytes(bytes)
    });
    let first = found.next().expect("a token has bytes");
    let value = unmix(first);
    for (salt, other) in (1..).zip(found) {
        if other != mix(value, salt) {
            // Some value that the model never computes.
            return mix(value, other);
        }
    }
    value
}

/// Undoes `mix(value, 0)`.
fn unmix(mixed: u64) -> u64 {
    // The multiplier's inverse modulo 2^64.
    const INVERSE: u64 = inverse(0xBF58_476D_1CE4_E5B9);
    mixed
        .rotate_right(31)
        .wrapping_mul(INVERSE)
        .wrapping_sub(0x9E37_79B9_7F4A_7C15)
}

const fn inverse(odd: u64) -> u64 {
    // Newton's iteration doubles the number of right bits.
    let mut x: u64 = 1;
    let mut round = 0;
    while round < 6 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        round += 1;
    }
    x
}

fn places(
    arena: &KvArena,
    table: &[BlockId],
    layer: LayerIndex,
    position: usize,
) -> impl Iterator<Item = *mut u8> {
    let layout = arena.layout();
    let (block_tokens, per_token) = (
        layout.block_tokens as usize,
        layout.head_dim as usize * layout.dtype.bytes(),
    );
    let run = arena
        .run_ptr(table[position / block_tokens], layer)
        .as_ptr();
    let rows = layout.planes as usize * layout.kv_heads as usize;
    let token = position % block_tokens;
    (0..rows).flat_map(move |row| {
        let start = (row * block_tokens + token) * per_token;
        (start..start + per_token)
            .step_by(VALUE_BYTES)
            .map(move |offset| run.wrapping_add(offset))
    })
}

#[test]
fn unmix_undoes_mix() {
    for value in [0, 1, 0xDEAD_BEEF, u64::MAX] {
        assert_eq!(unmix(mix(value, 0)), value);
    }
}
