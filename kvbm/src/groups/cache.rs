//! One pool for each attention group, used together.

use std::{collections::VecDeque, sync::Arc};

use blockplane_protocol::{AttentionKind, SequenceHash, TokenBlock};

use super::{GroupSize, blocks_needed, rule};
use crate::{
    arena::KvArena,
    block::{ImmutableBlock, MutableBlock},
    events::EventFeed,
    evict::EvictionKind,
    pool::{BlockPool, PoolConfig, PoolExhausted},
};

/// The blocks of one rank of a model with several attention groups.
///
/// Each group finds and evicts its blocks by itself; what is in all of them together decides how
/// much of a prompt is of use.
#[derive(Clone, Debug)]
pub struct GroupedCache {
    groups: Vec<Group>,
    block_tokens: u32,
}

#[derive(Clone, Debug)]
struct Group {
    kind: AttentionKind,
    pool: BlockPool,
}

/// The blocks of one sequence, held in each group: those that the group needs for the next token.
#[derive(Debug, Default)]
#[must_use = "dropping the blocks makes them evictable"]
pub struct GroupedBlocks {
    groups: Vec<Held>,
    blocks: usize,
    last: Option<SequenceHash>,
}

/// Consecutive blocks of one group, up to the last whole block of the sequence.
#[derive(Debug, Default)]
struct Held {
    /// Index in the sequence of the first one.
    first: usize,
    blocks: VecDeque<ImmutableBlock>,
}

impl GroupedCache {
    /// A cache without memory, one pool for each of `sizes`. Its KV events are those of the group
    /// that keeps the most of a sequence: the first with full or latent attention, or else the
    /// first.
    ///
    /// # Panics
    /// When `sizes` is empty.
    #[must_use]
    pub fn accounting(sizes: &[GroupSize], config: PoolConfig, eviction: EvictionKind) -> Self {
        let groups = sizes
            .iter()
            .map(|size| (size.kind, size.layout.block_tokens, size.blocks))
            .collect::<Vec<_>>();
        Self::build(&groups, |group, silent| {
            let (kind, _, blocks) = groups[group];
            let builder = BlockPool::builder(config).policy(rule::policy(kind, eviction));
            let builder = if silent {
                builder.without_own_events()
            } else {
                builder
            };
            builder.accounting(blocks)
        })
    }

    /// A cache over an arena for each group, made with [`GroupSize::layout`]. Events are as in
    /// [`GroupedCache::accounting`].
    ///
    /// # Panics
    /// When `arenas` is empty, or their blocks hold different numbers of tokens.
    #[must_use]
    pub fn over(
        arenas: &[(AttentionKind, Arc<KvArena>)],
        config: PoolConfig,
        eviction: EvictionKind,
    ) -> Self {
        let groups = arenas
            .iter()
            .map(|(kind, arena)| (*kind, arena.layout().block_tokens, arena.blocks()))
            .collect::<Vec<_>>();
        Self::build(&groups, |group, silent| {
            let (kind, arena) = &arenas[group];
            let builder = BlockPool::builder(config).policy(rule::policy(*kind, eviction));
            let builder = if silent {
                builder.without_own_events()
            } else {
                builder
            };
            builder.over(Arc::clone(arena))
        })
    }

    fn build(
        groups: &[(AttentionKind, u32, u32)],
        pool: impl Fn(usize, bool) -> BlockPool,
    ) -> Self {
        let (_, block_tokens, _) = groups.first().expect("a cache has a group");
        assert!(
            groups.iter().all(|(_, tokens, _)| tokens == block_tokens),
            "blocks of all groups hold the same tokens: {groups:?}"
        );
        let leader = leader(groups.iter().map(|(kind, ..)| *kind));
        let groups = groups.iter().enumerate().map(|(group, (kind, ..))| Group {
            kind: *kind,
            pool: pool(group, group != leader),
        });
        Self {
            groups: groups.collect(),
            block_tokens: *block_tokens,
        }
    }

    /// The pools, in the order of the groups.
    pub fn pools(&self) -> impl ExactSizeIterator<Item = (AttentionKind, &BlockPool)> {
        self.groups.iter().map(|group| (group.kind, &group.pool))
    }

    /// The KV events of the cache.
    #[must_use]
    pub fn events(&self) -> EventFeed {
        let leader = leader(self.groups.iter().map(|group| group.kind));
        self.groups[leader].pool.events()
    }

    /// Holds what is needed to go on after the longest prefix of `names` after which that is
    /// possible.
    pub fn match_prefix(&self, names: &[TokenBlock]) -> GroupedBlocks {
        let mut most = names.len();
        loop {
            let blocks = self.usable(&names[..most]);
            if let Some(held) = self.hold(&names[..blocks]) {
                return held;
            }
            // A block was evicted in between: what is of use now is shorter.
            most = blocks.saturating_sub(1);
        }
    }

    /// How long a prefix [`GroupedCache::match_prefix`] would find. Holds nothing: it may have
    /// changed on return.
    #[must_use]
    pub fn peek_prefix(&self, names: &[TokenBlock]) -> usize {
        self.usable(names)
    }

    /// Takes `n` blocks of each group to fill. All or none.
    ///
    /// # Errors
    /// [`PoolExhausted`] of the first group that has not so many. Blocks that other groups evicted
    /// for it are gone.
    pub fn allocate(&self, n: usize) -> Result<Vec<Vec<MutableBlock>>, PoolExhausted> {
        let fresh = self.groups.iter().map(|group| group.pool.allocate(n));
        fresh.collect()
    }

    /// Adds full blocks named `names` to a sequence: registers them in each group, and releases
    /// those that the next token does not need. `fresh` has as many blocks for each group, filled.
    ///
    /// # Panics
    /// When the numbers differ, `held` is of another cache, or a name does not continue the one
    /// before it.
    pub fn append(
        &self,
        held: &mut GroupedBlocks,
        names: &[TokenBlock],
        fresh: Vec<Vec<MutableBlock>>,
    ) {
        held.groups.resize_with(self.groups.len(), Held::default);
        assert_eq!(fresh.len(), self.groups.len(), "blocks for each group");
        for (held_in, fresh) in held.groups.iter_mut().zip(fresh) {
            assert_eq!(fresh.len(), names.len(), "a block for each name");
            let mut parent = held.last;
            let complete = fresh.into_iter().zip(names).map(|(block, name)| {
                let complete = block.complete(*name, parent);
                parent = Some(name.sequence);
                complete
            });
            held_in
                .blocks
                .extend(BlockPool::register(complete.collect()));
        }
        held.blocks += names.len();
        held.last = names.last().map(|name| name.sequence).or(held.last);
        self.release_behind(held);
    }

    /// Releases what the next token does not need: it can still be found until it is evicted.
    fn release_behind(&self, held: &mut GroupedBlocks) {
        let blocks = held.blocks;
        for (group, held) in self.groups.iter().zip(&mut held.groups) {
            let first = blocks_needed(group.kind, self.block_tokens, blocks).start;
            let behind = first.saturating_sub(held.first).min(held.blocks.len());
            drop(held.blocks.drain(..behind));
            held.first += behind;
        }
    }

    fn usable(&self, names: &[TokenBlock]) -> usize {
        // With full attention the first gap ends it, so nothing behind that is looked up.
        let full = (self.groups.iter())
            .filter(|group| !is_window(group.kind))
            .map(|group| group.pool.peek_prefix(names))
            .min()
            .unwrap_or(names.len());
        // For each window, how many blocks in a row are here up to each place.
        let windows: Vec<(&Group, Vec<usize>)> = (self.groups.iter())
            .filter(|group| is_window(group.kind))
            .map(|group| {
                let here = names[..full].iter().map(|name| name.sequence);
                let mut row = 0;
                let rows = group.pool.contains_each(here).into_iter().map(|here| {
                    row = if here { row + 1 } else { 0 };
                    row
                });
                (group, rows.collect())
            })
            .collect();
        let fits = |blocks: &usize| {
            windows.iter().all(|(group, rows)| {
                let needed = blocks_needed(group.kind, self.block_tokens, *blocks);
                needed.is_empty() || rows[blocks - 1] >= needed.len()
            })
        };
        (0..=full).rev().find(fits).unwrap_or(0)
    }

    /// Holds what the token after `names` needs; `None` when it is not all here.
    fn hold(&self, names: &[TokenBlock]) -> Option<GroupedBlocks> {
        let mut groups = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let needed = blocks_needed(group.kind, self.block_tokens, names.len());
            let first = needed.start;
            let wanted = &names[needed];
            let blocks: VecDeque<_> = group.pool.match_prefix(wanted).into();
            if blocks.len() < wanted.len() {
                return None;
            }
            groups.push(Held { first, blocks });
        }
        Some(GroupedBlocks {
            groups,
            blocks: names.len(),
            last: names.last().map(|name| name.sequence),
        })
    }
}

impl GroupedBlocks {
    /// Whole blocks of the sequence that need not be computed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The blocks held in a group, and the place in the sequence of the first one.
    ///
    /// # Panics
    /// When there are not so many groups.
    #[must_use]
    pub fn group(&self, group: usize) -> (usize, &VecDeque<ImmutableBlock>) {
        let held = &self.groups[group];
        (held.first, &held.blocks)
    }
}

fn is_window(kind: AttentionKind) -> bool {
    matches!(kind, AttentionKind::SlidingWindow { .. })
}

/// The group that keeps the most of a sequence.
fn leader(mut kinds: impl Iterator<Item = AttentionKind>) -> usize {
    kinds.position(|kind| !is_window(kind)).unwrap_or(0)
}
