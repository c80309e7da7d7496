//! Runs batches: checks them, flattens them, and takes them through the layers.

use std::sync::Arc;

use blockplane_protocol::{BlockId, LayerIndex, TokenId};

use super::error::{ForwardError, LoadError};
use super::{LayerWeights, Model};
use crate::ops::{AttentionShape, Batch, CpuOps, HeadNorms, KvView, Ops, Output};

/// The new tokens of one sequence in one step: a chunk of its prompt, or its last token.
#[derive(Clone, Copy, Debug)]
pub struct SequenceSlice<'a> {
    /// The new tokens, at least one.
    pub tokens: &'a [TokenId],
    /// Position of the first of them; keys and values of everything before are in the blocks.
    pub position: u32,
    /// Block table of the sequence, covering at least `position + tokens.len()` tokens.
    pub blocks: &'a [BlockId],
    /// Whether the logits after the last token are wanted.
    pub logits: bool,
}

/// Limits of an [`Executor`]; they fix its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecutorOptions {
    /// Most tokens of one batch. Default 2,048. Each takes about
    /// `4 * (4 * hidden + 3 * intermediate)` bytes, once used.
    pub batch_tokens_max: usize,
    /// Most sequences of one batch with logits. Default 256. Each takes `4 * vocab_size` bytes,
    /// once used.
    pub logit_rows_max: usize,
}

impl Default for ExecutorOptions {
    fn default() -> Self {
        Self {
            batch_tokens_max: 2048,
            logit_rows_max: 256,
        }
    }
}

/// Runs steps of a model, one at a time. Several executors may share a model; their operations
/// then take turns on its threads.
#[derive(Debug)]
pub struct Executor<O: Ops = CpuOps> {
    model: Arc<Model<O>>,
    options: ExecutorOptions,
    batch: Batch,
    written: Vec<BlockId>,
    buffers: Buffers<O>,
}

#[derive(Debug)]
struct Buffers<O: Ops> {
    /// The residual stream.
    hidden: O::Matrix,
    normed: O::Input,
    rotation: O::Matrix,
    qkv: O::Matrix,
    queries: O::Matrix,
    attended: O::Matrix,
    attended_input: O::Input,
    gate_up: O::Matrix,
    activated: O::Input,
    last: O::Input,
    logits: O::Matrix,
}

/// Logits of the sequences that wanted them, in the order of the batch.
#[derive(Debug)]
pub struct Logits<'a, O: Ops = CpuOps> {
    ops: &'a O,
    matrix: &'a O::Matrix,
    rows: usize,
}

impl<O: Ops> Logits<'_, O> {
    /// How many sequences wanted logits.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// The logits of the whole vocabulary after the last token of a sequence.
    ///
    /// # Panics
    /// When `row` is not below [`rows`](Self::rows).
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        assert!(row < self.rows, "row {row} of {} rows of logits", self.rows);
        self.ops.row(self.matrix, row)
    }
}

impl<O: Ops<Error = std::io::Error>> Executor<O> {
    /// An executor with its own buffers.
    ///
    /// # Errors
    /// [`LoadError::Memory`] when their address space cannot be had.
    pub fn new(model: Arc<Model<O>>, options: ExecutorOptions) -> Result<Self, LoadError> {
        let buffers = Buffers::new(&model, options).map_err(|source| LoadError::Memory {
            what: "activations",
            bytes: options.batch_tokens_max * size_of::<f32>(),
            source,
        })?;
        Ok(Self {
            model,
            options,
            batch: Batch::default(),
            written: Vec::new(),
            buffers,
        })
    }
}

impl<O: Ops> Executor<O> {
    /// The model that it runs.
    #[must_use]
    pub const fn model(&self) -> &Arc<Model<O>> {
        &self.model
    }

    /// The limits that it was made with.
    #[must_use]
    pub const fn options(&self) -> ExecutorOptions {
        self.options
    }

    /// Computes the new tokens of all slices in one batch, writes their keys and values into their
    /// blocks, and returns the logits that were asked for.
    ///
    /// `on_layer(l)` is called on this thread when layer `l` of every block of this step is in
    /// place, before the next layer is computed. The blocks are the caller's for the length of
    /// the call, as [`KvView`] explains.
    ///
    /// # Errors
    /// A [`ForwardError`] when the batch is not valid; then nothing was written.
    pub fn forward(
        &mut self,
        slices: &[SequenceSlice<'_>],
        kv: &dyn KvView,
        on_layer: &mut dyn FnMut(LayerIndex),
    ) -> Result<Logits<'_, O>, ForwardError> {
        self.check(slices, kv)?;
        self.batch.clear();
        for slice in slices {
            self.batch
                .push(slice.tokens, slice.position, slice.blocks, slice.logits);
        }
        let model = &*self.model;
        let (ops, config, b) = (&model.ops, &model.config, &mut self.buffers);
        let (batch, rows) = (&self.batch, self.batch.rows());

        ops.embed(batch, model.embedding(), &mut b.hidden);
        let scale = config.rope.attention_scale;
        ops.rotation(batch, &model.rope_frequencies, scale, &mut b.rotation);
        for ((index, layer), &window) in (0..).zip(&model.layers).zip(&config.windows) {
            let index = LayerIndex(index);
            let shape = AttentionShape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                window,
            };
            b.attention(ops, batch, index, layer, shape, config.rms_norm_eps, kv);
            on_layer(index);
            b.feed_forward(ops, rows, layer, config.rms_norm_eps);
        }

        let logit_rows = &batch.logit_rows;
        if !logit_rows.is_empty() {
            let eps = config.rms_norm_eps;
            ops.rms_norm_rows(logit_rows, &b.hidden, &model.norm, eps, &mut b.last);
            let count = logit_rows.len();
            ops.linear(
                count,
                &b.last,
                &model.output,
                None,
                Output::Store,
                &mut b.logits,
            );
        }
        Ok(Logits {
            ops,
            matrix: &b.logits,
            rows: logit_rows.len(),
        })
    }

    fn check(&mut self, slices: &[SequenceSlice<'_>], kv: &dyn KvView) -> Result<(), ForwardError> {
        let config = &self.model.config;
        let layout = kv.layout();
        let accepted = self.model.kv_layout(layout.block_tokens);
        if !accepted.exchangeable_with(layout) {
            return Err(ForwardError::Layout {
                found: format!("{layout:?}"),
                accepted: format!("{accepted:?}"),
            });
        }
        let limits = [
            (
                "tokens",
                slices.iter().map(|slice| slice.tokens.len()).sum::<usize>(),
                self.options.batch_tokens_max,
            ),
            (
                "rows of logits",
                slices.iter().filter(|slice| slice.logits).count(),
                self.options.logit_rows_max,
            ),
        ];
        for (what, found, max) in limits {
            if found > max {
                return Err(ForwardError::Batch { what, found, max });
            }
        }
        let block_tokens = layout.block_tokens as usize;
        self.written.clear();
        for (sequence, slice) in slices.iter().enumerate() {
            if slice.tokens.is_empty() {
                return Err(ForwardError::Empty { sequence });
            }
            let end = u64::from(slice.position) + slice.tokens.len() as u64;
            if end > config.context_tokens_max as u64 {
                return Err(ForwardError::Context {
                    sequence,
                    end,
                    max: config.context_tokens_max,
                });
            }
            if let Some(&token) = slice
                .tokens
                .iter()
                .find(|&&token| token as usize >= config.vocab_size)
            {
                return Err(ForwardError::Token {
                    sequence,
                    token,
                    vocab_size: config.vocab_size,
                });
            }
            let first = slice.position as usize;
            let needed = (first + slice.tokens.len()).div_ceil(block_tokens);
            let Some(table) = slice.blocks.get(..needed) else {
                return Err(ForwardError::BlockTable {
                    sequence,
                    found: slice.blocks.len(),
                    needed,
                });
            };
            if let Some(&block) = table.iter().find(|block| block.0 >= kv.blocks()) {
                return Err(ForwardError::Block {
                    sequence,
                    block,
                    blocks: kv.blocks(),
                });
            }
            self.written.extend(&table[first / block_tokens..]);
        }
        self.written.sort_unstable();
        match self.written.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ForwardError::SharedBlock { block: pair[0] }),
            None => Ok(()),
        }
    }
}

impl<O: Ops> Buffers<O> {
    fn new(model: &Model<O>, options: ExecutorOptions) -> Result<Self, O::Error> {
        let (c, ops, tokens) = (&model.config, &model.ops, options.batch_tokens_max);
        let heads = c.heads * c.head_dim;
        Ok(Self {
            hidden: ops.matrix(tokens, c.hidden_size)?,
            normed: ops.input(tokens, c.hidden_size)?,
            rotation: ops.matrix(tokens, c.head_dim)?,
            qkv: ops.matrix(tokens, c.qkv_size())?,
            queries: ops.matrix(tokens, heads)?,
            attended: ops.matrix(tokens, heads)?,
            attended_input: ops.input(tokens, heads)?,
            gate_up: ops.matrix(tokens, 2 * c.intermediate_size)?,
            activated: ops.input(tokens, c.intermediate_size)?,
            last: ops.input(options.logit_rows_max, c.hidden_size)?,
            logits: ops.matrix(options.logit_rows_max, c.vocab_size)?,
        })
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one layer")]
    fn attention(
        &mut self,
        ops: &O,
        batch: &Batch,
        index: LayerIndex,
        layer: &LayerWeights<O>,
        shape: AttentionShape,
        eps: f32,
        kv: &dyn KvView,
    ) {
        let rows = batch.rows();
        ops.rms_norm(rows, &self.hidden, &layer.input_norm, eps, &mut self.normed);
        let bias = layer.qkv_bias.as_ref();
        ops.linear(
            rows,
            &self.normed,
            &layer.qkv,
            bias,
            Output::Store,
            &mut self.qkv,
        );
        let norms = layer
            .head_norms
            .as_ref()
            .map(|(query, key)| HeadNorms { query, key, eps });
        ops.rope_and_write_kv(
            batch,
            index,
            shape,
            norms,
            &self.qkv,
            &self.rotation,
            &mut self.queries,
            kv,
        );
        ops.attention(batch, index, shape, &self.queries, kv, &mut self.attended);
        ops.convert(rows, &self.attended, &mut self.attended_input);
        ops.linear(
            rows,
            &self.attended_input,
            &layer.attention_output,
            layer.attention_output_bias.as_ref(),
            Output::Add,
            &mut self.hidden,
        );
    }

    fn feed_forward(&mut self, ops: &O, rows: usize, layer: &LayerWeights<O>, eps: f32) {
        ops.rms_norm(rows, &self.hidden, &layer.post_norm, eps, &mut self.normed);
        let bias = layer.gate_up_bias.as_ref();
        ops.linear(
            rows,
            &self.normed,
            &layer.gate_up,
            bias,
            Output::Store,
            &mut self.gate_up,
        );
        ops.silu_mul(rows, &self.gate_up, &mut self.activated);
        let bias = layer.down_bias.as_ref();
        ops.linear(
            rows,
            &self.activated,
            &layer.down,
            bias,
            Output::Add,
            &mut self.hidden,
        );
    }
}
