//! Short tails: requests that add little to what was asked before are worth keeping.
//!
//! A conversation that goes on asks for its whole past and a few new blocks; a prompt that is never
//! asked for again is long and new, often below a prefix that many share. How much of a prompt is
//! new tells the two apart before any block of it has been asked for twice.

use super::recent::Recent;

/// Resolution with which prompts are remembered: names at every so many tokens.
const STRIDE_TOKENS: u32 = 512;

/// Admits the blocks that were last asked for by a request with a short new tail.
#[derive(Clone, Debug)]
pub(super) struct Tail {
    /// Longest tail, in blocks.
    new_max: usize,
    /// Whether the last request that asked for a block had a short tail.
    short: Recent,
    /// Where blocks are small: marks of prompts, which are remembered for longer than blocks.
    marks: Option<Marks>,
}

#[derive(Clone, Debug)]
struct Marks {
    /// The last of so many blocks is a mark.
    stride: usize,
    known: Recent,
}

impl Tail {
    pub(super) fn new(tokens: u32, block_tokens: u32, entries_max: usize) -> Self {
        let block_tokens = block_tokens.max(1);
        let stride = (STRIDE_TOKENS / block_tokens).max(1) as usize;
        let marks = (stride > 1).then(|| Marks {
            stride,
            known: Recent::new(entries_max / 2),
        });
        let blocks_max = if marks.is_some() {
            entries_max / 2
        } else {
            entries_max
        };
        Self {
            new_max: (tokens / block_tokens) as usize,
            short: Recent::new(blocks_max),
            marks,
        }
    }

    /// A request asks for these blocks.
    pub(super) fn refer(&mut self, names: impl Iterator<Item = u64> + Clone) {
        let known = match &mut self.marks {
            None => prefix(&self.short, names.clone()),
            Some(Marks { stride, known }) => {
                let marks = names.clone().skip(*stride - 1).step_by(*stride);
                let prefix = prefix(known, marks.clone()) * *stride;
                for name in marks {
                    known.set(name, 0);
                }
                prefix
            }
        };
        let short = names.clone().count() - known <= self.new_max;
        for name in names {
            self.short.set(name, u16::from(short));
        }
    }

    pub(super) fn admits(&self, name: u64) -> bool {
        self.short.get(name) == Some(1)
    }

    pub(super) const fn len(&self) -> usize {
        let marks = match &self.marks {
            Some(marks) => marks.known.len(),
            None => 0,
        };
        marks + self.short.len()
    }

    pub(super) fn bytes(&self) -> usize {
        let marks = self.marks.as_ref();
        marks.map_or(0, |marks| marks.known.bytes()) + self.short.bytes()
    }
}

/// Leading names that are known.
fn prefix(known: &Recent, names: impl Iterator<Item = u64>) -> usize {
    names.take_while(|name| known.get(*name).is_some()).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_request_decides() {
        let mut tail = Tail::new(2_048, 512, 1_000);
        tail.refer(0..10);
        assert!(!tail.admits(0) && !tail.admits(9), "ten new blocks");
        tail.refer(0..13);
        assert!(tail.admits(0) && tail.admits(12), "three new blocks");
        tail.refer((0..5).chain(100..105));
        assert!(
            !tail.admits(0) && tail.admits(12),
            "five new blocks below it"
        );
        assert!(!tail.admits(1_000), "never asked for");
    }

    proptest! {
        /// With every block remembered, a tail is what follows the longest known prefix.
        #[test]
        fn tails_are_measured(
            prompts in prop::collection::vec((0u64..4, 0usize..12, 0usize..12), 1..60),
        ) {
            let mut tail = Tail::new(4 * 512, 512, 100_000);
            let mut known = std::collections::HashSet::new();
            for (root, shared, own) in prompts {
                let prompt: Vec<u64> = (0..shared as u64)
                    .map(|i| root * 100 + i)
                    .chain((0..own as u64).map(|i| 1_000 * (root + 1) + 100 * shared as u64 + i))
                    .collect();
                let prefix = prompt.iter().take_while(|name| known.contains(*name)).count();
                tail.refer(prompt.iter().copied());
                for &name in &prompt {
                    prop_assert_eq!(tail.admits(name), prompt.len() - prefix <= 4);
                }
                known.extend(prompt);
            }
        }

        /// Small blocks are remembered one in so many: a tail is never taken for shorter than it is.
        #[test]
        fn small_blocks_are_sampled(prefix in 0usize..200, own in 0usize..200) {
            let mut tail = Tail::new(16 * 64, 16, 100_000);
            tail.refer(0..prefix as u64);
            tail.refer((0..prefix as u64).chain(10_000..10_000 + own as u64));
            if own > 64 {
                prop_assert!(!tail.admits(10_000));
            }
            if own > 0 && own <= 64 - 31 {
                prop_assert!(tail.admits(10_000));
            }
        }
    }
}
