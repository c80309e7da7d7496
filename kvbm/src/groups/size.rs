//! How large the blocks of each group are, and how many of them a budget buys.

use blockplane_protocol::{AttentionGroup, AttentionKind, KvLayout, LayoutError};
use thiserror::Error;

use super::blocks_needed;

/// The pool of one attention group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSize {
    /// What its layers attend to.
    pub kind: AttentionKind,
    /// The KV of its layers alone, numbered from 0; one plane if it is latent.
    pub layout: KvLayout,
    /// Blocks of the pool.
    pub blocks: u32,
}

/// Why a budget could not be split.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GroupError {
    /// The layout is not valid.
    #[error("KV layout with attention groups: {0}")]
    Layout(#[from] LayoutError),
    /// A window sees nothing.
    #[error("attention group {group} has a sliding window of 0 tokens; accepted: 1 or more")]
    EmptyWindow {
        /// Its place in the layout.
        group: usize,
    },
    /// Sequences have no token.
    #[error("sequences of 0 tokens need no cache; accepted: 1 token or more")]
    EmptySequence,
    /// Not even one sequence fits.
    #[error(
        "{bytes} bytes for the KV of all attention groups; one sequence of {sequence_tokens} tokens \
         takes {least}"
    )]
    Budget {
        /// The budget.
        bytes: u64,
        /// Tokens of a sequence.
        sequence_tokens: u32,
        /// What one takes.
        least: u64,
    },
}

impl GroupSize {
    /// Bytes of one block of this group.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.layout.block_bytes() as u64
    }

    /// Bytes of the pool.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.block_bytes() * u64::from(self.blocks)
    }
}

/// Splits `bytes` over the groups of `layout`, so that the pools hold about the same number of
/// sequences of `sequence_tokens` tokens: with full or latent attention all blocks of each, with a
/// sliding window the ones that the window touches. What is left goes to the groups that are
/// furthest behind, until no further block fits.
///
/// # Errors
/// When the layout or the numbers make no sense, or the budget is too small for one sequence.
pub fn split(
    layout: &KvLayout,
    bytes: u64,
    sequence_tokens: u32,
) -> Result<Vec<GroupSize>, GroupError> {
    layout.validate(0)?;
    if sequence_tokens == 0 {
        return Err(GroupError::EmptySequence);
    }
    let mut sizes = Vec::with_capacity(layout.groups.len());
    for (group, AttentionGroup { kind, layers }) in layout.groups.iter().enumerate() {
        if matches!(kind, AttentionKind::SlidingWindow { window: 0 }) {
            return Err(GroupError::EmptyWindow { group });
        }
        // A group without layers has no KV and needs no pool.
        if layers.is_empty() {
            continue;
        }
        sizes.push(GroupSize {
            kind: *kind,
            layout: of_layers(layout, *kind, layers.len()),
            blocks: 0,
        });
    }
    let blocks = (sequence_tokens as usize).div_ceil(layout.block_tokens as usize);
    let needs: Vec<u64> = sizes
        .iter()
        .map(|size| need(size.kind, layout.block_tokens, blocks))
        .collect();
    let sequence: u64 = (needs.iter().zip(&sizes))
        .map(|(need, size)| need.saturating_mul(size.block_bytes()))
        .fold(0, u64::saturating_add);
    if sequence == 0 || bytes < sequence {
        return Err(GroupError::Budget {
            bytes,
            sequence_tokens,
            least: sequence,
        });
    }
    let mut left = bytes;
    for (size, need) in sizes.iter_mut().zip(&needs) {
        let share = u128::from(bytes) * u128::from(*need) / u128::from(sequence);
        size.blocks = u32::try_from(share)
            .unwrap_or(u32::MAX - 2)
            .min(u32::MAX - 2);
        left -= size.bytes();
    }
    while let Some(behind) = (0..sizes.len())
        .filter(|&group| sizes[group].block_bytes() <= left && sizes[group].blocks < u32::MAX - 2)
        .min_by_key(|&group| u128::from(sizes[group].blocks) * SCALE / u128::from(needs[group]))
    {
        sizes[behind].blocks += 1;
        left -= sizes[behind].block_bytes();
    }
    Ok(sizes)
}

/// Keeps apart what whole numbers of sequences would not.
const SCALE: u128 = 1 << 64;

/// Blocks that a sequence of `blocks` blocks occupies while its last one is filled.
fn need(kind: AttentionKind, block_tokens: u32, blocks: usize) -> u64 {
    let before = blocks_needed(kind, block_tokens, blocks - 1).len();
    before as u64 + 1
}

fn of_layers(layout: &KvLayout, kind: AttentionKind, layers: usize) -> KvLayout {
    let layers = u32::try_from(layers).expect("a valid layout has fewer than 2^32 layers");
    KvLayout {
        layers,
        planes: match kind {
            AttentionKind::Latent => 1,
            AttentionKind::Full | AttentionKind::SlidingWindow { .. } => layout.planes,
        },
        groups: vec![AttentionGroup {
            kind,
            layers: (0..layers).collect(),
        }],
        ..layout.clone()
    }
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::DType;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn layout(kinds: &[(AttentionKind, u32)], block_tokens: u32) -> KvLayout {
        let layers = kinds.iter().map(|(_, layers)| layers).sum();
        let mut next = 0..;
        let groups = kinds.iter().map(|(kind, layers)| AttentionGroup {
            kind: *kind,
            layers: next.by_ref().take(*layers as usize).collect(),
        });
        KvLayout {
            groups: groups.collect(),
            ..KvLayout::dense(layers, 2, 8, block_tokens, DType::Bf16)
        }
    }

    #[test]
    fn a_window_takes_far_less_than_its_share_of_layers() {
        let window = AttentionKind::SlidingWindow { window: 1_024 };
        let layout = layout(&[(AttentionKind::Full, 5), (window, 25)], 16);
        let sizes = split(&layout, 1 << 30, 32_768).unwrap();
        assert_eq!(sizes[1].block_bytes(), 5 * sizes[0].block_bytes());
        // 2,048 blocks of a sequence against the 64 that the window touches and the one filled.
        let ratio = f64::from(sizes[0].blocks) / f64::from(sizes[1].blocks);
        assert!((ratio - 2_048.0 / 65.0).abs() < 0.1, "{ratio}");
    }

    #[test]
    fn errors_say_what_is_accepted() {
        let full = layout(&[(AttentionKind::Full, 2)], 16);
        let least = full.block_bytes() as u64 * 2;
        let error = split(&full, least - 1, 17).unwrap_err();
        assert!(error.to_string().contains(&least.to_string()), "{error}");
        assert_eq!(split(&full, least, 17).unwrap()[0].blocks, 2);
        assert_eq!(split(&full, 1, 0), Err(GroupError::EmptySequence));
        let blind = layout(&[(AttentionKind::SlidingWindow { window: 0 }, 1)], 16);
        assert_eq!(
            split(&blind, 1, 1),
            Err(GroupError::EmptyWindow { group: 0 })
        );
        let invalid = KvLayout { layers: 3, ..full };
        assert!(matches!(split(&invalid, 1, 1), Err(GroupError::Layout(_))));
    }

    fn kind() -> impl Strategy<Value = AttentionKind> {
        prop_oneof![
            Just(AttentionKind::Full),
            Just(AttentionKind::Latent),
            (1..100u32).prop_map(|window| AttentionKind::SlidingWindow { window }),
        ]
    }

    proptest! {
        #[test]
        fn a_budget_is_used_up_evenly(
            kinds in vec((kind(), 1..6u32), 1..5),
            block_tokens in 1..9u32,
            sequence_tokens in 1..300u32,
            bytes in 0..40_000_000u64,
        ) {
            let layout = layout(&kinds, block_tokens);
            let blocks = sequence_tokens.div_ceil(block_tokens) as usize;
            match split(&layout, bytes, sequence_tokens) {
                Err(error) => {
                    let GroupError::Budget { least, .. } = error else {
                        panic!("{error}");
                    };
                    prop_assert!(bytes < least);
                    prop_assert!(split(&layout, least, sequence_tokens).is_ok());
                }
                Ok(sizes) => {
                    let used: u64 = sizes.iter().map(GroupSize::bytes).sum();
                    prop_assert!(used <= bytes);
                    let smallest = sizes.iter().map(GroupSize::block_bytes).min().unwrap();
                    prop_assert!(bytes - used < smallest, "room for another block");
                    let sequences = |size: &GroupSize| {
                        f64::from(size.blocks) / need(size.kind, block_tokens, blocks) as f64
                    };
                    let least = sizes.iter().map(sequences).fold(f64::INFINITY, f64::min);
                    prop_assert!(least >= 1.0);
                    for size in &sizes {
                        prop_assert!(size.layout.validate(size.blocks).is_ok());
                    }
                }
            }
        }
    }
}
