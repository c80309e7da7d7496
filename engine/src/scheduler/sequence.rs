//! One request inside the scheduler: its tokens and the blocks that hold their KV.

use std::time::Duration;

use blockplane_protocol::{
    BlockId, FinishReason, SaltHash, StopConditions, TokenId, TokenSequence,
};

use super::KvBlocks;

/// Name of a sequence inside one scheduler; a smaller one came earlier and has priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// A request as it is given to the scheduler.
#[derive(Clone, Debug)]
pub struct SequenceSpec {
    /// The prompt; not empty.
    pub prompt: Vec<TokenId>,
    /// Seed of its block hashes.
    pub salt: SaltHash,
    /// When to stop. `max_tokens` beyond the context is cut to it.
    pub stop: StopConditions,
    /// What its KV is worth to lower tiers, 0 to 100.
    pub priority: Option<u32>,
    /// When it ends with an error, on the caller's clock.
    pub deadline: Duration,
    /// How its prompt is computed.
    pub kind: SequenceKind,
}

/// How the prompt of a sequence is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceKind {
    /// Here.
    Local,
    /// Elsewhere, if at least this many of its tokens are not cached here.
    Remote {
        /// The least uncached tokens.
        uncached_tokens_min: u32,
    },
    /// Here, for another worker that decodes. Ends with its first token and is never preempted.
    ForPeer {
        /// Blocks of the prompt that the other worker has and that can be read from there.
        peer_cached_blocks: u32,
    },
}

/// Why an admitted sequence is not computed yet. It holds all blocks of its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Its prompt shall be computed elsewhere.
    RemotePrefill,
    /// Blocks `first..end` shall be read from the peer.
    Load {
        /// First block to read.
        first: u32,
        /// End of the blocks to read.
        end: u32,
    },
    /// The blocks before `end` that are not readable shall be loaded from lower tiers, into
    /// [`Sequence::load_targets`].
    Onboard {
        /// End of the blocks to load.
        end: u32,
    },
}

/// A request inside the scheduler.
#[derive(Debug)]
pub struct Sequence<B: KvBlocks> {
    tokens: TokenSequence,
    prompt_tokens: usize,
    stop: StopConditions,
    pub(super) deadline: Duration,
    pub(super) kind: SequenceKind,
    pub(super) gate: Option<Gate>,
    /// Tokens whose KV is in the blocks.
    pub(super) computed: usize,
    /// Prompt tokens found in the cache at the first admission.
    pub(super) cached: Option<usize>,
    /// Lower tiers did not give what they had: they are not asked again.
    pub(super) lower_failed: bool,
    priority: Option<u32>,
    /// Lower tiers want no more of its blocks.
    kept_above: bool,
    slots: Vec<Slot<B>>,
    ids: Vec<BlockId>,
    /// Blocks that were offered to the prefix cache.
    offered: usize,
}

/// The blocks of a sequence, each held until it is dropped.
#[derive(Debug)]
pub struct SequenceBlocks<B: KvBlocks> {
    /// Readable ones.
    pub shared: Vec<B::Shared>,
    /// Those that only this sequence used.
    pub owned: Vec<B::Owned>,
}

/// One entry of a block table.
#[derive(Debug)]
enum Slot<B: KvBlocks> {
    /// A readable block.
    Shared(B::Shared),
    /// A block that only this sequence uses.
    Owned(B::Owned),
    /// Between the two, while blocks are made readable.
    Moving,
}

impl<B: KvBlocks> Sequence<B> {
    pub(super) fn new(spec: SequenceSpec, block_tokens: usize, tokens_max: usize) -> Self {
        let prompt_tokens = spec.prompt.len();
        let mut stop = spec.stop;
        let room = u32::try_from(tokens_max - prompt_tokens).unwrap_or(u32::MAX);
        stop.max_tokens = stop.max_tokens.min(room);
        Self {
            tokens: TokenSequence::from_tokens(&spec.prompt, block_tokens, spec.salt),
            prompt_tokens,
            stop,
            deadline: spec.deadline,
            kind: spec.kind,
            gate: None,
            computed: 0,
            cached: None,
            lower_failed: false,
            priority: spec.priority,
            kept_above: false,
            slots: Vec::new(),
            ids: Vec::new(),
            offered: 0,
        }
    }

    /// Prompt and generated tokens.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        self.tokens.tokens()
    }

    /// Tokens with the hashes of their full blocks.
    #[must_use]
    pub fn token_sequence(&self) -> &TokenSequence {
        &self.tokens
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// The generated tokens.
    #[must_use]
    pub fn generated(&self) -> &[TokenId] {
        &self.tokens.tokens()[self.prompt_tokens..]
    }

    /// Tokens whose KV is in the blocks.
    #[must_use]
    pub fn computed_tokens(&self) -> usize {
        self.computed
    }

    /// Prompt tokens found in the cache when it was first admitted.
    #[must_use]
    pub fn cached_tokens(&self) -> usize {
        self.cached.unwrap_or(0)
    }

    /// Its block table.
    #[must_use]
    pub fn block_ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// When it ends with an error.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// What it waits for, if it does.
    #[must_use]
    pub fn gate(&self) -> Option<Gate> {
        self.gate
    }

    /// The blocks that a load from lower tiers fills, in order; none without [`Gate::Onboard`].
    #[must_use]
    pub fn load_targets(&self) -> Vec<BlockId> {
        let Some(Gate::Onboard { end }) = self.gate else {
            return Vec::new();
        };
        self.slots[..end as usize]
            .iter()
            .filter_map(|slot| match slot {
                Slot::Owned(block) => Some(B::owned_id(block)),
                Slot::Shared(_) | Slot::Moving => None,
            })
            .collect()
    }

    /// Its blocks, readable and not, for a caller that must keep some of them beyond the end of the
    /// sequence.
    #[must_use = "dropping the blocks returns them to the pool"]
    pub fn into_blocks(mut self) -> SequenceBlocks<B> {
        self.unseat()
    }

    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    pub(super) fn blocks_missing(&self) -> usize {
        self.tokens.blocks_needed().saturating_sub(self.slots.len())
    }

    pub(super) fn preemptible(&self) -> bool {
        self.gate.is_none() && !matches!(self.kind, SequenceKind::ForPeer { .. })
    }

    /// Takes the blocks of an admission: what was found, and fresh ones for the rest.
    pub(super) fn seat(&mut self, found: Vec<Option<B::Shared>>, fresh: Vec<B::Owned>) {
        debug_assert!(self.slots.is_empty(), "a waiting sequence holds no block");
        let mut fresh = fresh.into_iter();
        for block in found {
            let slot = match block {
                Some(block) => Slot::Shared(block),
                None => Slot::Owned(fresh.next().expect("one for each block not readable")),
            };
            self.ids.push(slot.id());
            self.slots.push(slot);
        }
        let readable = |slot: &&Slot<B>| matches!(slot, Slot::Shared(_));
        self.offered = self.slots.iter().take_while(readable).count();
        self.computed = self.offered * self.tokens.block_tokens();
        self.append(fresh.collect());
    }

    pub(super) fn append(&mut self, blocks: Vec<B::Owned>) {
        self.ids.extend(blocks.iter().map(B::owned_id));
        self.slots.extend(blocks.into_iter().map(Slot::Owned));
    }

    /// Hands all blocks out; the KV has to be computed, or matched, again.
    pub(super) fn unseat(&mut self) -> SequenceBlocks<B> {
        self.gate = None;
        self.computed = 0;
        self.offered = 0;
        self.ids.clear();
        let mut blocks = SequenceBlocks {
            shared: Vec::new(),
            owned: Vec::new(),
        };
        for slot in self.slots.drain(..) {
            match slot {
                Slot::Shared(block) => blocks.shared.push(block),
                Slot::Owned(block) => blocks.owned.push(block),
                Slot::Moving => unreachable!("only while blocks are made readable"),
            }
        }
        blocks
    }

    /// Notes that the KV of tokens up to `computed` is in place, and makes the blocks that this
    /// filled readable. Lower tiers are told of them, unless they came `from_lower` tiers.
    pub(super) fn set_computed(&mut self, computed: usize, from_lower: bool, pool: &B) {
        assert!(
            self.computed <= computed && computed <= self.tokens.len(),
            "KV only grows, and not beyond the tokens"
        );
        self.computed = computed;
        let full = computed / self.tokens.block_tokens();
        let filled = self.offered..full.max(self.offered);
        self.offered = filled.end;
        let names = self.tokens.blocks();
        let mut indices = Vec::new();
        let mut blocks = Vec::new();
        for index in filled {
            // A peer may still be reading this very block, so it is not exchanged for another one
            // with the same content.
            let keep = matches!(self.kind, SequenceKind::ForPeer { .. });
            if keep && pool.contains(names[index]) {
                continue;
            }
            match std::mem::replace(&mut self.slots[index], Slot::Moving) {
                Slot::Owned(block) => {
                    let parent = index.checked_sub(1).map(|before| names[before].sequence);
                    indices.push(index);
                    blocks.push((block, names[index], parent));
                }
                other => self.slots[index] = other,
            }
        }
        if blocks.is_empty() {
            return;
        }
        let filled: Vec<_> = blocks.iter().map(|&(_, name, _)| name).collect();
        let shared = pool.register(blocks);
        if !from_lower && !self.kept_above {
            self.kept_above = !pool.offload(&filled, self.priority);
        }
        for (index, shared) in indices.into_iter().zip(shared) {
            self.ids[index] = B::shared_id(&shared);
            self.slots[index] = Slot::Shared(shared);
        }
    }

    /// Appends a generated token; says whether the sequence ends with it.
    pub(super) fn push(&mut self, token: TokenId, eos: &[TokenId]) -> Option<FinishReason> {
        self.tokens.push(token);
        let generated = self.generated().len();
        let ends = self.stop.stop_token_ids.contains(&token)
            || (!self.stop.ignore_eos && eos.contains(&token));
        if ends && generated >= self.stop.min_tokens as usize {
            Some(FinishReason::Stop)
        } else if generated >= self.stop.max_tokens as usize {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

impl<B: KvBlocks> Slot<B> {
    fn id(&self) -> BlockId {
        match self {
            Self::Shared(block) => B::shared_id(block),
            Self::Owned(block) => B::owned_id(block),
            Self::Moving => unreachable!("only while blocks are made readable"),
        }
    }
}
