//! Token sequences cut into fixed-size blocks, hashed as they grow.

use crate::hash::{BlockHash, SaltHash, SequenceHash};

/// Id of one token in the model's vocabulary.
pub type TokenId = u32;

/// Hashes of one full block of a [`TokenSequence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBlock {
    /// Hash of the block's own tokens.
    pub block: BlockHash,
    /// Hash of the sequence up to and including the block.
    pub sequence: SequenceHash,
}

/// A growing token sequence with the hashes of its full blocks.
#[derive(Clone, Debug)]
pub struct TokenSequence {
    tokens: Vec<TokenId>,
    blocks: Vec<TokenBlock>,
    block_tokens: usize,
    salt: SaltHash,
}

impl TokenSequence {
    /// An empty sequence with blocks of `block_tokens` tokens.
    ///
    /// # Panics
    /// When `block_tokens` is 0.
    #[must_use]
    pub fn new(block_tokens: usize, salt: SaltHash) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        Self {
            tokens: Vec::new(),
            blocks: Vec::new(),
            block_tokens,
            salt,
        }
    }

    /// A sequence that already holds `tokens`.
    ///
    /// # Panics
    /// When `block_tokens` is 0.
    #[must_use]
    pub fn from_tokens(tokens: &[TokenId], block_tokens: usize, salt: SaltHash) -> Self {
        let mut sequence = Self::new(block_tokens, salt);
        sequence.extend(tokens);
        sequence
    }

    /// Appends one token; returns the block that it completed, if it did.
    pub fn push(&mut self, token: TokenId) -> Option<TokenBlock> {
        self.tokens.push(token);
        if !self.tokens.len().is_multiple_of(self.block_tokens) {
            return None;
        }
        let start = self.tokens.len() - self.block_tokens;
        let block = BlockHash::of(&self.tokens[start..], self.salt);
        let parent = self.blocks.last().map(|block| block.sequence);
        let full = TokenBlock {
            block,
            sequence: SequenceHash::extend(parent, block),
        };
        self.blocks.push(full);
        Some(full)
    }

    /// Appends several tokens.
    pub fn extend(&mut self, tokens: &[TokenId]) {
        self.tokens.reserve(tokens.len());
        for &token in tokens {
            self.push(token);
        }
    }

    /// All tokens.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Hashes of the full blocks, in order.
    #[must_use]
    pub fn blocks(&self) -> &[TokenBlock] {
        &self.blocks
    }

    /// Number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Blocks needed to hold all tokens, the partial last one included.
    #[must_use]
    pub fn blocks_needed(&self) -> usize {
        self.tokens.len().div_ceil(self.block_tokens)
    }
}
