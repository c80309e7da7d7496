//! From vLLM's names of blocks to ours.
//!
//! vLLM's hashes depend on its algorithm, its seed and its version, so they are taken as opaque. Ours
//! are computed again from the tokens, with `blockplane_protocol`'s hashing, after the block that
//! vLLM names as the one before.

use std::collections::{HashMap, hash_map::Entry};

use blockplane_kvbm::EventWriter;
use blockplane_protocol::{BlockHash, SaltHash, SequenceHash, StoredBlock, Tier, TokenId};

use super::wire::{EngineHash, Extra, GroupKind, Removed, Stored};

/// The blocks that vLLM holds, by its names.
#[derive(Debug)]
pub(super) struct Chain {
    block_tokens: u32,
    blocks_max: usize,
    blocks: HashMap<EngineHash, Known>,
    /// The group whose blocks are told: the first one that names prefixes. A model can have several;
    /// each names the same ones.
    group: Option<Option<u32>>,
}

/// One block. About 80 bytes, so 100 to 180 with the table.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// `None` for a block that its tokens do not name: nobody can ask for it, nor for what follows.
    name: Option<Name>,
    /// Seed of the block hashes of this sequence.
    salt: SaltHash,
    /// How many of them there are in each tier. vLLM computes a block twice when two requests need
    /// it at once, or when a prompt is cached to its last token, and says so of each.
    copies: [u16; 4],
}

#[derive(Clone, Copy, Debug)]
struct Name {
    parent: Option<SequenceHash>,
    block: StoredBlock,
}

/// What became of a [`Stored`] event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Its blocks are known now, and told as far as they have a name.
    Taken {
        /// Those that their tokens do not name.
        unnamed: usize,
    },
    /// It is of a group that names no prefix.
    OtherGroup,
    /// It names the end of a prompt within a block, beside whole ones.
    PartOfBlock,
    /// Its blocks are not of the size that the worker registered.
    BlockSize(u32),
    /// The block before it is not known.
    UnknownParent(Tier),
    /// It does not say what is in its blocks, and they are not known.
    NoTokens,
    /// Its parts contradict each other.
    Inconsistent(&'static str),
    /// There are more blocks than may be.
    Full,
}

impl Chain {
    pub(super) fn new(block_tokens: u32, blocks_max: usize) -> Self {
        Self {
            block_tokens,
            blocks_max,
            blocks: HashMap::new(),
            group: None,
        }
    }

    pub(super) fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Forgets all blocks. Which group is told remains.
    pub(super) fn clear(&mut self) {
        self.blocks.clear();
    }

    /// Takes in stored blocks, all or none.
    pub(super) fn stored(&mut self, event: &Stored, writer: &mut EventWriter) -> Outcome {
        if event.kind == GroupKind::Other || !self.is_told(event.group) {
            return Outcome::OtherGroup;
        }
        if event.hashes.is_empty() {
            return Outcome::NoTokens;
        }
        if event.block_tokens == 0 || event.tokens.is_empty() {
            return self.stored_by_name(event, writer);
        }
        if event.block_tokens != self.block_tokens {
            let part = self.group.is_some() && event.block_tokens < self.block_tokens;
            return if part {
                Outcome::PartOfBlock
            } else {
                Outcome::BlockSize(event.block_tokens)
            };
        }
        let count = event.hashes.len();
        let block_tokens = self.block_tokens as usize;
        if count.checked_mul(block_tokens) != Some(event.tokens.len()) {
            return Outcome::Inconsistent("the number of tokens is not that of its blocks");
        }
        if !event.extra_keys.is_empty() && event.extra_keys.len() != count {
            return Outcome::Inconsistent("the extra keys are not as many as its blocks");
        }
        let mut before = match self.start(event) {
            Ok(before) => before,
            Err(outcome) => return outcome,
        };
        if self.blocks.len() + count > self.blocks_max && self.new_blocks(event) > self.room() {
            return Outcome::Full;
        }
        self.group.get_or_insert(event.group);
        let tier = event.medium.tier();
        let mut told = Vec::with_capacity(count);
        let mut first_parent = None;
        let mut unnamed = 0;
        let tokens = event.tokens.chunks_exact(block_tokens);
        for (index, (hash, tokens)) in event.hashes.iter().zip(tokens).enumerate() {
            let extra = event.extra_keys.get(index);
            before.follow(tokens, extra, index == 0 && event.parent.is_none(), event);
            let known = self.add(*hash, before, tier);
            match known.name {
                Some(name) => {
                    if told.is_empty() {
                        first_parent = name.parent;
                    }
                    told.push(name.block);
                }
                None => unnamed += 1,
            }
        }
        writer.stored(first_parent, &told, tier);
        Outcome::Taken { unnamed }
    }

    /// Takes in blocks that are gone; returns how many of them were not known.
    pub(super) fn removed(&mut self, event: &Removed, writer: &mut EventWriter) -> usize {
        if !self.is_told(event.group) {
            return 0;
        }
        let tier = event.medium.tier();
        let mut gone = Vec::with_capacity(event.hashes.len());
        let mut unknown = 0;
        for hash in &event.hashes {
            let Entry::Occupied(mut entry) = self.blocks.entry(*hash) else {
                unknown += 1;
                continue;
            };
            let known = entry.get_mut();
            let copies = &mut known.copies[place(tier)];
            if *copies == 0 {
                unknown += 1;
                continue;
            }
            *copies -= 1;
            if *copies == 0 {
                gone.extend(known.name.map(|name| name.block.sequence));
            }
            if known.copies == [0; 4] {
                entry.remove();
            }
        }
        writer.removed(&gone, tier);
        unknown
    }

    /// A connector that moves blocks by name only: they are named if the engine named them before.
    fn stored_by_name(&mut self, event: &Stored, writer: &mut EventWriter) -> Outcome {
        let tier = event.medium.tier();
        if !event
            .hashes
            .iter()
            .all(|hash| self.blocks.contains_key(hash))
        {
            return Outcome::NoTokens;
        }
        let mut unnamed = 0;
        for hash in &event.hashes {
            let known = self.blocks.get_mut(hash).expect("all are known");
            let copies = &mut known.copies[place(tier)];
            *copies = copies.saturating_add(1);
            match known.name {
                Some(name) => writer.stored(name.parent, &[name.block], tier),
                None => unnamed += 1,
            }
        }
        Outcome::Taken { unnamed }
    }

    /// What stands before the first block of an event.
    fn start(&self, event: &Stored) -> Result<Before, Outcome> {
        let tier = event.medium.tier();
        match event.parent {
            None => Ok(Before::root(event)),
            Some(parent) => {
                let known = self.blocks.get(&parent);
                let known = known.ok_or(Outcome::UnknownParent(tier))?;
                Ok(Before {
                    salt: known.salt,
                    name: known.name,
                    nameless: known.name.is_none(),
                })
            }
        }
    }

    fn add(&mut self, hash: EngineHash, before: Before, tier: Tier) -> Known {
        let known = self.blocks.entry(hash).or_insert(Known {
            name: before.name,
            salt: before.salt,
            copies: [0; 4],
        });
        let copies = &mut known.copies[place(tier)];
        *copies = copies.saturating_add(1);
        *known
    }

    /// Whether events of this group are told. Older versions name none.
    fn is_told(&self, group: Option<u32>) -> bool {
        match (self.group, group) {
            (Some(Some(told)), Some(group)) => told == group,
            _ => true,
        }
    }

    fn new_blocks(&self, event: &Stored) -> usize {
        let is_new = |hash: &&EngineHash| !self.blocks.contains_key(hash);
        event.hashes.iter().filter(is_new).count()
    }

    fn room(&self) -> usize {
        self.blocks_max.saturating_sub(self.blocks.len())
    }
}

/// The end of a sequence so far.
#[derive(Clone, Copy, Debug)]
struct Before {
    salt: SaltHash,
    name: Option<Name>,
    /// Something in the sequence is not told by tokens.
    nameless: bool,
}

impl Before {
    /// The start of a sequence: the first block's keys say the salt.
    fn root(event: &Stored) -> Self {
        let lora = event.lora_name.as_deref();
        let texts = event.extra_keys.first().map(|extra| &extra.texts[..]);
        let (salt, known) = match without_adapter(texts.unwrap_or_default(), lora) {
            [] => (None, true),
            [salt] => (Some(salt.as_str()), true),
            _ => (None, false),
        };
        // An adapter that is known by its number only cannot be asked for: requests name it.
        let numbered = event.lora_id.is_some_and(|id| id != 0) && lora.is_none();
        Self {
            salt: SaltHash::new(salt, lora),
            name: None,
            nameless: !known || numbered,
        }
    }

    fn follow(&mut self, tokens: &[TokenId], extra: Option<&Extra>, is_root: bool, event: &Stored) {
        if let Some(extra) = extra {
            let others = without_adapter(&extra.texts, event.lora_name.as_deref());
            self.nameless |= extra.beyond_tokens || (!is_root && !others.is_empty());
        }
        if self.nameless {
            self.name = None;
            return;
        }
        let block = BlockHash::of(tokens, self.salt);
        let parent = self.name.map(|name| name.block.sequence);
        let sequence = SequenceHash::extend(parent, block);
        self.name = Some(Name {
            parent,
            block: StoredBlock { block, sequence },
        });
    }
}

/// The texts among a block's keys without the adapter's name, which comes first.
fn without_adapter<'a>(texts: &'a [String], lora: Option<&str>) -> &'a [String] {
    match texts {
        [first, rest @ ..] if Some(first.as_str()) == lora => rest,
        texts => texts,
    }
}

const fn place(tier: Tier) -> usize {
    match tier {
        Tier::Device => 0,
        Tier::Host => 1,
        Tier::Disk => 2,
        Tier::Remote => 3,
    }
}
