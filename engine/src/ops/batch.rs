//! The new tokens of several sequences, flattened into rows.

use std::ops::Range;

use blockplane_protocol::{BlockId, TokenId};

/// A flattened batch. Row `r` is token `tokens[r]` at position `positions[r]` of its sequence.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The token of every row.
    pub tokens: Vec<TokenId>,
    /// The position of every row in its sequence.
    pub positions: Vec<u32>,
    /// The sequence of every row, as an index into `sequences`.
    pub owners: Vec<u32>,
    /// The sequences, in the order of their rows.
    pub sequences: Vec<BatchSequence>,
    /// Block tables of all sequences, one after the other.
    pub blocks: Vec<BlockId>,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<usize>,
}

/// One sequence of a [`Batch`].
#[derive(Clone, Debug)]
pub struct BatchSequence {
    /// Its rows.
    pub rows: Range<usize>,
    /// Position of its first row; everything before it is in its blocks.
    pub position: usize,
    /// Its block table, as a range of [`Batch::blocks`].
    pub blocks: Range<usize>,
}

impl Batch {
    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Removes everything and keeps the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.owners.clear();
        self.sequences.clear();
        self.blocks.clear();
        self.logit_rows.clear();
    }

    /// Appends a sequence: its new tokens, the position of the first, its block table.
    pub(crate) fn push(
        &mut self,
        tokens: &[TokenId],
        position: u32,
        blocks: &[BlockId],
        logits: bool,
    ) {
        let rows = self.tokens.len()..self.tokens.len() + tokens.len();
        let table = self.blocks.len()..self.blocks.len() + blocks.len();
        let owner = u32::try_from(self.sequences.len()).expect("a batch is far below 2^32 rows");
        self.tokens.extend_from_slice(tokens);
        self.positions.extend((position..).take(tokens.len()));
        self.owners.extend(std::iter::repeat_n(owner, tokens.len()));
        self.blocks.extend_from_slice(blocks);
        if logits {
            self.logit_rows.push(rows.end - 1);
        }
        self.sequences.push(BatchSequence {
            rows,
            position: position as usize,
            blocks: table,
        });
    }
}
