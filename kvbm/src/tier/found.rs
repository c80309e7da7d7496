//! What a search over the tiers found.

use std::fmt;

use blockplane_protocol::{DpRank, SequenceHash, Tier, TokenBlock};

use crate::block::ImmutableBlock;

/// One value for each tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerTier<T> {
    /// G1.
    pub device: T,
    /// G2.
    pub host: T,
    /// G3.
    pub disk: T,
    /// G4.
    pub remote: T,
}

/// The longest run of blocks, from the first of a sequence (or from a given one) on, that lie in any
/// tier. Every block is
/// held where it is (but for G4, which holds nothing): none is evicted before this is dropped or
/// onboarded.
#[must_use = "dropping the match makes its blocks evictable"]
pub struct TierMatch {
    rank: DpRank,
    /// Name of the block before the first one, for a run that does not begin a sequence.
    parent: Option<SequenceHash>,
    blocks: Vec<Found>,
    count: PerTier<u32>,
}

/// A block that was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) name: TokenBlock,
    pub(super) place: Place,
}

/// Where it was found.
#[derive(Debug)]
pub(super) enum Place {
    /// `None` once it has been taken out of the match.
    Device(Option<ImmutableBlock>),
    Host(ImmutableBlock),
    Disk(ImmutableBlock),
    Remote,
}

impl TierMatch {
    pub(super) fn new(rank: DpRank, parent: Option<SequenceHash>, blocks: usize) -> Self {
        Self {
            rank,
            parent,
            blocks: Vec::with_capacity(blocks),
            count: PerTier::default(),
        }
    }

    pub(super) fn push(&mut self, name: TokenBlock, place: Place) {
        *self.count.get_mut(place.tier()) += 1;
        self.blocks.push(Found { name, place });
    }

    pub(super) fn reserve(&mut self, blocks: usize) {
        self.blocks.reserve(blocks);
    }

    pub(super) fn found(&self) -> impl Iterator<Item = &Found> {
        self.blocks.iter()
    }

    pub(super) fn into_blocks(self) -> Vec<Found> {
        self.blocks
    }

    /// The rank it was found for.
    #[must_use]
    pub const fn rank(&self) -> DpRank {
        self.rank
    }

    pub(super) const fn parent(&self) -> Option<SequenceHash> {
        self.parent
    }

    /// Blocks found.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether none was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Blocks that are in G1.
    #[must_use]
    pub const fn device(&self) -> usize {
        self.count.device as usize
    }

    /// Blocks that are below G1.
    #[must_use]
    pub fn lower(&self) -> usize {
        self.len() - self.device()
    }

    /// G1 blocks that the caller must bring to onboard the match: one for each block below G1.
    #[must_use]
    pub fn missing_targets(&self) -> usize {
        self.lower()
    }

    /// Blocks by the tier they were found in.
    #[must_use]
    pub const fn tiers(&self) -> PerTier<u32> {
        self.count
    }

    /// Takes the blocks that are in G1 out of the match: one entry for each block found, in order,
    /// `None` where it lies below. The match goes on to hold those.
    pub fn take_device(&mut self) -> Vec<Option<ImmutableBlock>> {
        let take = |found: &mut Found| match &mut found.place {
            Place::Device(block) => block.take(),
            Place::Host(_) | Place::Disk(_) | Place::Remote => None,
        };
        self.blocks.iter_mut().map(take).collect()
    }

    /// The leading blocks that are in G1; the others are let go.
    pub fn into_device(self) -> Vec<ImmutableBlock> {
        let leading = self
            .blocks
            .into_iter()
            .map_while(|found| match found.place {
                Place::Device(block) => block,
                Place::Host(_) | Place::Disk(_) | Place::Remote => None,
            });
        leading.collect()
    }

    /// The name of each block and the tier it was found in.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = (SequenceHash, Tier)> + '_ {
        self.blocks
            .iter()
            .map(|found| (found.name.sequence, found.place.tier()))
    }
}

impl Place {
    pub(super) const fn tier(&self) -> Tier {
        match self {
            Self::Device(_) => Tier::Device,
            Self::Host(_) => Tier::Host,
            Self::Disk(_) => Tier::Disk,
            Self::Remote => Tier::Remote,
        }
    }
}

impl<T> PerTier<T> {
    /// The value of a tier.
    #[must_use]
    pub const fn get(&self, tier: Tier) -> &T {
        match tier {
            Tier::Device => &self.device,
            Tier::Host => &self.host,
            Tier::Disk => &self.disk,
            Tier::Remote => &self.remote,
        }
    }

    pub(super) const fn get_mut(&mut self, tier: Tier) -> &mut T {
        match tier {
            Tier::Device => &mut self.device,
            Tier::Host => &mut self.host,
            Tier::Disk => &mut self.disk,
            Tier::Remote => &mut self.remote,
        }
    }
}

impl fmt::Debug for TierMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TierMatch")
            .field("rank", &self.rank)
            .field("tiers", &self.count)
            .finish_non_exhaustive()
    }
}
